"""Contract tests of what changes models: transforms and quantizers."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ovforge.config.options import validate_options
from ovforge.contracts.extensions import QuantizerExtension
from ovforge.contracts.stages import Phase, Report
from ovforge.testing.plugin import create, extension

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.model.bundle import ModelBundle

__all__ = ["FixedCalibration", "check_quantizer", "check_transform"]


def check_transform(
    module: types.ModuleType, name: str, options: Mapping[str, Any], make_bundle: Callable[[], ModelBundle]
) -> Report:
    """Check a graph transform: it is pure, reports every model that it changed, and its result compiles.

    `make_bundle` returns a new and equal bundle at each call. Returns the transform's report.
    """
    return _check_change(module, "transform", name, options, make_bundle, lambda stage, bundle: stage.apply(bundle))


def check_quantizer(
    module: types.ModuleType,
    name: str,
    options: Mapping[str, Any],
    make_bundle: Callable[[], ModelBundle],
    calibration: Any,
) -> Report:
    """Check a quantizer in the same way, with recorded inputs; `FixedCalibration` holds some.

    It asks for no more than its description says that it needs, and keeps the layers that it is told to keep. Layers
    are compared by name: the models of `make_bundle` must have names of their own, as those of `small_bundle` have.
    """
    described = extension(module, "quantizer", name)
    assert isinstance(described, QuantizerExtension)
    model = described.options_model()
    need = described.needed(validate_options(model, options, where=name))
    watched = _Watched(calibration)
    report = _check_change(
        module, "quantizer", name, options, make_bundle, lambda stage, bundle: stage.quantize(bundle, watched)
    )
    allowed = {"nothing": set(), "inputs": {"inputs"}, "score": {"inputs", "score"}}[need]
    assert watched.asked <= allowed, f"{name} asks for {watched.asked}, and says needs={need!r}: the cache relies on it"
    for role, names in report.layers.items():
        assert role in report.roles, f"{name} lowered layers of {role}, which it does not name as changed"
        known = {op.get_friendly_name() for op in make_bundle().models[role].get_ops()}
        assert set(names) <= known, f"{name} names layers that {role} does not have: {sorted(set(names) - known)}"
        if names:
            _check_keep(module, name, options, make_bundle(), calibration, role, names)
    return report


def _check_keep(
    module: types.ModuleType,
    name: str,
    options: Mapping[str, Any],
    bundle: ModelBundle,
    calibration: Any,
    role: str,
    layers: Sequence[str],
) -> None:
    report = create(module, "quantizer", name, options).quantize(bundle, calibration, {role: [layers[0]]})
    assert layers[0] not in report.layers.get(role, ()), f"{name} lowers {layers[0]}, which it was told to keep"
    others = [layer for layer in layers if layer != layers[0]]
    assert report.layers.get(role) or not others, f"{name} keeps one layer of {len(layers)}, and lowers no other"


class FixedCalibration:
    """A stages.Calibration of given records by role, and of a function that scores models (by default, always 1)."""

    def __init__(
        self,
        records: Mapping[str, Sequence[Mapping[str, Any]]],
        score: Callable[[Mapping[str, ov.Model]], float] = lambda models: 1.0,
    ) -> None:
        self._records, self._score = records, score

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        """Return the first `count` records of `role`."""
        return self._records[role][:count]

    def score(self, models: Mapping[str, ov.Model]) -> float:
        """Return what the function says."""
        return self._score(models)


class _Watched:
    """A calibration that knows what it was asked for."""

    def __init__(self, calibration: Any) -> None:
        self._calibration = calibration
        self.asked: set[str] = set()

    def inputs(self, role: str, count: int) -> Any:
        self.asked.add("inputs")
        return self._calibration.inputs(role, count)

    def score(self, models: Any) -> Any:
        self.asked.add("score")
        return self._calibration.score(models)


def _check_change(
    module: types.ModuleType,
    kind: str,
    name: str,
    options: Mapping[str, Any],
    make_bundle: Callable[[], ModelBundle],
    change: Callable[[Any, ModelBundle], Report],
) -> Report:
    from ovforge.model.runtime import core

    described = extension(module, kind, name)
    phase = getattr(described, "phase", Phase.PRECISION)
    assert callable(phase) or isinstance(phase, Phase), f"{name} states no phase"
    first, second = make_bundle(), make_bundle()
    untouched = {role: _serialized(model) for role, model in first.models.items()}
    report = change(create(module, kind, name, options), first)
    change(create(module, kind, name, copy.deepcopy(options)), second)
    for role, model in first.models.items():
        same = _serialized(model) == untouched.get(role)
        assert same or role in report.roles, f"{name} changed {role} and does not report it: the cache would miss it"
        assert _serialized(model) == _serialized(second.models[role]), f"{name} is not pure: a second run differs"
        core().compile_model(model, "CPU")
    assert report.applied or report.skipped or report.notes, f"{name} reports neither what it did nor why not"
    return report


def _serialized(model: ov.Model) -> bytes:
    """Return the model's XML and weights as bytes, without the names that OpenVINO numbers as it goes."""
    import re

    import openvino as ov

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        xml = re.sub(rb' (name|id)="[^"]*"', b"", path.read_bytes())
        return xml + path.with_suffix(".bin").read_bytes()
