"""Cut a denoiser in two, so that most steps run its outer part alone.

A UNet is cut where its way up joins what its way down left (DeepCache, Ma et al. 2023): the last `depth` joinings, and
all that they take from the way down, are the outer part, and what comes from below stays the same for some steps. A
transformer is cut after its first `depth` blocks (first-block cache): what the others add to the stream of tokens stays
the same, or is predicted (TaylorSeer, Liu et al. 2025). Both are found by structure.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
from openvino import opset13 as ops
from pydantic import BaseModel, ConfigDict, Field

from ovforge.contracts import Report, Skipped
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.joints import joints_of
from ovforge_diffusion.graph.nodes import ancestors, positions
from ovforge_diffusion.graph.token_stream import Stream, stream_of
from ovforge_diffusion.shallow import CACHED, FIRST, shallow_role

__all__ = ["StepCache", "StepCacheOptions"]


_ENLARGE = ("Interpolate", "ConvolutionBackpropData")
_INTERVAL = 3


class StepCacheOptions(BaseModel):
    """Which steps run the whole denoiser, how much of it the others run, and how they predict the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    interval: int | None = Field(
        None,
        ge=1,
        le=100,
        description="Every so many steps the whole denoiser runs, the first always. By default 3; with threshold, only "
        "when that says so.",
    )
    depth: int = Field(
        1,
        ge=1,
        le=64,
        description="What each step runs: of a UNet the layers of the outermost level, from the last; of a transformer "
        "the blocks, from the first. More is closer.",
    )
    order: int = Field(
        0,
        ge=0,
        le=2,
        description="How the rest is predicted from the last steps in full: 0 takes it as it was, 1 goes on in a "
        "straight line, 2 in a parabola.",
    )
    warmup: int = Field(1, ge=1, le=100, description="So many steps at the beginning run the whole denoiser.")
    threshold: float | None = Field(
        None,
        ge=0,
        le=10,
        description="Transformers: the whole runs if what the first block adds changed by more than this part since "
        "the last step in full. Less is closer.",
    )


