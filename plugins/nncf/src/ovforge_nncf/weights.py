"""Weights in fewer bits, by nncf.compress_weights, with recorded inputs where an algorithm asks for them."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ovforge.contracts import Calibration, Report, Skipped
from ovforge.errors import ConfigError
from ovforge.model import ModelBundle, core
from ovforge_nncf.graph import CONVOLUTIONS, Lowered, constant_bytes, counted, float_bytes, lowered
from ovforge_nncf.running import check_memory, chosen_roles, dataset, in_plain_words, models_of, quiet
from ovforge_nncf.scope import IgnoredScope
from ovforge_nncf.weights_options import WeightsOptions

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["WeightCompression", "ability"]


class WeightCompression:
    """Replaces weights by integers or small floats and scales; the device multiplies in its own precision."""

    def __init__(self, options: WeightsOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Compress each role's weights. Raises ConfigError for a role that there is not, or a mode that cannot run."""
        options, where = self.options, f"quantize ({self.options.NAME})"
        roles = chosen_roles(options.roles, bundle, where, stepped=False)
        report, done = Report(bytes_before=0, bytes_after=0), dict[str, Any]()
        if note := runs_here(options, where):
            report.notes.append(note)
        models = models_of(roles, bundle, options.ignored_scope, keep, where)
        options.backup_scope.check_in(models, f"{where}.backup_scope")
        for role, model in models.items():
            self._check_groups(role, model, keep.get(role, ()), where)
            if options.uses_data:
                check_memory(2 * float_bytes(model), where, role)
        for role, model in models.items():
            own = {op.get_friendly_name() for op in model.get_ops()}
            before = set(lowered(model))
            compressed = self._compressed(role, model, calibration, keep.get(role, ()), where)
            found = [op for op in lowered(compressed) if op.name in own and op not in before]
            if not found:
                report.skipped.append(Skipped(role, "it has no weights that could be compressed, or all are already"))
                continue
            report.roles += (role,)
            report.layers[role] = [op.name for op in found]
            report.applied.append(f"{role}: {counted(found)}")
            report.notes += [f"{role}: {why}" for why in self._not_lower(model, found)]
            if options.lora_correction:
                new = [op for op in compressed.get_ops() if op.get_friendly_name() not in own]
                branches = sum(op.get_type_name() == "MatMul" for op in new) // 2  # each has two matrices
                report.notes.append(f"{role}: {branches} low-rank branches")
            report.bytes_before = (report.bytes_before or 0) + constant_bytes(model)
            report.bytes_after = (report.bytes_after or 0) + constant_bytes(compressed)
            done[role] = compressed
        bundle.models.update(done)  # all or none
        return report

    def _not_lower(self, model: ov.Model, found: Sequence[Lowered]) -> Iterator[str]:
        """Say why operations have 8 bits although fewer were asked for; NNCF's rules, in its own order."""
        options = self.options
        wider = {op.name for op in found if op.weights in ("INT8", "FP8")}
        if options.is_int8 or options.mode.startswith(("fp8", "mxfp8")) or not wider:
            return
        ordered = [op for op in model.get_ordered_ops() if op.get_friendly_name() in {each.name for each in found}]
        matrices = [op.get_friendly_name() for op in ordered if op.get_type_name() == "MatMul"]
        group = options.group
        backed = options.backup_scope.found_in(model)
        why: dict[str, list[str]] = {}
        for op in ordered:
            name, kind = op.get_friendly_name(), op.get_type_name()
            if name not in wider:
                continue
            row = _row(op)
            if name in backed:
                reason = "in backup_scope"
            elif kind in CONVOLUTIONS:
                reason = f"NNCF gives convolutions no {options.mode}"
            elif kind != "MatMul":
                reason = "embeddings keep 8 bits unless all_layers = true"
            elif group > 0 and row and row % group:
                reason = f"a row of {row} weights is not divided by group_size = {group}"
            elif not options.all_layers and name == matrices[-1]:
                reason = "the last layer keeps 8 bits unless all_layers = true"
            else:
                reason = (
                    f"outside of ratio = {options.ratio:g}" if options.ratio else f"NNCF gives it no {options.mode}"
                )
            why.setdefault(reason, []).append(name)
        for reason, names in why.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"in 8 bits, not {options.mode}: {names[0]}{more} ({reason})"

    def _check_groups(self, role: str, model: ov.Model, keep: Collection[str], where: str) -> None:
        """Raise ConfigError if groups of floats would be a convolution's backup: NNCF has them for matrices."""
        options = self.options
        if not options.groups_backup:
            return
        left = {*keep, *options.ignored_scope.found_in(model)}
        for op in model.get_ops():
            if op.get_type_name() in CONVOLUTIONS and op.get_friendly_name() not in left:
                raise ConfigError(
                    f"{options.mode} gives convolutions groups of 8-bit floats, which NNCF has for matrices alone",
                    where=f"{where}, role {role}",
                    hint="Set backup_mode = 'int8_asym' or 'none', or ignored_scope = {types = ['Convolution']}.",
                )

    def _compressed(
        self, role: str, model: ov.Model, calibration: Calibration, keep: Collection[str], where: str
    ) -> ov.Model:
        import nncf

        options = self.options
        backed = options.backup_scope.found_in(model) - {*keep, *options.ignored_scope.found_in(model)}
        arguments = {**options.arguments(), "ignored_scope": options.ignored_scope.to_nncf(model, {*keep, *backed})}
        if options.uses_data:
            arguments["dataset"], _ = dataset(calibration, role, options.subset_size, where)
        with in_plain_words(where, role):
            try:
                # A copy, which shares the weights: nncf changes what it is given, and may be interrupted.
                compressed: ov.Model = nncf.compress_weights(model.clone(), **arguments)
            except nncf.errors.InvalidGroupSizeError as error:
                named = [f"{name} ({row})" for name, row in re.findall(r'"(.+?)" \(channel size: (\d+)\)', str(error))]
                told = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
                raise ConfigError(
                    f"groups of {options.group} do not divide the rows of weights of {told or 'some layers'}",
                    where=f"{where}, role {role}",
                    hint="Set group_size to a number that does, -1 for whole rows, or group_size_fallback to 'ignore'"
                    " or 'adjust'.",
                ) from error
            if backed:
                # A constant that is named is ignored wherever it is used, so that only what takes it is named.
                users = (op for op in compressed.get_ops() if op.get_type_name() != "Constant")
                rest = {op.get_friendly_name() for op in users} - backed
                scope = IgnoredScope(names=tuple(sorted(rest))).to_nncf(compressed)
                compressed = nncf.compress_weights(compressed, ignored_scope=scope, **options.backup_arguments())
        return compressed


