"""Let denoisers and ControlNets take timesteps with fractions, as schedulers with Karras's noise levels have them.

Converted models take a timestep of an integer type, which optimum-intel writes and other programs expect. The network
computes the sines of its embedding from float32 all the same, so that only the input's type is in the way, and whole
numbers give what they gave before.
"""

from __future__ import annotations

import openvino as ov

from ovforge.contracts import Report
from ovforge.model import ModelBundle
from ovforge_diffusion.controlnets import CONTROLNETS

__all__ = ["FractionalTimesteps"]

_TIMESTEP = "timestep"
_MOVES = frozenset({"Broadcast", "Reshape", "Squeeze", "Tile", "Unsqueeze"})
"""Operations that hand on what they are given, of whatever type."""


class FractionalTimesteps:
    """Changes the type of an input, and no number."""

    def __init__(self, options: None = None) -> None:
        del options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change every denoiser that takes whole numbers; one that computes with them is left alone, with a note."""
        report = Report()
        for role in ("unet", "transformer", *CONTROLNETS):
            if role not in bundle.models:
                continue
            model = bundle.models[role]
            parameter = next((port.get_node() for port in model.inputs if _TIMESTEP in port.names), None)
            if parameter is None or not parameter.get_element_type().is_integral():
                continue
            if not _becomes_real(parameter):
                report.notes.append(f"{role}: stays as it is, because it computes with whole timesteps")
                continue
            parameter.set_element_type(ov.Type.f32)
            model.validate_nodes_and_infer_types()
            bundle.models[role] = model
            report.roles += (role,)
            report.applied.append(f"{role}: the timestep is float32")
        if not report.applied and not report.notes:
            report.notes.append("nothing to do: no timestep of an integer type")
        return report


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
