"""New words in a tokenizer's OpenVINO model, as transformers' `add_tokens` puts them into CLIP's.

transformers looks for added tokens first, anywhere in the normalized text, the longest at the leftmost place; what lies
between is read as ever. The same here: one more RegexSplit isolates the new words after normalization, the splits after
it leave them whole, and the byte-pair encoder knows them with their numbers. A word of several vectors is one number at
first, and is then replaced by all of its numbers, as diffusers does by rewriting the prompt.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops

from ovforge.errors import ModelError
from ovforge.model import core
from ovforge_textual_inversion.graph import append, mark, named_alike, redirect, remove_marked, values

__all__ = ["TokenizerGraph", "extend_detokenizer", "normalized", "parts_of", "restore_tokenizer"]

Words = Mapping[str, Sequence[int]]
"""Word -> the numbers of its vectors, which follow each other."""

_AGAIN = (
    "Convert it again from the model's CLIPTokenizer with openvino_tokenizers.convert_tokenizer, of the 2026.4 "
    "release; or load the original diffusers folder."
)
_OURS = b"(?#learned)"
"""A comment that begins a changed pattern."""

_VOCABULARY, _ADDED = 5, -4
"""Inputs of a BPETokenizer where the vocabulary begins, and the added tokens: begins, ends, characters, numbers."""


def parts_of(word: str, vectors: int) -> list[str]:
    """Return the names of a word's vectors as diffusers gives them: word, word_1, word_2..."""
    return [word, *(f"{word}_{number}" for number in range(1, vectors))]


def normalized(word: str) -> str:
    """Return a word as CLIP's normalization leaves it: blanks, of whatever kind and number, are one space."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", word)).lower()


class TokenizerGraph:
    """A CLIP tokenizer's model without learned words. Raises ModelError if it is built in another way."""

    def __init__(self, model: ov.Model, role: str) -> None:
        self._model, self._role = model, role
        encoders = [node for node in model.get_ordered_ops() if node.get_type_name() == "BPETokenizer"]
        if len(encoders) != 1 or encoders[0].get_input_size() not in (15, 18):
            raise ModelError("is not a CLIP tokenizer that can learn words", where=role, hint=_AGAIN)
        self._encoder = encoders[0]
        self._suffix = str(self._encoder.get_attributes()["end_suffix"])
        self._splits = self._find_splits()
        vocabulary = self._strings(_VOCABULARY)
        numbers = values(self._input(_ADDED + 3).get_source_output())
        self.size = max(len(vocabulary), int(numbers.max(initial=-1)) + 1)
        self._known = {*vocabulary, *self._strings(_ADDED)}

    def _find_splits(self) -> list[ov.Node]:
        """Return the splits between normalization and the byte-pair encoder, in their order."""
        splits: list[ov.Node] = []
        node = _source(self._encoder, 0)
        while node.get_type_name() == "RegexSplit":
            splits.insert(0, node)
            node = _source(node, 2)
        kinds = {(split.get_attributes()["behaviour"], split.get_attributes()["invert"]) for split in splits}
        if not kinds or kinds - {("isolate", False), ("remove", True)}:
            raise ModelError("does not split text as CLIP's tokenizer does", where=self._role, hint=_AGAIN)
        return splits

    def knows(self, word: str) -> bool:
        """Say whether a word is a token already, inside words or at their end."""
        text = normalized(word).encode()
        return bool({text, text + self._suffix.encode()} & self._known)

    def extend(self, words: Words) -> None:
        """Add words. Raises ModelError for one that the changed model does not read whole."""
        names = {
            normalized(name): number
            for word, numbers in words.items()
            for name, number in zip(parts_of(word, len(numbers)), numbers, strict=True)
        }
        several = {numbers[0]: len(numbers) for numbers in words.values() if len(numbers) > 1}
        with named_alike(self._model):
            self._isolate(names)
            self._add(names)
            if several:
                self._replace_by_all(several)
        self._check(words)

    def _isolate(self, names: Mapping[str, int]) -> None:
        """Make words pieces of their own: the longest first, so that word_1 is not word and _1."""
        longest_first = sorted(names, key=lambda name: (-len(name.encode()), name))
        choice = "|".join(map(re.escape, longest_first)).encode()
        first = self._splits[0]
        strings = [port.get_source_output() for port in first.inputs()[:-1]]
        attributes = {"behaviour": "isolate", "invert": False, "max_splits": -1}
        isolated = mark(
            _operations().create("RegexSplit", [*strings, _text(b"(" + choice + b")")], attributes), "split"
        )
        for port, output in zip(first.inputs()[:-1], isolated.outputs(), strict=True):
            port.replace_source_output(output)
        for split in self._splits:
            old = _source(split, -1).data.tobytes()
            _change_pattern(split, _OURS + rb"\A(?:" + choice + rb")\z|" + old)

    def _add(self, names: Mapping[str, int]) -> None:
        """Append to the encoder's added tokens, with the suffix: it ends every piece before it looks it up."""
        texts = [name.encode() + self._suffix.encode() for name in names]
        columns = _columns(texts, _source(self._encoder, _ADDED + 2).data.size)
        for offset, column in enumerate([*columns, np.array([*names.values()], np.int32)]):
            append(self._input(_ADDED + offset), column, f"added-{offset}")

    def _replace_by_all(self, several: Mapping[int, int]) -> None:
        """Replace the first number of each word of several vectors by all of them, in ragged rows of numbers."""
        begins, ends, ids = self._encoder.outputs()[:3]
        column, flat, zero = ops.unsqueeze(ids, 1), np.array([-1]), np.int64(0)
        firsts, more = (ops.constant(np.array([list(part)], np.int32)) for part in (several, several.values()))
        found = ops.select(ops.equal(column, firsts), ops.subtract(more, np.int32(1)), np.int32(0))
        lengths = ops.add(ops.reduce_sum(found, np.array([1]), False), np.int32(1))
        # A grid (numbers, longest word) of each number and its followers; a row keeps as many as it needs.
        offsets = ops.constant(np.arange(max(several.values()), dtype=np.int32)[None])
        wanted = ops.reshape(ops.less(offsets, ops.unsqueeze(lengths, 1)), flat, False)
        places = ops.reshape(ops.non_zero(wanted, "i64"), flat, False)
        kept = ops.gather(ops.reshape(ops.add(column, offsets), flat, False), places, zero)
        starts = ops.concat([ops.constant(np.zeros(1, np.int32)), ops.cum_sum(lengths, zero)], 0)
        mine = [column, *(port.get_node() for port in column.output(0).get_target_inputs())]
        for name, old, keeps, new in (
            ("begins", begins, 1, ops.gather(starts, begins, zero)),
            ("ends", ends, 1, ops.gather(starts, ends, zero)),
            ("all", ids, 1, ops.convert_like(kept, ids)),
        ):
            redirect(old, mark(new, name, keeps).output(0), [new, *mine])

    def _check(self, words: Words) -> None:
        """Read every word with the changed model."""
        request = core().compile_model(self._model, "CPU").create_infer_request()
        request.infer({0: ov.Tensor(np.array(list(words), dtype=str))})
        rows = next(port for port in request.model_outputs if "input_ids" in port.names)
        for (word, numbers), row in zip(words.items(), request.get_tensor(rows).data.tolist(), strict=True):
            wanted, read = list(numbers), row[row.index(numbers[0]) :] if numbers[0] in row else []
            # A word of more vectors than the prompt has places is cut before the end token.
            cut = 1 < len(read) <= len(wanted) and read[:-1] == wanted[: len(read) - 1]
            if read[: len(wanted)] != wanted and not cut:
                raise ModelError(
                    f"{word!r} is not read as one word, but as the tokens {row[:8]}",
                    where=self._role,
                    hint="Name it otherwise: token = ...",
                )

    def _input(self, position: int) -> ov.Input:
        return self._encoder.input(position % self._encoder.get_input_size())

    def _strings(self, first: int) -> list[bytes]:
        """Return the strings that three inputs of the encoder hold: begins, ends, characters."""
        begins, ends, characters = (values(self._input(first + n).get_source_output()) for n in range(3))
        data = characters.tobytes()
        return [data[begin:end] for begin, end in zip(begins, ends, strict=True)]


