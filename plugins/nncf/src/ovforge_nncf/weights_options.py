"""The options of weight compression, and NNCF's rules on what goes together, checked before any work."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ovforge.contracts import Need
from ovforge_nncf.scope import IgnoredScope, Scope

__all__ = ["AdvancedWeights", "WeightsOptions"]

Mode = Literal[
    "int8_sym", "int8_asym", "int4_sym", "int4_asym", "int3_sym", "int2_sym", "nf4", "cb4", "fp4", "fp8_e4m3",
    "mxfp4", "mxfp8_e4m3", "nvfp4", "codebook", "adaptive_codebook",
]  # fmt: skip
Sensitivity = Literal[
    "weight_quantization_error", "hessian_input_activation", "mean_activation_variance", "max_activation_variance",
    "mean_activation_magnitude",
]  # fmt: skip

_FIXED_GROUPS = {"mxfp4": 32, "mxfp8_e4m3": 32, "nvfp4": 16}
_FLOATS = {"mxfp4": "mxfp8_e4m3", "mxfp8_e4m3": "mxfp8_e4m3", "fp4": "fp8_e4m3", "fp8_e4m3": "fp8_e4m3"}
"""Mode -> NNCF's backup of it, if that is not int8_asym."""
_NO_CORRECTION = ("mxfp4", "mxfp8_e4m3", "fp8_e4m3", "fp4", "nvfp4")
_FROM_DATA = ("scale_estimation", "gptq", "lora_correction")


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Awq(_Table):
    """Activation-aware weight quantization (Lin et al. 2023), as NNCF searches for its scales."""

    subset_size: int = Field(32, ge=1, description="Records.")
    percent: float = Field(0.002, gt=0, le=1, description="Part of the channels that is corrected.")
    alpha_min: float = Field(0.0, ge=0, le=1, description="Where the search for smoothness begins.")
    alpha_max: float = Field(1.0, ge=0, le=1, description="Where it ends.")
    steps: int = Field(100, ge=1, description="Steps of the search.")


class ScaleEstimation(_Table):
    """Scales that make a layer's output, not its weights, come close."""

    subset_size: int = Field(64, ge=1, description="Records.")
    initial_steps: int = Field(5, ge=1, description="Steps from the largest magnitude.")
    scale_steps: int = Field(5, ge=1, description="Steps of a search through smaller scales.")
    weight_penalty: float = Field(-1.0, description="Weight of the error of the weights themselves; -1: none.")


class Gptq(_Table):
    """GPTQ (Frantar et al. 2022)."""

    damp: float = Field(0.1, gt=0, description="Part of the Hessian's mean diagonal that is added to it.")
    block_size: int = Field(128, ge=1, description="Columns at a time.")
    subset_size: int = Field(128, ge=1, description="Records that the Hessian is made of.")


class Lora(_Table):
    """Low-rank branches that make up for a part of the error."""

    rank: int = Field(8, ge=1, description="Rank of a branch.")
    iterations: int = Field(3, ge=1, description="Iterations.")
    regularize: bool = Field(True, description="Against following the records too closely at high ranks.")
    subset_size: int = Field(128, ge=1, description="Records.")
    int8: bool = Field(True, description="Store branches in 8 bits.")


class AdaptiveCodebook(_Table):
    """A table of values found for each weight, in `mode = "adaptive_codebook"`."""

    value_type: Literal["f8e4m3", "f16", "i8"] = Field("f8e4m3", description="Type of its values.")
    across_blocks: bool = Field(False, description="One table for weights of the same place in all blocks.")
    elements: int = Field(16, ge=2, le=16, description="Values in a table.")


class AdvancedWeights(_Table):
    """What is seldom needed."""

    min_group_size: int = Field(32, ge=1, description="The smallest group that group_size_fallback = 'adjust' takes.")
    awq: Awq = Field(default_factory=Awq)
    scale_estimation: ScaleEstimation = Field(default_factory=ScaleEstimation)
    gptq: Gptq = Field(default_factory=Gptq)
    lora_correction: Lora = Field(default_factory=Lora)
    adaptive_codebook: AdaptiveCodebook = Field(default_factory=AdaptiveCodebook)


