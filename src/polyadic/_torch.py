"""Every private word of torch that this library uses, and what else it asks about torch's state.

No other module names anything of torch's that begins with an underscore; a test holds that. All of
these words were seen to exist and to mean the same in torch 2.11 to 2.14. Questions that code asks
while a compiler traces it are put in words that the compilers of those versions understand.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeGuard, TypeVar, cast
from uuid import uuid4

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.autograd import Function, forward_ad, profiler
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")
MOST_ENTRIES = 4096

# Under torch.compile, a symbolic number of rows gets one plan for all sizes, which is the plan for
# this many rows.
UNKNOWN_BATCH = 256


def not_traced(function: F) -> F:
    """Have a compiler call a function while it traces, and keep the result as a constant.

    torch.compiler.assume_constant_result does the same, but imports the whole compiler.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


def keep_whole(function: Callable[..., Any]) -> None:
    """Have compilers put calls of a function into their graphs as they are; imports a compiler."""
    torch.compiler.allow_in_graph(function)


@not_traced
def exporting() -> bool:
    """Whether the graph being traced is to be exported."""
    # The compiler of torch 2.11 takes this for true in every graph that it traces.
    return torch.compiler.is_exporting()


def known(*sizes: int) -> bool:
    """Whether torch.compile, which is tracing, knows all sizes as constants."""
    # This import takes half a second, so that only a trace makes it.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    known = True
    for size in sizes:
        known = known and has_static_value(size)
    return known


# Every call of a layer asks the next five questions. They are answered in C, because even a call of
# a Python function would show in the time of a small layer.
# Whether a transform of torch.func is active.
transforms_active = torch._C._are_functorch_transforms_active
# The innermost level of forward mode, which is negative outside forward mode.
forward_mode_level: Callable[[], int] = functools.partial(getattr, forward_ad, "_current_level")
# Whether one of torch's profilers is running.
is_profiled: Callable[[], bool] = functools.partial(getattr, profiler, "_is_profiler_enabled")
# Whether autocast is on for any device.
any_autocast = torch._C._is_any_autocast_enabled
# Each large product asks how many modes want to see each operation, for the state of
# torch.jit.trace if that is running, and whether torch may use oneDNN.
count_dispatch_modes = torch._C._len_torch_dispatch_stack
tracing_state = torch._C._get_tracing_state
onednn_is_enabled = torch._C._get_mkldnn_enabled
# X Wᵀ + bias of x (n, k), weight (m, k), bias (m,) or None, all in float32, made by oneDNN where
# this torch can be asked for that.
has_onednn_product: bool = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
onednn_product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = torch.nn.functional.linear
if has_onednn_product:
    onednn_product = functools.partial(
        torch.ops.mkldnn._linear_pointwise, attr="none", scalars=[], algorithm=""
    )
# The tensor inside a wrapper that an ended transform of torch.func has left behind.
unwrap_if_dead = torch._C._functorch.unwrap_if_dead


def innermost(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers that transforms of torch.func have put around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors that are no wrappers lie in the same memory, even of no entries."""
    return bool(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata)


def in_transform() -> bool:
    """Whether a transform of torch.func is active, or a level of forward mode."""
    return transforms_active() or forward_mode_level() >= 0


def transformed() -> bool:
    """Whether derivatives, or a transform of torch.func, are asked for in what runs now."""
    return torch.is_grad_enabled() or transforms_active() or forward_mode_level() >= 0


def observed() -> bool:
    """Whether a mode or a tracer wants to see each operation that runs now."""
    return count_dispatch_modes() > 0 or tracing_state() is not None


def in_function_mode() -> bool:
    """Whether a mode wants to see each call of a function of torch."""
    return torch._C._len_torch_function_stack() > 0


def is_traced() -> bool:
    """Whether torch.jit.trace is running."""
    return tracing_state() is not None


# A context in which a subclass of Tensor is a plain tensor to functions of torch.
as_plain_tensor = torch._C.DisableTorchFunctionSubclass
# The ``__torch_function__`` of a subclass that wants to see operations below autograd alone.
no_torch_function: Any = torch._C._disabled_torch_function_impl
# The type of the class ``Tensor``.
TensorMeta = torch._C._TensorMeta
# An older way to ask for a tensor's memory.
typed_storage = Tensor._typed_storage


def without_memory(
    cls: type[Tensor], like: Tensor, shape: Sequence[int], strides: Sequence[int]
) -> Any:
    """Make a tensor of a subclass that has a shape, and the dtype and device of another tensor."""
    make: Any = torch.Tensor._make_wrapper_subclass
    return make(cls, shape, strides=strides, dtype=like.dtype, device=like.device)


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_has_float16() -> bool:
    """Whether oneDNN computes in float16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """A Function's ``apply`` for plain tensors outside transforms, without what torch asks there.

    ``Function.apply`` looks for transforms and unwraps arguments in Python, which takes as long as
    one product of a small layer.
    """
    base: Any = super(Function, function)
    apply: Callable[..., Any] = base.apply
    return apply


# The classes of tensors that hold their numbers and nothing else.
OWN_CLASSES = frozenset((Tensor, torch.nn.Parameter))
# The device that CUDA kernels are started on; to be asked where there is a CUDA tensor.
current_cuda_device: Callable[[], int] = getattr(
    torch._C, "_cuda_getDevice", torch.cuda.current_device
)

# The handle of the stream on which operations of a CUDA device are started.
current_raw_stream: Callable[[int], int] = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda index: torch.cuda.current_stream(index).cuda_stream,
)


