"""Reading a model of another format than IR in a process that may die, before this process reads it.

OpenVINO's readers of other formats take some files on trust. Of 2,000 bent ONNX files five ended the process (a Pad or
a Conv with one input), and four never came to an end (an operator set numbered 2**31). An IR is checked by our own code
instead, which costs less: see `validation`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ovforge.errors import ModelError
from ovforge.model.sources import FileSource, source_digest
from ovforge.store.files import atomic_write
from ovforge.store.processes import end_with_parent, run_python

if TYPE_CHECKING:
    from ovforge.model.sources import Source

__all__ = ["probe"]

_SECONDS = 30.0
_BYTES_A_SECOND = 10**6
"""How long a reader may take: this, and a second more for each megabyte."""

_REMEMBERED = 1000
"""Files that were read without harm; the ones before are probed again."""


def probe(source: Source, path: str) -> None:
    """Raise ModelError if OpenVINO does not survive reading `path` ("." for a SavedModel) of a source, or never ends.

    A file that it survived once, with the same content and OpenVINO, is not read again. Encrypted files pass: they come
    from somebody who has the key.
    """
    from ovforge.model.runtime import openvino_version

    local = source.local(path)
    if local is None:
        return
    memory = _Memory(source)
    seen = hashlib.sha256(f"{openvino_version()} {path} {source_digest(source)}".encode()).hexdigest()
    if seen in memory.known():
        return
    size = sum(source.files().values())
    limit = _SECONDS + size / _BYTES_A_SECOND
    try:
        quiet = subprocess.DEVNULL
        done = run_python(["-m", __name__, str(local)], stdin=quiet, stdout=quiet, stderr=quiet, timeout=limit)
    except subprocess.TimeoutExpired as error:
        raise _harmful(source, path, f"OpenVINO did not come to an end with it in {limit:.0f} s") from error
    if done.returncode == -9:
        raise ModelError(
            f"the process that read {path} was ended by the system", where=source.name,
            hint="Mostly memory was used up: close other programs, or convert the model elsewhere.",
        )  # fmt: skip
    if done.returncode:
        raise _harmful(source, path, f"OpenVINO crashes on it (exit code {done.returncode})")
    memory.add(seen)


class _Memory:
    """What was read without harm, beside the digests that the source remembers; nothing if it remembers none."""

    def __init__(self, source: Source) -> None:
        memo = source.memo if isinstance(source, FileSource) else None
        self._path = None if memo is None else memo.path.with_name("read.json")

    def known(self) -> list[str]:
        try:
            known = json.loads(self._path.read_bytes()) if self._path else []
        except (OSError, ValueError, RecursionError):
            return []
        return known if isinstance(known, list) else []

    def add(self, digest: str) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._path, json.dumps([*self.known(), digest][-_REMEMBERED:]).encode())


def _harmful(source: Source, path: str, what: str) -> ModelError:
    hint = "The file is damaged, or it was made to do this: export the model again, or get it from elsewhere."
    return ModelError(f"{path}: {what}, so it is not read", where=source.name, hint=hint)


def main() -> None:
    """Read the model that the command line names. What OpenVINO refuses, it has survived."""
    from ovforge.model.runtime import core

    end_with_parent()
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash here is not a fault that anybody wants to look into
    with contextlib.suppress(Exception):
        core().read_model(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
