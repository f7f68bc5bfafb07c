"""The search: every change alone, then the sets that promise most, by successive halving, and the gate at the end.

Successive halving: Jamieson and Talwalkar 2016. All are measured with few calls, the better half with twice as many,
and so on; only what is left is measured with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ovforge.contracts import Progress
from ovforge.errors import InputError
from ovforge.model import METRICS
from ovforge_benchmark.tuning.bench import Bench
from ovforge_benchmark.tuning.changes import Change, label_of
from ovforge_benchmark.tuning.forecast import forecasts
from ovforge_benchmark.tuning.schema import Trial

__all__ = ["Found", "search"]

_FEW = 2
"""Calls of the first round."""

_WIDTH = 8
"""Sets of changes that the first round begins with."""

_SLACK = 0.25
"""Part of the loss that is allowed by which a score of few calls may lie below the limit: all calls decide."""

_LEAST = 0.02
"""Part of the cost that a winner must save: less is noise."""

_DUELS = 2
"""How often a winner may be measured beside the original until it is the better one: the least of each counts, because
what disturbs a measurement only adds to it."""

_ALONE, _SETS = 0.5, 0.75
"""Parts of the time after which no single change, and no set of changes with few calls, is begun."""

Changes = tuple[Change, ...]


@dataclass
class Found:
    """What a search found. `trials` holds for each pipeline the one with the most calls."""

    trials: list[Trial] = field(default_factory=list)
    winner: Changes | None = None
    duel: tuple[Trial, ...] = ()
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    hurried: bool = False
    """Whether there was no time for something."""


def search(bench: Bench, changes: Sequence[Change], min_score: float, progress: Callable[[Progress], None]) -> Found:
    """Try. Ends when all that promises something was tried, when the time is over, or at an interruption.

    Raises what is wrong with the original itself.
    """
    one = _Search(bench, min_score, progress)
    try:
        one.run(changes)
    except KeyboardInterrupt:
        one.found.interrupted = True
    return one.found


class _Search:
    def __init__(self, bench: Bench, min_score: float, progress: Callable[[Progress], None]) -> None:
        self._bench, self._limit, self._progress = bench, min_score, progress
        self._done = self._ahead = 0
        self.found = Found()

    def run(self, changes: Sequence[Change]) -> None:
        """Try all rounds, then the gate, then the winner beside the original."""
        bench = self._bench
        rounds = [min(_FEW, bench.samples)]
        while rounds[-1] < bench.samples:
            rounds.append(min(2 * rounds[-1], bench.samples))
        self._ahead = len(changes) + 2 * _WIDTH
        base = self._original(rounds[0])
        if self._limit > self._perfect:
            raise InputError(
                f"{self._limit:g} is more than equal results have: {bench.metric} of {self._perfect:g}",
                where="--min-score", hint="Ask for less.",
            )  # fmt: skip
        running = self._first_round(changes, base, rounds[0])
        for calls in rounds[1:]:
            base = self._original(calls, base)
            tried = {one: trial for one in running if (trial := self._measure(one, calls)) is not None}
            running = self._better(tried, base, last=calls == rounds[-1])
        for one in running:
            self._say(f"the gate: {label_of(one)}")
            if refused := bench.passes_gate(one) or self._lost(one):
                self.found.notes.append(f"{label_of(one)}: {refused}")
            else:
                self.found.winner = one
                break
        self._progress(Progress("tuning", self._done, self._done))

    def _lost(self, one: Changes) -> str:
        """Measure the original and what should be better anew, in turn; return why it is not, or "".

        The one that seems best of many is often the one that was lucky.
        """
        bench, least = self._bench, tuple[Trial, ...]()
        for _ in range(_DUELS):
            if bench.left() <= 0:
                break
            self._say(f"original and {label_of(one)} in turn")
            duel = tuple(bench.measure(each, bench.samples, again=True) for each in ((), one))
            if any(trial.error for trial in duel):
                break
            least = tuple(
                min(pair, key=lambda trial: trial.cost(bench.aim)) for pair in zip(least or duel, duel, strict=True)
            )
            before, after = (trial.cost(bench.aim) for trial in least)
            if after < before:
                self.found.duel = least
                return ""
        return f"measured anew in turn with the original it saves nothing ({before / after:.2f}x)" if least else ""

    def _original(self, calls: int, known: Trial | None = None) -> Trial:
        """Return the original's trial; what is known of it with fewer calls, if there is no time for so many."""
        if known is not None and self._bench.left() <= 0:
            return known
        self._say("original")
        trial = self._bench.measure((), calls)
        if not trial.error:
            return self._tell(trial)
        if known is None:
            raise InputError(
                "the time is over before the original is measured", where="--within", hint="Give it more time."
            )
        return known

    def _first_round(self, changes: Sequence[Change], base: Trial, few: int) -> list[Changes]:
        """Measure each change alone, and the sets that should be better; return what goes on."""
        bench = self._bench
        alone = {change: trial for change in changes if (trial := self._measure((change,), few, _ALONE)) is not None}
        able = {change: trial for change, trial in alone.items() if not trial.error}
        promising = [one.changes for one in forecasts(base, able, bench.aim, self._lenient, self._perfect)]
        self.found.left_out += [label_of(one) for one in promising[_WIDTH:]]
        self._ahead = self._done + 2 * _WIDTH
        tried: dict[Changes, Trial] = {(change,): trial for change, trial in able.items()}
        for one in promising[:_WIDTH]:
            if (trial := self._measure(one, few, _SETS)) is not None:
                tried[one] = trial
        return self._better(tried, base, last=few == bench.samples)

    def _better(self, tried: dict[Changes, Trial], base: Trial, *, last: bool) -> list[Changes]:
        """Return what saves something and is close enough, the best first; the better half if a round follows."""
        aim, limit = self._bench.aim, self._limit if last else self._lenient
        good = [
            one
            for one, trial in tried.items()
            if not trial.error and trial.score >= limit and trial.cost(aim) < base.cost(aim) * (1 - _LEAST)
        ]
        good.sort(key=lambda one: tried[one].cost(aim))
        return good if last else good[: max((len(good) + 1) // 2, 3)]

    def _measure(self, changes: Changes, calls: int, part: float = 1.0) -> Trial | None:
        """Return a trial; None if that part of the time is over."""
        label = label_of(changes)
        if self._bench.left(part) <= 0 and not self._bench.knows(changes, calls):
            self.found.left_out.append(label)
            self.found.hurried = True
            return None
        self._say(label)
        trial = self._tell(self._bench.measure(changes, calls))
        self._done += 1
        return trial

    def _tell(self, trial: Trial) -> Trial:
        """Take a trial in, instead of one of the same pipeline with fewer calls; one that failed replaces none."""
        known = [one for one in self.found.trials if one.label == trial.label]
        if not (known and trial.error):
            self.found.trials = [one for one in self.found.trials if one.label != trial.label] + [trial]
        return trial

    def _say(self, what: str) -> None:
        """Tell what is done now, and the time that is left, as far as it is known."""
        bench, note = self._bench, ""
        self._ahead = max(self._ahead, self._done + 1)
        if bench.fresh:
            seconds = min((self._ahead - self._done) * bench.spent / bench.fresh, max(bench.left(), 0))
            note = f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"
        self._progress(Progress("tuning", self._done, self._ahead, f"{what}{note}"))

    @property
    def _perfect(self) -> float:
        metric = self._bench.metric
        return METRICS[metric].perfect if metric in METRICS else 1.0

    @property
    def _lenient(self) -> float:
        """The limit for few calls."""
        return self._limit - _SLACK * max(self._perfect - self._limit, 0.0)
