"""What schedulers share: options by the names of diffusers, schedules of noise, and runs in terms of alphas, in numpy.

Numbers are those of diffusers: see `ovforge_sampling.float32` for how near.
"""

from __future__ import annotations

from ovforge_sampling.base import (
    ONE,
    AlphaSampling,
    NoiseScheduler,
    Run,
    Scheduling,
    begun,
    bounded,
    predicted_noise,
    predicted_picture,
    takes_none,
    thresholded,
    whole,
)
from ovforge_sampling.float32 import Array, Value, exp, expm1, linspace, log, running_product
from ovforge_sampling.noise import alphas_cumprod
from ovforge_sampling.options import (
    CONFIG_FILE,
    BetaSchedule,
    BoundOptions,
    ClipOptions,
    NoiseOptions,
    Options,
    Prediction,
    Spacing,
    SpacingOptions,
    ThresholdOptions,
    merged,
    refuse,
)

__all__ = [
    "CONFIG_FILE",
    "ONE",
    "AlphaSampling",
    "Array",
    "BetaSchedule",
    "BoundOptions",
    "ClipOptions",
    "NoiseOptions",
    "NoiseScheduler",
    "Options",
    "Prediction",
    "Run",
    "Scheduling",
    "Spacing",
    "SpacingOptions",
    "ThresholdOptions",
    "Value",
    "alphas_cumprod",
    "begun",
    "bounded",
    "exp",
    "expm1",
    "linspace",
    "log",
    "merged",
    "predicted_noise",
    "predicted_picture",
    "refuse",
    "running_product",
    "takes_none",
    "thresholded",
    "whole",
]
