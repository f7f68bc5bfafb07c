"""The architectures that the tasks can run: a module of facts and functions for each."""

from __future__ import annotations

from ovforge.contracts import TaskContext
from ovforge.errors import ModelError
from ovforge_diffusion.architectures.base import Architecture, Task
from ovforge_diffusion.architectures.flux import Flux
from ovforge_diffusion.architectures.flux2 import Flux2
from ovforge_diffusion.architectures.ltx import LTXVideo
from ovforge_diffusion.architectures.lumina2 import Lumina2
from ovforge_diffusion.architectures.pixart import PixArt
from ovforge_diffusion.architectures.qwenimage import QwenImage
from ovforge_diffusion.architectures.qwenimage_edit import QwenImageEdit
from ovforge_diffusion.architectures.sana import Sana, SanaSprint
from ovforge_diffusion.architectures.sd3 import StableDiffusion3
from ovforge_diffusion.architectures.unet import StableDiffusion, StableDiffusionXL
from ovforge_diffusion.architectures.zimage import ZImage
from ovforge_diffusion.damage import explained

__all__ = ["ARCHITECTURES", "architecture_of"]

ARCHITECTURES: tuple[type[Architecture], ...] = (
    StableDiffusionXL,
    StableDiffusion,
    StableDiffusion3,
    Flux,
    Flux2,
    ZImage,
    Sana,
    SanaSprint,
    PixArt,
    Lumina2,
    QwenImageEdit,
    QwenImage,
    LTXVideo,
)
"""In the order in which a model is offered to them."""


@explained
def architecture_of(context: TaskContext, task: Task) -> Architecture:
    """Return the architecture of a model, for a task. Raises ModelError for a model of none of them."""
    bundle = context.bundle
    for architecture in ARCHITECTURES:
        if architecture.denoiser in bundle and architecture.matches(bundle):
            return architecture(context, task)
    denoisers = [role for role in ("unet", "transformer") if role in bundle]
    if not denoisers:
        raise ModelError(
            "the model has neither a unet nor a transformer, and one of them makes the pictures",
            hint=f"It has: {', '.join(bundle) or 'nothing'}.",
        )
    name = bundle.configs.get(denoisers[0], {}).get("_class_name")
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ModelError(
        f"its class {name!r} is not one that this task knows",
        where=f"{denoisers[0]}/config.json",
        hint=f"Known are: {known}.",
    )
