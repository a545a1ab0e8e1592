"""Files: whole or not at all, none but regular ones, every flipped bit noticed, old ones read."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.reliability.damage import flips
from benchmarks.reliability.kills import child, ended
from cases.pretrained import Net, compressed, refused, same
from polyadic.durable import checkpoint, sealed
from polyadic.durable.files import replacing, write_text
from polyadic.nn import CPLinear
from polyadic.pretrained import from_pretrained, save_pretrained


def test_an_error_leaves_the_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def half() -> None:
        with replacing(path) as draft:
            draft.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("there", [True, False])
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "file"
    if there:
        checkpoint.save(path, "test", {"x": torch.ones(3)})
    before = path.read_bytes() if there else None
    found = tmp_path / "message"

    def fill() -> None:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        try:
            checkpoint.save(path, "test", {"x": torch.ones(100_000)})
        except OSError as error:
            found.write_text(str(error))

    assert ended(child(fill)) == 0
    left = "the file that was there is unchanged" if there else "no file was left there"
    assert "File too large" in found.read_text()
    assert f"{path} could not be written; {left}" in found.read_text()
    assert (path.read_bytes() if there else None) == before
    assert sorted(os.listdir(tmp_path)) == sorted(["message", *["file"] * there])


def test_drafts_of_killed_processes_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"

    def die() -> None:
        with replacing(path) as draft:
            draft.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert ended(child(die)) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    with replacing(path) as draft:
        draft.write_text("mine")
        write_text(path, "of another")
        assert draft.read_text() == "mine"
        assert len(os.listdir(tmp_path)) == 2
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["file"]


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    """Each writes its own; the last one stays, whole, and no draft of any."""
    path = tmp_path / "file"
    states = [{"x": torch.full((1000,), float(i))} for i in range(8)]
    threads = [threading.Thread(target=checkpoint.save, args=(path, "test", one)) for one in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = checkpoint.load(path, "test")["x"]
    assert any(torch.equal(found, one["x"]) for one in states)
    assert sorted(os.listdir(tmp_path)) == ["file", "file.previous"]


def test_a_link_is_followed_and_the_usual_mode_is_given(tmp_path: Path) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (tmp_path / "link").symlink_to(target / "file")
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "link") as draft:
        sealed.write(draft, {"x": torch.ones(2)}, {})
    assert (tmp_path / "link").is_symlink()
    modes = [stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "usual", target / "file")]
    assert modes[0] == modes[1]


STATE: dict[str, Any] = {
    "plain": [1, -(2**70), 0.1, float("inf"), "ü\0", None, True, (), (1, (2, [3]))],
    "keys": {0: "int", "0": "text", "tensor": 1, "dict": {"tuple": [{}]}},
    "bits": torch.tensor([float("nan"), -0.0, 1e-45]),
    "kinds": [torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.int8, torch.bool)],
    "shapes": [torch.tensor(3.0), torch.zeros(0, 4), torch.arange(6).view(2, 3).t()],
}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        same_kind = type(one) is type(other) and len(one) == len(other)
        return same_kind and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def test_a_state_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "file", "test", STATE)
    assert equal(checkpoint.load(tmp_path / "file", "test"), STATE)
    shared = torch.ones(50_000)
    checkpoint.save(tmp_path / "once", "test", {"a": shared, "b": [shared.detach()]})
    assert (tmp_path / "once").stat().st_size < 210_000


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", {(1,): 2}, 1j])
def test_a_state_that_cannot_be_stored_is_refused_by_place(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
        checkpoint.save(tmp_path / "file", "test", {"a": [0, value]})
    assert not os.listdir(tmp_path)


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.save(path, "test", {"x": torch.arange(6.0), "n": 3}, generations=1)
    for changed in flips(path.read_bytes(), 5):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            checkpoint.load(path, "test")


def test_every_flipped_bit_of_saved_tensors_is_noticed(tmp_path: Path) -> None:
    save_pretrained(nn.Sequential(CPLinear(4, 3, rank=1, order=1)), tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for changed in flips(whole, 13):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match="cannot be read"):
            from_pretrained(tmp_path, nn.Sequential(nn.Linear(4, 3)))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for step in (1, 2):
        checkpoint.save(path, "test", {"step": step})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(RuntimeWarning, match=r"going on from file\.previous"):
        assert checkpoint.load(path, "test") == {"step": 1}
    path.unlink()
    assert checkpoint.exists(path)


FIFOS = ["model.safetensors", "polyadic_config.json", "config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", FIFOS)
def test_a_fifo_is_refused_and_does_not_wait(tmp_path: Path, name: str) -> None:
    save_pretrained(compressed(), tmp_path)
    if name == "model.safetensors.index.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, Net(), "is a FIFO; expected a file")


def test_a_fifo_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "file")
    with pytest.raises(ValueError, match="is a FIFO"):
        checkpoint.load(tmp_path / "file", "test")
    with pytest.raises(ValueError, match="is a FIFO"):
        checkpoint.save(tmp_path / "file", "test", {})


def test_a_folder_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        save_pretrained(compressed(), folder)
    save_pretrained(compressed(), tmp_path / "there")
    (tmp_path / "there").rename(folder)
    with pytest.raises(ValueError, match="is not UTF-8"):
        from_pretrained(folder, Net())


def test_a_buffer_with_the_format_s_own_name_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(CPLinear(4, 4, rank=1))
    net.register_buffer("__metadata__", torch.ones(1))
    with pytest.raises(ValueError, match="__metadata__"):
        save_pretrained(net, tmp_path)
    assert not os.listdir(tmp_path)


def unmarked(folder: Path) -> None:
    """Write a saved model as polyadic 0.1 did: no mark, no checksum, no description inside."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "polyadic_config.json").read_text())
    del content["saved"]
    (folder / "polyadic_config.json").write_text(json.dumps(content))


