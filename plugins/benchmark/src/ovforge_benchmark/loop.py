"""The measuring loops. What is done between two inferences is kept as little as Python allows."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import openvino as ov

from ovforge_benchmark.feeds import Feed

__all__ = ["Limits", "Measured", "run_async", "run_sync"]

_TICK = 0.5
"""Seconds between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: after so many iterations (0: no limit) or seconds (0: no limit), whichever allows more.

    `rate` is the most iterations a second, 0 for no limit.
    """

    iterations: int
    seconds: float
    rate: float = 0.0


@dataclass
class Measured:
    """Every inference: latency in seconds by the runtime's own clock, when it was noticed, and the feed that it had."""

    latencies: array[float] = field(default_factory=lambda: array("d"))
    times: array[float] = field(default_factory=lambda: array("d"))
    groups: array[int] = field(default_factory=lambda: array("i"))
    duration: float = 0.0
    complete: bool = True


Tell = Callable[[int, float], None]
"""Called with iterations and seconds, about twice a second."""


def run_sync(request: ov.InferRequest, feeds: Sequence[Feed] | None, limits: Limits, tell: Tell) -> Measured:
    """Infer one after another. `feeds` are set in the loop, in turn; None if the request has its inputs."""
    measured = Measured()
    latency, noticed, group = measured.latencies.append, measured.times.append, measured.groups.append
    clock, infer = time.perf_counter, request.infer
    count, iterations, seconds, rate = 0, limits.iterations, limits.seconds, limits.rate
    start = clock()
    elapsed, next_tick = 0.0, _TICK
    try:
        while count < iterations or elapsed < seconds:
            if feeds is not None:
                which = count % len(feeds)
                request.set_tensors(feeds[which])
                group(which)
            infer(share_outputs=True, decode_strings=False)
            latency(request.latency)
            count += 1
            elapsed = clock() - start
            noticed(elapsed)
            if elapsed > next_tick:
                tell(count, elapsed)
                next_tick = elapsed + _TICK
            if rate:
                time.sleep(max(count / rate - elapsed, 0.0))
    except KeyboardInterrupt:
        measured.complete = False
    return _finished(measured, clock() - start)


def run_async(queue: ov.AsyncInferQueue, feeds: Sequence[Feed] | None, limits: Limits, tell: Tell) -> Measured:
    """Keep every request of the queue busy: whichever is done first begins again at once."""
    measured = Measured()
    latency, noticed, group = measured.latencies.append, measured.times.append, measured.groups.append
    requests: list[Any] = [queue[number] for number in range(len(queue))]
    running: list[int | None] = [None] * len(requests)
    clock, idle = time.perf_counter, queue.get_idle_request_id
    count, iterations, seconds, rate = 0, limits.iterations, limits.seconds, limits.rate
    start = clock()
    elapsed, next_tick = 0.0, _TICK
    try:
        while count < iterations or elapsed < seconds:
            number = idle()
            request = requests[number]
            if (before := running[number]) is not None:
                latency(request.latency)
                noticed(elapsed)
                if feeds is not None:
                    group(before)
            which = 0
            if feeds is not None:
                which = count % len(feeds)
                request.set_tensors(feeds[which])
            running[number] = which
            queue.start_async()
            count += 1
            elapsed = clock() - start
            if elapsed > next_tick:
                tell(count, elapsed)
                next_tick = elapsed + _TICK
            if rate:
                time.sleep(max(count / rate - elapsed, 0.0))
    except KeyboardInterrupt:
        measured.complete = False
    queue.wait_all()
    duration = clock() - start
    for number, before in enumerate(running):
        if before is not None:
            latency(requests[number].latency)
            noticed(duration)
            if feeds is not None:
                group(before)
    return _finished(measured, duration)


def _finished(measured: Measured, duration: float) -> Measured:
    """Set the duration; the runtime's latencies are milliseconds."""
    measured.duration = duration
    measured.latencies = array("d", (latency / 1000 for latency in measured.latencies))
    return measured
