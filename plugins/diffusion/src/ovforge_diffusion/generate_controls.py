"""Conditions on the command line: `FOLDER=PICTURE[,KEY=VALUE]...`, or without the folder of a ControlNet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovforge.errors import InputError
from ovforge_diffusion.inputs import Control
from ovforge_diffusion.residuals import CONTROLNETS

__all__ = ["controls_of"]

_KEYS = tuple(name for name in Control.model_fields if name != "image")
_FILES = ("mask", "around")
_KEY = re.compile(r",\s*(\w+)=")
"""What begins a key. A comma that no key follows is a part of a name."""


def controls_of(
    nets: Sequence[str], others: Sequence[str], *, canny: bool
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Return the parts, ControlNet's role -> folder, and the conditions: first those of `nets`, then `others`.

    `canny` makes edges of the pictures that say nothing else. Raises InputError for what cannot be read.
    """
    if len(nets) > len(CONTROLNETS):
        raise InputError(
            f"{len(nets)} ControlNets, and a pipeline takes {len(CONTROLNETS)}",
            where="--controlnet",
            hint="Several conditions for one of them come by --control PICTURE.",
        )
    parts, conditions = {}, []
    for role, text in zip(CONTROLNETS, nets, strict=False):
        folder, equals, condition = _folder_first(text)
        if not equals or not folder:
            raise InputError(
                f"{text!r} is not FOLDER=PICTURE",
                where="--controlnet",
                hint="Options follow it: FOLDER=PICTURE,mode=0.",
            )
        parts[role] = folder
        conditions.append(_condition(condition, "--controlnet"))
    conditions += [_condition(text, "--control") for text in others]
    if canny and not conditions:
        raise InputError("there is no condition", where="--canny", hint="Give one: --controlnet FOLDER=PICTURE.")
    return parts, [{"preprocess": "canny", **each} if canny else each for each in conditions]


def _folder_first(text: str) -> tuple[str, str, str]:
    """Split at the last equals sign before the keys, because folders may have some in their names."""
    key = _KEY.search(text, text.find("=") + 1)
    end = key.start() if key else len(text)
    folder, equals, picture = text[:end].rpartition("=")
    return folder, equals, picture + text[end:]


def _condition(text: str, where: str) -> dict[str, Any]:
    """Return a condition from PICTURE[,KEY=VALUE]...; the values are checked with the call's other inputs."""
    marks = list(_KEY.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    picture = text[: marks[0].start()] if marks else text
    if not picture:
        raise InputError(f"{text!r} names no picture", where=where, hint="Write PICTURE, or PICTURE,KEY=VALUE.")
    condition: dict[str, Any] = {"image": str(Path(picture).resolve())}
    for mark, end in zip(marks, ends, strict=False):
        name, value = mark[1], text[mark.end() : end].strip()
        if name not in _KEYS or name in condition or not value:
            what = "unknown" if name not in _KEYS else "given twice" if name in condition else "empty"
            raise InputError(f"{name!r} is {what} in {text!r}", where=where, hint=f"Keys are {', '.join(_KEYS)}.")
        condition[name] = str(Path(value).resolve()) if name in _FILES else value
    return condition
