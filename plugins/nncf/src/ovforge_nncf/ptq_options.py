"""The options of post-training quantization, and NNCF's rules on what goes together, checked before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovforge_nncf.scope import IgnoredScope

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["AdvancedPtq", "Collector", "PtqBase", "PtqOptions", "QuantizerParameters", "RangeEstimator", "SmoothQuant"]

Mode = Literal["int8", "fp8_e4m3", "fp8_e5m2"]
Preset = Literal["performance", "mixed"]
Ranges = Literal["minmax", "mean_minmax", "median_minmax", "mean_no_outliers_minmax", "mean_quantile", "histogram"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SmoothQuant(_Table):
    """How much of what is hard to quantize moves from activations to weights (SmoothQuant, Xiao et al. 2022)."""

    matmul: float = Field(0.95, ge=-1, le=1, description="0 to 1: activations to weights, for MatMul; -1: off.")
    convolution: float = Field(-1, ge=-1, le=1, description="The same for convolutions.")

    @field_validator("matmul", "convolution")
    @classmethod
    def _off_or_part(cls, value: float) -> float:
        if -1 < value < 0:
            raise ValueError("is 0 to 1, or -1 for off")
        return value


class Collector(_Table):
    """One end of a range: what is taken of each record, and how records are put together."""

    statistics: Literal["min", "max", "abs_max", "quantile", "abs_quantile", "mean"] | None = Field(
        None, description="What is taken of each record."
    )
    aggregator: Literal["mean", "max", "min", "median", "mean_no_outliers", "median_no_outliers"] | None = Field(
        None, description="How records are put together."
    )
    clipping: float | None = Field(None, gt=0, description="Values beyond it are cut first.")
    outliers: float = Field(1e-4, ge=0, lt=0.5, description="Part of values that quantiles and no_outliers leave out.")


class RangeEstimator(_Table):
    """Both ends of a range; what is not given is NNCF's own choice for that place."""

    min: Collector = Field(default_factory=Collector, description="The lower end.")
    max: Collector = Field(default_factory=Collector, description="The upper end.")


