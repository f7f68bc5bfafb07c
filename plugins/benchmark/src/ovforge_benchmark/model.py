"""Measuring one model, with benchmark_app's meaning of every flag."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openvino as ov

from ovforge.errors import InputError
from ovforge.model import OPENVINO_ERRORS, reason_of
from ovforge.store import atomic_write, scratch_folder
from ovforge_benchmark import settings
from ovforge_benchmark.loop import Limits, Measured, run_async, run_sync
from ovforge_benchmark.machine import machine, peak_memory
from ovforge_benchmark.noise import Watch, disturbances
from ovforge_benchmark.operators import average, counters, operators
from ovforge_benchmark.prepare import Prepared, Tell, prepare
from ovforge_benchmark.reports import write_counters
from ovforge_benchmark.schema import Benchmark, Group, InputFacts, Operator
from ovforge_benchmark.statistics import histogram, percentile, summary, timeline

__all__ = ["DEFAULT_SECONDS", "measure", "run_model"]

DEFAULT_SECONDS = 60


def run_model(flags: Mapping[str, Any], tell: Tell = lambda *_: None) -> Benchmark:
    """Read, compile, measure; write the files that flags ask for."""
    before = disturbances()
    prepared = prepare(flags, tell)
    if flags["dump_config"]:
        atomic_write(Path(flags["dump_config"]), settings.dump(flags["target_device"], prepared.properties))
    report = measure(prepared, tell, before)
    if flags["report_type"]:
        write_counters(flags, report, prepared.counted)
    if flags["exec_graph_path"]:
        _write_graph(prepared.compiled, Path(flags["exec_graph_path"]))
    return report


def measure(prepared: Prepared, tell: Tell, before: Sequence[str] = ()) -> Benchmark:
    """Run the loop that the flags ask for. With -niter 0 nothing is run."""
    flags = prepared.flags
    facts: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "what": prepared.name,
        "subject": "model",
        "machine": machine(),
        "asked": {name: value for name, value in flags.items() if value not in (None, False, [], "")},
        "ran": {**settings.ran(prepared.compiled), "api": prepared.api},
        "start": prepared.start,
    }
    facts["precision"] = settings.precision_of(facts["ran"])
    if flags["number_iterations"] == 0:
        return Benchmark(**facts, inputs=_input_facts(prepared), warnings=tuple(prepared.remarks))
    loop = _loop(prepared)
    facts["ran"] |= {"requests": len(loop.requests)}
    if not flags["no_warmup"]:
        facts["start"]["first"] = _warm_up(prepared, loop)
    limits = _limits(flags, len(loop.requests), len(prepared.feeds))
    batch = _batches(prepared)

    def report_progress(count: int, seconds: float) -> None:
        fps = count * sum(batch) / len(batch) / seconds
        tell("running", {"iterations": count, "seconds": seconds, "of": limits.seconds, "throughput": fps})

    tell("step", {"step": "measure"})
    with Watch() as watch:
        measured = loop.run(limits, report_progress)
    return _report(prepared, facts, measured, batch, loop.requests, watch, before)


@dataclass(frozen=True)
class _Loop:
    """Requests whose inputs are set, how to run them, and how to run them before: `warm_up` returns seconds."""

    requests: Sequence[Any]
    run: Callable[[Limits, Any], Measured]
    warm_up: Callable[[], float]


def _loop(prepared: Prepared) -> _Loop:
    flags, feeds = prepared.flags, prepared.feeds
    closed = all(one.shape.is_static for one in prepared.inputs)
    single = len({tuple(tuple(tensor.shape) for tensor in feed.values()) for feed in feeds}) == 1
    if not single and prepared.api == "sync":
        raise InputError(
            "shapes that change are measured in async", where="-api sync",
            hint="Use -api async -hint latency -nireq 1: one request, one after another.",
        )  # fmt: skip
    once = flags["inference_only"] if flags["inference_only"] is not None else closed
    if once and not single:
        raise InputError("the data changes its shape, so it is set in the loop", where="-inference_only")
    if prepared.api == "sync":
        alone = prepared.compiled.create_infer_request()
        alone.set_tensors(feeds[0])

        def infer() -> float:
            alone.infer(share_outputs=True, decode_strings=False)
            return float(alone.latency) / 1000

        return _Loop([alone], lambda limits, tell: run_sync(alone, None if once else feeds, limits, tell), infer)
    queue = ov.AsyncInferQueue(prepared.compiled, flags["number_infer_requests"] or 0)
    requests = [queue[number] for number in range(len(queue))]
    for number, request in enumerate(requests):
        request.set_tensors(feeds[number % len(feeds)])

    def warm_up() -> float:
        """Run one alone, then all: a request of a queue may be started by the queue only."""
        number = queue.get_idle_request_id()
        queue.start_async()
        queue.wait_all()
        first = float(requests[number].latency)
        for _ in requests:
            queue.start_async()
        queue.wait_all()
        return first / 1000

    return _Loop(requests, lambda limits, tell: run_async(queue, None if once else feeds, limits, tell), warm_up)


def _warm_up(prepared: Prepared, loop: _Loop) -> float:
    """Run every request once, so that all of them have their memory; return the first one's latency in seconds."""
    try:
        return loop.warm_up()
    except OPENVINO_ERRORS as error:
        shapes = ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in prepared.feeds[0].items())
        raise InputError(
            f"the model does not run with {shapes}: {reason_of(error)}",
            where=prepared.name,
            hint="Give data that it can take: -data_shape, -shape, or files with -i.",
        ) from error


