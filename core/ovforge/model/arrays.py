"""NumPy's files from strangers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ovforge.errors import InputError

__all__ = ["reading_arrays"]


@contextlib.contextmanager
def reading_arrays(path: Path) -> Iterator[None]:
    """Turn what NumPy raises for a damaged .npy or .npz in the block into an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the header is parsed as Python, and raises whatever that does; so do archives
        reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"[:200]
        raise InputError(
            f"cannot be read as an array: {reason}",
            where=str(path),
            hint="Write it with numpy.save or numpy.savez; arrays of Python objects are not read.",
        ) from error
