"""Let the attention of a UNet work on fewer tokens: token merging for Stable Diffusion (Bolya & Hoffman 2023)."""

from __future__ import annotations

import math
from fractions import Fraction

import openvino as ov
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ovforge.contracts import Report, Skipped
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.nodes import port_named
from ovforge_diffusion.graph.token_groups import grid, matched
from ovforge_diffusion.graph.transformer_blocks import Block, Kind, blocks_of
from ovforge_diffusion.shallow import shallow_role

__all__ = ["TokenMerging", "TokenMergingOptions"]

_PROBE = 64
"""Side of the latents with which a model of open sizes is asked how far each layer is down-sampled."""


class TokenMergingOptions(BaseModel):
    """How many tokens are merged, and for which layers. The names are those of the authors' tomesd."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    ratio: float = Field(
        0.5, ge=0.01, le=0.75, description="Share of the tokens that are merged into others. Less is closer."
    )
    max_downsample: int = Field(
        1,
        ge=1,
        le=8,
        description="Layers down-sampled at most so many times take part: 1 is the size of the latents. "
        "Stable Diffusion XL has attention from 2 on.",
    )
    merge_attn: bool = Field(True, description="Merge for self-attention.")
    merge_crossattn: bool = Field(False, description="Merge for cross-attention, too.")
    merge_mlp: bool = Field(False, description="Merge for the multilayer perceptrons, too.")

    @model_validator(mode="after")
    def _some(self) -> TokenMergingOptions:
        if not (self.merge_attn or self.merge_crossattn or self.merge_mlp):
            raise ValueError("nothing is merged: set one of merge_attn, merge_crossattn, merge_mlp to true")
        return self

    def kinds(self) -> tuple[Kind, ...]:
        """Return the kinds of branches whose tokens are merged."""
        chosen = {Kind.SELF: self.merge_attn, Kind.CROSS: self.merge_crossattn, Kind.MLP: self.merge_mlp}
        return tuple(kind for kind, wanted in chosen.items() if wanted)


class TokenMerging:
    """Merges tokens before the branches of transformer blocks, and gives each its result after them."""

    def __init__(self, options: TokenMergingOptions) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change the UNet, and its outer part if `step-cache` has made one. What does not fit is skipped."""
        if "unet" not in bundle.models:
            return Report(skipped=[Skipped("unet", "the pipeline has no UNet, whose attention it changes")])
        report = Report()
        for role in ("unet", shallow_role("unet")):
            if role in bundle.models:
                self._change(bundle, role, report)
        return report

    def _change(self, bundle: ModelBundle, role: str, report: Report) -> None:
        model = bundle.models[role].clone()
        found = _levels(model)
        within = [block for level, block in found if level <= self.options.max_downsample]
        kinds = self.options.kinds()
        if not any(branch.kind in kinds for block in within for branch in block.branches):
            if role == "unet":
                report.skipped.append(Skipped(role, _reason([level for level, _ in found], self.options)))
            else:
                report.notes.append(f"{role}: it has no such layers, and stays as it is")
            return
        try:
            counts = self._merge(model, within)
        except RuntimeError as error:
            # Shapes that were written into the model when it was exported fit only all tokens.
            first = str(error).strip().splitlines()[-1]
            report.skipped.append(Skipped(role, f"its layers do not take fewer tokens: {first}"))
            return
        # A clone orders operations anew: as it is, copies of it would seem to be other models.
        bundle.put(role, model.clone())
        report.roles += (role,)
        layers = ", ".join(f"{count} x {kind}" for kind, count in counts.items())
        report.applied.append(
            f"{role}: {layers}, in {len(within)} of {len(found)} transformer blocks, "
            f"without {self.options.ratio:.0%} of the tokens"
        )

    def _merge(self, model: ov.Model, blocks: list[Block]) -> dict[Kind, int]:
        """Change the model, and return how many branches of each kind merge. Raises RuntimeError if shapes disagree."""
        ratio = Fraction(self.options.ratio).limit_denominator(1000)
        grids = {block.picture.get_node().get_name(): grid(block.picture) for block in blocks}
        counts: dict[Kind, int] = {}
        for block in blocks:
            branches = [branch for branch in block.branches if branch.kind in self.options.kinds()]
            # As in the original, what a block begins with decides for all its branches.
            groups = matched(block.branches[0].states, grids[block.picture.get_node().get_name()], ratio)
            for branch in branches:
                users = branch.begin.get_target_inputs()
                merged = groups.merge(branch.begin)
                for user in users:
                    user.replace_source_output(merged)
                branch.end.replace_source_output(groups.unmerge(branch.end.get_source_output()))
                counts[branch.kind] = counts.get(branch.kind, 0) + 1
        model.validate_nodes_and_infer_types()
        _probe(model)
        return counts


def _levels(model: ov.Model) -> list[tuple[int, Block]]:
    """Return each block with how many times its sides are smaller than the latents'."""
    probe = _probe(model)
    sample = port_named(probe.inputs, "sample", "unet").get_partial_shape()
    shapes = [block.picture.get_partial_shape() for block in blocks_of(probe)]
    whole = sample[2].get_length() * sample[3].get_length()
    # Blocks follow from each other, so that they have one order in every copy.
    return [
        (math.ceil(math.sqrt(whole // (shape[1].get_length() * shape[2].get_length()))), block)
        for shape, block in zip(shapes, blocks_of(model), strict=True)
    ]


def _probe(model: ov.Model) -> ov.Model:
    """Return a copy for which the sides of the latents are known. A copy, because a change of shapes leaves traces."""
    probe = model.clone()
    sample = port_named(probe.inputs, "sample", "unet")
    batch, channels, *sides = list(sample.get_partial_shape())
    known = [side if side.is_static else ov.Dimension(_PROBE) for side in sides]
    probe.reshape({sample: ov.PartialShape([batch, channels, *known])})
    return probe


def _reason(levels: list[int], options: TokenMergingOptions) -> str:
    if not levels:
        return "it has no transformer blocks with self-attention on the tokens of a picture"
    if min(levels) > options.max_downsample:
        return f"its self-attention begins at down-sampling {min(levels)}; set max_downsample = {min(levels)}"
    return f"its blocks have no {' or '.join(options.kinds())}"
