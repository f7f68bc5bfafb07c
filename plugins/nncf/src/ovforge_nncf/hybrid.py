"""UNets by halves: weights of matrix products compressed, convolutions quantized whole.

Convolutions take most of a UNet's arithmetic and bear 8-bit activations; its attention takes them badly, and gains from
small weights. Two steps of NNCF: compress_weights of all but convolutions, then quantize of the convolutions alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ovforge.contracts import Calibration, Report
from ovforge.model import ModelBundle
from ovforge_nncf.graph import CONVOLUTIONS, lowered
from ovforge_nncf.ptq import check_models, describe
from ovforge_nncf.ptq_options import PtqBase, SmoothQuant
from ovforge_nncf.running import chosen_roles, dataset, has_fast_int8, in_plain_words, models_of, speed_note
from ovforge_nncf.statistics import statistics_apart
from ovforge_nncf.weights import runs_here
from ovforge_nncf.weights_options import Mode, WeightsOptions

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Hybrid", "HybridOptions"]

COMPUTING = {
    "MatMul", "ScaledDotProductAttention", "BatchNormInference", "Add", "Subtract", "Multiply", "Divide", "Maximum",
    "Minimum", "AvgPool", "AdaptiveAvgPool", "ReduceMean", "MVN", "NormalizeL2", "Interpolate", "Power", "FloorMod",
    "Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual", "LogicalNot", "LogicalAnd", "LogicalOr",
    "LogicalXor", "SquaredDifference", "LSTMSequence", "GRUSequence", "GroupNormalization",
}  # fmt: skip
"""What NNCF puts quantizers before, besides convolutions."""


class HybridOptions(PtqBase):
    """Options of `nncf-hybrid`: those of `nncf-ptq` for convolutions, and what weights of the rest become."""

    NAME: ClassVar[str] = "nncf-hybrid"

    weights_mode: Mode = Field("int8_sym", description="Type of the weights of matrix products and embeddings.")
    ratio: float | None = Field(None, gt=0, le=1, description="Below 8 bits: part of these weights; default: 1.")
    group_size: int | None = Field(None, ge=-1, description="Below 8 bits: weights that share a scale.")
    group_size_fallback: Literal["error", "ignore", "adjust"] = Field(
        "error", description="Where group_size does not divide a row: refuse, 8 bits there, or smaller groups."
    )
    activations: Literal["convolutions", "all"] = Field(
        "convolutions",
        description="What gets 8-bit activations: convolutions alone, or all that has no compressed weights.",
    )

    model_type: Literal["transformer"] | None = Field("transformer", description="transformer: keep sensitive parts.")
    smooth_quant: SmoothQuant | None = Field(SmoothQuant(matmul=-1), description="Alphas of SmoothQuant.")

    @property
    def memory(self) -> float:
        """Peak memory by that of the weights as float32, as `PtqBase.memory`."""
        return 1.6

    @property
    def weights(self) -> WeightsOptions:
        """The first step's options. Raises ValueError if they do not fit together."""
        given = {"mode": self.weights_mode, "group_size_fallback": self.group_size_fallback}
        return WeightsOptions.model_validate(
            {**given, "ratio": self.ratio, "group_size": self.group_size, "ignored_scope": self.ignored_scope}
        )

    @model_validator(mode="after")
    def _first_step(self) -> Self:
        if self.weights_mode in ("codebook", "adaptive_codebook"):
            raise ValueError(f"weights_mode = '{self.weights_mode}' is for nncf-weights alone")
        _ = self.weights
        return self


class Hybrid:
    """Compresses what has large matrices, then quantizes convolutions with their activations."""

    def __init__(self, options: HybridOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Do both steps for each role. Raises ConfigError or ModelError; a role is changed when both are done."""
        options, where = self.options, f"quantize ({self.options.NAME})"
        roles = chosen_roles(options.roles, bundle, where, stepped=True)
        models = models_of(roles, bundle, options.ignored_scope, keep, where)
        check_models(models, options, where)
        report, done = Report(bytes_before=0, bytes_after=0), dict[str, Any]()
        if note := runs_here(options.weights, where):
            report.notes.append(note)
        for role, model in models.items():
            kept = keep.get(role, ())
            data, count = dataset(calibration, role, options.subset_size, where)
            both = self._both(role, model, data, kept, where)
            describe(report, role, model, both, options, kept)
            report.notes.append(f"{role}: {count} records")
            done[role] = both
        bundle.models.update(done)  # all or none
        if report.roles:
            report.notes.append(speed_note(has_fast_int8()))
        return report

    def _both(self, role: str, model: ov.Model, data: Any, keep: Collection[str], where: str) -> ov.Model:
        import nncf

        options = self.options
        first = options.ignored_scope.to_nncf(model, keep, types=CONVOLUTIONS)
        weights = options.weights.arguments()
        second = {**options.arguments(), "advanced_parameters": options.advanced_parameters()}
        with in_plain_words(where, role):
            compressed = nncf.compress_weights(model.clone(), ignored_scope=first, **weights)
            done = {op.name for op in lowered(compressed)}
            types = self._left(compressed)
            scope = options.ignored_scope.to_nncf(compressed, {*keep, *done}, types)
            with statistics_apart():
                both: ov.Model = nncf.quantize(compressed, data, ignored_scope=scope, **second)
        return both

    def _left(self, model: ov.Model) -> set[str]:
        """Return the types of operations that the second step leaves alone."""
        if self.options.activations == "all":
            return set()
        return COMPUTING & {op.get_type_name() for op in model.get_ops()}
