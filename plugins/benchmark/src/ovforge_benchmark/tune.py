"""A search for the settings that a model runs best with, for latency and for throughput."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field

from ovforge.errors import DeviceError, InputError
from ovforge.model import core
from ovforge_benchmark.flags import REPORTS, SEARCHED, refuse
from ovforge_benchmark.machine import cores, machine
from ovforge_benchmark.model import measure
from ovforge_benchmark.noise import disturbances
from ovforge_benchmark.prepare import prepare
from ovforge_benchmark.schema import Machine, Record, Statistics
from ovforge_benchmark.tables import duration, markdown_table

__all__ = ["Trial", "Tuning", "settings_to_try", "tune"]

_DEFAULT_SECONDS = 60
_CAPABILITY = {"bf16": "BF16", "f16": "FP16"}


class Trial(Record):
    """One set of flags, and how fast the model ran with it."""

    flags: dict[str, Any]
    latency: Statistics
    throughput: float
    precision: str


class Tuning(Record):
    """A report of `ovforge benchmark --tune`."""

    schema_version: Literal[1] = 1
    kind: Literal["tuning"] = "tuning"
    created: str
    complete: bool
    what: str
    machine: Machine
    trials: tuple[Trial, ...]
    left_out: int = Field(description="Settings for which there was no time left.")
    warnings: tuple[str, ...] = ()

    def best(self, aim: Literal["latency", "throughput"]) -> Trial:
        """Return the trial of the least median latency, or of the most throughput."""
        if aim == "latency":
            return min(self.trials, key=lambda trial: trial.latency.median)
        return max(self.trials, key=lambda trial: trial.throughput)

    def markdown(self) -> str:
        """Return all trials, and the best as lines of a config and as flags."""
        rows = [
            [_flags(trial), duration(trial.latency.median), f"{trial.throughput:.2f}", trial.precision]
            for trial in sorted(self.trials, key=lambda trial: -trial.throughput)
        ]
        lines = [f"# {self.what}\n", markdown_table(["flags", "median latency", "a second", "computed in"], rows)]
        for aim in ("latency", "throughput"):
            trial = self.best(aim)
            lines.append(f"Best {aim}: `{_flags(trial)}`, in a config:\n\n```toml\n{_toml(trial)}```\n")
        if self.left_out:
            lines.append(f"{self.left_out} settings were left out, for want of time: add -t.\n")
        return "\n".join([*lines, *(f"- warning: {warning}" for warning in self.warnings)])


def settings_to_try(device: str) -> Iterator[dict[str, Any]]:
    """Yield flags, the most promising first: hints in each precision, then streams by threads and requests."""
    capabilities = core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    precisions = ["f32", *(name for name, needed in _CAPABILITY.items() if needed in capabilities)]
    for precision in precisions:
        yield {"infer_precision": precision, "perf_hint": "latency", "api_type": "sync"}
        yield {"infer_precision": precision, "perf_hint": "throughput", "api_type": "async"}
    if device != "CPU":
        return
    count = cores()
    powers = sorted({count, *(2**n for n in range(count.bit_length()) if 2**n <= count)})
    for streams, threads, precision in itertools.product(powers, powers, precisions):
        if streams <= threads:
            common = {"infer_precision": precision, "perf_hint": "none", "number_threads": threads,
                      "number_streams": str(streams)}  # fmt: skip
            if streams == 1:
                yield {**common, "api_type": "sync"}
            else:
                yield from ({**common, "api_type": "async", "number_infer_requests": n * streams} for n in (1, 2))


def tune(flags: Mapping[str, Any], tell: Callable[[str, dict[str, Any]], None]) -> Tuning:
    """Try settings for -t seconds in all. Each has an equal part of the time that is left."""
    from ovforge_benchmark.whole import is_pipeline

    if is_pipeline(flags["model"]):
        raise InputError("searches for single models", where="--tune", hint="Name a model, or a folder with --role.")
    refuse(flags, (*SEARCHED, *REPORTS), "not with --tune, which tries settings itself")
    limit = float(flags["time"] or _DEFAULT_SECONDS)
    end = time.monotonic() + limit
    waiting = list(settings_to_try(flags["target_device"]))
    trials: list[Trial] = []
    complete, warnings = True, disturbances()
    try:
        while waiting and time.monotonic() < end:
            tried = waiting.pop(0)
            tell("trial", {"number": len(trials) + 1, "left": len(waiting), **tried})
            share = max((end - time.monotonic()) / (len(waiting) + 1) * 0.6, 0.2)
            try:
                # Parts of seconds are fine here: only the command line counts in whole ones.
                prepared = prepare({**flags, **tried, "number_iterations": 1, "time": share})
                report = measure(prepared, lambda *_: None)
            except DeviceError as error:
                warnings.append(f"{tried}: {error.what}")
                continue
            if not report.complete:
                raise KeyboardInterrupt
            assert report.latency is not None
            assert report.throughput is not None
            trials.append(
                Trial(flags=tried, latency=report.latency, throughput=report.throughput,
                      precision=report.precision["model"])
            )  # fmt: skip
    except KeyboardInterrupt:
        complete = False
    if not trials:
        raise InputError("nothing was tried", where="--tune", hint="Give it more time: -t 60")
    return Tuning(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        complete=complete,
        what=flags["model"],
        machine=machine(),
        trials=tuple(trials),
        left_out=len(waiting),
        warnings=tuple(dict.fromkeys(warnings)),
    )


_SHORT = {
    "infer_precision": "-infer_precision", "perf_hint": "-hint", "api_type": "-api", "number_threads": "-nthreads",
    "number_streams": "-nstreams", "number_infer_requests": "-nireq",
}  # fmt: skip


def _flags(trial: Trial) -> str:
    return " ".join(f"{_SHORT[name]} {value}" for name, value in trial.flags.items())


def _toml(trial: Trial) -> str:
    """Return the [device] table of a pipeline's config."""
    flags = trial.flags
    lines = ["[device]", f'precision = "{flags["infer_precision"]}"']
    if flags["perf_hint"] != "none":
        lines.append(f'hint = "{flags["perf_hint"]}"')
    else:
        lines += [f"threads = {flags['number_threads']}", f"streams = {flags['number_streams']}"]
    return "\n".join(lines) + "\n"
