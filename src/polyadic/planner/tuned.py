"""Plans that were measured to be the fastest, by request; the choice of a plan looks here first.

They are kept for the process, and on request in a file beside the machine's calibration, which is
bound to the fingerprint of that calibration. A file that cannot be read, or was made on another
machine, is ignored with a warning.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from polyadic.durable.files import check_regular, write_text
from polyadic.planner.calibrated import calibration_file, fingerprint
from polyadic.planner.request import Place, Request
from polyadic.plans import (
    ConvPlan,
    ConvRoute,
    LinearPlan,
    LinearRoute,
    SpectralPlan,
    SpectralRoute,
)

Plan = LinearPlan | ConvPlan | SpectralPlan
FORMAT_VERSION = 1
_KINDS: dict[str, tuple[Any, Any]] = {
    "linear": (LinearPlan, LinearRoute),
    "conv": (ConvPlan, ConvRoute),
    "spectral": (SpectralPlan, SpectralRoute),
}
_held: dict[str, Plan] = {}


def key_of(request: Request) -> str:
    """Name all that a choice depends on, for the batches up to the next power of two."""
    return repr(request.bucketed())


def plan_for(request: Request) -> Plan | None:
    """Return the plan that was measured to be the fastest, or None where nothing was."""
    key = key_of(request)
    return _held.get(key) or _stored(request.place).get(key)


def hold(request: Request, plan: Plan | None) -> None:
    """Use a plan for a request from now on in this process; None forgets it."""
    _held.pop(key_of(request), None)
    if plan is not None:
        _held[key_of(request)] = plan


def tuned_file(place: Place) -> Path:
    """Return the path of the plans tuned for a place, whether it exists or not.

    Raises:
        OSError: the user has no home folder, and no other is named.
    """
    beside = calibration_file(place)
    return beside.with_name(beside.name.replace("machine-", "tuned-", 1))


@functools.lru_cache(maxsize=64)
def _stored(place: Place) -> dict[str, Plan]:
    try:
        path = tuned_file(place)
        check_regular(path)
        text = path.read_bytes().decode("utf-8")
    except (OSError, ValueError):
        return {}
    try:
        found: Any = json.loads(text)
        made_on = fingerprint(place.device)
        if found["format_version"] != FORMAT_VERSION or found["made_on"] != made_on:
            raise ValueError("they are of another processor, torch or version of the format")
        return {key: _read(plan) for key, plan in found["plans"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"ignoring the tuned plans in {path}: {error}; run polyadic.tune with store=True to "
            f"renew them",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _read(plain: dict[str, Any]) -> Plan:
    plan, route = _KINDS[plain["kind"]]

    def routed(fields: dict[str, Any]) -> Any:
        fields = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
        return route(**fields)

    made: Plan = plan(routed(plain["forward"]), routed(plain["backward"]), plain["keep"])
    return made


def _plain(plan: Plan) -> dict[str, Any]:
    kind = next(name for name, (made, _) in _KINDS.items() if isinstance(plan, made))
    return {"kind": kind, **dataclasses.asdict(plan)}


def store(place: Place, plans: dict[str, Plan]) -> Path | None:
    """Add plans to the file of a place; None, after a warning, where it cannot be written."""
    _stored.cache_clear()  # another process may have added some since they were read
    every = {key: _plain(plan) for key, plan in {**_stored(place), **plans}.items()}
    content = {"format_version": FORMAT_VERSION, "made_on": fingerprint(place.device)}
    try:
        path = tuned_file(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**content, "plans": every}, indent=2))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the tuned plans hold for this process alone, as they could not be written: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    _stored.cache_clear()
    return path


def forget(stored: bool) -> None:
    """Forget the plans of this process, and with ``stored`` remove the files too."""
    _held.clear()
    _stored.cache_clear()
    if stored:
        somewhere = calibration_file(Place("cpu", torch.float32)).parent
        for path in somewhere.glob("tuned-*.json"):
            path.unlink(missing_ok=True)
