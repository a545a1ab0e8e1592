"""Files that are damaged, foreign or hostile: a clear error, nothing executed, no change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cases.pretrained import Net, compressed, refused, same, snapshot
from polyadic.pretrained import from_pretrained, save_pretrained


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Net, Path]:
    net = compressed()
    save_pretrained(net, tmp_path / "model")
    return net, tmp_path / "model"


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change the configuration."""
    file = folder / "polyadic_config.json"
    content = json.loads(file.read_text())
    result = edit(content)
    file.write_text(json.dumps(content if result is None else result))


def with_layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content["layers"]["mlp.2"].update(changes)

    return edit


def with_argument(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        content["layers"]["mlp.2"]["arguments"].update(changes)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "reads up to 1; install a newer one"),
        (lambda c: c.update(format_version=True), "format_version must be a positive integer"),
        (lambda c: c.update(format_version="1"), "format_version must be a positive integer"),
        (lambda c: c.update(more=1), "unknown entries: more"),
        (lambda c: c.pop("layers") and None, "describes no CP layers"),
        (lambda c: [c], "describes no CP layers"),
        (lambda c: c.update(layers=[]), "describes no CP layers"),
        (lambda c: c["layers"].pop("mlp.2") and None, "mlp.2.weight is missing"),
        (lambda c: c["layers"].update({"../x": c["layers"]["mlp.2"]}), "it has no '../x'"),
        (lambda c: c.update(ties={"head.bias": 3}), "ties must be names by names"),
        (lambda c: c.update(ties={"norm.weight": "norm.running_mean"}), None),
        (with_layer(**{"class": "os.system"}), "class must be one of CPLinear"),
        (with_layer(**{"class": ["CPLinear"]}), "class must be one of CPLinear"),
        (with_layer(**{"class": "CPTiedLinear"}), "arguments must be exactly"),
        (with_layer(dtype="int8"), "dtype must be one of"),
        (with_layer(dtype="float64"), "dtypes in"),
        (with_layer(dtype=[]), "dtype must be one of"),
        (with_layer(weights=1), "weights must be true or false"),
        (with_layer(weights=True), "mlp.2.cp.weights is missing"),
        (with_layer(hook="x"), "must be an object with class, arguments and dtype"),
        (with_layer(tied_to=3), "tied_to must be the name of a layer"),
        (with_layer(tied_to="mlp"), "which is no layer with a tensor of its own"),
        (with_layer(tied_to="mlp.2"), "which is no layer with a tensor of its own"),
        (with_layer(tied_to="conv"), "needs a tensor of"),
        (with_layer(joint={"layers": [2], "index": [2]}), "joint must have layers and an index"),
        (with_layer(joint={"layers": [2], "index": [1]}), "mlp.2.cp.joint.factors.0 is missing"),
        (with_layer(arguments=[]), "arguments must be exactly"),
        (with_argument(rank=0), "rank is out of range"),
        (with_argument(rank=True), "rank is out of range"),
        (with_argument(rank=2.0), "rank is out of range"),
        (with_argument(rank="break-even"), "rank is out of range"),
        (with_argument(rank=10**400), "rank is out of range"),
        (with_argument(rank=2**31 - 1), "rank must be at most"),
        (with_argument(rank=3), "has shape (5, 2), not (5, 3)"),
        (with_argument(in_shape=[2, 5]), "has shape (5, 2), not (2, 2)"),
        (with_argument(in_shape=[5, 3]), "in_shape must multiply to 10"),
        (with_argument(in_shape=[1] * 10**5), "in_shape is out of range"),
        (with_argument(in_shape=[[5], 2]), "in_shape is out of range"),
        (with_argument(in_features=2**61 - 1), "in_features is out of range"),
        (with_argument(in_features=2**31 - 1), "'mlp.2' in_features is 10, not 2147483647"),
        (with_argument(memory="most"), "memory must be one of"),
        (with_argument(bias=0), "bias is out of range"),
        (with_argument(device="cuda"), "arguments must be exactly"),
    ],
)
def test_a_configuration_that_is_not_one(
    saved: tuple[Net, Path], edit: Any, message: str | None
) -> None:
    edited(saved[1], edit)
    if message is None:
        same(saved[0], from_pretrained(saved[1], Net()))
    else:
        refused(saved[1], Net(), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe{", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"layers": {}, "layers": {}}', "an entry twice"),
        (b'{"layers": {}, "format_version": NaN}', "NaN is no JSON"),
        (b'{"layers": {}, "format_version": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"\x80\x04\x95cposix\nsystem\n", "cannot be read"),
        (b"{" + b" " * (2**26 + 1), "more than the"),
    ],
)
def test_a_configuration_that_is_no_json(
    saved: tuple[Net, Path], text: bytes, message: str
) -> None:
    (saved[1] / "polyadic_config.json").write_bytes(text)
    refused(saved[1], Net(), message)


def test_missing_files(saved: tuple[Net, Path], tmp_path: Path) -> None:
    _, folder = saved
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        from_pretrained(tmp_path / "nothing", Net())
    refused(tmp_path, Net(), "it was not written by polyadic.save_pretrained")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, Net(), "pytorch_model.bin may hold code and is not read")
    (folder / "polyadic_config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refused(folder, Net(), "that describes CP layers of polyadic")


def test_two_descriptions_must_agree(saved: tuple[Net, Path]) -> None:
    _, folder = saved
    own = json.loads((folder / "polyadic_config.json").read_text())
    theirs = {"quantization_config": {**own, "quant_method": "polyadic"}}
    (folder / "config.json").write_text(json.dumps(theirs))
    same(saved[0], from_pretrained(folder, Net()))
    own["layers"]["mlp.2"]["arguments"]["memory"] = "least"
    (folder / "polyadic_config.json").write_text(json.dumps(own))
    refused(folder, Net(), "describe different layers")
    (folder / "config.json").write_text("{")
    refused(folder, Net(), "config.json cannot be read")


def test_a_pickle_is_not_opened(saved: tuple[Net, Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"x": Bomb()}, saved[1] / "model.safetensors")
    refused(saved[1], Net(), "model.safetensors cannot be read")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "polyadic_config.json"])
