"""Sampling methods in numpy: DDIM, Euler, DPM++, UniPC and the others of diffusers, number for number."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import SchedulerExtension

_METHODS = (
    # name, summary, module, options, scheduler, the class of diffusers
    ("ddim", "DDIM, without noise or with some (eta)", "ddim", "DDIM", "DDIMScheduler"),
    ("ddpm", "DDPM, with noise at each step; for many steps", "ddim", "DDPM", "DDPMScheduler"),
    ("deis", "DEIS, multistep in log rho", "deis", "DEIS", "DEISMultistepScheduler"),
    ("dpm-singlestep", "DPM++ 2S, 3S", "dpm_singlestep", "DPMSinglestep", "DPMSolverSinglestepScheduler"),
    ("dpm2", "DPM2, two calls a step", "kdpm2", "DPM2", "KDPM2DiscreteScheduler"),
    (
        "dpm2-ancestral",
        "DPM2 with noise, two calls a step",
        "kdpm2",
        "DPM2Ancestral",
        "KDPM2AncestralDiscreteScheduler",
    ),
    ("dpmpp-2m", "DPM++ 2M, 3M, and with noise", "dpm_multistep", "DPMMultistep", "DPMSolverMultistepScheduler"),
    ("dpmpp-sde", "DPM++ SDE, two calls a step", "dpm_sde", "DPMSDE", "DPMSolverSDEScheduler"),
    ("edm-euler", "Euler's method for EDM models", "euler", "EDMEuler", "EDMEulerScheduler"),
    ("euler", "Euler's method", "euler", "Euler", "EulerDiscreteScheduler"),
    ("euler-ancestral", "Euler's method with noise", "euler", "EulerAncestral", "EulerAncestralDiscreteScheduler"),
    ("flow-euler", "Euler's method for flows", "flow_match", "FlowEuler", "FlowMatchEulerDiscreteScheduler"),
    ("flow-heun", "Heun's for flows, two calls a step", "flow_match", "FlowHeun", "FlowMatchHeunDiscreteScheduler"),
    ("flow-lcm", "Few steps on flows, with noise", "flow_match", "FlowLCM", "FlowMatchLCMScheduler"),
    ("heun", "Heun's method, two calls a step", "heun", "Heun", "HeunDiscreteScheduler"),
    ("lms", "Linear multistep", "lms", "LMS", "LMSDiscreteScheduler"),
    ("pndm", "PNDM, with or without Runge-Kutta steps", "pndm", "PNDM", "PNDMScheduler"),
    ("scm", "Consistency along angles: Sana-Sprint", "scm", "SCM", "SCMScheduler"),
    ("unipc", "UniPC, predictor and corrector", "unipc", "UniPC", "UniPCMultistepScheduler"),
)


@hookimpl
def ovforge_schedulers() -> Iterator[SchedulerExtension]:
    """All methods; each stands for a class of diffusers."""
    for name, summary, module, prefix, original in _METHODS:
        yield SchedulerExtension(
            name=name,
            summary=summary,
            config=f"ovforge_schedulers.{module}:{prefix}Options",
            factory=f"ovforge_schedulers.{module}:{prefix}Scheduler",
            implements=(original,),
        )
    yield SchedulerExtension(
        name="dpmpp-2m-sde",
        summary="DPM++ 2M SDE, with noise at each step",
        config="ovforge_schedulers.dpm_multistep:DPMMultistepOptions",
        factory="ovforge_schedulers.dpm_multistep:dpm_multistep_sde",
    )
