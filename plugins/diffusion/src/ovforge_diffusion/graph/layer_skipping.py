"""Give the transformer of Stable Diffusion 3 an input that says which layers a row of the batch leaves out.

Skip-layer guidance compares a prediction with one in which some layers were left out. Both streams of a layer, picture
and text, then keep what went into it. Nothing is computed in another way for rows that leave nothing out.
"""

from __future__ import annotations

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
        # Each layer adds to the picture twice, and once more if it has an attention of the picture alone; it adds to
        # the text twice, but the last layer only reads it.
        picture = _stream(model, "hidden_states", [2 + (number in dual) for number in range(layers)])
        text = _stream(model, "encoder_hidden_states", [2] * (layers - 1))
        if picture is None or text is None:
            return Report(notes=[f"{_ROLE}: stays as it is, because its layers cannot be told apart"])
        parameter = ops.parameter(ov.PartialShape([-1, layers]), ov.Type.boolean, name=SKIPPED_LAYERS)
        parameter.output(0).get_tensor().set_names({SKIPPED_LAYERS})
        for stream in (picture, text):
            before = stream[0].output(0)
            for number, node in enumerate(stream[1:]):
                before = _choose(parameter, number, before, node)
        model.add_parameters([parameter])
        model.validate_nodes_and_infer_types()
        bundle.models[_ROLE] = model
        bundle.configs[_ROLE] = {**config, LAYERS: layers}
        return Report(roles=(_ROLE,), applied=[f"{_ROLE}: {layers} layers can be left out by rows"])


def _choose(parameter: ov.Node, number: int, before: ov.Output, node: ov.Node) -> ov.Output:
    """Let what follows a layer take what went into it, for the rows that leave it out."""
    users = node.output(0).get_target_inputs()
    column = ops.gather(parameter, ops.constant(number), ops.constant(1))
    skipped = ops.unsqueeze(column, ops.constant([1, 2]))
    chosen = ops.select(skipped, before, node.output(0))
    for port in users:
        port.replace_source_output(chosen.output(0))
    return chosen.output(0)


def _stream(model: ov.Model, name: str, counts: list[int]) -> list[ov.Node] | None:
    """Return what goes into the first layer, and what each layer gives, of the stream that begins at an input.

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
            return [sums[sum(counts[:number])] for number in range(len(counts) + 1)]
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
