"""The one door: opening a model of any kind, as pipelines do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from ovforge.contracts.extensions import LoaderExtension
from ovforge.contracts.stages import Progress, ignore_progress
from ovforge.errors import ConfigError, as_path, require_type
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Plugins
from ovforge.run.calls import from_caller
from ovforge.run.resolution import resolve_source
from ovforge.run.session import Session
from ovforge.run.stages import LoadStage, perform
from ovforge.store.cache import Cache, chosen_cache

__all__ = ["find_loader", "open_model"]


def open_model(
    source: str | Path,
    *,
    use: str | None = None,
    key: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    cache: Cache | str | None = "default",
    plugins: Plugins | None = None,
    base: Path | None = None,
    progress: Callable[[Progress], None] = ignore_progress,
) -> ModelBundle:
    """Return the models of `source`: a folder or file of any kind that a loader here opens, or "package:NAME/PATH".

    `use` names the loader, which is otherwise found by content, and `options` are the loader's. `key` says where the
    key of an encrypted source is. A conversion comes from the cache, or goes there. Relative paths start at `base`, by
    default the current folder. Raises ModelError, ConfigError or PluginError.
    """
    require_type(use, (str, NoneType), where="open_model: use", hint="Name a loader.")
    source = str(as_path(source, where="open_model: source"))
    store = chosen_cache(cache)
    session = Session(plugins, key=key, memo=store.memo if store else None)
    resolved = resolve_source(session, str(source), base or Path.cwd(), use, options, key=use or "load")
    if key is not None and resolved.source.protection is None:
        raise ConfigError("a key is given, and nothing is encrypted", where="key", hint="Take it out.")
    stage = LoadStage(resolved, from_caller(progress))
    stage.check()
    return perform(stage, store)


def find_loader(source: str | Path, *, plugins: Plugins | None = None, base: Path | None = None) -> LoaderExtension:
    """Return the description of the loader that `open_model` would take for a source."""
    resolved = resolve_source(Session(plugins), str(source), base or Path.cwd())
    assert resolved.loader is not None
    extension = resolved.loader.extension
    assert isinstance(extension, LoaderExtension)
    return extension
