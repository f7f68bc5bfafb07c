"""Small pipelines with random weights, and a cache of the test's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from families import make_family, maker
from ovforge.store.cache import Cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
    return Path(maker().make_pipeline(tmp_path_factory.mktemp("lcm") / "pipeline"))


@pytest.fixture(scope="session")
def torch_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder of a Stable Diffusion model, which needs classifier-free guidance."""
    build = maker()
    folder = Path(build.make_pipeline(tmp_path_factory.mktemp("sd") / "pipeline", time_cond_proj_dim=None))
    build.write_index(folder, _class_name="StableDiffusionPipeline", image_encoder=[None, None])
    return folder


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache that tests share, so that a small pipeline is converted once."""
    return Cache(tmp_path_factory.mktemp("shared-cache"))


@pytest.fixture(scope="session")
def torch_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the diffusers folder of a family, made once: see families.make_family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family) / "pipeline", family)
        return made[family]

    return folder
