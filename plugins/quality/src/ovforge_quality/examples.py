"""Inputs to run a pipeline with where nobody has called it: to calibrate, and to judge by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ovforge.config import checked, input_content
from ovforge.errors import ConfigError, PluginError, did_you_mean
from ovforge.store import parse_object
from ovforge_quality.sections import CalibrationSection, QualitySection

if TYPE_CHECKING:
    from ovforge.contracts import Task

__all__ = ["Examples", "check_apart", "read_examples"]

SIZE_LIMIT = 64 * 2**20
"""Largest file of inputs, in bytes."""

_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Examples:
    """Where inputs come from: a config's own, or every second one of the task's examples.

    The task's examples number 0, 2, 4... calibrate, the others are held out to judge by; so are odd seeds.
    """

    model: type[BaseModel]
    given: tuple[BaseModel, ...] | None
    options: Mapping[str, Any]
    base: Path
    seed: int
    held_out: bool
    key: str
    """The table that they come from, for errors."""

    @classmethod
    def none(cls, key: str) -> Examples:
        """Return no examples, for a model that no task runs."""
        return cls(BaseModel, (), {}, Path(), 0, key == "quality", key)

    def take(self, task: Task, count: int, without: Examples | None = None) -> list[BaseModel]:
        """Return up to `count` inputs, more than are given only where a random seed makes them different.

        None is among those that `without` was given. Raises ConfigError if there is none at all.
        """
        found = list(self._given(count)) if self.given is not None else list(self._of_task(task, count, without))
        if not found:
            raise ConfigError(
                "the task has no examples of its own" + " that are held out" * self.held_out,
                where=self.key,
                hint="Name a file with inputs: file = ..., or give inputs = [...].",
            )
        return [self._seeded(inputs, number) for number, inputs in enumerate(found)]

    def _given(self, count: int) -> Iterator[BaseModel]:
        assert self.given is not None
        again = "seed" in self.model.model_fields
        for number in range(count if again else min(count, len(self.given))):
            yield self.given[number % len(self.given)]

    def _of_task(self, task: Task, count: int, without: Examples | None) -> Iterator[BaseModel]:
        if not hasattr(task, "examples"):
            raise PluginError(
                f"the task {type(task).__name__} gives no examples", hint="Its plugin was made for another ovforge."
            )
        taken = {_first(inputs) for inputs in (without.given or ())} if without else set()
        wanted = 2 * (count + len(taken))
        mine = [inputs for inputs in task.examples(wanted)[self.held_out :: 2] if _first(inputs) not in taken]
        for inputs in mine[:count]:
            written = {name: getattr(inputs, name) for name in inputs.model_fields_set}
            yield checked(self.model, {**written, **self.options}, where=f"{self.key}.options", base=self.base)

    def _seeded(self, inputs: BaseModel, number: int) -> BaseModel:
        """Give each call a seed of its own, which the other table never has."""
        named = self.given is not None and "seed" in inputs.model_fields_set and number < len(self.given)
        if "seed" not in self.model.model_fields or named or "seed" in self.options:
            return inputs
        return inputs.model_copy(update={"seed": 2 * (self.seed + number) + self.held_out})

    def content(self, digest: Callable[[Path], str]) -> dict[str, Any]:
        """Return all that the inputs depend on, besides the task; files count by their content."""
        given = None if self.given is None else [input_content(inputs, digest) for inputs in self.given]
        text = json.dumps([given, input_content(dict(self.options), digest)], sort_keys=True)
        return {"inputs": hashlib.sha256(text.encode()).hexdigest(), "seed": self.seed}


def read_examples(
    table: CalibrationSection | QualitySection, model: type[BaseModel], base: Path, *, key: str, task: str
) -> Examples:
    """Read and check what a config says of inputs. Raises ConfigError that names the file and the line."""
    fields = model.model_fields
    for name in table.options:
        if name not in fields:
            raise ConfigError(
                f"unknown input `{name}`.{did_you_mean(name, fields)}",
                where=f"{key}.options",
                hint=f"{task} takes: {', '.join(fields)}.",
            )
    given: tuple[BaseModel, ...] | None = None
    if table.file is not None:
        path = base / Path(table.file).expanduser()
        lines = _read(path, model, key, task)
        given = tuple(checked(model, {**line, **table.options}, where=where, base=path.parent) for where, line in lines)
    elif table.inputs:
        given = tuple(
            checked(model, {**line, **table.options}, where=f"{key}.inputs.{number}", base=base)
            for number, line in enumerate(table.inputs)
        )
    return Examples(model, given, table.options, base, table.seed, key == "quality", key)


def check_apart(calibration: Examples, quality: Examples) -> None:
    """Raise ConfigError if pipelines would be judged by what they were calibrated with."""
    both = {_first(inputs) for inputs in calibration.given or ()} & {_first(inputs) for inputs in quality.given or ()}
    if both:
        raise ConfigError(
            f"{len(both)} of the inputs calibrate, too, as {min(both)[:60]}",
            where="quality",
            hint="Judge by inputs that calibration has not seen.",
        )


def _read(path: Path, model: type[BaseModel], key: str, task: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, inputs) of each line or picture."""
    first = next(iter(model.model_fields))
    if not path.exists():
        raise ConfigError("no such file or folder", where=f"{key}.file: {path}")
    if path.is_dir():
        if not _is_picture(model, first):
            raise ConfigError(
                f"a folder holds pictures, and the first input of {task} is `{first}`",
                where=f"{key}.file: {path}",
                hint=f'Name a text file with a {first} on each line, or a .jsonl: {{"{first}": ..., ...}}.',
            )
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _PICTURES)
        if not files:
            raise ConfigError(
                "no picture in it", where=f"{key}.file: {path}", hint=f"Known are {', '.join(sorted(_PICTURES))}."
            )
        return [(str(file), {first: file}) for file in files]
    lines = _lines(path, key)
    if path.suffix.lower() == ".jsonl":
        return [(f"{path}, line {number}", _object(line, f"{path}, line {number}")) for number, line in lines]
    return [(f"{path}, line {number}", {first: line}) for number, line in lines]


def _lines(path: Path, key: str) -> list[tuple[int, str]]:
    where = f"{key}.file: {path}"
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise ConfigError(f"it is larger than {SIZE_LIMIT} bytes", where=where)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read as text: {error}", where=where) from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise ConfigError("it has no line with anything on it", where=where, hint="Write an input on each line.")
    return lines


def _object(line: str, where: str) -> dict[str, Any]:
    return parse_object(line, where, error=ConfigError)


def _is_picture(model: type[BaseModel], field: str) -> bool:
    described: dict[str, Any] = model.model_json_schema()["properties"][field]
    return any(each.get("format") == "path" for each in (described, *described.get("anyOf", ())))


def _first(inputs: BaseModel) -> str:
    """Return what tells an input from others: its first field, by content."""
    return json.dumps(input_content(getattr(inputs, next(iter(type(inputs).model_fields)))))
