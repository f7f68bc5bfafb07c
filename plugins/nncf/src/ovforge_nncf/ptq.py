"""Weights and activations in 8 bits, by nncf.quantize on recorded inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ovforge.contracts import Calibration, Report, Skipped
from ovforge.errors import ConfigError, ModelError
from ovforge.model import ModelBundle
from ovforge_nncf.graph import CONVOLUTIONS, constant_bytes, counted, float_bytes, is_quantized, lowered
from ovforge_nncf.parts import positions_of
from ovforge_nncf.ptq_options import PtqBase, PtqOptions
from ovforge_nncf.running import (
    check_memory,
    chosen_roles,
    dataset,
    has_fast_int8,
    in_plain_words,
    models_of,
    speed_note,
)
from ovforge_nncf.statistics import statistics_apart

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["PostTrainingQuantization", "check_models", "describe", "foreseen_memory"]

FP8_NOTE = "OpenVINO's CPU plugin rounds to FP8 and computes in floats: here FP8 is smaller, and not faster"


class PostTrainingQuantization:
    """Puts quantizers where the device's kernels take integers, with ranges found in recorded inputs."""

    def __init__(self, options: PtqOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Quantize each role. Raises ConfigError for options that do not fit, ModelError for models that do not."""
        import nncf

        options, where = self.options, f"quantize ({self.options.NAME})"
        roles = chosen_roles(options.roles, bundle, where, stepped=True)
        models = models_of(roles, bundle, options.ignored_scope, keep, where)
        check_models(models, options, where)
        report, done = Report(bytes_before=0, bytes_after=0), dict[str, Any]()
        for role, model in models.items():
            data, count = dataset(calibration, role, options.subset_size, where)
            scope = options.ignored_scope.to_nncf(model, keep.get(role, ()))
            arguments = {**options.arguments(), "advanced_parameters": options.advanced_parameters()}
            with in_plain_words(where, role), statistics_apart():
                quantized = nncf.quantize(model, data, ignored_scope=scope, **arguments)
            describe(report, role, model, quantized, options, keep.get(role, ()))
            report.notes.append(f"{role}: {count} records")
            done[role] = quantized
        bundle.models.update(done)  # all or none
        if report.roles:
            report.notes.append(speed_note(has_fast_int8()) if options.mode == "int8" else FP8_NOTE)
        return report


def check_models(models: Mapping[str, ov.Model], options: PtqBase, where: str) -> None:
    """Raise for models that are quantized already, that the options do not fit, or that memory does not suffice for."""
    for role, model in models.items():
        if done := is_quantized(model):
            raise ModelError(
                f"it is quantized already: {done}",
                where=f"{where}, role {role}",
                hint="Start from the model in floating point; nncf-hybrid compresses and quantizes in one stage.",
            )
        if refused := options.check_model(model):
            raise ConfigError(refused, where=f"{where}, role {role}")
        check_memory(foreseen_memory(model, options), where, role)


def foreseen_memory(model: ov.Model, options: PtqBase) -> int:
    """Return the bytes that quantizing takes: a multiple of the weights as float32, which was measured on UNets.

    They are in memory packed for the kernels, and as NNCF's smoothed copies; the rest is activations, more where NNCF
    looks at more of them. Records and the file's own weights, which the system can drop, come on top.
    """
    return int(options.memory * float_bytes(model))


def describe(
    report: Report, role: str, before: ov.Model, after: ov.Model, options: PtqBase, keep: Collection[str]
) -> None:
    """Write into `report` what was quantized, what was left, and why."""
    found = lowered(after)
    if not found:
        report.skipped.append(Skipped(role, "it has nothing that could be quantized"))
        return
    report.roles += (role,)
    report.layers[role] = [op.name for op in found]
    report.applied.append(f"{role}: {counted(found)}")
    report.bytes_before = (report.bytes_before or 0) + constant_bytes(before)
    report.bytes_after = (report.bytes_after or 0) + constant_bytes(after)
    done, exact, ignored = {op.name for op in found}, positions_of(before), options.ignored_scope.found_in(before)
    if exact:
        report.notes.append(f"{role}: {len(exact)} operations that compute places and steps stay exact")
    why: dict[str, Counter[str]] = {}
    for op in before.get_ops():
        name, kind = op.get_friendly_name(), op.get_type_name()
        if kind in ("MatMul", *CONVOLUTIONS) and name not in done:
            if name in keep:
                reason = "kept for quality"
            elif name in exact:
                reason = "computes places or steps"
            elif name in ignored:
                reason = "in ignored_scope"
            elif options.ignored_scope.subgraphs:
                reason = "in ignored_scope.subgraphs, or left by NNCF"
            else:
                reason = "left by NNCF: no kernel of the device takes them as integers, or model_type keeps them"
            why.setdefault(reason, Counter())[kind] += 1
    for reason, kinds in why.items():
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        report.notes.append(f"{role}: as they were: {counts} ({reason})")
