"""The content-addressed store of stage results and compiled models.

An entry is a folder named by the hash of everything its content depends on (its dependencies), with a manifest
`entry.json` beside its files. Entries appear whole, by a rename; a lock for each key lets processes share one store
and do no work twice; a damaged entry is a miss. On POSIX a file that somebody has open or mapped survives its removal,
so pruning never pulls a model from under a running pipeline.

Nothing that is stored is believed: a manifest carries its own checksum, and a file's content is checked against it
(`Entry.checked`) before anybody uses it. An entry also names the files that were read while it was made, beyond those
that its key foresaw: it counts only as long as they are the same. And it names the entries that it was made from, so
that with a damaged one all that came of it can be found.

Entries are made, and damaged ones removed, only by who holds the key's lock. A work folder is named after its key, so
whether its maker lives is asked of the lock: a process id would mean nothing to another container or host.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovforge.errors import CacheError, ConfigError, as_path, require_type
from ovforge.store.digests import Dependencies, DigestMemo, checksum, digest_file, fingerprint, state_of
from ovforge.store.files import atomic_write, sync_file, sync_folder

__all__ = [
    "Cache",
    "CacheWarning",
    "DamagedError",
    "Entry",
    "Explanation",
    "chosen_cache",
    "parse_size",
]

_MANIFEST = "entry.json"
_REMOVED = "removed"
_DEFAULT_SIZE = 20 * 10**9
_ABANDONED = 24 * 3600.0
"""Seconds after which a lock that nobody holds, and what else lies about, is cleared away."""

_IN_USE = 60.0
"""Seconds after its last use in which an entry is spared by pruning, since a pipeline may be opening it."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class CacheWarning(UserWarning):
    """Something in the cache was damaged; it is made again."""


class DamagedError(CacheError):
    """An entry is not what its manifest says."""


class _StaleError(DamagedError):
    """An entry was made from files that have changed since."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored result; times are seconds since the epoch.

    `files` maps relative name -> {"size", "sha256", "checksum"}. `inputs` maps the path of each file that was read
    besides those in `dependencies` -> its sha256. `parents` are the keys of the entries that it was made from.
    """

    key: str
    path: Path
    stage: str
    label: str
    size: int
    created: float
    last_used: float
    dependencies: dict[str, Any]
    files: dict[str, dict[str, Any]]
    inputs: dict[str, str]
    parents: tuple[str, ...]

    def checked(self, name: str) -> Path:
        """Return the path of a stored file whose content is what was stored. Raises DamagedError otherwise.

        A file is read for this once in a process, as long as it does not change.
        """
        path = self.path / name
        try:
            status = path.stat()
            sound = _checked_before(path, tuple(state_of(status))) == self.files[name]["checksum"]
        except OSError as error:
            raise DamagedError(f"{name} cannot be read: {error.strerror or error}", where=str(self.path)) from error
        if not sound:
            raise DamagedError(f"{name} has changed", where=str(self.path))
        return path


