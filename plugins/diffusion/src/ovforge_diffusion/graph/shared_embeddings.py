"""Let ControlNets without embeddings of their own begin as the transformer does: with a copy, on the same weights.

Those of Stable Diffusion 3.5 large take the tokens that the transformer makes of latents. Those of Z-Image also take
its embedded timestep, and its tokens after the blocks that refine picture and text; some add to the refined picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openvino as ov
from openvino import opset13 as ops

from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.nodes import ancestors, operands, port_named, positions
from ovforge_diffusion.graph.token_stream import Stream, stream_of
from ovforge_diffusion.residuals import REFINED, SCALE

__all__ = ["embed"]

_ROLE = "transformer"
_ADVICE = "Take a ControlNet that was made for this model: one for 3.5 large fits no medium."


def embed(bundle: ModelBundle, net: str, transformer: ov.Model) -> bool:
    """Let a ControlNet take what the transformer takes; say whether it was changed for that.

    Raises ModelError if they do not fit.
    """
    config = bundle.configs.get(net, {})
    shares = config.get("use_pos_embed") is False or config.get("_class_name") == "ZImageControlNetModel"
    model = bundle.models[net] if shares else None
    if model is None or not _waits(model):
        return False
    donor = transformer.clone()
    stream = stream_of(donor)
    assert stream is not None  # it is that of the transformer, which was found
    if config.get("_class_name") == "ZImageControlNetModel":
        _check_places(bundle.configs.get(_ROLE, {}), config)
        values = _of_zimage(model, donor, stream, config)
    else:
        values = {"hidden_states": stream.begin}
    _graft(model, donor, values, net)
    bundle.models[net] = model
    return True


def _waits(model: ov.Model) -> bool:
    """Say whether a ControlNet takes tokens: hidden_states of three axes, or what Z-Image's are called."""
    ranks = {name: port.get_partial_shape().rank for port in model.inputs for name in port.names}
    return "picture_tokens" in ranks or ("hidden_states" in ranks and ranks["hidden_states"] == 3)


def _of_zimage(model: ov.Model, donor: ov.Model, stream: Stream, config: Mapping[str, Any]) -> dict[str, ov.Output]:
    """Return the transformer's values by the ControlNet's inputs. What the ControlNet adds after refiners is added."""
    if not stream.refined:
        raise ModelError("it has no blocks that refine a picture", where=_ROLE, hint="Take a Z-Image.")
    values = {"picture_tokens": stream.refined[0], "tokens": stream.begin, "time": _time(donor)}
    added = {
        name: node for node in model.get_results() for name in node.input_value(0).names if name.startswith(REFINED)
    }
    if added:
        scale = ops.parameter(ov.PartialShape([]), ov.Type.f32, name=SCALE)
        scale.output(0).get_tensor().set_names({SCALE})
        model.add_parameters([scale])
        places = config["control_refiner_layers_places"]
        if max(places) + 1 >= len(stream.refined):
            raise ModelError(
                f"it adds something after refiner {max(places)}, and the transformer has {len(stream.refined) - 1}, "
                "counted from 0", where=_ROLE, hint="Take a ControlNet that was made for this model.",
            )  # fmt: skip
        for number, place in enumerate(places):
            result = added[f"{REFINED}{number}"]
            value = stream.refined[place + 1]
            users = value.get_target_inputs()
            summed = ops.add(value, ops.multiply(result.input_value(0), scale))
            for port in users:
                port.replace_source_output(summed.output(0))
            model.remove_result(result)
    return values


def _time(model: ov.Model) -> ov.Output:
    """Return the embedded timestep: the first value behind the input `timestep` that several layers take."""
    reached = {port_named(model.inputs, "timestep", _ROLE).get_node().get_name()}
    for node in model.get_ordered_ops():
        if any(operand.get_name() in reached for operand in operands(node)):
            reached.add(node.get_name())
            users = [port.get_node().get_type_name() for port in node.output(0).get_target_inputs()]
            if users.count("MatMul") > 2:
                return node.output(0)
    raise ModelError("its embedded timestep cannot be found", where=_ROLE, hint="Convert it again with ovforge.")


def _check_places(transformer: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse a transformer that counts places in another way than the published one, whose way the ControlNet has."""
    head = int(config["dim"]) // int(config["n_heads"])
    known = [head // 4, head * 3 // 8, head * 3 // 8]
    axes, theta = list(transformer.get("axes_dims", known)), float(transformer.get("rope_theta", 256))
    if axes != known or theta != 256:
        raise ModelError(
            f"it turns places by {axes} and {theta:g}, and a ControlNet by {known} and 256",
            where=f"{_ROLE}/config.json", hint="Take the published Z-Image.",
        )  # fmt: skip


def _graft(model: ov.Model, donor: ov.Model, values: Mapping[str, ov.Output], net: str) -> None:
    """Replace inputs of a ControlNet by values of the transformer, and take the inputs that these need."""
    for name, value in values.items():
        port = port_named(model.inputs, name, net)
        if not port.get_partial_shape().compatible(value.get_partial_shape()):
            shapes = port.get_partial_shape(), value.get_partial_shape()
            raise ModelError(
                f"it takes {name} of {shapes[0]}, and the transformer has {shapes[1]}", where=net, hint=_ADVICE
            )
        _replace(model, port.get_node(), value)
    places = positions(donor)
    needed = {node.get_name() for value in values.values() for node in ancestors(value.get_node(), places)}
    taken = [node for node in donor.get_parameters() if node.get_name() in needed]
    own = {name: port.get_node() for port in model.inputs for name in port.names}
    for parameter in taken:
        for name in parameter.output(0).names & own.keys():
            _replace(model, own[name], parameter.output(0))
    model.add_parameters(taken)
    model.validate_nodes_and_infer_types()


def _replace(model: ov.Model, parameter: ov.Node, value: ov.Output) -> None:
    for port in parameter.output(0).get_target_inputs():
        port.replace_source_output(value)
    model.remove_parameter(parameter)
