"""CLIP's tokenizer for checkpoints, which have none: from a folder, or from a package that brings the vocabulary."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object

__all__ = ["clip_files", "packaged_files", "packaged_merges", "tokenizer_files"]

PACKAGES = ("open_clip", "clip")
"""Packages that bring OpenAI's list of merges (MIT licence), as `bpe_simple_vocab_16e6.txt.gz`."""

MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 49152 - 256 - 2
START, END = "<|startoftext|>", "<|endoftext|>"
_NAMES = frozenset({"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"})
_LIMIT = 16 * 2**20


def tokenizer_files(
    component: str,
    places: Sequence[tuple[Source, str]],
    *,
    path: str | None,
    where: str,
    words: int,
    length: int,
    pad: str,
) -> dict[str, bytes]:
    """Return the files of a tokenizer, as they lie in a diffusers folder.

    The vocabulary is that of the first of `places` (a source, and a folder in it) that has one; else that of an
    installed package, unless a place was `given` by name. `words` is how many the text encoder knows, `length` how many
    tokens it takes, `pad` the word that its family fills up with (OpenCLIP: "!", CLIP: the end). Raises ModelError
    if there is no vocabulary, or it is another model's.
    """
    files = _find(places) or ({} if path else _packaged())
    if path and not files:
        raise ModelError("it holds no vocab.json and merges.txt", where=f"load.tokenizer: {path}")
    if not files:
        raise ModelError(
            "a checkpoint has no tokenizer, and none is at hand",
            where=where,
            hint="Put CLIP's vocab.json and merges.txt (the folder tokenizer/ of any Stable Diffusion model) into a "
            "folder tokenizer/ beside the file, or name a folder: the loader's option tokenizer = FOLDER; "
            'or run: pip install "ovforge-diffusers[clip]"',
        )
    known = _words(files)
    if known is not None and known != words:
        raise ModelError(f"the tokenizer knows {known} words, and the text encoder {words}", where=where)
    return _configured(component, files, length=length, pad=pad, where=where)


def packaged_files(component: str, words: int, length: int, pad: str) -> dict[str, bytes] | None:
    """Return the files of CLIP's tokenizer from an installed package; None if there is none, or of other words."""
    files = _packaged()
    if _words(files or {"vocab.json": b"{}"}) != words:
        return None
    return _configured(component, files, length=length, pad=pad, where=component)


def _configured(component: str, files: dict[str, bytes], *, length: int, pad: str, where: str) -> dict[str, bytes]:
    """Return the files below the component's folder, with a config that says what the family takes."""
    config = _object(files.get("tokenizer_config.json", b"{}"))
    said = config.get("pad_token")
    said = said.get("content") if isinstance(said, dict) else said
    if component == "tokenizer" and said not in (None, pad):
        warnings.warn(
            f"{where}: the tokenizer fills up with {said!r}, this family with {pad!r}: so it is done", stacklevel=6
        )
    ends = dict.fromkeys(("eos_token", "unk_token"), END)
    config = {"bos_token": START, **ends, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"} | config
    config |= {"pad_token": pad, "model_max_length": length}
    files = {**files, "tokenizer_config.json": json.dumps(config, indent=2, sort_keys=True).encode()}
    return {f"{component}/{name}": data for name, data in files.items()}


def _find(places: Sequence[tuple[Source, str]]) -> dict[str, bytes]:
    """Return the files of the first tokenizer that there is, by their names."""
    for source, folder in places:
        inside = {
            PurePosixPath(path).name: path
            for path, size in source.files().items()
            if PurePosixPath(path).parent.as_posix() == folder and size <= _LIMIT
        }
        if inside.keys() >= {"vocab.json", "merges.txt"} or "tokenizer.json" in inside:
            return {name: source.read(path) for name, path in inside.items() if name in _NAMES}
    return {}


def _words(files: Mapping[str, bytes]) -> int | None:
    """Return how many words a tokenizer knows."""
    if "vocab.json" in files:
        return len(_object(files["vocab.json"]))
    vocabulary = _object(files["tokenizer.json"]).get("model", {}).get("vocab")
    return len(vocabulary) if isinstance(vocabulary, dict) else None


def _object(data: bytes) -> dict[str, Any]:
    return parse_object(data, "a file of the tokenizer")


def _packaged() -> dict[str, bytes]:
    merges = packaged_merges()
    return clip_files(merges) if merges else {}


def packaged_merges() -> list[str]:
    """Return OpenAI's merges from an installed package that has them, unchanged; [] if there is none."""
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or []) if found else []:
            file = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
            if file.is_file() and hashlib.sha256(data := file.read_bytes()).hexdigest() == MERGES_SHA256:
                return gzip.decompress(data).decode("utf-8").split("\n")[1 : MERGES + 1]
    return []


def clip_files(merges: Sequence[str]) -> dict[str, bytes]:
    """Return vocab.json and merges.txt of a list of merges, by CLIP's scheme.

    Words are numbered so: every byte, every byte that ends a word, what each merge makes, start and end. Bytes that
    do not print stand as letters from 256 on. Source: `SimpleTokenizer` of OpenAI's CLIP.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *(merge.replace(" ", "") for merge in merges),
        START,
        END,
    ]
    vocabulary = json.dumps({word: number for number, word in enumerate(words)}, ensure_ascii=False)
    lines = "\n".join(["#version: 0.2", *merges])
    return {"vocab.json": vocabulary.encode(), "merges.txt": f"{lines}\n".encode()}