class QuantizerParameters(_Table):
    """What a quantizer is like; what is not given is NNCF's own choice for that place."""

    num_bits: int | None = Field(None, ge=2, le=16, description="Bits; other than 8 only for the NPU.")
    mode: Literal["symmetric", "asymmetric"] | None = Field(None, description="Whether zero is in the middle.")
    signedness: bool | None = Field(None, description="Force signed (true) or unsigned (false) integers.")
    per_channel: bool | None = Field(None, description="A scale for each channel, or one for the tensor.")
    narrow_range: bool | None = Field(None, description="Leave the lowest integer out.")
    fp8: Literal["f8e4m3", "f8e5m2"] | None = Field(None, description="The type, where mode is fp8.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.fp8 and any(value is not None for name, value in self if name != "fp8"):
            raise ValueError("fp8 goes with none of the options of integers")
        return self


class AdvancedPtq(_Table):
    """What is seldom needed."""

    quantize_outputs: bool = Field(False, description="Also right before the model's outputs.")
    inplace_statistics: bool = Field(True, description="Gather statistics in the graph, which takes less memory.")
    channel_alignment: bool = Field(False, description="Align the channels of convolutions that follow each other.")
    batchwise_statistics: bool | None = Field(None, description="Statistics of each item of a batch, or of all of it.")
    propagation: Literal[
        "do_not_merge_branches",
        "merge_if_all_branches_same",
        "merge_with_potential_requantization",
        "merge_all_in_one",
    ] = Field("merge_all_in_one", description="How quantizers merge where the graph branches.")
    activations: QuantizerParameters | None = Field(None, description="Quantizers of activations.")
    weights: QuantizerParameters | None = Field(None, description="Quantizers of weights.")
    bias_threshold: float | None = Field(None, gt=0, description="Corrections of a bias beyond it are left out.")
    bias_for_all: bool = Field(False, description="Correct also operations that have no bias.")
    compress_weights: bool = Field(True, description="Store weights as integers; false leaves them simulated.")


class PtqBase(BaseModel):
    """What `nncf-ptq`, `nncf-accuracy` and `nncf-hybrid` have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    NAME: ClassVar[str]
    roles: tuple[str, ...] = Field(
        (),
        description="Models to quantize, * for any text; by default those of each step (unet, transformer, "
        "controlnet), else all.",
    )
    preset: Preset | None = Field(
        None,
        description="performance: all symmetric; mixed: activations asymmetric. By default mixed for transformers.",
    )
    model_type: Literal["transformer"] | None = Field(None, description="transformer: keep sensitive parts, smooth.")
    target_device: Literal["any", "cpu", "cpu_spr", "gpu", "npu"] = Field("any", description="Whose kernels it suits.")
    subset_size: int = Field(300, ge=1, description="Records that statistics are taken of.")
    bias_correction: Literal["fast", "accurate", "off"] = Field(
        "fast", description="accurate takes a run of the model for each layer."
    )
    smooth_quant: SmoothQuant | None = Field(None, description="Alphas of SmoothQuant, for transformers.")
    ignored_scope: IgnoredScope = Field(default_factory=IgnoredScope, description="What stays as it is.")
    overflow_fix: Literal["enable", "first_layer", "disable"] | None = Field(
        None, description="Half the range for weights, where 8-bit sums overflow: AVX2 and AVX-512 without VNNI."
    )
    activations_range: RangeEstimator | Ranges | None = Field(None, description="How ranges of activations are found.")
    weights_range: RangeEstimator | Ranges | None = Field(None, description="How ranges of weights are found.")
    advanced: AdvancedPtq = Field(default_factory=AdvancedPtq, description="What is seldom needed.")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.smooth_quant is not None and self.model_type is None:
            raise ValueError("smooth_quant is for model_type = 'transformer'")
        if self.bias_correction == "off":
            for name in ("bias_threshold", "bias_for_all"):
                if name in self.advanced.model_fields_set:
                    raise ValueError(f"advanced.{name} is nothing where bias_correction is 'off'")
        for name in ("activations", "weights"):
            given: QuantizerParameters | None = getattr(self.advanced, name)
            if given is None:
                continue
            if (self._fp8 != (given.fp8 is not None)) and given != QuantizerParameters():
                raise ValueError(f"advanced.{name} is for integers, and mode is {self._mode}" if self._fp8 else
                                 f"advanced.{name}.fp8 is for mode = 'fp8_e4m3' or 'fp8_e5m2'")  # fmt: skip
            if given.num_bits not in (None, 8) and self.target_device != "npu":
                raise ValueError(f"advanced.{name}.num_bits = {given.num_bits} is for target_device = 'npu'")
        return self

    @property
    def _mode(self) -> Mode:
        return "int8"

    @property
    def _fp8(self) -> bool:
        return self._mode != "int8"

    @property
    def memory(self) -> float:
        """Peak memory by that of the weights as float32, at the size of Stable Diffusion 1.5; more in small models."""
        smooths = self.model_type is not None and (self.smooth_quant or SmoothQuant()) != SmoothQuant(matmul=-1)
        return 2.0 if self.model_type and self.bias_correction == "off" and not smooths else 3.0

    @property
    def resolved_preset(self) -> Preset:
        """The preset that NNCF takes if none is given."""
        return self.preset or ("mixed" if self.model_type and not self._fp8 else "performance")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of nncf.quantize, but for the model, the data, the mode and the ignored scope."""
        import nncf

        arguments: dict[str, Any] = {
            "target_device": nncf.TargetDevice(self.target_device.upper()),
            "subset_size": self.subset_size,
            "fast_bias_correction": self.bias_correction != "accurate",
            "preset": nncf.QuantizationPreset(self.preset) if self.preset else None,
            "model_type": nncf.ModelType(self.model_type) if self.model_type else None,
        }
        return arguments

    def advanced_parameters(self) -> Any:
        """Return nncf.AdvancedQuantizationParameters."""
        from nncf.common.quantization.quantizer_propagation.structs import QuantizerPropagationRule
        from nncf.openvino.quantization.backend_parameters import BackendParameters
        from nncf.quantization import advanced_parameters as nncf_advanced

        given, table = self.advanced, dict[str, Any]()
        if self.overflow_fix:
            names = {"first_layer": "first_layer_only"}
            table["overflow_fix"] = nncf_advanced.OverflowFix(names.get(self.overflow_fix, self.overflow_fix))
        if self.smooth_quant:
            table["smooth_quant_alphas"] = nncf_advanced.AdvancedSmoothQuantParameters(
                convolution=self.smooth_quant.convolution, matmul=self.smooth_quant.matmul
            )
        for name, estimator in (("activations", self.activations_range), ("weights", self.weights_range)):
            if estimator is not None:
                table[f"{name}_range_estimator_params"] = _range(estimator)
        for name, quantizer in (("activations", given.activations), ("weights", given.weights)):
            if quantizer is not None and quantizer != QuantizerParameters():
                table[f"{name}_quantization_params"] = _quantizer(quantizer)
        if not given.compress_weights:
            table["backend_params"] = {BackendParameters.COMPRESS_WEIGHTS: False}
        return nncf_advanced.AdvancedQuantizationParameters(
            quantize_outputs=given.quantize_outputs,
            inplace_statistics=given.inplace_statistics,
            disable_channel_alignment=not given.channel_alignment,
            disable_bias_correction=self.bias_correction == "off",
            batchwise_statistics=given.batchwise_statistics,
            quantizer_propagation_rule=QuantizerPropagationRule[given.propagation.upper()],
            bias_correction_params=nncf_advanced.AdvancedBiasCorrectionParameters(
                apply_for_all_nodes=given.bias_for_all, threshold=given.bias_threshold
            ),
            **table,
        )

    def check_model(self, model: ov.Model) -> str:
        """Return what NNCF would refuse in `model` with these options, or ""."""
        if self.bias_correction == "accurate" and any(op.get_type_name() == "If" for op in model.get_ops()):
            return "bias_correction = 'accurate' takes no model that has If operations: set 'fast' or 'off'"
        return ""


class PtqOptions(PtqBase):
    """Options of `nncf-ptq`."""

    NAME: ClassVar[str] = "nncf-ptq"

    mode: Mode = Field("int8", description="int8, or 8-bit floating point of weights and activations.")

    @property
    def _mode(self) -> Mode:
        return self.mode

    @model_validator(mode="after")
    def _floats(self) -> Self:
        if self._fp8:
            if self.preset == "mixed":
                raise ValueError(f"preset = 'mixed' is for integers, and mode is {self.mode}")
            if self.target_device not in ("any", "cpu"):
                raise ValueError(f"mode = '{self.mode}' is for target_device = 'any' or 'cpu'")
            if self.overflow_fix not in (None, "disable"):
                raise ValueError(f"overflow_fix is for integers, and mode is {self.mode}")
            if self.advanced.quantize_outputs:
                raise ValueError(f"advanced.quantize_outputs is for integers, and mode is {self.mode}")
        return self

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of nncf.quantize, with the mode."""
        import nncf

        mode = None if self.mode == "int8" else nncf.QuantizationMode(self.mode)
        return {**super().arguments(), "mode": mode}


def _range(estimator: RangeEstimator | Ranges) -> Any:
    from nncf.quantization import range_estimator as nncf_range

    if isinstance(estimator, str):
        return getattr(nncf_range.RangeEstimatorParametersSet, estimator.upper())
    ends = (
        nncf_range.StatisticsCollectorParameters(
            statistics_type=nncf_range.StatisticsType(end.statistics) if end.statistics else None,
            aggregator_type=nncf_range.AggregatorType(end.aggregator) if end.aggregator else None,
            clipping_value=end.clipping,
            quantile_outlier_prob=end.outliers,
        )
        for end in (estimator.min, estimator.max)
    )
    return nncf_range.RangeEstimatorParameters(*ends)


def _quantizer(given: QuantizerParameters) -> Any:
    from nncf.quantization import advanced_parameters as nncf_advanced

    if given.fp8:
        return nncf_advanced.FP8QuantizationParameters(nncf_advanced.FP8Type(given.fp8))
    return nncf_advanced.QuantizationParameters(
        num_bits=given.num_bits,
        mode=nncf_advanced.QuantizationMode(given.mode) if given.mode else None,
        signedness_to_force=given.signedness,
        per_channel=given.per_channel,
        narrow_range=given.narrow_range,
    )
