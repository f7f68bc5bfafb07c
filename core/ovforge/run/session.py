"""A session: the plugins, the key and the files of one pipeline, wherever its plugins' code runs."""

from __future__ import annotations

import contextlib
import glob
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from ovforge.config.options import validate_options
from ovforge.errors import ConfigError, ModelError, PluginError, as_path, require_type
from ovforge.model.sources import PACKAGE, FileSource, named_path
from ovforge.plugins.manager import Plugins
from ovforge.run.calls import blaming

if TYPE_CHECKING:
    from ovforge.config.pipeline import PipelineConfig
    from ovforge.model.sources import Describes, Opener, Source
    from ovforge.plugins.manager import Offer
    from ovforge.store.cache import Cache
    from ovforge.store.digests import DigestMemo

__all__ = ["ClosedError", "Session", "describe_protection", "open_file"]

_CURRENT: ContextVar[Session | None] = ContextVar("session", default=None)


class ClosedError(ModelError):
    """A source cannot be opened by a plan, since that would run something, or ask somebody."""


class Session:
    """Opens all that one pipeline reads, with its plugins and its key.

    While plugin code runs inside `active`, `ovforge.open_file` opens files by this session. With `planning`, nothing is
    run and nobody is asked for a key.
    """

    def __init__(
        self,
        plugins: Plugins | None = None,
        *,
        key: Mapping[str, Any] | None = None,
        memo: DigestMemo | None = None,
        planning: bool = False,
    ) -> None:
        require_type(plugins, (Plugins, NoneType), where="plugins")
        self.plugins = plugins or Plugins()
        self.memo, self.planning = memo, planning
        self._key = key
        self._read: set[Path] | None = None
        self.broken: dict[str, PluginError] = {}
        """Source plugin -> its fault: it opens nothing here, and what needs it cannot be opened."""

    @classmethod
    def of(
        cls, config: PipelineConfig, base: Path, plugins: Plugins | None, cache: Cache | None, *, planning: bool = False
    ) -> Session:
        """Return the session of a whole config: its key's file starts at the config's folder, like all paths."""
        key = config.load.key
        if key and isinstance(key.get("file"), str | Path):
            key = {**key, "file": base / Path(key["file"]).expanduser()}
        return cls(plugins, key=key, memo=cache.memo if cache else None, planning=planning)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this the session that `open_file` opens files by."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    @contextlib.contextmanager
    def recording(self) -> Iterator[set[Path]]:
        """Yield a set that collects the files that are opened in the block by `open_file`."""
        before, self._read = self._read, set()
        try:
            yield self._read
        finally:
            if before is not None:
                before |= self._read
            self._read = before

    def open_source(self, text: str, base: Path) -> Source:
        """Open what a config's `source` says: a path relative to `base`, or "package:NAME/PATH" in a Python package.

        What is encrypted is opened by the plugin that knows it. Raises ModelError or ConfigError if that cannot be.
        """
        return self._open(named_path(text, base), name=text, trusted=text.startswith(PACKAGE))

    def open_file(self, path: Path) -> Source:
        """Open a file or folder that an option names."""
        return self._open(path, on_read=self._note)

    def _open(self, path: Path, *, trusted: bool = False, **how: Any) -> Source:
        """Open what lies at a path; a file that is there in an encrypted form alone opens by its plain name, too."""
        if not os.path.exists(path):  # noqa: PTH110 - Path's own raises if a name is too long
            longer = [file for file in path.parent.glob(f"{glob.escape(path.name)}.*") if file.is_file()]
            for file in longer if len(longer) == 1 else ():
                source = self._opened(FileSource(file, memo=self.memo, **how))
                if source.protection is not None:
                    return source
        plain = FileSource(path, memo=self.memo, **how)
        plain.trusted = trusted
        return self._opened(plain)

    def _note(self, path: Path) -> None:
        if self._read is not None:
            self._read.add(path.resolve())

    @cached_property
    def _openers(self) -> list[tuple[Offer, Opener]]:
        made, refused = [], list[ConfigError]()
        for offer in self.plugins.all("source"):
            try:
                with blaming(offer):
                    model = offer.extension.options_model()
                    options = validate_options(model, self._key or {}, where="load.key", secret=True)
                    made.append((offer, offer.extension.create(options)))
            except PluginError as error:
                self._set_aside(offer, error)
            except ConfigError as error:  # the key, or its absence, is not for this opener
                refused.append(error)
        if self._key is not None and not made:
            none = ConfigError(
                "no plugin here opens encrypted sources",
                where="load.key",
                hint="".join(f"Run: {record.install}" for record in self.plugins.missing("source")),
            )
            raise [*refused, *self.broken.values(), none][0]
        return made

    def _opened(self, source: FileSource) -> Source:
        """Return what the first plugin that knows the source makes of it; the source itself if none does."""
        for offer, opener in self._openers:
            if offer.plugin in self.broken:
                continue
            try:
                with blaming(offer):
                    known = opener.can_open(source)
            except PluginError as error:
                self._set_aside(offer, error)
                continue
            if not known:
                continue
            with blaming(offer):
                if self.planning and getattr(opener, "asks", False):
                    raise ClosedError(
                        "its key is asked for when it is opened, and a plan asks nobody", where=source.name
                    )
                return opener.open(source)
        return source

    def _set_aside(self, offer: Offer, error: PluginError) -> None:
        """Go on without a source plugin that is at fault: most sources are plain, and others' plugins work."""
        fault = PluginError(f"it opens no source: {error.what}", where=f"the plugin {offer.plugin}", hint=error.hint)
        fault.__cause__ = error
        self.broken[offer.plugin] = fault
        warnings.warn(f"{fault.where} is left out: {fault.what}", stacklevel=2)


def open_file(path: Path | str) -> Source:
    """Open a file or folder that an option names; plugins read theirs through this, so that encrypted ones open, too.

    Inside a pipeline its plugins and its key count; elsewhere those that are installed, and keys in default places.
    """
    return (_CURRENT.get() or Session()).open_file(as_path(path, where="open_file"))


def describe_protection(source: str, base: Path, plugins: Plugins | None = None) -> Sequence[Mapping[str, Any]]:
    """Return what the files of a source say of how they are protected; nothing if they are plain. Needs no key."""
    require_type(plugins, (Plugins, NoneType), where="plugins")
    source = str(as_path(source, where="source"))
    files = FileSource(named_path(source, as_path(base, where="base")), source)
    for offer in (plugins or Plugins()).all("source"):
        try:
            with blaming(offer):
                options = validate_options(offer.extension.options_model(), {}, where="load.key")
                opener = offer.extension.create(options)
                known = opener.can_open(files)
        except (ConfigError, PluginError):
            continue  # it opens only what comes with a key, or nothing at all
        if known and hasattr(opener, "describe"):
            describes: Describes = opener
            return describes.describe(files)
    return ()
