"""Small pipelines with random weights, and a cache of the test's own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from ovforge.cache import Cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]


def _maker() -> Any:
    """Return the converter's own test module, which builds diffusers folders."""
    spec = importlib.util.spec_from_file_location("small_pipelines", ROOT / "plugins/diffusers/tests/conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's cache and catalogue."""
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path / "default-cache"))
    monkeypatch.setenv("OVFORGE_REGISTRY", str(tmp_path / "registry.toml"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Return an empty cache."""
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="session")
def torch_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder of a latent consistency model."""
    return Path(_maker().make_pipeline(tmp_path_factory.mktemp("lcm") / "pipeline"))


@pytest.fixture(scope="session")
def torch_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder of a Stable Diffusion model, which needs classifier-free guidance."""
    maker = _maker()
    folder = Path(maker.make_pipeline(tmp_path_factory.mktemp("sd") / "pipeline", time_cond_proj_dim=None))
    maker.write_index(folder, _class_name="StableDiffusionPipeline", image_encoder=[None, None])
    return folder


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache that tests share, so that a small pipeline is converted once."""
    return Cache(tmp_path_factory.mktemp("shared-cache"))