def test_truncated_files(saved: tuple[Net, Path], name: str) -> None:
    file = saved[1] / name
    whole = file.read_bytes()
    net = Net()
    step = max(1, len(whole) // 120)
    cuts = {*range(0, len(whole) - 2, step), 1, 7, 8, 9, len(whole) - 3}
    for cut in sorted(cuts):
        file.write_bytes(whole[:cut])
        refused(saved[1], net, "cannot be read")
    file.write_bytes(whole)
    same(saved[0], from_pretrained(saved[1], net))


def test_appended_bytes_are_seen(saved: tuple[Net, Path]) -> None:
    with open(saved[1] / "model.safetensors", "ab") as opened:
        opened.write(b"more")
    refused(saved[1], Net(), "cannot be read")


def test_tensors_of_another_kind(saved: tuple[Net, Path]) -> None:
    file = saved[1] / "model.safetensors"
    tensors = load_file(file)
    for name, value in [
        ("norm.num_batches_tracked", torch.tensor(1.0)),
        ("norm.weight", torch.ones(6, dtype=torch.int32)),
        ("norm.weight", torch.ones(6, dtype=torch.complex64)),
        ("conv.bias", torch.ones(6, dtype=torch.bool)),
    ]:
        save_file({**tensors, name: value}, file)
        refused(saved[1], Net(), f"{name} is {value.dtype}")


def test_precision_is_that_of_the_file(saved: tuple[Net, Path]) -> None:
    net = Net().to(torch.bfloat16)
    same(saved[0], from_pretrained(saved[1], net))


def shards(folder: Path) -> dict[str, str]:
    """Take the tensors apart into two files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({n: tensors[n] for n in names if places[n] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return places


def test_shards_are_read(saved: tuple[Net, Path]) -> None:
    shards(saved[1])
    same(saved[0], from_pretrained(saved[1], Net()))


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "a\\b.safetensors",
        "x.bin",
        3,
        None,
        "C:x.safetensors",
        "a\0.safetensors",
    ],
)
def test_an_index_points_beside_itself(saved: tuple[Net, Path], file: Any) -> None:
    places = shards(saved[1])
    index = {"weight_map": {**places, "norm.weight": file}}
    (saved[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved[1], Net(), "must be in a .safetensors file beside it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more.weight": "model-00003-of-00003.safetensors"}, "cannot be read"),
        ({"norm.weight": "model-00003-of-00003.safetensors"}, "does not hold what"),
        ({"norm.weights": "model-00001-of-00002.safetensors"}, "does not hold what"),
    ],
)
def test_an_index_that_is_wrong(
    saved: tuple[Net, Path], change: dict[str, str], message: str
) -> None:
    places = shards(saved[1])
    index = {"weight_map": {**places, **change}}
    (saved[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved[1], Net(), message)
    for content in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{"):
        (saved[1] / "model.safetensors.index.json").write_text(content)
        refused(saved[1], Net(), "cannot be read")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["CPLinear", "CPTiedLinear", "embed", "float32", "least", 0, 1, 6, 10]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to every value in a JSON document."""
    found = [path]
    if isinstance(content, dict):
        for key, value in content.items():
            found += places(value, (*path, key))
    if isinstance(content, list):
        for i, value in enumerate(content):
            found += places(value, (*path, i))
    return found


@pytest.fixture(scope="module")
def shared_save(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    torch.manual_seed(0)
    net, folder = compressed(), tmp_path_factory.mktemp("saved")
    save_pretrained(net, folder)
    return net, folder


def attempt(folder: Path) -> Net | None:
    """A model loaded, or None after a ValueError that left it as it was."""
    model = Net()
    before = snapshot(model)
    try:
        return from_pretrained(folder, model)
    except ValueError:
        assert [one[:2] for one in before] == [one[:2] for one in snapshot(model)]
        return None


def loads_or_refuses(net: Net, folder: Path) -> bool:
    """Nothing is loaded but the values that were saved."""
    model = attempt(folder)
    if model is None:
        return False
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    return True


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_anywhere_in_the_configuration(
    shared_save: tuple[Net, Path], data: st.DataObject
) -> None:
    net, folder = shared_save
    file = folder / "polyadic_config.json"
    whole = file.read_text()
    content = json.loads(whole)
    way = data.draw(st.sampled_from(places(content)))
    value = data.draw(VALUES)
    if not way:
        content = value
    else:
        holder = content
        for key in way[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and data.draw(st.booleans()):
            holder[data.draw(st.text(max_size=4))] = value
        else:
            holder[way[-1]] = value
    try:
        file.write_text(json.dumps(content))
        loads_or_refuses(net, folder)
    finally:
        file.write_text(whole)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_in_the_header_of_the_tensors(
    shared_save: tuple[Net, Path], data: st.DataObject
) -> None:
    net, folder = shared_save
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    start = data.draw(st.integers(0, length - 1))
    piece = data.draw(st.binary(min_size=1, max_size=6) | st.sampled_from([b"0", b"9", b'"', b" "]))
    try:
        # Values behind the header may be read from another place, but nothing may break.
        file.write_bytes(whole[:start] + piece + whole[min(length, start + len(piece)) :])
        attempt(folder)
    finally:
        file.write_bytes(whole)
    assert loads_or_refuses(net, folder)
