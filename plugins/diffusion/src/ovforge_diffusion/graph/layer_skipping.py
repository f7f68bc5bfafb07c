"""Give the transformer of Stable Diffusion 3 an input that says which layers a row of the batch leaves out.

Skip-layer guidance compares a prediction with one in which some layers were left out. Both streams of a layer, picture
and text, then keep what went into it: the gates of what the layer adds are zero for such rows, and multiplied by one
for all others. Nothing of a picture's size is computed beside what the transformer computes anyway.
"""

from __future__ import annotations

from itertools import islice, pairwise

import openvino as ov
from openvino import opset13 as ops

from ovforge.contracts import Report
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.nodes import operands, port_named

__all__ = ["LAYERS", "SKIPPED_LAYERS", "LayerSkipping"]

SKIPPED_LAYERS = "skipped_layers"
"""The transformer's input: boolean (rows, layers), true if the row leaves the layer out."""

LAYERS = "ovforge_layers"
"""Key of the transformer's config.json for the number of layers, where the input was made."""

_ROLE = "transformer"


class LayerSkipping:
    """Changes transformers of the class SD3Transformer2DModel."""

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Add the input. A transformer of another structure stays as it is, with a note."""
        config = bundle.configs.get(_ROLE, {})
        if _ROLE not in bundle.models or config.get("_class_name") != "SD3Transformer2DModel":
            return Report(notes=["nothing to do: no transformer of Stable Diffusion 3"])
        model = bundle.models[_ROLE]
        if any(SKIPPED_LAYERS in port.names for port in model.inputs):
            return Report(notes=["nothing to do: the transformer has the input"])
        layers, dual = int(config.get("num_layers", 18)), set(config.get("dual_attention_layers") or ())
        if not 0 < layers <= len(model.get_ops()):
            return Report(notes=[f"{_ROLE}: stays as it is, because its config.json says num_layers = {layers}"])
        # Each layer adds to the picture twice, and once more if it has an attention of the picture alone; it adds to
        # the text twice, but the last layer only reads it.
        picture = _gates(model, "hidden_states", [2 + (number in dual) for number in range(layers)])
        text = _gates(model, "encoder_hidden_states", [2] * (layers - 1))
        if picture is None or text is None:
            return Report(notes=[f"{_ROLE}: stays as it is, because its layers cannot be told apart"])
        parameter = ops.parameter(ov.PartialShape([-1, layers]), ov.Type.boolean, name=SKIPPED_LAYERS)
        parameter.output(0).get_tensor().set_names({SKIPPED_LAYERS})
        kept = ops.convert(ops.logical_not(parameter), picture[0][0].get_element_type())
        for stream in (picture, text):
            for number, gates in enumerate(stream):
                column = ops.unsqueeze(ops.gather(kept, ops.constant(number), ops.constant(1)), ops.constant([1, 2]))
                for gate in gates:
                    gate.replace_source_output(ops.multiply(gate.get_source_output(), column).output(0))
        model.add_parameters([parameter])
        model.validate_nodes_and_infer_types()
        bundle.models[_ROLE] = model
        bundle.configs[_ROLE] = {**config, LAYERS: layers}
        return Report(roles=(_ROLE,), applied=[f"{_ROLE}: {layers} layers can be left out by rows"])


def _gates(model: ov.Model, name: str, counts: list[int]) -> list[list[ov.Input]] | None:
    """Return the gates of each layer in the stream that begins at an input: factors of what the layer adds to it.

    A stream is a row of sums, each taking the one before it as it is; layers add to it as often as `counts` say. None
    if there is no such row.
    """
    reached = {port_named(model.inputs, name, _ROLE).get_node().get_name()}
    for node in model.get_ordered_ops():
        if not any(operand.get_name() in reached for operand in operands(node)):
            continue
        reached.add(node.get_name())
        sums = _sums(node) if node.get_type_name() == "Add" else []
        if len(sums) == sum(counts) + 1:
            gates = [_gate(before, after) for before, after in pairwise(sums)]
            found = iter([gate for gate in gates if gate is not None])
            return None if None in gates else [list(islice(found, count)) for count in counts]
    return None


def _gate(before: ov.Node, after: ov.Node) -> ov.Input | None:
    """Return what multiplies all tokens alike in what a sum adds to the one before it."""
    for added in operands(after):
        if added.get_name() != before.get_name() and added.get_type_name() == "Multiply":
            for port in added.inputs():
                shape = port.get_partial_shape()
                if shape.rank.is_static and len(shape) == 3 and shape[1] == 1:
                    return port
    return None


def _sums(first: ov.Node) -> list[ov.Node]:
    """Return a sum, the sum that takes it as it is, and so on."""
    sums = [first]
    while True:
        users = [port.get_node() for port in sums[-1].output(0).get_target_inputs()]
        following = [node for node in users if node.get_type_name() == "Add"]
        if len(following) != 1:
            return sums
        sums.append(following[0])
