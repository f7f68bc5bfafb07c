"""Options: those of diffusers' classes, by the same names, and how a model's own config fills them.

Each scheduler has a model of exactly the options that its diffusers class has, with the same defaults. What a config
leaves out comes from the model's scheduler_config.json, and then from the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import checked
from ovforge.errors import ConfigError

__all__ = [
    "CONFIG_FILE",
    "BetaSchedule",
    "BoundOptions",
    "ClipOptions",
    "NoiseOptions",
    "Options",
    "Prediction",
    "Spacing",
    "SpacingOptions",
    "ThresholdOptions",
    "merged",
    "refuse",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Spacing = Literal["leading", "linspace", "trailing"]
Prediction = Literal["epsilon", "sample", "v_prediction"]
CONFIG_FILE = "scheduler/scheduler_config.json"

_KEYS = """
algorithm_type base_image_seq_len base_shift beta_dist_alpha beta_end beta_schedule beta_start clip_denoised clip_sample
clip_sample_range corrector_order disable_corrector dynamic_thresholding dynamic_thresholding_ratio eta euler_at_final
final_sigmas_type flow_shift interpolation_type invert_sigmas lambda_min_clipped lower_order_final max_image_seq_len
max_shift noise_sampler_seed num_train_timesteps original_inference_steps predict_x0 prediction_type predictor_order
rescale_betas_zero_snr rho sample_max_value scale_factors set_alpha_to_one shift shift_terminal sigma_data sigma_max
sigma_min sigma_schedule skip_prk_steps solver_order solver_p solver_type steps_offset stochastic_sampling tau_func
thresholding time_shift_type timestep_scaling timestep_spacing timestep_type trained_betas upscale_mode use_beta_sigmas
use_dynamic_shifting use_exponential_sigmas use_flow_sigmas use_karras_sigmas use_lu_lambdas variance_type
"""
KEYS = frozenset(_KEYS.split())
"""Options of any sampler of diffusers.

Models change samplers, so configs hold options of others. diffusers' classes do not read those, and so they change
nothing here; a key that is not among these is refused.
"""


class Options(BaseModel):
    """What every scheduler's options are: unknown ones are refused, and they do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    original: ClassVar[str]
    """The class of diffusers whose options these are."""
    ours: ClassVar[frozenset[str]] = frozenset()
    """Options that diffusers gives to a step, not to the class: never read from a model's config."""

    num_train_timesteps: int = Field(1000, ge=1, le=100_000)


class NoiseOptions(Options):
    """The noise that the network was trained on."""

    beta_start: float = Field(0.0001, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    beta_schedule: BetaSchedule | Literal["sigmoid", "laplace", "exp"] = "linear"
    trained_betas: tuple[Annotated[float, Field(ge=0, le=1)], ...] | None = None


class SpacingOptions(Options):
    """Which timesteps of training a run visits (Lin et al. 2024, table 2)."""

    timestep_spacing: Spacing = "leading"
    steps_offset: int = Field(0, ge=0)


class ThresholdOptions(Options):
    """Dynamic thresholding of the predicted picture (Saharia et al. 2022)."""

    thresholding: bool = False
    dynamic_thresholding_ratio: float = Field(0.995, ge=0, le=1)
    sample_max_value: float = Field(1.0, gt=0)


class ClipOptions(Options):
    """Clipping of the predicted picture."""

    clip_sample: bool = True
    clip_sample_range: float = Field(1.0, gt=0)


class BoundOptions(ThresholdOptions, ClipOptions):
    """Thresholding or, without it, clipping."""


Given = TypeVar("Given", bound=Options)


def merged(options: Given, model_config: Mapping[str, Any]) -> Given:
    """Return the given options over the model's over the defaults. Raises ConfigError for a key that nobody knows."""
    fields = type(options).model_fields
    unset = model_config.get("_use_default_values") or ()  # diffusers: these were defaults of the class that saved them
    known = {}
    for key, value in model_config.items():
        if key not in KEYS and not key.startswith("_"):
            raise ConfigError(
                f"the option {key!r} is not one of {options.original}'s",
                where=CONFIG_FILE,
                hint=f"Remove it if it does not matter, or set {adapter(options)}.",
            )
        if key in fields and key not in options.ours and key not in unset:
            known[key] = value
    return checked(type(options), {**known, **options.model_dump(exclude_unset=True)}, where=CONFIG_FILE)


def refuse(config: Options, option: str, why: str, instead: str = "") -> ConfigError:
    """Return the error for an option, or a pair of them, that cannot be used here."""
    return ConfigError(why, where=f"scheduler.{option}", hint=instead or f"Change it, or set {adapter(config)}.")


def adapter(config: Options) -> str:
    """Return how to have diffusers itself do it."""
    return f"scheduler.use = 'diffusers' with class_name = '{config.original}'"
