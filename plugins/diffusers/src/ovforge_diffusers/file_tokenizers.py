"""Tokenizers for text encoders in single files: from the file itself, or from a folder.

GGUF files hold the words of llama.cpp's tokenizers, and some files of ComfyUI a SentencePiece model. What is made of
them are files as a diffusers folder has them, from which transformers makes the same tokens as from its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from ovforge import open_file
from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusers.requirements import need
from ovforge_diffusers.stored_file import StoredFile
from ovforge_diffusers.tokenization import fits_kind
from ovforge_diffusers.vocabulary import packaged_files

__all__ = ["SENTENCEPIECE", "TOKENIZER_CLASSES", "find_tokenizer"]

TOKENIZER_CLASSES = {
    "CLIPTextModelWithProjection": "CLIPTokenizer",
    "T5EncoderModel": "T5Tokenizer",
    "Qwen3Model": "Qwen2Tokenizer",
    "Gemma2Model": "GemmaTokenizer",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2Tokenizer",
}
"""Class of a text encoder -> transformers' class of its tokenizer."""

SENTENCEPIECE = "spiece_model"
"""The tensor that holds a SentencePiece model in ComfyUI's files, byte by byte."""

_SENTENCEPIECE_LIMIT = 16 * 2**20
_PURPOSE = "reading a tokenizer"
_LIMIT = 64 * 2**20
_CONFIG, _WHOLE = "tokenizer_config.json", "tokenizer.json"
_NAMES = frozenset(
    {_WHOLE, _CONFIG, "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "added_tokens.json",
     "special_tokens_map.json", "chat_template.jinja"}
)  # fmt: skip
_T5_LENGTH, _QWEN_LENGTH = 512, 131072
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED = 1, 2, 3, 4, 5
"""Kinds of words in llama.cpp."""

_T5_FIRST = ["<pad>", "</s>", "<unk>"]
_SENTINELS = 100


def find_tokenizer(
    component: str, kind: str, config: Mapping[str, Any], file: StoredFile, options: LoaderOptions, *, alone: bool
) -> dict[str, bytes] | None:
    """Return the files of the tokenizer of class `kind` for the text encoder with a config; None if there is none.

    It comes from the options, the file itself, a folder beside it, or an installed package. Raises ModelError if the
    option `tokenizer` names a folder without it, and the text encoder is `alone`.
    """
    if given := options.tokenizer:
        if files := _folder_files(component, kind, open_file(given), top=True):
            return files
        if alone:
            raise ModelError(f"it holds no {kind}", where=f"load.tokenizer: {given}")
    if kind == "GemmaTokenizer" and SENTENCEPIECE in file.shapes:
        return _sentencepiece_files(component, file)
    if files := _gguf_files(component, kind, file.metadata, file.source.name):
        return files
    if options.config and (files := _folder_files(component, kind, open_file(options.config), top=True)):
        return files
    if files := _folder_files(component, kind, file.source, top=False):
        return files
    if kind == "CLIPTokenizer":
        pad = "!" if config["hidden_act"] == "gelu" else "<|endoftext|>"
        return packaged_files(component, config["vocab_size"], config["max_position_embeddings"], pad)
    return None


def _folder_files(component: str, kind: str, source: Source, *, top: bool) -> dict[str, bytes] | None:
    """Return the files of the tokenizer of class `kind` in a source, below the folder `component`; None if none.

    It lies in a folder of that name, in another one of a tokenizer, or, with `top`, at the top. A folder fits by the
    class that its tokenizer_config.json names, or by its files if it names none.
    """
    for folder in dict.fromkeys([component, "tokenizer", "tokenizer_2", "tokenizer_3", *(["."] if top else [])]):
        inside = {
            PurePosixPath(path).name: path
            for path, size in source.files().items()
            if PurePosixPath(path).parent.as_posix() == folder and size <= _LIMIT
        }
        if not fits_kind(kind, inside):
            continue
        files = {name: source.read(path) for name, path in inside.items() if name in _NAMES}
        named = parse_object(files.get(_CONFIG, b"{}"), f"{source.name}: {folder}/{_CONFIG}").get("tokenizer_class")
        if named is None or str(named).removesuffix("Fast") == kind:
            return {f"{component}/{name}": data for name, data in files.items()}
    return None


def _sentencepiece_files(component: str, file: StoredFile) -> dict[str, bytes]:
    """Return the files of Gemma's tokenizer, by the SentencePiece model in a safetensors file.

    Raises ModelError if its tensor has another shape than some bytes have.
    """
    shape = file.shapes[SENTENCEPIECE]
    if len(shape) != 1 or shape[0] > _SENTENCEPIECE_LIMIT:
        raise ModelError(
            f"{SENTENCEPIECE} has the shape {list(shape)}, and a list of bytes is needed",
            where=file.source.name,
            hint="The file may be damaged: fetch it again.",
        )
    model = file.tensors({SENTENCEPIECE: SENTENCEPIECE})[SENTENCEPIECE].numpy().tobytes()
    config = {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>",
        "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
    }  # fmt: skip
    return {f"{component}/tokenizer.model": model, f"{component}/{_CONFIG}": _json(config)}