class WeightsOptions(BaseModel):
    """What is compressed, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    NAME: ClassVar[str] = "nncf-weights"

    mode: Mode = Field("int8_sym", description="Type of the weights; modes below 8 bits keep a part of them in 8.")
    roles: tuple[str, ...] = Field((), description="Models to compress, * for any text; by default all but tokenizers.")
    ratio: float | None = Field(None, gt=0, le=1, description="Below 8 bits: part of the weights; default: 1.")
    group_size: int | None = Field(
        None,
        ge=-1,
        description="Below 8 bits: weights that share a scale; -1: all of an output channel. By default 128, 32 for "
        "mx, 16 for nvfp4, -1 for codebooks.",
    )
    group_size_fallback: Literal["error", "ignore", "adjust"] = Field(
        "error",
        description="Where group_size does not divide a row of weights: refuse, leave that matrix as it is, or take"
        " smaller groups.",
    )
    all_layers: bool = Field(False, description="Below 8 bits: also embeddings and the last layer.")
    backup_mode: Literal["none", "int8_sym", "int8_asym", "fp8_e4m3", "mxfp8_e4m3"] | None = Field(
        None, description="What the rest gets; by default int8_asym, for floats their own 8 bits."
    )
    backup_scope: Scope = Field(
        default_factory=Scope, description="Below 8 bits: what gets backup_mode, whatever `ratio` leaves."
    )
    sensitivity_metric: Sensitivity | None = Field(
        None, description="What decides on the rest where ratio is below 1; all but the first need data."
    )
    awq: bool = Field(False, description="Activation-aware scaling; without data it goes by the weights alone.")
    scale_estimation: bool = Field(False, description="Scales by the error of outputs; needs data.")
    gptq: bool = Field(False, description="GPTQ; needs data.")
    lora_correction: bool = Field(False, description="Low-rank branches for the error; needs data.")
    data: bool | None = Field(None, description="Use recorded inputs; by default if something above asks for them.")
    subset_size: int = Field(128, ge=1, description="Records, where data are used.")
    codebook: tuple[float, ...] | None = Field(
        None, description="mode = 'codebook': 2 to 256 rising values that weights are divided into."
    )
    compression_format: Literal["dequantize", "fake_quantize", "fake_quantize_with_lora"] = Field(
        "dequantize", description="How it is written into the model; OpenVINO's own is dequantize."
    )
    ignored_scope: IgnoredScope = Field(default_factory=IgnoredScope, description="What stays as it is.")
    advanced: AdvancedWeights = Field(default_factory=AdvancedWeights, description="What is seldom needed.")

    @property
    def is_int8(self) -> bool:
        """Whether all weights get 8-bit integers."""
        return self.mode.startswith("int8")

    @property
    def group(self) -> int:
        """How many weights share a scale; -1: all of an output channel. NNCF's defaults if it is not said."""
        if self.group_size is not None:
            return self.group_size
        if self.mode in _FIXED_GROUPS:
            return _FIXED_GROUPS[self.mode]
        whole = ("codebook", "adaptive_codebook", "cb4")
        return -1 if self.is_int8 or self.mode in whole else 128

    @property
    def groups_backup(self) -> bool:
        """Whether what is not in `mode` gets groups of 8-bit floats."""
        return self.backup in ("fp8_e4m3", "mxfp8_e4m3") and self.group_size != -1

    @property
    def backup(self) -> str:
        """The mode of what does not get `mode`; NNCF's own if it is not said."""
        return self.backup_mode or _FLOATS.get(self.mode, "int8_asym")

    @property
    def uses_data(self) -> bool:
        """Whether recorded inputs are asked for."""
        if self.data is not None:
            return self.data
        by_activations = self.sensitivity_metric not in (None, "weight_quantization_error")
        asked = by_activations or self.awq or any(getattr(self, name) for name in _FROM_DATA)
        return asked or self.mode == "adaptive_codebook"

    @property
    def needs(self) -> Need:
        """What the core must record."""
        return "inputs" if self.uses_data else "nothing"

    @model_validator(mode="after")
    def _below_eight(self) -> Self:
        lower: tuple[str, ...] = (
            "ratio",
            "group_size",
            "group_size_fallback",
            "all_layers",
            "backup_mode",
            "backup_scope",
            "sensitivity_metric",
        )
        lower += ("awq", *_FROM_DATA, "data")
        for name in lower if self.is_int8 else ():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            if getattr(self, name) not in (None, False, default):
                raise ValueError(f"{name} is for modes below 8 bits, and mode is {self.mode}")
        if self.backup_mode == "none" and self.backup_scope != Scope():
            raise ValueError("backup_scope is what gets backup_mode, and that is none: name it in ignored_scope")
        if self.group_size == 0:
            raise ValueError("group_size is -1, or 1 and more")
        fixed = _FIXED_GROUPS.get(self.mode)
        if fixed and self.group_size not in (None, fixed):
            raise ValueError(f"group_size is {fixed} where mode is {self.mode}")
        if fixed and self.group_size_fallback == "adjust":
            raise ValueError(
                f"group_size_fallback = 'adjust' is not for {self.mode}, whose groups have {fixed} weights"
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> Self:
        corrections = [name for name in ("awq", *_FROM_DATA) if getattr(self, name)]
        if corrections and self.mode in _NO_CORRECTION:
            raise ValueError(f"{corrections[0]} is for integers, nf4 and codebooks, and mode is {self.mode}")
        if self.gptq and self.lora_correction:
            raise ValueError("gptq and lora_correction do not go together: take one")
        if self.data is False:
            needing = [name for name in _FROM_DATA if getattr(self, name)]
            needing += [] if self.sensitivity_metric in (None, "weight_quantization_error") else ["sensitivity_metric"]
            needing += ["mode = 'adaptive_codebook'"] if self.mode == "adaptive_codebook" else []
            if needing:
                raise ValueError(f"{needing[0]} needs data, and data is false")
        if self.compression_format != "dequantize":
            raise ValueError(
                f"compression_format = {self.compression_format!r} is for training in PyTorch; OpenVINO models take"
                " 'dequantize'"
            )
        if (self.codebook is not None) != (self.mode == "codebook"):
            raise ValueError("codebook goes with mode = 'codebook', and that with it")
        if self.codebook is not None:
            if not 2 <= len(self.codebook) <= 256:
                raise ValueError(f"codebook has 2 to 256 values, not {len(self.codebook)}")
            if any(a >= b for a, b in zip(self.codebook, self.codebook[1:], strict=False)):
                raise ValueError("codebook must rise from value to value")
        table = self.advanced.adaptive_codebook
        if table.across_blocks and self.mode == "adaptive_codebook" and self.group_size not in (None, -1):
            raise ValueError("advanced.adaptive_codebook.across_blocks goes with group_size = -1")
        if self.advanced.awq.alpha_min > self.advanced.awq.alpha_max:
            raise ValueError("advanced.awq.alpha_min is above alpha_max")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of nncf.compress_weights, but for the model, the data and the ignored scope.

        What is not set is left out: NNCF refuses some options wherever they are given at all.
        """
        import nncf

        arguments: dict[str, Any] = {"mode": nncf.CompressWeightsMode(self.mode), "subset_size": self.subset_size}
        for name in ("ratio", "group_size"):
            if getattr(self, name) is not None:
                arguments[name] = getattr(self, name)
        for name in ("all_layers", "awq", *_FROM_DATA):
            if getattr(self, name):
                arguments[name] = True
        if self.backup_mode:
            arguments["backup_mode"] = nncf.BackupMode(self.backup_mode)
        if self.sensitivity_metric:
            arguments["sensitivity_metric"] = nncf.SensitivityMetric(self.sensitivity_metric)
        return {**arguments, "advanced_parameters": self._advanced_parameters()}

    def backup_arguments(self) -> dict[str, Any]:
        """Return the arguments of nncf.compress_weights for `backup_scope`, but for the model and the ignored scope."""
        import nncf

        arguments: dict[str, Any] = {"mode": nncf.CompressWeightsMode(self.backup)}
        if self.backup.startswith("int8"):
            return arguments
        group = _FIXED_GROUPS.get(self.backup, self.group)
        parameters = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.quantization.advanced_parameters.GroupSizeFallbackMode(
                self.group_size_fallback
            ),
            min_adjusted_group_size=self.advanced.min_group_size,
        )
        return {**arguments, "group_size": group, "all_layers": True, "advanced_parameters": parameters}

    def _advanced_parameters(self) -> Any:
        import numpy as np
        from nncf.quantization import advanced_parameters as nncf_advanced
        from nncf.tensor import TensorDataType

        given = self.advanced
        awq, scale, gptq, lora, table = (
            given.awq, given.scale_estimation, given.gptq, given.lora_correction, given.adaptive_codebook
        )  # fmt: skip
        return nncf_advanced.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf_advanced.GroupSizeFallbackMode(self.group_size_fallback),
            min_adjusted_group_size=given.min_group_size,
            awq_params=nncf_advanced.AdvancedAWQParameters(
                subset_size=awq.subset_size, percent_to_apply=awq.percent, alpha_min=awq.alpha_min,
                alpha_max=awq.alpha_max, steps=awq.steps, prefer_data_aware_scaling=self.uses_data,
            ),
            scale_estimation_params=nncf_advanced.AdvancedScaleEstimationParameters(
                subset_size=scale.subset_size, initial_steps=scale.initial_steps, scale_steps=scale.scale_steps,
                weight_penalty=scale.weight_penalty,
            ),
            gptq_params=nncf_advanced.AdvancedGPTQParameters(
                damp_percent=gptq.damp, block_size=gptq.block_size, subset_size=gptq.subset_size
            ),
            lora_correction_params=nncf_advanced.AdvancedLoraCorrectionParameters(
                adapter_rank=lora.rank, num_iterations=lora.iterations, apply_regularization=lora.regularize,
                subset_size=lora.subset_size, use_int8_adapters=lora.int8,
            ),
            codebook=None if self.codebook is None else np.array(self.codebook, np.float32),
            adaptive_codebook_params=nncf_advanced.AdvancedAdaptiveCodebookParameters(
                value_type=TensorDataType[_VALUE_TYPES[table.value_type]], across_blocks=table.across_blocks,
                num_elements=table.elements,
            ),
        )  # fmt: skip


_VALUE_TYPES = {"f8e4m3": "f8e4m3", "f16": "float16", "i8": "int8"}
