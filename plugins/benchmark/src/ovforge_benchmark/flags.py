"""The flags of `ovforge benchmark`: those of openvino's benchmark_app, with the same names and meaning, and ours."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer

from ovforge.errors import InputError, did_you_mean

__all__ = ["MODELS_ONLY", "PIPELINES_ONLY", "REPORTS", "SEARCHED", "TYPES", "parser", "refuse"]

TYPES = ("bool", "f16", "f32", "f64", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")
_HINTS = ("latency", "throughput", "tput", "cumulative_throughput", "ctput", "none")


MODELS_ONLY = (
    "api_type", "maximum_inference_rate", "batch_size", "shape", "data_shape", "layout", "number_infer_requests",
    "infer_threads_pinning", "inference_only", "no_warmup", "extensions", "path_to_cldnn_config", "cache_dir",
    "load_from_file", "input_precision", "output_precision", "input_output_precision", "mean_values", "scale_values",
    "report_type", "exec_graph_path", "dump_config", "load_config", "role", "key",
)  # fmt: skip
"""Flags that a pipeline has no use for."""

PIPELINES_ONLY = ("set", "runs", "no_cache", "trust")

REPORTS = ("number_iterations", "report_type", "perf_counts", "perf_counts_sort", "exec_graph_path", "dump_config")
"""Flags of a single measurement."""

SEARCHED = (
    "perf_hint", "api_type", "number_streams", "number_threads", "number_infer_requests", "infer_precision",
    "infer_threads_pinning",
)  # fmt: skip
"""Flags that --tune tries itself."""


def refuse(flags: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    """Raise InputError if one of these flags is given: none is left aside in silence."""
    chosen = [name for name in names if flags[name] not in (None, False, "", 0.0, [])]
    if flags["number_iterations"] == 0 and "number_iterations" in names:
        chosen.append("number_iterations")
    if chosen:
        listing = ", ".join(f"--{name}" for name in chosen)
        raise InputError(f"{listing}: {why}", where=flags["model"], hint="Take it out.")


class _Parser(argparse.ArgumentParser):
    """argparse, whose mistakes end the program as those of the other commands do, with a near flag."""

    def error(self, message: str) -> NoReturn:
        raise typer.BadParameter(message)

    def check(self, arguments: Sequence[str], start: argparse.Namespace | None = None) -> argparse.Namespace:
        """Parse, over what `start` says; name the nearest flag for unknown ones."""
        try:
            namespace, rest = self.parse_known_args(list(arguments), start)
        except argparse.ArgumentError as error:
            raise typer.BadParameter(str(error)) from error
        if rest:
            known = [flag for action in self._actions for flag in action.option_strings]
            flag = rest[0].partition("=")[0]
            what = f"No such option: {flag}." if flag.startswith("-") else f"Unexpected argument: {rest[0]}."
            raise typer.BadParameter(what + did_you_mean(flag, known))
        return namespace


def _truth(text: str) -> bool:
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _count(least: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


def _percent(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{value} is not a percentile: 1 to 100")
    return value


def parser() -> _Parser:
    """Return the parser of the command's arguments."""
    made = _Parser(
        prog="ovforge benchmark",
        description="Measure a model, or a whole pipeline. Exit codes: 0 done, 1 an error that is explained, "
        "2 wrong usage, 130 interrupted (the report holds what was measured).",
        epilog="Example: ovforge benchmark pipeline.toml -niter 10 --json",
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = made.add_argument
    add("model", nargs="?", help="A model of any form that a loader here opens, or a pipeline (.toml, .json, .png).")
    flag: dict[str, Any] = {"type": _truth, "nargs": "?", "const": True}

    group = made.add_argument_group("what to run")
    add = group.add_argument
    add("-m", "--path_to_model", metavar="MODEL", help="The same as the first argument.")
    add("--role", help="Which model of a folder of several.")
    add("--key", metavar="KIND:PLACE", help="Where the key of an encrypted model is: env:NAME.")
    add(
        "-i", "--paths_to_input", nargs="+", action="append", metavar="PATH", default=[],
        help="Pictures, .npy, .npz, .bin or folders; INPUT:FILE,FILE by name. Pipelines: NAME=VALUE of an input.",
    )  # fmt: skip
    add("-d", "--target_device", default="CPU", metavar="DEVICE", help="CPU, GPU, NPU, AUTO, HETERO:..., MULTI:...")
    add("-hint", "--perf_hint", choices=_HINTS, help="What the device should optimise for.")
    add("-api", "--api_type", choices=("sync", "async"), help="One after another, or several at once.")
    add("-niter", "--number_iterations", type=_count(0), metavar="N", help="Iterations; 0 compiles only.")
    add("-t", "--time", type=_count(1), metavar="SECONDS", help="How long; 60 if -niter is not given.")
    add("-max_irate", "--maximum_inference_rate", type=float, default=0.0, metavar="FPS", help="Run no faster.")

    group = made.add_argument_group("shapes")
    add = group.add_argument
    add("-b", "--batch_size", metavar="N", help="Size of the batch dimension.")
    add("-shape", metavar="SHAPE", help="Of the model: input1[1,3,224,224],input2[1,4]; ? and 1..8 are open.")
    add("-data_shape", metavar="SHAPE", help="Of the data: input1[1,128][1,256]: several are fed in turn.")
    add("-layout", metavar="LAYOUT", help="input1[NCHW],input2[NC]")

    group = made.add_argument_group("how")
    add = group.add_argument
    add("-nireq", "--number_infer_requests", type=_count(1), metavar="N", help="Requests at once, in async.")
    add("-nstreams", "--number_streams", metavar="N", help="Or DEVICE:N,DEVICE:N.")
    add("-nthreads", "--number_threads", type=_count(1), metavar="N", help="CPU threads.")
    add("-pin", "--infer_threads_pinning", choices=("YES", "NO"), help="Threads to cores.")
    add("-infer_precision", metavar="TYPE", help="f32, bf16, f16; or DEVICE:TYPE,...")
    add("-inference_only", "--inference_only", **flag, help="Fill inputs once, before; else in the loop.")
    add("-no_warmup", action="store_true", help="Do not run once before.")
    add("-extensions", "--extensions", metavar="PATH", help="Libraries of operations, with commas.")
    add("-c", "--path_to_cldnn_config", metavar="PATH", help="GPU: description of custom kernels.")
    add("-cdir", "--cache_dir", metavar="PATH", help="The device's own cache of compiled models.")
    add("-lfile", "--load_from_file", nargs="?", const=True, help="Compile the file, without reading it first.")

    group = made.add_argument_group("inputs and outputs")
    add = group.add_argument
    add("-ip", "--input_precision", choices=TYPES, help="Type of all inputs.")
    add("-op", "--output_precision", choices=TYPES, help="Type of all outputs.")
    add("-iop", "--input_output_precision", metavar="NAME:TYPE,...", help="Types by name, over -ip and -op.")
    add("-mean_values", "--mean_values", metavar="[R,G,B]", help="Taken from pictures, by channel.")
    add("-scale_values", "--scale_values", metavar="[R,G,B]", help="Pictures are divided by these, by channel.")

    group = made.add_argument_group("reports")
    add = group.add_argument
    add("-latency_percentile", "--latency_percentile", type=_percent, default=50, metavar="P")
    add("-report_type", "--report_type", choices=("no_counters", "average_counters", "detailed_counters"))
    add("-report_folder", "--report_folder", metavar="PATH", default=".")
    add("-json_stats", "--json_stats", **flag, default=False, help="Reports of -report_type in JSON, not CSV.")
    add("-pc", "--perf_counts", **flag, default=False, help="Time of each layer; of each role, for pipelines.")
    add("-pcsort", "--perf_counts_sort", choices=("no_sort", "sort", "simple_sort"), help="Order of -pc.")
    add("-pcseq", "--pcseq", **flag, default=False, help="Latency of each group of -data_shape (always shown).")
    add("-exec_graph_path", "--exec_graph_path", metavar="PATH", help="Write the graph that runs.")
    add("-dump_config", metavar="PATH", help="Write the device's settings as JSON.")
    add("-load_config", metavar="PATH", help="Read them; flags come first.")

    group = made.add_argument_group("pipelines, and more than benchmark_app does")
    add = group.add_argument
    add("-s", "--set", action="append", default=[], metavar="KEY=VALUE", help="Override a key of a pipeline.")
    add("--runs", type=_count(1), help="Measured calls of a pipeline: 10.")
    add("--no-cache", action="store_true", help="Pipelines: keep nothing on disk.")
    add("--trust", action="store_true", help="Run a stranger's pipeline although it uses files outside its folder.")
    add("--against", metavar="B", help="Measure two in turn, until the ratio is known.")
    add("--within", type=float, default=0.02, metavar="PART", help="How narrow the ratio's interval must be: 0.02.")
    add("--tune", action="store_true", help="Search streams, threads, requests, hints and precisions within -t.")
    add("-o", "--output", metavar="REPORT", help="Write REPORT.json, .csv, .md and .html.")
    add("--schema", action="store_true", help="Print the JSON Schema of all reports, and do nothing else.")
    add("-q", "--quiet", action="store_true", help="Print nothing but errors.")
    add("--json", action="store_true", help="Print the report as JSON.")
    add("--json-lines", action="store_true", help="Print a JSON object a line while it runs, the report last.")
    return made
