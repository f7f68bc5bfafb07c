"""Textual inversion files of every form in use, read without running anything that is in them.

Forms: diffusers' {"<word>": vectors}; the AUTOMATIC1111 web UI's {"string_to_param": {"*": vectors}, "name": word} and
{"emb_params": vectors}; SDXL's {"clip_l": vectors, "clip_g": vectors}; a bare tensor.
"""

from __future__ import annotations

import io
import math
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError, PluginError
from ovforge.model import Source

__all__ = ["ANY", "Learned", "read_source"]

Array = NDArray[np.float32]

ANY = "any"
"""The part of a file that says of no text encoder which one it is for."""

PARTS = ("clip_l", "clip_g")
FILE_LIMIT = 16 * 2**20
"""Largest file, in bytes: a word of 75 vectors for both of SDXL's text encoders has 0.6 MB."""

VECTOR_LIMIT = 512
"""Most vectors of one word: prompts have 75 places a chunk."""

WIDTH_LIMIT = 2**14
_SAFE, _PICKLED = ".safetensors", (".bin", ".pt", ".pth")
_PICTURES = (".png", ".webp", ".jpg", ".jpeg")
_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class Learned:
    """A word and its vectors, float32 (vectors, width), by part: "clip_l", "clip_g", or ANY."""

    word: str
    parts: Mapping[str, Array]
    file: str

    @property
    def vectors(self) -> int:
        """How many vectors the word has."""
        return len(next(iter(self.parts.values())))

    def named(self, words: Sequence[str]) -> list[Learned]:
        """Return it under another name; several names take one vector each. Raises ModelError for another number."""
        if len(words) == 1:
            return [replace(self, word=words[0])]
        if len(words) != self.vectors:
            raise ModelError(
                f"{len(words)} tokens for a file of {self.vectors} vectors",
                where=self.file,
                hint="Give one, or one each.",
            )
        return [
            replace(self, word=word, parts={part: rows[n : n + 1] for part, rows in self.parts.items()})
            for n, word in enumerate(words)
        ]


def read_source(source: Source) -> list[Learned]:
    """Return the words of a file, or of every textual inversion file in a folder.

    Where one name is there both ways, safetensors counts. Raises ModelError for what is damaged, too large, or no
    textual inversion; PluginError for a pickle where torch is not installed.
    """
    files = {PurePosixPath(path): size for path, size in source.files().items()}
    known = [path for path in files if path.suffix.lower() in (_SAFE, *_PICKLED)]
    chosen = [p for p in known if p.suffix.lower() == _SAFE or p.with_suffix(_SAFE) not in files]
    if not chosen:
        found = ", ".join(map(str, list(files)[:5])) or "nothing"
        picture = any(path.suffix.lower() in _PICTURES for path in files)
        raise ModelError(
            f"no textual inversion is there, only {found}",
            where=source.name,
            hint="Embeddings inside pictures are not read: save them as .safetensors."
            if picture
            else f"It should be a {_SAFE}, .bin or .pt file, or a folder with some.",
        )
    words: list[Learned] = []
    for path in chosen:
        where = source.name if len(files) == 1 else f"{source.name}: {path}"
        if files[path] > FILE_LIMIT:
            raise ModelError(f"has {files[path]} bytes, more than the {FILE_LIMIT} that a few words take", where=where)
        words += _words(_content(source.read(path.as_posix()), path, where), path.stem, where)
    return words


def _content(data: bytes, path: PurePosixPath, where: str) -> Any:
    """Return what a file holds: a dict, or a bare tensor."""
    return _safetensors(data, where) if path.suffix.lower() == _SAFE else _pickle(data, where)


def _safetensors(data: bytes, where: str) -> dict[str, Any]:
    import safetensors

    try:
        entries: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ModelError(f"not a whole safetensors file: {error}", where=where, hint="Fetch it again.") from error
    return {name: _decoded(entry, f"{where}: {name}") for name, entry in entries}


