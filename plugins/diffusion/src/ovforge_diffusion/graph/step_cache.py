"""Cut a UNet in two, so that most steps run its outer part alone: DeepCache (Ma et al. 2023).

The cut lies where the way up joins what the way down left, by structure: the last `depth` joinings, and all that they
take from the way down, are the outer part. What comes from below is what stays the same for some steps.
"""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops
from pydantic import BaseModel, ConfigDict, Field

from ovforge.contracts import Report, Skipped
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.joints import joints_of
from ovforge_diffusion.graph.nodes import ancestors, positions
from ovforge_diffusion.shallow import CACHED, SHALLOW

__all__ = ["StepCache", "StepCacheOptions"]


_ENLARGE = ("Interpolate", "ConvolutionBackpropData")


class StepCacheOptions(BaseModel):
    """How often the whole UNet runs, and how much of it otherwise."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    interval: int = Field(3, ge=2, le=100, description="Every so many steps the whole UNet runs, the first always.")
    depth: int = Field(
        1,
        ge=1,
        le=8,
        description="Layers of the outermost level, from the last, that each step runs. More is closer.",
    )


class StepCache:
    """Gives the UNet an output for what its inner part makes, and adds its outer part as a model."""

    def __init__(self, options: StepCacheOptions) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Cut the UNet. What cannot be cut is skipped, with the reason."""
        options = self.options
        if "unet" not in bundle.models:
            return Report(skipped=[Skipped("unet", "the pipeline has no UNet, whose skip connections it cuts")])
        model = bundle.models["unet"]
        if model.get_variables() or any("unet" in places for places in bundle.adapters.values()):
            reason = 'it has adapters that are switched while running; fuse them: mode = "fuse"'
            return Report(skipped=[Skipped("unet", reason)])
        joints = joints_of(model)
        if not joints:
            return Report(skipped=[Skipped("unet", "its structure is not that of a UNet with skip connections")])
        if options.depth > (most := _outermost(model, joints)):
            reason = f"depth = {options.depth}, and its outermost level has {most} layers"
            return Report(skipped=[Skipped("unet", reason)])
        outer = _outer_part(model, options.depth)
        cached = joints[-options.depth].input_value(0)
        channels = cached.get_partial_shape()[1]
        cached.get_tensor().add_names({CACHED})
        model.add_results([ops.result(cached)])
        model.validate_nodes_and_infer_types()
        # A clone orders operations by all results: as it is, copies of it would seem to be other models.
        bundle.put("unet", model.clone())
        inputs = sorted({name for port in outer.inputs for name in port.names} - {CACHED})
        facts = {"interval": options.interval, "channels": channels.get_length(), "inputs": inputs}
        bundle.put(SHALLOW, outer, config=facts)
        share = _weights(outer) / _weights(model)
        return Report(
            roles=("unet", SHALLOW),
            applied=[
                f"unet: whole every {options.interval} steps, else its outermost {options.depth} of {len(joints)} "
                f"layers of the way up ({share:.0%} of the weights)"
            ],
        )


def _outermost(model: ov.Model, joints: list[ov.Node]) -> int:
    """Return how many of the last joinings lie at the size of the output, after the last enlargement."""
    places = positions(model)
    last = max((places[op.get_name()] for op in model.get_ops() if op.get_type_name() in _ENLARGE), default=-1)
    return sum(places[joint.get_name()] > last for joint in joints)


def _outer_part(model: ov.Model, depth: int) -> ov.Model:
    """Return the outer part, whose constants are the model's own: a clone shares them."""
    outer = model.clone()
    joint = joints_of(outer)[-depth]
    source = joint.input_value(0)
    parameter = ops.parameter(source.get_partial_shape(), source.get_element_type(), name=CACHED)
    parameter.output(0).get_tensor().set_names({CACHED})
    joint.input(0).replace_source_output(parameter.output(0))
    outer.add_parameters([parameter])
    places = positions(outer)
    results = outer.get_results()[:1]
    used = {node.get_name() for node in ancestors(results[0], places)}
    kept = [node for node in outer.get_parameters() if node.get_name() in used]
    return ov.Model(results, kept, SHALLOW)


def _weights(model: ov.Model) -> int:
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
