"""`ovforge tune`: what it tries, what it expects of sets, what it writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import ovforge
from ovforge import PipelineConfig, Plugins, hookimpl
from ovforge.cli import app
from ovforge.contracts import GraphTransformExtension, Phase, QuantizerExtension, RecipeExtension
from ovforge.errors import CacheError, ConfigError, InputError
from ovforge.store import Cache
from ovforge_benchmark.tuning import command, worker
from ovforge_benchmark.tuning.bench import Bench
from ovforge_benchmark.tuning.changes import Change, changed, changes_for, has_approximations, label_of, plain
from ovforge_benchmark.tuning.evidence import markdown
from ovforge_benchmark.tuning.forecast import forecasts
from ovforge_benchmark.tuning.schema import Trial
from ovforge_benchmark.tuning.search import Found, search

MODEL = "package:ovforge_lcm/model"
CONFIG = f"""
task = "text-to-image"
load = "{MODEL}"

[input]
prompt = "a red car"
steps = 1
seed = 3
"""


class _Plugin:
    """Somebody else's plugin."""

    @staticmethod
    @hookimpl
    def ovforge_graph_transforms() -> Sequence[GraphTransformExtension]:
        common = {"factory": "builtins:dict", "phase": Phase.ATTACH, "summary": "Theirs"}
        return [
            GraphTransformExtension(name="theirs", **common, tunings=({"share": 0.5}, {"share": 0.25})),
            GraphTransformExtension(name="broken", **common, tunings="nowhere.at_all:function"),
            GraphTransformExtension(name="silent", **common),
        ]

    @staticmethod
    @hookimpl
    def ovforge_quantizers() -> Sequence[QuantizerExtension | RecipeExtension]:
        return [
            RecipeExtension(
                name="other-role", summary="Not for pictures", quantizer="nncf-weights",
                options={"roles": ["language_model"]}, tunings=({},),
            ),
            RecipeExtension(
                name="fits", summary="For pictures", quantizer="nncf-weights", options={"roles": ["unet"]}, tunings=({},)
            ),
        ]  # fmt: skip


def test_what_is_tried_comes_from_the_extensions() -> None:
    plugins = Plugins()
    plugins.register(_Plugin, "their-plugin")  # type: ignore[arg-type]
    config = PipelineConfig.of({"task": "text-to-image", "load": MODEL, "quantize": ["weights-int8"]})
    found = list(changes_for(config, ["unet", "vae_decoder"], plugins))
    labels = [change.label for change in found]
    assert {"theirs share=0.5", "theirs share=0.25", "fits", "hint=throughput"} <= set(labels)
    assert not {"other-role", "silent", "broken", "weights-int8"} & {change.use for change in found}
    assert not [change for change in found if change.kind == "device" and change.use != "cpu"]
    by = next(change.by for change in found if change.use == "fits")
    assert "their-plugin 0" in by
    assert "nncf" in by, "the plugin that does the work counts, too"


def test_a_change_becomes_part_of_the_config() -> None:
    config = plain(
        PipelineConfig.of(
            {
                "task": "text-to-image", "load": {"source": "m.ovenc", "key": {"env": "KEY"}}, "device": {"threads": 1},
                "input": {"steps": 4}, "quality": {"min_score": 0.9}, "quantize": ["a"],
            }
        )
    )  # fmt: skip
    made = changed(
        config,
        [
            Change("transform", "t", {"n": 1}),
            Change("quantizer", "q", {}),
            Change("device", "cpu", {"hint": "throughput"}),
            Change("task", "text-to-image", {"guidance_stop": 0.5}),
        ],
    )
    assert made["transform"] == [{"use": "t", "n": 1}]
    assert [one["use"] for one in made["quantize"]] == ["a", "q"]
    assert made["device"] == {"use": "cpu", "threads": 1, "hint": "throughput"}
    assert made["input"] == {"steps": 4, "guidance_stop": 0.5}
    assert made["load"]["key"] == {"env": "KEY"}, "an encrypted pipeline stays one"
    assert "quality" not in made
    PipelineConfig.of(made)


def _trial(seconds: float, score: float = 1.0, roles: Sequence[str] = (), memory: int = 100) -> Trial:
    stages = {"denoise": seconds * 0.75, "vae_decoder": seconds * 0.25}
    return Trial(
        label=str(seconds), calls=2, seconds=seconds, stages=stages, scores=(score,), roles=tuple(roles), memory=memory
    )


