"""Inputs that a client sends: JSON in which files are base64, data URLs or URLs, checked by the task's own model.

A client never names a file of this machine. A string is text only if the JSON Schema of the task's inputs says so at
its place; every other string is the content of a file, which becomes a temporary one. When the task's model has read
the inputs, no path may have come of them but those.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel

from ovforge.config import checked, paths_in
from ovforge.errors import InputError, OvforgeError
from ovforge_serve.pipelines import Served
from ovforge_serve.settings import Settings

__all__ = ["FORMATS", "Sent", "files_as_text"]

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".gif"}
"""Pictures that are taken, by Pillow's name; other readers of Pillow's may start programs, or are seldom tested."""

_PATHS = {"path", "file-path", "directory-path"}
_SCALARS = {"integer", "number", "boolean"}
_SCALAR = re.compile(r"[-+]?[\d.]{1,40}(e[-+]?\d{1,4})?|true|false", re.ASCII | re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)


class Sent:
    """What one request sent: in a `with` block its files are there, afterwards they are gone.

    `fetch` gets the content of a URL; None if none may be given.
    """

    def __init__(self, folder: Path, settings: Settings, fetch: Callable[[str], bytes]) -> None:
        self._folder = folder / os.urandom(8).hex()
        self._settings, self._fetch = settings, fetch
        self._names: dict[str, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OvforgeError):  # it may name files by their places
            error.what, error.where, error.hint = map(self.shown, (error.what, error.where, error.hint))
        for name in self._names:
            Path(name).unlink(missing_ok=True)
        if self._names:
            self._folder.rmdir()

    def inputs(self, served: Served, value: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the pipeline is called with. Raises InputError or ConfigError for what it does not take."""
        definitions = served.schema.get("$defs", {})
        known = served.schema.get("properties", {})
        strange = set() if served.schema.get("additionalProperties", True) else value.keys() - known.keys()
        given: dict[str, Any] = self._placed(
            {name: part for name, part in value.items() if name not in strange}, [served.schema], definitions, ""
        )
        given |= {name: value[name] for name in strange}  # which the model refuses by name
        if "pixels" in known:  # what the server allows of a picture holds for what only the task can open
            given.setdefault("pixels", self._settings.pixels)
        model = checked(served.inputs, {**served.config.input, **given}, where="input", base=served.base)
        for name in given:
            for path in paths_in(getattr(model, name, None)):
                if str(path) not in self._names:
                    raise InputError("it names a file of the server", where=name, hint="Send the file itself.")
        _check_bounds(model, {"pixels": self._settings.pixels, **self._settings.bounds})
        return given

    def file(self, content: str | bytes, where: str) -> Path:
        """Return a picture as a file. Raises InputError for anything else."""
        path = self._stored(content if isinstance(content, bytes) else self._content(content, where), where)
        if path.suffix not in FORMATS.values():
            raise InputError("it is not a picture", where=where, hint=f"Send one of: {', '.join(FORMATS)}.")
        return path

    def shown(self, value: Any) -> Any:
        """Return a JSON value or a text with files called by their digests, not by their places."""
        if not self._names:
            return value
        if isinstance(value, str):
            for path, name in self._names.items():
                value = value.replace(path, name)
            return value
        if isinstance(value, Mapping):
            return {key: self.shown(part) for key, part in value.items()}
        return [self.shown(part) for part in value] if isinstance(value, list | tuple) else value

    def _placed(self, value: Any, schemas: Sequence[Any], definitions: Mapping[str, Any], where: str) -> Any:
        """Return a part of the inputs with paths instead of the contents of files."""
        nodes = [node for schema in schemas for node in _alternatives(schema, definitions)]
        if isinstance(value, bytes):
            return self._stored(value, where)
        if isinstance(value, str):
            return value if _is_text(nodes, value) else self._stored(self._content(value, where), where)
        if isinstance(value, list):
            return [
                self._placed(
                    part, [_item(node, n) for node in nodes if _is(node, "array")], definitions, f"{where}.{n}"
                )
                for n, part in enumerate(value)
            ]
        if isinstance(value, dict):
            return {
                key: self._placed(
                    part,
                    [_member(node, key) for node in nodes if _is(node, "object")],
                    definitions,
                    f"{where}.{key}".strip("."),
                )
                for key, part in value.items()
            }
        return value

    def _content(self, text: str, where: str) -> bytes:
        if _URL.match(text):
            return self._fetch(text)
        encoded = text
        if text.startswith("data:"):
            head, _, encoded = text.partition(",")
            if not head.endswith(";base64"):
                raise InputError("the data URL is not in base64", where=where)
        try:
            return base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError(
                "it is a file, and neither base64 nor a URL", where=where, hint="Send the file's content in base64."
            ) from error

    def _stored(self, data: bytes, where: str) -> Path:
        path = self._folder / f"{len(self._names)}{self._suffix(data, where)}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._names[str(path)] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path.write_bytes(data)
        return path

    def _suffix(self, data: bytes, where: str) -> str:
        """Return the ending for a file, by its content. Raises InputError for a picture that is too large."""
        if data.startswith(b"\x93NUMPY"):
            return ".npy"
        try:
            with Image.open(io.BytesIO(data)) as picture:
                (width, height), kind = picture.size, str(picture.format)
        except UnidentifiedImageError:
            return ".txt" if data.isascii() else ".bin"
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"the picture cannot be read: {error}", where=where) from error
        if kind not in FORMATS:
            raise InputError(f"it is a {kind} file", where=where, hint=f"Send one of: {', '.join(FORMATS)}.")
        if width * height > self._settings.pixels:
            raise InputError(
                f"a picture of {width}x{height} has more than {self._settings.pixels} pixels", where=where,
                hint="Send a smaller one.",
            )  # fmt: skip
        return FORMATS[kind]


