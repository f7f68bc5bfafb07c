"""CLIP's tokenizer: text to pieces with their token ids, as transformers' CLIPTokenizer reads the same files.

A model's tokenizer files are read by the library that transformers itself uses. The OpenVINO tokenizer that lies beside
them serves models that come without those files: its graph folds the case of rare letters in another way, and does not
find every added token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import openvino as ov

from ovforge.errors import InputError, ModelError, PluginError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["FileTokenizer", "GraphTokenizer", "Learned", "Piece", "Tokenizer", "has_files"]

Learned = Mapping[str, Sequence[int]]
"""Words that were taught beyond the tokenizer's own: word -> the ids of its vectors, which follow each other."""

START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP splits text before byte pairs (Radford et al. 2021, `SimpleTokenizer`), with numbers digit by digit."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}


@dataclass(frozen=True, slots=True)
class Piece:
    """Token ids that belong together, and where they stand in the text: one id, or all of a learned word's."""

    ids: tuple[int, ...]
    begin: int
    end: int


class Tokenizer(Protocol):
    """Reads text; `start`, `end` and `padding` are the ids around it."""

    start: int
    end: int
    padding: int

    def pieces(self, text: str) -> list[Piece]:
        """Return all pieces of a text, without the ids around it, and without cutting it."""
        ...


def has_files(assets: Mapping[str, bytes], role: str) -> bool:
    """Say whether a model's small files hold what a tokenizer is made of."""
    names = {path.removeprefix(f"{role}/") for path in assets if path.startswith(f"{role}/")}
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


class FileTokenizer:
    """The tokenizer of tokenizer.json, or of vocab.json and merges.txt, in the folder `role` of `assets`.

    Added and special tokens come from the same files, in the same order, as in transformers' `from_pretrained`. Raises
    ModelError for damaged files, PluginError if the package tokenizers is not installed.
    """

    def __init__(self, assets: Mapping[str, bytes], role: str, learned: Learned | None = None) -> None:
        self._reader = _read(assets, role)
        try:
            self.start, self.end = self._reader.encode("").ids
        except ValueError as error:
            raise ModelError("does not put one token before a text and one after it", where=role) from error
        pad = _text(_settings(assets, role).get("pad_token") or END)
        padding = self._reader.token_to_id(pad)
        self.padding = self.end if padding is None else padding
        self._several: dict[int, tuple[int, ...]] = {}
        for word, ids in (learned or {}).items():
            if self._reader.token_to_id(word) != ids[0]:
                raise ModelError(
                    f"the learned word {word!r} is not in the tokenizer's files",
                    where=role,
                    hint="Convert the model again, or take the transform from the config and add it anew.",
                )
            if len(ids) > 1:
                self._several[ids[0]] = tuple(ids)

    def pieces(self, text: str) -> list[Piece]:
        """Return all pieces of a text. Raises InputError for text that cannot be written in UTF-8."""
        try:
            read = self._reader.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(
                "holds half of a surrogate pair, which is not a character", where="prompt", hint="Remove it."
            ) from error
        return [
            Piece(self._several.get(id_, (id_,)), begin, end)
            for id_, (begin, end) in zip(read.ids, read.offsets, strict=True)
        ]


class GraphTokenizer:
    """The tokenizer as an OpenVINO model alone. It may cut what is longer than the encoder reads, so words go singly.

    CLIP joins no tokens across white space, so nothing is lost by that.
    """

    def __init__(self, model: ov.CompiledModel, learned: Learned | None = None) -> None:
        self._request = model.create_infer_request()
        self._tokens = next((port for port in model.outputs if "input_ids" in port.names), None)
        if self._tokens is None:
            raise ModelError("the tokenizer has no 'input_ids'", hint="Convert the model again.")
        self._learned = {" ".join(word.split()).lower(): tuple(ids) for word, ids in (learned or {}).items()}
        longest = sorted(self._learned, key=len, reverse=True)
        choice = "|".join(r"\s+".join(map(re.escape, word.split())) for word in longest)
        self._words = re.compile(rf"({choice})|((?:(?!{choice})\S)+)" if choice else r"(?!)()|(\S+)", re.IGNORECASE)
        # The tokenizer itself shows its end and padding tokens: nothing, beside something longer.
        nothing = self._rows(["", "a a a a"])[0]
        self.start, self.end, self.padding = int(nothing[0]), int(nothing[1]), int(nothing[-1])

    def pieces(self, text: str) -> list[Piece]:
        """Return all pieces of a text. Raises InputError for one word that the model cannot read whole."""
        found = list(self._words.finditer(text))
        rows = iter(self._rows([match[2] for match in found if match[2]]))
        pieces: list[Piece] = []
        for match in found:
            if match[1]:
                ids = self._learned[" ".join(match[1].split()).lower()]
                pieces.append(Piece(ids, match.start(), match.end()))
            else:
                read = self._content(next(rows), match[2])
                pieces += [Piece((id_,), match.start(), match.end()) for id_ in read]
        return pieces

    def _content(self, row: Sequence[int], word: str) -> Sequence[int]:
        """Return what lies between the start token and the end token."""
        length = row.index(self.end, 1) - 1
        if length == len(row) - 2 and length > 1 and self._rows([word + word[-1]])[0] == row:
            raise InputError(
                f"one word is longer than this model's tokenizer reads: {word[:32]!r}...",
                where="prompt",
                hint="Shorten it; or put the model's tokenizer.json into its folder tokenizer/, which has no limit.",
            )
        return row[1 : 1 + length]

    def _rows(self, words: Sequence[str]) -> list[list[int]]:
        if not words:
            return []
        self._request.infer({0: ov.Tensor(np.array(list(words), dtype=str))})
        rows: list[list[int]] = self._request.get_tensor(self._tokens).data.tolist()
        return rows


