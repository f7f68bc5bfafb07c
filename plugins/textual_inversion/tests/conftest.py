"""Small models of each family, converted once, and textual inversions of every width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ovforge.bundle import ModelBundle
from ovforge.cache import Cache
from ovforge.sources import FileSource


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path / "default-cache"))
    monkeypatch.setenv("OVFORGE_REGISTRY", str(tmp_path / "registry.toml"))


@pytest.fixture(scope="session")
def ti_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache for this plugin's tests: a small pipeline is converted once."""
    return Cache(tmp_path_factory.mktemp("ti-cache"))


@pytest.fixture(scope="session")
def ti_torch(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the diffusers folder of a family."""
    from families import make_family

    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_family(tmp_path_factory.mktemp(family) / "pipeline", family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def ti_bundle(ti_torch: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ModelBundle]:
    """Return a function that opens a family's text encoders and tokenizers, converted once for each type of weights."""
    made: dict[tuple[str, str], Path] = {}

    def open_bundle(family: str, weights: str = "f16") -> ModelBundle:
        from ovforge_diffusers.loader import DiffusersLoader
        from ovforge_diffusers.options import LoaderOptions

        if (family, weights) not in made:
            bundle = DiffusersLoader(LoaderOptions(weights=weights)).load(FileSource(ti_torch(family)))
            for role in ("unet", "vae_encoder", "vae_decoder"):
                del bundle.models[role]
            made[family, weights] = tmp_path_factory.mktemp("text") / "bundle"
            bundle.save(made[family, weights])
        return ModelBundle.open(FileSource(made[family, weights]))

    return open_bundle
