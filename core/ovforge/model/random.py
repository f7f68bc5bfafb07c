"""Random streams equal to torch's on the CPU, without torch: a seed gives the picture that diffusers gives.

Source of the method: PyTorch, aten/src/ATen/native/cpu/DistributionTemplates.h (`normal_fill`, `normal_fill_16`) and
aten/src/ATen/core/DistributionsHelper.h (`normal_distribution`). The 32-bit words are MT19937's, as numpy's RandomState
makes them; what is torch's own is how words become uniform and then normal numbers (Box and Muller 1958).
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import InputError

__all__ = ["BatchGenerator", "Generator", "fresh_seed"]

_BLOCK = 16


def fresh_seed() -> int:
    """Return a seed from the operating system, below 2**32 so that it is easily typed again."""
    return secrets.randbits(32)


class Generator:
    """Draws what `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))` draws, to 1e-6.

    The state goes on from draw to draw as torch's does.
    """

    def __init__(self, seed: int) -> None:
        self.seed = _checked_seed(seed)
        self._words = np.random.RandomState(self.seed & 0xFFFFFFFF)
        self._left: float | None = None

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return standard normal numbers, float32, of `shape`."""
        count = math.prod(shape)
        drawn = self._blocks(count) if count >= _BLOCK else self._one_by_one(count)
        return drawn.reshape(tuple(shape))

    def _blocks(self, count: int) -> NDArray[np.float32]:
        """Sixteen at a time; where they do not come out even, the last sixteen are drawn anew."""
        drawn = self._uniform(count)
        whole = count - count % _BLOCK
        _box_muller(drawn[:whole])
        if whole != count:
            drawn[-_BLOCK:] = self._uniform(_BLOCK)
            _box_muller(drawn[-_BLOCK:])
        return drawn

    def _uniform(self, count: int) -> NDArray[np.float32]:
        words = self._words.randint(0, 2**32, size=count, dtype=np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def _one_by_one(self, count: int) -> NDArray[np.float32]:
        """Fewer than sixteen come in pairs of doubles; the second of a pair waits for the next draw."""
        return np.array([self._one() for _ in range(count)], dtype=np.float32)

    def _one(self) -> float:
        if self._left is not None:
            value, self._left = self._left, None
            return value
        turn, distance = self._uniform_double(), self._uniform_double()
        radius = math.sqrt(-2.0 * math.log1p(-distance))
        self._left = radius * math.sin(2.0 * math.pi * turn)
        return radius * math.cos(2.0 * math.pi * turn)

    def _uniform_double(self) -> float:
        high, low = (int(word) for word in self._words.randint(0, 2**32, size=2, dtype=np.uint32))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


class BatchGenerator:
    """One stream for each sample of a batch, so that each sample is what it would be alone."""

    def __init__(self, seeds: Sequence[int]) -> None:
        if not len(seeds):
            raise InputError("no seed is given", where="seed", hint="Give one seed for each sample.")
        self.generators = [Generator(seed) for seed in seeds]

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return (batch, ...) normal numbers, row i from stream i.

        Raises InputError if the batch is another.
        """
        if not len(shape) or shape[0] != len(self.generators):
            raise InputError(
                f"{len(self.generators)} seeds for a batch of {shape[0] if len(shape) else 'no size'}",
                where="seed",
                hint="Give one seed for each sample.",
            )
        return np.concatenate([generator.randn((1, *shape[1:])) for generator in self.generators])


def _checked_seed(seed: Any) -> int:
    """Return `seed` as an int. A bool or a float is refused, as torch does, and not taken for its number."""
    hint = "Give a whole number from -2**63 to 2**64 - 1."
    try:
        number = operator.index(seed)
    except TypeError:
        raise InputError(f"{seed!r} is not a whole number", where="seed", hint=hint) from None
    if isinstance(seed, bool):
        raise InputError(f"{seed!r} is not a whole number", where="seed", hint=hint)
    if not -(2**63) <= number < 2**64:
        raise InputError(f"{number} is out of range", where="seed", hint=hint)
    return number


def _box_muller(block: NDArray[Any]) -> None:
    """Turn uniform numbers, a multiple of sixteen, into normal ones in place: eight radii, then eight angles."""
    rows = block.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2.0) * np.log(np.float32(1.0) - rows[:, 0]))
    angle = np.float32(2.0 * math.pi) * rows[:, 1]
    rows[:, 0] = radius * np.cos(angle)
    rows[:, 1] = radius * np.sin(angle)
