"""Small pipelines with random weights, and a cache of the test's own."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from families import make_family, make_transformer, maker
from ovforge.store.cache import Cache

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Torch's threads wait for each other by spinning: with a worker on each core, a third of a conversion's time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's cache and catalogue."""
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path / "default-cache"))
    monkeypatch.setenv("OVFORGE_REGISTRY", str(tmp_path / "registry.toml"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Return an empty cache."""
    return Cache(tmp_path / "cache")


def _shared(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of a run share: what one has made, the others need not make again."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def _made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return the folder that `make` fills, whichever worker has it first; one that comes later uses that one's."""
    shared = _shared(factory) / f"made-{name}"
    if not shared.exists():
        own = factory.mktemp(name)
        make(own / "pipeline")  # some put more beside it
        with contextlib.suppress(OSError):  # another worker was quicker
            own.rename(shared)
    return shared / "pipeline"


@pytest.fixture(scope="session")
def torch_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder of a latent consistency model."""
    return _made_once(tmp_path_factory, "lcm", maker().make_pipeline)


@pytest.fixture(scope="session")
def transformer_folder(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the diffusers folder of a family of transformers."""

    def give(family: str) -> Path:
        make = functools.partial(make_transformer, family=family, torch_lcm=torch_lcm)
        return _made_once(tmp_path_factory, f"transformer-{family}", make)

    return give


@pytest.fixture(scope="session")
def torch_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a diffusers folder of a Stable Diffusion model, which needs classifier-free guidance."""
    build = maker()

    def make(folder: Path) -> None:
        build.make_pipeline(folder, time_cond_proj_dim=None)
        build.write_index(folder, _class_name="StableDiffusionPipeline", image_encoder=[None, None])

    return _made_once(tmp_path_factory, "sd", make)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache that tests share, so that a small pipeline is converted once."""
    return Cache(_shared(tmp_path_factory) / "shared-cache")


@pytest.fixture(scope="session")
def torch_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the diffusers folder of a family, made once: see families.make_family."""
    return lambda family: _made_once(tmp_path_factory, family, lambda folder: make_family(folder, family))
