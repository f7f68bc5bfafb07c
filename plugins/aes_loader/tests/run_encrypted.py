"""Run an encrypted pipeline twice, with a changed model in the stage cache: a program of its own, to be watched.

Usage: run_encrypted.py SOURCE CACHE PICTURE [LOG]; LOG gets what Python itself opens for writing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

if len(sys.argv) > 4:
    log = os.open(sys.argv[4], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            os.write(log, f"{arguments[0]}\n".encode())

    sys.addaudithook(note)

import ovforge
from ovforge.contracts.extensions import GraphTransformExtension
from ovforge.contracts.stages import Phase, Report
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Plugins
from ovforge.store.cache import Cache


class Rename:
    """Changes a model, so that the cache stores it whole."""

    def __init__(self, options: None) -> None:
        pass

    def apply(self, bundle: ModelBundle) -> Report:
        """Name the decoder."""
        bundle.models["vae_decoder"].set_friendly_name("renamed")
        return Report(roles=("vae_decoder",), applied=["renamed"])


def plugin() -> ModuleType:
    """Return a plugin with that transform."""

    @ovforge.hookimpl
    def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
        yield GraphTransformExtension(name="rename", summary="Name a model", factory=Rename, phase=Phase.FUSE)

    module = ModuleType("renames")
    module.ovforge_graph_transforms = ovforge_graph_transforms  # type: ignore[attr-defined]
    return module


def main() -> None:
    """Run."""
    source, cache, picture = sys.argv[1:4]
    plugins = Plugins()
    plugins.register(plugin(), "renames")
    for start in range(2):
        pipeline = ovforge.Pipeline(
            "text-to-image",
            source=source,
            load={"key": {"env": "MODEL_KEY"}} if "MODEL_KEY" in os.environ else {},
            transforms=["rename"],
            plugins=plugins,
            cache=Cache(Path(cache)),
        )
        result = pipeline("a red circle", steps=1, seed=3)
        assert all(model.cached == bool(start) for _, model in pipeline.compiled.all())
    result.save(picture)


main()
