"""`ovforge benchmark` and bench-diff: one model, a whole pipeline, two in turn. No test needs a speed."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops
from PIL import Image
from typer.testing import CliRunner, Result

from ovforge.cli import app
from ovforge.errors import DeviceError, InputError, ModelError, OvforgeError
from ovforge_benchmark.against import interval
from ovforge_benchmark.feeds import make_feeds
from ovforge_benchmark.flags import parser
from ovforge_benchmark.operators import counters
from ovforge_benchmark.prepare import prepare
from ovforge_benchmark.reports import write_counters
from ovforge_benchmark.schema import Benchmark
from ovforge_benchmark.shapes import describe_inputs
from ovforge_benchmark.statistics import histogram, percentile, summary, timeline
from ovforge_benchmark.tune import settings_to_try

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/compare-f32.toml"
ENCODER = ROOT / "plugins/lcm/src/ovforge_lcm/model/text_encoder/openvino_model.xml"


def ran(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def report(*arguments: object) -> Benchmark:
    done = ran("benchmark", *arguments, "--json")
    assert done.exit_code == 0, done.output
    return Benchmark.model_validate_json(done.stdout)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture's model of fixed and one of open shape, a table's, and one of two inputs."""
    folder = tmp_path_factory.mktemp("models")
    for name, shape in (("image", [1, 3, 16, 24]), ("open", [-1, 3, -1, -1])):
        x = ops.parameter(ov.PartialShape(shape), np.float32, name="image")
        y = ops.relu(ops.convolution(x, np.ones((2, 3, 3, 3), np.float32), [1, 1], [1, 1], [1, 1], [1, 1]))
        y.output(0).set_names({"y"})
        ov.save_model(ov.Model([ops.result(y)], [x], name), folder / f"{name}.xml")
    ids = ops.parameter([1, 6], np.int64, name="ids")
    table = ops.constant(np.ones((50, 4), np.float32))
    rows = ops.gather(table, ids, ops.constant(np.int64(0)))
    ov.save_model(ov.Model([ops.result(rows)], [ids], "table"), folder / "table.xml")
    a, b = (ops.parameter(ov.PartialShape([-1, 4]), np.float32, name=name) for name in "ab")
    ov.save_model(ov.Model([ops.result(ops.add(a, b))], [a, b], "two"), folder / "two.xml")
    return folder


def flags_of(*arguments: object) -> dict[str, Any]:
    found = vars(parser().check(list(map(str, arguments))))
    return {**found, "model": found["model"] or found["path_to_model"]}


# -- numbers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-7, 10), min_size=1, max_size=200))
@settings(max_examples=100)
def test_statistics_count_every_sample(samples: list[float]) -> None:
    said = summary(samples)
    assert said.count == len(samples)
    assert said.min <= said.median <= said.p90 <= said.p95 <= said.p99 <= said.max
    for percent in (1, 50, 90, 100):
        value = percentile(sorted(samples), percent)
        assert value in samples
        assert sum(sample <= value for sample in samples) >= len(samples) * percent / 100
    assert sum(histogram(samples).counts) == len(samples)
    times = [n + 1.0 for n in range(len(samples))]
    assert sum(moment.count for moment in timeline(samples, times)) == len(samples)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    draw, truth, hits = random.Random(0), 1.3, 0
    for _ in range(2000):
        logs = [math.log(truth) + draw.gauss(0, 0.2) for _ in range(8)]
        ratio, low, high = interval(logs)
        assert low < ratio < high
        hits += low < truth < high
    assert abs(hits / 2000 - 0.95) < 0.015
    # Student's t of 7 degrees of freedom is 2.3646 (Abramowitz and Stegun, table 26.10).
    logs = [0.1, 0.2, 0.3, 0.1, 0.25, 0.15, 0.3, 0.2]
    half = 2.3646 * statistics.stdev(logs) / math.sqrt(8)
    assert interval(logs)[2] == pytest.approx(math.exp(statistics.fmean(logs) + half), rel=1e-4)


# -- one model --------------------------------------------------------------------------------------------------------


