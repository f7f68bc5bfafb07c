"""Latent consistency models (Luo et al. 2023): pictures in about four steps, and a small model that makes some.

Their sampling methods, the guidance that their UNets take as an embedding, their defaults, a recipe that quantizes
them, and the command `ovforge lcm`. Listing them imports none of it.
"""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import (
    CommandExtension,
    GraphTransformExtension,
    Phase,
    RecipeExtension,
    SchedulerExtension,
)

__all__ = ["EMBEDDED_MODEL"]

EMBEDDED_MODEL = "package:ovforge_lcm/model"
"""What a config's `load.source` says for the embedded model."""


@hookimpl
def ovforge_schedulers() -> Iterator[SchedulerExtension]:
    """The methods of models that were distilled to few steps; each stands for a class of diffusers."""
    yield SchedulerExtension(
        name="lcm",
        summary="Latent consistency sampling, in a few steps",
        config="ovforge_lcm.scheduler:LCMOptions",
        factory="ovforge_lcm.scheduler:LCMScheduler",
        implements=("LCMScheduler",),
    )
    yield SchedulerExtension(
        name="tcd",
        summary="Trajectory consistency sampling, in a few steps",
        config="ovforge_lcm.tcd:TCDOptions",
        factory="ovforge_lcm.tcd:TCDScheduler",
        implements=("TCDScheduler",),
    )


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    """What tasks of diffusion models get for UNets that take guidance as an embedding."""
    yield GraphTransformExtension(
        name="guidance-embedding",
        summary="Guidance for UNets that take its scale as an embedding, and their defaults",
        factory="ovforge_lcm.guidance:GuidanceEmbedding",
        embedders="ovforge_lcm.guidance:embedders",
        phase=Phase.STRUCTURE,
        recompute=True,
    )


@hookimpl
def ovforge_quantizers() -> Iterator[RecipeExtension]:
    """The choices of OpenVINO's article on LCM and NNCF (model type, preset, no bias correction), and two more.

    Pictures come closer without smoothing, which NNCF brings with model_type, and with the time embedding left alone: a
    search for the most sensitive layers finds its small matrices, all of which act on every place of a picture.
    """
    yield RecipeExtension(
        name="lcm-int8",
        summary="Recipe: latent consistency models, UNet in INT8",
        quantizer="nncf-ptq",
        options={
            "roles": ["unet"],
            "model_type": "transformer",
            "preset": "mixed",
            "bias_correction": "off",
            "smooth_quant": {"matmul": -1},
            "ignored_scope": {"patterns": [".*time_emb"], "check": False},
        },
        tunings=({},),
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """The embedded model in one command."""
    yield CommandExtension(
        name="lcm",
        summary="Make pictures with the embedded latent consistency model",
        factory="ovforge_lcm.command:lcm",
    )
