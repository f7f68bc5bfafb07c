"""Calibration with arrays of the user's own, for models that no task runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops

import ovforge
from ovforge.errors import ConfigError
from ovforge.model import ModelBundle
from ovforge_quality.arrays import ArrayCalibration

SHAPES = {"pixels": (6, 3, 8, 8), "size": (6, 2)}


def network(batch: int = -1) -> ov.Model:
    """Return a convolution of pixels, moved by a sum of whole numbers."""
    weights = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    pixels = ops.parameter([batch, 3, 8, 8], np.float32, name="pixels")
    size = ops.parameter([batch, 2], np.int64, name="size")
    pixels.output(0).get_tensor().set_names({"pixels"})
    size.output(0).get_tensor().set_names({"size"})
    seen = ops.relu(ops.convolution(pixels, ops.constant(weights), [1, 1], [0, 0], [0, 0], [1, 1]))
    total = ops.reduce_sum(ops.convert(size, "f32"), ops.constant([1]), keep_dims=True)
    moved = ops.add(seen, ops.unsqueeze(total, ops.constant([2, 3])))
    return ov.Model([moved], [pixels, size], "network")


@pytest.fixture
def arrays(tmp_path: Path) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    made = {"pixels": rng.normal(size=SHAPES["pixels"]), "size": rng.integers(0, 9, SHAPES["size"], np.int32)}
    np.savez(tmp_path / "calls.npz", **made)
    return made


def calibration(path: Path, batch: int = -1) -> ArrayCalibration:
    bundle = ModelBundle()
    bundle.models["model"] = network(batch)
    return ArrayCalibration(path, bundle, lambda models: 0.0)


def test_ptq_equals_plain_nncf(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    nncf = pytest.importorskip("nncf")
    ov.save_model(network(), tmp_path / "model.xml", compress_to_fp16=False)
    config: dict[str, Any] = {"load": str(tmp_path / "model.xml"), "quantize": ["nncf-ptq"]}
    given = {**config, "calibration": {"file": str(tmp_path / "calls.npz"), "samples": 4}}
    ours = ovforge.prepare(given, cache=None).bundle.models["model"]
    rows = [
        {"pixels": arrays["pixels"][i : i + 1].astype(np.float32), "size": arrays["size"][i : i + 1]} for i in range(4)
    ]
    theirs = nncf.quantize(network(), nncf.Dataset(rows))

    def ranges(model: ov.Model) -> list[np.ndarray]:
        return [
            port.get_source_output().get_node().get_data()
            for op in model.get_ordered_ops() if op.get_type_name() == "FakeQuantize" for port in op.inputs()[1:]
        ]  # fmt: skip

    assert ranges(ours)
    for mine, wanted in zip(ranges(ours), ranges(theirs), strict=True):
        np.testing.assert_array_equal(mine, wanted)
    with pytest.raises(ConfigError, match="no task runs 'model'.*\n.*a .npz with an array for each input"):
        ovforge.prepare(config, cache=None)


def test_rows_and_files_are_calls(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    records = calibration(tmp_path / "calls.npz", batch=2).inputs("model", 9)
    assert [record["pixels"].shape for record in records] == [(2, 3, 8, 8)] * 3
    assert {name: array.dtype for name, array in records[0].items()} == {"pixels": np.float32, "size": np.int64}
    np.testing.assert_array_equal(records[2]["size"], arrays["size"][4:])
    folder = tmp_path / "calls" / "model"
    folder.mkdir(parents=True)
    for number in range(3):
        np.savez(folder / f"{number}.npz", **{name: array[number : number + 2] for name, array in arrays.items()})
    records = calibration(tmp_path / "calls").inputs("model", 2)
    assert len(records) == 2
    np.testing.assert_array_equal(records[1]["size"], arrays["size"][1:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": None}, "there is no array for the input 'pixels'"),
        ({"pixel": np.zeros(3)}, "no input 'pixel'. Did you mean 'pixels'"),
        ({"pixels": np.zeros((6, 3, 8, 9))}, r"pixels is \[1, 3, 8, 9\], and the model takes"),
        ({"pixels": np.zeros((5, 3, 8, 8))}, "different numbers of calls: pixels 5, size 6"),
        ({"pixels": np.zeros((8, 8))}, "its rows are not calls"),
        ({"size": np.zeros((6, 2))}, "size holds float64, and the model takes i64"),
        ({"pixels": np.full((6, 3, 8, 8), np.nan)}, "NaN"),
        ({"size": np.full((6, 2), None)}, "cannot be read as numpy's arrays"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, arrays: dict[str, np.ndarray], change: dict[str, Any], message: str
) -> None:
    changed = {name: array for name, array in {**arrays, **change}.items() if array is not None}
    np.savez(tmp_path / "calls.npz", **changed)
    with pytest.raises(ConfigError, match=message):
        calibration(tmp_path / "calls.npz").inputs("model", 3)