def test_flags_are_those_of_benchmark_app() -> None:
    theirs = pytest.importorskip("openvino.tools.benchmark.parameters").parse_args()
    known = {name for action in parser()._actions for name in action.option_strings}
    missing = {name for action in theirs._actions for name in action.option_strings} - known
    assert missing == set()
    choices = {name: set(action.choices or ()) for action in parser()._actions for name in action.option_strings}
    for action in theirs._actions:
        assert all(set(action.choices or ()) <= choices[name] for name in action.option_strings)


@pytest.mark.parametrize("api", ["sync", "async"])
def test_a_model_is_run_as_often_as_asked_and_all_is_counted(api: str, models: Path, tmp_path: Path) -> None:
    graph, config, folder = tmp_path / "graph.xml", tmp_path / "config.json", tmp_path / "reports"
    folder.mkdir()
    said = report(
        models / "image.xml", "-api", api, "-niter", 7, "-nstreams", 1, "-infer_precision", "f32", "-b", 2,
        *(("-nireq", 3) if api == "async" else ()), "-latency_percentile", 90, "-exec_graph_path", graph,
        "-dump_config", config, "-report_type", "detailed_counters", "-report_folder", folder, "-o", tmp_path / "r",
    )  # fmt: skip
    count = 7 if api == "sync" else 9
    assert said.latency and said.latency.count == said.iterations == count, "async: a multiple of the requests"
    assert said.throughput == pytest.approx(2 * count / said.duration), "a batch of two"
    assert said.percentile == {"90": said.latency.p90}
    assert said.ran["INFERENCE_PRECISION_HINT"] == "f32" and said.ran["NUM_STREAMS"] == "1"
    assert said.asked["number_streams"] == "1" and said.ran["requests"] == (1 if api == "sync" else 3)
    assert said.inputs[0].type == "u8" and said.inputs[0].shape == "[2,3,16,24]", "a picture is fed as bytes"
    assert "Convolution" in {one.type for one in said.operators}
    assert sum(one.share for one in said.operators) == pytest.approx(1)
    assert {"read", "compile", "first"} <= set(said.start) and said.histogram and said.peak_memory
    assert json.loads(config.read_text())["CPU"]["NUM_STREAMS"] == "1"
    layers = xml.etree.ElementTree.parse(graph).getroot().iter("layer")
    assert "Convolution" in {layer.get("type") for layer in layers}
    assert sorted(path.name for path in folder.iterdir()) == [
        "benchmark_detailed_counters_report.csv",
        "benchmark_report.csv",
    ]
    text = (folder / "benchmark_detailed_counters_report.csv").read_text()
    assert text.count("\nTotal;;;;") == said.ran["requests"]
    assert Benchmark.model_validate_json((tmp_path / "r.json").read_text()) == said
    again = report(models / "image.xml", "-load_config", config, "-niter", 1, "-api", api)
    assert again.ran["NUM_STREAMS"] == "1"


def test_layers_are_reported_as_benchmark_app_does(models: Path, tmp_path: Path) -> None:
    """The same request's counters through the reports of openvino.tools.benchmark, byte for byte."""
    theirs = pytest.importorskip("openvino.tools.benchmark.utils.statistics_report")
    compiled = ov.Core().compile_model(models / "image.xml", "CPU", {"PERF_COUNT": True})
    requests = [compiled.create_infer_request() for _ in range(2)]
    for request in requests:
        request.infer([np.ones((1, 3, 16, 24), np.float32)])
    infos = [request.profiling_info for request in requests]
    each = [counters(one) for one in infos]
    done = report(models / "image.xml", "-niter", 1, "-api", "sync")
    for kind in ("detailed_counters", "average_counters"):
        for suffix, made in (("csv", theirs.CsvStatisticsReport), ("json", theirs.JsonStatisticsReport)):
            ours, other = tmp_path / kind / suffix, tmp_path / f"app-{kind}" / suffix
            for folder in (ours, other):
                folder.mkdir(parents=True)
            flags = {
                "report_folder": ours,
                "report_type": kind,
                "json_stats": suffix == "json",
                "perf_counts_sort": "sort",
            }
            write_counters(flags, done, each)
            made(theirs.StatisticsReport.Config(kind, str(other))).dump_performance_counters(
                [request.profiling_info for request in requests]
            )
            name = f"benchmark_{kind}_report.{suffix}"
            if (kind, suffix) != ("average_counters", "json"):  # of which benchmark_app writes the first layer alone
                assert _parsed(ours / name) == _parsed(other / name)
            ordered = (ours / f"benchmark_sorted_report.{suffix}").read_text()
            assert ("layerName,execStatus,layerType,execType,realTime (ms),cpuTime (ms)," in ordered) == (
                suffix == "csv"
            )
            assert "Convolution" in ordered


