"""The gate: a quantized pipeline against the unquantized one, on inputs that calibration has not seen."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.contracts import Progress, Task, ignore_progress
from ovforge.errors import ConfigError, ModelError, QualityError
from ovforge.model import METRICS, OWN_METRIC, Result
from ovforge.store import atomic_write
from ovforge_quality.sections import QualitySection

if TYPE_CHECKING:
    from ovforge.model import ModelBundle

__all__ = ["Judge", "JudgedQuality", "Verdict", "failed", "outcome_of", "save_worst"]

WORST = 3
"""How many pairs of pictures are saved."""


@dataclass(frozen=True, slots=True)
class JudgedQuality:
    """What the gate said. `kept` names the layers, by role, that a search left in higher precision."""

    metric: str
    by: str
    limit: float
    score: float
    scores: tuple[float, ...]
    kept: dict[str, list[str]] = field(default_factory=dict)
    lowered: int = 0
    """Layers that are lowered, without those that are kept."""
    trials: int = 0
    """Sets of layers that a search tried."""

    @property
    def passed(self) -> bool:
        """Whether the score reaches the limit."""
        return self.score >= self.limit

    def as_stored(self) -> dict[str, Any]:
        """Return it as `outcome_of` reads it."""
        return asdict(self)

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        unit = METRICS[self.metric].unit if self.metric in METRICS else ""
        text = f"{self.metric} {number(self.score, unit)} ({self.by} of {len(self.scores)})"
        text += f", {'at least' if self.passed else 'below'} {number(self.limit, unit)}"
        count = sum(map(len, self.kept.values()))
        return text + (f"; {count} of {count + self.lowered} layers kept" if count else "")


def number(score: float, unit: str = "") -> str:
    """Return a score as people write it."""
    return f"{score:.4f}" if not unit else f"{score:.2f} {unit}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Scores of one pipeline, its results, and those that it is held against; None if it could compute none."""

    scores: tuple[float, ...]
    results: tuple[Result | None, ...]
    expected: tuple[Result, ...]
    inputs: tuple[Any, ...]
    said: str = ""
    """What went wrong, where a result could not be computed."""

    def score(self, by: str) -> float:
        """Return the mean's score, or the worst one's."""
        return min(self.scores) if by == "worst" else statistics.fmean(self.scores)


class Judge:
    """Compares pipelines with one that is the reference, whose results are computed once.

    `reference` makes the reference's task, and `start` one on a bundle; `inputs` says what to call them with.
    """

    def __init__(
        self,
        table: QualitySection | None,
        reference: Callable[[], Task],
        start: Callable[[ModelBundle], Task],
        inputs: Callable[[Task, int], Sequence[Any]],
        progress: Callable[[Progress], None],
    ) -> None:
        self._table, self._reference, self._start, self._inputs = table, reference, start, inputs
        self._progress = progress
        self._expected: tuple[Result, ...] | None = None
        self._calls: tuple[Any, ...] = ()
        self._compare: Callable[[Any, Any], float] | None = None
        self.metric = ""

    @property
    def by(self) -> str:
        """Whose score counts."""
        return self._table.by if self._table else "mean"

    def judge(self, bundle: ModelBundle) -> Verdict:
        """Run the pipeline on every input and score its results.

        A model that computes no numbers has the worst score there is; other errors are the caller's.
        """
        expected = self._expect()
        task, said = self._start(bundle), ""
        results: list[Result | None] = []
        scores: list[float] = []
        for call, reference in zip(self._calls, expected, strict=True):
            self._progress(Progress("quality", len(results), len(expected), "quantized"))
            try:
                result = task(call, ignore_progress)
                scores.append(self._score(result, reference))
                results.append(result.compact())
            except ModelError as error:
                said = said or str(error)
                scores.append(METRICS[self.metric].worst if self.metric in METRICS else 0.0)
                results.append(None)
        self._progress(Progress("quality", len(results), len(expected), "quantized"))
        return Verdict(tuple(scores), tuple(results), expected, self._calls, said)

    def score(self, bundle: ModelBundle) -> float:
        """Return the score of a pipeline by itself."""
        return self.judge(bundle).score(self.by)

    def _expect(self) -> tuple[Result, ...]:
        if self._expected is None:
            task = self._reference()
            self._compare = getattr(task, "compare", None)
            self._calls = tuple(self._inputs(task, self._table.samples if self._table else 8))
            results: list[Result] = []
            for call in self._calls:
                self._progress(Progress("reference", len(results), len(self._calls), "unquantized"))
                results.append(task(call, ignore_progress).compact())
            self._progress(Progress("reference", len(results), len(self._calls), "unquantized"))
            self.metric = self._chosen(results)
            _check_evidence(results)
            self._expected = tuple(results)
        return self._expected

    def _chosen(self, results: Sequence[Result]) -> str:
        """Return the metric; refuse one that these results cannot have."""
        known = [name for name in results[0].metrics if all(name in result.metrics for result in results)]
        if self._compare is not None and OWN_METRIC not in known:
            known.append(OWN_METRIC)
        asked = self._table.metric if self._table else None
        if not known or (asked is not None and asked not in known):
            own = asked is None or asked == OWN_METRIC
            raise ConfigError(
                "the task and its results have no metric of their own" if own else
                f"{asked} is not a metric of what the task returns",
                where="quality.metric",
                hint=f"Set metric to {' or '.join(known)}." if known else "Quantize without [quality].",
            )  # fmt: skip
        return asked or known[0]

    def _score(self, result: Result, reference: Result) -> float:
        if self.metric == OWN_METRIC and self._compare is not None:
            return float(self._compare(result, reference))
        return result.compare(reference, self.metric)


