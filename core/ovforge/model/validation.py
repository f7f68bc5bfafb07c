"""Checks of an IR before OpenVINO reads it: what would end the process there is an error here.

OpenVINO answers most damaged graphs with an exception. The rest was found by changing real graphs, part by part, and
reading each in a process of its own (`make torture`): operations whose values or variable are missing, and documents
whose size or depth the parser does not bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from ovforge.errors import ModelError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

    from ovforge.model.sources import Source

__all__ = ["check_ir", "check_model_file"]

SIZE = 512 * 2**20
"""Most bytes of a graph without its weights: one of a hundred thousand layers has a tenth."""

DEPTH = 200
"""Most levels of elements: each body of a loop or a branch inside another has six."""

ELEMENTS = 2**62
"""Most elements of a shape, each dimension counted at 1 or more."""

_NEEDED = {"ReadValue": "variable_id", "Assign": "variable_id"}
"""Attributes that OpenVINO reads without looking whether they are there."""

_INPUTS = {"Broadcast": 2, "MaxPool": 1, "Slice": 4}
"""Inputs that it reads so; for all other operations it counts them first."""


def check_model_file(source: Source, path: str) -> None:
    """Raise ModelError if `path` of a source, which OpenVINO is to read next, could end or hang this process.

    What comes from the cache or an installed package passes.
    """
    if getattr(source, "trusted", False):
        return
    if PurePosixPath(path).suffix != ".xml":
        from ovforge.model.probing import probe

        probe(source, path)
        return
    if source.files().get(path, 0) > SIZE:
        raise ModelError(f"{path} is a graph of more than {SIZE} bytes", where=source.name)
    weights = source.files().get(PurePosixPath(path).with_suffix(".bin").as_posix(), 0)
    check_ir(source.read(path), weights, f"{source.name}: {path}")


def check_ir(xml: bytes, weights: int, where: str) -> None:
    """Raise ModelError, naming `where`, if an IR's .xml could crash OpenVINO. `weights` is the size of its .bin."""
    from xml.etree import ElementTree

    if b"<!DOCTYPE" in xml or b"<!ENTITY" in xml:
        raise _wrong("it declares a document type, which no IR has", where)
    try:
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # also of encodings that nobody knows
        raise _wrong(f"it is not valid XML: {error}", where) from error
    if root.tag != "net":
        raise _wrong(f"it begins with <{root.tag[:40]}>, and an IR begins with <net>", where)
    _check_depth(root, where)
    for layer in root.iter("layer"):
        _check_layer(layer, weights, f"{where}: layer {layer.get('name', '?')!r}")


def _check_depth(root: Element, where: str) -> None:
    level = [root]
    for _ in range(DEPTH):
        level = [child for parent in level for child in parent]
        if not level:
            return
    raise _wrong(f"it has more than {DEPTH} levels of elements inside each other", where)


def _check_layer(layer: Element, weights: int, where: str) -> None:
    kind, data = layer.get("type", ""), layer.find("data")
    attributes = {} if data is None else data.attrib
    ports = len(layer.findall("input/port"))
    if kind == "Constant":
        raise _wrong('it has the type "Constant", which is "Const" in a file', where)
    if (needed := _NEEDED.get(kind)) and not attributes.get(needed):
        raise _wrong(f"it has no {needed}", where)
    if (inputs := _INPUTS.get(kind, 0)) > ports:
        raise _wrong(f"it has {ports} inputs, and {kind} takes at least {inputs}", where)
    if "shape" in attributes:
        _check_shape(attributes["shape"], where)
    if kind == "Const":
        end = _number(attributes, "offset", where) + _number(attributes, "size", where)
        if end > weights:
            hint = "The .bin is missing or cut off: copy or convert the model again."
            raise ModelError(f"its values end at byte {end}, and the .bin has {weights}", where=where, hint=hint)


def _check_shape(text: str, where: str) -> None:
    """Refuse a shape that counts more elements than any memory holds; other mistakes are OpenVINO's to name."""
    sides = [part.strip() for part in text.split(",")]
    known = [int(side) for side in sides if side.isascii() and side.isdigit() and len(side) < 30]
    if math.prod(max(side, 1) for side in known) > ELEMENTS:
        raise _wrong(f"its shape {text[:60]} has more elements than any memory", where)


def _number(attributes: Mapping[str, str], key: str, where: str) -> int:
    text = attributes.get(key, "")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _wrong(f"its {key} is {text[:40]!r}, and is to be a number of bytes", where)
    return int(text)


def _wrong(what: str, where: str) -> ModelError:
    hint = "The file is damaged, or OpenVINO did not write it: copy or convert it again."
    return ModelError(what, where=where, hint=hint)
