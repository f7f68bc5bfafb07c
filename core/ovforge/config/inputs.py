"""What a call's inputs hold, so that two calls can be told apart and results found again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ovforge.errors import ConfigError
from ovforge.store.digests import digest_file

__all__ = ["input_content", "paths_in"]


def input_content(value: Any, digest: Callable[[Path], str] = digest_file) -> Any:
    """Return a task's inputs, or a part of them, as JSON has them: files, pictures and arrays by their digests.

    Of a pydantic model only the fields that were set count. Raises ConfigError for a file that is not there.
    """
    import numpy as np
    from PIL import Image

    from ovforge.model.pictures import digest_picture

    if isinstance(value, BaseModel):
        return {name: input_content(getattr(value, name), digest) for name in sorted(value.model_fields_set)}
    if isinstance(value, Mapping):
        return {str(name): input_content(part, digest) for name, part in value.items()}
    if isinstance(value, Path):
        if not value.is_file():
            raise ConfigError("no such file", where=str(value))
        return digest(value)
    if isinstance(value, Image.Image):
        return digest_picture(value)
    if isinstance(value, np.ndarray):
        return hashlib.sha256(f"{value.dtype} {value.shape}".encode() + value.tobytes()).hexdigest()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [input_content(part, digest) for part in value]
    return value


def paths_in(value: Any) -> Iterator[Path]:
    """Yield the paths in a value that a task's inputs model has read, however deep."""
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for _, part in value:
            yield from paths_in(part)
    elif dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            yield from paths_in(getattr(value, each.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from paths_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from paths_in(part)