def restore_tokenizer(model: ov.Model) -> None:
    """Take out what `TokenizerGraph.extend` added: the model is byte for byte what it was."""
    remove_marked(model)
    for split in model.get_ordered_ops():
        if split.get_type_name() == "RegexSplit" and (pattern := _source(split, -1).data.tobytes()).startswith(_OURS):
            _change_pattern(split, pattern[pattern.index(rb")\z|") + len(rb")\z|") :])


def extend_detokenizer(model: ov.Model, words: Words, suffix: bytes = b"</w>") -> None:
    """Give a detokenizer the words of the numbers."""
    decoder = next((node for node in model.get_ordered_ops() if node.get_type_name() == "VocabDecoder"), None)
    if decoder is None:
        return
    names = [name for word, numbers in words.items() for name in parts_of(word, len(numbers))]
    columns = _columns([name.encode() + suffix for name in names], _source(decoder, 3).data.size)
    with named_alike(model):
        for offset, column in enumerate(columns):
            append(decoder.input(1 + offset), column, f"words-{offset}")


def _columns(texts: Sequence[bytes], start: int) -> list[NDArray[Any]]:
    """Return begins and ends, int32, and characters, uint8, of strings that lie after `start` characters."""
    ends = np.array(start + np.cumsum([len(text) for text in texts]), np.int32)
    return [np.array([start, *ends[:-1]], np.int32), ends, _bytes(b"".join(texts))]


def _change_pattern(split: ov.Node, pattern: bytes) -> None:
    """Give a RegexSplit another pattern: one constant, of the same name, which the node reads when it is made."""
    port = split.input(split.get_input_size() - 1)
    changed = _text(pattern)
    changed.set_friendly_name(port.get_source_output().get_node().get_friendly_name())
    port.replace_source_output(changed.output(0))


def _source(node: ov.Node, position: int) -> ov.Node:
    return node.input(position % node.get_input_size()).get_source_output().get_node()


def _text(data: bytes) -> ov.Node:
    return ops.constant(_bytes(data))


def _bytes(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()


@functools.cache
def _operations() -> Any:
    """Return a factory of the tokenizers' operations."""
    from openvino.utils.node_factory import NodeFactory

    found = importlib.util.find_spec("openvino_tokenizers")
    assert found is not None
    assert found.origin is not None
    names = {"win32": "openvino_tokenizers.dll", "darwin": "libopenvino_tokenizers.dylib"}
    factory = NodeFactory()
    factory.add_extension(Path(found.origin).parent / "lib" / names.get(sys.platform, "libopenvino_tokenizers.so"))
    return factory
