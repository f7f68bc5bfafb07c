"""Weights in fewer bits, by nncf.compress_weights, without any data."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ovforge.bundle import ModelBundle
from ovforge.errors import ConfigError, ModelError, did_you_mean
from ovforge.stages import Calibration, Report, Skipped

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["WeightCompression", "WeightsOptions"]

Mode = Literal["int8_sym", "int8_asym", "int4_sym", "int4_asym", "nf4"]
_LOW = {"i8": 8, "u8": 8, "i4": 4, "u4": 4, "nf4": 4}
"""Element type of a compressed constant -> its bits."""


class WeightsOptions(BaseModel):
    """What is compressed, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = Field("int8_sym", description="Type of the weights; the ones of 4 bits keep a part of them in 8.")
    roles: tuple[str, ...] = Field((), description="Models to compress; by default all but tokenizers.")
    ratio: float | None = Field(None, gt=0, le=1, description="4 bits: part of the weights that gets them; default: 1.")
    group_size: int | None = Field(
        None, ge=-1, description="4 bits: weights that share a scale; -1: all of an output channel. Default: 128."
    )
    group_size_fallback: Literal["error", "ignore", "adjust"] = Field(
        "error",
        description="Where group_size does not divide a row of weights: refuse, leave that matrix in 8 bits, or take"
        " smaller groups.",
    )

    @model_validator(mode="after")
    def _four_bits(self) -> WeightsOptions:
        fallback = None if self.group_size_fallback == "error" else self.group_size_fallback
        for name, given in (("ratio", self.ratio), ("group_size", self.group_size), ("group_size_fallback", fallback)):
            if given is not None and self.mode.startswith("int8"):
                raise ValueError(f"{name} is for modes of 4 bits, and mode is {self.mode}")
        if self.group_size == 0:
            raise ValueError("group_size is -1, or 1 and more")
        return self


class WeightCompression:
    """Replaces weights by integers and a scale; the device multiplies, in the precision that it computes in."""

    def __init__(self, options: WeightsOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Compress each role's weights. Raises ConfigError for a role that there is not; asks for no calibration."""
        report = Report(bytes_before=0, bytes_after=0)
        for role in self._roles(bundle):
            model = bundle.models[role]
            before = _bits(model)
            bytes_before = _bytes(model)
            bundle.models[role] = model = self._compressed(role, model)
            gained = _bits(model) - before
            if not gained:
                report.skipped.append(Skipped(role, "it has no weights that could be compressed, or all are already"))
                continue
            report.roles += (role,)
            report.bytes_before = (report.bytes_before or 0) + bytes_before
            report.bytes_after = (report.bytes_after or 0) + _bytes(model)
            said = " and ".join(f"{count} in {bits} bits" for bits, count in sorted(gained.items()))
            report.applied.append(f"{role}: weights of {said}")
        return report

    def _roles(self, bundle: ModelBundle) -> list[str]:
        own = [role for role in bundle.models if not role.startswith(("tokenizer", "detokenizer"))]
        for role in self.options.roles:
            if role not in own:
                raise ConfigError(
                    f"the model has no {role!r} to compress.{did_you_mean(role, own)}",
                    where="quantize (nncf-weights).roles",
                    hint=f"It has: {', '.join(own)}.",
                )
        return list(self.options.roles) or own

    def _compressed(self, role: str, model: ov.Model) -> ov.Model:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

        options = self.options
        four: dict[str, Any] = {} if options.ratio is None else {"ratio": options.ratio}
        if options.group_size is not None:
            four["group_size"] = options.group_size
        if options.group_size_fallback != "error":
            fallback = GroupSizeFallbackMode(options.group_size_fallback)
            four["advanced_parameters"] = AdvancedCompressionParameters(group_size_fallback_mode=fallback)
        try:
            with _quiet():
                compressed: ov.Model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(options.mode), **four)
        except nncf.errors.InvalidGroupSizeError as error:
            raise ConfigError(
                f"groups of {options.group_size or 128} do not divide every row of weights",
                where=f"quantize (nncf-weights), role {role}",
                hint="Set group_size to a number that does, -1 for whole rows, or group_size_fallback to 'ignore' or"
                " 'adjust'.",
            ) from error
        except (nncf.errors.ValidationError, nncf.errors.UnsupportedModelError, nncf.errors.InternalError) as error:
            raise ModelError(
                f"nncf cannot compress it: {error}", where=f"quantize (nncf-weights), role {role}"
            ) from error
        return compressed


def _bits(model: ov.Model) -> Counter[int]:
    """Return how many compressed weights there are, by bits."""
    kinds = (op.get_element_type().get_type_name() for op in _constants(model) if len(op.get_output_shape(0)) > 1)
    return Counter(_LOW[kind] for kind in kinds if kind in _LOW)


def _bytes(model: ov.Model) -> int:
    return sum(op.get_byte_size() for op in _constants(model))


def _constants(model: ov.Model) -> list[Any]:
    return [op for op in model.get_ops() if op.get_type_name() == "Constant"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep nncf's tables and bars off the screen: the report says what was done."""
    import nncf

    logger = nncf.common.logging.logger.nncf_logger
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(level)