def _row(op: ov.Node) -> int | None:
    """Return how many weights one output of a matrix product sums up; None if no input is a matrix of weights."""
    transposed = op.get_attributes().get("transpose_b", False)
    shape = op.input_value(1).get_partial_shape()
    place = -1 if transposed else -2
    return shape[len(shape) + place].get_length() if shape.is_static and len(shape) > 1 else None


def runs_here(options: WeightsOptions, where: str) -> str:
    """Return a note on how this CPU runs the mode, or "". Raises ConfigError if it does not run it at all."""
    found = ability(options.mode)
    if found == "compressed":
        return ""
    if found == "unpacked":
        return (
            f"OpenVINO's CPU plugin here computes with {options.mode} weights after it has made floats of them: small "
            "on disk, and not in memory nor faster"
        )
    raise ConfigError(f"this OpenVINO cannot run {options.mode} weights: {found}", where=f"{where}.mode")


@functools.cache
def ability(mode: str) -> str:
    """Return "compressed" where the CPU's matrix products read weights of `mode` as they are, "unpacked" where they are
    made floats of first, or what the runtime says where it runs them not at all. Tried once on a small model.
    """
    import nncf
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    width = 128
    values = np.random.default_rng(0).normal(size=(width, width)).astype(np.float16)
    x = ops.parameter([1, width], np.float32, name="x")
    model = ov.Model([ops.matmul(x, ops.convert(ops.constant(values), "f32"), False, True)], [x], "probe")
    table = tuple(np.linspace(-1, 1, 16)) if mode == "codebook" else None
    options = WeightsOptions.model_validate(
        {"mode": mode, "codebook": table} | ({} if mode.startswith("int8") else {"all_layers": True})
    )
    inputs = np.ones((1, width), np.float32)
    data: dict[str, Any] = {"dataset": nncf.Dataset([inputs])} if options.uses_data else {}
    try:
        with quiet():
            small = nncf.compress_weights(model, **options.arguments(), **data)
        compiled = core().compile_model(small, "CPU")
        compiled(inputs)
    except Exception as error:
        return " ".join(str(error).split())[:300]
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    ran = {
        layer["runtimePrecision"].astype(str) for layer in layers if layer["layerType"].astype(str) == "FullyConnected"
    }
    return "compressed" if ran and not ran & {"f32", "f16", "bf16"} else "unpacked"