@given(st.floats(0.3, 0.95), st.floats(0.3, 0.95), st.floats(0.8, 1.0), st.floats(0.8, 1.0))
def test_forecasts_are_products_of_parts_and_sums_of_losses(a: float, b: float, x: float, y: float) -> None:
    unet, decoder = Change("quantizer", "a", {}), Change("quantizer", "b", {})
    alone = {
        unet: Trial(label="a", calls=2, seconds=0.75 * a + 0.25, stages={"denoise": 0.75 * a, "vae_decoder": 0.25},
                    scores=(x,), roles=("unet",)),
        decoder: Trial(label="b", calls=2, seconds=0.75 + 0.25 * b, stages={"denoise": 0.75, "vae_decoder": 0.25 * b},
                       scores=(y,), roles=("vae_decoder",)),
    }  # fmt: skip
    (found,) = forecasts(_trial(1.0), alone, "latency", 0.0, 1.0)
    assert found.cost == pytest.approx(0.75 * a + 0.25 * b)
    assert found.score == pytest.approx(1 - 0.75 * ((1 - x) + (1 - y)))
    assert not forecasts(_trial(1.0), alone, "latency", 1.01, 1.0)


def test_sets_have_one_of_each_extension_and_one_quantizer_for_a_model() -> None:
    first, second = Change("transform", "cache", {"every": 2}), Change("transform", "cache", {"every": 3})
    q, r = Change("quantizer", "q", {}), Change("quantizer", "r", {})
    alone = {first: _trial(0.6), second: _trial(0.5), q: _trial(0.7, roles=["unet"]), r: _trial(0.8, roles=["unet"])}
    sets = {forecast.changes for forecast in forecasts(_trial(1.0), alone, "latency", 0, 1)}
    assert sets == {(first, q), (second, q), (first, r), (second, r)} or {frozenset(s) for s in sets} == {
        frozenset(pair) for pair in [(first, q), (second, q), (first, r), (second, r)]
    }


class _Fake(Bench):
    """A bench whose pipelines take what arithmetic says, so that a search can be checked whole."""

    def setup(self, table: dict[str, tuple[float, float]], refuses: Sequence[str] = ()) -> _Fake:
        self.table, self.refuses, self.asked, self.metric = table, refuses, [], "ssim"
        return self

    def knows(self, changes: Sequence[Change], calls: int) -> bool:
        return False

    def measure(self, changes: Sequence[Change], calls: int, *, again: bool = False) -> Trial:
        self.asked.append((label_of(changes), calls))
        time, score = 1.0, 1.0
        for change in changes:
            if change.use == "broken":
                return Trial(label=label_of(changes), calls=calls, error="it does not fit")
            time, score = time * self.table[change.use][0], score - self.table[change.use][1]
        return _trial(time, score).model_copy(update={"label": label_of(changes), "calls": calls})

    def passes_gate(self, changes: Sequence[Change]) -> str:
        return "too far off" if any(change.use in self.refuses for change in changes) else ""


def _fake(tmp_path: Path, table: dict[str, tuple[float, float]], refuses: Sequence[str] = ()) -> _Fake:
    return _Fake(config={}, base=tmp_path, samples=8, aim="latency", scratch=tmp_path).setup(table, refuses)


def _options(*names: str) -> list[Change]:
    return [Change("transform", name, {}) for name in names]


def test_the_search_finds_the_best_set_that_passes(tmp_path: Path) -> None:
    bench = _fake(tmp_path, {"a": (0.5, 0.02), "b": (0.8, 0.02), "bad": (0.1, 0.5), "slow": (1.2, 0.0)})
    found = search(bench, _options("a", "b", "bad", "slow", "broken"), 0.95, lambda _: None)
    assert label_of(found.winner or ()) == "a + b"
    assert {trial.label: trial.calls for trial in found.trials}["a + b"] == 8, "all calls decide"
    assert max(calls for label, calls in bench.asked if label == "bad") == 2, "what is far off is left after few calls"
    assert [trial.label for trial in found.trials if trial.error] == ["broken"]
    assert [trial.label for trial in found.duel] == ["original", "a + b"]


