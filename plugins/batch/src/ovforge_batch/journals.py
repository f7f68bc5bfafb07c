"""How lines are kept while they come: in a file that grows, or, behind a URL, in parts, since nothing grows there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from filelock import FileLock, Timeout

from ovforge.errors import InputError
from ovforge_batch.outputs import Remote

__all__ = ["FileJournal", "Journal", "PartsJournal"]

_PART = re.compile(r"\d{8}\.jsonl")


class Journal(Protocol):
    """Lines that are kept, by one process at a time."""

    def open(self) -> Iterator[tuple[str, bytes]]:
        """Yield (where it stands, line) for each line that is kept; read it to its end before `add`.

        Raises InputError if another process writes there.
        """

    def add(self, lines: Sequence[bytes]) -> None:
        """Keep lines, without their ends; they are kept when this returns."""

    def close(self) -> None:
        """Let others write."""


class FileJournal:
    """A file, which one process has locked. A process that is killed leaves half a line, which the next one removes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path.parent / ".batch.lock")
        self._file: BinaryIO | None = None

    def open(self) -> Iterator[tuple[str, bytes]]:
        """Yield what is kept."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError("another batch is writing there", where=str(self._path.parent)) from error
        self._file = self._path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # its writer was killed
                break
            end += len(line)
            yield f"{self._path}: line {number}", line
        self._file.truncate(end)

    def add(self, lines: Sequence[bytes]) -> None:
        """Keep lines: they are on the disk when this returns."""
        assert self._file is not None
        self._file.write(b"".join(line + b"\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let others write."""
        if self._file is not None:
            self._file.close()
        self._lock.release()


class PartsJournal:
    """Numbered files, of which each call of `add` writes one; many small ones become a large one as they come.

    A part is written only if its name is free, so that a second batch is found out when it writes. A process that is
    killed while parts become one leaves the first of the small ones beside the large one, and lines stand there twice.
    """

    gathered = 500
    """Parts that become one."""

    def __init__(self, place: Remote, folder: str) -> None:
        self._place, self._folder = place, folder
        self._last = 0
        self._small: list[str] = []

    def open(self) -> Iterator[tuple[str, bytes]]:
        """Yield what is kept."""
        for name in filter(_PART.fullmatch, self._place.names(self._folder)):
            self._last = int(Path(name).stem)
            self._small.append(name)
            for number, line in enumerate(self._place.read(f"{self._folder}/{name}").splitlines(), start=1):
                yield f"{self._place}/{self._folder}/{name}: line {number}", line
        if len(self._small) > 1:
            self._gather()

    def add(self, lines: Sequence[bytes]) -> None:
        """Keep lines: they are written when this returns."""
        self._small.append(self._write(b"".join(line + b"\n" for line in lines)))
        if len(self._small) > self.gathered:
            self._gather()

    def close(self) -> None:
        """Do nothing: nobody is kept from writing."""

    def _gather(self) -> None:
        parts = [f"{self._folder}/{name}" for name in self._small]
        self._write(b"".join(map(self._place.read, parts)))
        self._small = []
        for part in reversed(parts):  # so that what is left begins as it did
            self._place.remove(part)

    def _write(self, data: bytes) -> str:
        self._last += 1
        name = f"{self._last:08}.jsonl"
        self._place.write(f"{self._folder}/{name}", data, new=True)
        return name