def _read(assets: Mapping[str, bytes], role: str) -> tokenizers.Tokenizer:
    """Return the library's tokenizer, built in the steps of transformers' CLIPTokenizer."""
    try:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    except ImportError as error:
        raise PluginError(
            "reading a model's tokenizer needs the package tokenizers",
            where=role,
            hint="Run: pip install tokenizers",
        ) from error
    settings = _settings(assets, role)
    whole = _object(assets, f"{role}/tokenizer.json")
    named = {name: settings.get(name, _DEFAULTS.get(name)) for name in _NAMED}
    try:
        if whole:
            vocabulary, merges = whole["model"]["vocab"], [_pair(merge) for merge in whole["model"]["merges"]]
        else:
            vocabulary = _object(assets, f"{role}/vocab.json")
            lines = assets[f"{role}/merges.txt"].decode("utf-8").split("\n")
            merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
        reader = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=merges,
                continuing_subword_prefix="",
                end_of_word_suffix=SUFFIX,
                fuse_unk=False,
                unk_token=_text(named["unk_token"]),
            )
        )
        reader.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        reader.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        _add(reader, _added(assets, role, settings), named, settings)
        if whole and whole.get("post_processor"):
            model = {**whole["model"], "vocab": {}, "merges": []}
            empty = Tokenizer.from_str(json.dumps({**whole, "model": model, "added_tokens": []}))
            reader.post_processor = empty.post_processor
        else:
            start, end = _text(named["bos_token"]), _text(named["eos_token"])
            reader.post_processor = processors.RobertaProcessing(
                (end, reader.token_to_id(end) or 0), (start, reader.token_to_id(start) or 0), False, False
            )
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception for what it cannot read
        raise ModelError(
            f"the tokenizer's files cannot be read: {error}", where=role, hint="They may be damaged: fetch them again."
        ) from error
    return reader


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split() if isinstance(merge, str) else merge
    return first, second


def _settings(assets: Mapping[str, bytes], role: str) -> dict[str, Any]:
    """Return tokenizer_config.json, with what special_tokens_map.json says if there is no list of added tokens."""
    settings = _object(assets, f"{role}/tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _object(assets, f"{role}/special_tokens_map.json")
    return settings


def _added(assets: Mapping[str, bytes], role: str, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return id -> added token: of tokenizer_config.json, or else of added_tokens.json and tokenizer.json."""
    if "added_tokens_decoder" in settings:
        return {int(number): dict(token) for number, token in settings["added_tokens_decoder"].items()}
    special = {_text(value) for value in _special(settings)}
    added = {
        int(number): {"content": text, "special": text in special, "normalized": text not in special}
        for text, number in _object(assets, f"{role}/added_tokens.json").items()
    }
    for token in _object(assets, f"{role}/tokenizer.json").get("added_tokens", ()):
        added[int(token["id"])] = {key: value for key, value in token.items() if key != "id"}
    return added


def _special(settings: Mapping[str, Any]) -> Iterator[Any]:
    yield from (settings[name] for name in _NAMED if settings.get(name))
    yield from _extra(settings)


def _extra(settings: Mapping[str, Any]) -> list[Any]:
    """Return special tokens beyond the named ones."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    others = [value for key, value in settings.items() if key.endswith("_token") and key not in _NAMED]
    return [*(extra.values() if isinstance(extra, dict) else extra), *(v for v in others if isinstance(v, str | dict))]


def _add(
    reader: tokenizers.Tokenizer,
    added: Mapping[int, dict[str, Any]],
    named: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Add tokens by their numbers, and then the special ones: the library numbers new ones in that order."""
    from tokenizers import AddedToken

    by_text = {token["content"]: token for token in added.values()}
    names = {_text(value) for value in named.values() if value}
    special = [by_text.get(_text(value), value) for value in [*named.values(), *_extra(settings)] if value]
    tokens = [{**added[number], "special": _is_special(added[number], names)} for number in sorted(added)]
    tokens += [_entry(value, special=True) for value in special if _text(value) not in by_text]
    reader.add_tokens([AddedToken(**_fields(token)) for token in tokens])
    plain = [
        {**_entry(value, special=True), **({"normalized": False} if isinstance(value, str) else {})}
        for value in special
    ]
    reader.add_special_tokens([AddedToken(**_fields(token)) for token in plain])


def _is_special(token: Mapping[str, Any], names: set[str]) -> bool:
    return bool(token.get("special", False)) or token["content"] in names


def _entry(value: Any, *, special: bool) -> dict[str, Any]:
    return {"content": value, "special": special} if isinstance(value, str) else {**value, "special": special}


def _fields(token: Mapping[str, Any]) -> dict[str, Any]:
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {key: token[key] for key in known if key in token}


def _text(value: Any) -> str:
    """Return a token's text: some configs give an object."""
    return str(value.get("content")) if isinstance(value, dict) else str(value)


def _object(assets: Mapping[str, bytes], path: str) -> dict[str, Any]:
    """Return a JSON file, {} if there is none. Raises ModelError for what is not an object."""
    if path not in assets:
        return {}
    try:
        value = json.loads(assets[path])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"is not valid JSON: {error}", where=path, hint="Fetch it again.") from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=path, hint="Fetch it again.")
    return value
