"""Each subject is one distribution: without it the others are whole, and what is missing is said.

An installation without a distribution is one of its own: a folder that stands in for site-packages, with links to all that
is there but to what the distribution brought, and a Python that looks nowhere else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from PIL import Image
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from ovforge.cli import app

ROOT = Path(__file__).parents[1]
KEY = "ab" * 32

MISSED: dict[str, set[str]] = {
    "ovforge-lcm": {"latent consistency", "latent consistency, another method", "embedded", "recipe"},
    "ovforge-sd-lora": {"adapter"},
    "ovforge-textual-inversion": {"word"},
    "ovforge-grounding-dino": {"phrases"},
    "ovforge-aes-loader": {"sealed"},
}
"""Distribution -> what needs it, by the names of subset.configs."""


def site_without(folder: Path, left_out: str) -> Path:
    """Make a folder like site-packages, as if one distribution had not been installed."""
    files = distribution(left_out).files
    assert files
    brought = {file.parts[0] for file in files}
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if path.name not in brought and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def models(torch_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small models, and files for them, made with everything installed."""
    folder = tmp_path_factory.mktemp("subsets")
    command("convert", torch_sd, "-o", folder / "sd")
    (folder / "lcm").symlink_to(ROOT / "plugins/lcm/src/ovforge_lcm/model")
    command("encrypt", folder / "sd", "-o", folder / "sealed", "--key", "env:SUBSET_KEY")
    rng = np.random.default_rng(0)
    weights = load_file(torch_sd / "unet" / "diffusion_pytorch_model.safetensors")
    layer = next(name for name in weights if name.endswith("attn1.to_q.weight")).removesuffix(".weight")
    out, into = weights[f"{layer}.weight"].shape
    pair = {"lora_A": (2, into), "lora_B": (out, 2)}
    lora = {f"unet.{layer}.{part}.weight": rng.normal(size=shape).astype(np.float32) for part, shape in pair.items()}
    save_file(lora, folder / "lora.safetensors")
    width = json.loads((torch_sd / "text_encoder" / "config.json").read_text())["hidden_size"]
    save_file({"<word>": rng.normal(size=(1, width)).astype(np.float32)}, folder / "word.safetensors")
    detector(folder / "ssd")
    Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / "scene.png")
    return folder


def command(*arguments: object) -> None:
    done = CliRunner(env={"SUBSET_KEY": KEY}).invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)


def detector(folder: Path) -> None:
    """Write a ready detector that finds one cat everywhere, with its description."""
    folder.mkdir()
    image = ops.parameter([1, 3, 48, 64], np.float32, name="image")
    found = np.array([[[[0, 1, 0.9, 0.25, 0.25, 0.75, 0.75]]]], np.float32)
    out = ops.add(ops.constant(found), ops.multiply(ops.reduce_mean(image, ops.constant([0, 1, 2, 3])), np.float32(0)))
    model = ov.Model([out], [image], "ssd")
    model.inputs[0].get_tensor().set_names({"image"})
    model.outputs[0].get_tensor().set_names({"out"})
    ov.save_model(model, folder / "model.xml")
    labels = {"layer_name": "out", "labels": ["background", "cat"], "converter": "detection_output"}
    description = {"input_preproc": [{"layer_name": "image", "format": "image"}], "output_postproc": [labels]}
    (folder / "model-proc.json").write_text(json.dumps(description))


def told(models: Path, site: Path, package: str) -> dict[str, Any]:
    """Return what tests/subset.py says of an installation."""
    places = {"HOME": str(models), "SUBSET_KEY": KEY, "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-I", "-S", ROOT / "tests" / "subset.py", site, models, package],
        capture_output=True, text=True, check=False, env=places, cwd=models,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.fixture(scope="module")
def whole(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what everything together makes."""
    site = site_without(tmp_path_factory.mktemp("whole") / "site", "pytest")
    said = told(models, site, "pytest")
    assert not any("refused" in result for result in said["results"].values()), said["results"]
    return said


@pytest.mark.parametrize("left_out", MISSED)
def test_without_one_the_others_are_whole(left_out: str, models: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    package = left_out.replace("-", "_")
    said = told(models, site_without(tmp_path / "site", left_out), package)
    assert not said["importable"] and not said["imported"]
    name = left_out.removeprefix("ovforge-")
    assert said["states"][name] == ["not installed", f"brought by: pip install {left_out}"]
    assert said["states"].keys() == whole["states"].keys()
    assert {state for other, (state, _) in said["states"].items() if other != name} <= {"built in", "imported"}
    for subject, result in said["results"].items():
        if subject in MISSED[left_out]:
            assert f"pip install {left_out}" in result["refused"], (subject, result)
        else:
            assert result == whole["results"][subject], subject
