"""A .safetensors file as numpy arrays: the header is checked before anything else is read.

The library's own numpy reader knows no bfloat16, and reads other sources than plain files whole; hence the header is
read here. Source of the format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object

__all__ = ["TensorFile", "TensorInfo"]

Array = NDArray[np.float32]

_HEADER_LIMIT = 16 * 2**20
"""Largest header, in bytes: that of an adapter with 10000 tensors has about one million."""

_TYPES: dict[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U8": "u1", "BOOL": "?",
}  # fmt: skip
_OTHER_SIZES = {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor; `begin` is its first byte after the header."""

    type: str
    shape: tuple[int, ...]
    begin: int
    size: int


class TensorFile:
    """A file's tensors by name, each read when asked for. Plain files are mapped into memory, not read.

    Raises ModelError for a header that does not describe the file.
    """

    def __init__(self, source: Source, path: str) -> None:
        self.where = source.name if path == source.name.rsplit("/", 1)[-1] else f"{source.name}: {path}"
        size = source.files()[path]
        length = int.from_bytes(source.read(path, 8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise self._damaged(f"its header would have {length} bytes, and the file has {size}")
        if length > _HEADER_LIMIT:
            raise self._damaged(f"its header has {length} bytes, more than {_HEADER_LIMIT}")
        self.metadata, self.tensors = self._parse(source.read(path, 8 + length)[8:], size - 8 - length)
        local = source.local(path)
        data = np.memmap(local, np.uint8, "r") if local else np.frombuffer(source.read(path), np.uint8)
        self._data = data[8 + length :]

    def read(self, name: str) -> Array:
        """Return a tensor as float32, in its shape. Raises ModelError where it holds no finite numbers."""
        info = self.tensors[name]
        if info.type not in _TYPES:
            raise ModelError(
                f"{name} has the type {info.type}", where=self.where, hint="Adapters are F32, F16 or BF16: convert it."
            )
        raw = self._data[info.begin : info.begin + info.size].view(_TYPES[info.type])
        if info.type == "BF16":
            values: Array = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            with np.errstate(over="ignore"):
                values = raw.astype(np.float32)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{name} holds NaN or infinite numbers",
                where=self.where,
                hint="The training went wrong, or the file is damaged.",
            )
        return values.reshape(info.shape)

    def _parse(self, header: bytes, room: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        try:
            value = parse_object(header, self.where, size=len(header))
        except ModelError as error:
            raise self._damaged(f"its header is {error.what}") from error
        metadata = value.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._damaged("its metadata is no JSON object")
        return {str(key): str(text) for key, text in metadata.items()}, {
            name: self._info(name, entry, room) for name, entry in value.items()
        }

    def _info(self, name: str, entry: Any, room: int) -> TensorInfo:
        try:
            kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise self._damaged(f"its header does not describe {name!r}") from error
        width = _OTHER_SIZES.get(kind) or (np.dtype(_TYPES[kind]).itemsize if kind in _TYPES else None)
        if width is None or not whole or end > room or end - begin != math.prod(shape) * width:
            raise self._damaged(f"its header says of {name!r}: {kind} {list(shape)}, bytes {begin} to {end} of {room}")
        return TensorInfo(kind, shape, begin, end - begin)

    def _damaged(self, what: str) -> ModelError:
        return ModelError(
            f"not a whole .safetensors file: {what}",
            where=self.where,
            hint="It is damaged, cut off, or something else under that name: fetch it again.",
        )


def shapes_of(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape."""
    return {name: info.shape for name, info in tensors.items()}
