"""What a comparison is asked to compare: pipelines, their variations, diffusers, pictures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ovforge.config import PipelineConfig, apply_overrides
from ovforge.errors import ConfigError, InputError
from ovforge.model import PACKAGE, PICTURE_SUFFIXES
from ovforge.store import parse_toml

__all__ = ["Asked", "parse", "varied"]

_DIFFUSERS = re.compile(r"diffusers(?:@(?P<dtype>f32|bf16|f16))?:(?P<folder>.+)")
_CONFIGS = (".toml", ".json")


@dataclass(frozen=True, slots=True)
class Asked:
    """A candidate: what it is called, and what is to be run."""

    label: str
    what: str
    kind: Literal["pipeline", "diffusers", "picture"]
    config: str | dict[str, Any] = ""
    overrides: tuple[str, ...] = ()
    dtype: str = "f32"


def parse(text: str, task: str, overrides: Sequence[str]) -> Asked:
    """Read `[LABEL=]WHAT`, where WHAT is a config, a picture, a model's folder or file, or diffusers[@TYPE]:FOLDER.

    A folder or file of a model is run as `task`. Raises InputError if it is nothing that is there.
    """
    label, equals, what = text.partition("=")
    if not equals or Path(text).exists():
        label, what = "", text
    if not what or (equals and not label and not Path(text).exists()):
        raise InputError(f"{text!r} names nothing to compare", hint="Write LABEL=WHAT, or WHAT alone.")
    if found := _DIFFUSERS.fullmatch(what):
        dtype = found["dtype"] or "f32"
        if not Path(found["folder"]).is_dir():
            raise InputError("no such folder", where=what)
        return Asked(label or f"PyTorch {dtype}", what, "diffusers", str(Path(found["folder"])), dtype=dtype)
    path = Path(what)
    if not what.startswith(PACKAGE) and not path.exists():
        raise InputError(
            "no such file or folder",
            where=what,
            hint="Name a config (.toml, .json), a picture, a model, or diffusers:FOLDER.",
        )
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return Asked(label or path.stem, what, "picture", what)
    if path.is_file() and path.suffix in _CONFIGS:
        PipelineConfig.read(path, overrides)
        return Asked(label or path.stem, what, "pipeline", what, tuple(overrides))
    config = apply_overrides({"task": task, "load": what}, overrides)
    return Asked(label or path.name, what, "pipeline", config)


def varied(asked: Sequence[Asked], varies: Sequence[str]) -> list[Asked]:
    """Return every pipeline once for each combination of `KEY=VALUE,VALUE...`; all others as they are.

    The values are TOML, or words: device.precision=f32,bf16. A single pipeline's variations are called by their values.
    """
    axes = [_axis(vary) for vary in varies]
    pipelines = [one for one in asked if one.kind == "pipeline"]
    if axes and not pipelines:
        raise InputError("there is no pipeline to vary", where="--vary")
    made = []
    for one in asked:
        for combination in itertools.product(*axes) if one.kind == "pipeline" else [()]:
            if not combination:
                made.append(one)
                continue
            values = ", ".join(value for _, value in combination)
            label = values if len(pipelines) == 1 else f"{one.label}, {values}"
            settings = tuple(f"{key}={value}" for key, value in combination)
            made.append(replace(one, label=label, what=" ".join((one.what, *settings)), **_with(one, settings)))
    return _told_apart(made)


def _with(one: Asked, settings: tuple[str, ...]) -> dict[str, Any]:
    if isinstance(one.config, dict):
        return {"config": apply_overrides(one.config, settings)}
    overrides = (*one.overrides, *settings)
    PipelineConfig.read(Path(one.config), overrides)
    return {"overrides": overrides}


def _axis(vary: str) -> list[tuple[str, str]]:
    key, equals, text = vary.partition("=")
    if not equals or not key or not text:
        raise ConfigError(f"{vary!r} is not KEY=VALUE,VALUE", where="--vary", hint="Example: device.precision=f32,bf16")
    return [(key, value) for value in _split(text)]


def _split(text: str) -> list[str]:
    """Split at commas that are in no bracket or quotes."""
    try:
        parse_toml(f"value = [{text}]", "--vary", error=ConfigError)
    except ConfigError:
        return [part.strip() for part in text.split(",")]
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _told_apart(asked: list[Asked]) -> list[Asked]:
    """Number candidates that would be called the same."""
    labels = [one.label for one in asked]
    seen: dict[str, int] = {}
    made = []
    for one in asked:
        seen[one.label] = seen.get(one.label, 0) + 1
        made.append(replace(one, label=f"{one.label} {seen[one.label]}") if labels.count(one.label) > 1 else one)
    return made
