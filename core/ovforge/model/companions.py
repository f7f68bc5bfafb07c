"""The other files that a model's file keeps its content in: what is read with it, and counts with it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

__all__ = ["companions", "external_data"]

_LOCATION = b"\x0a\x08location\x12"
"""The beginning of an entry `location` in ONNX's TensorProto.external_data, as protobuf writes it: key, then value."""


def companions(path: Path) -> list[Path]:
    """Return the files beside a single model file that hold a part of it, as far as they are there.

    IR's and Paddle's weights, ONNX's external data, the variables and assets of TensorFlow's SavedModel.
    """
    folder, kind = path.parent, path.suffix.lower()
    if kind == ".xml":
        files = [path.with_suffix(".bin")]
    elif kind == ".pdmodel":
        files = [path.with_suffix(".pdiparams")]
    elif kind == ".onnx":
        files = [folder / location for location in external_data(path)]
    elif path.name == "saved_model.pb":
        files = [
            file for name in ("variables", "assets", "assets.extra") for file in sorted(folder.glob(f"{name}/**/*"))
        ]
        files.append(folder / "fingerprint.pb")
    else:
        files = []
    return [file for file in files if file.is_file()]


def external_data(model: Path | bytes, *, outside: bool = False) -> list[str]:
    """Return the relative paths of the files that an ONNX model keeps weights in, in the order of their first use.

    Paths that leave the model's folder, which the runtime refuses, are left out, or are the only ones (`outside`).
    """
    if isinstance(model, bytes):
        found = dict.fromkeys(_locations(model))
    elif model.stat().st_size == 0:
        return []
    else:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = dict.fromkeys(_locations(content))
    return [location for location in found if _stays_inside(location) != outside]


def _locations(content: mmap.mmap | bytes) -> Iterator[str]:
    position = content.find(_LOCATION)
    while position >= 0:
        begin = position + len(_LOCATION)
        size, shift = 0, 0
        while begin < len(content) and shift < 21:
            byte = content[begin]
            begin, size, shift = begin + 1, size | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                yield content[begin : begin + size].decode(errors="replace")
                break
        position = content.find(_LOCATION, begin)


def _stays_inside(location: str) -> bool:
    path = Path(location)
    return bool(location) and "\0" not in location and not path.is_absolute() and ".." not in path.parts
