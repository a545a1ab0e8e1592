"""Models with CP layers, saved and loaded."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import polyadic
from cases.pretrained import Net, compressed, on_meta, refused, same
from polyadic.nn import (
    CPConv1d,
    CPConv2d,
    CPConv3d,
    CPConvTranspose1d,
    CPConvTranspose2d,
    CPConvTranspose3d,
    CPEmbedding,
    CPLinear,
)
from polyadic.nn.kinds import BY_NAME
from polyadic.pretrained import from_pretrained, save_pretrained


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, Path]:
    net = compressed()
    save_pretrained(net, tmp_path / "model")
    return net, tmp_path / "model"


@pytest.mark.parametrize("skeleton", [Net, compressed], ids=["dense", "cp"])
def test_round_trip(saved: tuple[Net, Path], skeleton: Callable[[], Net]) -> None:
    net, folder = saved
    other = skeleton()
    assert from_pretrained(folder, other) is other
    same(net, other)
    assert other.mlp[0] is other.again
    assert other.head.cp is other.embed.cp
    assert other.shared is other.head.bias
    ids = torch.randint(11, (2, 4))
    assert torch.equal(net(ids), other(ids))


def test_a_shared_parameter_is_stored_once(saved: tuple[Net, Path]) -> None:
    net, folder = saved
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        stored = sum(t.numel() for t in map(opened.get_tensor, opened.keys()))
    buffers = sum(b.numel() for n, b in net.named_buffers() if n != "scale")
    assert stored == sum(p.numel() for p in net.parameters()) + buffers
    assert sorted(f.name for f in folder.iterdir()) == ["model.safetensors", "polyadic_config.json"]


def test_training_goes_on(saved: tuple[Net, Path]) -> None:
    net, folder = saved
    other = from_pretrained(folder, Net())
    for one in (net, other):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
        optimizer.zero_grad()
        one(torch.randint(11, (3, 5))).square().mean().backward()
        optimizer.step()
    same(net, other)


def test_what_is_loaded_is_a_copy(saved: tuple[Net, Path]) -> None:
    _, folder = saved
    other = from_pretrained(folder, Net())
    before = copy.deepcopy(other.state_dict())
    weights = folder / "model.safetensors"
    with open(weights, "r+b") as opened:
        opened.seek(weights.stat().st_size - 400)
        opened.write(b"\xff" * 400)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_flags_are_the_skeletons(saved: tuple[Net, Path]) -> None:
    _, folder = saved
    other = Net()
    other.mlp.eval()
    other.mlp.requires_grad_(False)
    from_pretrained(folder, other)
    assert not other.mlp[0].training
    assert other.conv.training
    assert other.conv.cp.training
    assert not any(p.requires_grad for p in other.mlp.parameters())
    assert all(p.requires_grad for p in other.conv.parameters())


class Bare(nn.Module):
    """Without buffers, so that it can be on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 6)


def test_a_skeleton_on_the_meta_device(tmp_path: Path) -> None:
    net = Bare()
    net.a = CPLinear(6, 4, rank=2)
    net.b.weight.data = net.b.weight.data.t().contiguous().t()  # not contiguous
    save_pretrained(net, tmp_path)
    other = from_pretrained(tmp_path, on_meta(Bare))
    same(net, other)
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    third = from_pretrained(tmp_path, on_meta(Bare), device="meta")
    assert {p.device.type for p in third.parameters()} == {"meta"}


