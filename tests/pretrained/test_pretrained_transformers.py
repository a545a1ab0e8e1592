"""Models of transformers with CP layers: saved and loaded by transformers, and by polyadic."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import polyadic
from cases.pretrained import same
from polyadic import surgery
from polyadic.nn import CPEmbedding, CPLinear, CPTiedLinear
from polyadic.pretrained import (
    attach,
    files,
    from_pretrained,
    resize_token_embeddings,
    save_pretrained,
)

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[1, 5, 9, 2], [3, 4, 59, 7]])
# Whether transformers compares the shapes of tensors that are read into such a model, and then
# knows what to do by ignore_mismatched_sizes. The last version for Python 3.10 does not.
COMPARES = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)
REFUSAL: Any = (
    pytest.raises(RuntimeError, match="ignore_mismatched_sizes")
    if COMPARES
    else pytest.raises(ValueError, match=r"tensors of other shapes .* install transformers 5\.23")
)


@pytest.fixture(autouse=True)
def registered() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    polyadic.register_transformers()


def bert_config(**options: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=8,
        **options,
    )


def gpt2_config() -> Any:
    return transformers.GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )


def exchange(model: nn.Module, embedding: str | None = None, head: str | None = None) -> Any:
    """CP layers for the queries and the first layers of the MLPs, and for a tied embedding."""
    targets = r".*(query|intermediate\.dense)"
    if any(name.endswith("query") for name, _ in model.named_modules()):
        for name, layer in surgery.find(model, target_modules=targets).layers.items():
            sizes = layer.in_features, layer.out_features
            surgery.replace(model, name, CPLinear(*sizes, rank=3, order=2))
    if embedding is not None:
        table = model.get_submodule(embedding)
        padding = table.padding_idx
        new = CPEmbedding(60, 16, padding_idx=padding, rank=5)
        surgery.replace(model, embedding, new)
    if head is not None:
        bias = model.get_submodule(head).bias is not None
        surgery.replace(model, head, new.as_linear(bias))
    nn.init.normal_(next(model.parameters()))
    return model.eval()


MODELS: list[Any] = [
    ("bert", lambda: transformers.BertModel(bert_config()), ()),
    (
        "bert-embedding",
        lambda: transformers.BertModel(bert_config()),
        ("embeddings.word_embeddings",),
    ),
    ("masked-lm", lambda: transformers.BertForMaskedLM(bert_config()), ()),
    (
        "masked-lm-tied",
        lambda: transformers.BertForMaskedLM(bert_config()),
        ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ),
    (
        "masked-lm-untied",
        lambda: transformers.BertForMaskedLM(bert_config(tie_word_embeddings=False)),
        ("bert.embeddings.word_embeddings",),
    ),
    (
        "gpt2-tied",
        lambda: transformers.GPT2LMHeadModel(gpt2_config()),
        ("transformer.wte", "lm_head"),
    ),
]
models = pytest.mark.parametrize(
    ("make", "names"), [p[1:] for p in MODELS], ids=[p[0] for p in MODELS]
)


def loaded(model: Any, folder: Path, **options: Any) -> Any:
    """The model by transformers' own from_pretrained, with nothing missing and nothing over."""
    new, report = type(model).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return new


