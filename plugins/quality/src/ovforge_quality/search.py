"""Which layers must keep their precision: sensitivity by layer, then bisection over how many."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["fewest", "noise_of_layers"]


def fewest(count: int, passes: Callable[[int], bool]) -> int | None:
    """Return the least n in 1...count - 1 for which `passes`, by bisection; None if count - 1 does not pass.

    Takes for granted that more of what passes passes, too; what is returned was tried in any case.
    """
    if count < 2 or not passes(count - 1):
        return None
    fails, good = 0, count - 1
    while good - fails > 1:
        middle = (fails + good) // 2
        if passes(middle):
            good = middle
        else:
            fails = middle
    return good


def noise_of_layers(
    original: ov.Model, lowered: ov.Model, names: Sequence[str], records: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """Return layer -> noise that its lower precision adds, as a ratio of powers: of noise to signal, 10^(-SQNR/10).

    Both models run as one, in which each layer of the second takes what that layer of the first takes, so that noise
    of layers before it does not count. It returns two sums a layer: no more than one layer's output is held.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    from ovforge.model import core

    ours, theirs = original.clone(), lowered.clone()
    if ours.get_sinks() or theirs.get_sinks():
        raise ModelError("a model with state cannot be searched", hint='Set on_fail = "error" or "warn".')
    known = [{op.get_friendly_name(): op for op in model.get_ops()} for model in (ours, theirs)]
    fixed = _constants(ours)
    layers = {name: layer for name in names if (layer := _layer(name, known, fixed)) is not None}
    for port in theirs.inputs:
        _feed(port.get_node().output(0), ours.input(port.any_name).get_node().output(0))
    for name, number in {source for layer in layers.values() for source in _fed_by(known[0][layer], fixed)}:
        if name in known[1]:
            _feed(known[1][name].output(number), known[0][name].output(number))
    order = sorted(set(layers.values()))
    sums = []
    for name in order:
        signal, seen = (ops.reshape(ops.convert(side[name].output(0), "f32"), [-1], False) for side in known)
        noise = ops.subtract(seen, signal)
        sums += [ops.reduce_sum(ops.multiply(part, part), [0]) for part in (noise, signal)]
    if not sums:
        return {}
    both = ov.Model([ops.result(one) for one in sums], ours.get_parameters(), "noise")
    compiled = core().compile_model(both, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    total = np.zeros(len(sums))
    for record in records:
        results = compiled(dict(record))
        total += [float(results[number]) for number in range(len(sums))]
    ratio = {name: _ratio(*total[2 * number : 2 * number + 2]) for number, name in enumerate(order)}
    return {name: ratio[layer] for name, layer in layers.items()}


def _feed(port: Any, source: Any) -> None:
    """Give all that takes `port` what `source` holds."""
    for target in port.get_target_inputs():
        target.replace_source_output(source)


def _ratio(noise: float, signal: float) -> float:
    if not math.isfinite(noise):
        return math.inf
    return noise / signal if signal else float(noise > 0)


def _layer(name: str, known: Sequence[Mapping[str, Any]], fixed: Collection[str]) -> str | None:
    """Return the operation whose output tells of `name`: itself, or for a weight the one that uses it."""
    op = known[0].get(name)
    while op is not None and op.get_friendly_name() in fixed:
        users = [target.get_node() for target in op.output(0).get_target_inputs()]
        op = users[0] if users else None
    found = op.get_friendly_name() if op is not None else None
    return found if found in known[1] else None


def _constants(model: ov.Model) -> set[str]:
    """Return the operations that depend on no input: weights, and what is computed of them."""
    fixed: set[str] = set()
    for op in model.get_ordered_ops():
        sources = [op.input_value(n).get_node().get_friendly_name() for n in range(op.get_input_size())]
        if op.get_type_name() == "Constant" or (sources and fixed.issuperset(sources)):
            fixed.add(op.get_friendly_name())
    return fixed


def _fed_by(op: Any, fixed: Collection[str]) -> list[tuple[str, int]]:
    """Return (name, output) of the operations whose values a layer takes, weights and parameters apart."""
    sources = [op.input_value(n) for n in range(op.get_input_size())]
    return [
        (source.get_node().get_friendly_name(), source.get_index())
        for source in sources
        if source.get_node().get_type_name() != "Parameter" and source.get_node().get_friendly_name() not in fixed
    ]
