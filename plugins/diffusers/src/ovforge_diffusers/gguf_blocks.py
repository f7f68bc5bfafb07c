"""Blocks of quantized weights in GGUF files: integers, a scale and an offset for each group.

Every type is read into one form: a weight is `scale * q - offset`, in float32 and in this order, which gives bit for
bit what llama.cpp and its package `gguf` give. Layouts are those of ggml's `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BLOCKS", "FLOATS", "Groups", "read_groups"]

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_K = 256
"""Weights in a block of the k-quants."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Quantized weights [rows, groups, group]: int8 or uint8, the type "i4", "u4", "i8" or "u8" that holds them.

    `scale` is float32 [rows, groups, 1], and so is `offset`, None if the type has none.
    """

    q: NDArray[np.int8] | NDArray[np.uint8]
    type: str
    scale: Floats
    offset: Floats | None

    def values(self) -> Floats:
        """Return the weights, as [rows, groups, group]."""
        values = self.scale * self.q.astype(np.float32)
        return values if self.offset is None else values - self.offset


def read_groups(kind: str, blocks: Bytes) -> Groups:
    """Take blocks [rows, blocks, bytes] apart."""
    rows, count, _ = blocks.shape
    q, form, scale, offset = _READERS[kind](np.ascontiguousarray(blocks).reshape(rows * count, -1))
    group = q.shape[-1]
    scale = scale.reshape(rows, -1, 1)
    return Groups(q.reshape(rows, -1, group), form, scale, None if offset is None else offset.reshape(rows, -1, 1))


Read = tuple[NDArray[np.int8] | NDArray[np.uint8], str, Floats, Floats | None]


def _half(data: Bytes) -> Floats:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _bits(data: Bytes, width: int, each: int) -> Bytes:
    """Return what bytes [blocks, n] hold in parts of `width` bits: of each run of `each` bytes, first all low parts."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    parts = data.reshape(len(data), -1, 1, each) >> shifts[:, None]
    return (parts & np.uint8(2**width - 1)).reshape(len(data), -1)


def _q8_0(b: Bytes) -> Read:
    return np.ascontiguousarray(b[:, 2:]).view(np.int8), "i8", _half(b[:, :2]), None


def _q4_0(b: Bytes) -> Read:
    return _bits(b[:, 2:], 4, 16).astype(np.int8) - np.int8(8), "i4", _half(b[:, :2]), None


def _q4_1(b: Bytes) -> Read:
    return _bits(b[:, 4:], 4, 16), "u4", _half(b[:, :2]), -_half(b[:, 2:4])


def _fifth(data: Bytes) -> Bytes:
    """Return one bit for each of 32 weights, as the value 16 that it stands for."""
    return np.unpackbits(data, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(b: Bytes) -> Read:
    q = _bits(b[:, 6:], 4, 16) | _fifth(b[:, 2:6])
    return q.astype(np.int8) - np.int8(16), "i8", _half(b[:, :2]), None


def _q5_1(b: Bytes) -> Read:
    return _bits(b[:, 8:], 4, 16) | _fifth(b[:, 4:8]), "u8", _half(b[:, :2]), -_half(b[:, 2:4])


def _q2_k(b: Bytes) -> Read:
    scales, q = b[:, :16], _bits(b[:, 16:80], 2, 32).reshape(-1, 16)
    scale = _half(b[:, 80:82]) * (scales & 15).astype(np.float32)
    return q, "u4", scale, _half(b[:, 82:84]) * (scales >> 4).astype(np.float32)


def _q3_k(b: Bytes) -> Read:
    low, high = _bits(b[:, 32:96], 2, 32), _bits(b[:, :32], 1, 32)
    scales = _bits(b[:, 96:104], 4, 8) | (_bits(b[:, 104:108], 2, 4) << np.uint8(4))
    scale = _half(b[:, 108:110]) * (scales.astype(np.int8) - np.int8(32)).astype(np.float32)
    q = low.astype(np.int8) - ((high ^ np.uint8(1)) << np.uint8(2)).astype(np.int8)
    return q.reshape(-1, 16), "i4", scale, None


def _scales_of_six_bits(b: Bytes) -> tuple[Floats, Floats]:
    """Return the scales and offsets of eight groups, which lie in twelve bytes from the fourth on."""
    first, second, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([first & 63, (both & 15) | ((first >> 2) & 48)], axis=1)
    offset = np.concatenate([second & 63, (both >> 4) | ((second >> 2) & 48)], axis=1)
    return _half(b[:, :2]) * scale.astype(np.float32), _half(b[:, 2:4]) * offset.astype(np.float32)


def _q4_k(b: Bytes) -> Read:
    return _bits(b[:, 16:], 4, 32).reshape(-1, 32), "u4", *_scales_of_six_bits(b)


def _q5_k(b: Bytes) -> Read:
    q = _bits(b[:, 48:], 4, 32) | (_bits(b[:, 16:48], 1, 32) << np.uint8(4))
    return q.reshape(-1, 32), "u8", *_scales_of_six_bits(b)


def _q6_k(b: Bytes) -> Read:
    q = _bits(b[:, :128], 4, 64) | (_bits(b[:, 128:192], 2, 32) << np.uint8(4))
    scale = _half(b[:, 208:210]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return (q.astype(np.int8) - np.int8(32)).reshape(-1, 16), "i8", scale, None


_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _iq4_nl(b: Bytes) -> Read:
    return _IQ4[_bits(b[:, 2:], 4, 16)], "i8", _half(b[:, :2]), None


def _iq4_xs(b: Bytes) -> Read:
    high = np.ascontiguousarray(b[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | ((high & 3) << 4).astype(np.uint8)).astype(np.int8) - np.int8(32)
    return _IQ4[_bits(b[:, 8:], 4, 16)].reshape(-1, 32), "i8", _half(b[:, :2]) * scales.astype(np.float32), None


_READERS: dict[str, Callable[[Bytes], Read]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs,
}  # fmt: skip

FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
"""Types that are not quantized, and their bytes."""

BLOCKS: dict[str, tuple[int, int]] = {
    **{name: (1, size) for name, size in FLOATS.items()},
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18),
    "Q2_K": (_K, 84), "Q3_K": (_K, 110), "Q4_K": (_K, 144), "Q5_K": (_K, 176), "Q6_K": (_K, 210), "IQ4_XS": (_K, 136),
}  # fmt: skip
"""Type -> weights in a block, bytes of a block."""
