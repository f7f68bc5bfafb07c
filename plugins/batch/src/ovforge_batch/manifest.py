"""The manifest of a batch: JSON lines, written and flushed to disk item by item.

The first line says what the batch is; each other one what became of an item, and the last one of an item counts. A
process that is killed leaves half a line at most, which the next one removes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from filelock import FileLock, Timeout

from ovforge.errors import InputError
from ovforge.store import parse_object

__all__ = ["Manifest"]

NAME = "manifest.jsonl"
_LOCK = ".batch.lock"


class Manifest:
    """The manifest in a folder, held by one process at a time: a `with` block opens it.

    Raises InputError if another process has it, if it is another batch's, or if it is damaged.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any]) -> None:
        self._path, self._head = folder / NAME, dict(head)
        self._lock = FileLock(folder / _LOCK)
        self.records: dict[str, tuple[str, str]] = {}
        """Of each item that came to an end: (its status, the digest of its line)."""
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise InputError("another batch is writing there", where=str(self._path.parent)) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write what became of an item; it is on the disk when this returns."""
        self.records[record["id"]] = record["status"], record["digest"]
        self._write(record)

    def _open(self) -> None:
        self._file = self._path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # its writer was killed
                break
            end += len(line)
            where = f"{self._path}: line {number}"
            value = parse_object(line, where, error=InputError)
            if number == 1:
                self._compare(value)
            elif not {"id", "status", "digest"} <= value.keys():
                raise InputError("it is not a record of a batch", where=where)
            else:
                self.records[str(value["id"])] = str(value["status"]), str(value["digest"])
        self._file.truncate(end)
        if not end:
            self._write(self._head)

    def _compare(self, head: Mapping[str, Any]) -> None:
        for key, value in self._head.items():
            if head.get(key) != value:
                raise InputError(
                    f"the batch there has another {key}", where=str(self._path), hint="Name another --output."
                )

    def _write(self, value: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
