"""Let LTX-Video's transformer be told where each token of a video is, rather than work it out of the video's sides.

Tokens of conditions stand before those of the video, at the seconds of the frames that they are for.
"""

from __future__ import annotations

import math

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovforge.contracts import Report
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.nodes import ancestors, positions

__all__ = ["PLACES", "VideoPlaces"]

PLACES = "video_coords"
"""Input of the places, float32 (3, tokens): seconds, and rows and columns in pixels."""

_SIDES = ("num_frames", "height", "width", "rope_interpolation_scale")
_ROLE, _CLASS = "transformer", "LTXVideoTransformer3DModel"
_BASES = (20, 2048, 2048)
"""Seconds and pixels that are one, in every LTXVideoTransformer3DModel."""
_THETA = 10000.0


class VideoPlaces:
    """Changes what angles of rotary embeddings are computed of; for the same places they stay the same."""

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change the transformer. Raises ModelError if it does not turn tokens by the sides of a video."""
        report = Report()
        if bundle.configs.get(_ROLE, {}).get("_class_name") != _CLASS:
            report.notes.append("nothing to do: it is for the transformer of LTX-Video")
            return report
        model = bundle.models[_ROLE]
        _tell_places(model)
        bundle.models[_ROLE] = model
        report.roles += (_ROLE,)
        report.applied.append(f"{_ROLE}: the places of tokens are an input")
        return report


def _tell_places(model: ov.Model) -> None:
    places = positions(model)
    sides = {port.get_node().get_name() for port in model.inputs if not port.names.isdisjoint(_SIDES)}
    waves = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() in ("Sin", "Cos")
        and any(above.get_name() in sides for above in ancestors(node, places))
    ]
    shapes = [wave.get_output_partial_shape(0) for wave in waves]
    widths = {shape[2].get_length() for shape in shapes if shape.rank == 3 and shape[2].is_static}
    if len(shapes) < 2 or len(widths) != 1 or (width := widths.pop()) % 3:
        raise ModelError(
            "its rotary embeddings are not those of LTX-Video: nothing turns tokens by the sides of a video",
            where=_ROLE,
            hint="Convert the model with ovforge, or with optimum-intel 2.2.",
        )
    told = ops.parameter([3, -1], ov.Type.f32, name=PLACES)
    told.output(0).set_names({PLACES})
    angles = _angles(told, width // 3)
    for wave in waves:
        wave.input(0).replace_source_output(angles.output(0))
    model.add_parameters([told])
    model.validate_nodes_and_infer_types()
    used = {node.get_name() for result in model.get_results() for node in ancestors(result, positions(model))}
    for parameter in [each for each in model.get_parameters() if each.get_name() in sides - used]:
        model.remove_parameter(parameter)


def _angles(told: ov.Node, count: int) -> ov.Node:
    """Return the angles of places, [1, tokens, count * 3], in the order of diffusers: the axes of each frequency."""
    steps = np.linspace(0.0, 1.0, count, dtype=np.float32)
    frequencies = np.float32(_THETA) ** steps * np.float32(math.pi) / np.float32(2)
    parts = ops.divide(told, np.array(_BASES, np.float32)[:, None])
    signed = ops.subtract(ops.multiply(parts, np.float32(2)), np.float32(1))
    columns = ops.unsqueeze(ops.transpose(signed, [1, 0]), [1])
    each = ops.multiply(columns, frequencies.astype(np.float32)[:, None])
    return ops.reshape(each, np.array([1, -1, count * 3]), special_zero=False)