# Memory for a tensor of a shape, strides and dtype, on a CPU and on the current CUDA device, as
# compiled code asks for it, in a third of the time that torch.empty takes.
Empty = Callable[[Sequence[int], Sequence[int], torch.dtype], Tensor]
_EMPTY_ON_CPU: Empty | None = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
_EMPTY_ON_CUDA: Empty | None = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


# Whether torch keeps to deterministic algorithms.
deterministic = torch._C._get_deterministic_algorithms


def empty_beside(leader: Tensor) -> Empty:
    """Return a function that makes tensors without contents on the device of a plain tensor."""
    index = leader.get_device()
    quick = _EMPTY_ON_CPU if index < 0 else _EMPTY_ON_CUDA
    # Torch can be told to fill such memory, and then has deterministic algorithms too.
    if quick is not None and not deterministic() and (index < 0 or index == current_cuda_device()):
        return quick
    device = leader.device
    return lambda shape, strides, dtype: torch.empty_strided(
        shape, strides, dtype=dtype, device=device
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of one of torch's own classes and not of a subclass of them."""
    return type(tensor) in (Tensor, torch.nn.Parameter, FakeTensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and a device, but no values."""
    return type(tensor) is FakeTensor


def is_spread(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor, of which each process holds a part."""
    # Asked without torch's module of them, whose import takes long.
    return isinstance(value, Tensor) and hasattr(value, "placements")


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of a DTensor, which its processes then ask for together; differentiable."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device."""
    if not torch.compiler.is_compiling() and not any_autocast():
        return False
    return _exists(device_type) and torch.is_autocast_enabled(device_type)


def no_autocast(like: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context that switches autocast off for the device of a tensor if it is on."""
    kind = like.device.type
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


@not_traced
def _exists(device_type: str) -> bool:
    # The compiler of torch 2.11 cannot trace this function.
    return torch.amp.is_autocast_available(device_type)


def check_before_style(style: Any, check: Callable[[str, torch.nn.Module], None]) -> None:
    """Have a style of ``parallelize_module`` call a check with its name and a module, first."""
    apply = style._apply

    @functools.wraps(apply)
    def checked(self: Any, module: torch.nn.Module, device_mesh: Any) -> torch.nn.Module:
        check(style.__name__, module)
        parallel: torch.nn.Module = apply(self, module, device_mesh)
        return parallel

    style._apply = checked


def check_before_sharding(check: Callable[[Any, Any], None]) -> None:
    """Have ``fully_shard`` call a check with each parameter and the mesh it is to be cut over."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    kept: Any = FSDPParam
    make = kept.__init__

    @functools.wraps(make)
    def checked(self: Any, param: Any, *args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):
            if hasattr(given, "mesh"):
                check(param, given.mesh)
                break
        make(self, param, *args, **kwargs)

    kept.__init__ = checked


def run_of_group(job: str) -> str | None:
    """Name the run of a job that all processes of the default group begin; none waits for another.

    The process that begins the job first makes up the name, and the others read it. Each time the
    job is begun again its run has another name. None where there is one process.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    _begun[job] += 1
    # torchrun keeps the store when it starts the processes again.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.distributed_c10d._get_default_store()
    name: bytes = store.compare_set(f"polyadic/{start}/{job}/{_begun[job]}", "", uuid4().hex)
    return name.decode()


_begun: Counter[str] = Counter()


class Memo(dict[Any, Any]):
    """A dict that is emptied when it holds ``MOST_ENTRIES``, so that it cannot grow for ever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if len(self) >= MOST_ENTRIES:
            self.clear()
        super().__setitem__(key, value)


def memoized(function: Callable[P, T]) -> Callable[P, T]:
    """Remember results by argument. While torch.compile traces, the function is just called."""
    cached = functools.lru_cache(maxsize=MOST_ENTRIES)(function)
    remembered = cast(Callable[P, T], cached)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)

    return call
