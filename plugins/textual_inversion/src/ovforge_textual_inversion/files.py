"""Textual inversion files of every form in use, read without running anything that is in them.

Forms: diffusers' {"<word>": vectors}, with one word or several; the AUTOMATIC1111 web UI's {"string_to_param":
{"*": vectors}, "name": word} and {"emb_params": vectors}; SDXL's {"clip_l": vectors, "clip_g": vectors}, to which
OneTrainer adds "clip_l_out"; "bundle_emb.<word>.<one of these>" in an adapter's file; a bare tensor. A prefix
"state_dict." may stand before all of them.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
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
OUTPUTS = tuple(f"{part}_out" for part in PARTS)
"""OneTrainer's vectors for what a text encoder gives, not for what it reads."""

HEADER_LIMIT = 16 * 2**20
_BUNDLE = re.compile(r"bundle_emb\.(.+?)(?:\.(string_to_param\.\*|emb_params|clip_[lg](?:_out)?|\*))?")
_STATE, _FLAT, _SCALED = "state_dict.", "string_to_param.*", "scaled_fp8"
_OTHERS = "the tensors beside its words are an adapter's, which the transform 'lora' applies"
_SCALES = (".scale_weight", ".weight_scale", ".scale", "_scale")
"""What ends the name of the factor of a tensor in float8."""

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
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}


@dataclass(frozen=True)
class Learned:
    """A word and its vectors, float32 (vectors, width), by part: "clip_l", "clip_g", or ANY."""

    word: str
    parts: Mapping[str, Array]
    file: str
    note: str = ""
    """What of the file says nothing to a model's table of embeddings."""

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
        read = _words(_content(source, path, where), path.stem, where)
        large = f"{where}: {_OTHERS}" if files[path] > FILE_LIMIT else ""
        words += [replace(word, note=word.note or large) for word in read]
    return words


def _content(source: Source, path: PurePosixPath, where: str) -> Any:
    """Return what a file holds: a dict, or a bare tensor. Of a large file, the words inside an adapter."""
    name = path.as_posix()
    safe = path.suffix.lower() == _SAFE
    if source.files()[name] <= FILE_LIMIT:
        data = source.read(name)
        return _scaled(_safetensors(data, where), where) if safe else _pickle(data, where)
    if safe and (data := _bundled(source, name)):
        return _scaled(_safetensors(data, where), where)
    raise ModelError(f"has {source.files()[name]} bytes, more than the {FILE_LIMIT} that a few words take", where=where)


