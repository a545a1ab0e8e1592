"""Count what a step of training says between processes, and write the tables of the page.

python -m benchmarks.communication            # count, seconds; no second process is needed
python -m benchmarks.communication --report   # the page from the record
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks.communication import formulas
from benchmarks.communication.count import Count, pretended
from benchmarks.pages import between, markdown_rows, three_digits
from benchmarks.records import ROOT, environment
from polyadic.distributed import RankParallel
from polyadic.durable.files import write_text
from polyadic.nn import CPLinear

RECORD = ROOT / "benchmarks" / "results" / "communication.jsonl"
PAGE = ROOT / "docs" / "how" / "distributed.md"
WIDTH, BLOCKS, RANK, ROWS = 256, 2, 64, 96
LARGE_WIDTH, LARGE_BLOCKS, LARGE_RANK, LARGE_ROWS = 4096, 32, 512, 4096
MANY = (8, 64, 512, 4096)


class Block(nn.Module):
    """The linear layers of a block of a transformer, without what has no parameters to speak of."""

    def __init__(self, layers: list[formulas.Layer]) -> None:
        super().__init__()
        made = [
            nn.Linear(layer.m, layer.n)
            if layer.rank is None
            else CPLinear(layer.m, layer.n, rank=layer.rank, order=layer.order)
            for layer in layers
        ]
        self.qkv, self.out, self.up, self.down = made

    def forward(self, x: Tensor) -> Tensor:
        """(B, d) → (B, d)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.out(q * k * v)
        return x + self.down(torch.relu(self.up(x)))


def counted(
    blocks: list[list[formulas.Layer]], layout: str, shape: tuple[int, ...], rows: int
) -> dict[str, list[int]]:
    """Collectives and bytes of one step of a model in a layout, by collective."""
    processes = shape[0] * (shape[1] if len(shape) > 1 else 1)
    with pretended(processes):
        model: nn.Module = nn.Sequential(*map(Block, blocks))
        count = Count()
        names = ("first", "second")[: len(shape)]
        mesh = dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)
        if layout == "DDP":
            model = nn.parallel.DistributedDataParallel(model)
            count.of_buckets(model)
        else:
            if layout == "RankParallel × FSDP2":
                parallelize_module(model, mesh["second"], RankParallel())
                mesh = mesh["first"]
            for part in model.children():
                fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
        # A first layer has no gradient of its input to sum, unless something is in front of it.
        x = torch.randn(rows, blocks[0][0].m, requires_grad=True)
        with count:
            model(x).square().mean().backward()
    return count.total()


Formula = Callable[[list[list[formulas.Layer]], int], dict[str, int]]
# By layout and mesh: which of the two kinds of layers it is for, and its formula.
CELLS: list[tuple[str, tuple[int, ...], tuple[int | None, ...], Formula]] = [
    ("DDP", (8,), (None, RANK), lambda b, rows: formulas.data_parallel(b, 8)),
    ("FSDP2", (8,), (None, RANK), lambda b, rows: formulas.fully_sharded(b, 8)),
    ("HSDP", (2, 4), (None, RANK), lambda b, rows: formulas.fully_sharded(b, 4, 2)),
    ("RankParallel × FSDP2", (2, 4), (RANK,),
     lambda b, rows: formulas.rank_parallel(b, 4, 2, rows)),
]  # fmt: skip


def cells() -> list[dict[str, Any]]:
    """What is counted, beside what the formula says."""
    found = []
    for layout, shape, ranks, formula in CELLS:
        for rank in ranks:
            blocks = [formulas.block(WIDTH, rank) for _ in range(BLOCKS)]
            found.append(
                {
                    "kind": "communication",
                    "layout": layout,
                    "mesh": list(shape),
                    "rank": rank,
                    "parameters": sum(map(formulas.parameters, blocks)),
                    "counted": counted(blocks, layout, shape, ROWS),
                    "formula": formula(blocks, ROWS),
                }
            )
    return found


def tables(record: Path = RECORD) -> str:
    """Both tables of the page in Markdown, from a record."""
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    rows = [["layout", "processes", "layers", "parameters", "collectives", "MB of whole tensors"]]
    for cell in lines:
        if cell["kind"] == "communication":
            said = cell["counted"]
            rows.append(
                [
                    cell["layout"],
                    "×".join(map(str, cell["mesh"])),
                    "dense" if cell["rank"] is None else f"CP, rank {cell['rank']}",
                    f"{cell['parameters']:,}",
                    ", ".join(f"{number} {name}" for name, (number, _) in said.items()),
                    three_digits(sum(nbytes for _, nbytes in said.values()) / 1e6),
                ]
            )
    first = markdown_rows(rows, "lrlrlr")
    head = ["layout", "layers", *(f"{many:,} processes" for many in MANY)]
    return f"{first}\n\n{markdown_rows([head, *_large()], 'll' + 'r' * len(MANY))}"


def _large() -> list[list[str]]:
    """Megabytes that each process of many sends in a step of a large model."""
    dense, small = (
        [formulas.block(LARGE_WIDTH, rank) for _ in range(LARGE_BLOCKS)]
        for rank in (None, LARGE_RANK)
    )
    rows = []
    for name, blocks in (("dense", dense), (f"CP, rank {LARGE_RANK}", small)):
        for layout, said in (
            ("DDP", lambda b, p: formulas.data_parallel(b, p)),
            ("HSDP, shards of 8", lambda b, p: formulas.fully_sharded(b, 8, p // 8)),
        ):
            values = [three_digits(formulas.sent(said(blocks, p)) / 1e6) for p in MANY]
            rows.append([layout, name, *values])
    return rows


def main() -> None:
    """Count, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="write the page from the record")
    if parser.parse_args().report:
        page = PAGE.read_text(encoding="utf-8")
        write_text(PAGE, between(page, "communication", tables()))
        return
    lines = [environment(torch.device("cpu"), torch.float32), *cells()]
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    write_text(RECORD, text)


if __name__ == "__main__":
    main()
