"""`ovforge quantize` as a user meets it, on the embedded model; and the tasks' examples that it calibrates with."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from typer.testing import CliRunner

import ovforge
import ovforge_diffusion
from ovforge import testing
from ovforge.cli import app
from ovforge.errors import QualityError
from ovforge_diffusion.examples import drawing, hole, prompts
from program import Ended
from program import ovforge as ovforge_program

MODEL = "package:ovforge_lcm/model"


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def run(*arguments: object, code: int = 0, cwd: Path) -> Ended:
    done = ovforge_program(*arguments, cwd=cwd)
    assert done.code == code, done.stdout + done.stderr
    return done


def weights(folder: Path, role: str) -> set[str]:
    model = ov.Core().read_model(folder / role / "openvino_model.xml")
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) > 1]
    return {op.get_element_type().get_type_name() for op in constants}


def test_every_quantizer_is_listed(tmp_path: Path) -> None:
    listed = run("quantize", "--list", cwd=tmp_path).stdout
    assert "nncf-weights" in listed
    rows = json.loads(run("quantize", "--list", "--json", cwd=tmp_path).stdout)
    assert {"name", "plugin", "summary"} == set(rows[0])
    assert all(row["name"] in listed for row in rows)


def test_a_model_is_quantized_judged_and_written(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red car\na cat\n")
    options = ["-q", "nncf-weights", "--role", "unet", "--set", "mode=int8_sym", "-o", "small", "--min-score", "0.9"]
    done = run("quantize", MODEL, *options, "--calibration", prompts, cwd=tmp_path)
    assert done.stdout.rstrip().endswith("small")
    for part in ("nncf-weights", "unet", "16.0 MB", "took", "quality: ssim 0.99"):
        assert part in done.stdout, part
    assert weights(tmp_path / "small", "unet") & {"i8", "u8"}
    assert not weights(tmp_path / "small", "vae_decoder") & {"i8", "u8"}
    pipe = ovforge.Pipeline("text-to-image", source=tmp_path / "small", device=ovforge.Use("cpu", precision="f32"))
    plain = ovforge.Pipeline("text-to-image", source=MODEL, device=ovforge.Use("cpu", precision="f32"))
    ours, theirs = (np.asarray(p("a red car", seed=1).images[0], np.float32) for p in (pipe, plain))
    assert 0 < np.abs(ours - theirs).mean() < 8
    again = run("quantize", MODEL, *options, code=1, cwd=tmp_path)
    assert "is there already" in again.stderr
    said = json.loads(run("quantize", MODEL, *options, "--force", "--json", cwd=tmp_path).stdout)
    assert said["quality"]["passed"]
    assert said["quantize"][0]["sizes"]["unet"][0] > said["quantize"][0]["sizes"]["unet"][1]


def test_pipelines_and_single_models_are_quantized_too(tmp_path: Path) -> None:
    config = tmp_path / "pipeline.toml"
    config.write_text(
        f'task = "text-to-image"\nload = "{MODEL}"\n[[quantize]]\nuse = "nncf-weights"\nroles = ["vae_decoder"]\n'
    )
    run("quantize", config, "-o", "one", cwd=tmp_path)
    assert weights(tmp_path / "one", "vae_decoder") & {"i8", "u8"}
    assert not weights(tmp_path / "one", "unet") & {"i8", "u8"}
    shown = run("run", config, "-i", "prompt=a red car", "-i", "seed=1", cwd=tmp_path).stdout
    assert "nncf-weights" in shown and "vae_decoder" in shown.split("nncf-weights")[1]
    alone = tmp_path / "one" / "unet" / "openvino_model.xml"
    run("quantize", alone, "-q", "nncf-weights", cwd=tmp_path)
    assert weights(tmp_path / "openvino_model-nncf-weights", "model") & {"i8", "u8"}
    done = run("quantize", alone, "-q", "nncf-weights", "-o", "x", "--max-drop", "0.1", code=1, cwd=tmp_path)
    assert "no task here runs this model" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL,), "no quantizer is named"),
        (("nowhere", "-q", "nncf-weights"), "no such file or folder"),
        ((MODEL, "-q", "nncf-wights"), "Did you mean 'nncf-weights'"),
        ((MODEL, "-q", "nncf-weights", "--role", "unett"), "Did you mean 'unet'"),
        ((MODEL, "-q", "nncf-weights", "--set", "mod=int8"), "unknown key `mod`"),
        ((MODEL, "-q", "nncf-weights", "--calibration", "nowhere.txt"), "no such file"),
        ((MODEL, "-q", "nncf-weights", "--metric", "lpips", "--max-drop", "0.1"), "quality: `metric`"),
        ((), "no model is named"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("quantize", *arguments, code=1, cwd=tmp_path)
    assert message in done.stderr
    assert list(tmp_path.glob("*nncf*")) == [], "nothing is written"


def test_below_the_gate_nothing_is_written_but_the_worst_pictures(tmp_path: Path) -> None:
    arguments = ["-q", "nncf-weights", "--role", "unet", "-o", "small", "--min-score", "1.0"]
    done = run("quantize", MODEL, *arguments, code=1, cwd=tmp_path)
    assert "below 1.0000" in done.stderr
    assert (tmp_path / "quality" / "worst-1.png").is_file()
    assert not (tmp_path / "small").exists()


def test_an_interruption_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("ovforge_quality.command"), "_prepare", interrupted)
    target = tmp_path / "small"
    arguments = ["quantize", MODEL, "-q", "nncf-ptq", "--task", "text-to-image", "-o", str(target)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 130
    assert "nothing was written; what was recorded and tried is kept" in done.stderr
    assert not target.exists()
    assert "kept" not in CliRunner().invoke(app, [*arguments, "--no-cache"]).stderr


# -- what calibrates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text-to-image", "image-to-image", "inpainting"])
def test_the_tasks_give_examples(name: str) -> None:
    pipe = ovforge.Pipeline(name, source=MODEL, cache=None)
    testing.check_task(ovforge_diffusion, name, pipe.task)
    [example] = pipe.task.examples(1)
    assert pipe.task(example, lambda moment: None).images  # type: ignore[attr-defined]


def test_prompts_never_judge_what_they_calibrate() -> None:
    """Even numbers calibrate; beyond the shipped list, too."""
    numbered = list(prompts(400))
    halves = [{text for number, text in numbered if number % 2 == parity} for parity in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 64
    assert not halves[0] & halves[1]


def test_drawings_differ_and_repeat() -> None:
    for draw in (drawing, hole):
        pictures = [np.asarray(draw(number, 64)) for number in range(6)]
        assert all(np.array_equal(picture, np.asarray(draw(n, 64))) for n, picture in enumerate(pictures))
        assert len({picture.tobytes() for picture in pictures}) == 6
    assert all(0.02 < (np.asarray(hole(n, 64)) == 255).mean() < 0.5 for n in range(50))


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_both_halves_of_guidance_are_recorded(
    torch_sd: Path, session_cache: Any, guidance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joint they are one batch, split they are calls of their own: the same values either way."""
    from ovforge_quality.driver import QualityDriver, _Quantization

    seen: list[Any] = []

    def look(self: QualityDriver, run: Any) -> Any:
        seen.extend(_Quantization(self, run)._calibration.inputs("unet", 100))
        raise QualityError("seen")

    monkeypatch.setattr(QualityDriver, "run", look)
    config = {
        "task": {"use": "text-to-image", "guidance": guidance},
        "load": str(torch_sd),
        "quantize": ["nncf-weights"],
        "calibration": {"runs": 2, "samples": 100, "options": {"steps": 3, "guidance_scale": 5.0}},
        "scheduler": {"use": "ddim"},
        "device": {"precision": "f32"},
    }
    with pytest.raises(QualityError, match="seen"):
        ovforge.load(config, cache=session_cache)
    rows = [row for record in seen for row in record["encoder_hidden_states"]]
    assert len(rows) == 2 * 3 * 2, "two runs of three steps of two halves"
    distinct = {row.tobytes() for row in rows}
    assert len(distinct) == 3, "two prompts, and no prompt"
    assert {len(record["sample"]) for record in seen} == ({2} if guidance == "joint" else {1})
