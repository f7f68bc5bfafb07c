"""A tokenizer.json as a graph of openvino_tokenizers' operations, which reads texts as the library tokenizers does.

openvino_tokenizers' own conversion reads such files in another way: of T5's it keeps several blanks, and takes tabs and
line breaks for letters. Here each step of the file becomes the operations that do the same; a step without such
operations is refused. What stays different are sequences of several combining marks where the file normalizes, letters
that are newer than one of the two libraries, and splits whose scores differ by less than float32 holds.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino import opset15

from ovforge.errors import ModelError
from ovforge.store import parse_object

__all__ = ["TokenGraph", "put_between", "token_graph"]

_LONGEST = 2**20
"""Words that a vocabulary may have: those of real ones are a quarter of it at most."""

_SPACES = (range(9, 14), (32, 133, 160, 5760), range(8192, 8203), (8232, 8233, 8239, 8287, 12288))
_WHITE = "".join(rf"\x{{{code:x}}}" for codes in _SPACES for code in codes)
"""The inside of a class of Unicode's White_Space, which is that of Rust's library."""

_MARK = "\ufdd0"
"""Stands before an added token where the model looks it up: a code point that stands for nothing."""

Strings = list[ov.Output]
"""Ragged strings: where each text's pieces begin and end, where each piece does, the bytes, which pieces are tokens."""


@dataclass(frozen=True)
class TokenGraph:
    """A model that takes strings, (texts,), and gives `input_ids` and `attention_mask`, both i32 (texts, longest)."""

    model: ov.Model
    end: int | None
    """The token that ends each text, if there is one."""

    words: tuple[str, ...]
    """Added tokens, which are looked for in texts before all else."""


def token_graph(assets: Mapping[str, bytes], role: str) -> TokenGraph:
    """Return the tokenizer of the file tokenizer.json in the folder `role` of `assets`, which cuts nothing.

    Raises ModelError for a file that is missing or damaged, or has a step for which there are no exact operations.
    """
    path = f"{role}/tokenizer.json"
    if path not in assets:
        raise ModelError(
            "the model has no tokenizer.json, of which the tokens in a graph are made",
            where=role,
            hint=f"Put the original model's {path} into that folder, or convert the model with ovforge.",
        )
    file = parse_object(assets[path], path)
    try:
        return _Reader(file, path).graph()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"is not a tokenizer as the library tokenizers writes it: {type(error).__name__}: {error}",
            where=path,
            hint="Fetch it again.",
        ) from error


def put_between(before: str, text: ov.Output, after: str) -> ov.Output:
    """Return strings, (texts,), with constant texts around each of them."""
    if not before and not after:
        return text
    from openvino_tokenizers.tokenizer_pipeline import RegexNormalizationStep

    value = list(opset15.string_tensor_unpack(text).outputs())
    for place, constant in ((r"\A", before), (r"\z", after)):
        value = RegexNormalizationStep(place, _literal(constant)).get_ov_subgraph(value) if constant else value
    return opset15.string_tensor_pack(*value).output(0)


