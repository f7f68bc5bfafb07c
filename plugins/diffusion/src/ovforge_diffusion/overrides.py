"""What diffusers' pipelines change of a model's scheduler_config.json before they run.

Source: the constructors of diffusers' StableDiffusionPipeline, StableDiffusionImg2ImgPipeline and
StableDiffusionInpaintPipeline, which repair configs of the first models. Those of SDXL, of consistency models and with
ControlNets take the file as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["overridden"]

_WITHOUT_OFFSET = frozenset(
    {"DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler", "IPNDMScheduler"}
)
_CLIPPING = frozenset({"DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler"})
"""Classes that clip samples unless the file says otherwise."""


def overridden(config: Mapping[str, Any], *, inpainting: bool, own: bool) -> dict[str, Any]:
    """Return the options that a pipeline changes, with their new values; {} if the file says them already.

    What the file leaves to its class is changed as well, but for that class only (`own`): diffusers gives another
    class, which a user puts in its place, that one's own defaults.
    """
    name = str(config.get("_class_name"))
    unset = {key for key in config.get("_use_default_values") or () if isinstance(key, str)}
    given = {key: value for key, value in config.items() if key not in unset}
    defaults: dict[str, Any] = {"skip_prk_steps": False} if name == "PNDMScheduler" else {}
    defaults |= {} if name in _WITHOUT_OFFSET else {"steps_offset": 0}
    defaults |= {"clip_sample": True} if name in _CLIPPING else {}
    seen = {**(defaults if own else {}), **given}
    wanted = {"steps_offset": 1, **({"skip_prk_steps": True} if inpainting else {"clip_sample": False})}
    return {key: value for key, value in wanted.items() if key in seen and seen[key] != value}
