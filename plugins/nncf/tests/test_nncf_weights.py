"""Compressed weights against nncf's own, and pictures made with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from PIL import Image
from typer.testing import CliRunner

import ovforge
import ovforge_nncf
from ovforge import Use, testing
from ovforge.cli import app
from ovforge.errors import ConfigError, OvforgeError
from ovforge.model.bundle import ModelBundle

EMBEDDED = "package:ovforge_lcm/model"


def model(width: int = 96) -> ov.Model:
    """Return a matrix product and a convolution, with weights in float16."""
    rng = np.random.default_rng(0)
    x = ops.parameter([-1, width], np.float32, name="x")
    matrix = ops.convert(ops.constant(rng.normal(size=(128, width)).astype(np.float16)), "f32")
    flat = ops.matmul(x, matrix, False, True)
    picture = ops.reshape(flat, ops.constant(np.array([-1, 8, 4, 4])), False)
    kernel = ops.convert(ops.constant(rng.normal(size=(16, 8, 3, 3)).astype(np.float16)), "f32")
    out = ops.convolution(picture, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    flat.set_friendly_name("matrix")
    out.set_friendly_name("convolution")
    made = ov.Model([out], [x], "two")
    made.inputs[0].get_tensor().set_names({"x"})
    made.outputs[0].get_tensor().set_names({"y"})
    return made


def bundle() -> ModelBundle:
    made = ModelBundle()
    made.models["unet"] = model()
    made.models["tokenizer"] = testing.small_model()
    return made


def constants(compressed: ov.Model) -> list[tuple[str, bytes]]:
    ordered = (op for op in compressed.get_ordered_ops() if op.get_type_name() == "Constant")
    return [(op.get_element_type().get_type_name(), op.get_tensor_view().data.tobytes()) for op in ordered]


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({}, {"mode": "int8_sym"}),
        ({"mode": "int8_asym"}, {"mode": "int8_asym"}),
        ({"mode": "int4_sym", "group_size": 32}, {"mode": "int4_sym", "group_size": 32}),
        ({"mode": "nf4", "group_size": -1, "ratio": 0.5}, {"mode": "nf4", "group_size": -1, "ratio": 0.5}),
    ],
)
def test_the_result_is_nncfs_own(options: dict[str, Any], given: dict[str, Any]) -> None:
    import nncf

    report = testing.check_quantizer(ovforge_nncf, "nncf-weights", options, bundle, None)
    assert report.roles == ("unet",)
    assert report.bytes_after < 0.7 * report.bytes_before
    changed = bundle()
    testing.extension(ovforge_nncf, "quantizer", "nncf-weights").create(
        testing.extension(ovforge_nncf, "quantizer", "nncf-weights").options_model()(**options)
    ).quantize(changed, None)
    own = nncf.compress_weights(model(), mode=nncf.CompressWeightsMode(given.pop("mode")), **given)
    assert constants(changed.models["unet"]) == constants(own)


def test_the_plugin_keeps_the_contract() -> None:
    testing.check_plugin(ovforge_nncf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "int8_sym", "ratio": 0.5}, "ratio is for modes below 8 bits"),
        ({"group_size_fallback": "ignore"}, "group_size_fallback is for modes"),
        ({"mode": "int4_sym", "group_size": 0}, "group_size is -1"),
        ({"mode": "int9"}, "mode"),
        ({"roles": ["unett"]}, "Did you mean 'unet'"),
        ({"mode": "int4_sym", "group_size": 64, "roles": ["unet"]}, "groups of 64 do not divide"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ovforge.Pipeline("text-to-image", source=EMBEDDED, quantize=[Use("nncf-weights", **options)], cache=None)
    assert message in str(raised.value)


def test_what_is_compressed_already_is_said() -> None:
    twice = [Use("nncf-weights", roles=["text_encoder"])] * 2
    options: dict[str, Any] = {"source": EMBEDDED, "quantize": twice, "optimize": False, "cache": None}
    with pytest.raises(OvforgeError, match="all are already"):
        ovforge.Pipeline("text-to-image", **options)
    pipe = ovforge.Pipeline("text-to-image", strict=False, **options)
    assert [bool(report.skipped) for report in pipe.reports[-2:]] == [False, True]


def test_a_picture_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bits change a pixel by a few steps, and the command that asks for them works."""
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path / "cache"))
    prompt = "a beautiful pink unicorn, 8k"
    command = [
        "generate",
        "-m",
        EMBEDDED,
        "-p",
        prompt,
        "-s",
        "7",
        "-t",
        "INT8",
        "--precision",
        "f32",
        "-o",
        str(tmp_path / "a.png"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    plain = ovforge.Pipeline("text-to-image", source=EMBEDDED, device=Use("cpu", precision="f32"), cache=None)
    with Image.open(tmp_path / "a.png") as file:
        ours = np.asarray(file.convert("RGB"), np.float32)
    theirs = np.asarray(plain(prompt, seed=7).images[0], np.float32)
    assert 0 < np.abs(ours - theirs).mean() < 6
