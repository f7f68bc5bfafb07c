"""Each method against its paper's formula, written out the slow way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ovforge_low_bit.integers import divided, group_of, limits, nearest, ranges
from ovforge_low_bit.low_rank import factors
from ovforge_low_bit.power import learned, minimum, nearest_powers
from ovforge_low_bit.pruning import scores, smallest, two_of_four
from ovforge_low_bit.rounding import gradients, signed_descent

Array = NDArray[Any]


def problem(seed: int, outputs: int = 6, width: int = 32, rows: int = 40) -> tuple[Array, Array, Array]:
    """Return weights, correlated inputs, and their Gram matrix."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(4, (outputs, width)).astype("f4") * 0.1
    inputs = (rng.normal(size=(rows, width)) @ rng.normal(size=(width, width))).astype("f4")
    return weights, inputs, (inputs.T @ inputs / rows).astype("f4")


def output_error(weights: Array, other: Array, inputs: Array) -> float:
    return float(np.square(inputs @ (weights - other).T).sum())


# -- rounding to the nearest ------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.booleans(), st.sampled_from([-1, 8, 16]))
def test_rounding_is_off_by_half_a_step_at_most(seed: int, bits: int, symmetric: bool, group: int) -> None:
    weights = problem(seed)[0] * 10.0 ** (seed % 7 - 3)
    integers = nearest(weights, bits, symmetric, group)
    low, high = limits(bits, symmetric)
    assert integers.codes.min() >= low and integers.codes.max() <= high
    step = np.abs(integers.scale.astype("f4"))
    off = np.abs(divided(integers.matrix(), group) - divided(weights, group))
    # The end of a symmetric range that has the lesser weights is a step short. Scales are rounded to float16, by 2^-11,
    # so that a range is as much longer or shorter.
    clipped = integers.codes == (high if symmetric else -1)
    assert (off <= (np.where(clipped, 1.0, 0.5) * 1.001 + 2.0 ** (bits - 11)) * step).all()


def test_rounding_is_nncfs() -> None:
    """The symmetric grid equals nncf's, weight for weight."""
    nncf = pytest.importorskip("nncf")
    import openvino as ov
    from openvino import opset13 as ops

    weights = problem(1, 48, 64)[0]
    x = ops.parameter([-1, 64], np.float32)
    model = ov.Model([ops.matmul(x, ops.constant(weights), False, True)], [x])
    mode = nncf.CompressWeightsMode.INT4_SYM
    compressed = nncf.compress_weights(model, mode=mode, group_size=16, all_layers=True)
    packed = next(op for op in compressed.get_ops() if op.get_output_element_type(0).get_type_name() == "i4")
    bytes_ = np.asarray(packed.data).reshape(-1).view(np.uint8)
    theirs = np.stack([bytes_ & 15, bytes_ >> 4], 1).reshape(48, 4, 16).astype(np.int8)
    theirs[theirs > 7] -= 16
    # nncf divides by the scale before it is rounded to float16: a weight on the edge may fall to the other side.
    assert np.abs(theirs - nearest(weights, 4, True, 16).codes).max() <= 1
    assert (theirs == nearest(weights, 4, True, 16).codes).mean() > 0.995


@given(st.integers(1, 5000), st.integers(1, 512))
def test_groups_divide_rows(width: int, wanted: int) -> None:
    size = group_of(width, wanted)
    assert width % size == 0
    assert size <= wanted or size == width


