"""What the numbers say, in plain sentences; above all where dense is the better choice."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from examples.digits.models import NARROW_PARTNER
from examples.digits.training import ModelResult

_SAME_TIME = 0.05


def families(results: Sequence[ModelResult]) -> dict[str, list[ModelResult]]:
    """Group results by family, both in their order."""
    grouped: dict[str, list[ModelResult]] = {}
    for result in results:
        grouped.setdefault(result.contestant.family, []).append(result)
    return grouped


def difference(result: ModelResult, other: ModelResult, images: int) -> tuple[float, float]:
    """Compare two models' accuracies, image by image.

    Args:
        result: One model.
        other: The model to compare with, trained as often.
        images: Number of test images.

    Returns:
        The first accuracy less the second, and half its 95 % interval, that is 1.96 standard
        errors of the mean over the images of the difference on each, itself a mean over seeds.
    """
    runs = len(result.curves)
    by_image = [0.0] * images
    for sign, model in ((-1, result), (1, other)):
        for curve in model.curves:
            for index in curve.wrong:
                by_image[index] += sign / runs
    return fmean(by_image), 1.96 * stdev(by_image) / sqrt(images)


def findings(results: Sequence[ModelResult], images: int) -> dict[str, dict[str, str]]:
    """Say what was found, family by family.

    Args:
        results: Models of all families, the dense and the narrow one first in each.
        images: Number of test images.

    Returns:
        By family, then by subject, a sentence or two.
    """
    found = {}
    for family, members in families(results).items():
        dense, narrow = members[:2]
        cps = [result for result in members if result.contestant.kind == "cp"]
        found[family] = {
            "Parameters": _parameters(dense, cps),
            "Accuracy": _accuracy(dense, cps, images),
            "Time": _time(dense, cps),
            "Kept for backward": _kept(dense, cps),
            "The plain alternative": _narrow(narrow, cps, images),
        }
    return found


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _ranks(cps: Sequence[ModelResult]) -> str:
    noun = "rank" if len(cps) == 1 else "ranks"
    return f"{noun} {_listed([str(result.contestant.rank) for result in cps])}"


def _parameters(dense: ModelResult, cps: Sequence[ModelResult]) -> str:
    layers = _listed([f"{result.compression:.1f}" for result in cps])
    whole = _listed([f"{dense.parameters / result.parameters:.1f}" for result in cps])
    return (
        f"At {_ranks(cps)} the converted layers have {layers} times fewer than dense, "
        f"the whole model, in which the other layers stay dense, {whole} times fewer. Gradients "
        "and Adam's two moments shrink by the same ratio."
    )


def _accuracy(dense: ModelResult, cps: Sequence[ModelResult], images: int) -> str:
    parts = [
        f"{100 * result.accuracy:.1f} % at rank {result.contestant.rank} "
        f"({_against(result, dense, images)})"
        for result in cps
    ]
    return (
        f"Dense has {100 * dense.accuracy:.1f} %, CP {_listed(parts)}; ± is the 95 % "
        f"interval that {images} test images leave."
    )


def _against(result: ModelResult, other: ModelResult, images: int) -> str:
    mean, half = difference(result, other, images)
    tenths = round(1000 * mean)
    sign = "" if tenths == 0 else "+" if tenths > 0 else "−"
    points = f"{sign}{abs(tenths) / 10:.1f} ± {100 * half:.1f} points"
    if abs(mean) <= half:
        return f"{points}: not told apart"
    return f"{points}: {'better' if mean > 0 else 'worse'}"


def _time(dense: ModelResult, cps: Sequence[ModelResult]) -> str:
    verdicts: dict[str, list[str]] = {
        "dense is faster": [],
        "CP is faster": [],
        "no difference": [],
    }
    for result in cps:
        ratio = result.time.median / dense.time.median
        text = f"rank {result.contestant.rank} ({ratio:.2f} × dense)"
        if ratio > 1 + _SAME_TIME:
            verdicts["dense is faster"].append(text)
        elif ratio < 1 - _SAME_TIME:
            verdicts["CP is faster"].append(text)
        else:
            verdicts["no difference"].append(text)
    parts = []
    for verdict, texts in verdicts.items():
        if texts:
            word = "against" if verdict == "dense is faster" else "at"
            parts.append(f"{verdict} {word} {_listed(texts)}")
    return f"A dense step takes {1e3 * dense.time.median:.2f} ms; {'; '.join(parts)}."


def _kept(dense: ModelResult, cps: Sequence[ModelResult]) -> str:
    parts = [
        f"{result.kept_bytes / 1024:,.0f} KiB at rank {result.contestant.rank} "
        f"({result.kept_bytes / dense.kept_bytes:.2f} × dense)"
        for result in cps
    ]
    more = sum(result.kept_bytes > dense.kept_bytes for result in cps)
    verdict = "Dense keeps less than every CP model here"
    if more < len(cps):
        fewer = [result for result in cps if result.kept_bytes <= dense.kept_bytes]
        verdict = f"CP keeps no more than dense at {_ranks(fewer)}"
    return f"Dense {dense.kept_bytes / 1024:,.0f} KiB, CP {_listed(parts)}. {verdict}."


def _narrow(narrow: ModelResult, cps: Sequence[ModelResult], images: int) -> str:
    partner = next(result for result in cps if result.contestant.rank == NARROW_PARTNER)
    label = narrow.contestant.label
    ratio = narrow.time.median / partner.time.median
    return (
        f"A smaller dense model ({label}) with {narrow.parameters:,} "
        f"parameters against {partner.parameters:,} of CP rank {partner.contestant.rank}: accuracy "
        f"{100 * narrow.accuracy:.1f} % against {100 * partner.accuracy:.1f} % "
        f"({_against(narrow, partner, images)}), time {ratio:.2f} × CP's, "
        f"kept {narrow.kept_bytes / partner.kept_bytes:.2f} × CP's."
    )
