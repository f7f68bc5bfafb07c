"""How quantizers are applied: calibrated by the pipeline itself, and held to the config's [quality]."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ovforge.config.pipeline import CalibrationTable
from ovforge.contracts.stages import Progress
from ovforge.run.calibration import Recorder, TaskCalibration
from ovforge.run.quality import Judge, Outcome, Verdict, failed
from ovforge.run.search import fewest, noise_of_layers

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.config.pipeline import Use
    from ovforge.contracts.stages import Adapter, Report, Task
    from ovforge.model.bundle import ModelBundle
    from ovforge.run.workshop import Workshop

__all__ = ["Quantization"]

_FEW = {"samples": 8, "runs": 2}
"""Recorded inputs that sensitivity by layer is measured with: it only orders layers."""


class Quantization:
    """All quantizers of a pipeline, on the models of `reference`, which stay as they are."""

    def __init__(self, workshop: Workshop, reference: ModelBundle) -> None:
        self._workshop, self._reference, self._recipe = workshop, reference, workshop.recipe
        self._table = workshop.recipe.config.quality
        self._given = workshop.recipe.config.calibration or CalibrationTable()
        self._judge = Judge(
            self._table,
            lambda: workshop.finish(reference),
            self._task,
            lambda task, count: self._recipe.held_out.take(task, count, self._recipe.calibration),
            workshop.progress,
        )
        self._calibration = self._recorded(self._given)

    def run(self) -> tuple[ModelBundle, list[Report], Outcome | None]:
        """Return the quantized bundle, a report for each quantizer, and what the gate said where there is one.

        Raises QualityError where it does not pass.
        """
        workshop, table, identity = self._workshop, self._table, self._reference.digest()
        known = workshop.stored_outcome(identity) if table else None
        bundle, reports = workshop.lower(self._reference, self._calibration, known.kept if known else {})
        if table is None:
            return bundle, reports, None
        if known is None:
            verdict = self._judge.judge(workshop.finish(bundle))
            known = self._outcome(verdict, reports)
            if not known.passed and table.on_fail == "error":
                raise failed(known, verdict, self._pictures)
            if not known.passed and table.on_fail == "search":
                known = self._search(bundle, reports, known, verdict)
                bundle, reports = workshop.lower(self._reference, self._calibration, known.kept)
            workshop.store_outcome(identity, known)
        if not known.passed:
            warnings.warn(f"the quantized pipeline scores {known}", stacklevel=5)
        return bundle, reports, known

    def _recorded(self, table: CalibrationTable) -> TaskCalibration:
        workshop, examples, reference = self._workshop, self._recipe.calibration, self._reference
        recorder = Recorder(
            start=lambda: (workshop.compile(reference), lambda compiled: workshop.task(compiled, examples.options)),
            examples=examples.take,
            samples=table.samples,
            runs=table.runs,
            seed=table.seed,
            spill=table.spill,
            cache=workshop.cache,
            ingredients=workshop.calibration_key(reference.digest(), table),
            protection=self._recipe.protection,
            progress=workshop.progress,
        )
        return TaskCalibration(recorder, self._score)

    def _score(self, models: Mapping[str, ov.Model]) -> float:
        changed = self._reference.copy()
        for role, model in models.items():
            changed.models[role] = model.clone()
            changed.identity.pop(role, None)
        return self._judge.score(self._workshop.finish(changed))

    def _task(self, bundle: ModelBundle) -> Task:
        compiled = self._workshop.compile(bundle)
        self._workshop.adapters(compiled, _no_adapter)
        return self._workshop.task(compiled, self._recipe.held_out.options)

    @property
    def _pictures(self) -> Path:
        assert self._table is not None
        return self._recipe.base / Path(self._table.save).expanduser()

    def _outcome(
        self,
        verdict: Verdict,
        reports: Sequence[Report],
        kept: Mapping[str, Collection[str]] | None = None,
    ) -> Outcome:
        assert self._table is not None
        return Outcome(
            metric=self._judge.metric,
            by=self._table.by,
            limit=self._table.limit,
            score=verdict.score(self._table.by),
            scores=verdict.scores,
            kept={role: sorted(names) for role, names in (kept or {}).items()},
            lowered=sum(len(names) for report in reports for names in report.layers.values()),
        )

    # -- the search --------------------------------------------------------------------------------------------------

    def _search(self, lowered: ModelBundle, reports: Sequence[Report], outcome: Outcome, verdict: Verdict) -> Outcome:
        """Return the outcome with the fewest layers kept, the most sensitive first, or raise QualityError."""
        ranked = self._ranked(lowered, reports)
        if not ranked:
            names = ", ".join(step.offer.extension.name for step in self._recipe.quantizers)
            hint = f"{names} names no layers, so that none can be kept: take other options, or a lower limit."
            raise failed(outcome, verdict, self._pictures, hint=hint)
        tried: dict[int, Outcome] = {}
        identity = self._reference.digest()

        def keep_first(count: int) -> dict[str, list[str]]:
            keep: dict[str, list[str]] = {}
            for role, name in ranked[:count]:
                keep.setdefault(role, []).append(name)
            return keep

        def passes(count: int) -> bool:
            keep = keep_first(count)
            most = (len(ranked) - 1).bit_length() + 1
            self._workshop.progress(Progress("search", len(tried), most, f"{count} of {len(ranked)} layers kept"))
            known = self._workshop.stored_outcome(identity, keep)
            if known is None:
                known = self._outcome(*self._tried(keep), keep)
                self._workshop.store_outcome(identity, known, keep)
            tried[count] = replace(known, limit=outcome.limit)
            return tried[count].passed

        least = fewest(len(ranked), passes)
        self._workshop.progress(Progress("search", len(tried), len(tried)))
        if least is None:
            kept = keep_first(len(ranked) - 1)
            found, made = self._tried(kept)
            hint = "This quantization does not fit this model: take another, or a lower limit."
            more = ", with every layer kept but the least sensitive one"
            raise failed(self._outcome(found, made, kept), found, self._pictures, more, hint)
        return replace(tried[least], trials=len(tried))

    def _tried(self, keep: Mapping[str, Collection[str]]) -> tuple[Verdict, list[Report]]:
        """Quantize all but what is to be kept, and judge that."""
        bundle, reports = self._workshop.lower(self._reference, self._calibration, keep, trial=True)
        return self._judge.judge(self._workshop.finish(bundle)), reports

    def _ranked(self, lowered: ModelBundle, reports: Sequence[Report]) -> list[tuple[str, str]]:
        """Return (role, layer) of all that was lowered, the most sensitive first."""
        layers: dict[str, dict[str, None]] = {}
        for report in reports:
            for role, names in report.layers.items():
                layers.setdefault(role, {}).update(dict.fromkeys(names))
        few = self._recorded(self._given.model_copy(update=_FEW))
        noise: dict[tuple[str, str], float] = {}
        for role, named in layers.items():
            self._workshop.progress(Progress("sensitivity", len(noise), sum(map(len, layers.values())), role))
            original, changed = self._reference.models[role], lowered.models[role]
            found = noise_of_layers(original, changed, list(named), few.inputs(role, _FEW["samples"]))
            noise |= {(role, name): found.get(name, 0.0) for name in named}
        return sorted(noise, key=lambda layer: (-noise[layer], layer))


def _no_adapter(use: Use) -> Adapter:
    raise AssertionError("adapters are loaded into running pipelines")
