"""``polyadic compress``: a model of transformers from a directory into another."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyadic_cli import folder, held_out
from polyadic_cli.app import app
from polyadic_cli.held_out import HeldOut

if TYPE_CHECKING:
    from torch import Tensor, nn

# Outputs of a model of transformers to compare by; the first that the model has is used.
_OUTPUTS = ("logits", "last_hidden_state")


@app.command(short_help="Convert a trained model of transformers within one budget.")
def compress(
    model_dir: Annotated[Path, typer.Argument(help="Directory of a model of transformers.")],
    ratio: Annotated[float | None, typer.Option(help="Times fewer parameters.")] = None,
    flops_ratio: Annotated[float | None, typer.Option(help="Times fewer FLOPs.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Bound on the relative error.")] = None,
    speed: Annotated[
        str | None, typer.Option(help="never-slower: no layer slower than dense, by prediction.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file, a sample per line, that weighs the errors.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Directory of the converted model.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, save none.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the report as JSON.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Regular expression for whole names of layers.")
    ] = None,
    exclude: Annotated[str | None, typer.Option(help="Pattern of layers to leave alone.")] = None,
    orders: Annotated[
        str | None, typer.Option(help="Modes per side to weigh, as in 1,2; 1 is low rank.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Most lines to calibrate on.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Lines in a batch.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a line, the rest is cut.")] = 128,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Most sweeps of a fit; 16 to 64 by its size.")
    ] = None,
    recover: Annotated[
        int, typer.Option(min=0, help="Steps of training towards the original's outputs.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same result.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder that keeps curves and fits until all is done.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from what --checkpoint holds.")
    ] = False,
) -> None:
    """Convert a trained model of transformers to CP format within one budget.

    One of --ratio, --flops-ratio, --max-error and --speed is the budget; --speed may be added to
    another. Of the text, up to 64 lines are not calibrated on but held out to compare the outputs.
    The model is loaded as the class its configuration names, from local files alone, and saved so
    that transformers loads it after polyadic.register_transformers(), with the other files of its
    directory and a card that says how.

    --recover trains the converted model on the texts of --calibration, without labels, to put out
    what the original puts out; its best state is kept. A step takes about as long as three forward
    passes of both models, and the original is held in memory for it.
    """
    import copy
    import dataclasses

    import polyadic

    _check_paths(model_dir, calibration, out, dry_run)
    _check_files(html=html, json=json)
    if recover and (calibration is None or dry_run):
        raise typer.BadParameter(
            "--recover trains on the texts of --calibration, and not in a dry run"
        )
    options: dict[str, Any] = {
        "ratio": ratio,
        "flops_ratio": flops_ratio,
        "max_error": max_error,
        "speed": speed,
        "target_modules": target,
        "exclude_modules": exclude,
        "orders": _orders(orders),
        "dry_run": dry_run,
        "seed": seed,
        "checkpoint": checkpoint,
        "resume": resume,
    }
    if iterations is not None:
        options["iterations"] = iterations
    found: list[str] = []
    held: HeldOut | None = None
    try:
        model, tokenizer = _load(model_dir)
        if calibration is not None:
            lines, others = held_out.divide(_lines(calibration), samples)
            options |= _calibration(model, tokenizer, model_dir, lines, batch, length)
            if others and not dry_run:
                more = _calibration(model, tokenizer, model_dir, others, batch, length)
                held = HeldOut(model, more["calibration"], _output)
        original = copy.deepcopy(model) if recover else None
        with _lines_of_progress():
            made, report = polyadic.compress(model, inplace=True, **options)
            if original is not None and report.converted:
                sentence, change = _recovered(made, original, options, recover, seed)
                found.append(sentence)
                report = dataclasses.replace(report, recovered_error=change)
        if held is not None and report.converted:
            found.append(held.sentence(made))
    except ImportError as error:
        if error.name is not None:
            raise
        print(f"polyadic: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    except (OSError, TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print(report)
    for sentence in found:
        print(sentence)
    try:
        _write(report, html, json, model_dir.resolve().name)
        if dry_run or out is None:
            return
        if not report.converted:
            print("polyadic: no layer was converted, nothing is saved", file=sys.stderr)
            raise typer.Exit(1)
        polyadic.save_pretrained(made, out)
        if tokenizer is not None:
            tokenizer.save_pretrained(out)
        folder.complete(model_dir, out, [report.verdict, *found], type(made).__name__)
    except (ImportError, OSError) as error:
        print(f"polyadic: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    print(f"saved: {out}")


def _check_paths(model_dir: Path, calibration: Path | None, out: Path | None, dry: bool) -> None:
    if not model_dir.is_dir():
        raise typer.BadParameter(f"there is no directory {model_dir}")
    if not (model_dir / "config.json").is_file():
        raise typer.BadParameter(
            f"{model_dir} has no config.json; expected what save_pretrained of transformers writes"
        )
    if calibration is not None and not calibration.is_file():
        raise typer.BadParameter(f"there is no file {calibration} for --calibration")
    if dry:
        return
    if out is None:
        raise typer.BadParameter("give --out, the directory to save to, or --dry-run")
    if out.exists() and (not out.is_dir() or out.resolve() == model_dir.resolve()):
        raise typer.BadParameter(f"--out must be a directory other than the model's, got {out}")
    made = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not made.is_dir() or not os.access(made, os.W_OK):
        raise typer.BadParameter(f"--out cannot be made or written to, because of {made}")


def _check_files(**files: Path | None) -> None:
    """See that reports can be written, before any time is spent."""
    for option, file in files.items():
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise typer.BadParameter(
                f"--{option} must be a file in a directory that is there, got {file}"
            )


def _orders(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"--orders must be counts separated by commas, got {text!r}")
    return tuple(map(int, parts))


def _load(folder: Path) -> tuple[nn.Module, Any]:
    """Load the model as the class its configuration names, and its tokenizer if it has one.

    CP layers of an earlier conversion are loaded as such.
    """
    from polyadic.pretrained import register_transformers

    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "models are loaded by transformers: pip install 'polyadic[compress]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    register_transformers()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    named = list(config.architectures or [])
    cls = getattr(transformers, named[0], None) if named else None
    cls = cls or transformers.AutoModel
    model, found = cls.from_pretrained(
        folder, local_files_only=True, config=config, output_loading_info=True
    )
    _warn_of_other_tensors(cls.__name__, folder, found)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None
    return model.eval(), tokenizer


def _warn_of_other_tensors(model: str, folder: Path, found: dict[str, Any]) -> None:
    """Say in a sentence each what transformers reports in a table."""
    for keys, said in (
        ("missing_keys", f"{model} has tensors that {folder} lacks, and which are random now"),
        ("unexpected_keys", f"{folder} holds tensors that {model} has no place for"),
    ):
        if names := sorted(found[keys]):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            warnings.warn(f"{said}: {names[0]}{more}", UserWarning, stacklevel=2)


def _lines(path: Path) -> list[str]:
    """Read the lines that are not empty.

    Raises:
        ValueError: there is none, or the file is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} has no line with text")
    return lines


