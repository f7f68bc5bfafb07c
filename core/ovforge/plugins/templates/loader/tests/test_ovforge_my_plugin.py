"""The plugin keeps ovforge's contract, and the model computes what numpy computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ovforge import testing
from ovforge.errors import ModelError
from ovforge.model import FileSource

import ovforge_my_plugin

RNG = np.random.default_rng(0)
LAYERS = {
    "weight0": RNG.normal(size=(4, 8)).astype(np.float32),
    "bias0": RNG.normal(size=8).astype(np.float32),
    "weight1": RNG.normal(size=(8, 3)).astype(np.float32),
    "bias1": RNG.normal(size=3).astype(np.float32),
}


@pytest.fixture
def network(tmp_path: Path) -> Path:
    np.savez(tmp_path / "network.npz", **LAYERS)
    return tmp_path / "network.npz"


def test_contract(network: Path, tmp_path: Path) -> None:
    testing.check_plugin(ovforge_my_plugin)
    (tmp_path / "foreign.npz").write_bytes(b"not a zip archive")
    testing.check_loader(ovforge_my_plugin, "my-plugin", network, tmp_path / "foreign.npz")


@pytest.mark.parametrize(
    ("activation", "function"), [("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh), ("none", lambda x: x)]
)
def test_it_computes_what_numpy_computes(network: Path, activation: str, function: object) -> None:
    loader = testing.extension(ovforge_my_plugin, "loader", "my-plugin")
    bundle = loader.create(loader.options_model()(activation=activation)).load(FileSource(network))
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    hidden = function(x @ LAYERS["weight0"] + LAYERS["bias0"])
    expected = hidden @ LAYERS["weight1"] + LAYERS["bias1"]
    np.testing.assert_allclose(testing.run(bundle.models["model"], {"x": x})["y"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight1": np.ones((7, 3))}, "weight1"),
        ({"bias0": np.ones(5)}, "weight0"),
        ({"other": np.ones(1)}, "other"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    np.savez(tmp_path / "network.npz", **{**LAYERS, **change})
    loader = testing.extension(ovforge_my_plugin, "loader", "my-plugin")
    with pytest.raises(ModelError, match=message):
        loader.create(loader.options_model()()).load(FileSource(tmp_path / "network.npz"))