def files_as_text(schema: Any) -> Any:
    """Return a JSON Schema for clients: what is a path for the task is a file in base64 for them."""
    if isinstance(schema, list):
        return [files_as_text(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: files_as_text(part) for key, part in schema.items()}
    if changed.get("format") in _PATHS:
        del changed["format"]
        changed["contentEncoding"] = "base64"
        changed.setdefault("description", "A file: base64, a data URL, or a URL if the server allows it.")
    return changed


def _alternatives(schema: Any, definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the schemas that a place may follow, references resolved."""
    if not isinstance(schema, Mapping):
        yield {}
        return
    if "$ref" in schema:
        yield from _alternatives(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ())]
    for part in parts:
        yield from _alternatives(part, definitions)
    if not parts:
        yield schema


def _is_text(nodes: Sequence[Mapping[str, Any]], value: str) -> bool:
    """Say whether a string at a place is meant as it stands: no file can be there, and text or this number can."""
    if any(node.get("format") in _PATHS or not _says_something(node) for node in nodes):
        return False
    if any(node.get("type") == "string" or "enum" in node or "const" in node for node in nodes):
        return True
    # Forms send numbers as text.
    return any(node.get("type") in _SCALARS for node in nodes) and bool(_SCALAR.fullmatch(value))


def _says_something(node: Mapping[str, Any]) -> bool:
    return any(key in node for key in ("type", "enum", "const"))


def _is(node: Mapping[str, Any], kind: str) -> bool:
    return bool(node.get("type", kind) == kind)


def _item(node: Mapping[str, Any], position: int) -> Any:
    first = node.get("prefixItems", ())
    return first[position] if position < len(first) else node.get("items", {})


def _member(node: Mapping[str, Any], key: str) -> Any:
    return node.get("properties", {}).get(key, node.get("additionalProperties", {}))


def _check_bounds(model: BaseModel, bounds: Mapping[str, int], where: str = "") -> None:
    """Raise InputError for what would take more memory or time than the server gives to one request."""
    longest = 1
    for name, value in model:
        if isinstance(value, BaseModel):
            _check_bounds(value, bounds, f"{where}{name}.")
        most = bounds.get(name)
        if most is not None and isinstance(value, int | float) and value > most:
            raise InputError(f"{value} is more than {most}, the most here", where=f"{where}{name}")
        if isinstance(value, list):
            longest = max(longest, len(value))
    if longest > bounds.get("items", longest):
        raise InputError(
            f"a list of {longest} is longer than {bounds['items']}, the most here", where=where[:-1] or "input"
        )
    count = getattr(model, "count", 1)
    if isinstance(count, int) and "count" in bounds and hasattr(model, "count") and longest * count > bounds["count"]:
        raise InputError(f"{longest * count} results are more than {bounds['count']}, the most here", where="count")
