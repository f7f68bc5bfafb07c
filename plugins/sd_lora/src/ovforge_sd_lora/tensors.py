"""A .safetensors file as numpy arrays: the header is checked before anything else is read.

The library's own numpy reader reads other sources than plain files whole; so the header is read here. Source of the
format: https://github.com/huggingface/safetensors (README, "Format"). Scaled tensors are those of ComfyUI: a number, or
one for each row, stands under the tensor's name with `scale_weight` or `weight_scale` and is multiplied in.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object

__all__ = ["TensorFile", "TensorInfo"]

Array = NDArray[np.float32]

_HEADER_LIMIT = 16 * 2**20
"""Largest header, in bytes: that of an adapter with 10000 tensors has about one million."""

_DIMENSIONS = 8
"""Most dimensions of a tensor; those of adapters have up to five."""

_TYPES: dict[str, Any] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U8": "u1", "BOOL": "?", "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
_OTHER_SIZES = {"U16": 2, "U32": 4, "U64": 8, "F8_E8M0": 1, "C64": 8}

_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale", "scaled_fp8", ".comfy_quant")
"""Ends of names that say how a layer may be computed in float8, and change no weight."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of a tensor; `begin` is its first byte after the header."""

    type: str
    shape: tuple[int, ...]
    begin: int
    size: int


class TensorFile:
    """A file's tensors by name, each read when asked for. Plain files are mapped into memory, not read.

    `tensors` leaves out what belongs to scaled storage: scales are multiplied in when a tensor is read.
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
        self.metadata, tensors = self._parse(source.read(path, 8 + length)[8:], size - 8 - length)
        self._scales = {
            scaled: tensors[name]
            for name in tensors
            for end in _SCALES
            if name.endswith(end)
            for scaled in (f"{name.removesuffix(end)}.weight", name.removesuffix(end))
            if scaled in tensors
        }
        storage = {info.begin for info in self._scales.values()}
        self.tensors = {
            name: info
            for name, info in tensors.items()
            if not name.endswith(_UNUSED) and not (name.endswith(_SCALES) and info.begin in storage)
        }
        local = source.local(path)
        data = np.memmap(local, np.uint8, "r") if local else np.frombuffer(source.read(path), np.uint8)
        self._data = data[8 + length :]

    def read(self, name: str) -> Array:
        """Return a tensor as float32, in its shape. Raises ModelError if it holds no finite numbers."""
        values = self._values(name, self.tensors[name])
        if (scale := self._scales.get(name)) is not None:
            factor = self._values(f"the scale of {name}", scale)
            if factor.size == 1:
                values = values * factor.reshape(())
            elif values.ndim and factor.size == len(values):
                values = values * factor.reshape(-1, *[1] * (values.ndim - 1))
            else:
                raise ModelError(
                    f"{name} is {list(values.shape)}, and its scale {list(factor.shape)}: neither one number nor one "
                    "for each row",
                    where=self.where,
                    hint="Store the adapter as F32, F16 or BF16.",
                )
        if not np.isfinite(values).all():
            raise ModelError(
                f"{name} holds NaN or infinite numbers",
                where=self.where,
                hint="The training went wrong, or the file is damaged.",
            )
        return values

    def _values(self, name: str, info: TensorInfo) -> Array:
        if info.type not in _TYPES:
            raise ModelError(
                f"{name} has the type {info.type}", where=self.where, hint="Store the adapter as F32, F16 or BF16."
            )
        raw = self._data[info.begin : info.begin + info.size].view(_TYPES[info.type])
        with np.errstate(over="ignore", invalid="ignore"):
            # A copy: OpenVINO does not take read-only memory.
            values: Array = raw.astype(np.float32).reshape(info.shape)
        return values

    def _parse(self, header: bytes, room: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
        try:
            value = parse_object(header, self.where, size=len(header))
        except ModelError as error:
            raise self._damaged(f"its header is {error.what}") from error
        metadata = value.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._damaged("its metadata is not a JSON object")
        tensors = {name: self._info(name, entry, room) for name, entry in value.items()}
        ordered = sorted((info.begin, info.begin + info.size, name) for name, info in tensors.items())
        for (_, end, name), (begin, _, other) in itertools.pairwise(ordered):
            if begin < end:
                raise self._damaged(f"{_shown(name)} and {_shown(other)} overlap")
        return {_text(key): _text(text) for key, text in metadata.items()}, tensors

    def _info(self, name: str, entry: Any, room: int) -> TensorInfo:
        try:
            name.encode()
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            whole = isinstance(kind, str) and isinstance(shape, list) and len(shape) <= _DIMENSIONS
            whole = whole and all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        except (TypeError, KeyError, ValueError) as error:
            raise self._damaged(f"its header does not describe {_shown(name)}") from error
        width = (_OTHER_SIZES.get(kind) or (kind in _TYPES and np.dtype(_TYPES[kind]).itemsize)) if whole else None
        if not width or end > room or end - begin != math.prod(shape) * width:
            raise self._damaged(f"its header says of {_shown(name)}: {_shown(entry)}, and there are {room} bytes")
        return TensorInfo(kind, tuple(shape), begin, end - begin)

    def _damaged(self, what: str) -> ModelError:
        return ModelError(
            f"not a whole .safetensors file: {what}",
            where=self.where,
            hint="It is damaged, cut off, or something else under that name: fetch it again.",
        )


def _text(value: Any) -> str:
    """Return a text that can be encoded: JSON can hold halves of characters, which nothing prints."""
    return str(value).encode("utf-8", "replace").decode()


def _shown(value: Any) -> str:
    """Return what a stranger's header says, short."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