def test_ties_of_dense_layers_come_back(tmp_path: Path) -> None:
    """Also where the skeleton does not have them."""

    def make(tied: bool) -> nn.Module:
        net = nn.ModuleDict({"cp": nn.Linear(4, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        if tied:
            net["b"].weight = net["a"].weight
        return net

    net = make(True)
    net["cp"] = CPLinear(4, 4, rank=2)
    save_pretrained(net, tmp_path)
    for tied in (True, False):
        same(net, from_pretrained(tmp_path, make(tied)))
        same(net, from_pretrained(tmp_path, on_meta(lambda tied=tied: make(tied))))


def test_parts_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    net = Bare()
    net.a = CPLinear(6, 4, rank=2)
    whole = torch.randn(8, 4)
    net.b.weight = nn.Parameter(whole[:6])
    net.register_buffer("rest", whole[4:])
    save_pretrained(net, tmp_path)
    skeleton = Bare()
    skeleton.register_buffer("rest", torch.zeros(4, 4))
    same(net, from_pretrained(tmp_path, skeleton))


LAYERS: list[Any] = [
    ("linear", lambda **o: CPLinear(10, 12, rank=3, **o), lambda: nn.Linear(10, 12)),
    (
        "no-bias",
        lambda **o: CPLinear(7, 5, bias=False, rank=20, order=1, **o),
        lambda: nn.Linear(7, 5, bias=False),
    ),
    (
        "conv2d",
        lambda **o: CPConv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), rank=3, **o),
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)),
    ),
    (
        "conv3d-same",
        lambda **o: CPConv3d(2, 3, 3, padding="same", dilation=2, rank=2, **o),
        lambda: nn.Conv3d(2, 3, 3, padding="same", dilation=2),
    ),
    (
        "transpose1d",
        lambda **o: CPConvTranspose1d(4, 6, 3, stride=2, output_padding=1, rank=3, **o),
        lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    ),
    (
        "transpose2d",
        lambda **o: CPConvTranspose2d(4, 6, 3, groups=2, bias=False, dilation=2, rank=3, **o),
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False, dilation=2),
    ),
    (
        "transpose3d",
        lambda **o: CPConvTranspose3d(2, 3, (1, 2, 3), rank=2, **o),
        lambda: nn.ConvTranspose3d(2, 3, (1, 2, 3)),
    ),
    ("embedding", lambda **o: CPEmbedding(29, 8, rank=3, **o), lambda: nn.Embedding(29, 8)),
]


