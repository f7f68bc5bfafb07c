"""LoRA and its kin, of PEFT, LyCORIS and kohya, on OpenVINO models: fused, or switched while running."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, GraphTransformExtension, Phase


def _phase(options: Any) -> Phase:
    """Weights are changed before anything else; what is switched at run time is attached to the final weights."""
    return Phase.ATTACH if options.mode == "runtime" else Phase.FUSE


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    """The adapters."""
    yield GraphTransformExtension(
        name="lora",
        summary="LoRA and its kin, of PEFT, LyCORIS and kohya: fused, or switched while running",
        config="ovforge_sd_lora.options:LoraOptions",
        factory="ovforge_sd_lora.transform:LoraTransform",
        phase=_phase,
        recompute=True,
        adapter="ovforge_sd_lora.switch:running_adapter",
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Looking into adapter files."""
    yield CommandExtension(
        name="lora",
        summary="Look into adapter files, and see what of them fits a model",
        factory="ovforge_sd_lora.inspect:app",
    )