def test_models_of_polyadic_0_1_are_read_and_replaced(tmp_path: Path) -> None:
    old, new = compressed(), compressed()
    save_pretrained(old, tmp_path)
    unmarked(tmp_path)
    same(old, from_pretrained(tmp_path, Net()))
    save_pretrained(new, tmp_path)
    same(new, from_pretrained(tmp_path, Net()))


def test_checkpoints_of_polyadic_0_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = {"format": "test", "version": 1, "x": torch.ones(3)}
    torch.save(content, path)
    assert equal(checkpoint.load(path, "test"), content)
    whole = path.read_bytes()
    at = whole.index(torch.ones(3).numpy().tobytes())
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(path, "test")


def wide(seed: int, rank: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(CPLinear(6, 4, rank=rank, order=1))


@pytest.mark.parametrize("first", ["marked", "unmarked"])
def test_a_kill_at_any_call_leaves_one_version_that_loads(tmp_path: Path, first: str) -> None:
    """Two versions whose layers differ, so that a mix of them could not be loaded."""
    old, new = wide(0, 2), wide(1, 3)
    done = False
    for number in range(1, 200):
        folder = tmp_path / str(number)
        save_pretrained(old, folder)
        if first == "unmarked":
            unmarked(folder)
        if done := ended(child(lambda f=folder, n=number: dying(new, f, n))) == 0:
            break
        loaded = from_pretrained(folder, nn.Sequential(nn.Linear(6, 4)))
        assert loaded[0].cp.rank in (2, 3)
        same(old if loaded[0].cp.rank == 2 else new, loaded)
        save_pretrained(new, folder)
        assert len(os.listdir(folder)) == 2
    assert done
    assert number > 5


def dying(model: nn.Module, folder: Path, number: int) -> None:
    """Save, and be killed before the call of that number into C code that may touch a file."""
    calls = 0

    def look(frame: Any, event: str, called: Any) -> None:
        nonlocal calls
        module = getattr(called, "__module__", None) or ""
        if event == "c_call" and (module in ("posix", "io", "_io", "fcntl") or "safe" in module):
            calls += 1
            if calls == 9 * number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(look)
    save_pretrained(model, folder)
    sys.setprofile(None)


def test_a_reader_beside_a_writer_sees_one_version(tmp_path: Path) -> None:
    """Two versions whose layers differ; what is loaded is one of them, in every bit."""
    versions = [wide(0, 2), wide(1, 3)]
    folder = tmp_path / "model"
    save_pretrained(versions[0], folder)

    def write() -> None:
        while True:
            for one in versions[::-1]:
                save_pretrained(one, folder)

    writer = child(write)
    try:
        seen = []
        for _ in range(150):
            loaded = from_pretrained(folder, nn.Sequential(nn.Linear(6, 4)))
            seen.append(loaded[0].cp.rank)
            same(versions[seen[-1] - 2], loaded)
    finally:
        os.kill(writer, signal.SIGKILL)
        assert ended(writer) == -signal.SIGKILL
    assert set(seen) == {2, 3}
