"""What a page has made: files of results, and the recipe of each, from which it is made again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import tomlkit

from ovforge import ImagesResult, Pipeline, Result, Stop
from ovforge.errors import ConfigError
from ovforge.model import PICTURE_SUFFIXES, values_as_json
from ovforge_ui.hosts import Asked

__all__ = ["Made", "Shelf", "Shelves", "files_of", "named", "recipe", "things_of", "without_uploads"]

_VIDEOS = (".webm", ".mp4")
"""Kinds of videos that browsers play, the first that a result can write is taken."""

_MOST, _SHELVES = 48, 256
"""Things that stay in a tab's gallery, and tabs of all browsers whose things are kept."""


@dataclass(frozen=True)
class Made:
    """One thing that a run made: its file, what is written under it, and what it was made from."""

    file: Path
    caption: str
    recipe: str
    asked: Asked


@dataclass
class Shelf:
    """What one tab of one browser has made, the newest first, and its last results, for thresholds that act at once."""

    made: list[Made] = field(default_factory=list)
    chosen: int = 0
    results: list[Result] = field(default_factory=list)
    asked: Asked | None = None
    fresh: int = 0
    """How many of the newest come from the last run."""

    def add(self, made: Sequence[Made]) -> None:
        """Put new things before the others; the oldest go."""
        self.made = [*made, *self.made][:_MOST]
        self.chosen, self.fresh = 0, len(made)

    def exchange(self, made: Sequence[Made]) -> None:
        """Put things instead of what the last run gave."""
        self.made = self.made[self.fresh :]
        self.add(made)


class Shelves:
    """The shelf of each tab of each browser, and its run; those that were used longest ago go."""

    def __init__(self) -> None:
        self._shelves: OrderedDict[tuple[str, str], Shelf] = OrderedDict()
        self._runs: dict[tuple[str, str], Stop] = {}
        self._lock = Lock()

    def of(self, session: str, tab: str) -> Shelf:
        """Return the shelf of a tab, an empty one at first."""
        with self._lock:
            shelf = self._shelves.setdefault((session, tab), Shelf())
            self._shelves.move_to_end((session, tab))
            while len(self._shelves) > _SHELVES:
                self._shelves.popitem(last=False)
            return shelf

    @contextmanager
    def running(self, session: str, tab: str, stop: Stop) -> Iterator[None]:
        """Let `cancel` find a run while the block runs; when the block ends, so does the run."""
        self._runs[session, tab] = stop
        try:
            yield
        finally:
            stop.ask()
            self._runs.pop((session, tab), None)

    def cancel(self, session: str, tab: str) -> None:
        """End the run of a tab at its next step."""
        if stop := self._runs.get((session, tab)):
            stop.ask()

    def forget(self, session: str) -> None:
        """Let the runs of a browser that is gone end, and drop what it has made."""
        for key in [key for key in self._runs if key[0] == session]:
            self._runs[key].ask()
        with self._lock:
            for key in [key for key in self._shelves if key[0] == session]:
                del self._shelves[key]


def files_of(result: Result, folder: Path) -> tuple[list[Path], list[Path]]:
    """Write a result; return its pictures or videos, and its other files."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / os.urandom(6).hex()
    suffixes = result.suffixes
    if videos := [suffix for suffix in _VIDEOS if suffix in suffixes]:
        return _save_video(result, stem, videos), []
    pictures = result.save(stem.with_suffix(".png")) if _has_pictures(result) else []
    others = [suffix for suffix in suffixes if suffix and suffix not in PICTURE_SUFFIXES and suffix != ".npy"]
    return pictures, result.save(stem.with_suffix(others[0])) if others else []


def _save_video(result: Result, stem: Path, suffixes: Sequence[str]) -> list[Path]:
    """Write the first kind that the config's codec goes into, which is checked before the video is read."""
    for suffix in suffixes[:-1]:
        with contextlib.suppress(ConfigError):
            return result.save(stem.with_suffix(suffix))
    return result.save(stem.with_suffix(suffixes[-1]))


def _has_pictures(result: Result) -> bool:
    return PICTURE_SUFFIXES[0] in result.suffixes and result.preview() is not None


def without_uploads(value: Any, uploads: Path) -> Any:
    """Return a JSON value in which files that were sent to the page are called by their digests."""
    if isinstance(value, str) and value.startswith(str(uploads)) and Path(value).is_file():
        return f"sha256:{hashlib.sha256(Path(value).read_bytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return {key: without_uploads(part, uploads) for key, part in value.items()}
    return [without_uploads(part, uploads) for part in value] if isinstance(value, list | tuple) else value


def named(text: str, uploads: Path) -> str:
    """Return a text in which files that were sent to the page are called by their names, without their folders."""
    return re.sub(rf"{re.escape(str(uploads))}[/\\\\](?:[\w.-]+[/\\\\])*", "", text)


def recipe(pipeline: Pipeline, provenance: Mapping[str, Any]) -> str:
    """Return a config (TOML) from which `ovforge run` makes the same; what no config says stands in comments."""
    defaults = {
        name: values_as_json(info.get_default(call_default_factory=True), name)
        for name, info in pipeline.inputs_model.model_fields.items()
        if not info.is_required()
    }
    inputs = {
        name: value
        for name, value in provenance.get("inputs", {}).items()
        if value is not None and not (name in defaults and value == defaults[name])
    }
    document = tomlkit.document()
    for line in _comments(provenance):
        document.add(tomlkit.comment(line))
    for key, value in _without_none({**provenance.get("config", {}), "input": inputs}).items():
        document[key] = value
    return tomlkit.dumps(document)


def _comments(provenance: Mapping[str, Any]) -> list[str]:
    """Return what a config does not say: versions, controls and adapters that were moved, where paths start."""
    lines = [", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items())]
    if "base" in provenance:
        lines.append(f"Relative paths start at {provenance['base']}")
    weights = {name: entry.get("weight") for name, entry in provenance.get("adapters", {}).items()}
    for kind, numbers in (("adapter", weights), ("control", provenance.get("controls", {}))):
        lines += [f"{kind} {name} = {number:g}" for name, number in numbers.items()]
    return [" ".join(line.split()) for line in lines if line]


def _without_none(value: Any) -> Any:
    """Return a value without what TOML cannot say."""
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value if part is not None] if isinstance(value, list | tuple) else value


def things_of(pipeline: Pipeline, result: Result, asked: Asked, files: Sequence[Path], caption: str = "") -> list[Made]:
    """Return an entry for each file of a result; each picture is made again by its own seed."""
    if not isinstance(result, ImagesResult) or len(result.seeds) != len(files):
        made = recipe(pipeline, result.provenance)
        return [Made(file, caption, made, asked) for file in files]
    things = []
    for position, (file, seed) in enumerate(zip(files, result.seeds, strict=True)):
        inputs = {**asked.inputs, "seed": seed, **({"count": 1} if asked.inputs.get("count") else {})}
        words = " \N{MIDDLE DOT} ".join(part for part in (caption, f"seed {seed}") if part)
        made = recipe(pipeline, result.provenance_of(position))
        things.append(Made(file, words, made, replace(asked, inputs=inputs)))
    return things
