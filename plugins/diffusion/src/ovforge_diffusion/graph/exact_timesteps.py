"""Let denoisers and ControlNets take timesteps with fractions, and have their phases exactly on any device.

Converted models take a timestep of an integer type, which optimum-intel writes and other programs expect. The network
computes the sines of its embedding from float32 all the same, so that only the input's type is in the way, and whole
numbers give what they gave before. On a device that computes in fewer bits, it does not: see `phases`.
"""

from __future__ import annotations

import openvino as ov

from ovforge.contracts import Report
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.phases import keep_phases
from ovforge_diffusion.residuals import CONTROLNETS

__all__ = ["ExactTimesteps"]

_TIMESTEP, _DECODER = "timestep", "vae_decoder"
_MOVES = frozenset({"Broadcast", "Reshape", "Squeeze", "Tile", "Unsqueeze"})
"""Operations that hand on what they are given, of whatever type."""


class ExactTimesteps:
    """Changes the type of an input, and marks operations; in float32 it changes no number."""

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change each model that takes a timestep; one that computes with whole numbers keeps its type, and says so."""
        report = Report()
        roles = [role for role in ("unet", "transformer", *CONTROLNETS) if role in bundle.models]
        if bundle.configs.get(_DECODER, {}).get("timestep_conditioning"):  # LTX-Video's denoise, too
            roles.append(_DECODER)
        for role in roles:
            model = bundle.models[role]
            if marked := keep_phases(model):
                report.applied.append(f"{role}: phases of timesteps stay in float32")
            typed = _becomes_float32(model, role, report)
            if marked or typed:
                bundle.models[role] = model
                report.roles += (role,)
        if not report.applied and not report.notes:
            report.notes.append("nothing to do: no timestep is of an integer type, or computed with")
        return report


def _becomes_float32(model: ov.Model, role: str, report: Report) -> bool:
    """Give the timestep the type float32 if it is of whole numbers, and say so."""
    parameter = next((port.get_node() for port in model.inputs if _TIMESTEP in port.names), None)
    if parameter is None or not parameter.get_element_type().is_integral():
        return False
    if not _becomes_real(parameter):
        report.notes.append(f"{role}: takes whole timesteps alone, because it computes with them")
        return False
    parameter.set_element_type(ov.Type.f32)
    model.validate_nodes_and_infer_types()
    report.applied.append(f"{role}: the timestep is float32")
    return True


def _becomes_real(parameter: ov.Node) -> bool:
    """Say whether all that is done with an input is to move it, and to convert it to floating point."""
    left = [parameter]
    while left:
        for port in left.pop().output(0).get_target_inputs():
            node = port.get_node()
            kind = node.get_type_name()
            if kind in _MOVES:
                left.append(node)
            elif kind != "ShapeOf" and not (kind == "Convert" and node.get_element_type().is_real()):
                return False
    return True
