"""What each stage's result depends on: the keys that it is found by in the cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel

from ovforge.config.options import input_files
from ovforge.config.pipeline import CalibrationTable
from ovforge.contracts.extensions import QuantizerExtension
from ovforge.model.runtime import openvino_version
from ovforge.model.sources import FileSource, source_digest
from ovforge.plugins.manager import Offer
from ovforge.run.recipe import Origin, Recipe, Step
from ovforge.store.cache import Cache, digest_file, key_of

__all__ = [
    "NONE_KEPT",
    "Kept",
    "calibration_ingredients",
    "content_of",
    "load_ingredients",
    "quality_ingredients",
    "step_ingredients",
    "versioned",
]


Kept = Mapping[str, Collection[str]]
"""Role -> operations that quantizers leave as they are."""


NONE_KEPT: Kept = MappingProxyType({})

_FORM = 2
"""Of what the core itself writes beside models: reports, records, outcomes. Entries of another form are not found."""


def load_ingredients(origin: Origin, cache: Cache) -> dict[str, Any]:
    """Return what a conversion depends on."""
    return {
        **versioned(origin.loader, "load", origin.options, cache.memo),
        "input": source_digest(origin.source),
    }


def step_ingredients(step: Step, identity: str, recipe: Recipe, memo: Any, keep: Kept = NONE_KEPT) -> dict[str, Any]:
    """Return what a step's result depends on; a quantizer's on what calibrates it, too, where it asks for that."""
    ingredients = {**versioned(step.offer, step.kind, step.options, memo), "form": _FORM, "input": identity}
    if recipe.protection:
        ingredients["encrypted"] = recipe.protection.identity
    if isinstance(step.offer.extension, QuantizerExtension):
        need = step.offer.extension.needed(step.options)
        if need != "nothing":
            ingredients["calibration"] = calibration_ingredients(recipe, memo)
        if need == "score":
            ingredients["quality"] = _judged_by(recipe, memo)
    if keep:
        ingredients["keep"] = _kept(recipe, keep)
    return ingredients


def calibration_ingredients(recipe: Recipe, memo: Any, table: CalibrationTable | None = None) -> dict[str, Any]:
    """Return what recorded inputs depend on, besides the models."""
    table = table or recipe.config.calibration or CalibrationTable()
    return {
        **_caller(recipe, memo),
        "form": _FORM,
        "samples": table.samples,
        "runs": table.runs,
        **recipe.calibration.content(memo),
    }


def quality_ingredients(recipe: Recipe, identity: str, memo: Any, trial: Kept | None = None) -> dict[str, Any]:
    """Return what the gate's outcome depends on: the unquantized models, all quantizers, and the whole table.

    A trial's depends on the layers that it keeps, and on no limit.
    """
    table = recipe.config.quality
    assert table is not None
    asked: dict[str, Any] = {"stage": "quality", "limit": table.limit, "on_fail": table.on_fail}
    if trial is not None:
        asked = {"stage": "quality trial", "keep": _kept(recipe, trial)}
    return {
        **asked,
        "input": identity,
        "quantize": [step_ingredients(step, "", recipe, memo) for step in recipe.quantizers],
        "judge": _judged_by(recipe, memo),
        **({"encrypted": recipe.protection.identity} if recipe.protection else {}),
        "openvino": openvino_version(),
    }


def _caller(recipe: Recipe, memo: Any) -> dict[str, Any]:
    """Return who calls models: task, scheduler, device."""
    scheduler = recipe.scheduler
    return {
        "task": versioned(recipe.task, "task", recipe.task_options, memo),
        "scheduler": versioned(scheduler, "scheduler", recipe.scheduler_options, memo) if scheduler else None,
        "device": versioned(recipe.device, "device", recipe.device_options, memo),
    }


def _judged_by(recipe: Recipe, memo: Any) -> dict[str, Any]:
    """Return what a score depends on, besides the models."""
    table = recipe.config.quality
    told = {"metric": table.metric, "by": table.by, "samples": table.samples} if table else {}
    after = [versioned(step.offer, step.kind, step.options, memo) for step in recipe.after]
    return {**_caller(recipe, memo), **told, **recipe.held_out.content(memo), "after": after}


def _kept(recipe: Recipe, keep: Kept) -> Any:
    """Return the layers that are kept, for the cache's keys, which are plain: of encrypted models not by name."""
    named = {role: sorted(names) for role, names in sorted(keep.items())}
    return key_of(named) if recipe.protection else named


def versioned(offer: Offer, kind: str, options: BaseModel | None, memo: Any) -> dict[str, Any]:
    """Return the part of a stage's ingredients that says who does it and how; files count by their content."""
    files = {str(path): content_of(path, memo) for path in input_files(options)}
    return {
        "stage": kind,
        "use": offer.extension.name,
        "plugin": offer.plugin,
        "version": offer.version,
        "options": _by_content(options.model_dump(mode="json"), files) if options else {},
        "openvino": openvino_version(),
    }


def _by_content(value: Any, files: Mapping[str, str]) -> Any:
    """Return options with each file's path replaced by its digest: a file counts by its content, not its place."""
    if isinstance(value, dict):
        return {key: _by_content(part, files) for key, part in value.items()}
    if isinstance(value, list):
        return [_by_content(part, files) for part in value]
    return files.get(value, value) if isinstance(value, str) else value


def content_of(path: Path, memo: Any) -> str:
    source = FileSource(path, memo=memo)
    return source_digest(source) if path.is_dir() else digest_file(path, memo)
