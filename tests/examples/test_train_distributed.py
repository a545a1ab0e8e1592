"""The example of several processes, by torchrun: a worker is killed, and training goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples import train_distributed

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_distributed.py"


def run(*options: str) -> str:
    """What two workers print, who may be started anew three times, as the documents say."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        str(EXAMPLE),
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_on_gpus_each_process_takes_its_own_and_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU and no other process is here: what the example asks torch for is noted."""
    asked: dict[str, Any] = {}
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: asked.update(gpu=number))
    store = dist.HashStore()
    monkeypatch.setattr(train_distributed, "rendezvous", lambda url: iter([(store, 3, 4)]))

    def begin(backend: str, **own: Any) -> None:
        asked.update(backend=backend, rank=own["rank"], size=own["world_size"])

    monkeypatch.setattr(dist, "init_process_group", begin)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(train_distributed, "train", lambda options, device: asked.update(on=device))
    train_distributed.main([])
    wanted = {"gpu": 1, "backend": "nccl", "rank": 3, "size": 4, "on": torch.device("cuda")}
    assert asked == wanted


def right(printed: str) -> float:
    found = re.search(r"([\d.]+)% right", printed)
    assert found, printed
    return float(found.group(1))


@pytest.mark.slow
def test_training_goes_on_after_a_worker_was_killed(tmp_path: Path) -> None:
    options = ["--layout", "sharded", "--rank-processes", "2", "--folder", str(tmp_path)]
    printed = run(*options, "--kill-at", "34")
    assert "goes on after step 30" in printed
    assert right(printed) > 85
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000050", "step-000060"]


@pytest.mark.long
@pytest.mark.parametrize("layout", ["data", "sharded"])
@pytest.mark.parametrize("rank_processes", ["1", "2"])
def test_it_ends_as_if_nothing_had_happened(
    layout: str, rank_processes: str, tmp_path: Path
) -> None:
    """Bit for bit: what is printed in the end holds all digits of a sum of all outputs."""
    options = ["--layout", layout, "--rank-processes", rank_processes]
    killed = run(*options, "--folder", str(tmp_path), "--kill-at", "47")
    assert "goes on after step 40" in killed
    assert killed.splitlines()[-1] == run(*options).splitlines()[-1]
