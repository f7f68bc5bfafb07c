"""How quantizers are applied: calibrated by the pipeline itself, and held to the config's [quality]."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.contracts import Progress, Quantized
from ovforge.errors import ConfigError
from ovforge.store import digest_file, fingerprint
from ovforge_quality.arrays import ArrayCalibration, are_arrays, array_files
from ovforge_quality.examples import Examples, check_apart, read_examples
from ovforge_quality.gate import Judge, JudgedQuality, Verdict, failed, outcome_of
from ovforge_quality.recording import Recorder, TaskCalibration
from ovforge_quality.search import fewest, noise_of_layers
from ovforge_quality.sections import CalibrationSection, QualitySection

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.contracts import Calibration, DriverContext, Need, QuantizationRun, Report
    from ovforge.model import ModelBundle

__all__ = ["QualityDriver"]

_FEW = {"samples": 8, "runs": 2}
"""Recorded inputs that sensitivity by layer is measured with: it only orders layers."""

_OUTCOME = "outcome.json"

Digest = Callable[[Path], str]


class QualityDriver:
    """The driver: its sections, with all inputs that they name read and checked."""

    def __init__(self, context: DriverContext) -> None:
        self.calibration: CalibrationSection = context.sections.get("calibration") or CalibrationSection()
        self.quality: QualitySection | None = context.sections.get("quality")
        self.base, self.runs_task = context.base, context.task is not None
        self.arrays = self._arrays(context)
        self.examples, self.held_out = self._read(context)

    @property
    def judges(self) -> bool:
        """Whether there is a gate."""
        return self.quality is not None

    def content(self, need: Need, digest: Digest) -> Mapping[str, Any]:
        """Return what a quantizer gets from the calibration, and from the gate if it asks for scores."""
        content = self.recorded_content(self.calibration, digest)
        return {**content, "quality": self.judged_content(digest)} if need == "score" else content

    def recorded_content(self, section: CalibrationSection, digest: Digest) -> dict[str, Any]:
        """Return what recorded inputs depend on, besides the models and who calls them."""
        if not self.runs_task:
            files = array_files(self.arrays) if self.arrays else []
            return {"samples": section.samples, "arrays": [[f.parent.name, f.name, digest(f)] for f in files]}
        return {"samples": section.samples, "runs": section.runs, **self.examples.content(digest)}

    def judged_content(self, digest: Digest) -> dict[str, Any]:
        """Return what a score depends on, besides the models and who calls them."""
        table = self.quality
        metric = {"metric": table.metric, "by": table.by, "samples": table.samples} if table else {}
        return {**metric, **self.held_out.content(digest)}

    def known(self, run: QuantizationRun) -> JudgedQuality | None:
        """Return what the gate said, if it is stored."""
        return _Quantization(self, run).stored() if self.quality else None

    def run(self, run: QuantizationRun) -> Quantized:
        """Quantize, and hold the result to the gate. Raises QualityError if it does not pass."""
        return _Quantization(self, run).run()

    def _arrays(self, context: DriverContext) -> Path | None:
        """Return the file or folder of arrays that a model is calibrated with if no task runs it."""
        section = self.calibration
        if section.file is None or (context.task is None and (section.inputs or section.options)):
            return None
        path = self.base / Path(section.file).expanduser()
        arrays = are_arrays(path)
        if arrays and context.task is not None:
            raise ConfigError(
                f"it holds arrays, and the task {context.task.name} records what its models are given",
                where=f"calibration.file: {path}",
                hint="Give the task's inputs, or quantize the model without a task.",
            )
        if context.task is None and not path.exists():
            raise ConfigError("no such file or folder", where=f"calibration.file: {path}")
        if context.task is None and not arrays:
            raise ConfigError(
                "no task runs this model, and it takes arrays: a .npz, or a folder of .npz or .npy files",
                where=f"calibration.file: {path}",
                hint="Save them as the model is given them, with the names of its inputs; or name the task.",
            )
        return path if arrays else None

    def _read(self, context: DriverContext) -> tuple[Examples, Examples]:
        """Return the inputs that calibrate and those that judge."""
        if context.task is None:
            return Examples.none("calibration"), Examples.none("quality")
        model, name, base = context.task.inputs_model(), context.task.name, self.base
        calibration = read_examples(self.calibration, model, base, key="calibration", task=name)
        # Without a table of its own, what is judged by is called as what is calibrated with.
        common = self.calibration.options
        table: CalibrationSection | QualitySection
        table = self.quality or CalibrationSection(options=common, seed=self.calibration.seed)
        if self.quality is not None and not self.quality.options:
            table = self.quality.model_copy(update={"options": common})
        held_out = read_examples(table, model, base, key="quality", task=name)
        check_apart(calibration, held_out)
        return calibration, held_out


class _Quantization:
    """All quantizers of one pipeline."""

    def __init__(self, driver: QualityDriver, run: QuantizationRun) -> None:
        self._driver, self._run, self._table = driver, run, driver.quality
        self._judge = Judge(
            self._table,
            lambda: run.start(run.bundle, driver.held_out.options, approximate=False),
            lambda bundle: run.start(bundle, driver.held_out.options),
            lambda task, count: driver.held_out.take(task, count, driver.examples),
            run.progress,
        )
        self._calibration: Calibration = self._recorded(driver.calibration)

    def run(self) -> Quantized:
        """Return the quantized bundle, a report for each quantizer, and what the gate said if there is one."""
        run, table = self._run, self._table
        known = self.stored() if table else None
        bundle, reports = run.quantize(self._calibration, known.kept if known else {})
        if table is None:
            return Quantized(bundle, reports)
        if known is None:
            verdict = self._judge.judge(bundle)
            known = self._outcome(verdict, reports)
            if not known.passed and table.on_fail == "error":
                raise failed(known, verdict, self._pictures)
            if not known.passed and table.on_fail == "search":
                known = self._search(bundle, reports, known, verdict)
                bundle, reports = run.quantize(self._calibration, known.kept)
            self._store(known)
        if not known.passed:
            what = "quantized" if run.quantizers else "changed"
            warnings.warn(f"the {what} pipeline scores {known}", stacklevel=5)
        return Quantized(bundle, reports, known)

    # -- what is stored ----------------------------------------------------------------------------------------------

    def stored(self, trial: Mapping[str, Collection[str]] | None = None) -> JudgedQuality | None:
        """Return what the gate said in the end, or of a trial that keeps layers, if it is known."""
        store, key = self._run.store, self._key(trial)
        source = store.find(key) if store and key is not None else None
        return outcome_of(json.loads(source.read(_OUTCOME))) if source else None

    def _store(self, outcome: JudgedQuality, trial: Mapping[str, Collection[str]] | None = None) -> None:
        """Remember what the gate said: a search that is interrupted goes on."""
        store, key = self._run.store, self._key(trial)
        if store is not None and key is not None:
            data = json.dumps(outcome.as_stored()).encode()
            label = f"quality: {outcome}" if trial is None else "trial of a search"
            store.make(key, lambda put: put(_OUTCOME, data), label=label)

    def _key(self, trial: Mapping[str, Collection[str]] | None) -> dict[str, Any] | None:
        """Return what the outcome depends on; a trial's on the layers that it keeps, and on no limit."""
        table, callers = self._table, self._run.callers
        if table is None or callers is None:
            return None
        key: dict[str, Any] = {"stage": "quality", "limit": table.limit, "on_fail": table.on_fail}
        if trial is not None:
            kept = {role: sorted(names) for role, names in sorted(trial.items())}
            # Keys are plain: the layers of encrypted models are not named in them.
            key = {"stage": "quality trial", "keep": fingerprint(kept) if self._run.protection else kept}
        return {**key, **callers, **self._run.steps, "judge": self._driver.judged_content(digest_file)}

    def _recorded(self, section: CalibrationSection) -> Calibration:
        if not self._driver.runs_task:
            return ArrayCalibration(self._driver.arrays, self._run.bundle, self._score, section.samples)
        examples = self._driver.examples
        content = self._driver.recorded_content(section, digest_file)
        recorder = Recorder(self._run, examples.take, examples.options, section, content)
        return TaskCalibration(recorder, self._score)

    def _score(self, models: Mapping[str, ov.Model]) -> float:
        changed = self._run.bundle.copy()
        for role, model in models.items():
            changed.put(role, model.clone())
        return self._judge.score(changed)

    @property
    def _pictures(self) -> Path:
        assert self._table is not None
        return self._driver.base / Path(self._table.save).expanduser()

    def _outcome(
        self,
        verdict: Verdict,
        reports: Sequence[Report],
        kept: Mapping[str, Collection[str]] | None = None,
    ) -> JudgedQuality:
        assert self._table is not None
        return JudgedQuality(
            metric=self._judge.metric,
            by=self._table.by,
            limit=self._table.limit,
            score=verdict.score(self._table.by),
            scores=verdict.scores,
            kept={role: sorted(names) for role, names in (kept or {}).items()},
            lowered=sum(len(names) for report in reports for names in report.layers.values()),
        )

    # -- the search --------------------------------------------------------------------------------------------------

    def _search(
        self, lowered: ModelBundle, reports: Sequence[Report], outcome: JudgedQuality, verdict: Verdict
    ) -> JudgedQuality:
        """Return the outcome with the fewest layers kept, the most sensitive first, or raise QualityError."""
        ranked = self._ranked(lowered, reports)
        if not ranked:
            names = ", ".join(self._run.quantizers) or "an approximation"
            hint = f"{names} names no layers, so that none can be kept: take other options, or a lower limit."
            raise failed(outcome, verdict, self._pictures, hint=hint)
        tried: dict[int, JudgedQuality] = {}

        def keep_first(count: int) -> dict[str, list[str]]:
            keep: dict[str, list[str]] = {}
            for role, name in ranked[:count]:
                keep.setdefault(role, []).append(name)
            return keep

        def passes(count: int) -> bool:
            keep = keep_first(count)
            most = (len(ranked) - 1).bit_length() + 1
            self._run.progress(Progress("search", len(tried), most, f"{count} of {len(ranked)} layers kept"))
            known = self.stored(keep)
            if known is None:
                known = self._outcome(*self._tried(keep), keep)
                self._store(known, keep)
            tried[count] = replace(known, limit=outcome.limit)
            return tried[count].passed

        least = fewest(len(ranked), passes)
        self._run.progress(Progress("search", len(tried), len(tried)))
        if least is None:
            kept = keep_first(len(ranked) - 1)
            found, made = self._tried(kept)
            hint = "This quantization does not fit this model: take another, or a lower limit."
            more = ", with every layer kept but the least sensitive one"
            raise failed(self._outcome(found, made, kept), found, self._pictures, more, hint)
        return replace(tried[least], trials=len(tried))

    def _tried(self, keep: Mapping[str, Collection[str]]) -> tuple[Verdict, list[Report]]:
        """Quantize all but what is to be kept, and judge that."""
        bundle, reports = self._run.quantize(self._calibration, keep, trial=True)
        return self._judge.judge(bundle), reports

    def _ranked(self, lowered: ModelBundle, reports: Sequence[Report]) -> list[tuple[str, str]]:
        """Return (role, layer) of all that was lowered, the most sensitive first."""
        layers: dict[str, dict[str, None]] = {}
        for report in reports:
            for role, names in report.layers.items():
                layers.setdefault(role, {}).update(dict.fromkeys(names))
        few = self._recorded(self._driver.calibration.model_copy(update=_FEW))
        noise: dict[tuple[str, str], float] = {}
        for role, named in layers.items():
            self._run.progress(Progress("sensitivity", len(noise), sum(map(len, layers.values())), role))
            original, changed = self._run.bundle.models[role], lowered.models[role]
            found = noise_of_layers(original, changed, list(named), few.inputs(role, _FEW["samples"]))
            noise |= {(role, name): found.get(name, 0.0) for name in named}
        return sorted(noise, key=lambda layer: (-noise[layer], layer))
