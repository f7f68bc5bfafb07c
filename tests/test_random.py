"""Random streams against torch's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ovforge.errors import InputError
from ovforge.random import BatchGenerator, Generator, fresh_seed

torch = pytest.importorskip("torch")

SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 70)),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(-(2**63), 2**64 - 1), shapes=SHAPES)
def test_stream_equals_torch(seed: int, shapes: list[tuple[int, ...]]) -> None:
    """Every shape, and several draws from one generator, short ones (which keep a number back) among them."""
    ours, theirs = Generator(seed), torch.Generator("cpu").manual_seed(seed)
    for shape in shapes:
        wanted = torch.randn(shape, generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn(shape), wanted, rtol=0, atol=1e-6)


def test_latents_of_a_picture_equal_torch() -> None:
    ours, theirs = Generator(1234567), torch.Generator("cpu").manual_seed(1234567)
    for _ in range(5):
        wanted = torch.randn((2, 4, 64, 96), generator=theirs).numpy()
        np.testing.assert_allclose(ours.randn((2, 4, 64, 96)), wanted, rtol=0, atol=1e-6)


def test_each_sample_of_a_batch_is_what_it_is_alone() -> None:
    batch = BatchGenerator([3, 1, 2]).randn((3, 4, 5, 5))
    for row, seed in zip(batch, (3, 1, 2), strict=True):
        np.testing.assert_array_equal(row, Generator(seed).randn((1, 4, 5, 5))[0])


def test_errors_say_what_would_be_right() -> None:
    with pytest.raises(InputError, match="out of range"):
        Generator(2**64)
    with pytest.raises(InputError, match="2 seeds for a batch of 3"):
        BatchGenerator([1, 2]).randn((3, 4))
    assert 0 <= fresh_seed() < 2**32
