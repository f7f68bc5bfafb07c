"""Opening what a config or an option names: plain files, packages, and what a plugin's opener decrypts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.config.options import validate_options
from ovforge.errors import ConfigError
from ovforge.model.sources import PACKAGE, FileSource, package_path
from ovforge.plugins.manager import Plugins

if TYPE_CHECKING:
    from ovforge.model.sources import Describes, Opener, Source
    from ovforge.store.cache import DigestMemo

__all__ = ["describe_protection", "open_file", "open_source"]


def open_source(
    text: str,
    base: Path,
    memo: DigestMemo | None = None,
    *,
    key: Mapping[str, Any] | None = None,
    plugins: Plugins | None = None,
) -> Source:
    """Open what a config's `source` says: a path (relative to `base`), or "package:NAME/PATH" in a Python package.

    What is encrypted is opened by the plugin that knows it; `key` says where it finds the key.
    """
    if text.startswith(PACKAGE):
        return _opened(FileSource(package_path(text), text, memo), key, plugins)
    return _opened(FileSource(base / Path(text).expanduser(), text, memo), key, plugins)


def describe_protection(text: str, base: Path, plugins: Plugins | None = None) -> Sequence[Mapping[str, Any]]:
    """Return what the files of a source say of how they are protected; nothing where they are plain. Needs no key."""
    source = FileSource(package_path(text) if text.startswith(PACKAGE) else base / Path(text).expanduser(), text)
    for offer in (plugins or Plugins()).all("source"):
        opener = offer.extension.create(validate_options(offer.extension.options_model(), {}, where="load.key"))
        if opener.can_open(source) and hasattr(opener, "describe"):
            describes: Describes = opener
            return describes.describe(source)
    return ()


def open_file(path: Path, memo: DigestMemo | None = None, plugins: Plugins | None = None) -> Source:
    """Open a file or folder that an option names; transforms read theirs through this.

    What is encrypted opens with a key that this process knows already, as from `load.key`, or a default one.
    """
    return _opened(FileSource(path, memo=memo), None, plugins)


def _opened(source: FileSource, key: Mapping[str, Any] | None, plugins: Plugins | None) -> Source:
    """Return what the first plugin that knows the source makes of it; the source itself where none does."""
    offers = (plugins or Plugins()).all("source")
    for offer in offers:
        options = validate_options(offer.extension.options_model(), key or {}, where="load.key", secret=True)
        opener: Opener = offer.extension.create(options)
        if opener.can_open(source):
            return opener.open(source)
    if key is not None and not offers:
        raise ConfigError(
            "no plugin here opens encrypted sources", where="load.key", hint="Run: pip install ovforge-aes-loader"
        )
    return source
