"""Transforms and quantizers: applied to a bundle, or their changed models taken from the cache."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ovforge.contracts.extensions import QuantizerExtension
from ovforge.contracts.stages import Calibration, Report, Skipped
from ovforge.errors import ModelError, PluginError
from ovforge.model import memory
from ovforge.model.bundle import Control, ModelBundle, write_json
from ovforge.run.ingredients import NONE_KEPT, Kept, step_ingredients
from ovforge.run.loading import EntrySource, write_role
from ovforge.run.recipe import Recipe, Step
from ovforge.store.cache import Cache, Entry, key_of

__all__ = ["STAGE_FILE", "apply_now", "apply_step", "check_strict", "report_of", "take_step"]


STAGE_FILE = "stage.json"


def apply_step(
    step: Step,
    bundle: ModelBundle,
    recipe: Recipe,
    cache: Cache | None,
    calibration: Calibration,
    keep: Kept = NONE_KEPT,
) -> Report:
    """Change the bundle by one step, or take the changed models from the cache."""
    strict = recipe.config.strict and not step.brought
    before, sealed = bundle.digest(), bundle.protection
    if cache is None or before is None or (sealed and not memory.AVAILABLE):
        return apply_now(step, bundle, strict, calibration, keep)
    ingredients = step_ingredients(step, before, recipe, cache.memo, keep)
    key = key_of(ingredients)

    made: dict[str, Any] = {}

    def write(folder: Path) -> None:
        changed = bundle.copy() if step.light else bundle
        report = apply_now(step, changed, strict, calibration, keep)
        made.update({role: changed.models[role] for role in report.roles} if step.light else {})
        for role in () if step.light else report.roles:
            write_role(changed, role, folder, key)
        if sealed is None:
            write_json(folder / STAGE_FILE, _delta(changed, report))
        else:
            sealed.write(folder, STAGE_FILE, json.dumps(_delta(changed, report)).encode(), key)

    entry, _ = cache.get_or_make(ingredients, write, label=f"{step.offer.extension.name}")
    report = take_step(entry, step, bundle, made)
    check_strict(step, report, strict)
    return report


def apply_now(
    step: Step, bundle: ModelBundle, strict: bool, calibration: Calibration, keep: Kept = NONE_KEPT
) -> Report:
    stage = step.offer.extension.create(step.options)
    report: Report = (
        _quantized(step, stage, bundle, calibration, keep) if step.kind == "quantizer" else stage.apply(bundle)
    )
    check_strict(step, report, strict)
    for role in report.roles:
        bundle.models[role] = bundle.models[role]  # changed in place, it cannot be made again by what made it before
        bundle.identity.pop(role, None)
        bundle.location.pop(role, None)
    return report


def _quantized(step: Step, stage: Any, bundle: ModelBundle, calibration: Calibration, keep: Kept) -> Report:
    """Quantize, and measure what that did."""
    assert isinstance(step.offer.extension, QuantizerExtension)
    before = bundle.copy()
    limited = _Limited(calibration, step.offer.extension.needed(step.options), step.offer.extension.name)
    start = time.perf_counter()
    kept = {role: names for role, names in keep.items() if names}
    report: Report = stage.quantize(bundle, limited, kept) if kept else stage.quantize(bundle, limited)
    report.seconds = time.perf_counter() - start
    for role in report.roles:
        report.sizes[role] = (_constant_bytes(before.models[role]), _constant_bytes(bundle.models[role]))
        before.models.release(role)
    return report


def _constant_bytes(model: Any) -> int:
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")


class _Limited:
    """A calibration that gives what a quantizer said that it needs: its results are cached by that."""

    def __init__(self, calibration: Calibration, need: str, name: str) -> None:
        self._calibration, self._need, self._name = calibration, need, name

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        self._check(self._need != "nothing", "inputs")
        return self._calibration.inputs(role, count)

    def score(self, models: Mapping[str, Any]) -> float:
        self._check(self._need == "score", "score")
        return self._calibration.score(models)

    def _check(self, said: bool, what: str) -> None:
        if not said:
            raise PluginError(
                f"it asks for {what}, and its description says that it needs {self._need}",
                where=self._name,
                hint=f'Its author sets needs="{what}" in the QuantizerExtension.',
            )


def check_strict(step: Step, report: Report, strict: bool) -> None:
    if strict and report.skipped:
        first = report.skipped[0]
        more = f" and {len(report.skipped) - 1} more" if len(report.skipped) > 1 else ""
        raise ModelError(
            f"{first.item} could not be applied: {first.reason}{more}",
            where=step.offer.extension.name,
            hint="Set strict = false to go on without.",
        )


def _delta(bundle: ModelBundle, report: Report) -> dict[str, Any]:
    return {
        "report": asdict(report),
        "configs": bundle.configs,
        "index": bundle.index,
        "assets": {path: data.decode("latin-1") for path, data in bundle.assets.items()},
        "controls": {name: asdict(control) for name, control in bundle.controls.items()},
        "adapters": bundle.adapters,
    }


def take_step(entry: Entry, step: Step, bundle: ModelBundle, made: Mapping[str, Any] | None = None) -> Report:
    """Put a stored step's models and the rest into the bundle; a light step's models are changed when they are read.

    `made` holds those of a light step that was applied just now.
    """
    sealed = bundle.protection
    stored = sealed.open(entry.path, entry.key) if sealed else EntrySource(entry)
    delta = json.loads(stored.read(STAGE_FILE))
    said = delta["report"]
    report = report_of(said)
    if step.light:
        change = _LightChange(step, bundle.copy(), made or {})
        for role in report.roles:
            bundle.models.lazy(role, partial(change.model, role))
            bundle.identity[role] = f"{entry.key} {role}"
            bundle.location.pop(role, None)
    else:
        changed = ModelBundle.open(stored)
        for role in report.roles:
            bundle.models.take(role, changed.models, role)
            bundle.identity[role] = f"{entry.key} {role}" if sealed else changed.identity[role]
            bundle.location.pop(role, None)
            if role in changed.location:
                bundle.location[role] = changed.location[role]
    bundle.configs, bundle.index, bundle.adapters = delta["configs"], delta["index"], delta["adapters"]
    bundle.assets = {path: data.encode("latin-1") for path, data in delta["assets"].items()}
    bundle.controls = {
        name: Control(**{**control, "shape": tuple(control["shape"])}) for name, control in delta["controls"].items()
    }
    return report


def report_of(said: Mapping[str, Any]) -> Report:
    """Return a report from its JSON."""
    typed = {
        "roles": tuple(said["roles"]),
        "skipped": [Skipped(**skip) for skip in said["skipped"]],
        "sizes": {role: tuple(sizes) for role, sizes in said["sizes"].items()},
    }
    return Report(**{**said, **typed})


class _LightChange:
    """What a light step makes of models, as often as they are asked for; a step applied once serves each role once."""

    def __init__(self, step: Step, original: ModelBundle, made: Mapping[str, Any]) -> None:
        self._step, self._original, self._made = step, original, dict(made)
        self._lock = threading.Lock()

    def model(self, role: str) -> Any:
        """Return the changed ov.Model of a role, for the caller alone."""
        with self._lock:
            if role not in self._made:
                bundle = self._original.copy()
                report = self._step.offer.extension.create(self._step.options).apply(bundle)
                self._made = {changed: bundle.models[changed] for changed in report.roles}
            return self._made.pop(role)
