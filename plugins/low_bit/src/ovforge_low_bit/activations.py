"""What layers are given: a role's model runs on recorded inputs, and sums over its layers' inputs are kept.

Not the inputs: for a layer of `width` inputs the Gram matrix X^T X is (width, width), however many rows X has, and
every error of that layer's output follows from it: |X (W - V)^T|^2 = trace((W - V) X^T X (W - V)^T).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError

if TYPE_CHECKING:
    import openvino as ov

    from ovforge_low_bit.layers import Layer

__all__ = ["observed", "results", "rows", "statistics"]

_TOGETHER = 32
"""Inputs of layers that one compiled copy of the model gives: all of them are in memory at once."""

Port = tuple[str, int]
"""An output in a model: friendly name of the operation, and which of its outputs."""


def observed(
    model: ov.Model, ports: Sequence[Port], records: Sequence[Mapping[str, NDArray[Any]]]
) -> Iterator[list[NDArray[np.float32]]]:
    """Yield, for each recorded input set, what leaves `ports`, in float32. `model` itself is not changed."""
    copy = model.clone()
    by_name = {op.get_friendly_name(): op for op in copy.get_ops()}
    outputs = [by_name[name].output(index) for name, index in ports]
    first = len(copy.outputs)
    copy.add_outputs(outputs)
    yield from results(copy, records, first)


def results(
    model: ov.Model, records: Sequence[Mapping[str, NDArray[Any]]], first: int = 0
) -> Iterator[list[NDArray[np.float32]]]:
    """Yield, for each recorded input set, a model's outputs from number `first` on, computed and given in float32."""
    from ovforge.model import core

    # The accuracy mode keeps activations in float32, where the CPU would otherwise round them to 8 bits for some
    # layers.
    hints = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
    # A request of its own copies its inputs: calling the compiled model would share the records' memory with it.
    request = core().compile_model(model, "CPU", hints).create_infer_request()
    for record in records:
        made = request.infer(dict(record))
        yield [np.asarray(made[index], np.float32) for index in range(first, len(model.outputs))]


def statistics(
    model: ov.Model,
    layers: Sequence[Layer],
    records: Sequence[Mapping[str, NDArray[Any]]],
    kind: Literal["gram", "squares"],
    *,
    limit: int = 0,
    memory: int = 2**30,
) -> Iterator[tuple[list[Layer], NDArray[np.float32]]]:
    """Yield sums over the inputs of `layers`, each with the layers that share it.

    "gram": X^T X, (width, width); "squares": its diagonal alone, (width,). Sums are divided by the number of rows.
    `limit` rows of each input set are used, 0 for all. No more than about `memory` bytes of sums are held at a time,
    but always one. `model` is to stay as it is until all is yielded.
    """
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault(_input_of(layer), []).append(layer)
    for part in _parts(list(groups.values()), kind, memory):
        yield from _sums(model, part, records, kind, limit)


def _input_of(layer: Layer) -> tuple[Any, ...]:
    """Return what tells one layer's rows from another's: where they come from and how they are unfolded."""
    how = tuple(str(value) for value in layer.op.get_attributes().values()) if layer.is_convolution else ()
    transposed = not layer.is_convolution and layer.op.get_attributes()["transpose_a"]
    return (*_port(layer), transposed, how, layer.shape[1:] if layer.is_convolution else ())


def _port(layer: Layer) -> Port:
    source = layer.op.input_value(0)
    return source.get_node().get_friendly_name(), source.get_index()


def _parts(groups: list[list[Layer]], kind: str, memory: int) -> Iterator[list[list[Layer]]]:
    part: list[list[Layer]] = []
    held = 0
    for group in groups:
        size = group[0].width ** (2 if kind == "gram" else 1) * 4
        if part and (held + size > memory or len(part) == _TOGETHER):
            yield part
            part, held = [], 0
        part.append(group)
        held += size
    if part:
        yield part


def _sums(
    model: ov.Model, part: list[list[Layer]], records: Sequence[Mapping[str, Any]], kind: str, limit: int
) -> Iterator[tuple[list[Layer], NDArray[np.float32]]]:
    totals: list[Any] = [0.0] * len(part)
    counts = [0] * len(part)
    rng = np.random.default_rng(0)
    ports = list(dict.fromkeys(_port(group[0]) for group in part))
    for arrays in observed(model, ports, records):
        seen = dict(zip(ports, arrays, strict=True))
        for index, group in enumerate(part):
            x = rows(group[0], seen[_port(group[0])])
            if limit and len(x) > limit:
                x = x[np.sort(rng.choice(len(x), limit, replace=False))]
            totals[index] = totals[index] + (x.T @ x if kind == "gram" else np.square(x).sum(axis=0))
            counts[index] += len(x)
    for index, group in enumerate(part):
        if not counts[index] or not np.isfinite(totals[index]).all():
            raise ModelError(
                "its recorded inputs hold infinities or NaN, or nothing",
                where=group[0].name,
                hint="The model overflows on these inputs: check it without quantization first.",
            )
        yield group, totals[index] / np.float32(counts[index])
        totals[index] = None


def rows(layer: Layer, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a layer's input as rows, (rows, width) float32: its output is rows @ matrix.T, but for its shape.

    A convolution's places are unfolded (im2col), in the order of channels, height, width.
    """
    if not layer.is_convolution:
        x = np.swapaxes(x, -1, -2) if layer.op.get_attributes()["transpose_a"] and x.ndim > 1 else x
        return x.reshape(-1, layer.width)
    attributes = layer.op.get_attributes()
    kernel = layer.shape[2:]
    strides, dilations = (list(attributes[key]) for key in ("strides", "dilations"))
    begin, end = _padding(layer, x.shape[2:], kernel, strides, dilations)
    x = np.pad(x, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, x.ndim))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=axes)
    steps = [slice(None, None, stride) for stride in strides]
    taps = [slice(None, None, dilation) for dilation in dilations]
    windows = windows[(slice(None), slice(None), *steps, *taps)]
    places = (0, *axes, 1, *range(x.ndim, windows.ndim))
    return windows.transpose(places).reshape(-1, layer.width)


def _padding(
    layer: Layer, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return zeros before and after each axis; OpenVINO's automatic ones are those of ONNX and TensorFlow."""
    attributes = layer.op.get_attributes()
    automatic = str(attributes["auto_pad"]).lower()
    if automatic == "valid":
        return [0] * len(sizes), [0] * len(sizes)
    if not automatic.startswith("same"):
        return list(attributes["pads_begin"]), list(attributes["pads_end"])
    whole = [
        max((-(-size // stride) - 1) * stride + (tap - 1) * dilation + 1 - size, 0)
        for size, tap, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    small, large = [pad // 2 for pad in whole], [pad - pad // 2 for pad in whole]
    return (small, large) if automatic == "same_upper" else (large, small)