@models
def test_transformers_saves_and_loads(
    make: Callable[[], Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    model = exchange(make(), *names)
    attach(model)
    model.save_pretrained(tmp_path)
    new = loaded(model, tmp_path)
    same(model, new)
    assert not new.training
    assert torch.equal(model(IDS)[0], new(IDS)[0])
    # And once more, after a step of training, from what was loaded.
    new.train()
    new(IDS)[0].square().mean().backward()
    torch.optim.SGD(new.parameters(), lr=0.1).step()
    new.save_pretrained(tmp_path / "again", max_shard_size="4KB")
    assert (tmp_path / "again" / "model.safetensors.index.json").exists()
    same(new, loaded(new, tmp_path / "again"))


@pytest.mark.parametrize("shards", ["4KB", "1GB"])
def test_the_tensors_decide_where_a_save_was_killed(shards: str, tmp_path: Path) -> None:
    """The configuration is of the new save, the tensors of the old one."""
    old, new = (transformers.BertModel(bert_config()) for _ in range(2))
    for model, rank in ((old, 2), (new, 3)):
        polyadic.factorize(model, rank=rank)
        save = partial(model.save_pretrained, max_shard_size=shards)
        files.write_by(tmp_path / str(rank), save)
    (tmp_path / "3" / "config.json").replace(tmp_path / "2" / "config.json")
    same(old, loaded(old, tmp_path / "2"))


@models
def test_polyadic_saves_what_both_load(
    make: Callable[[], Any], names: tuple[str, ...], tmp_path: Path
) -> None:
    model = exchange(make(), *names)
    save_pretrained(model, tmp_path)
    assert {"config.json", "model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    same(model, loaded(model, tmp_path))
    ours = from_pretrained(tmp_path, make())
    same(model, ours)
    # What we have loaded, transformers can save.
    ours.save_pretrained(tmp_path / "again")
    same(model, loaded(model, tmp_path / "again"))
    same(model, from_pretrained(tmp_path / "again", make()))


def test_layers_that_share_a_tensor(tmp_path: Path) -> None:
    """A model that ties nothing, in which polyadic does."""
    model = transformers.BertModel(bert_config(tie_word_embeddings=False)).eval()
    first, second = CPLinear.joint(2, 16, 24, rank=4)
    model.encoder.layer[0].intermediate.dense = first
    model.encoder.layer[1].intermediate.dense = second
    save_pretrained(model, tmp_path)
    for new in (loaded(model, tmp_path), from_pretrained(tmp_path, type(model)(model.config))):
        same(model, new)
        layers = [block.intermediate.dense for block in new.encoder.layer]
        assert layers[0].cp.joint is layers[1].cp.joint


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=True,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_more_than_two_ties(tmp_path: Path) -> None:
    model = t5()
    ((table, *others, head),) = surgery.find(
        model, target_modules=r".*(shared|embed_.*|lm_head)"
    ).ties
    assert len(others) == 2
    new = CPEmbedding(60, 16, rank=5)
    surgery.replace(model, table, new)
    for name in others:
        again = CPEmbedding(60, 16, rank=5)
        again.cp = new.cp
        surgery.replace(model, name, again)
    surgery.replace(model, head, new.as_linear())
    save_pretrained(model, tmp_path)
    restored = loaded(model, tmp_path)
    same(model, restored)
    outputs = [m(IDS, decoder_input_ids=IDS).logits for m in (model, restored)]
    assert torch.equal(*outputs)
    same(model, from_pretrained(tmp_path, t5()))


def test_a_copy_of_a_model_is_saved_too(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    attach(model)
    twin = copy.deepcopy(model)
    twin.encoder.layer[0].attention.self.query = CPLinear(16, 16, rank=2, order=1)
    assert "CPLinear" in repr(twin.config)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    same(twin, loaded(twin, tmp_path / "twin"))
    same(model, loaded(model, tmp_path / "model"))


def test_automodel_restores(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    save_pretrained(model, tmp_path)
    same(model, transformers.AutoModel.from_pretrained(tmp_path))


def test_the_base_model_of_a_model_with_a_head(tmp_path: Path) -> None:
    model = exchange(transformers.BertForMaskedLM(bert_config()), *MODELS[3][2])
    save_pretrained(model, tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(model.bert(IDS)[0], base(IDS)[0])
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(model.bert(IDS)[0], other.bert(IDS)[0])


def test_a_new_head_is_tied_to_the_table_in_cp_format(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()), "embeddings.word_embeddings")
    save_pretrained(model, tmp_path)
    new = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(model(IDS)[0], new.bert(IDS)[0])
    head = new.cls.predictions.decoder
    assert isinstance(head, CPTiedLinear)
    assert head.cp is new.bert.embeddings.word_embeddings.cp
    assert head.bias is new.cls.predictions.bias
    assert torch.equal(head.bias, torch.zeros(60))


@pytest.mark.usefixtures("poison")
def test_the_bias_of_a_new_head_is_zero(tmp_path: Path) -> None:
    """Where the class has it in the layer, as a parameter of no one else."""

    class Base(transformers.PreTrainedModel):
        config_class = transformers.BertConfig
        base_model_prefix = "model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.embed = nn.Embedding(60, 16)
            self.post_init()

    class WithHead(transformers.PreTrainedModel):
        config_class = transformers.BertConfig
        base_model_prefix = "model"
        _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "model.embed.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Base(config)
            self.head = nn.Linear(16, 60)
            self.post_init()

    base = Base(bert_config())
    base.embed = CPEmbedding(60, 16, rank=5)
    save_pretrained(base, tmp_path)
    model = WithHead.from_pretrained(tmp_path)
    assert model.head.cp is model.model.embed.cp
    assert torch.equal(model.head.bias, torch.zeros(60))


def test_ties_survive_tie_weights(tmp_path: Path) -> None:
    model = exchange(transformers.BertForMaskedLM(bert_config()), *MODELS[3][2])
    save_pretrained(model, tmp_path)
    new = loaded(model, tmp_path)
    new.tie_weights()
    same(model, new)


def test_conv1d_of_gpt2_is_left_alone() -> None:
    model = transformers.GPT2LMHeadModel(gpt2_config())
    found = surgery.find(model)
    assert found.ties == (("transformer.wte", "lm_head"),)
    assert set(found.layers) == {"transformer.wte", "transformer.wpe", "lm_head"}
    assert all("Conv1D" in reason for reason in found.skipped.values())
    assert len(found.skipped) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config())).to(dtype)
    save_pretrained(model, tmp_path)
    same(model, loaded(model, tmp_path))
    asked = loaded(model, tmp_path, dtype=torch.float32)
    same(model.to(torch.float32), asked)
    assert {p.dtype for p in asked.half().parameters()} == {torch.float16}


def test_a_layer_of_another_dtype_keeps_it(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    model.encoder.layer[0].attention.self.query.double()
    save_pretrained(model, tmp_path)
    same(model, loaded(model, tmp_path))
    asked = loaded(model, tmp_path, dtype=torch.bfloat16)
    assert asked.encoder.layer[0].attention.self.query.cp.factors[0].dtype == torch.float64
    assert asked.encoder.layer[1].attention.self.query.cp.factors[0].dtype == torch.bfloat16


def test_a_model_inside_another_module(tmp_path: Path) -> None:
    """As sentence encoders hold theirs: polyadic's own format outside, transformers' inside."""

    def make() -> nn.ModuleDict:
        return nn.ModuleDict({"bert": transformers.BertModel(bert_config())})

    model = make()
    exchange(model["bert"])
    save_pretrained(model, tmp_path)
    new = from_pretrained(tmp_path, make())
    same(model, new)
    new["bert"].save_pretrained(tmp_path / "inner")
    same(model["bert"], loaded(model["bert"], tmp_path / "inner"))


def test_training_is_not_refused(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    save_pretrained(model, tmp_path)
    check = pytest.importorskip("transformers.trainer_utils").validate_quantization_for_training
    check(loaded(model, tmp_path))


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "config.json").read_text())
    edit(content["quantization_config"])
    (folder / "config.json").write_text(json.dumps(content))


QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(format_version=2), "install a newer one"),
        (lambda c: c.pop("layers"), "describes no CP layers"),
        (lambda c: c["layers"][QUERY].update({"class": "os.system"}), "class must be one of"),
        (
            lambda c: c["layers"][QUERY]["arguments"].update(in_features=17),
            "in_features is 16|cannot be made: in_shape",
        ),
        (lambda c: c["layers"].update({"nowhere": c["layers"][QUERY]}), "has no layer 'nowhere'"),
        (lambda c: c.update(dtype="int8"), "dtype must be one of"),
    ],
)
def test_a_configuration_that_is_not_one(edit: Any, message: str, tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    save_pretrained(model, tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(ValueError, match=message):
        transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nowhere" if "nowhere" in message else message):
        from_pretrained(tmp_path, transformers.BertModel(bert_config()))


def test_missing_factors_are_an_error(tmp_path: Path) -> None:
    """For other parameters transformers only warns, and draws them anew."""
    model = exchange(transformers.BertModel(bert_config()))
    save_pretrained(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = f"{QUERY}.cp.factors.1"
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensors of CP layers are missing.*{gone}"):
        transformers.AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{gone} is missing"):
        from_pretrained(tmp_path, transformers.BertModel(bert_config()))


def test_a_dense_checkpoint_is_not_converted_by_it(tmp_path: Path) -> None:
    transformers.BertModel(bert_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="that describes CP layers of polyadic"):
        from_pretrained(tmp_path, transformers.BertModel(bert_config()))


def test_saving_over_polyadics_own_format(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    save_pretrained(nn.ModuleDict({"x": model}), tmp_path)
    save_pretrained(model, tmp_path)
    same(model, from_pretrained(tmp_path, transformers.BertModel(bert_config())))


def by_polyadic(model: Any, folder: Path) -> None:
    save_pretrained(model, folder)


def by_transformers(model: Any, folder: Path) -> None:
    polyadic.pretrained.attach(model)
    model.save_pretrained(folder)


def by_transformers_once_loaded(model: Any, folder: Path) -> None:
    save_pretrained(model, folder / "first")
    loaded(model, folder / "first").save_pretrained(folder)


def by_trainer(model: Any, folder: Path) -> None:
    pytest.importorskip("accelerate")
    polyadic.pretrained.attach(model)
    arguments = transformers.TrainingArguments(folder, use_cpu=True, report_to=[])
    transformers.Trainer(model, arguments).save_model(str(folder))


def in_shards(model: Any, folder: Path) -> None:
    polyadic.pretrained.attach(model)
    model.save_pretrained(folder, max_shard_size="8KB")


@pytest.mark.parametrize(
    "save", [by_polyadic, by_transformers, by_transformers_once_loaded, by_trainer, in_shards]
)
def test_without_registering_transformers_refuses(
    save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever saved, by any class; the message says what to call, and that helps."""
    from transformers.quantizers import auto

    model = exchange(transformers.BertModel(bert_config()))
    save(model, tmp_path)
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "polyadic")  # as in a process where nothing has registered
    for kind in (transformers.BertModel, transformers.AutoModel):
        with pytest.raises(ValueError, match=r"call polyadic.register_transformers\(\) before"):
            kind.from_pretrained(tmp_path)
    same(model, from_pretrained(tmp_path, transformers.BertModel(bert_config())))
    polyadic.register_transformers()
    again = loaded(model, tmp_path)
    same(model, again)
    polyadic.merge(again).save_pretrained(tmp_path / "dense")
    assert "polyadic" not in (tmp_path / "dense" / "config.json").read_text()


def test_a_fusion_that_was_asked_for_stays(tmp_path: Path) -> None:
    model = exchange(transformers.BertModel(bert_config()))
    model.config.fusion_config = {"patch_embeddings": False}
    save_pretrained(model, tmp_path)
    again = loaded(model, tmp_path)
    assert set(again.config.fusion_config) == set(model.config.fusion_config)
    polyadic.merge(again)
    assert again.config.fusion_config == {"patch_embeddings": False}


def test_registering_twice_does_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    polyadic.register_transformers()
    before = dict(KNOWN)
    polyadic.register_transformers()
    assert before["polyadic"].__name__ == "PolyadicConfig"
    assert before == dict(KNOWN)


def classifier(labels: int, **options: Any) -> Any:
    config = bert_config(num_labels=labels, **options)
    return transformers.BertForSequenceClassification(config).eval()


def test_another_number_of_labels(tmp_path: Path) -> None:
    """As with a dense model: refused, or on demand a new head, and all else as it was saved."""
    model = classifier(6)
    model.classifier = CPLinear(16, 6, rank=3)
    model.bert.embeddings.word_embeddings = CPEmbedding(60, 16, padding_idx=0, rank=5)
    save_pretrained(model, tmp_path)
    again = loaded(model, tmp_path)
    same(model, again)
    load = type(model).from_pretrained
    with REFUSAL:
        load(tmp_path, num_labels=3)
    if not COMPARES:
        return
    new, told = load(tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True)
    assert type(new.classifier) is nn.Linear
    assert [name for name, _ in new.classifier.named_parameters()] == ["weight", "bias"]
    assert torch.equal(new.classifier.bias, torch.zeros(3))
    assert 0 < new.classifier.weight.std() < 0.1
    assert "classifier.weight" in told["missing_keys"]
    assert {name for name, *_ in told["mismatched_keys"]} > {"classifier.cp.factors.0"}
    assert torch.equal(new.bert(IDS)[0], model.bert(IDS)[0])
    new(IDS)[0].sum().backward()
    new.save_pretrained(tmp_path / "new")
    same(new, loaded(new, tmp_path / "new"))


def test_another_size_of_a_dense_layer_is_refused(tmp_path: Path) -> None:
    """It stands beside CP layers, whose quantizer made transformers forget to compare."""
    model = exchange(classifier(6))
    save_pretrained(model, tmp_path)
    with REFUSAL:
        type(model).from_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize("tokens", [62, 70])
def test_another_number_of_tokens_when_loading(tokens: int, tmp_path: Path) -> None:
    """A table and its head, which become new dense ones together; 62 fit into the padded table."""
    model = exchange(transformers.BertForMaskedLM(bert_config()), *MODELS[3][2])
    save_pretrained(model, tmp_path)
    load = type(model).from_pretrained
    with REFUSAL:
        load(tmp_path, vocab_size=tokens)
    if not COMPARES:
        return
    new = load(tmp_path, vocab_size=tokens, ignore_mismatched_sizes=True)
    table, head = new.bert.embeddings.word_embeddings, new.cls.predictions.decoder
    assert type(table) is nn.Embedding
    assert head.weight is table.weight
    assert new(IDS)[0].shape == (2, 4, tokens)
    query = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(new.get_submodule(query).weight, model.get_submodule(query).weight)
    new.save_pretrained(tmp_path / "new")
    same(new, loaded(new, tmp_path / "new"))


@pytest.mark.parametrize("tokens", [40, 60, 62, 65, 129])
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_resized(tied: bool, tokens: int, tmp_path: Path) -> None:
    names = MODELS[3][2] if tied else MODELS[4][2]
    model = exchange(transformers.BertForMaskedLM(bert_config(tie_word_embeddings=tied)), *names)
    nn.init.normal_(model.cls.predictions.bias)
    ids = torch.tensor([[1, 5, 9, 2], [3, 4, 39, 7]])
    hidden, logits = model.bert(ids)[0], model(ids)[0]
    table = resize_token_embeddings(model, tokens)
    assert table is model.get_input_embeddings()
    assert table.weight.shape == (tokens, 16)
    assert model.config.vocab_size == tokens
    assert torch.equal(model.bert(ids)[0], hidden)
    kept = min(60, tokens)
    new = model(ids)[0]
    assert new.shape == (2, 4, tokens)
    torch.testing.assert_close(new[..., :kept], logits[..., :kept])
    head = model.get_output_embeddings()
    assert (head.bias is model.cls.predictions.bias) == tied
    assert head.bias.shape == model.cls.predictions.bias.shape == (tokens,)
    if tied:
        assert head.cp is table.cp
    assert bool(model(torch.tensor([[tokens - 1]]))[0].isfinite().all())
    model(ids)[0].square().mean().backward()
    assert all(factor.grad is not None for factor in table.cp.factors)
    model.save_pretrained(tmp_path)
    same(model, loaded(model, tmp_path))


def test_more_than_two_ties_are_resized_together() -> None:
    model = t5()
    table = CPEmbedding(60, 16, rank=5)
    for owner in (model, model.encoder, model.decoder):
        key = "shared" if owner is model else "embed_tokens"
        setattr(owner, key, CPEmbedding(60, 16, rank=5))
        getattr(owner, key).cp = table.cp
    model.lm_head = table.as_linear()
    before = model(IDS, decoder_input_ids=IDS).logits
    resize_token_embeddings(model, 70)
    after = model(IDS, decoder_input_ids=IDS).logits
    assert after.shape[-1] == 70
    torch.testing.assert_close(after[..., :60], before)


def test_a_dense_vocabulary_is_resized_by_transformers() -> None:
    model = exchange(transformers.BertForMaskedLM(bert_config()))
    table = resize_token_embeddings(model, 70)
    assert type(table) is nn.Embedding
    assert model(IDS)[0].shape == (2, 4, 70)


def test_a_vocabulary_that_cannot_be_resized() -> None:
    model = exchange(transformers.BertForMaskedLM(bert_config()), *MODELS[4][2])
    before = {name: (id(p), p.shape) for name, p in model.named_parameters()}
    for tokens, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="new_num_tokens must be a positive int"):
            resize_token_embeddings(model, tokens)
    model.get_input_embeddings().padding_idx = 50
    with pytest.raises(ValueError, match="above the padding index 50, got 50"):
        resize_token_embeddings(model, 50)
    model.get_input_embeddings().padding_idx = 0
    head, model.cls.predictions.decoder = model.cls.predictions.decoder, CPLinear(16, 60, rank=2)
    with pytest.raises(ValueError, match=r"CPLinear with a weight of its own.*head.to_linear"):
        resize_token_embeddings(model, 70)
    model.cls.predictions.decoder = head
    assert before == {name: (id(p), p.shape) for name, p in model.named_parameters()}
    joint = CPEmbedding.joint(2, 60, 16, rank=3)[0]
    model.set_input_embeddings(joint)
    with pytest.raises(ValueError, match="layer of a joint tensor"):
        resize_token_embeddings(model, 70)
    with pytest.raises(TypeError, match="model of transformers, got Embedding"):
        resize_token_embeddings(nn.Embedding(3, 2), 4)


def test_a_trainer_writes_checkpoints_of_joint_layers(tmp_path: Path) -> None:
    """Put in by hand, without a word to transformers: the run goes on, and can be resumed."""
    model = classifier(2)
    layers = CPLinear.joint(2, 16, 24, rank=4)
    for block, layer in zip(model.bert.encoder.layer, layers, strict=True):
        block.intermediate.dense = layer
    rows = [{"input_ids": IDS[i % 2], "labels": torch.tensor(i % 2)} for i in range(8)]

    def trainer(steps: int) -> Any:
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            per_device_train_batch_size=2,
        )
        return transformers.Trainer(model, arguments, train_dataset=rows)

    pytest.importorskip("accelerate")
    trainer(2).train()
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    shared = [name for name in stored if ".cp.joint.factors." in name]
    assert len(shared) == len(layers[0].cp.joint.factors)
    for factor in layers[0].cp.joint.factors:
        nn.init.zeros_(factor)
    trainer(2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    state = model.state_dict()
    for name in shared:
        assert torch.equal(state[name], stored[name])


def test_a_model_that_stores_older_names(tmp_path: Path) -> None:
    """Transformers writes a ViT under the names its modules once had, and reads it by both."""
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
    )
    model = transformers.ViTModel(config).eval()
    (name, *_) = surgery.find(model).layers
    for key, layer in surgery.find(model, exclude_modules=[name]).layers.items():
        surgery.replace(model, key, CPLinear.from_linear(layer, rank=2, order=1))
    save_pretrained(model, tmp_path)
    same(model, loaded(model, tmp_path))
    same(model, from_pretrained(tmp_path, transformers.ViTModel(config).eval()))