def test_a_winner_is_the_better_one_when_both_are_measured_anew(tmp_path: Path) -> None:
    class Lucky(_Fake):
        def measure(self, changes: Sequence[Change], calls: int, *, again: bool = False) -> Trial:
            trial = super().measure(changes, calls)
            lucky = again and [change.use for change in changes] == ["a"]
            return trial.model_copy(update={"seconds": 1.5}) if lucky else trial

    bench = Lucky(config={}, base=tmp_path, samples=8, aim="latency", scratch=tmp_path)
    found = search(bench.setup({"a": (0.5, 0.04), "b": (0.9, 0.04)}), _options("a", "b"), 0.95, lambda _: None)
    assert label_of(found.winner or ()) == "b"
    assert [trial.seconds for trial in found.duel] == [1.0, 0.9]
    assert found.notes == ["a: measured anew in turn with the original it saves nothing (0.67x)"]


def test_a_gate_of_the_config_stays_and_one_that_is_added_is_for_approximations(tmp_path: Path) -> None:
    device, approximation = Change("device", "cpu", {}), Change("transform", "t", {}, approximates=True)
    bench = Bench(config={}, base=tmp_path, samples=1, aim="latency", scratch=tmp_path, gate={"min_score": 0.9})
    assert bench.gate_of([device, approximation]) == {"min_score": 0.9}
    assert bench.gate_of([device]) is None
    bench.gate_stays = True
    assert bench.gate_of([device]) == {"min_score": 0.9}
    plugins = Plugins()
    for added, wanted in (({}, False), ({"quantize": ["weights-int8"]}, True), ({"transform": ["clip-skip"]}, False),
                          ({"transform": ["step-cache"]}, True)):  # fmt: skip
        assert (
            has_approximations(PipelineConfig.of({"task": "text-to-image", "load": MODEL, **added}), plugins) == wanted
        )


def test_a_task_is_asked_for_examples_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They may be long to make; calls with the user's own prompts need none."""
    from ovforge_diffusion.tasks import TextToImage

    asked, examples = [], TextToImage.examples

    def counted(self: TextToImage, count: int) -> object:
        asked.append(count)
        return examples(self, count)

    monkeypatch.setattr(TextToImage, "examples", counted)
    job = {"config": {"task": "text-to-image", "load": MODEL, "input": {"steps": 1, "width": 64, "height": 64}},
           "base": str(tmp_path), "cache": False, "metric": None, "threads": False, "results": None, "reference": None}  # fmt: skip
    for prompts, calls, describe, wanted in (
        ([], 0, 2, [4]),
        (["a cat"], 0, 1, [2]),
        (["a cat"], 1, 0, []),
        ([], 1, 0, [2]),
    ):
        asked.clear()
        worker.measure_trial({**job, "prompts": prompts, "calls": calls, "describe": describe})
        assert asked == wanted


def test_pictures_of_the_config_stay_and_files_count_by_their_content(tmp_path: Path) -> None:
    config = {
        "task": "image-to-image", "load": MODEL,
        "input": {"prompt": "a red car", "image": "cat.png", "strength": 0.5, "steps": 2, "seed": 3},
        "transform": ["step-cache"], "calibration": {"file": "prompts.txt"},
    }  # fmt: skip
    job = {"config": config, "base": str(tmp_path), "calls": 0, "prompts": [], "cache": False, "describe": 2}
    described = []
    for colour in ("red", "blue"):
        Image.new("RGB", (48, 32), colour).save(tmp_path / "cat.png")
        (tmp_path / "prompts.txt").write_text(f"a {colour} wolf")
        described.append(worker.measure_trial(job))
    first, second = (facts["inputs"] for facts in described)
    assert [one["strength"] for one in first] == [0.5, 0.5]
    assert first[0]["prompt"] != first[1]["prompt"] != "a red car"
    assert first[0]["image"] == first[1]["image"] != second[0]["image"]
    assert described[0]["calibration"] != described[1]["calibration"]
    assert described[0]["examples"] == ["prompt", "seed"], "all else is in common, for the gate, too"