def _parsed(path: Path) -> Any:
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else text


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "MULTI:CPU", "HETERO:CPU"])
def test_settings_of_combined_devices_go_round(device: str, models: Path, tmp_path: Path) -> None:
    theirs = pytest.importorskip("openvino.tools.benchmark.utils.utils")
    config, again = tmp_path / "config.json", tmp_path / "again.json"
    asked = ("-d", device, "-niter", 1, "-api", "async")
    first = report(
        models / "image.xml", *asked, "-nstreams", "CPU:2", "-infer_precision", "CPU:f32", "-dump_config", config
    )
    second = report(models / "image.xml", *asked, "-load_config", config, "-dump_config", again)
    assert first.precision == second.precision == {"CPU": "f32"}
    assert first.ran["CPU.NUM_STREAMS"] == second.ran["CPU.NUM_STREAMS"] == "2"
    assert json.loads(config.read_text()) == json.loads(again.read_text())
    read: dict[str, Any] = {}
    theirs.load_config(config, read)
    name = device.partition(":")[0]
    assert read[name]["DEVICE_PROPERTIES"] == {"CPU": {"NUM_STREAMS": "2", "INFERENCE_PRECISION_HINT": "f32"}}
    nested = {name: {"PERFORMANCE_HINT": "", "PERF_COUNT": "NO", "DEVICE_PROPERTIES": {"CPU": {"NUM_STREAMS": "2"}}}}
    for value in (nested, {name: {"DEVICE_PROPERTIES": "{'CPU': {'NUM_STREAMS': '2'}}"}}):
        config.write_text(json.dumps(value))
        assert report(models / "image.xml", *asked, "-load_config", config).ran["CPU.NUM_STREAMS"] == "2"


def test_pictures_of_any_size_are_not_taken_for_bytes(models: Path) -> None:
    said = report(models / "open.xml", "-data_shape", "[1,3,8,8]", "-niter", 1)
    assert said.inputs[0].type == "f32"
    limited = report(models / "open.xml", "-shape", "[1,3,1..8,1..8]", "-data_shape", "[1,3,8,8]", "-niter", 1)
    assert limited.inputs[0].type == "u8"


def test_groups_of_shapes_are_fed_in_turn(models: Path) -> None:
    said = report(models / "two.xml", "-data_shape", "a[1,4][3,4],b[1,4][3,4]", "-layout", "[NC]", "-niter", 8)
    assert [group.shapes["a"] for group in said.groups] == [(1, 4), (3, 4)]
    assert all(group.latency and group.latency.count == said.iterations / 2 for group in said.groups)
    assert said.throughput == pytest.approx(said.iterations / 2 * (1 + 3) / said.duration), "frames, not inferences"


def test_reshaped_read_from_a_blob_and_compiled_only(models: Path, tmp_path: Path) -> None:
    assert report(models / "open.xml", "-niter", 0).latency is None
    fixed = report(models / "open.xml", "-shape", "[1,3,8,8]", "-niter", 2, "-ip", "f32", "-mean_values", "[1,2,3]")
    assert fixed.inputs[0].type == "f32" and fixed.start["reshape"] >= 0
    blob = tmp_path / "x.blob"
    blob.write_bytes(ov.Core().compile_model(models / "image.xml", "CPU").export_model().getvalue())
    assert "import" in report(blob, "-niter", 1).start
    assert report(models / "image.xml", "-lfile", "-niter", 1).iterations >= 1
    folder = ROOT / "plugins/lcm/src/ovforge_lcm/model"
    assert report(folder, "--role", "text_encoder", "-data_shape", "[1,7]", "-niter", 1).inputs[0].name == "input_ids"