def _check_evidence(results: Sequence[Result]) -> None:
    """Refuse results that are all empty: two pipelines that find nothing are equal, whatever they are."""
    if all(result.is_empty() for result in results):
        raise ConfigError(
            f"the unquantized model finds nothing with any of {len(results)} inputs: they say nothing of quality",
            where="quality",
            hint="Give [quality] file or inputs: pictures with things that the model knows, or inputs with a text.",
        )


def save_worst(verdict: Verdict, folder: Path) -> list[Path]:
    """Write the worst results as pictures, the unquantized one on the left; return the files."""
    from PIL import Image

    order = sorted(range(len(verdict.scores)), key=lambda n: verdict.scores[n])
    files: list[Path] = []
    for place in order[:WORST]:
        left, result = verdict.expected[place].preview(), verdict.results[place]
        if left is None:
            continue
        # Black, if the quantized pipeline computes no numbers.
        right = (result.preview() if result else None) or Image.new("RGB", left.size)
        both = Image.new("RGB", (left.width + right.width + 8, max(left.height, right.height)), "white")
        both.paste(left, (0, 0))
        both.paste(right, (left.width + 8, 0))
        buffer = io.BytesIO()
        both.save(buffer, "PNG")
        file = folder / f"worst-{len(files) + 1}.png"
        atomic_write(file, buffer.getvalue())
        files.append(file)
    return files


def failed(outcome: JudgedQuality, verdict: Verdict, folder: Path, more: str = "", hint: str = "") -> QualityError:
    """Return the error of a pipeline that does not pass; its worst pictures are saved first."""
    worst = min(range(len(verdict.scores)), key=lambda n: verdict.scores[n])
    first = getattr(verdict.inputs[worst], next(iter(type(verdict.inputs[worst]).model_fields)), "")
    shown = repr(str(first)[:80]) if isinstance(first, str | Path) else f"input number {worst + 1}"
    said = [f"The worst is {outcome.metric} {verdict.scores[worst]:.4g}, with {shown}."]
    try:
        if files := save_worst(verdict, folder):
            said.append(f"The worst pictures, unquantized on the left: {', '.join(map(str, files))}.")
    except OSError as error:
        said.append(f"The worst pictures could not be saved in {folder}: {error.strerror}.")
    if verdict.said:
        said.append(f"What the quantized pipeline said: {verdict.said}")
    said.append(hint or 'Take other options, a lower limit, or on_fail = "search" to keep the layers that matter.')
    what = "quantized" if outcome.lowered or outcome.kept else "changed"
    return QualityError(f"the {what} pipeline scores {outcome}{more}", where="quality", hint=" ".join(said))


def outcome_of(value: Mapping[str, Any]) -> JudgedQuality:
    """Return an outcome from its JSON."""
    return JudgedQuality(**{**value, "scores": tuple(value["scores"])})