def _decoded(entry: Mapping[str, Any], where: str) -> NDArray[Any]:
    if entry["dtype"] not in _TYPES:
        raise ModelError(f"is {entry['dtype']}, not floating-point numbers", where=where)
    array: NDArray[Any] = np.frombuffer(entry["data"], _TYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":  # the upper half of a float32
        array = (array.astype("<u4") << 16).view("<f4")
    return array.reshape(entry["shape"])


def _pickle(data: bytes, where: str) -> Any:
    """Read torch's pickles with its unpickler that builds tensors and plain containers, and calls nothing else."""
    try:
        import torch
    except ImportError as error:
        raise PluginError(
            "a .bin or .pt file is a pickle, and reading it safely needs torch",
            where=where,
            hint="Run: pip install 'ovforge-textual-inversion[torch]'; or convert the file to .safetensors.",
        ) from error
    _check_archive(data, where)
    # The first trainers kept vectors in a ParameterDict, which is data, too.
    allowed: list[Any] = [torch.nn.ParameterDict, torch.nn.Parameter]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's pickle can fail anywhere
        raise ModelError(
            f"is refused: {_first_line(error)}",
            where=where,
            hint="Only tensors in plain containers are read: anything else could run code. "
            "The file may also be damaged; a .safetensors version is always safe.",
        ) from error


def _check_archive(data: bytes, where: str) -> None:
    """Refuse an archive that unpacks to more than it is."""
    try:
        if not zipfile.is_zipfile(io.BytesIO(data)):  # which raises where the end says that there are more disks
            return
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ModelError(f"is a damaged archive: {error}", where=where, hint="Fetch it again.") from error
    if size > FILE_LIMIT:
        raise ModelError(f"unpacks to {size} bytes, more than {FILE_LIMIT}", where=where)


def _first_line(error: Exception) -> str:
    """Return torch's reason without its advice to load the file unsafely."""
    text = str(error)
    _, marker, reason = text.partition("WeightsUnpickler error: ")
    return (reason if marker else text).strip().split("\n")[0] or type(error).__name__


def _words(content: Any, stem: str, where: str) -> Iterator[Learned]:
    """Return the words of a file's content; the file's name stands in where there is none inside."""
    if not isinstance(content, Mapping):
        yield _learned(stem, {ANY: content}, where)
    elif "string_to_param" in content:
        name = content.get("name")
        yield _learned(name if isinstance(name, str) and name else stem, {ANY: _only(content, where)}, where)
    elif set(content) & set(PARTS):
        if unknown := set(content) - set(PARTS):
            raise ModelError(f"unknown part {min(map(str, unknown))!r} beside {', '.join(PARTS)}", where=where)
        yield _learned(stem, content, where)
    elif set(content) == {"emb_params"}:
        yield _learned(stem, {ANY: content["emb_params"]}, where)
    elif len(content) == 1 and isinstance(next(iter(content)), str):
        [(word, vectors)] = content.items()
        yield _learned(word, {ANY: vectors}, where)
    else:
        keys = [str(key) for key in content]
        lora = any("lora" in key for key in keys)
        raise ModelError(
            f"is no textual inversion: it holds {len(keys)} entries, such as {keys[0]!r}" if keys else "is empty",
            where=where,
            hint='It looks like a LoRA: use = "lora".'
            if lora
            else "Known are {word: tensor}, string_to_param, emb_params, and clip_l with clip_g.",
        )


def _only(content: Mapping[str, Any], where: str) -> Any:
    """Return the one entry of the web UI's `string_to_param`."""
    parameters = content["string_to_param"]
    if hasattr(parameters, "_parameters"):  # a ParameterDict: its entries, and none of its methods
        parameters = vars(parameters)["_parameters"]
    if not isinstance(parameters, Mapping) or len(parameters) != 1:
        raise ModelError("`string_to_param` should hold one entry", where=where)
    return next(iter(parameters.values()))


def _learned(word: str, parts: Mapping[str, Any], where: str) -> Learned:
    checked = {part: _vectors(value, f"{where}: {part}" if part != ANY else where) for part, value in parts.items()}
    if len({len(rows) for rows in checked.values()}) > 1:
        raise ModelError("clip_l and clip_g have different numbers of vectors", where=where, hint="Fetch it again.")
    return Learned(word, checked, where)


def _vectors(value: Any, where: str) -> Array:
    """Return float32 (vectors, width). Raises ModelError for what are no such numbers."""
    shape = tuple(getattr(value, "shape", ()))
    if not shape or len(shape) > 2 or 0 in shape:
        said = f"has the shape {list(shape)}" if shape else f"is a {type(value).__name__}"
        raise ModelError(f"{said}, and not (vectors, width)", where=where)
    rows, width = (1, *shape)[-2:]
    if rows > VECTOR_LIMIT or width > WIDTH_LIMIT:
        raise ModelError(
            f"has {rows} vectors of {width} numbers, more than {VECTOR_LIMIT} of {WIDTH_LIMIT}", where=where
        )
    if not isinstance(value, np.ndarray):
        import torch

        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or not value.is_floating_point():
            raise ModelError(f"is a {type(value).__name__} of {getattr(value, 'dtype', 'something')}", where=where)
        value = value.detach().float().numpy()
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(value, np.float32).reshape(rows, width)
    if not np.isfinite(array).all():
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise ModelError(
            f"{bad} of {math.prod(array.shape)} numbers are not finite", where=where, hint="Fetch it again."
        )
    return array