def test_throughput_is_that_of_all_threads_however_few_the_calls_are(monkeypatch: pytest.MonkeyPatch) -> None:
    together, answers = Barrier(3), Counter[str]()

    def pipe(prompt: str) -> str:
        together.wait(timeout=30)
        answers[prompt] += 1
        return prompt

    monkeypatch.setattr(worker, "cores", lambda: 3)
    extension = SimpleNamespace(threads=True)
    pipe.resolved = SimpleNamespace(task=SimpleNamespace(extension=extension))  # type: ignore[attr-defined]
    results, seconds = worker._together(pipe, [{"prompt": "one"}, {"prompt": "two"}])  # type: ignore[arg-type]
    assert list(map(str, results)) == ["one", "two"]
    assert seconds > 0
    assert answers == {"one": 6, "two": 6}, "three each that are not measured, and three that are"


def test_a_full_cache_does_not_end_a_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise CacheError("there is no space left", where=str(tmp_path))

    cache = Cache(tmp_path / "cache")
    monkeypatch.setattr(cache, "put", full)
    bench = Bench(config={}, base=tmp_path, samples=1, aim="latency", scratch=tmp_path, cache=cache)
    monkeypatch.setattr(bench, "_measured", lambda *_: _trial(1.0))
    assert bench.measure((), 1) == _trial(1.0)
    assert "no space left" in bench.notes[0]


def test_what_another_tuning_wrote_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, target = tmp_path / "p.toml", tmp_path / "p-tuned.toml"
    config.write_text(CONFIG)

    def tuned(*_: object) -> tuple[SimpleNamespace, Found]:
        target.write_text("theirs")
        return SimpleNamespace(trials=[_trial(1.0)]), Found(winner=())

    monkeypatch.setattr(command, "_tuned", tuned)
    done = CliRunner().invoke(app, ["tune", str(config), "--trust"])
    assert "p-tuned.toml: is there already" in str(done.exception)
    assert target.read_text() == "theirs"


def test_a_tuned_config_lies_where_relative_paths_start(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "p.toml").write_text(CONFIG)
    link = tmp_path / "here" / "p.toml"
    link.symlink_to(tmp_path / "p.toml")
    done = CliRunner().invoke(app, ["tune", str(link), "--trust", "-o", str(link.with_name("tuned.toml"))])
    assert "folder of the original" in str(done.exception)


def test_what_the_gate_refuses_does_not_win(tmp_path: Path) -> None:
    found = search(_fake(tmp_path, {"a": (0.5, 0.0), "b": (0.8, 0.0)}, ["a"]), _options("a", "b"), 0.95, lambda _: None)
    assert label_of(found.winner or ()) == "b"
    assert any("too far off" in note for note in found.notes)


def test_without_time_what_is_left_out_is_said(tmp_path: Path) -> None:
    bench = _fake(tmp_path, {"a": (0.5, 0.0)})
    bench.within = 0.0
    found = search(bench, _options("a"), 0.95, lambda _: None)
    assert found.winner is None
    assert "a" in found.left_out
    assert found.hurried


def test_what_was_found_is_kept_if_the_time_ends_while_the_original_runs(tmp_path: Path) -> None:
    class Late(_Fake):
        def measure(self, changes: Sequence[Change], calls: int, *, again: bool = False) -> Trial:
            if not changes and (again or calls > 2):
                return Trial(label="original", calls=calls, error="it takes longer than the time that was left")
            return super().measure(changes, calls, again=again)

    bench = Late(config={}, base=tmp_path, samples=8, aim="latency", scratch=tmp_path).setup({"a": (0.5, 0.0)})
    found = search(bench, _options("a"), 0.95, lambda _: None)
    assert label_of(found.winner or ()) == "a"
    assert not found.duel


def test_without_time_for_the_original_it_is_refused_in_words(tmp_path: Path) -> None:
    config = PipelineConfig.of({"task": "text-to-image", "load": MODEL})
    bench = Bench(config=plain(config), base=tmp_path, samples=1, aim="latency", scratch=tmp_path, within=1e-3)
    with pytest.raises(InputError, match="the time is over before the original is loaded"):
        bench.begin()
    with pytest.raises(InputError, match="the time is over before the original is measured"):
        search(bench, [], 0.95, lambda _: None)


def test_more_than_equal_results_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="95 is more than equal results have"):
        search(_fake(tmp_path, {}), [], 95, lambda _: None)


def test_an_interruption_before_anything_is_measured_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Trial:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bench, "measure", interrupted)
    config = tmp_path / "p.toml"
    config.write_text(CONFIG)
    done = CliRunner().invoke(app, ["tune", str(config), "--trust", "--no-cache"])
    assert done.exit_code in (1, 130)
    assert done.exception is None or isinstance(done.exception, KeyboardInterrupt | SystemExit)
    assert [file.name for file in tmp_path.iterdir()] == ["p.toml"]


