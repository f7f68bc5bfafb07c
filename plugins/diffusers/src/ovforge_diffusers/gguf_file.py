"""The header of a GGUF file (llama.cpp's format, versions 2 and 3), with every number checked before it is used.

A file from somebody else may say anything of itself: counts, lengths and places are compared with the file's size.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge_diffusers.gguf_blocks import BLOCKS

__all__ = ["GGUF", "Entry", "GgufHeader", "read_gguf_header"]

GGUF = b"GGUF"
LIMIT = 64 * 2**20
"""Largest header, in bytes, that is looked at: those of models of pictures have some hundred KiB."""

_DIMENSIONS = 4
_ALIGNMENT = 32
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_ORIGINAL = "comfy.gguf.orig_shape."
"""Before the name of a tensor that was stored in two dimensions, and has another shape."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: the name of its type, its shape as the model has it, and where its bytes lie in the file."""

    type: str
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says it holds. Lists of numbers in its metadata are arrays of numpy."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, Any]


def read_gguf_header(source: Source, path: str) -> GgufHeader:
    """Read a header. Raises ModelError if the file is not GGUF, cut off, of an unknown type, or lies about itself."""
    where = f"{source.name}: {path}" if len(source.files()) > 1 else source.name
    size = source.files()[path]
    try:
        return _parse(_Reader(source.read(path, min(size, LIMIT))), size)
    except ModelError as error:
        raise ModelError(error.what, where=where, hint=error.hint) from error
    except (struct.error, ValueError, UnicodeDecodeError, OverflowError) as error:
        raise ModelError(
            f"its header cannot be read: {error}", where=where, hint="The file is cut off or damaged: fetch it again."
        ) from error


class _Reader:
    """Takes values from the front of some bytes. Raises ValueError if there are none left."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0

    def take(self, count: int) -> bytes:
        if count > len(self._data) - self.place:
            raise ValueError("it ends in the middle of a value")
        self.place += count
        return self._data[self.place - count : self.place]

    def number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def count(self, least: int) -> int:
        """Take a number of things that have at least `least` bytes each."""
        value: int = self.number("Q")
        if value * least > len(self._data) - self.place:
            raise ValueError(f"it says to have {value} entries, more than fit")
        return value

    def string(self) -> str:
        return self.take(self.count(1)).decode("utf-8")

    def value(self, kind: int, *, inside: bool = False) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or inside:
            raise ValueError(f"a value of the unknown kind {kind}")
        element = self.number("I")
        if element in _NUMBERS:  # as numpy has them: lists of numbers would take many times their bytes
            number = np.dtype(_NUMBERS[element]).newbyteorder("<")
            return np.frombuffer(self.take(self.count(number.itemsize) * number.itemsize), number)
        return [self.value(element, inside=True) for _ in range(self.count(8))]


def _parse(reader: _Reader, size: int) -> GgufHeader:
    if reader.take(4) != GGUF:
        raise ModelError("it is not a GGUF file", hint="It may be an incomplete download: fetch it again.")
    version = reader.number("I")
    if version not in (2, 3):
        order = " (its bytes are in the order of another processor)" if version > 0xFFFF else ""
        raise ModelError(f"GGUF of version {version} is not known{order}, only 2 and 3")
    tensors, values = reader.count(24), reader.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(values):
        key = reader.string()
        metadata[key] = reader.value(reader.number("I"))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"an alignment of {alignment!r}")
    found = [_entry(reader) for _ in range(tensors)]
    start = -(-reader.place // alignment) * alignment
    entries: dict[str, Entry] = {}
    for name, kind, shape, offset in found:
        if name in entries:
            raise ValueError(f"two tensors are named {name!r}")
        width, stored = BLOCKS[kind][:2]
        length = math.prod(shape) // width * stored
        if offset % alignment or start + offset + length > size:
            raise ModelError(
                f"the tensor {name} lies outside of the file", hint="It may be an incomplete download: fetch it again."
            )
        entries[name] = Entry(kind, _shape(name, shape, metadata), start + offset, length)
    return GgufHeader(entries, metadata)


def _entry(reader: _Reader) -> tuple[str, str, tuple[int, ...], int]:
    """Take a tensor's name, type, shape (the last axis first, as the file has it) and place."""
    name, dimensions = reader.string(), reader.number("I")
    if dimensions > _DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions")
    shape = tuple(reader.number("Q") for _ in range(dimensions))[::-1]
    number = reader.number("I")
    kind = _NAMES.get(number, str(number))
    if kind not in BLOCKS:
        raise ModelError(
            f"{name} is of type {kind}, which is not read",
            hint=f"Take a file of another type: {', '.join(each for each in BLOCKS if each[0] in 'QI')}.",
        )
    if any(side >= 2**40 for side in shape) or math.prod(shape) >= 2**48:
        raise ValueError(f"{name} has a shape of {list(shape)}")
    if (shape[-1] if shape else 1) % BLOCKS[kind][0]:
        raise ValueError(f"{name} has rows of {shape[-1]} values, which are not whole blocks of {kind}")
    return name, kind, shape, reader.number("Q")


def _shape(name: str, stored: tuple[int, ...], metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape that the model has, which a program that makes such files notes if it is not the stored one."""
    original = metadata.get(_ORIGINAL + name)
    if original is None:
        return stored
    original = original.tolist() if isinstance(original, np.ndarray) else original
    if not isinstance(original, list) or math.prod(original) != math.prod(stored) or min(original, default=0) < 1:
        raise ValueError(f"{name} has the shape {original}, stored as {list(stored)}")
    return tuple(original)