def test_an_encrypted_model_is_measured_with_its_key(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("ovforge_aes_loader")
    monkeypatch.setenv("BENCH_KEY", os.urandom(32).hex())  # a process remembers the keys that it has seen
    sealed = tmp_path / "sealed"
    assert ran("encrypt", models / "table.xml", "-o", sealed, "-k", "env:BENCH_KEY").exit_code == 0
    with pytest.raises(OvforgeError, match="key"):
        ran("benchmark", sealed / "table.xml.ovenc", "-niter", 1)
    assert report(sealed / "table.xml.ovenc", "--key", "env:BENCH_KEY", "-niter", 1).inputs[0].name == "ids"


def test_inputs_come_from_files_and_numbers_stay_in_the_table(models: Path, tmp_path: Path) -> None:
    def feeds(model: str, *paths: object, shape: str | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
        graph = ov.Core().read_model(models / model)
        flags = {**flags_of("x"), "data_shape": shape}
        inputs, _ = describe_inputs(graph.inputs, flags)
        made, said = make_feeds(inputs, list(map(str, paths)))
        return [{name: tensor.data for name, tensor in feed.items()} for feed in made], said

    [ids], _ = feeds("table.xml")
    assert ids["ids"].max() < 50, "the table has 50 rows"
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "both.npz", a=array, b=array + 1)
    (tmp_path / "raw.bin").write_bytes((array + 2).tobytes())
    made, said = feeds("two.xml", f"a:{tmp_path / 'a.npy'}", f"b:{tmp_path / 'raw.bin'}", shape="b[2,4]")
    np.testing.assert_array_equal(made[0]["a"], array)
    np.testing.assert_array_equal(made[0]["b"], array + 2)
    assert said == {"a": "a.npy", "b": "raw.bin"}
    made, _ = feeds("two.xml", tmp_path / "both.npz")
    np.testing.assert_array_equal(made[0]["b"], array + 1)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (48, 32), (number, 7, 9)).save(pictures / f"{number}.png")
    made, _ = feeds("image.xml", pictures)
    assert [feed["image"][0, 0, 0, 0] for feed in made] == [0, 1, 2] and made[0]["image"].shape == (1, 3, 16, 24)
    made, _ = feeds("open.xml", pictures / "0.png")
    assert made[0]["image"].shape == (1, 3, 32, 48), "its own size where the model's is open"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["open.xml"], InputError, "open shape"),
        (["open.xml", "-data_shape", "[1,4,8,8]"], InputError, "does not fit"),
        (["open.xml", "-data_shape", "[1,3,8,8][1,3,9,9]", "-api", "sync"], InputError, "measured in async"),
        (["open.xml", "-data_shape", "nothing[1]"], InputError, "no input 'nothing'"),
        (["image.xml", "-shape", "1,3,8,8"], InputError, "cannot be read"),
        (["image.xml", "-shape", "[1,5,8,8]"], InputError, "cannot have the shapes"),
        (["image.xml", "-d", "CPV"], DeviceError, "Did you mean 'CPU'"),
        (["image.xml", "-hint", "latency", "-nstreams", "2"], InputError, "settings of one's own"),
        (["image.xml", "-iop", "nothing:f32"], InputError, "is not NAME:TYPE"),
        (["image.xml", "-i", "nowhere"], InputError, "no such file"),
        (["image.xml", "-infer_precision", "f99"], OvforgeError, ""),
        (["image.xml", "-load_config", "nowhere.json"], InputError, "no such file"),
        (["image.xml", "-data_shape", "[1,3,8,8]"], InputError, "does not fit"),
        (["image.xml", "-b", "0"], InputError, "a batch of 0"),
        (["open.xml", "-shape", "[0,3,8,8]"], InputError, "a side is 0"),
        (["open.xml", "-data_shape", "[1,3,0,8]"], InputError, "a side is 0"),
        (["image.xml", "-i", "nope:a.npy"], InputError, "has no input 'nope'"),
        (["image.xml", "-i", "imag:a.npy"], InputError, "Did you mean 'image'"),
        (["image.xml", "-o", "nowhere/r"], InputError, "no such folder"),
        (["two.xml", "-i", "a:wrong.npy"], InputError, "holds float64"),
        (["two.xml", "-data_shape", "[2,4]", "-i", "short.bin"], InputError, "3 bytes"),
        (["broken.xml"], ModelError, "not valid XML"),
        (["image.xml", "-s", "input.steps=4"], InputError, "only for pipelines"),
        (["image.xml", "--tune", "-hint", "latency"], InputError, "tries settings itself"),
        (["image.xml", "--against", "open.xml", "-pc"], InputError, "measures two in turn"),
    ],
)
def test_mistakes(arguments: list[str], error: type[Exception], message: str, models: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(models)
    np.save(models / "wrong.npy", np.zeros((1, 4)))
    (models / "short.bin").write_bytes(b"abc")
    (models / "broken.xml").write_text("<net")
    with pytest.raises(error) as raised:
        ran("benchmark", *arguments, "-q")
    assert message in str(raised.value)


def test_wrong_usage_ends_with_2_and_names_the_flag(models: Path) -> None:
    for arguments, said in (
        (["-nitr", "3"], "Did you mean '-niter'"),
        (["-niter", "-1"], "less than 0"),
        (["-latency_percentile", "101"], "1 to 100"),
        (["-api", "both"], "invalid choice"),
    ):
        done = ran("benchmark", models / "image.xml", *arguments)
        assert done.exit_code == 2 and said in done.output


def test_devices_that_combine_others(models: Path) -> None:
    for device, more in (("HETERO:CPU", ()), ("MULTI:CPU", ("-hint", "none", "-nstreams", "CPU:1")), ("AUTO:CPU", ())):
        assert report(models / "table.xml", "-d", device, *more, "-niter", 2).iterations >= 2


# -- pipelines, and two of a kind -------------------------------------------------------------------------------------


def test_a_pipeline_tells_where_its_time_goes(tmp_path: Path) -> None:
    done = ran("benchmark", EXAMPLE, "--runs", 2, "-pc", "-o", tmp_path / "r", "--json-lines")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    said = Benchmark.model_validate(events[-1]["report"])
    assert [event["iterations"] for event in events if event["event"] == "running"] == [1, 2]
    assert said.stages["denoise.unet"].count == 8 and said.stages["vae_decoder"].count == 2, "two calls of four steps"
    assert said.shares["denoise.unet"] <= said.shares["denoise"] <= 1
    assert {"load", "compile", "compile.unet", "first"} <= set(said.start)
    assert {one.role for one in said.operators} == {"text_encoder", "unet", "vae_decoder", "tokenizer"} - (
        {"tokenizer"} - {one.role for one in said.operators}
    )
    assert said.precision == {"text_encoder": "f32", "unet": "f32", "vae_decoder": "f32"}
    page = (tmp_path / "r.html").read_text()
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "it needs nothing from elsewhere"
    for start in (n for n in range(len(page)) if page.startswith("<svg", n)):
        svg = xml.etree.ElementTree.fromstring(page[start : page.index("</svg>", start) + 6])
        boxes = list(svg.iter("{http://www.w3.org/2000/svg}rect"))
        assert all(float(box.get("x", 0)) + float(box.get("width", 0)) <= 1001 for box in boxes)
    assert "Convolution" in page and "unet" in page
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert (
        float(next(row for row in rows if row["name"] == "denoise.unet")["median"])
        == said.stages["denoise.unet"].median
    )
    with pytest.raises(InputError, match="only for single models"):
        ran("benchmark", EXAMPLE, "-shape", "[1]")


def test_two_against_each_other_and_the_difference_of_reports(models: Path, tmp_path: Path) -> None:
    small = models / "table.xml"
    done = ran("benchmark", small, "-api", "sync", "--against", f"{ENCODER} -data_shape [1,77]", "-t", 1, "--json")
    said = json.loads(done.stdout)
    assert said["ratio"] < 1 and said["low"] <= said["ratio"] <= said["high"] and said["pairs"] >= 2
    assert said["labels"][0] == str(small)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert ran("benchmark", small, "-niter", 5, "-q", "-o", old).exit_code == 0
    assert ran("bench-diff", old, old).exit_code == 0
    changed = json.loads(old.read_text())
    for name in ("median", "p90"):
        changed["latency"][name] *= 1.2
    new.write_text(json.dumps(changed))
    worse = ran("bench-diff", old, new, "--json")
    assert worse.exit_code == 3 and json.loads(worse.stdout)["worse"] == ["latency"]
    assert ran("bench-diff", old, new, "--threshold", "0.3").exit_code == 0
    assert ran("bench-diff", new, old).exit_code == 0, "it became faster"
    new.write_text(json.dumps({**changed, "schema_version": 99}))
    with pytest.raises(InputError, match="version 99"):
        ran("bench-diff", old, new)
    new.write_text("{}")
    with pytest.raises(InputError, match="no report"):
        ran("bench-diff", old, new)


def test_tuning_tries_settings_and_gives_lines_for_a_config(models: Path, tmp_path: Path) -> None:
    tried = list(settings_to_try("CPU"))
    assert len({json.dumps(one, sort_keys=True) for one in tried}) == len(tried)
    done = ran("benchmark", models / "table.xml", "--tune", "-t", 3, "-o", tmp_path / "tuned")
    assert len(json.loads((tmp_path / "tuned.json").read_text())["trials"]) >= 2
    assert done.exit_code == 0 and "Best latency" in done.stdout and "[device]\nprecision = " in done.stdout
    assert done.stdout.count("| -infer_precision") >= 2


def test_an_interruption_leaves_a_report(models: Path, tmp_path: Path) -> None:
    for name, number in (("image.xml", signal.SIGINT), (str(EXAMPLE), signal.SIGTERM)):
        run = subprocess.Popen(
            [
                *(sys.executable, "-c", "from ovforge.cli import main; main()", "benchmark", name, "-t", "600"),
                *("-o", str(tmp_path / "r"), "--json-lines"),
            ],
            stdout=subprocess.PIPE, text=True, cwd=models, start_new_session=True,
        )  # fmt: skip
        assert run.stdout
        for line in run.stdout:
            if json.loads(line)["event"] == "running":
                break
        run.send_signal(number)
        rest = run.stdout.read()
        assert run.wait(timeout=30) == 130
        said = Benchmark.model_validate_json((tmp_path / "r.json").read_text())
        assert not said.complete and said.iterations > 0
        assert json.loads(rest.splitlines()[-1])["report"]["complete"] is False


def test_prepared_models_are_fed_what_the_flags_say(models: Path) -> None:
    prepared = prepare(flags_of(models / "image.xml", "-ip", "f16", "-op", "f32", "-iop", "y:f16", "-api", "sync"))
    assert prepared.inputs[0].type == ov.Type.f16
    assert prepared.compiled.output(0).get_element_type() == ov.Type.f16, "-iop comes first"


def test_the_documented_examples_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every `ovforge benchmark` of the page that names a model, on those that are shipped; two iterations of each."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/plugins/benchmark.md").read_text()
    model = re.search(r"^MODEL=(.*)$", page, re.MULTILINE)
    assert model
    text = page.replace("\\\n", " ").replace("$MODEL", model[1])
    commands = [shlex.split(line)[2:] for line in re.findall(r"^ovforge benchmark .*$", text, re.MULTILINE)]
    models = [command for command in commands if not command[0].endswith(".toml")]
    assert len(models) >= 3 and all(Path(one[0]).exists() for one in commands if not one[0].startswith("package:"))
    for command in models:
        short = command[: command.index("--against")] if "--against" in command else command
        done = report(*[part for part in short if part not in ("-pc", "-t", "10")], "-niter", 2)
        assert done.iterations >= 2 and done.precision