def test_files_of_others_are_not_replaced_by_the_evidence(tmp_path: Path) -> None:
    config, evidence = tmp_path / "p.toml", tmp_path / "p-tuned.json"
    config.write_text(CONFIG)
    evidence.write_text('{"task": "detect"}')
    done = CliRunner().invoke(app, ["tune", str(config), "--trust", "--within", "1s"])
    assert isinstance(done.exception, InputError)
    assert "p-tuned.json: is there already" in str(done.exception)
    assert evidence.read_text() == '{"task": "detect"}'


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--within", "soon"], "is not a time"),
        (["--metric", "beauty"], "is not a metric"),
        (["-o", "/elsewhere/tuned.toml"], "folder of the original"),
        (["-o", "p.toml", "--force"], "which is tuned"),
        (["--without", "step-cach"], "Did you mean 'step-cache'"),
        (["--for", "fame"], "fame"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    config = tmp_path / "p.toml"
    config.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["tune", "p.toml", "--trust", *arguments])
    assert done.exit_code != 0
    assert said in str(done.exception) + done.output


def test_a_model_is_tuned_and_a_second_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path / "cache"))
    config = tmp_path / "p.toml"
    config.write_text(CONFIG)
    arguments = ["tune", str(config), "--trust", "--for", "memory", "--min-score", "0.3", "--samples", "1", "--json"]
    for name in ("cpu", "weights-int4", "weights-int8", "lcm-int8", "sd-int8-hybrid", "text-to-image"):
        arguments += ["--without", name]
    roles = ["text_encoder", "unet", "vae_decoder"]
    others = {change.use for change in changes_for(PipelineConfig.read(config), roles, Plugins())}
    for name in others - {"weights-int8"}:
        arguments += ["--without", name]
    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [trial["label"] for trial in report["trials"]] == ["original"]
    assert report["winner"] is None
    assert not (tmp_path / "p-tuned.toml").exists(), "no config, since nothing is better"
    assert Image.open(tmp_path / "p-tuned.png").size[0] > 100
    assert "Nothing that was tried" in (tmp_path / "p-tuned.md").read_text(encoding="utf-8")


def test_a_winner_is_a_config_that_runs(tmp_path: Path) -> None:
    from ovforge_benchmark.tuning.command import _bench, _tuned, _write_config, _write_evidence

    config = tmp_path / "p.toml"
    config.write_text(CONFIG)
    original = PipelineConfig.read(config)
    bench = _bench(original, config, "memory", 1, [], None, tmp_path, False)
    only = {change.use for change in changes_for(original, ["unet", "vae_decoder"], Plugins())} - {"weights-int8"}
    report, found = _tuned(bench, original, config, 0.5, only, lambda _: None)
    weights = next(trial for trial in report.trials if trial.label == "weights-int8")
    assert not weights.error
    assert 0.8 < weights.score < 1
    found.winner = (next(c for c in changes_for(original, ["unet"], Plugins()) if c.use == "weights-int8"),)
    report = report.model_copy(update={"winner": "weights-int8"})
    _write_config(config.with_name("won.toml"), config, original, bench, report, found)
    _write_evidence(config.with_name("won.toml"), report)
    assert " MB after " in (tmp_path / "won.toml").read_text(), "what was asked for is told"
    late = markdown(report.model_copy(update={"winner": None, "complete": False}))
    assert "but not all was tried" in late
    written = PipelineConfig.read(tmp_path / "won.toml")
    assert written.sections["quality"]["min_score"] == 0.5
    assert [use.use for use in written.quantize] == ["weights-int8"]
    ovforge.plan(tmp_path / "won.toml")
    before = bench.fresh
    again = _bench(original, config, "memory", 1, [], None, tmp_path, False)
    again.begin()
    assert again.measure((), 1).model_dump() == bench.measure((), 1).model_dump()
    assert (again.fresh, bench.fresh) == (0, before), "what was measured is found again"


def test_a_config_without_a_task_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text(f'load = "{MODEL}"\n')
    done = CliRunner().invoke(app, ["tune", str(config), "--trust"])
    assert isinstance(done.exception, ConfigError | InputError)
