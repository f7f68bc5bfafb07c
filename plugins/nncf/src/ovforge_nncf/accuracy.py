"""Quantization that gives back operations until the pipeline's own results are close enough.

nncf.quantize_with_accuracy_control, with the score of the config's [quality] as its metric: each trial model takes its
role's place in the pipeline, which runs on inputs that calibration has not seen.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ovforge.contracts import Calibration, Report, Skipped
from ovforge.errors import OvforgeError
from ovforge.model import ModelBundle
from ovforge_nncf.graph import lowered
from ovforge_nncf.ptq import check_models, describe
from ovforge_nncf.ptq_options import PtqBase
from ovforge_nncf.running import chosen_roles, dataset, has_fast_int8, in_plain_words, models_of, speed_note
from ovforge_nncf.statistics import statistics_apart

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["AccuracyControl", "AccuracyOptions"]


class AccuracyOptions(PtqBase):
    """Options of `nncf-accuracy`: those of `nncf-ptq` in INT8, and how far the score may fall."""

    NAME: ClassVar[str] = "nncf-accuracy"

    max_drop: float = Field(0.01, ge=0, description="How far the score may fall, over all roles together.")
    drop_type: Literal["absolute", "relative"] = Field("absolute", description="Of the score, or a part of it.")
    max_num_iterations: int | None = Field(None, ge=1, description="Operations given back at most, one at a time.")
    tune_hyperparams: bool = Field(False, description="First try other parameters of quantization; takes long.")
    restore: Literal["activations_and_weights", "only_activations"] = Field(
        "activations_and_weights", description="only_activations: what is given back keeps its weights in 8 bits."
    )


class AccuracyControl:
    """Quantizes, scores, and gives back what costs most until the score is within its limit."""

    def __init__(self, options: AccuracyOptions) -> None:
        self.options = options

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Quantize each role in turn, within what the ones before it left of `max_drop`.

        A role whose score stays below the limit is left as it was, and reported as skipped.
        """
        options, where = self.options, f"quantize ({self.options.NAME})"
        roles = chosen_roles(options.roles, bundle, where, stepped=True)
        models = models_of(roles, bundle, options.ignored_scope, keep, where)
        check_models(models, options, where)
        report, done = Report(bytes_before=0, bytes_after=0), dict[str, Any]()
        limit: float | None = None
        for role, model in models.items():
            kept = keep.get(role, ())
            data, count = dataset(calibration, role, options.subset_size, where)
            scores = Scores(lambda trial, role=role: calibration.score({**done, role: trial}))  # type: ignore[misc]
            quantized = self._controlled(role, model, data, kept, where, scores, limit)
            if limit is None:
                limit = self._limit(scores.first)
            reached = scores.of(quantized)
            said = f"score {reached:.4g}, from {scores.first:.4g}"
            if reached < limit - 1e-9:
                report.skipped.append(
                    Skipped(role, f"{said}, is below the limit of {limit:.4g}; it was left as it was")
                )
                continue
            describe(report, role, model, quantized, options, kept)
            report.notes.append(f"{role}: {said}, limit {limit:.4g}, {count} records, {scores.taken} trials")
            if back := sorted(scores.lowered - {op.name for op in lowered(quantized)}):
                report.notes.append(f"{role}: given back for the score: {', '.join(back)}")
            done[role] = quantized
        bundle.models.update(done)  # all or none
        if report.roles:
            report.notes.append(speed_note(has_fast_int8()))
        return report

    def _limit(self, first: float) -> float:
        drop = self.options.max_drop
        return first - (drop * abs(first) if self.options.drop_type == "relative" else drop)

    def _controlled(
        self,
        role: str,
        model: ov.Model,
        data: Any,
        keep: Collection[str],
        where: str,
        scores: Scores,
        limit: float | None,
    ) -> ov.Model:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedAccuracyRestorerParameters, RestoreMode

        options = self.options
        drop: dict[str, Any] = {"max_drop": options.max_drop, "drop_type": nncf.DropType(options.drop_type)}
        if limit is not None:  # roles before this one took a part of what may be lost
            drop = {"max_drop": max(scores.of(model) - limit, 0.0), "drop_type": nncf.DropType.ABSOLUTE}
        iterations = {} if options.max_num_iterations is None else {"max_num_iterations": options.max_num_iterations}
        restorer = AdvancedAccuracyRestorerParameters(
            # The pipeline's score is one figure, and running it takes all cores: nothing to rank by, or side by side.
            ranking_subset_size=1, num_ranking_workers=1, tune_hyperparams=options.tune_hyperparams,
            restore_mode=RestoreMode(options.restore), **iterations,
        )  # fmt: skip
        scope = options.ignored_scope.to_nncf(model, keep)
        advanced = options.advanced_parameters()
        arguments = {**drop, **options.arguments()}
        try:
            with in_plain_words(where, role), _models_instead_of_compiled(), statistics_apart():
                quantized: ov.Model = nncf.quantize_with_accuracy_control(
                    model,
                    data,
                    nncf.Dataset([None]),  # the pipeline has its own inputs, all of which a score is made of
                    scores,
                    ignored_scope=scope,
                    advanced_quantization_parameters=advanced,
                    advanced_accuracy_restorer_parameters=restorer,
                    **arguments,
                )
        except OvforgeError:
            if scores.error is not None:
                raise scores.error from None
            raise
        return quantized


class Scores:
    """NNCF's validation function: scores of models in the pipeline, each model in a row once."""

    def __init__(self, score: Callable[[ov.Model], float]) -> None:
        self._score, self._stdout = score, sys.stdout
        self._last: tuple[ov.Model, float] | None = None
        self.first = 0.0
        """Of the model before quantization."""
        self.lowered: set[str] = set()
        """Operations that were lowered before any was given back."""
        self.taken = 0
        self.error: Exception | None = None
        """What the pipeline raised: NNCF would try again."""

    def of(self, model: ov.Model) -> float:
        """Return a model's score."""
        if self._last is None or self._last[0] is not model:
            with contextlib.redirect_stdout(self._stdout):  # the pipeline may show progress, NNCF is kept quiet
                self._last = model, float(self._score(model))
            self.first = self._last[1] if self.taken == 0 else self.first
            self.taken += 1
            self.lowered = self.lowered or {op.name for op in lowered(model)}
        return self._last[1]

    def __call__(self, model: ov.Model, data: Iterable[Any]) -> tuple[float, list[float]]:
        """Return the score, and the same as that of the only item there is."""
        for _ in data:  # nncf counts items by having them taken
            pass
        if self.error is not None:
            raise self.error
        try:
            score = self.of(model)
        except Exception as error:
            self.error = error
            raise
        return score, [score]


@contextlib.contextmanager
def _models_instead_of_compiled() -> Iterator[None]:
    """Have NNCF hand its validation function the model itself.

    NNCF compiles each trial alone and passes that on; the pipeline needs the graph, to compile it as its device and
    shapes ask, and the first compilation would be in vain.
    """
    import openvino as ov
    from nncf.quantization.algorithms.accuracy_control import openvino_backend

    class Namespace:
        """Openvino as that module sees it."""

        compile_model = staticmethod(lambda model, *arguments, **options: model)

        def __getattr__(self, name: str) -> Any:
            return getattr(ov, name)

    original = openvino_backend.ov
    openvino_backend.ov = Namespace()
    try:
        yield
    finally:
        openvino_backend.ov = original
