"""The manifest of a batch: JSON lines, kept item by item.

The first line says what the batch is; each other one what became of an item, and the last one of an item counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ovforge.errors import InputError
from ovforge.store import parse_object
from ovforge_batch.journals import FileJournal, Journal, PartsJournal
from ovforge_batch.outputs import Remote

__all__ = ["Manifest"]


class Manifest:
    """The manifest in a folder, `manifest.jsonl`, or behind a URL, `manifest/*.jsonl`. A `with` block opens it.

    Raises InputError if another process has it, if it is another batch's, or if it is damaged.
    """

    def __init__(self, output: Path | Remote, head: Mapping[str, Any]) -> None:
        self._head, self._where = dict(head), str(output)
        self._journal: Journal = (
            PartsJournal(output, "manifest") if isinstance(output, Remote) else FileJournal(output / "manifest.jsonl")
        )
        self.records: dict[str, tuple[str, str]] = {}
        """Of each item that came to an end: (its status, the digest of its line)."""

    def __enter__(self) -> Self:
        try:
            first = True
            for where, line in self._journal.open():
                self._read(where, line, first=first)
                first = False
            if first:
                self._journal.add([json.dumps(self._head).encode()])
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def add(self, *records: Mapping[str, Any]) -> None:
        """Write what became of items; it is kept when this returns."""
        self._journal.add([json.dumps(record).encode() for record in records])
        self.records |= {record["id"]: (record["status"], record["digest"]) for record in records}

    def _read(self, where: str, line: bytes, *, first: bool) -> None:
        value = parse_object(line, where, error=InputError)
        if first or value.keys() == self._head.keys():  # which comes again if parts were not all made one
            self._compare(value)
        elif not {"id", "status", "digest"} <= value.keys():
            raise InputError("it is not a record of a batch", where=where)
        else:
            self.records[str(value["id"])] = str(value["status"]), str(value["digest"])

    def _compare(self, head: Mapping[str, Any]) -> None:
        for key, value in self._head.items():
            if head.get(key) != value:
                raise InputError(f"the batch there has another {key}", where=self._where, hint="Name another --output.")
