"""Bundles and small files in the cache's entries: written plain or encrypted, checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ovforge.model import memory
from ovforge.model.bundle import ModelBundle, path_of
from ovforge.model.sources import FileSource, Protection, Source
from ovforge.store.cache import Entry

__all__ = ["EntrySource", "open_entry", "write_bundle", "write_file", "write_role"]


class EntrySource(FileSource):
    """A cache entry's files. Each is compared with its checksum before it is read; the manifest knows all digests."""

    trusted = True

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.path, f"cache entry {entry.key[:12]}")
        self._entry = entry

    def files(self) -> Mapping[str, int]:
        """Return relative path -> size in bytes."""
        return {name: facts["size"] for name, facts in self._entry.files.items()}

    def digest(self, path: str) -> str:
        """Return the sha256 of a file, as the manifest has it."""
        return str(self._entry.files[path]["sha256"])

    def check(self, path: str) -> None:
        """Compare a file with what was stored, and with an .xml the .bin that its reader opens, too."""
        weights = str(Path(path).with_suffix(".bin"))
        for name in (path, weights) if path.endswith(".xml") and weights in self._entry.files else (path,):
            self._entry.checked(name)

    def _checked(self, path: str) -> Path:
        return self._entry.checked(path) if path in self._entry.files else super()._checked(path)


def open_entry(entry: Entry, sealed: Protection | None) -> Source:
    """Return an entry's files; encrypted ones are decrypted, which checks them, too."""
    return sealed.open(entry.path, entry.key) if sealed else EntrySource(entry)


def write_bundle(bundle: ModelBundle, folder: Path, key: str) -> None:
    """Write a whole bundle for the cache, one model at a time; encrypted if the bundle is."""
    for path, data in bundle.small_files().items():
        write_file(bundle.protection, folder, path, data, key)
    for role in bundle.models:
        write_role(bundle, role, folder, key)
        bundle.models.release(role)


def write_file(sealed: Protection | None, folder: Path, path: str, data: bytes | memoryview, key: str) -> None:
    """Write one file for the cache, encrypted if there is a protection."""
    if sealed is not None:
        sealed.write(folder, path, data, key)
        return
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


def write_role(bundle: ModelBundle, role: str, folder: Path, key: str) -> None:
    """Write a role's IR for the cache: encrypted if the bundle is, and then through memory alone."""
    if bundle.protection is None:
        bundle.write_model(role, folder)
        return
    xml = path_of(role)
    files = (xml.as_posix(), xml.with_suffix(".bin").as_posix())
    with memory.memory_folder("storing a model") as plain:
        for file in files:
            plain.place(file)
        bundle.write_model(role, plain.root)
        for file in files:
            with plain.content(file) as data:
                bundle.protection.write(folder, file, data, key)