# Where a tensor is, how modes are chosen by default, and what a CP embedding refuses.
NOT_SAVED = {"device", "dtype", "order", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"}


# What a skeleton holds already: a module around layers, which are saved by themselves.
IN_SKELETONS = {"CPSharedInput"}


@pytest.mark.parametrize("name", sorted(set(polyadic.nn.__all__) - {"CPTiedLinear"} - IN_SKELETONS))
def test_every_argument_of_every_layer_is_saved(name: str) -> None:
    arguments = set(inspect.signature(getattr(polyadic.nn, name)).parameters)
    assert set(BY_NAME[name].arguments) == arguments - NOT_SAVED
    assert set(BY_NAME) == set(polyadic.nn.__all__) - IN_SKELETONS


def test_spectral_layers_need_equal_ones_in_the_skeleton(tmp_path: Path) -> None:
    """Torch has none of which they could be made, and none that they could become."""

    def made(**options: Any) -> Any:
        first = polyadic.nn.CPSpectralConv1d(4, 4, 4, rank=2, resolution_scaling=2, **options)
        last = polyadic.nn.CPSpectralConv1d(4, 4, 6, rank=2, separable=True, fft_norm="ortho")
        return nn.Sequential(first, last, nn.Flatten(), polyadic.nn.CPLinear(128, 4, rank=2))

    torch.manual_seed(0)
    model, skeleton = made(), made(max_n_modes=4, memory="least")
    polyadic.save_pretrained(model, tmp_path)
    polyadic.from_pretrained(tmp_path, skeleton)
    x = torch.randn(2, 4, 16)
    assert torch.equal(skeleton(x), model(x))
    skeleton[0].n_modes = 3
    with pytest.raises(ValueError, match=r"n_modes is \(3,\), not \(4,\)"):
        polyadic.from_pretrained(tmp_path, skeleton)
    model[0].n_modes = 3
    polyadic.save_pretrained(model, tmp_path)
    polyadic.from_pretrained(tmp_path, skeleton)
    assert torch.equal(skeleton(x), model(x))
    with pytest.raises(ValueError, match="it is Conv1d, not CPSpectralConv1d"):
        polyadic.from_pretrained(tmp_path, nn.Sequential(nn.Conv1d(4, 4, 3), *made()[1:]))
    with pytest.raises(ValueError, match="'0' is a CPSpectralConv1d, which stands in for no layer"):
        polyadic.pretrained.merge(model)
    assert isinstance(model[3], polyadic.nn.CPLinear)


def test_layers_of_one_input_are_saved_and_loaded(tmp_path: Path) -> None:
    def made() -> Any:
        layers = [polyadic.nn.CPLinear(8, n, rank=2) for n in (6, 4)]
        return nn.Sequential(polyadic.nn.CPSharedInput(layers))

    torch.manual_seed(0)
    model, skeleton = made(), made()
    polyadic.save_pretrained(model, tmp_path)
    polyadic.from_pretrained(tmp_path, skeleton)
    x = torch.randn(3, 8)
    for ours, theirs in zip(skeleton(x), model(x), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(("make", "dense"), [p[1:] for p in LAYERS], ids=[p[0] for p in LAYERS])
def test_every_layer(make: Any, dense: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Sequential(make(dtype=dtype, memory="fast"))
    save_pretrained(net, tmp_path)
    other = from_pretrained(tmp_path, nn.Sequential(dense()))
    same(net, other)
    assert other[0].memory == "fast"


def test_complex128_is_refused_by_name(tmp_path: Path) -> None:
    """Files of safetensors have no such numbers, and are not written without imaginary parts."""
    factors = nn.Sequential(CPLinear(6, 4, rank=2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"one dtype of .*complex64, got torch\.complex128"):
        save_pretrained(factors, tmp_path)
    beside = nn.Sequential(CPLinear(6, 4, rank=2), nn.Linear(4, 2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"1\.weight is torch\.complex128, .* save .* complex64"):
        save_pretrained(beside, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alone", [False, True])
def test_a_scale_of_components_is_kept(alone: bool, tmp_path: Path) -> None:
    layer = CPLinear(6, 4, rank=2)
    layer.cp = polyadic.CPTensor(layer.cp.tensorized_shape, 2, weights=True)
    nn.init.normal_(layer.cp.weights)
    net = layer if alone else nn.Sequential(layer)
    save_pretrained(net, tmp_path)
    if alone:
        # A model that is a layer itself needs that very layer as a skeleton.
        with pytest.raises(ValueError, match="it is itself what would be replaced"):
            from_pretrained(tmp_path, nn.Linear(6, 4))
        other = CPLinear(6, 4, rank=2)
        other.cp = polyadic.CPTensor(layer.cp.tensorized_shape, 2, weights=True)
        same(net, from_pretrained(tmp_path, other))
    else:
        same(net, from_pretrained(tmp_path, nn.Sequential(nn.Linear(6, 4))))


def test_joint_layers_share_their_tensor_again(tmp_path: Path) -> None:
    def dense() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    net = dense()
    net[0], net[2] = CPConv2d.joint([{}, {"padding": 1}], 4, 4, 3, rank=3)
    save_pretrained(net, tmp_path)
    other = from_pretrained(tmp_path, dense())
    same(net, other)
    assert other[0].cp.joint is other[2].cp.joint
    assert (other[0].cp.index, other[2].cp.index) == ((0,), (1,))


def test_layers_with_one_tensor_share_it_again(tmp_path: Path) -> None:
    net = nn.Sequential(CPLinear(6, 6, rank=2), CPLinear(6, 6, rank=2))
    net[1].cp = net[0].cp
    save_pretrained(net, tmp_path)
    other = from_pretrained(tmp_path, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    same(net, other)
    assert other[0].cp is other[1].cp
    # Two layers that are apart are not what was saved.
    with pytest.raises(ValueError, match="tied_to is None, not '0'"):
        from_pretrained(tmp_path, nn.Sequential(CPLinear(6, 6, rank=2), CPLinear(6, 6, rank=2)))


def test_a_head_before_its_embedding(tmp_path: Path) -> None:
    def dense() -> nn.ModuleDict:
        return nn.ModuleDict({"head": nn.Linear(6, 11, bias=False), "wte": nn.Embedding(11, 6)})

    net = dense()
    net["wte"] = CPEmbedding(11, 6, rank=3)
    net["head"] = net["wte"].as_linear()
    save_pretrained(net, tmp_path)
    same(net, from_pretrained(tmp_path, dense()))


def test_heads_of_embeddings_that_share_a_tensor(tmp_path: Path) -> None:
    def dense() -> nn.ModuleDict:
        parts = {"a": nn.Embedding(11, 6), "b": nn.Embedding(11, 6), "c": nn.Linear(6, 11)}
        return nn.ModuleDict(parts)

    net = dense()
    net["a"], net["b"] = CPEmbedding.joint(2, 11, 6, rank=3)
    net["c"] = net["b"].as_linear(bias=True)
    save_pretrained(net, tmp_path)
    other = from_pretrained(tmp_path, dense())
    assert other["a"].cp.joint is other["b"].cp.joint is other["c"].cp.joint
    ids, x = torch.arange(11), torch.randn(2, 6)
    assert not torch.equal(net["a"](ids), net["b"](ids))
    for name, argument in (("a", ids), ("b", ids), ("c", x)):
        assert torch.equal(net[name](argument), other[name](argument))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_go_where_the_skeleton_is(saved: tuple[Net, Path]) -> None:
    net, folder = saved
    other = from_pretrained(folder, Net().cuda())
    assert {value.device.type for value in other.state_dict().values()} == {"cuda"}
    same(net, other.cpu())
    bare = nn.Sequential(CPLinear(6, 4, rank=2)).cuda()
    save_pretrained(bare, folder)
    meta = on_meta(lambda: nn.Sequential(nn.Linear(6, 4)))
    same(bare, from_pretrained(folder, meta, device="cuda"))


def test_a_frozen_model_is_saved_as_it_was(tmp_path: Path) -> None:
    net = nn.Sequential(CPLinear(64, 48, rank=40), nn.ReLU(), CPLinear(48, 6, rank=2))
    plain = copy.deepcopy(net)
    polyadic.freeze(net, batch=64)
    assert net[0].frozen is not None
    save_pretrained(net, tmp_path)
    dense = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 6))
    same(plain, from_pretrained(tmp_path, dense))
    with pytest.raises(ValueError, match="frozen; call"):
        from_pretrained(tmp_path, net)
    values = from_pretrained(tmp_path, polyadic.unfreeze(net)).state_dict()
    assert all(torch.equal(value, values[name]) for name, value in plain.state_dict().items())


def test_saving_twice_replaces(saved: tuple[Net, Path]) -> None:
    _, folder = saved
    net = compressed()
    save_pretrained(net, folder)
    same(net, from_pretrained(folder, Net()))
    assert len(list(folder.iterdir())) == 2


def test_a_failed_save_leaves_the_old_one(
    saved: tuple[Net, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, folder = saved

    def half(tensors: dict[str, Tensor], file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("polyadic.durable.sealed.save_file", half)
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(compressed(), folder)
    assert len(list(folder.iterdir())) == 2
    same(net, from_pretrained(folder, Net()))


class Own(CPLinear):
    pass


class WithExtra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}


def sparse() -> nn.Module:
    net = nn.Sequential(CPLinear(4, 4, rank=2))
    net.register_buffer("mask", torch.eye(4).to_sparse())
    return net


def lone_head() -> nn.Module:
    return nn.Sequential(CPEmbedding(11, 4, rank=2).as_linear())


def head_of_another() -> nn.Module:
    """Of an embedding that is not in the model, though its tensor is."""
    first, second = CPEmbedding.joint(
        [{"num_embeddings": 11}, {"num_embeddings": 12}], embedding_dim=4, rank=2
    )
    return nn.Sequential(first, second.as_linear())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: {}, TypeError, "Module, got dict"),
        (Net, ValueError, "Net holds no CP layer"),
        (lambda: nn.Sequential(Own(4, 4, rank=2)), ValueError, "0 is Own, a class of its own"),
        (
            lambda: nn.Sequential(CPLinear(4, 4, rank=2), WithExtra(4, 4)),
            ValueError,
            "1._extra_state is dict",
        ),
        (
            lambda: nn.Sequential(CPLinear(4, 4, rank=2, device="meta")),
            ValueError,
            "on the meta device",
        ),
        (sparse, ValueError, "mask is sparse or quantized"),
        (lone_head, ValueError, "shares the factors of a CPEmbedding that is not in the model"),
        (head_of_another, ValueError, "1 shares the factors of a CPEmbedding that is not in"),
    ],
)
def test_what_cannot_be_saved(
    make: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        save_pretrained(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def sized(**sizes: Any) -> Callable[[], Net]:
    def make() -> Net:
        net = Net()
        for name, module in sizes.items():
            setattr(net, name, module)
        return net

    return make


def hooked() -> Net:
    net = Net()
    net.conv.register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize(
    ("skeleton", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 10)), "Sequential is not what was saved: it has no"),
        (sized(head=nn.Linear(6, 12)), "'head' out_features is 12, not 11"),
        (sized(head=nn.Linear(6, 11, bias=False)), "'head' bias is False, not True"),
        (sized(embed=nn.Embedding(11, 6)), "'embed' padding_idx is None, not 2"),
        (
            sized(embed=nn.Embedding(11, 6, padding_idx=2, max_norm=1.0)),
            "'embed' max_norm is 1.0, not None",
        ),
        (sized(conv=nn.Conv2d(6, 6, 3)), "'conv' it is Conv2d, not Conv1d or CPConv1d"),
        (sized(conv=nn.Conv1d(6, 6, 3, padding=1)), "'conv' groups is 1, not 2"),
        (sized(conv=CPConv1d(6, 6, 3, padding=1, groups=2, rank=4)), "'conv' padding_mode is"),
        (sized(head=CPLinear(6, 11, rank=3)), "'head' kind is 'CPLinear', not 'CPTiedLinear'"),
        (sized(norm=nn.BatchNorm1d(7)), "norm.weight has shape (6,), not (7,)"),
        (sized(norm=nn.BatchNorm1d(6, affine=False)), "norm.weight is unexpected"),
        (sized(more=nn.Linear(2, 2)), "more.weight is missing"),
        (sized(norm=nn.Identity()), "norm.running_mean is unexpected"),
        (lambda: on_meta(Net), "scale is on the meta device"),
        (hooked, "'conv' it has the forward hook <lambda>, which would be lost"),
        (lambda: {}, "must be a torch.nn.Module, got dict"),
    ],
)
def test_a_skeleton_that_does_not_fit(
    saved: tuple[Net, Path], skeleton: Callable[[], Any], message: str
) -> None:
    other = skeleton()
    refused(saved[1], other, message, TypeError if isinstance(other, dict) else ValueError)


class Listed(nn.Module):
    """It calls its layers from a plain list."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.body = [self.first]

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](x)


def test_a_layer_called_from_a_list_is_not_exchanged_behind_it(tmp_path: Path) -> None:
    """The list would keep the layer of the skeleton, whose values are any."""
    model = Listed(CPLinear(6, 10, rank=3))
    save_pretrained(model, tmp_path)
    refused(tmp_path, Listed(nn.Linear(6, 10)), "'first' it is kept in body too")
    # Where the CP layer is there already, it stays and is filled.
    again = from_pretrained(tmp_path, Listed(CPLinear(6, 10, rank=3)))
    x = torch.randn(2, 6)
    assert torch.equal(again(x), model(x))
    with pytest.raises(ValueError, match="'first' is kept in body too"):
        polyadic.merge(model)
