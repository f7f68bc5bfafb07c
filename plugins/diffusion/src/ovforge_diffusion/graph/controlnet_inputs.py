"""Give a denoiser the inputs that ControlNets add to (Zhang et al. 2023).

A UNet's way up joins what comes from below with what the way down left, by concatenating channels. A ControlNet adds
to the latter, and to what comes from the middle; the way down itself is not changed by it. So the additions go in front
of each joining, as in diffusers' UNet2DConditionModel. A transformer's ControlNet adds to the picture's tokens after
blocks. Both are found by structure.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

from ovforge.contracts import Report
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.joints import joints_of
from ovforge_diffusion.graph.nodes import port_named
from ovforge_diffusion.graph.shared_embeddings import embed
from ovforge_diffusion.graph.token_stream import stream_of
from ovforge_diffusion.residuals import (
    BLOCK,
    CONTROLNETS,
    MIDDLE_RESIDUAL,
    RESIDUAL,
    RESIDUALS,
    SINGLE,
    block_residuals,
    blocks_of,
    check_class,
)

__all__ = ["ControlNetInputs"]

_DENOISERS = ("unet", "transformer")
_TEXT = "encoder_hidden_states"


class ControlNetInputs:
    """Changes the denoiser of pipelines that have a ControlNet."""

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Add the inputs. Raises ModelError for a denoiser of another structure, or another family's ControlNet."""
        nets = [role for role in CONTROLNETS if role in bundle.models]
        if not nets:
            return Report(notes=["nothing to do: no ControlNet"])
        role = next((role for role in _DENOISERS if role in bundle.models), "unet")
        bundle.require(role)
        config = bundle.configs.get(role, {})
        for net in nets:
            check_class(net, bundle.configs.get(net, {}), role, config)
        model = bundle.models[role]
        if any(name == MIDDLE_RESIDUAL or name.startswith(BLOCK) for port in model.inputs for name in port.names):
            return Report(notes=[f"nothing to do: the {'UNet' if role == 'unet' else role} has the inputs"])
        changed: list[str] = []
        if role == "unet":
            count = _change_unet(model)
        else:
            count, changed = _change_transformer(bundle, model, nets)
        model.validate_nodes_and_infer_types()
        bundle.models[role] = model
        # Says to the task that the inputs are there, and their number, without a look at the model.
        bundle.configs[role] = {**config, RESIDUALS: count}
        inputs = count + (role == "unet")
        applied = [f"{role}: {inputs} inputs for a ControlNet's residuals"]
        applied += [f"{net}: begins as the transformer does, on its weights" for net in changed]
        return Report(roles=(role, *changed), applied=applied)


def _change_unet(model: ov.Model) -> int:
    """Add the inputs to a UNet; return how many joinings have one."""
    joints = joints_of(model)
    if not joints:
        raise ModelError(
            "its structure is not that of a UNet with skip connections, so a ControlNet finds no place to add to",
            where="unet",
            hint="ControlNets are for Stable Diffusion's UNets.",
        )
    for number, joint in enumerate(reversed(joints)):
        port = joint.input(1)
        port.replace_source_output(_added(model, port.get_source_output(), f"{RESIDUAL}{number}"))
    port = joints[0].input(0)
    port.replace_source_output(_added(model, port.get_source_output(), MIDDLE_RESIDUAL))
    return len(joints)


def _change_transformer(bundle: ModelBundle, model: ov.Model, nets: list[str]) -> tuple[int, list[str]]:
    """Add the inputs to a transformer; return how many blocks have one, and the ControlNets that were changed, too."""
    config = bundle.configs.get("transformer", {})
    stream = stream_of(model)
    blocks = blocks_of(config)
    if stream is None or len(stream.blocks) != blocks:
        raise ModelError(
            f"its {blocks} blocks cannot be told apart, so a ControlNet finds no place to add to",
            where="transformer",
            hint="Convert the diffusers folder with ovforge or optimum-intel.",
        )
    # Before anything is added: what the transformer makes of latents at first.
    changed = [net for net in nets if embed(bundle, net, model)]
    taken: dict[int, str] = {}
    for net in nets:
        found = block_residuals(bundle.configs[net], config)
        if max(found, default=0) >= blocks:
            raise ModelError(
                f"it adds something after block {max(found)}, and the transformer has {blocks}, counted from 0",
                where=net,
                hint="Take a ControlNet that was made for this model.",
            )
        taken |= found
    for number, output in sorted(taken.items()):
        value = stream.blocks[number]
        users = value.get_target_inputs()
        summed = _added(model, value, f"{BLOCK}{number}", joined=output.startswith(SINGLE))
        for port in users:
            port.replace_source_output(summed)
    return len(taken), changed


def _added(model: ov.Model, value: ov.Output, name: str, *, joined: bool = False) -> ov.Output:
    """Return the sum of a value and a new input. Where streams are `joined`, the text's tokens come first."""
    shape = value.get_partial_shape()
    parameter = ops.parameter(shape, value.get_element_type(), name=name)
    parameter.output(0).get_tensor().set_names({name})
    model.add_parameters([parameter])
    added: ov.Node = parameter
    if joined:
        text = port_named(model.inputs, _TEXT, "transformer")
        words = ops.gather(ops.shape_of(text), ops.constant([1]), ops.constant(0))
        none = ops.constant([0])
        before = ops.concat([none, words, none], axis=0)
        added = ops.pad(
            parameter, before, ops.constant([0, 0, 0]), "constant", ops.constant(0, value.get_element_type())
        )
    return ops.add(value, added).output(0)