@functools.cache
def _checked_before(path: Path, state: tuple[int, ...]) -> str:
    return checksum(path)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether there is an entry, and if not, why: (ingredient, then, now) against the nearest stored one."""

    hit: bool
    reason: str
    differences: tuple[tuple[str, Any, Any], ...] = ()


class Cache:
    """Entries below `root`/entries, at most `max_bytes` of them together."""

    def __init__(self, root: Path | str, max_bytes: int = _DEFAULT_SIZE) -> None:
        require_type(max_bytes, int, where="Cache: max_bytes")
        if max_bytes < 0:
            raise ConfigError(f"the cache cannot hold {max_bytes} bytes", hint="Give a size of 0 or more.")
        self.root = as_path(root, where="Cache")
        self.max_bytes = max_bytes
        self.memo = DigestMemo(self.root / "digests.json")

    @classmethod
    def default(cls) -> Cache:
        """Return the user's cache: $OVFORGE_CACHE_DIR, capped at $OVFORGE_CACHE_SIZE ("20GB", "500MiB")."""
        from platformdirs import user_cache_path

        named = os.environ.get("OVFORGE_CACHE_DIR")
        root = Path(named) if named else user_cache_path("ovforge", appauthor=False)
        size = os.environ.get("OVFORGE_CACHE_SIZE")
        if not size:
            return cls(root)
        try:
            return cls(root, parse_size(size))
        except ConfigError as error:
            raise ConfigError(error.what, where="OVFORGE_CACHE_SIZE", hint=error.hint) from error

    # -- reading -------------------------------------------------------------------------------------------------

    def get(self, dependencies: Dependencies) -> Entry | None:
        """Return the entry, or None. A damaged one is removed with a CacheWarning, and is a miss.

        What its files hold is checked when they are used: see `Entry.checked`.
        """
        key = fingerprint(dependencies)
        try:
            entry = self._find(key)
        except DamagedError as damage:
            with self._held_if_free(key) as held:
                # Whoever else holds the lock is making it again, and needs neither a warning nor our help.
                entry = self._replaceable(key) if held else None
                if held is None:  # nothing can be locked here, so nothing can be removed either
                    _warn_damaged(key, damage)
        if entry is not None:
            with contextlib.suppress(OSError):  # a read-only cache still serves
                os.utime(entry.path / _MANIFEST)
        return entry

    def peek(self, dependencies: Dependencies) -> Entry | None:
        """Return the entry, or None, touching and removing nothing."""
        return self.find(fingerprint(dependencies))

    def find(self, key: str) -> Entry | None:
        """Return the entry of a key, or None, touching and removing nothing."""
        try:
            return self._find(key) if _is_key(key) else None
        except DamagedError:
            return None

    def entries(self) -> list[Entry]:
        """Return all readable entries, the one used longest ago first."""
        found = []
        for key in self._keys():
            with contextlib.suppress(DamagedError):
                found.append(self._read(key))
        return sorted(found, key=lambda entry: entry.last_used)

    def explain(self, dependencies: Dependencies) -> Explanation:
        """Say whether these dependencies hit, and if not, what differs from the nearest entry of the same stage."""
        key = fingerprint(dependencies)
        try:
            if self._find(key) is not None:
                return Explanation(True, "stored")
        except _StaleError as change:
            return Explanation(False, change.what)
        except DamagedError as damage:
            return Explanation(False, f"damaged: {damage.what}")
        now = _flat(dependencies)
        candidates = [_flat(entry.dependencies) for entry in self.entries() if entry.stage == dependencies.get("stage")]
        if not candidates:
            return Explanation(False, f"nothing of the stage {dependencies.get('stage')!r} is stored yet")
        # Later entries were used later: of equally near ones, the last used tells the user most.
        nearest = min(reversed(candidates), key=lambda then: len(_differences(then, now)))
        differences = _differences(nearest, now)
        names = ", ".join(name for name, _, _ in differences)
        return Explanation(False, f"new: {names}", differences)

    # -- writing -------------------------------------------------------------------------------------------------

    def put(
        self,
        dependencies: Dependencies,
        write: Callable[[Path], Any],
        *,
        label: str,
        parents: Iterable[str] = (),
        inputs: Callable[[], Iterable[Path]] = tuple,
    ) -> Entry:
        """Store what `write` puts into the folder it is given; what is there already stays and is returned."""
        return self.get_or_make(dependencies, write, label=label, parents=parents, inputs=inputs)[0]

    def get_or_make(
        self,
        dependencies: Dependencies,
        write: Callable[[Path], Any],
        *,
        label: str,
        parents: Iterable[str] = (),
        inputs: Callable[[], Iterable[Path]] = tuple,
    ) -> tuple[Entry, bool]:
        """Return (entry, whether it was there). One process makes it, others that ask meanwhile wait for it.

        `parents` are the keys of the entries that `write` reads; `inputs` is called after it, and tells the files that
        it read besides those that `dependencies` foresees.

        Raises CacheError if the disk is full or not writable; nothing half-made is left.
        """
        import logging

        from filelock import FileLock

        log = logging.getLogger("ovforge.store")
        if (entry := self.get(dependencies)) is not None:
            log.info("found in the cache: %s", label)
            return entry, True
        log.info("not in the cache, is made: %s", label)
        key = fingerprint(dependencies)
        storing = f"storing {label}"
        with self._explained(storing):
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._lock(key))
            lock.acquire()
        try:
            if (entry := self._replaceable(key)) is not None:
                return entry, True
            entry = self._make(key, dependencies, write, label, storing, inputs, tuple(dict.fromkeys(parents)))
        finally:
            lock.release()
        self.prune(keep=key)
        return entry, False

    def _make(
        self,
        key: str,
        dependencies: Dependencies,
        write: Callable[[Path], Any],
        label: str,
        storing: str,
        inputs: Callable[[], Iterable[Path]],
        parents: tuple[str, ...],
    ) -> Entry:
        target = self._folder(key)
        temporary = self.root / "work" / f"{key}-{os.urandom(8).hex()}"
        try:
            with self._explained(storing):
                target.parent.mkdir(parents=True, exist_ok=True)
                temporary.mkdir(parents=True)
            with self._explained(storing, temporary):
                write(temporary)
                read = {str(path): digest_file(path, self.memo) for path in sorted(inputs())}
            with self._explained(storing):
                manifest = {
                    "key": key,
                    "label": label,
                    "created": time.time(),
                    "dependencies": dict(dependencies),
                    "files": _settled(temporary, label),
                    "inputs": read,
                    "parents": list(parents),
                }
                signed = {**manifest, "manifest": fingerprint(manifest)}
                atomic_write(temporary / _MANIFEST, json.dumps(signed, indent=1, sort_keys=True).encode())
                temporary.rename(target)
                sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # Not read back: another process may prune it this very moment, which is not a failure of this one.
        return _entry(key, target, manifest, time.time())

    @contextlib.contextmanager
    def _explained(self, doing: str, stage_writes: Path | None = None) -> Iterator[None]:
        """Turn what the disk says into words.

        Where a stage writes into `stage_writes`, only a full disk and errors below the cache's root are the cache's:
        a model that the stage cannot read is none of them.
        """
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if stage_writes and not (self._names(error.filename) or (full and error.filename is None)):
                raise
            if full:
                free = shutil.disk_usage(self.root).free if self.root.exists() else 0
                needed = f" it needs more than {_size(stage_writes) / 2**20:.1f} MiB," if stage_writes else ""
                raise CacheError(
                    f"the disk is full while {doing};{needed} {free / 2**20:.1f} MiB are free",
                    where=str(self.root),
                    hint="Free some space, run `ovforge cache prune --size 1GB`, or set OVFORGE_CACHE_DIR.",
                ) from error
            raise CacheError(
                f"not writable while {doing}: {error.strerror or error}",
                where=str(self.root),
                hint="Set OVFORGE_CACHE_DIR to a folder of your own.",
            ) from error

    def _names(self, filename: Any) -> bool:
        """Say whether an error's file name is the cache's, or a folder that the cache would be in."""
        if not isinstance(filename, str):
            return False
        path, root = Path(filename).absolute(), self.root.absolute()
        return path.is_relative_to(root) or root.is_relative_to(path)

    # -- keeping house ---------------------------------------------------------------------------------------------

    def remove(self, key: str) -> bool:
        """Remove an entry, whole at once: it is renamed away first. Return whether it was there and could be."""
        doomed = self.root / "work" / f"{_REMOVED}-{os.urandom(8).hex()}"
        try:
            doomed.parent.mkdir(parents=True, exist_ok=True)
            self._folder(key).rename(doomed)
        except OSError:  # gone already, or another user's
            return False
        shutil.rmtree(doomed, ignore_errors=True)
        return True

    def prune(self, max_bytes: int | None = None, *, keep: str | None = None) -> list[Entry]:
        """Remove entries used longest ago until `max_bytes` (default: the cap) hold; return what was removed.

        Entries used within the last minute are spared unless a size is given here; so is the entry `keep`. Damaged
        entries go in any case. What cannot be removed (another user's) stays.
        """
        self._clear_abandoned()
        self._clear_damaged()
        limit = self.max_bytes if max_bytes is None else max_bytes
        spare_after = time.time() - _IN_USE if max_bytes is None else float("inf")
        entries = self.entries()
        total = sum(entry.size for entry in entries)
        removed = []
        for entry in entries:
            if total <= limit:
                break
            if entry.key == keep or entry.last_used > spare_after:
                continue
            if self.remove(entry.key):
                total -= entry.size
                removed.append(entry)
        return removed

    def discard(self, entry: Entry, damage: DamagedError) -> None:
        """Remove an entry that turned out damaged while it was used, with all that was made from it, and warn."""
        _warn_damaged(entry.key, damage)
        for key in (entry.key, *self._descendants({entry.key})):
            self.remove(key)

    def verify(self, *, repair: bool = False) -> list[tuple[str, str]]:
        """Read every byte again; return (key, what is wrong) of damaged entries, and of those made from them.

        With `repair` they are removed.
        """
        damaged = {key: reason for key in self._keys() if (reason := self._damage(key)) is not None}
        descendants = {
            key: f"it was made from {parent[:12]}" for key, parent in self._descendants(set(damaged)).items()
        }
        for key in (*damaged, *descendants) if repair else ():
            with self._held_if_free(key) as held:
                if held and (key in descendants or self._damage(key)):  # and not made again meanwhile
                    self.remove(key)
        return list({**descendants, **damaged}.items())

    def _descendants(self, keys: set[str]) -> dict[str, str]:
        """Return the keys of all entries that were made from these, by whatever steps -> the parent among them."""
        found: dict[str, str] = {}
        entries, before = self.entries(), -1
        while before != len(found):
            before = len(found)
            for entry in entries:
                parent = next((one for one in entry.parents if one in keys or one in found), None)
                if parent is not None and entry.key not in keys:
                    found.setdefault(entry.key, parent)
        return found

    def _damage(self, key: str) -> str | None:
        """Read an entry's every byte; return what is wrong."""
        try:
            entry = self._find(key)
            for name, facts in entry.files.items() if entry else ():
                if digest_file(self._folder(key) / name) != facts["sha256"]:
                    raise DamagedError(f"{name} has changed")
        except (DamagedError, OSError) as damage:
            if isinstance(damage, _StaleError) or not self._folder(key).is_dir():
                return None
            return damage.what if isinstance(damage, DamagedError) else str(damage)
        return None

    def _clear_damaged(self) -> None:
        for key in self._keys():
            if not self._is_sound(key):
                with self._held_if_free(key) as held:
                    if held and not self._is_sound(key):  # nobody has made it again meanwhile
                        self.remove(key)

    def _is_sound(self, key: str) -> bool:
        try:
            return self._find(key) is not None
        except DamagedError:
            return False

    def _clear_abandoned(self) -> None:
        """Remove what dead processes left: work folders whose key nobody holds, and locks a day old that are free."""
        for folder in _listing(self.root / "work"):
            key = folder.name.partition("-")[0]
            if key == _REMOVED or (not _is_key(key) and _age(folder) > _ABANDONED):
                shutil.rmtree(folder, ignore_errors=True)
            elif _is_key(key):
                with self._held_if_free(key) as held:
                    if held:
                        shutil.rmtree(folder, ignore_errors=True)
        for lock in _listing(self.root / "locks"):
            if _is_key(lock.stem) and _age(lock) > _ABANDONED:
                with self._held_if_free(lock.stem) as held:
                    if held:  # a lock's age is that of its file, not of its holder
                        with contextlib.suppress(OSError):
                            lock.unlink()

    @contextlib.contextmanager
    def _held_if_free(self, key: str) -> Iterator[bool | None]:
        """Hold a key's lock in the block: True; False if somebody else does; None if it cannot be had."""
        from filelock import FileLock, Timeout

        held: bool | None = True
        lock = FileLock(self._lock(key))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            held = False
        except OSError:
            held = None
        try:
            yield held
        finally:
            if held:
                lock.release()

    def _lock(self, key: str) -> Path:
        return self.root / "locks" / f"{key}.lock"

    def _folder(self, key: str) -> Path:
        return self.root / "entries" / key[:2] / key

    def _keys(self) -> list[str]:
        return [folder.name for group in _listing(self.root / "entries") for folder in _listing(group)]

    def _find(self, key: str) -> Entry | None:
        """Return a sound entry, or None if there is none; raise DamagedError for one that is not sound."""
        if not self._folder(key).is_dir():
            return None
        try:
            entry = self._read(key)
        except DamagedError:
            if not self._folder(key).is_dir():  # pruned by another process while it was read
                return None
            raise
        for path, digest in entry.inputs.items():
            try:
                same = digest_file(Path(path), self.memo) == digest
            except OSError:
                same = False
            if not same:
                raise _StaleError(f"{path} has changed")
        return entry

    def _replaceable(self, key: str) -> Entry | None:
        """Return the sound entry, if any; a damaged one is removed. Only for who holds the key's lock."""
        try:
            return self._find(key)
        except DamagedError as damage:
            self.remove(key)
            _warn_damaged(key, damage)
            return None

    def _read(self, key: str) -> Entry:
        """Read a manifest and check that its files are there in their sizes; raise DamagedError otherwise."""
        folder = self._folder(key)
        try:
            manifest = json.loads((folder / _MANIFEST).read_bytes())
            used = (folder / _MANIFEST).stat().st_mtime
            if (
                fingerprint({name: value for name, value in manifest.items() if name != "manifest"})
                != manifest["manifest"]
            ):
                raise DamagedError("its manifest has changed")
            for name, facts in manifest["files"].items():
                size = (folder / name).stat().st_size
                if size != facts["size"]:
                    raise DamagedError(f"{name} has {size} bytes instead of {facts['size']}")
            if fingerprint(manifest["dependencies"]) != key:
                raise DamagedError("its manifest belongs to another entry")
            return _entry(key, folder, manifest, used)
        except FileNotFoundError as error:
            raise DamagedError(f"{Path(error.filename).name} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(f"its manifest cannot be read: {error}") from error


def _entry(key: str, folder: Path, manifest: Mapping[str, Any], used: float) -> Entry:
    return Entry(
        key=key,
        path=folder,
        stage=str(manifest["dependencies"].get("stage", "")),
        label=str(manifest["label"]),
        size=sum(facts["size"] for facts in manifest["files"].values()),
        created=float(manifest["created"]),
        last_used=used,
        dependencies=manifest["dependencies"],
        files=manifest["files"],
        inputs=manifest["inputs"],
        parents=tuple(manifest["parents"]),
    )


def _settled(folder: Path, label: str) -> dict[str, dict[str, Any]]:
    """Flush all that a stage wrote, and describe its files as a manifest does."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": digest_file(path), "checksum": checksum(path)}
    if not files or _MANIFEST in files:
        what = f"wrote {_MANIFEST}, a name that is the cache's own" if files else "wrote no files"
        raise CacheError(f"{label} {what}", where=str(folder), hint="Report this to the author of the stage.")
    return files


def _warn_damaged(key: str, damage: DamagedError) -> None:
    if not isinstance(damage, _StaleError):
        message = f"cache entry {key[:12]} is damaged ({damage.what}) and is made again"
        warnings.warn(message, CacheWarning, stacklevel=3)


def parse_size(text: str) -> int:
    """Return bytes from "500MiB", "20 GB", "1000". Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(f"{text!r} is not a size", hint="Write a number with a unit: 500MB, 20GB, 2GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted name: leaf} of nested mappings and lists."""
    if isinstance(value, Mapping) and value:
        pairs: Any = value.items()
    elif isinstance(value, list | tuple) and value:
        pairs = enumerate(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, part in pairs:
        flat |= _flat(part, f"{prefix}.{name}" if prefix else str(name))
    return flat


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    names = sorted(set(then) | set(now))
    return tuple((name, then.get(name), now.get(name)) for name in names if _json(then, name) != _json(now, name))


def _json(flat: Mapping[str, Any], name: str) -> str:
    """Return a leaf as the key sees it, where 1, 1.0 and true differ, and so do null and nothing."""
    return json.dumps(flat[name]) if name in flat else ""


def _listing(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_key(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def chosen_cache(cache: Cache | str | None) -> Cache | None:
    """Return the cache that an argument means: "default" is the user's, None is none."""
    if cache is None or isinstance(cache, Cache):
        return cache
    if cache != "default":
        raise ConfigError(f"{cache!r} is not a cache", where="cache", hint='Give Cache("FOLDER"), None, or "default".')
    return Cache.default()