# -- AutoRound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_gradients_are_those_of_the_formula(symmetric: bool, bits: int) -> None:
    """The paper's equations in torch, with straight-through rounding, on the outputs themselves and not on Gram."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    weights, inputs, _ = problem(2)
    gram = (inputs.T @ inputs).astype("f4")
    rng = np.random.default_rng(3)
    grouped = divided(weights, 16)
    shift = rng.uniform(-0.5, 0.5, grouped.shape).astype("f4")
    alpha, beta = (rng.uniform(0.6, 1, (6, 2, 1)).astype("f4") for _ in range(2))
    if symmetric:
        beta = alpha

    def through(real: Any, rounded: Any) -> Any:
        return real + (rounded - real).detach()

    v, a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (shift, alpha, beta))
    w, x = torch.tensor(grouped, dtype=torch.float64), torch.tensor(inputs, dtype=torch.float64)
    least, greatest = w.amin(-1, True).clamp(max=0), w.amax(-1, True).clamp(min=0)
    if symmetric:
        largest = torch.where(-least >= greatest, least, greatest)
        s = -largest * a / 2 ** (bits - 1)
        z, low, high = torch.zeros_like(s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    else:
        s = (greatest * a - least * b) / (2**bits - 1)
        low, high = 0, 2**bits - 1
    s = through(s, s.half().double())
    if not symmetric:
        z = -least * b / s
        z = through(z, z.round())
    raw = w / s + z + v
    q = through(raw, raw.round()).clamp(low, high)
    loss = torch.square(x @ (s * (q - z) - w).reshape(6, -1).T).sum(0)
    loss.sum().backward()

    errors, slopes = gradients(grouped, ranges(grouped), gram, shift, alpha, beta, bits, symmetric)
    np.testing.assert_allclose(errors, loss.detach().numpy(), rtol=1e-3)
    wanted = [v.grad.numpy(), a.grad.numpy(), *([] if symmetric else [b.grad.numpy()])]
    for ours, theirs in zip(slopes, wanted, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_is_never_worse_and_mostly_much_better(bits: int, symmetric: bool) -> None:
    weights, inputs, gram = problem(4)
    plain = nearest(weights, bits, symmetric, 16)
    ours = signed_descent(weights, gram, bits, symmetric, 16, iterations=200)
    for row in range(len(weights)):  # each row has the best of its own
        mine = output_error(weights[row : row + 1], ours.matrix()[row : row + 1], inputs)
        assert mine <= output_error(weights[row : row + 1], plain.matrix()[row : row + 1], inputs) * 1.001
    before, after = (output_error(weights, integers.matrix(), inputs) for integers in (plain, ours))
    assert after < 0.75 * before


def test_without_its_range_descent_changes_codes_by_one_at_most() -> None:
    """V moves a weight by half a step, so that it is rounded up or down: what the paper is about."""
    weights, _, gram = problem(5)
    plain = nearest(weights, 4, False, 16)
    ours = signed_descent(weights, gram, 4, False, 16, 100, tune_range=False)
    assert np.array_equal(plain.scale, ours.scale)
    moved = np.abs(ours.codes.astype(int) - plain.codes.astype(int))
    assert moved.max() == 1


# -- LoRC -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 24))
def test_factors_are_the_truncated_svd(seed: int, outputs: int, width: int, rank: int) -> None:
    error = np.random.default_rng(seed).normal(size=(outputs, width)).astype("f4")
    up, down = factors(error, rank)
    s = np.linalg.svd(error.astype("f8"), compute_uv=False)
    kept = min(rank, outputs, width)
    assert up.shape == (outputs, kept) and down.shape == (kept, width)
    left = np.linalg.norm(error - up @ down)
    assert left == pytest.approx(float(np.sqrt(np.square(s[kept:]).sum())), abs=1e-4 * float(s[0]))
    # Both factors carry the root of the singular values.
    np.testing.assert_allclose(np.linalg.norm(up, axis=0), np.sqrt(s[:kept]), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(np.linalg.norm(down, axis=1), np.sqrt(s[:kept]), rtol=1e-2, atol=1e-2)


# -- PowerQuant -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("exponent", [0.3, 0.5, 0.77, 1.0])
def test_powers_are_the_formula(bits: int, exponent: float) -> None:
    weights = problem(6)[0]
    powers = nearest_powers(weights, exponent, bits, 16)
    top = 2 ** (bits - 1) - 1
    for (row, column), weight in np.ndenumerate(weights):
        size = float(powers.scale[row, column // 16, 0])
        exact = top * np.sign(weight) * min(abs(weight) / size, 1) ** exponent
        code = powers.codes[row, column // 16, column % 16]
        assert abs(code - exact) <= 0.5 + 1e-4
        assert size == pytest.approx(np.abs(weights[row, column // 16 * 16 :][:16]).max(), rel=1e-3)
        wanted = size * np.sign(code) * (abs(code) / top) ** (1 / exponent)
        assert powers.matrix()[row, column] == pytest.approx(wanted, abs=size * 1e-3)


def test_the_exponent_is_the_least_of_a_fine_search() -> None:
    weights = problem(7, 64, 128)[0]

    def error(exponent: float) -> float:
        return float(np.linalg.norm(weights - nearest_powers(weights, exponent, 4, -1).matrix()))

    found = minimum(error)
    everywhere = min(error(float(exponent)) for exponent in np.linspace(0.2, 1, 801))
    assert error(found) <= everywhere * 1.01
    assert found < 0.9  # weights of heavy tails gain from it
    assert error(found) < 0.9 * error(1.0)


def test_learned_rounding_of_powers_is_better() -> None:
    weights, inputs, gram = problem(8)
    plain = nearest_powers(weights, 0.7, 4, 16)
    ours = learned(weights, gram, 0.7, 4, 16, 150)
    assert output_error(weights, ours.matrix(), inputs) < 0.6 * output_error(weights, plain.matrix(), inputs)
    assert np.abs(ours.codes - plain.codes).max() <= 1


# -- Wanda ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_pruned_are_the_least_of_each_row(seed: int, share: float) -> None:
    weights, inputs, _ = problem(seed, 4, 16)
    score = scores(weights, np.square(inputs).sum(axis=0))
    pruned = smallest(score, share)
    for row in range(4):
        direct = [abs(float(weights[row, j])) * float(np.linalg.norm(inputs[:, j])) for j in range(16)]
        wanted = sorted(range(16), key=lambda j, direct=direct: direct[j])[: int(16 * share)]  # type: ignore[misc]
        assert set(np.flatnonzero(pruned[row])) == set(wanted)


def test_two_of_four_are_pruned() -> None:
    weights, inputs, _ = problem(9, 8, 64)
    score = scores(weights, np.square(inputs).sum(axis=0))
    pruned = two_of_four(score)
    for row in range(8):
        for start in range(0, 64, 4):
            four = score[row, start : start + 4]
            assert pruned[row, start : start + 4].sum() == 2
            assert four[pruned[row, start : start + 4]].max() <= four[~pruned[row, start : start + 4]].min()


def test_it_is_better_than_by_weights_alone() -> None:
    """What the paper is about: inputs of different sizes."""
    rng = np.random.default_rng(10)
    weights = rng.normal(size=(32, 64)).astype("f4")
    inputs = (rng.normal(size=(200, 64)) * 10 ** rng.uniform(-1, 1, 64)).astype("f4")
    by_both = np.where(smallest(scores(weights, np.square(inputs).sum(axis=0)), 0.5), 0, weights)
    by_weights = np.where(smallest(np.abs(weights), 0.5), 0, weights)
    assert output_error(weights, by_both, inputs) < 0.6 * output_error(weights, by_weights, inputs)


def test_a_group_of_zeros_stays_zero() -> None:
    weights = problem(11)[0]
    weights[0, :16] = 0
    for integers in (
        nearest(weights, 4, False, 16),
        nearest(weights, 4, True, 16),
        nearest_powers(weights, 0.5, 4, 16),
    ):
        assert not integers.matrix()[0, :16].any()
    least, greatest = ranges(divided(weights, 16))
    assert (least <= 0).all() and (greatest >= 0).all()