class _Reader:
    """The graph of one file, built step by step."""

    def __init__(self, file: Mapping[str, Any], path: str) -> None:
        from openvino_tokenizers import tokenizer_pipeline

        self._steps: Any = tokenizer_pipeline
        self._file, self._path = file, path
        self._added: list[Mapping[str, Any]] = list(file.get("added_tokens") or [])
        self._pipeline = tokenizer_pipeline.TokenizerPipeline()

    def graph(self) -> TokenGraph:
        """Return the whole graph."""
        text = ops.parameter([-1], ov.Type.string)
        text.output(0).get_tensor().set_names({"text"})
        unpacked = opset15.string_tensor_unpack(text).outputs()
        value = self._steps.TokenizerPipeline.add_ragged_dimension(list(unpacked))
        value = self._split_added(value)
        value = self._normalized(self._file.get("normalizer"), value)
        value = self._pieces(self._file.get("pre_tokenizer"), value)
        template = self._template(self._file.get("post_processor"))
        ends = template[template.index(None) + 1 :]
        if len(ends) > 1 or None in ends:
            raise self._refused(f"post_processor: {len(ends)} tokens after a text")
        ids = self._combined(self._tokens(value), template)
        dense = self._steps.PaddingStep(_token_id=0).get_ov_subgraph(ids)
        results = []
        for name, output in zip(("input_ids", "attention_mask"), dense, strict=True):
            output.get_tensor().set_names({name})
            results.append(ops.result(output))
        words = tuple(token["content"] for token in self._added)
        return TokenGraph(ov.Model(results, [text], "tokenizer"), ends[0] if ends else None, words)

    def _refused(self, what: str) -> ModelError:
        return ModelError(
            f"its step {what} has no exact operations in a graph",
            where=self._path,
            hint="Run the pipeline itself, which reads tokens by the library tokenizers.",
        )

    # -- added tokens ---------------------------------------------------------------------------------------------

    def _split_added(self, value: Strings) -> Strings:
        """Return pieces of which each added token is one; blanks that it takes in are gone."""
        for token in self._added:
            if token.get("normalized") and self._file.get("normalizer") is not None:
                raise self._refused(f"added token: {token['content']!r}, looked for in normalized text,")
        if not self._added:
            return [*value, ops.broadcast(ops.constant(np.array(False)), ops.shape_of(value[2], "i64")).output(0)]
        longest_first = sorted(self._added, key=lambda token: -len(token["content"].encode()))
        for token in longest_first:
            before, after = (f"[{_WHITE}]*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
            if before or after:
                word = _quoted(token["content"])
                value = self._replaced(f"{before}({word}){after}", "$1", value)
            if token.get("single_word"):
                raise self._refused(f"added token: {token['content']!r} with single_word")
        split = self._steps.SpecialTokensSplit()
        split.special_tokens = [self._steps.SpecialToken(token["content"]) for token in longest_first]
        return list(split.get_ov_subgraph(list(value)))

    # -- normalizers ----------------------------------------------------------------------------------------------

    def _normalized(self, step: Mapping[str, Any] | None, value: Strings) -> Strings:
        """Return pieces after a normalizer of the file."""
        if step is None:
            return value
        match step["type"]:
            case "Sequence":
                for each in step["normalizers"]:
                    value = self._normalized(each, value)
                return value
            case "NFC" | "NFD" | "NFKC" | "NFKD" as form:
                return self._on_strings(self._steps.NormalizeUnicode(form), value)
            case "Precompiled":
                charsmap = _checked(base64.b64decode(step["precompiled_charsmap"], validate=True))
                return self._on_strings(
                    self._steps.CharsmapStep(charsmap=charsmap, remove_extra_whitespaces=False), value
                )
            case "Replace":
                if re.search(r"\\[1-9]", step["content"]):  # which would be a part of the match
                    raise self._refused("normalizer: Replace by a backslash and a number")
                return self._replaced(_pattern(step["pattern"]), _literal(step["content"]), value)
            case "Prepend":
                return self._replaced(r"\A([\s\S])", f"{_literal(step['prepend'])}$1", value)
            case "Strip":
                ends = [rf"\A[{_WHITE}]+"] * bool(step["strip_left"]) + [rf"[{_WHITE}]+\z"] * bool(step["strip_right"])
                return self._replaced("|".join(ends), "", value) if ends else value
        raise self._refused(f"normalizer: {step['type']}")

    def _replaced(self, pattern: str, by: str, value: Strings) -> Strings:
        return self._on_strings(self._steps.RegexNormalizationStep(pattern, by), value)

    def _on_strings(self, step: Any, value: Strings) -> Strings:
        """Return pieces after a step that changes each of them by itself, but no tokens."""
        return [*value[:2], *step.get_ov_subgraph(list(value[2:]))]

    # -- pre-tokenizers -------------------------------------------------------------------------------------------

    def _pieces(self, step: Mapping[str, Any] | None, value: Strings) -> Strings:
        """Return pieces after a pre-tokenizer of the file."""
        if step is None:
            return value
        match step["type"]:
            case "Sequence":
                for each in step["pretokenizers"]:
                    value = self._pieces(each, value)
                return value
            case "WhitespaceSplit":
                return self._split(f"[{_WHITE}]+", "remove", value)
            case "Metaspace":
                return self._metaspace(step, value)
            case "Split":
                return self._split_by(step, value)
            case "ByteLevel" if not step.get("add_prefix_space") and not step.get("use_regex", True):
                return value  # bytes are bytes here
        raise self._refused(f"pre_tokenizer: {step['type']}")

    def _metaspace(self, step: Mapping[str, Any], value: Strings) -> Strings:
        sign = step["replacement"]
        scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        if len(sign) != 1 or scheme not in ("always", "never"):
            raise self._refused(f"pre_tokenizer: Metaspace with prepend_scheme {scheme}")
        value = self._replaced(" ", sign, value)
        if scheme == "always":
            value = self._replaced(rf"\A([^{_quoted(sign)}])", f"{sign}$1", value)
        if step.get("split", True):
            letter = _quoted(sign)
            value = self._split(f"{letter}[^{letter}]*|[^{letter}]+", "isolate", value)
        return value

    def _split_by(self, step: Mapping[str, Any], value: Strings) -> Strings:
        pattern, behavior = _pattern(step["pattern"]), step["behavior"]
        if step.get("invert"):
            raise self._refused("pre_tokenizer: Split with invert")
        if behavior in ("Isolated", "Removed"):
            return self._split(pattern, behavior.removesuffix("d"), value) if pattern else value
        if behavior == "MergedWithPrevious" and len(step["pattern"].get("String", "")) == 1:
            return self._split(f"[^{pattern}]*{pattern}|[^{pattern}]+", "isolate", value)
        raise self._refused(f"pre_tokenizer: Split with {behavior}")

    def _split(self, pattern: str, behaviour: str, value: Strings) -> Strings:
        behaviour = {"Isolate": "isolate", "Remove": "remove"}.get(behaviour, behaviour)
        return list(self._steps.RegexSplitStep(pattern, behaviour=behaviour).get_ov_subgraph(list(value)))

    # -- the model ------------------------------------------------------------------------------------------------

    def _tokens(self, value: Strings) -> list[ov.Output]:
        """Return ragged token ids, i32: where each text's begin and end, and all of them."""
        model = self._file["model"]
        size = len(model["vocab"]) + len(self._added)
        if size > _LONGEST:
            raise ModelError(f"its vocabulary has {size} words, more than {_LONGEST}", where=self._path)
        match model["type"]:
            case "Unigram":
                return self._unigram(model, value)
            case "BPE":
                return self._byte_pairs(model, value)
        raise self._refused(f"model: {model['type']}")

    def _unigram(self, model: Mapping[str, Any], value: Strings) -> list[ov.Output]:
        if model.get("byte_fallback") or model.get("unk_id") is None:
            raise self._refused("model: Unigram with byte_fallback or without unk_id")
        words = [str(word) for word, _ in model["vocab"]]
        scores = [float(score) for _, score in model["vocab"]]
        # Added tokens are words of their own, so that what normalizing makes look like one is none.
        others = ops.equal(ops.convert(value[5], "i32"), ops.constant(np.int32(0))).output(0)
        strings = self._steps.RegexNormalizationStep(r"\A", _MARK).get_ov_subgraph([*value[2:5], others])
        known = {token["content"]: int(token["id"]) for token in self._added}
        table = [*range(len(words)), *known.values()]
        step = self._steps.UnigramModelStep(
            [*words, *(_MARK + word for word in known)], [*scores, *[0.0] * len(known)], False, int(model["unk_id"])
        )
        begins, ends, found = step.get_ov_subgraph([*value[:2], *strings[:3]])
        ids = ops.gather(ops.constant(np.array(table, np.int32)), found, ops.constant(np.int32(0)))
        return [begins, ends, ids.output(0)]

    def _byte_pairs(self, model: Mapping[str, Any], value: Strings) -> list[ov.Output]:
        odd = [name for name in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
               if model.get(name)]  # fmt: skip
        if odd:
            raise self._refused(f"model: BPE with {odd[0]}")
        words = {str(word): int(number) for word, number in model["vocab"].items()}
        merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        added = {token["content"]: int(token["id"]) for token in self._added}
        last = max([*words.values(), *added.values()], default=0)
        if last >= _LONGEST:  # before there is a list of as many
            raise ModelError(f"it numbers words up to {last + 1}, more than {_LONGEST}", where=self._path)
        listed: list[Any] = [""] * (last + 1)
        for word, number in words.items():
            listed[number] = word
        pairs: list[tuple[Any, Any]] = [(left, right) for left, right in merges]
        if self._is_byte_level(self._file.get("pre_tokenizer")):
            listed = [_bytes_of(word) for word in listed]
            pairs = [(_bytes_of(left), _bytes_of(right)) for left, right in pairs]
        for word, number in added.items():
            listed[number] = word.encode() if isinstance(listed[0], bytes) else word
        step = self._steps.BPETokenizationStep(
            listed, pairs, unk_token=model.get("unk_token") or "", fuse_unk=bool(model.get("fuse_unk")),
            byte_fallback=bool(model.get("byte_fallback")), added_tokens=added,
        )  # fmt: skip
        step.set_pipeline(self._pipeline)
        return list(step.get_ov_subgraph(list(value[:5])))

    def _is_byte_level(self, step: Mapping[str, Any] | None) -> bool:
        if step is None:
            return False
        return step["type"] == "ByteLevel" or any(map(self._is_byte_level, step.get("pretokenizers", ())))

    # -- around them ----------------------------------------------------------------------------------------------

    def _combined(self, ids: list[ov.Output], template: Sequence[int | None]) -> list[ov.Output]:
        """Return ragged token ids with the tokens that stand before and after a text."""
        inputs: list[Any] = []
        for part in template:
            inputs += [self._steps.AddToken(_token_id=part)] if isinstance(part, int) else [self._steps.Sequence()]
        return list(self._steps.CombineSegmentsStep(inputs).get_ov_subgraph(ids)[:3])

    def _template(self, step: Mapping[str, Any] | None) -> list[int | None]:
        """Return the ids around a text, which is None."""
        if step is None:
            return [None]
        match step["type"]:
            case "ByteLevel":
                return [None]
            case "Sequence":
                found = [self._template(each) for each in step["processors"] if each["type"] != "ByteLevel"]
                if len(found) > 1:
                    raise self._refused("post_processor: Sequence")
                return found[0] if found else [None]
            case "TemplateProcessing":
                made: list[int | None] = []
                for part in step["single"]:
                    if "Sequence" in part:
                        made.append(None)
                    else:
                        made += step["special_tokens"][part["SpecialToken"]["id"]]["ids"]
                return made
        raise self._refused(f"post_processor: {step['type']}")


def _checked(charsmap: bytes) -> bytes:
    """Return a map of letters as SentencePiece compiles it. Raises ValueError for one that leads out of itself.

    It is the size of a double array in bytes, the array (Yata's Darts-clone: u32, a node each), and texts that end with
    a zero. SentencePiece follows it without looking where it leads.
    """
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    if not size or size % 1024 or not texts.endswith(b"\0"):
        raise ValueError("precompiled_charsmap is cut off")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    leaves = units >> 31 == 1
    offsets = (units >> 10) << ((units & 512) >> 6)
    reached = (np.arange(len(units), dtype=np.uint32) ^ offsets) | 255
    if (reached[~leaves] >= len(units)).any() or ((units[leaves] & (2**31 - 1)) >= len(texts)).any():
        raise ValueError("precompiled_charsmap leads out of itself")
    return charsmap


def _quoted(text: str) -> str:
    """Return a text as a regular expression that matches it."""
    return re.sub(r"([^\w\s]|\s)", lambda found: rf"\x{{{ord(found[0]):x}}}", text)


def _literal(text: str) -> str:
    """Return a text as what replaces a match."""
    return text.replace("$", "$$")


def _pattern(pattern: Mapping[str, str]) -> str:
    r"""Return a pattern of the file, of which \s is Unicode's White_Space: PCRE's lacks U+0085."""
    if "String" in pattern:
        return _quoted(pattern["String"])
    made, inside, escaped = "", False, False
    for letter in pattern["Regex"]:
        if escaped:
            made += {"s": _WHITE if inside else f"[{_WHITE}]", "S": rf"[^{_WHITE}]" if not inside else r"\S"}.get(
                letter, f"\\{letter}"
            )
            escaped = False
        elif letter == "\\":
            escaped = True
        else:
            inside = letter == "[" or (inside and letter != "]")
            made += letter
    return made


def _bytes_of(word: str) -> bytes:
    """Return the bytes that a word of a byte-level vocabulary stands for (Radford et al. 2019, `bytes_to_unicode`)."""
    return bytes(_BYTES[letter] for letter in word) if all(letter in _BYTES for letter in word) else word.encode()


def _letters() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _letters()
