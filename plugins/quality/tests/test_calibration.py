"""Recording what models are given: an even draw, the same wherever it is kept, kept when it is interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel, ConfigDict

import ovforge
import ovforge_quality
from ovforge import hookimpl, testing
from ovforge.contracts.extensions import QuantizerExtension, TaskExtension
from ovforge.contracts.stages import Progress, Report
from ovforge.errors import Cancelled, ConfigError, ModelError, OvforgeError, PluginError
from ovforge.model.bundle import ModelBundle
from ovforge.model.pictures import Picture
from ovforge.model.results import Result
from ovforge.model.runtime import core
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.store import digest_file
from ovforge.store.cache import Cache
from ovforge_quality.examples import read_examples
from ovforge_quality.recording import MemoryStore, Reservoir, TemporaryStore, priority
from ovforge_quality.sections import CalibrationSection
from test_sources import Protection


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class SeeOptions(Strict):
    count: int = 100
    role: str = "model"


SEEN: list[list[float]] = []
RUNS: list[float] = []


class See:
    """A quantizer that notes what it is shown."""

    def __init__(self, options: SeeOptions) -> None:
        self.options = options

    def quantize(self, bundle: ModelBundle, calibration: Any) -> Report:
        records = calibration.inputs(self.options.role, self.options.count)
        SEEN.append([float(record["x"][0, 0]) for record in records])
        return Report(applied=[f"saw {len(records)}"])


class Inputs(Strict):
    x: float = 0.0
    seed: int = 0
    steps: int = 2


class Steps:
    """Runs its model once a step, on x + step / 100."""

    def __init__(self, options: None, context: Any) -> None:
        self.context = context

    def __call__(self, inputs: Inputs, progress: Any) -> Result:
        RUNS.append(inputs.x)
        request = self.context.bundle["model"].create_infer_request()
        for step in range(inputs.steps):
            request.infer({"x": np.full((1, 4), inputs.x + step / 100, np.float32)})
        return Result()

    def examples(self, count: int) -> Sequence[Inputs]:
        return [Inputs(x=number) for number in range(count)]


class Mute(Steps):
    def examples(self, count: int) -> Sequence[Inputs]:
        return []


def plugins() -> Plugins:
    module = ModuleType("sees")

    @hookimpl
    def ovforge_quantizers() -> Iterator[QuantizerExtension]:
        yield QuantizerExtension(name="see", summary="Sees", factory=See, config=SeeOptions, needs="inputs")
        yield QuantizerExtension(name="see-more", summary="Sees", factory=See, config=SeeOptions, needs="nothing")

    @hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        yield TaskExtension(name="steps", summary="Runs", factory=Steps, inputs=Inputs, roles=("model",))
        yield TaskExtension(name="mute", summary="Runs", factory=Mute, inputs=Inputs, roles=("model",))

    module.ovforge_quantizers = ovforge_quantizers  # type: ignore[attr-defined]
    module.ovforge_tasks = ovforge_tasks  # type: ignore[attr-defined]
    found = Plugins(Registry({}), found=())
    found.register(module, "sees", "1.0")
    found.register(ovforge_quality, "quality", "1.0")
    return found


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    SEEN.clear()
    RUNS.clear()
    testing.small_bundle().save(tmp_path / "model")
    return {"task": "steps", "load": str(tmp_path / "model"), "quantize": ["see"], "device": {"precision": "f32"}}


def load(config: Mapping[str, Any], cache: Cache | None, progress: Callable[[Progress], None] = lambda _: None) -> Any:
    return ovforge.load(config, plugins=plugins(), cache=cache, progress=progress)


# -- the draw ---------------------------------------------------------------------------------------------------------


def record(value: float) -> dict[str, Any]:
    return {"x": np.array([value], np.float32)}


def fill(reservoir: Reservoir, runs: Sequence[int], start: int = 0) -> Reservoir:
    number = start
    for calls in runs:
        for _ in range(calls):
            reservoir.count("unet", lambda number=number: record(number))  # type: ignore[misc]
            number += 1
        reservoir.commit()
    return reservoir


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(0, 5), st.lists(st.integers(0, 9), max_size=8))
def test_what_is_kept_are_the_lowest_priorities_of_all(capacity: int, seed: int, runs: list[int]) -> None:
    """However calls fall into runs; so the draw is a simple random sample, and a smaller one begins a larger one."""
    kept = [int(r["x"][0]) for r in fill(Reservoir(capacity, seed, MemoryStore()), runs).records("unet")]
    everything = sorted(range(sum(runs)), key=lambda position: priority(seed, "unet", position))
    assert kept == everything[:capacity]
    larger = [int(r["x"][0]) for r in fill(Reservoir(capacity + 3, seed, MemoryStore()), runs).records("unet")]
    assert larger[:capacity] == kept


def test_the_draw_is_even() -> None:
    """Over many seeds each position is kept as often as any other (chi-squared with 19 degrees of freedom)."""
    counts = np.zeros(20)
    for seed in range(2000):
        for kept in fill(Reservoir(5, seed, MemoryStore()), [7, 13]).records("unet"):
            counts[int(kept["x"][0])] += 1
    # Five of twenty without replacement: the variance of a count is n p (1 - p), and counts sum to a constant.
    statistic = ((counts - 500) ** 2 / (2000 * 0.25 * 0.75)).sum() * 19 / 20
    assert statistic < 43.8, "p = 0.001"


@settings(max_examples=25)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 6), st.booleans())
def test_on_disk_is_as_in_memory_and_an_interruption_leaves_no_trace(
    runs: list[int], stop: int, lost: int, sealed: bool
) -> None:
    memory = fill(Reservoir(4, 7, MemoryStore()), runs)
    store = TemporaryStore(Protection() if sealed else None)
    first = fill(Reservoir(4, 7, store), runs[:stop])
    for number in range(lost):  # a run that never ends
        first.count("unet", lambda number=number: record(-1 - number))  # type: ignore[misc]
    first.forget()
    again = Reservoir(4, 7, store, json.loads(json.dumps(first.state())))
    fill(again, runs[stop:], sum(runs[:stop]))
    assert [r["x"].tolist() for r in again.records("unet")] == [r["x"].tolist() for r in memory.records("unet")]
    assert len(list(store.root.rglob("*.*"))) == len(memory.records("unet")), "what was dropped is gone"
    assert again.state() == memory.state()


def test_only_what_may_be_kept_is_copied() -> None:
    made: list[int] = []
    reservoir = Reservoir(3, 0, MemoryStore())
    for run in range(50):
        for call in range(20):
            position = run * 20 + call
            reservoir.count("unet", lambda position=position: made.append(position) or record(position))  # type: ignore[misc, func-returns-value]
        reservoir.commit()
    assert len(made) < 80, "about 3 (1 + ln(1000 / 3)), and a run's own"


# -- through a pipeline -----------------------------------------------------------------------------------------------


def test_all_steps_are_recorded_and_the_same_seed_gives_the_same(config: dict[str, Any], cache: Cache) -> None:
    config["calibration"] = {"samples": 10, "runs": 4, "options": {"steps": 3}}
    load(config, None)
    assert len(SEEN[0]) == 10
    everything = {round(x + step / 100, 2) for x in (0, 2, 4, 6) for step in range(3)}
    assert {round(x, 2) for x in SEEN[0]} < everything, "every second example, at every step"
    load(config, None)
    load({**config, "calibration": {**config["calibration"], "spill": True}}, None)
    load(config, cache)
    load(
        {**config, "calibration": {**config["calibration"], "spill": True}, "quantize": ["see"]},
        Cache(cache.root / "other"),
    )
    assert all(seen == SEEN[0] for seen in SEEN)
    load({**config, "calibration": {**config["calibration"], "seed": 1}}, None)
    assert SEEN[-1] != SEEN[0]
    assert all(r not in RUNS for r in (1.0, 3.0, 5.0)), "those are held out"


def test_there_are_as_many_runs_as_the_records_take(config: dict[str, Any]) -> None:
    load({**config, "calibration": {"samples": 30}}, None)
    assert len(RUNS) == 15
    assert len(SEEN[0]) == 30
    RUNS.clear()
    load({**config, "calibration": {"samples": 3}}, None)
    assert len(RUNS) == 8, "a few runs would show too little"


def test_one_recording_serves_quantizers_and_starts(config: dict[str, Any], cache: Cache) -> None:
    config |= {"calibration": {"samples": 6, "runs": 3}, "quantize": ["see", {"use": "see", "count": 4}]}
    load(config, cache)
    assert RUNS == [0.0, 2.0, 4.0]
    assert SEEN[1] == SEEN[0][:4]
    load({**config, "quantize": [{"use": "see", "count": 5}]}, cache)
    assert len(RUNS) == 3
    assert SEEN[2] == SEEN[0][:5]
    for change in ({"samples": 7}, {"seed": 3}, {"options": {"steps": 5}}, {"inputs": [{"x": 1.0}]}):
        before = len(RUNS)
        load({**config, "calibration": {**config["calibration"], **change}}, cache)
        assert len(RUNS) > before, change


@pytest.mark.parametrize("how", [KeyboardInterrupt, Cancelled])
def test_an_interrupted_recording_goes_on(config: dict[str, Any], cache: Cache, how: type[BaseException]) -> None:
    config["calibration"] = {"samples": 9, "runs": 6}
    load(config, None)
    whole, moments = SEEN.pop(), []
    RUNS.clear()

    def stop(moment: Progress) -> None:
        if moment.stage == "calibration":
            moments.append(moment)
            if moment.done == 4:
                raise how

    with pytest.raises(how):
        load(config, cache, stop)
    assert SEEN == []
    assert (RUNS, moments[0].total) == ([0.0, 2.0, 4.0, 6.0], 6)
    assert moments[-1].note.endswith("s left")
    assert [entry.label for entry in cache.entries() if entry.stage.startswith("calibration")] == [
        "calibration, 4 runs"
    ]
    assert not list((cache.root / "work").iterdir()), "nothing half-written"
    load(config, cache)
    assert RUNS[4:] == [8.0, 10.0], "it went on where it was"
    assert [whole] == SEEN
    assert [entry.label for entry in cache.entries() if entry.stage.startswith("calibration")] == ["calibration"]


def test_records_of_encrypted_models_are_never_plain(
    config: dict[str, Any], cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovforge.run import pipeline

    config |= {"calibration": {"samples": 4, "runs": 2, "inputs": [{"x": 1234.5}], "spill": True}}
    real = pipeline.resolve

    def sealed(*arguments: Any, **more: Any) -> Any:
        import dataclasses

        return dataclasses.replace(real(*arguments, **more), protection=Protection())

    monkeypatch.setattr(pipeline, "resolve", sealed)
    load(config, cache)
    load(config, cache)
    [entry] = [entry for entry in cache.entries() if entry.stage == "calibration"]
    needle = np.float32(1234.5).tobytes() * 4
    for file in entry.path.rglob("*"):
        assert file.is_dir() or needle not in file.read_bytes()
        assert file.is_dir() or file.name == "entry.json" or file.suffix == ".flipped"
    config["quantize"] = [{"use": "see", "count": 3}]
    load(config, cache)
    assert len(RUNS) == 2, "and are read again"
    assert SEEN[-1] == SEEN[0][:3]


# -- where inputs come from -------------------------------------------------------------------------------------------


class PictureInputs(Strict):
    image: Picture
    label: str = ""


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [("x.txt", "1.5\n\n 2.5 \n", [1.5, 2.5]), ("x.jsonl", '{"x": 1.5, "steps": 4}\n{"x": 2.5}\n', [1.5, 2.5])],
)
def test_inputs_come_from_files(
    config: dict[str, Any], tmp_path: Path, cache: Cache, name: str, content: str, expected: list[float]
) -> None:
    (tmp_path / name).write_text(content)
    config["calibration"] = {"file": str(tmp_path / name), "runs": 4, "samples": 50}
    load(config, cache)
    assert [*expected, *expected] == RUNS, "they come again, with other seeds"
    (tmp_path / name).rename(tmp_path / f"moved-{name}")
    load({**config, "calibration": {**config["calibration"], "file": str(tmp_path / f"moved-{name}")}}, cache)
    assert len(RUNS) == 4, "a file counts by its content"


def test_folders_hold_pictures_for_tasks_that_take_them(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    table = CalibrationSection(file="pictures", options={"label": "cat"})
    with pytest.raises(ConfigError, match="no picture in it"):
        read_examples(table, PictureInputs, tmp_path, key="calibration", task="detect")
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (2, 2), "red").save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    examples = read_examples(table, PictureInputs, tmp_path, key="calibration", task="detect")
    taken = examples.take(Mute(None, None), 9)
    assert [inputs.image.name for inputs in taken] == ["a.jpg", "b.png"], "without a seed they do not come again"
    assert {inputs.label for inputs in taken} == {"cat"}
    before = examples.content(digest_file)
    Image.new("RGB", (2, 2), "blue").save(folder / "b.png")
    assert examples.content(digest_file) != before
    with pytest.raises(ConfigError, match="first input of steps is `x`"):
        read_examples(CalibrationSection(file="pictures"), Inputs, tmp_path, key="calibration", task="steps")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"calibration": {"file": "nowhere.txt"}}, ConfigError, r"calibration.file: .*nowhere.txt: no such file"),
        ({"calibration": {"file": "empty.txt"}}, ConfigError, "no line with anything on it"),
        ({"calibration": {"file": "words.txt"}}, ConfigError, r"words.txt, line 2: `x` should be a number"),
        ({"calibration": {"file": "bad.jsonl"}}, ConfigError, "bad.jsonl, line 1: not valid JSON"),
        ({"calibration": {"file": "list.jsonl"}}, ConfigError, "line 1: expected a JSON object"),
        ({"calibration": {"inputs": [{"y": 1}]}}, ConfigError, r"calibration.inputs.0: unknown key `y`"),
        ({"calibration": {"options": {"stepz": 1}}}, ConfigError, "unknown input `stepz`. Did you mean 'steps'"),
        ({"calibration": {"file": "words.txt", "inputs": [{"x": 1}]}}, ConfigError, "file or inputs, not both"),
        ({"calibration": {"samples": 0}}, ConfigError, "calibration: `samples`"),
        ({"calibration": {}, "quantize": []}, ConfigError, "calibration: it is for quantizers"),
        ({"quality": {"max_drop": 0.1}, "quantize": []}, ConfigError, "quality: it is for quantizers"),
        ({"quality": {}}, ConfigError, "min_score or max_drop, one of them"),
        ({"quality": {"metric": "psnr", "max_drop": 1}}, ConfigError, "min_score in dB"),
        ({"quality": {"min_score": 1.5}}, ConfigError, "more than equal results have"),
        (
            {"calibration": {"inputs": [{"x": 1}]}, "quality": {"max_drop": 0, "inputs": [{"x": 1.0}]}},
            ConfigError,
            "calibration has not seen",
        ),
    ],
)
def test_mistakes_are_found_before_any_run(
    config: dict[str, Any], cache: Cache, tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    for name, text in {"empty.txt": "\n \n", "words.txt": "1\nfox\n", "bad.jsonl": "{", "list.jsonl": "[1]"}.items():
        (tmp_path / name).write_text(text)
    written = tmp_path / "pipeline.json"
    written.write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=message):
        ovforge.load(written, plugins=plugins(), cache=cache)
    assert RUNS == []
    assert cache.entries() == []


@pytest.mark.parametrize("limit", ["nan", "-inf", "inf"])
def test_a_limit_that_is_no_number_is_refused(config: dict[str, Any], cache: Cache, limit: str) -> None:
    with pytest.raises(ConfigError, match="quality: `min_score` should be a finite number"):
        ovforge.load({**config, "quality": {"min_score": float(limit)}}, plugins=plugins(), cache=cache)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": "mute"}, ConfigError, "no examples of its own"),
        ({"quantize": [{"use": "see", "role": "unet"}]}, ModelError, "never runs 'unet'"),
        ({"quantize": ["see-more"]}, PluginError, "says that it needs nothing"),
    ],
)
def test_what_cannot_be_calibrated_is_said(
    config: dict[str, Any], change: dict[str, Any], error: type[OvforgeError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        load({**config, **change}, None)
    assert raised.value.hint


def test_stages_depend_on_what_calibrates_them(config: dict[str, Any], cache: Cache) -> None:
    config["calibration"] = {"samples": 4, "runs": 2}
    load(config, cache)

    def state(**change: Any) -> str:
        planned = ovforge.plan({**config, **change}, plugins=plugins(), cache=cache).stages
        return next(stage.state for stage in planned if stage.use == "see")

    assert state() == "cached"
    assert state(input={"x": 9.0}) == "cached", "what a call is given changes no model"
    assert state(calibration={"samples": 4, "runs": 2, "spill": True}) == "cached"
    assert state(calibration={"samples": 5, "runs": 2}) == "to do"
    assert state(calibration={"samples": 4, "runs": 2, "seed": 1}) == "to do"


def test_the_checks_of_contracts_catch_what_breaks_them() -> None:
    module = ModuleType("sees")
    records = {"model": [{"x": np.zeros((1, 4), np.float32)}]}

    @hookimpl
    def ovforge_quantizers() -> Iterator[QuantizerExtension]:
        yield QuantizerExtension(name="see", summary="Sees", factory=See, config=SeeOptions, needs="inputs")
        yield QuantizerExtension(name="liar", summary="Sees", factory=See, config=SeeOptions, needs="nothing")

    @hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        yield TaskExtension(name="steps", summary="Runs", factory=Steps, inputs=Inputs, roles=("model",))

    module.ovforge_quantizers, module.ovforge_tasks = ovforge_quantizers, ovforge_tasks  # type: ignore[attr-defined]
    calibration = testing.FixedCalibration(records)
    assert testing.check_quantizer(module, "see", {}, testing.small_bundle, calibration).applied == ["saw 1"]
    with pytest.raises(AssertionError, match="needs='nothing'"):
        testing.check_quantizer(module, "liar", {}, testing.small_bundle, calibration)
    compiled = core().compile_model(testing.small_model(), "CPU")
    testing.check_task(module, "steps", Steps(None, SimpleNamespace(bundle={"model": compiled})))

    class Same(Steps):
        def examples(self, count: int) -> Sequence[Inputs]:
            return [Inputs(x=number // 2) for number in range(count)]

    with pytest.raises(AssertionError, match="same example twice"):
        testing.check_task(module, "steps", Same(None, None))
