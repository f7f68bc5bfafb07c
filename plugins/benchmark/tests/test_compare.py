"""`ovforge compare`: candidates side by side."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from typer.testing import CliRunner

import ovforge
import ovforge_benchmark
from ovforge import testing
from ovforge.cli import app
from ovforge.errors import ConfigError, InputError, ModelError, PluginError
from ovforge.model.metrics import ssim
from ovforge_benchmark.candidates import parse, varied
from ovforge_benchmark.compare import _Measured, _prepare, compare
from ovforge_benchmark.grid import grid
from ovforge_benchmark.schema import Comparison

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
TORCH = ROOT / "plugins/lcm/tests/data/embedded-diffusers"
PICTURE = str(ROOT / "docs/images/unicorn.png")
F32 = str(EXAMPLES / "compare-f32.toml")


def test_contract() -> None:
    assert "compare" in [offer.name for offer in testing.check_plugin(ovforge_benchmark)]


def test_without_a_seed_one_is_drawn_for_all_calls(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text(Path(F32).read_text().replace("seed = 1234567", ""))
    measured = [_Measured(parse(str(config), "text-to-image", [])) for _ in range(2)]
    _prepare(measured, [{"prompt": "a red car", "steps": 1}, {"prompt": "a wolf", "steps": 1}], True, lambda *_: None)
    first, second = measured
    assert len({call["seed"] for one in measured for call in one.calls}) == 1
    for ours, theirs in zip(first.results, second.results, strict=True):
        assert ours.compare(theirs, "ssim") == 1


def test_diffusers_and_ours_are_measured_and_alike(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    report = tmp_path / "report"
    done = CliRunner().invoke(
        app,
        [
            *("compare", f"PyTorch=diffusers:{TORCH}", f"FP32={F32}"),
            *(
                "-p",
                "a beautiful pink unicorn, 8k",
                "-p",
                "a red car",
                "--rounds",
                "1",
                "--runs",
                "1",
                "-o",
                str(report),
            ),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    said = Comparison.model_validate_json(report.with_suffix(".json").read_text())
    torch, ours = said.candidates
    assert min(ours.likeness["ssim"]) > 0.999 and len(ours.likeness["ssim"]) == 2, "the same picture as diffusers makes"
    unet = ROOT / "plugins/lcm/src/ovforge_lcm/model/unet"
    shipped = sum(file.stat().st_size for file in unet.glob("openvino_model.*"))
    assert ours.sizes["unet"] == pytest.approx(shipped, rel=0.01), "the task's transforms add operations, not weights"
    assert torch.sizes["unet"] == sum(file.stat().st_size for file in (TORCH / "unet").iterdir())
    assert torch.precision["unet"] == ours.precision["unet"] == "f32"
    for one in said.candidates:
        assert {"total", "text_encoder", "denoise", "denoise.unet", "denoise.scheduler", "vae_decoder"} <= set(
            one.stages
        )
        assert one.statistics["total"].count == 2 and len(one.peak_memory) == 1
        assert one.statistics["total"].min >= one.statistics["denoise"].min >= one.statistics["denoise.unet"].min
    assert torch.peak_memory[0] > ours.peak_memory[0], "torch is in its process and not in ours"
    with Image.open(report.with_suffix(".png")) as sheet:
        assert sheet.width > 2 * 256 and sheet.height > 2 * 256
    text = report.with_suffix(".md").read_text()
    assert text in done.stdout and "![PyTorch, FP32](report.png)" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md", "report.png"]


def test_a_drawn_seed_is_everybodys_and_pictures_are_candidates(tmp_path: Path) -> None:
    config = tmp_path / "steps.toml"
    config.write_text(Path(F32).read_text().replace("seed = 1234567", ""))
    pipe = ovforge.load(F32)
    pipe("a cat", seed=5).save(tmp_path / "cat.png")
    asked = [parse(text, "text-to-image", []) for text in (str(tmp_path / "cat.png"), str(config))]
    asked = varied(asked, ["input.steps=2,4"])
    assert [one.label for one in asked] == ["cat", "2", "4"]
    report, pictures = compare([asked[1], asked[1]], rounds=1, runs=1)
    assert report.candidates[1].likeness["ssim"] == [1.0], "one seed was drawn for both"
    report, pictures = compare(asked, [{"prompt": "a cat", "seed": 5}], rounds=1, runs=1)
    assert report.candidates[2].likeness == {"ssim": [1.0], "psnr": [100.0], "gmsd": [1.0]}
    expected = ssim(*(np.asarray(column[0]) for column in pictures[:2]))
    assert report.candidates[1].likeness["ssim"] == [expected] and expected < 1
    assert report.candidates[0].stages == {}


def test_the_grid_puts_every_picture_in_its_place() -> None:
    colours = [["red", "green"], ["blue", "white"], []]
    columns = [[Image.new("RGB", (300, 280), colour) for colour in column] for column in colours]
    sheet = np.asarray(grid(columns, [("A", "1 s"), ("B", "2 s"), ("none", "")], ["first", "second"]))
    for column, top, colour in ((0, 0, (255, 0, 0)), (1, 0, (0, 0, 255)), (0, 1, (0, 128, 0))):
        where = np.argwhere((sheet == colour).all(-1))
        assert len(where) == 300 * 280
        assert (where.min(0)[1] > 300) == (column == 1) and (where.min(0)[0] > 280) == (top == 1)
    small = np.asarray(grid([[Image.new("RGB", (64, 64), "red")]], [("A", "")]))
    assert ((small == (255, 0, 0)).all(-1)).sum() == 256 * 256, "small ones are shown larger"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nothing.toml", F32], InputError, "no such file or folder"),
        ([F32], InputError, "not a comparison"),
        ([F32, "--vary", "device.precision"], ConfigError, "is not KEY=VALUE"),
        ([F32, "--vary", "devise.precision=f32,bf16"], ConfigError, "Did you mean 'device'"),
        ([F32, F32, "-o", "nowhere/report"], InputError, "no such folder"),
        ([F32, "diffusers:nowhere"], InputError, "no such folder"),
        ([PICTURE, f"diffusers:{EXAMPLES}"], ModelError, "does not open it"),
        ([PICTURE, F32, "--vary", "device.use=cpu,cqu"], PluginError, "Did you mean 'cpu'"),
        ([F32, F32, "-i", "stepz=4"], ConfigError, "unknown key `stepz`"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        CliRunner().invoke(app, ["compare", "-q", *arguments], catch_exceptions=False)
    assert message in str(raised.value)


def test_pictures_of_other_sizes_are_refused(tmp_path: Path) -> None:
    for side in (16, 32):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    asked = [parse(str(tmp_path / f"{side}.png"), "", []) for side in (16, 32)]
    with pytest.raises(InputError, match="pictures of 32x32 pixels cannot be compared with pictures of 16x16"):
        compare(asked)


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    arguments = ["compare", F32, F32, "--rounds", "1000", "--runs", "1", "-o", str(tmp_path / "report")]
    ran = subprocess.Popen(
        [sys.executable, "-c", "from ovforge.cli import main; main()", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip
    try:
        ran.wait(timeout=4)
    except subprocess.TimeoutExpired:
        children = psutil.Process(ran.pid).children()
        ran.send_signal(signal.SIGTERM)
    assert ran.wait(timeout=20) == 130
    assert psutil.wait_procs(children, timeout=20)[1] == [], "children run on"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] is False
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".md", ".png"}
