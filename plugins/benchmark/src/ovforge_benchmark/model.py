"""Measuring one model, with benchmark_app's meaning of every flag."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openvino as ov
from openvino.preprocess import PrePostProcessor

from ovforge.errors import ConfigError, DeviceError, InputError, ModelError
from ovforge.files import atomic_write
from ovforge.runtime import core
from ovforge_benchmark import settings
from ovforge_benchmark.feeds import Feed, make_feeds
from ovforge_benchmark.loop import Limits, Measured, run_async, run_sync
from ovforge_benchmark.machine import machine, peak_memory
from ovforge_benchmark.noise import Watch, disturbances
from ovforge_benchmark.operators import average, operators
from ovforge_benchmark.reports import write_counters
from ovforge_benchmark.schema import Benchmark, Group, InputFacts, Operator
from ovforge_benchmark.shapes import Input, describe_inputs, element_type
from ovforge_benchmark.statistics import histogram, percentile, summary, timeline

__all__ = ["Prepared", "measure", "prepare", "run_model"]

DEFAULT_SECONDS = 60

Tell = Callable[[str, dict[str, Any]], None]
"""Called with an event and its facts: "step" with a name; "running" with iterations, seconds, throughput."""


@dataclass
class Prepared:
    """A compiled model and what it will be fed with."""

    flags: Mapping[str, Any]
    name: str
    api: str
    compiled: ov.CompiledModel
    inputs: list[Input]
    properties: dict[str, Any]
    start: dict[str, float]
    remarks: list[str]
    feeds: list[Feed] = field(default_factory=list)
    filled: dict[str, str] = field(default_factory=dict)
    counted: list[list[Operator]] = field(default_factory=list)
    """Layers of each request's last inference, where they are counted."""


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


# -- from flags to a compiled model -----------------------------------------------------------------------------------


def prepare(flags: Mapping[str, Any], tell: Tell = lambda *_: None) -> Prepared:
    """Read and compile the model that the flags name, and make its inputs. Raises an OvforgeError for what is wrong."""
    for library in (flags["extensions"] or "").split(",") if flags["extensions"] else ():
        try:
            core().add_extension(library)
        except RuntimeError as error:
            raise InputError(f"is no library of operations: {error}", where=f"-extensions {library}") from error
    api = settings.api_of(flags)
    properties, remarks = settings.wanted(core(), flags, api)
    start: dict[str, float] = {}
    name = flags["model"]
    tell("step", {"step": "read"})
    if Path(name).suffix == ".blob" or flags["load_from_file"]:
        compiled, inputs = _compile_file(flags, properties, start)
    else:
        model = _timed(start, "read", lambda: _read(flags))
        _name_ports(model)
        inputs, reshape = describe_inputs(model.inputs, flags)
        if reshape:
            _timed(start, "reshape", lambda: _reshape(model, inputs))
        model = _preprocess(model, inputs, flags)
        tell("step", {"step": "compile"})
        compiled = _timed(start, "compile", lambda: _compile(model, flags["target_device"], properties))
    prepared = Prepared(flags, name, api, compiled, inputs, properties, start, remarks)
    if flags["number_iterations"] == 0:
        prepared.filled = dict.fromkeys((one.name for one in inputs), "nothing")
    else:
        prepared.feeds, prepared.filled = make_feeds(
            inputs, [text for texts in flags["paths_to_input"] for text in texts]
        )
    return prepared


def _timed(start: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    began = time.perf_counter()
    value = work()
    start[name] = time.perf_counter() - began
    return value


def _read(flags: Mapping[str, Any]) -> ov.Model:
    """Return the model from whatever any loader here opens."""
    from ovforge.cache import Cache
    from ovforge.pipeline import Origin, find_loader, open_origin
    from ovforge.plugins import Plugins
    from ovforge.sources import open_source
    from ovforge.stages import ignore_progress

    plugins, cache = Plugins(), Cache.default()
    key = None
    if flags["key"]:
        kind, colon, place = flags["key"].partition(":")
        if not colon or not kind.isalpha():
            raise ConfigError("names no place of a key", where="--key", hint="Write env:NAME or file:PATH.")
        key = {kind: place}
    source = open_source(flags["model"], Path.cwd(), cache.memo, key=key, plugins=plugins)
    loader = find_loader(source, None, plugins)
    options = loader.extension.options_model()
    bundle = open_origin(Origin(source, loader, options() if options else None), cache, ignore_progress)
    roles = list(bundle.models)
    role: str | None = flags["role"] or (roles[0] if len(roles) == 1 else None)
    if role is None or role not in bundle.models:
        raise InputError(
            f"it has no role {role!r}" if role else f"it has {len(roles)} models: {', '.join(roles)}",
            where=flags["model"],
            hint=f"Add --role with one of {', '.join(roles)}; or measure a pipeline: name its config.",
        )
    return bundle.models[role]


def _name_ports(model: ov.Model) -> None:
    for port in model.inputs:
        if not port.names:
            port.set_names({port.node.get_friendly_name()})


def _reshape(model: ov.Model, inputs: Sequence[Input]) -> None:
    try:
        model.reshape({one.name: one.shape for one in inputs})
    except RuntimeError as error:
        wanted = ", ".join(f"{one.name}{one.shape}" for one in inputs)
        reason = next((line for line in str(error).splitlines() if line.strip() and "Exception from" not in line), "")
        raise InputError(f"the model cannot have the shapes {wanted}: {reason}", where="-shape, -b") from error


def _preprocess(model: ov.Model, inputs: Sequence[Input], flags: Mapping[str, Any]) -> ov.Model:
    """Set types of inputs and outputs, means and scales; pictures are fed as u8 where nothing else is asked for."""
    steps = PrePostProcessor(model)
    by_name = _types_by_name(model, flags["input_output_precision"])
    for number, one in enumerate(inputs):
        asked = by_name.get(("input", number)) or flags["input_precision"]
        if asked or one.is_image:
            one.type = element_type(asked or "u8")
            steps.input(number).tensor().set_element_type(one.type)
        if one.mean or one.scale:
            step = steps.input(number).preprocess().convert_element_type(ov.Type.f32)
            if one.mean:
                step.mean(one.mean)
            if one.scale:
                step.scale(one.scale)
        if one.layout != ov.Layout():
            steps.input(number).model().set_layout(one.layout)
    for number in range(len(model.outputs)):
        if asked := by_name.get(("output", number)) or flags["output_precision"]:
            steps.output(number).tensor().set_element_type(element_type(asked))
    try:
        return steps.build()
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1]
        raise InputError(f"does not fit the model: {said}", where="-ip, -op, -iop, -layout, -mean_values") from error