def _limits(flags: Mapping[str, Any], requests: int, feeds: int) -> Limits:
    """Return when to stop; iterations are rounded up so that every request, and every feed, counts alike."""
    iterations, seconds = flags["number_iterations"] or 0, flags["time"]
    if not iterations and not seconds:
        seconds = DEFAULT_SECONDS
    if (iterations and requests > 1) or feeds > requests:
        whole = max(requests, feeds)
        iterations = -(-iterations // whole) * whole
    return Limits(iterations, seconds or 0, flags["maximum_inference_rate"])


def _batches(prepared: Prepared) -> list[int]:
    """Return frames an inference, for each feed."""
    found = []
    for feed in prepared.feeds:
        sizes = {batch for one in prepared.inputs if (batch := one.batch(tuple(feed[one.name].shape))) is not None}
        if len(sizes) > 1:
            raise InputError(f"inputs have different batches: {sorted(sizes)}", where="-b, -layout, -data_shape")
        found.append(sizes.pop() if sizes else 1)
    return found


def _report(
    prepared: Prepared,
    facts: dict[str, Any],
    measured: Measured,
    batch: Sequence[int],
    requests: Sequence[Any],
    watch: Watch,
    before: Sequence[str],
) -> Benchmark:
    flags, latencies = prepared.flags, list(measured.latencies)
    if not latencies:
        raise InputError("no iteration was done", where="-niter, -t", hint="It was interrupted before the first one.")
    frames = sum(batch[group] for group in measured.groups) if measured.groups else len(latencies) * batch[0]
    groups = [
        Group(
            shapes={name: tuple(tensor.shape) for name, tensor in feed.items()},
            latency=summary(mine) if (mine := _of_group(measured, number)) else None,
        )
        for number, feed in enumerate(prepared.feeds)
        if len(prepared.feeds) > 1 and measured.groups
    ]
    counted: list[Operator] = []
    if prepared.properties.get("PERF_COUNT") in (True, "YES"):
        prepared.counted = [counters(request.profiling_info) for request in requests]
        counted = average("model", [operators("model", request.profiling_info) for request in requests])
    percent = flags["latency_percentile"]
    return Benchmark(
        **facts,
        complete=measured.complete,
        inputs=_input_facts(prepared),
        iterations=len(latencies),
        duration=measured.duration,
        throughput=frames / max(measured.duration, 1e-9),
        latency=summary(latencies),
        percentile={str(percent): percentile(sorted(latencies), percent)},
        groups=tuple(groups),
        histogram=histogram(latencies),
        timeline=tuple(timeline(latencies, list(measured.times))),
        operators=tuple(counted),
        peak_memory=peak_memory(),
        energy=watch.energy,
        warnings=tuple(dict.fromkeys([*prepared.remarks, *before, *watch.warnings()])),
    )


def _of_group(measured: Measured, number: int) -> list[float]:
    return [latency for latency, group in zip(measured.latencies, measured.groups, strict=True) if group == number]


def _input_facts(prepared: Prepared) -> tuple[InputFacts, ...]:
    return tuple(
        InputFacts(
            name=one.name,
            type=one.type.get_type_name(),
            shape=str(one.shape),
            layout=str(one.layout) if one.layout != ov.Layout() else "",
            filled_with=prepared.filled.get(one.name, ""),
        )
        for one in prepared.inputs
    )


def _write_graph(compiled: ov.CompiledModel, path: Path) -> None:
    """Write the graph that ran, as an .xml with its .bin."""
    with scratch_folder() as folder:
        written = folder / path.with_suffix(".xml").name
        ov.serialize(compiled.get_runtime_model(), written)
        for file in (written.with_suffix(".bin"), written):
            atomic_write(path.parent / file.name, file.read_bytes())
