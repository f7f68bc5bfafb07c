"""Calls that wait for one pipeline and run as one, if its task says that they can."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ovforge import Cancelled, Pipeline, Progress, Result, Stop
from ovforge.errors import OvforgeError

__all__ = ["Joinable", "Waiting"]


@dataclass(eq=False)
class Joinable:
    """A call of a pipeline; `done` gets what `answer` makes of its result, in the thread that ran it."""

    given: Mapping[str, Any]
    stop: Stop
    answer: Callable[[Result], Any]
    done: Future[Any] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.done.set_running_or_notify_cancel()  # who awaits it may give up, and cannot cancel it

    def key(self, pipeline: Pipeline) -> Hashable | None:
        """Return what it has in common with those that it can run with."""
        try:
            return pipeline.batch_key(self.given)
        except OvforgeError:  # which its own run will tell
            return None

    def finish(self, run: Callable[[], Result]) -> None:
        """Run, and answer."""
        try:
            self.done.set_result(self.answer(run()))
        except BaseException as error:
            self.done.set_exception(error)


class Waiting:
    """The calls that wait for one pipeline, in order; at most `most` run as one, and `say` is told how many did."""

    def __init__(self, most: int, say: Callable[[int], None] = lambda _: None) -> None:
        self._most, self._say, self._lock = most, say, threading.Lock()
        self._calls: list[Joinable] = []

    def add(self, call: Joinable) -> None:
        """Let a call wait."""
        with self._lock:
            self._calls.append(call)

    def remove(self, call: Joinable) -> bool:
        """Let it wait no more; say whether it did. If not, the thread of another one runs it."""
        with self._lock:
            waited = call in self._calls
            if waited:
                self._calls.remove(call)
            return waited

    def run(self, pipeline: Pipeline, first: Joinable) -> None:
        """Run a call, and with it those that wait and can run as one with it."""
        calls = [first, *self._mates(pipeline, first)]
        if len(calls) > 1:
            try:
                results = pipeline.together([call.given for call in calls], progress=_unless_all_left(calls))
            except Exception:  # it may be the fault of one of them alone
                pass
            else:
                self._say(len(calls))
                for call, result in zip(calls, results, strict=True):
                    call.finish(lambda result=result: result)  # type: ignore[misc]
                return
        for call in calls:
            call.finish(lambda call=call: pipeline(progress=call.stop, **call.given))  # type: ignore[misc]

    def _mates(self, pipeline: Pipeline, first: Joinable) -> Sequence[Joinable]:
        if self._most == 1 or (key := first.key(pipeline)) is None:
            return ()
        with self._lock:
            able = [call for call in self._calls if not call.stop.asked and call.key(pipeline) == key]
            for call in able[: self._most - 1]:
                self._calls.remove(call)
        return able[: self._most - 1]


def _unless_all_left(calls: Sequence[Joinable]) -> Callable[[Progress], None]:
    def check(moment: Progress) -> None:
        if all(call.stop.asked for call in calls):
            raise Cancelled

    return check