def _bundled(source: Source, name: str) -> bytes:
    """Return a safetensors file of the embeddings alone that a large adapter brings; b"" if it has none."""
    size = source.files()[name]
    length = int.from_bytes(source.read(name, 8), "little")
    if not 0 < length <= min(HEADER_LIMIT, size - 8):
        return b""
    try:
        entries = json.loads(source.read(name, 8 + length)[8:])
        found = {key: entry for key, entry in entries.items() if key.removeprefix(_STATE).startswith("bundle_emb.")}
        places = [tuple(map(int, entry["data_offsets"])) for entry in found.values()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return b""
    if not found or sum(max(end - begin, 0) for begin, end in places) > FILE_LIMIT:
        return b""
    local = source.local(name)
    data = np.memmap(local, np.uint8, "r") if local else np.frombuffer(source.read(name), np.uint8)
    parts, position, header = [], 0, {}
    for (key, entry), (begin, end) in zip(found.items(), places, strict=True):
        parts.append(data[8 + length + begin : 8 + length + end].tobytes())
        header[key] = {**entry, "data_offsets": [position, position + len(parts[-1])]}
        position += len(parts[-1])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _scaled(tensors: dict[str, Any], where: str) -> dict[str, Any]:
    """Return tensors times the factors that stand beside those in float8, without the factors."""
    scales = {
        key: value
        for key in list(tensors)
        for end in _SCALES
        if key.endswith(end)
        and key.removesuffix(end) in tensors
        and (value := tensors[key]).size == 1  # one number for the whole tensor
    }
    kept = {key: value for key, value in tensors.items() if key not in scales and key != _SCALED}
    for key, value in scales.items():
        name = next(key.removesuffix(end) for end in _SCALES if key.endswith(end) and key.removesuffix(end) in kept)
        kept[name] = kept[name].astype(np.float32) * np.float32(value.reshape(()))
    return kept


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
    if entry["dtype"] == "F8_E5M2":  # the upper half of a float16
        array = (array.astype("<u2") << 8).view("<f2")
    if entry["dtype"] == "F8_E4M3":
        array = _float8()[array]
    return array.reshape(entry["shape"])


@functools.cache
def _float8() -> Array:
    """Return the number of each of the 256 values of float8 e4m3fn (Micikevicius et al. 2022): no infinities."""
    code = np.arange(256)
    exponent, fraction = (code >> 3) & 15, code & 7
    value = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10.0), fraction * 2.0**-9)
    value[(code & 127) == 127] = np.nan
    table: Array = np.where(code < 128, value, -value).astype(np.float32)
    return table


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
    """Return the words of a file's content; the file's name stands in if there is none inside."""
    if not isinstance(content, Mapping):
        yield _learned(stem, {ANY: content}, where)
        return
    content = _without_prefix(content)
    if bundles := _bundles(content):
        others = any(not str(key).startswith("bundle_emb.") for key in content)
        note = f"{where}: {_OTHERS}" if others else ""
        for word, inside in bundles.items():
            for learned in _words(inside, word, f"{where}: {word}"):
                yield replace(learned, file=where, note=learned.note or note)
    elif "string_to_param" in content:
        name = content.get("name")
        yield _learned(name if isinstance(name, str) and name else stem, {ANY: _only(content, where)}, where)
    elif _FLAT in content:
        yield _learned(stem, {ANY: content[_FLAT]}, where)
    elif set(content) & {*PARTS, *OUTPUTS}:
        yield _of_parts(stem, content, where)
    elif set(content) == {"emb_params"}:
        yield _learned(stem, {ANY: content["emb_params"]}, where)
    elif content and all(isinstance(key, str) and _is_word(key) for key in content):
        for word, vectors in content.items():
            yield _learned(word, {ANY: vectors}, where)
    else:
        keys = [str(key) for key in content]
        lora = any("lora" in key for key in keys)
        raise ModelError(
            f"is not a textual inversion: it holds {len(keys)} entries, such as {keys[0]!r}" if keys else "is empty",
            where=where,
            hint='It looks like a LoRA: use = "lora".'
            if lora
            else "Known are {word: tensor}, string_to_param, emb_params, and clip_l with clip_g.",
        )


def _without_prefix(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Return what lies under "state_dict", as a folder or as a prefix of every name."""
    if set(content) == {"state_dict"} and isinstance(content["state_dict"], Mapping):
        return _without_prefix(content["state_dict"])
    if content and all(isinstance(key, str) and key.startswith(_STATE) for key in content):
        return {key.removeprefix(_STATE): value for key, value in content.items()}
    return content


def _bundles(content: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return word -> the content of its own, for the embeddings that an adapter's file brings along."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        if isinstance(key, str) and (match := _BUNDLE.fullmatch(key)):
            word, form = match[1], match[2] or "emb_params"
            found.setdefault(word, {})["emb_params" if form == "*" else form] = value
    return found


def _of_parts(word: str, content: Mapping[str, Any], where: str) -> Learned:
    """Return the word of a file that has vectors for each text encoder."""
    if unknown := set(content) - {*PARTS, *OUTPUTS}:
        raise ModelError(f"unknown part {min(map(str, unknown))!r} beside {', '.join(PARTS)}", where=where)
    outputs = [part for part in OUTPUTS if part in content]
    parts = {part: value for part, value in content.items() if part in PARTS}
    if not parts:
        raise ModelError(
            f"holds {' and '.join(outputs)} alone: vectors for what the text encoder gives, not for what it reads",
            where=where,
            hint="Train the word in OneTrainer without the option 'output embedding'.",
        )
    learned = _learned(word, parts, where)
    if outputs:
        reason = f"{where}: {' and '.join(outputs)} are vectors for what the text encoder gives, and are not applied"
        return replace(learned, note=reason)
    return learned


def _is_word(name: str) -> bool:
    """Say whether an entry may be a word and its vectors, and not a layer's weights."""
    layer = name.endswith((".weight", ".bias", ".alpha")) or "lora" in name
    return not layer


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
    if len(shape) == 3 and shape[0] == 1:  # a batch of one, as some trainers keep it
        shape = shape[1:]
    if not shape or len(shape) > 2 or 0 in shape:
        reason = f"has the shape {list(shape)}" if shape else f"is a {type(value).__name__}"
        raise ModelError(f"{reason}, and not (vectors, width)", where=where)
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
