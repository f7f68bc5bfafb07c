"""Each subject is one distribution: without it the others are whole, and what is missing is said.

An installation without a distribution is one of its own: a folder that stands in for site-packages, with links to all that
is there but to what the distribution brought, and a Python that looks nowhere else.
"""

from __future__ import annotations

import json
import os
import shutil
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
from typer.testing import CliRunner

from ovforge.cli import app

ROOT = Path(__file__).parents[1]
PLUGINS = ROOT / "plugins"
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
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small models, and files for them, made with everything installed."""
    folder = tmp_path_factory.mktemp("subsets")
    for name, file in (
        ("lcm", "lcm/src/ovforge_lcm/model"),
        ("lora.safetensors", "sd_lora/src/ovforge_sd_lora/examples/pencil.safetensors"),
        ("word.safetensors", "textual_inversion/src/ovforge_textual_inversion/teal.safetensors"),
    ):
        copy = shutil.copytree if (PLUGINS / file).is_dir() else shutil.copy
        copy(PLUGINS / file, folder / name)
    guided(folder / "lcm", folder / "sd")
    command("encrypt", folder / "sd", "-o", folder / "sealed", "--key", "env:SUBSET_KEY")
    detector(folder / "ssd")
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "scene.png")
    return folder


def guided(source: Path, folder: Path) -> None:
    """Write the embedded model as one of no particular kind: its UNet takes no embedded guidance any more."""
    shutil.copytree(source, folder)
    (folder / "ovforge.json").unlink()
    config = json.loads((folder / "unet" / "config.json").read_text())
    width = config.pop("time_cond_proj_dim")
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    unet = ov.Core().read_model(source / "unet" / "openvino_model.xml")
    [parameter] = [node for node in unet.get_parameters() if "timestep_cond" in node.output(0).names]
    for port in parameter.output(0).get_target_inputs():
        port.replace_source_output(ops.constant(np.zeros((1, width), np.float32)).output(0))
    unet.remove_parameter(parameter)
    ov.save_model(unet, folder / "unet" / "openvino_model.xml", compress_to_fp16=False)


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
    assert not said["there"] and not said["imported"]
    name = left_out.removeprefix("ovforge-")
    assert said["states"][name] == ["not installed", f"installed by: pip install {left_out}"]
    assert said["states"].keys() == whole["states"].keys()
    assert {state for other, (state, _) in said["states"].items() if other != name} <= {"built in", "imported"}
    for subject, result in said["results"].items():
        if subject in MISSED[left_out]:
            assert f"pip install {left_out}" in result["refused"], (subject, result)
        else:
            assert result == whole["results"][subject], subject
