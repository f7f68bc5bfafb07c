"""`ovforge inspect`: what is in a model, plain, converted or encrypted."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from typer.testing import CliRunner

from ovforge import testing
from ovforge.cli import app
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge_inspect.command import model_facts

ROOT = Path(__file__).parents[3]


def report(*arguments: object) -> Any:
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def stored(path: Path) -> int:
    """Return how many numbers a safetensors file says that it holds."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def test_a_folder_has_the_parameters_of_the_weights_it_was_converted_from() -> None:
    models = report("package:ovforge_lcm/model")["models"]
    weights = ROOT / "plugins/lcm/tests/data/embedded-diffusers"
    assert models["text_encoder"]["parameters"] == stored(weights / "text_encoder/model.safetensors")
    unet = models["unet"]
    table = 32  # the frequencies of the time embedding, which torch computes
    assert unet["parameters"] - table == stored(weights / "unet/diffusion_pytorch_model.safetensors")
    assert [port["names"] for port in unet["inputs"]][:2] == [["sample"], ["timestep"]]
    assert unet["operations"]["Convolution"] == 50
    f16 = unet["weights"][0]
    assert (f16["type"], f16["bytes"]) == ("f16", 2 * f16["elements"])
    assert models["tokenizer"]["parameters"] == 0
    with pytest.raises(InputError, match="no role 'nothing'"):
        report("package:ovforge_lcm/model", "--role", "nothing")


@pytest.mark.parametrize("mode", ["INT8_SYM", "INT8_ASYM", "INT4_SYM", "INT4_ASYM"])
def test_scales_and_zero_points_are_not_parameters(mode: str) -> None:
    nncf = pytest.importorskip("nncf")
    x = ops.parameter([2, 256], np.float32, name="x")
    weights = np.random.default_rng(0).normal(size=(128, 256)).astype(np.float32)
    more = np.random.default_rng(1).normal(size=(64, 128)).astype(np.float32)
    y = ops.matmul(ops.matmul(x, weights, False, True), more, False, True)
    model = ov.Model([ops.result(y)], [x], "two layers")
    before = model_facts(model).parameters
    options = {"group_size": 64} if "INT4" in mode else {}
    low = model_facts(nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **options))
    assert low.parameters == before == 128 * 256 + 64 * 128
    assert {one.type for one in low.weights} & {"i8", "u8", "i4", "u4"}


def test_an_encrypted_model_says_what_protects_it_and_with_the_key_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ovforge_aes_loader")
    secret = os.urandom(32).hex()  # a process remembers the keys that it has seen
    monkeypatch.setenv("INSPECT_KEY", secret)
    source = ROOT / "plugins/lcm/src/ovforge_lcm/model/vae_decoder"
    sealed = tmp_path / "sealed"
    encrypt = ["encrypt", str(source), "-o", str(sealed), "-k", "env:INSPECT_KEY"]
    assert CliRunner().invoke(app, encrypt).exit_code == 0
    closed = report(sealed)
    assert closed["models"] is None and "key" in closed["closed"]
    assert {file["file"] for file in closed["protection"]} >= {"openvino_model.xml.ovenc", "openvino_model.bin.ovenc"}
    opened = report(sealed, "--key", "env:INSPECT_KEY")
    assert opened["models"] and opened["protection"] == closed["protection"]
    assert list(opened["models"].values()) == list(report(source)["models"].values())
    monkeypatch.setenv("INSPECT_OTHER", os.urandom(32).hex())
    with pytest.raises((ConfigError, ModelError), match="another"):
        report(sealed, "-k", "env:INSPECT_OTHER")
    with pytest.raises(ConfigError, match="does not say where the key is"):
        report(sealed, "-k", secret)
    with pytest.raises(ConfigError, match="nothing is encrypted"):
        report(source, "-k", "env:INSPECT_KEY")
    assert secret not in json.dumps(opened)


def test_people_see_the_same_as_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bundle = testing.small_bundle()
    bundle.models["[bold]"] = testing.small_model()
    bundle.save(tmp_path / "model")
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "model")], catch_exceptions=False).stdout
    assert re.search(r"^model +12 parameters", shown, re.MULTILINE)
    assert re.search(r"^\[bold\] +12 parameters", shown, re.MULTILINE), "a role is not markup"
    assert "MatMul 1" in shown
    pytest.importorskip("ovforge_aes_loader")
    # A place of a key that this process has not read before: it remembers those.
    monkeypatch.setenv("INSPECT_CLOSED", os.urandom(32).hex())
    encrypt = ["encrypt", str(tmp_path / "model"), "-o", str(tmp_path / "sealed"), "-k", "env:INSPECT_CLOSED"]
    assert CliRunner().invoke(app, encrypt).exit_code == 0
    closed = CliRunner().invoke(app, ["inspect", str(tmp_path / "sealed")], catch_exceptions=False).stdout
    assert "What is inside needs the key" in closed
    assert ".bin.ovenc" in closed


def test_what_no_loader_opens(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match="no loader knows"):
        report(tmp_path)
    with pytest.raises(ModelError, match="no such file"):
        report(tmp_path / "nothing")
