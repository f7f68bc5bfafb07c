"""Small models of each family, converted once, and textual inversions of every width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import _own_cache
from conftest import session_cache as ti_cache
from conftest import torch_family as ti_torch
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

__all__ = ["_own_cache", "ti_bundle", "ti_cache", "ti_torch"]


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
