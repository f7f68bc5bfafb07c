"""Give a UNet the inputs that ControlNets add to (Zhang et al. 2023).

A UNet's way up joins what comes from below with what the way down left, by concatenating channels. A ControlNet adds
to the latter, and to what comes from the middle; the way down itself is not changed by it. So the additions go in front
of each joining, as in diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops

from ovforge.contracts import Report
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_diffusion.controlnets import CONTROLNETS, MIDDLE_RESIDUAL, RESIDUAL, RESIDUALS
from ovforge_diffusion.graph.joints import joints_of

__all__ = ["ControlNetInputs"]


class ControlNetInputs:
    """Changes the UNet of pipelines that have a ControlNet."""

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Add the inputs. Raises ModelError for a UNet of another structure."""
        if not any(role in bundle.models for role in CONTROLNETS):
            return Report(notes=["nothing to do: no ControlNet"])
        bundle.require("unet")
        model = bundle.models["unet"]
        if any(MIDDLE_RESIDUAL in port.names for port in model.inputs):
            return Report(notes=["nothing to do: the UNet has the inputs"])
        joints = joints_of(model)
        if not joints:
            raise ModelError(
                "its structure is not that of a UNet with skip connections, so a ControlNet finds no place to add to",
                where="unet",
                hint="ControlNets are for Stable Diffusion's UNets.",
            )
        for number, joint in enumerate(reversed(joints)):
            _add_input(model, joint.input(1), f"{RESIDUAL}{number}")
        _add_input(model, joints[0].input(0), MIDDLE_RESIDUAL)
        model.validate_nodes_and_infer_types()
        bundle.models["unet"] = model
        # Says to the task that the inputs are there, and their number, without a look at the model.
        bundle.configs["unet"] = {**bundle.configs.get("unet", {}), RESIDUALS: len(joints)}
        return Report(roles=("unet",), applied=[f"unet: {len(joints) + 1} inputs for a ControlNet's residuals"])


def _add_input(model: ov.Model, port: ov.Input, name: str) -> None:
    """Let `port` take the sum of what it takes and a new input."""
    source = port.get_source_output()
    parameter = ops.parameter(source.get_partial_shape(), source.get_element_type(), name=name)
    parameter.output(0).get_tensor().set_names({name})
    model.add_parameters([parameter])
    port.replace_source_output(ops.add(source, parameter).output(0))
