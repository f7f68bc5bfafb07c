"""Compiled models read ahead: while a pipeline's plugins are still found and imported, which leaves cores idle.

A start remembers the keys of the compiled models that it began with, and the next start of the same config reads these
at once. Only the moment changes: a model is used when a role asks for its key, and what nobody asks for is let go.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.model.runtime import instruction_set, openvino_version
from ovforge.run.compiled import read_compiled
from ovforge.store.digests import fingerprint
from ovforge.store.files import atomic_write

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.config.pipeline import PipelineConfig
    from ovforge.store.cache import Cache

__all__ = ["ReadAhead"]

_STARTS = 200
"""Starts that are remembered in one cache, the last ones."""


class ReadAhead:
    """The compiled models that the last start of this config began with, by their keys in the cache.

    Encrypted models are read by who has their key alone, and pipelines without a cache read nothing.
    """

    def __init__(self, config: PipelineConfig, base: Path, cache: Cache | None) -> None:
        self._cache, self._name = cache, None if config.load.key else _name(config, base)
        self._futures: dict[str, Future[ov.CompiledModel | None]] = {}
        keys = self._remembered().get(self._name or "", [])
        if not keys:
            return
        import openvino  # noqa: F401 - in this thread, so that no other one waits for the import

        pool = ThreadPoolExecutor(max_workers=min(3, len(keys)), thread_name_prefix="ovforge-read-ahead")
        self._futures = {key: pool.submit(self._read, key) for key in keys}
        pool.shutdown(wait=False)

    def take(self, key: str) -> ov.CompiledModel | None:
        """Return the compiled model of a key, waiting for it, or None if it was not read, or could not be."""
        future = self._futures.pop(key, None)
        with contextlib.suppress(Exception):  # who reads it next is told what is wrong
            return None if future is None else future.result()
        return None

    def conclude(self, keys: Iterable[str]) -> None:
        """Remember which keys this start began with, and let go of what was read for others."""
        wanted = list(dict.fromkeys(keys))
        for key in set(self._futures) - set(wanted):
            self._futures.pop(key).cancel()
        known = self._remembered()
        if self._cache is None or self._name is None or known.pop(self._name, []) == wanted:
            return
        kept = list(known.items())[1 - _STARTS :] + ([(self._name, wanted)] if wanted else [])
        with contextlib.suppress(OSError):  # a read-only cache still serves
            atomic_write(self._cache.root / "starts.json", json.dumps(dict(kept)).encode())

    def _remembered(self) -> dict[str, list[str]]:
        if self._cache is None:
            return {}
        try:
            read = dict(json.loads((self._cache.root / "starts.json").read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}
        return {name: keys for name, keys in read.items() if _is_keys(keys)}

    def _read(self, key: str) -> ov.CompiledModel | None:
        assert self._cache is not None
        entry = self._cache.find(key)
        if entry is None or entry.stage != "compile" or "encrypted" in entry.dependencies:
            return None
        facts = entry.dependencies
        if (facts["openvino"], facts["instructions"]) != (openvino_version(), instruction_set()):
            return None
        return read_compiled(entry, None, facts["device"], facts["properties"])


def _name(config: PipelineConfig, base: Path) -> str | None:
    """Return what a start is remembered by; None if the config holds objects that are not JSON.

    Texts of the input are left out, since they change from call to call, and few decide on a shape.
    """
    try:
        written = {key: value for key, value in config.as_dict().items() if key not in ("input", "output")}
        numbers = {name: value for name, value in config.input.items() if not isinstance(value, str)}
        return fingerprint({"config": written, "input": numbers, "base": str(base.resolve())})
    except (TypeError, ValueError, OSError, RecursionError):
        return None


def _is_keys(keys: Any) -> bool:
    return isinstance(keys, list) and len(keys) <= 32 and all(isinstance(key, str) for key in keys)
