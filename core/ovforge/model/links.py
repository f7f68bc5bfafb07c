"""Which files a folder holds, if some of them are links.

A model from somewhere else may hold a link to any file of its user, and what is written of the model would hold that
file. So a link that leaves the folder is followed only if that is how models are kept:

- in the cache of the Hugging Face hub, whose snapshots link every file into the folder `blobs` of the same model;
- a link to a whole folder that is a model's part, by its files: somebody put a pipeline together of parts;
- a link from and to a file of weights, which is read as a model and never copied as it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["folder_files"]

_WEIGHTS = frozenset(
    {
        ".bin",
        ".xml",
        ".safetensors",
        ".onnx",
        ".pb",
        ".tflite",
        ".pdmodel",
        ".pdiparams",
        ".ckpt",
        ".pt",
        ".pth",
        ".data",
    }
)
_PART = frozenset(
    {
        "merges.txt",
        "preprocessor_config.json",
        "scheduler_config.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
"""Files that only a model's part has: a folder with one of these, or with weights, is a part."""

_PART_SUFFIXES = _WEIGHTS | {".json", ".txt", ".model", ".jinja"}
"""Files that are taken of a part that a link leads to."""


def folder_files(root: Path) -> tuple[dict[str, int], list[str]]:
    """Return relative POSIX path -> size in bytes of a folder's files, hidden ones apart; and links not followed."""
    files: dict[str, int] = {}
    refused: list[str] = []
    for path, followed in _walk(root, root.resolve()):
        relative = path.relative_to(root).as_posix()
        if not followed:
            refused.append(relative)
        elif path.is_file():
            files[relative] = path.stat().st_size
    return dict(sorted(files.items())), sorted(refused)


def _walk(folder: Path, root: Path, linked: bool = False) -> Iterator[tuple[Path, bool]]:
    """Yield every file and link below a folder, and whether it may be read. `linked` says that a link led here."""
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        path = Path(entry.path)
        if not entry.is_symlink():
            if entry.is_dir():
                yield from _walk(path, root, linked)
            else:
                yield path, True
            continue
        target = _target(path)
        if target is None:
            yield path, False
        elif not target.is_dir():
            weights = path.suffix in _WEIGHTS and target.suffix in _WEIGHTS
            yield path, target.is_relative_to(root) or _is_blob(target, root) or weights
        elif target.is_relative_to(root):
            # One link after another could go round in circles, or take for ever.
            if linked or path.parent.resolve().is_relative_to(target):
                yield path, False
            else:
                yield from _walk(path, root, linked=True)
        elif any(name in _PART or Path(name).suffix in _WEIGHTS for name in _part_files(target)):
            yield from ((path / name, True) for name in _part_files(target))
        else:
            yield path, False


def _target(link: Path) -> Path | None:
    """Return where a link leads in the end; None if it goes round in circles."""
    try:
        link.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
    return link.resolve()


def _is_blob(target: Path, root: Path) -> bool:
    """Say whether a file is one of the hub's blobs of the model whose snapshot `root` is, or lies in."""
    return target.parent.name == "blobs" and root.is_relative_to(target.parents[1] / "snapshots")


def _part_files(folder: Path) -> Iterator[str]:
    """Yield the files of a part, which has no folders and links to no other place but as the hub does."""
    real = folder.resolve()
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            if entry.name.startswith(".") or Path(entry.name).suffix not in _PART_SUFFIXES:
                continue
            target = _target(Path(entry.path))
            if target and target.is_file() and (target.is_relative_to(real) or _is_blob(target, real)):
                yield entry.name