class StepCache:
    """Gives the denoiser an output for what its inner part makes, and adds its outer part as a model."""

    def __init__(self, options: StepCacheOptions) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Cut the UNet or transformer. What cannot be cut is skipped, with the reason."""
        role = next((role for role in ("unet", "transformer") if role in bundle.models), None)
        if role is None:
            return Report(skipped=[Skipped("unet", "the pipeline has no UNet and no transformer, which it cuts")])
        model = bundle.models[role]
        if model.get_variables() or any(role in places for places in bundle.adapters.values()):
            reason = 'it has adapters that are switched while running; fuse them: mode = "fuse"'
            return Report(skipped=[Skipped(role, reason)])
        before = _weights(model)
        cut = self._cut_unet(model) if role == "unet" else self._cut_transformer(model)
        if isinstance(cut, str):
            return Report(skipped=[Skipped(role, cut)])
        outer, kept, what = cut
        model.validate_nodes_and_infer_types()
        # A clone orders operations by all results: as it is, copies of it would seem to be other models.
        bundle.put(role, model.clone())
        bundle.put(shallow_role(role), outer, config=self._facts(outer, kept))
        share = _weights(outer) / before
        return Report(
            roles=(role, shallow_role(role)),
            applied=[f"{role}: whole {self._when()}, else {what} ({share:.0%} of the weights)"],
        )

    def _facts(self, outer: ov.Model, kept: int) -> dict[str, Any]:
        """Return what running it needs: when the whole runs, how wide what is kept is, what the outer part takes."""
        options = self.options
        interval = options.interval or (_INTERVAL if options.threshold is None else None)
        inputs = sorted({name for port in outer.inputs for name in port.names} - {CACHED})
        return {**options.model_dump(), "interval": interval, "channels": kept, "inputs": inputs}

    def _when(self) -> str:
        options = self.options
        said = []
        if options.interval or options.threshold is None:
            said.append(f"every {options.interval or _INTERVAL} steps")
        if options.threshold is not None:
            said.append(f"if the first block's part changes by more than {options.threshold:g}")
        if options.warmup > 1:
            said.append(f"in the first {options.warmup} steps")
        return " and ".join(said)

    def _cut_unet(self, model: ov.Model) -> tuple[ov.Model, int, str] | str:
        """Return the outer part, how many channels are kept, and what it is; or why it cannot be cut."""
        depth = self.options.depth
        if self.options.threshold is not None:
            return "threshold looks at the first block of a transformer; set interval instead"
        joints = joints_of(model)
        if not joints:
            return "its structure is not that of a UNet with skip connections"
        if depth > (most := _outermost(model, joints)):
            return f"depth = {depth}, and its outermost level has {most} layers"
        outer = model.clone()
        joint = joints_of(outer)[-depth]
        source = joint.input_value(0)
        joint.input(0).replace_source_output(_parameter(outer, source))
        cached = joints[-depth].input_value(0)
        _give(model, cached, CACHED)
        channels = cached.get_partial_shape()[1].get_length()
        return _pruned(outer, []), channels, f"its outermost {depth} of {len(joints)} layers of the way up"

    def _cut_transformer(self, model: ov.Model) -> tuple[ov.Model, int, str] | str:
        """Return the same of a transformer: what is kept is the difference that the later blocks make."""
        depth = self.options.depth
        stream = stream_of(model)
        if stream is None:
            return "its structure is not that of a transformer whose blocks add to the tokens of a picture"
        if depth >= len(stream.blocks):
            return f"depth = {depth}, and it has {len(stream.blocks)} blocks: nothing would be left to keep"
        width = stream.begin.get_partial_shape()[2]
        if width.is_dynamic:
            return "the width of its tokens is not known"
        outer = model.clone()
        mine = stream_of(outer)
        assert mine is not None  # it is the same model
        users = mine.ends[depth - 1].get_target_inputs()
        summed = ops.add(mine.blocks[depth - 1], _parameter(outer, mine.blocks[depth - 1]))
        for port in users:
            port.replace_source_output(summed.output(0))
        extra = [_first(mine)] if self.options.threshold is not None else []
        pruned = _pruned(outer, extra)
        _give(model, ops.subtract(stream.ends[depth - 1], stream.blocks[depth - 1]).output(0), CACHED)
        if extra:
            _give(model, _first(stream), FIRST)
        return pruned, width.get_length(), f"its first {depth} of {len(stream.blocks)} blocks"


def _first(stream: Stream) -> ov.Output:
    """Return what the first block adds to the picture's tokens: those of texts may stand for nothing."""
    added = ops.subtract(stream.blocks[0], stream.begin).output(0)
    if stream.picture is None:
        return added
    return ops.slice(added, *(port.get_source_output() for port in stream.picture.inputs()[1:])).output(0)


def _outermost(model: ov.Model, joints: list[ov.Node]) -> int:
    """Return how many of the last joinings lie at the size of the output, after the last enlargement."""
    places = positions(model)
    last = max((places[op.get_name()] for op in model.get_ops() if op.get_type_name() in _ENLARGE), default=-1)
    return sum(places[joint.get_name()] > last for joint in joints)


def _parameter(model: ov.Model, like: ov.Output) -> ov.Output:
    """Give a model an input for what is kept, of the shape and type of a value."""
    parameter = ops.parameter(like.get_partial_shape(), like.get_element_type(), name=CACHED)
    parameter.output(0).get_tensor().set_names({CACHED})
    model.add_parameters([parameter])
    return parameter.output(0)


def _give(model: ov.Model, value: ov.Output, name: str) -> None:
    """Give a model an output of a name."""
    value.get_tensor().add_names({name})
    model.add_results([ops.result(value)])


def _pruned(outer: ov.Model, extra: list[ov.Output]) -> ov.Model:
    """Return the model of the first result and some more, with the inputs that they need.

    Its constants are those of the model that it was cloned from: a clone shares them.
    """
    for value in extra:
        value.get_tensor().add_names({FIRST})
    results = [outer.get_results()[0], *(ops.result(value) for value in extra)]
    outer.add_results(results[1:])
    places = positions(outer)
    used = {node.get_name() for result in results for node in ancestors(result, places)}
    kept = [node for node in outer.get_parameters() if node.get_name() in used]
    return ov.Model(results, kept, outer.get_friendly_name())


def _weights(model: ov.Model) -> int:
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")