def _calibration(
    model: Any, tokenizer: Any, folder: Path, lines: list[str], batch: int, length: int
) -> dict[str, Any]:
    """The arguments of ``polyadic.compress`` that have to do with calibration."""
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer that loads, which --calibration needs")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"--calibration does not support encoder-decoder models such as "
            f"{type(model).__name__}; call polyadic.compress from Python with batches of yours"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = [
        dict(
            tokenizer(
                lines[i : i + batch],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
        )
        for i in range(0, len(lines), batch)
    ]
    return {"calibration": batches, "forward": _output, "weights": _mask}


def _mask(batch: dict[str, Tensor]) -> Tensor:
    """Which positions are text and not padding, (B, T)."""
    import torch

    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def _output(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """What the model puts out, zero where the text is padded."""
    found = model(**batch)
    for name in _OUTPUTS:
        y = found.get(name)
        if y is not None:
            mask = _mask(batch)
            per_token = y.dim() == 3 and y.shape[:2] == mask.shape
            return y * mask.unsqueeze(-1) if per_token else y
    return found


@contextmanager
def _lines_of_progress() -> Iterator[None]:
    """Print what polyadic logs about its progress, for a program or a file that reads it."""
    logger, handler = logging.getLogger("polyadic"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("polyadic: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _recovered(
    made: nn.Module, original: nn.Module, options: dict[str, Any], steps: int, seed: int
) -> tuple[str, float]:
    """Train the converted model towards the original.

    Returns:
        A sentence on what that won, and the relative change of the outputs that is left, measured
        as ``polyadic.compress`` measures it.
    """
    import polyadic
    from polyadic.compression.calibration import Calibration

    recovery = polyadic.finetune.distill(
        made,
        original,
        options["calibration"],
        steps=steps,
        forward=_output,
        trainable="cp+norms",
        seed=seed,
    )
    before = recovery.validations[0][1]
    calibration = Calibration(original, options["calibration"], _output, None)
    calibration.watch({})
    return (
        f"in {steps} steps of recovery the squared difference of the outputs on calibration texts "
        f"fell from {before:.3g} to {recovery.best:.3g}"
    ), calibration.changed(made) ** 0.5


def _write(report: Any, html: Path | None, json: Path | None, model: str) -> None:
    if json is not None:
        report.to_json(json)
    if html is not None:
        report.to_html(html, model)
