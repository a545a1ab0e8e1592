"""Compiling a kernel for a GPU that is not there, and reading what came of it.

Triton brings NVIDIA's assembler and disassembler along: registers, spills, shared memory and the
instructions chosen can be read on any machine.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
# Bytes of shared memory that a program may have, by compute capability.
BYTES_OF_INSTRUCTION = 16
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}


def pointers_to(dtype: torch.dtype, count: int) -> tuple[str, ...]:
    """So many pointers, in Triton's words."""
    return (_NAMES[dtype],) * count


@dataclass(frozen=True)
class Form:
    """One form of a kernel that is compiled.

    Args:
        name: what it is for.
        kernel: what ``triton.jit`` made.
        pointers: its first arguments in Triton's words, ``"*bf16"`` or ``"i32"``, in nested tuples
            where they come so.
        constants: its other arguments.
        warps: warps of a program.
        stages: depth of pipelines.
        wide_loads: whether rows start at multiples of 16 bytes, so that loads take 16 at a time.
        tensor_cores: whether it has a product of tiles, for which a GPU has instructions.
        capabilities: the compute capabilities it is for.
        asserts: whether it asserts something.
        all_wide: whether nothing is loaded but 16 bytes at a time, behind the program's back.
    """

    name: str
    kernel: Any
    pointers: tuple[Any, ...]
    constants: tuple[Any, ...]
    warps: int = 4
    stages: int = 1
    wide_loads: bool = True
    tensor_cores: bool = False
    capabilities: tuple[int, ...] = (80, 90, 100)
    asserts: bool = False
    all_wide: bool = False


@dataclass(frozen=True)
class Code:
    """What a form became.

    Args:
        stack: bytes of stack.
        shared: bytes of shared memory.
        registers: of a thread.
        assembly: the machine code.
        parameters: bits of each parameter, where they are not those that the driver is given.
        asserts: whether it can fail an assertion.
    """

    stack: int
    shared: int
    registers: int
    assembly: str
    parameters: tuple[int, ...] = ()
    asserts: bool = False

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return len(re.findall(pattern, self.assembly))


def compiled(forms: Sequence[Form], capability: int) -> list[Code]:
    """Compile for a compute capability (90 is 9.0)."""
    kernels = [_compiled(form, capability) for form in forms]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "code")
        dumps, codes = [], []
        for kernel in kernels:
            file.write_bytes(kernel.asm["cubin"])
            dumps.append(_output("cuobjdump", "-res-usage", "-elf", str(file)))
            codes.append(_machine_code(dumps[-1]))
        # The disassembler takes half a second to start, so that it reads all forms at once.
        file.write_bytes(b"".join(codes))
        processor = f"SM{capability}{'a' * (capability >= 90)}"
        assembly = _output("nvdisasm", "-b", processor, "-ndf", str(file))
    every = iter(re.findall(r"/\*(\w+)\*/\s+(.*)", assembly))
    found, end = [], 0
    for form, kernel, dump, code in zip(forms, kernels, dumps, codes, strict=True):
        begin, end = end, end + len(code)
        instructions = list(itertools.islice(every, len(code) // BYTES_OF_INSTRUCTION))
        assert int(instructions[0][0], 16) == begin
        text = "\n".join(instruction for _, instruction in instructions)
        found.append(_code(form, kernel, dump, text))
    assert next(every, None) is None
    return found


def _compiled(form: Form, capability: int) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = form.kernel.arg_names
    values = (*form.pointers, *form.constants)
    assert len(names) == len(values), "a form must give every argument"
    cut = len(form.pointers)
    signature = dict(zip(names, form.pointers, strict=False))
    signature |= dict.fromkeys(names[cut:], "constexpr")
    aligned = {
        path: [["tt.divisibility", 16]]
        for position, value in enumerate(form.pointers)
        for path, kind in _leaves(value, (position,))
        if kind.startswith("*")
    }
    source = ASTSource(
        fn=form.kernel,
        signature=signature,
        constexprs=dict(zip(names[cut:], form.constants, strict=True)),
        attrs=aligned,
    )
    return triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": form.warps,
            "num_stages": form.stages,
            "enable_fp_fusion": True,
            **({"debug": True, "sanitize_overflow": False} if form.asserts else {}),
        },
    )


def _machine_code(dump: str) -> bytes:
    """The kernel's instructions, of what is dumped of its file."""
    found = re.search(r"^\.text\.\w+\n(?:.*=.*\n)?((?:0x\w{8}[^\n]*\n)+)", dump, re.MULTILINE)
    assert found is not None, "no code in the file"
    words = [int(word, 16) for word in found[1].split()]
    return struct.pack(f"<{len(words)}I", *words)


def _code(form: Form, kernel: Any, dump: str, assembly: str) -> Code:
    from polyadic.kernels.triton.driver import expected_bits, parameter_bits

    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert found is not None, "no usage in the dump"
    kinds = [kind for value in form.pointers for _, kind in _leaves(value, ())]
    numbers = kinds.count("i32")
    assert "i32" not in kinds[: len(kinds) - numbers], "numbers must stand behind pointers"
    bits = parameter_bits(kernel.asm["ptx"])
    return Code(
        stack=int(found[2]),
        shared=kernel.metadata.shared,
        registers=int(found[1]),
        assembly=assembly,
        parameters=() if bits == expected_bits(len(kinds) - numbers, numbers) else bits,
        # The address of what a failed assertion calls is filled in where the code is loaded.
        asserts=re.search(r"^0x\w+ +__assertfail +R_CUDA", dump, re.MULTILINE) is not None,
    )


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    if isinstance(value, tuple):
        for position, inner in enumerate(value):
            yield from _leaves(inner, (*path, position))
    else:
        yield path, value


def _output(tool: str, *arguments: str) -> str:
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__file__).parent / "bin" / tool
    run = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def faults(form: Form, code: Code, capability: int) -> list[str]:
    """What is wrong with compiled code."""
    found = []
    if code.stack or code.count(r"\b(LDL|STL)\b"):
        found.append(f"spills: {code.stack} bytes of stack, {code.registers} registers")
    if code.shared > SHARED_BYTES[capability]:
        found.append(f"{code.shared} bytes of shared memory")
    if form.tensor_cores and not code.count(r"\b(HMMA|HGMMA|UTC\w*MMA)"):
        found.append("no instruction of tensor cores")
    if form.wide_loads and not code.count(r"\b(LDG|LDGSTS)\S*\.128"):
        found.append("no load of 16 bytes")
    if form.all_wide and (narrow := code.count(r"\bLDG\b|\bLDGSTS(?!\S*\.128)")):
        found.append(f"{narrow} loads of less than 16 bytes, or that a program waits for")
    if form.asserts and not code.asserts:
        found.append("no assertion")
    if code.parameters:
        found.append(f"parameters of {code.parameters} bits")
    return found