def _gguf_files(component: str, kind: str, metadata: Mapping[str, Any], where: str) -> dict[str, bytes] | None:
    """Return the files of the tokenizer in a GGUF file's metadata; None if there is none, or none of class `kind`.

    Raises ModelError for one that is damaged.
    """
    if "tokenizer.ggml.tokens" not in metadata or kind not in _READERS:
        return None
    try:
        made = _READERS[kind](metadata)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"its tokenizer cannot be read: {error!r}",
            where=where,
            hint="The file may be damaged: fetch it again, or name a folder: the option tokenizer = FOLDER.",
        ) from error
    return None if made is None else {f"{component}/{name}": data for name, data in made.items()}


def _t5(metadata: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Return T5's tokenizer: a unigram model, whose words are followed by sentinels that llama.cpp leaves out."""
    if metadata.get("tokenizer.ggml.model") != "t5" or not _plain_spaces(metadata):
        return None
    tokens, kinds = _words(metadata)
    scores = [float(score) for score in metadata["tokenizer.ggml.scores"]]
    if tokens[:3] != _T5_FIRST or len(scores) != len(tokens):
        return None
    used = len(tokens)
    while used and kinds[used - 1] == _UNUSED and tokens[used - 1].startswith("[PAD"):
        used -= 1
    vocabulary = list(zip(tokens[:used], scores[:used], strict=True))
    sentinels = sum(token.startswith("<extra_id_") for token in tokens)
    if not sentinels:
        sentinels = min(_SENTINELS, len(tokens) - used)
        vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(sentinels))]
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    transformers = need("transformers", _PURPOSE)
    made = transformers.T5Tokenizer(
        vocab=vocabulary, extra_ids=sentinels, model_max_length=_T5_LENGTH,
        _spm_precompiled_charsmap=None if charsmap is None else np.asarray(charsmap).astype(np.uint8).tobytes(),
    )  # fmt: skip
    config = {
        "tokenizer_class": "T5Tokenizer", "extra_ids": sentinels, "model_max_length": _T5_LENGTH, "eos_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>",
        "extra_special_tokens": [f"<extra_id_{number}>" for number in range(sentinels)],
    }  # fmt: skip
    return {_WHOLE: made.backend_tokenizer.to_str().encode(), _CONFIG: _json(config)}


def _plain_spaces(metadata: Mapping[str, Any]) -> bool:
    """Say whether blanks are treated as by T5's own: one before each text, and no two in a row."""
    names = ("add_space_prefix", "remove_extra_whitespaces")
    return all(metadata.get(f"tokenizer.ggml.{name}", True) is True for name in names)


def _qwen2(metadata: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Return the byte pairs of Qwen's tokenizers, with their added tokens by number, and the chat template."""
    if metadata.get("tokenizer.ggml.model") != "gpt2" or metadata.get("tokenizer.ggml.pre") != "qwen2":
        return None
    tokens, kinds = _words(metadata)
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    added = [number for number, kind in enumerate(kinds) if kind in (_CONTROL, _USER)]
    vocabulary = {
        token: number for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == _NORMAL
    }
    transformers = need("transformers", _PURPOSE)
    special = {name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]] for name, key in _named(metadata)}
    whole = json.loads(transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges).backend_tokenizer.to_str())
    whole["added_tokens"] = [
        {
            "id": number, "content": tokens[number], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kinds[number] == _CONTROL,
        }
        for number in added
    ]  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "model_max_length": _QWEN_LENGTH, "bos_token": None, "unk_token": None,
        **special,
    }  # fmt: skip
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {_WHOLE: json.dumps(whole, ensure_ascii=False).encode(), _CONFIG: _json(config)}


def _named(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, key in (("eos_token", "eos"), ("pad_token", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            yield name, key


def _words(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """Return all words, and the kind of each. Raises ValueError if there is not one kind for each word."""
    tokens = [str(token) for token in metadata["tokenizer.ggml.tokens"]]
    kinds = [int(kind) for kind in metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
    if len(kinds) != len(tokens):
        raise ValueError(f"{len(tokens)} words, and {len(kinds)} kinds of them")
    return tokens, kinds


def _pair(merge: Any) -> tuple[str, str]:
    first, second = str(merge).split(" ")
    return first, second


_READERS = {"T5Tokenizer": _t5, "Qwen2Tokenizer": _qwen2}


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()