def _types_by_name(model: ov.Model, text: str | None) -> dict[tuple[str, int], str]:
    """Read -iop: NAME:TYPE,NAME:TYPE; a name may hold a colon."""
    from ovforge_benchmark.flags import TYPES

    known: dict[str, tuple[str, int]] = {}
    for kind, ports in (("output", model.outputs), ("input", model.inputs)):
        for number, port in enumerate(ports):
            known |= dict.fromkeys({*port.names, port.node.get_friendly_name()}, (kind, number))
    found: dict[tuple[str, int], str] = {}
    for part in (text or "").replace(" ", "").split(",") if text else ():
        name, _, asked = part.rpartition(":")
        if name not in known or asked not in TYPES:
            raise InputError(
                f"{part!r} is not NAME:TYPE",
                where="-iop",
                hint=f"Names: {', '.join(known)}. Types: {', '.join(TYPES)}.",
            )
        found[known[name]] = asked
    return found


def _compile(model: ov.Model | str, device: str, properties: Mapping[str, Any]) -> ov.CompiledModel:
    try:
        return core().compile_model(model, device, dict(properties))
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
        raise DeviceError(
            f"the model does not compile: {' '.join(lines[:3])}",
            where=f"-d {device}",
            hint="Try -d CPU -infer_precision f32, to tell the model from the device and the settings.",
        ) from error


def _compile_file(
    flags: Mapping[str, Any], properties: Mapping[str, Any], start: dict[str, float]
) -> tuple[ov.CompiledModel, list[Input]]:
    """Compile a file without reading it first, or read a compiled model (.blob): its inputs are as they are."""
    path = Path(flags["model"])
    changes = [name for name in ("shape", "batch_size", "input_precision", "output_precision", "input_output_precision",
               "mean_values", "scale_values") if flags[name]]  # fmt: skip
    if changes:
        raise InputError(f"{', '.join(changes)} changes a model, and this one is not read", where=str(path))
    if not path.is_file():
        raise ModelError("no such file", where=str(path))
    if path.suffix == ".blob":

        def read() -> ov.CompiledModel:
            try:
                return core().import_model(path.read_bytes(), flags["target_device"], dict(properties))
            except (RuntimeError, TypeError) as error:
                raise ModelError(
                    f"is no model compiled for {flags['target_device']} by this version", where=str(path)
                ) from error

        compiled = _timed(start, "import", read)
    else:
        compiled = _timed(start, "compile", lambda: _compile(str(path), flags["target_device"], properties))
    inputs, _ = describe_inputs(compiled.inputs, flags)
    return compiled, inputs


# -- measuring --------------------------------------------------------------------------------------------------------


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
    facts["precision"] = {"model": str(facts["ran"].get("INFERENCE_PRECISION_HINT", "unknown"))}
    if flags["number_iterations"] == 0:
        return Benchmark(**facts, inputs=_input_facts(prepared), warnings=tuple(prepared.remarks))
    loop = _loop(prepared)
    facts["ran"] |= {"requests": len(loop.requests)}
    if not flags["no_warmup"]:
        facts["start"]["first"] = _warm_up(prepared, loop)
    limits = _limits(flags, len(loop.requests), len(prepared.feeds))
    batch = _batches(prepared)

    def told(count: int, seconds: float) -> None:
        fps = count * sum(batch) / len(batch) / seconds
        tell("running", {"iterations": count, "seconds": seconds, "of": limits.seconds, "throughput": fps})

    tell("step", {"step": "measure"})
    with Watch() as watch:
        measured = loop.run(limits, told)
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
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Exception from" not in line]
        shapes = ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in prepared.feeds[0].items())
        raise InputError(
            f"the model does not run with {shapes}: {' '.join(lines[:2])}",
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
        prepared.counted = [operators("model", request.profiling_info) for request in requests]
        counted = average("model", prepared.counted)
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
    with tempfile.TemporaryDirectory(prefix="ovforge-") as folder:
        written = Path(folder) / path.with_suffix(".xml").name
        ov.serialize(compiled.get_runtime_model(), written)
        for file in (written.with_suffix(".bin"), written):
            atomic_write(path.parent / file.name, file.read_bytes())
