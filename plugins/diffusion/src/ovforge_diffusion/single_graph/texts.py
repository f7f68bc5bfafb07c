"""Prompts inside a graph: strings to token ids, by CLIP's OpenVINO tokenizer or by a graph of any other's file, and ids
to what text encoders say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino import opset15

from ovforge.errors import ModelError
from ovforge.model import ModelBundle, core
from ovforge_diffusion.architectures.base import tokenizer_of
from ovforge_diffusion.sequence import SequenceTokenizer
from ovforge_diffusion.single_graph.joining import (
    Joined,
    constant,
    converted,
    join,
    longer,
    part,
    reshaped,
    rows_of,
    shape_of,
    zeros,
)
from ovforge_diffusion.single_graph.loops import Body
from ovforge_diffusion.single_graph.lower_case import lowered
from ovforge_diffusion.single_graph.token_graph import put_between, token_graph
from ovforge_diffusion.text import DEFAULT_LENGTH, SKIPPED, fitted, penultimate_output
from ovforge_diffusion.tokenizer import FileTokenizer, GraphTokenizer, Learned, has_files

__all__ = ["Frame", "Texts", "opened"]

Ids = NDArray[np.int64]
Reader = Callable[[Sequence[str], int], Ids]
"""Returns the token ids of texts that the pipeline itself would read, (texts, length), of a length."""

_SAMPLES = (
    "a beautiful pink unicorn, 8k", "", "A Photo of the Eiffel Tower at night -- highly detailed (35mm), f/1.8",
    "it's 3 o'clock;  they'll   say\tthat\nthe café's naïve façade costs 1234.5 €", "ein schöner Tag in München",
    "красный дом у моря", "漢字とかな", "👍 a smiling cat 🐈", "word" * 40, "the quick brown fox jumps, " * 20,
    "  two  blanks \n\n and   a line\u3000", "ﬁne print ½",
)  # fmt: skip
"""Texts that a tokenizer's graph must read as the pipeline does: case, accents, scripts, signs, and too many words."""

_CAPITALS = (" \x1c İSTANBUL'DA, ΟΔΥΣΣΕΥΣ: ΣΑΣ. ΑΣ.Β Σ ", "ǅUNGLA ẞ Ⅷ ÉTÉ ЁЛКА ԱԲԳ Ⴀ 𐐀 \u212a \u212b", " \n\t\x85")
"""Further ones, for models that read in lower case."""


@dataclass(frozen=True)
class _Row:
    """How a text encoder takes tokens: so many, filled up with `padding`, and cut before `end` if it ends texts."""

    length: int
    padding: int
    end: int | None


@dataclass(frozen=True)
class Frame:
    """How a prompt is read: between constant texts, in lower case without blanks around it, and how much of it.

    `ask` puts a prompt between the texts as the pipeline does, `length` are its tokens with those of the texts.
    """

    before: str = ""
    after: str = ""
    ask: Callable[[str], str] = str
    lower: bool = False
    length: int | None = None

    def around(self, text: ov.Output) -> ov.Output:
        """Return what is read of strings, (texts,)."""
        return put_between(self.before, lowered(text) if self.lower else text, self.after)

    def asked(self, text: str) -> str:
        """Return what the pipeline reads of a text."""
        return self.ask(text.lower().strip() if self.lower else text)


@dataclass(frozen=True)
class Texts:
    """The prompts of a graph: strings, (pictures,), or of those to avoid and those to follow, one after the other.

    `examples` are further texts whose tokens are checked.
    """

    bundle: ModelBundle
    strings: Sequence[ov.Output]
    pictures: int | None
    learned: dict[str, Learned]
    examples: Sequence[str]

    @property
    def rows(self) -> ov.Output:
        """How many texts there are, int64 (1,)."""
        each = rows_of(self.strings[0])
        return each if len(self.strings) == 1 else ops.multiply(each, constant(len(self.strings))).output(0)

    def clip(self, role: str, *, penultimate: bool, pooled: str | None = None) -> tuple[ov.Output, ov.Output | None]:
        """Return states of one of CLIP's text encoders, (rows, tokens, width), and its output `pooled`."""
        model, tokenizer = self.bundle.models[role], tokenizer_of(role)
        length = _tokens_of(model, role) or DEFAULT_LENGTH
        reader = self._clip_reader(tokenizer)
        row = _Row(length, reader.padding, reader.end)
        ids, _ = self._ids(
            self._tokenizer(tokenizer), tokenizer, lambda texts, length: fitted(reader, texts, length), row
        )
        made = join(model, role, {"input_ids": ids})
        name = penultimate_output(made.ports) if penultimate else "last_hidden_state"
        states = self._with_skipped(made, made.named(name))
        if self.pictures is not None:  # so that what follows is compiled for one shape
            states = reshaped(states, (self.pictures * len(self.strings), length, -1))
        return states, None if pooled is None else made.named(pooled)

    def sequence(
        self,
        role: str,
        length: int,
        frames: Sequence[Frame] = (),
        outputs: Sequence[str] = ("last_hidden_state",),
        *,
        both: bool = False,
    ) -> tuple[ov.Output, ov.Output]:
        """Return states of a text encoder other than CLIP, (rows, length, width), and which count, i64 (rows, length).

        `frames` say how each of the strings is read, of which a length of its own is not more than `length`; several
        `outputs` stand one beside the other. `both` says that the encoder reads both ways, and must not see what fills
        up a prompt: each prompt's own tokens are then read by themselves, as the pipeline does.
        """
        model, tokenizer = self.bundle.models[role], tokenizer_of(role)
        words = self.bundle.configs.get(role, {}).get("vocab_size")
        reader = SequenceTokenizer(self.bundle.assets, tokenizer, words)
        graph = token_graph(self.bundle.assets, tokenizer)

        def read(texts: Sequence[str], length: int) -> Ids:
            return np.stack([reader.padded(reader.cut(text, length)[0], length) for text in texts])

        padding = int(reader.padded(np.zeros(0, np.int64), 1)[0])
        ids, mask = self._ids(graph.model, tokenizer, read, _Row(length, padding, graph.end), frames, graph.words)
        read_all = _read_each if both else _read
        return read_all(model, role, ids, mask, outputs), mask

    def _with_skipped(self, made: Joined, states: ov.Output) -> ov.Output:
        """Return states: those of the prompts to follow leave layers out, if the transform clip-skip is there."""
        if SKIPPED not in made.names:
            return states
        skipped = made.named(SKIPPED)
        if len(self.strings) == 1:
            return skipped
        halves = [ops.split(value, constant(0), 2).output(half) for half, value in enumerate((states, skipped))]
        return ops.concat(halves, 0).output(0)

    def _clip_reader(self, role: str) -> FileTokenizer | GraphTokenizer:
        learned = self.learned.get(role)
        if has_files(self.bundle.assets, role):
            return FileTokenizer(self.bundle.assets, role, learned)
        return GraphTokenizer(core().compile_model(self._tokenizer(role), "CPU"), learned)

    def _tokenizer(self, role: str) -> ov.Model:
        if role not in self.bundle.models:
            raise ModelError(
                "the model has no OpenVINO tokenizer, which reads prompts inside the graph",
                where=role,
                hint="Convert the model with ovforge or optimum-intel, which write one.",
            )
        return self.bundle.models[role]

    def _ids(
        self,
        model: ov.Model,
        role: str,
        read: Reader,
        row: _Row,
        frames: Sequence[Frame] = (),
        words: Sequence[str] = (),
    ) -> tuple[ov.Output, ov.Output]:
        """Return token ids and which of them count, both int64 (rows, length), checked against the pipeline's."""
        frames = frames or [Frame()] * len(self.strings)
        lengths = [frame.length or row.length for frame in frames]
        for frame, own in dict.fromkeys(zip(frames, lengths, strict=True)):
            texts = [
                *_SAMPLES,
                *(_CAPITALS if frame.lower else ()),
                *self.examples,
                *self.learned.get(role, ()),
                *words,
            ]
            _check_tokens(model, role, read, replace(row, length=own), texts, frame)
        each = [
            [longer(value, row.length - own) for value in _fitted(model, role, text, replace(row, length=own), frame)]
            for text, frame, own in zip(self.strings, frames, lengths, strict=True)
        ]
        ids, mask = (ops.concat([pair[n] for pair in each], 0).output(0) for n in (0, 1))
        if self.pictures is None:
            return ids, mask
        shape = (self.pictures * len(self.strings), row.length)
        return reshaped(ids, shape), reshaped(mask, shape)


def _read(model: ov.Model, role: str, ids: ov.Output, mask: ov.Output, outputs: Sequence[str]) -> ov.Output:
    """Return a text encoder's states of token ids, (rows, tokens): several outputs, one beside the other."""
    takes_mask = any("attention_mask" in port.names for port in model.inputs)
    made = join(model, role, {"input_ids": ids, **({"attention_mask": mask} if takes_mask else {})})
    states = [made.named(name) for name in outputs]
    return states[0] if len(states) == 1 else ops.concat(states, 2).output(0)


def _read_each(model: ov.Model, role: str, ids: ov.Output, mask: ov.Output, outputs: Sequence[str]) -> ov.Output:
    """Return the same, of the tokens of each row that `mask` counts, and zeros after them."""
    if (fixed := _tokens_of(model, role)) is not None:
        raise ModelError(
            f"it was converted for {fixed} tokens, and a graph reads prompts as long as they are",
            where=role,
            hint="Convert it for any length.",
        )
    body = Body()
    own_ids, own_mask = body.sliced_value(ids), body.sliced_value(mask)
    count = ops.reduce_sum(own_mask, constant([0, 1]), False)
    begin, end, step, axis = constant([0]), ops.unsqueeze(count, constant([0])), constant([1]), constant([1])
    own_ids, seen = (ops.slice(value, begin, end, step, axis).output(0) for value in (own_ids, own_mask))
    states = converted(_read(model, role, own_ids, seen, outputs), ov.Type.f32)
    missing = ops.subtract(part(shape_of(own_mask), 1, 2, 0), end)
    room = ops.concat([constant([1]), missing, part(shape_of(states), 2, 3, 0)], 0).output(0)
    return body.rows(rows_of(ids), ops.concat([states, zeros(room)], 1).output(0))


def _tokens_of(model: ov.Model, role: str) -> int | None:
    """Return how many tokens a text encoder takes; None if any number."""
    for port in model.inputs:
        if "input_ids" in port.names:
            tokens = port.get_partial_shape()[1]
            return int(tokens.get_length()) if tokens.is_static else None
    raise ModelError("the text encoder has no input 'input_ids'", where=role, hint="Convert the model again.")


def _fitted(model: ov.Model, role: str, text: ov.Output, row: _Row, frame: Frame) -> tuple[ov.Output, ov.Output]:
    """Return a tokenizer's ids and mask of strings, both int64 (strings, length): cut before the end, or filled up."""
    read = frame.around(_and_a_word(text))
    # A tokenizer's states are options, such as whether to cut, that are made when it is converted.
    made = join(model, role, {next(iter(model.inputs[0].names)): read}, settle=True)
    target = ops.concat([rows_of(text), constant([row.length])], 0)
    # One more row's length is put behind, so that what is cut off, or is not there, has a place to be looked at.
    ids, mask = (
        ops.concat(
            [part(converted(made.named(name), ov.Type.i64), 0, -1, 0), ops.broadcast(constant(value), target)], 1
        )
        for name, value in (("input_ids", row.padding), ("attention_mask", 0))
    )
    ids = ops.select(ops.equal(mask, constant(1)), ids, constant(row.padding)).output(0)
    last = part(ids, row.length - 1, row.length, 1)
    if row.end is not None:
        goes_on = ops.equal(part(mask, row.length, row.length + 1, 1), constant(1))
        last = ops.select(goes_on, constant([row.end]), last).output(0)
    return ops.concat([part(ids, 0, row.length - 1, 1), last], 1).output(0), part(mask, 0, row.length, 1)


def opened(text: ov.Output) -> ov.Output:
    """Return strings, (texts,), of which no shape says how many there are, even if that is known.

    Tokenizers' operations make more and fewer pieces than there are strings, and would take a known number for that of
    the pieces.
    """
    begins, ends, letters = opset15.string_tensor_unpack(text).outputs()
    # All strings are marked, and no letter is: no shape says how many marks there are.
    none, each = ops.less(letters, ops.constant(np.uint8(0))), ops.greater_equal(begins, ops.constant(np.int32(0)))
    marks = ops.squeeze(ops.non_zero(ops.concat([none, each], 0), "i32"), constant([0]))
    places = ops.subtract(marks, _letters_of(letters))
    begins, ends = (ops.gather(value, places, constant(0)).output(0) for value in (begins, ends))
    return opset15.string_tensor_pack(begins, ends, letters).output(0)


def _and_a_word(text: ov.Output) -> ov.Output:
    """Return strings with one more behind them, which is not empty: of empty ones alone, tokenizers make one row."""
    begins, ends, letters = opset15.string_tensor_unpack(text).outputs()
    size = _letters_of(letters)
    begins = ops.concat([begins, size], 0).output(0)
    ends = ops.concat([ends, ops.add(size, ops.constant(np.int32(1)))], 0).output(0)
    letters = ops.concat([letters, ops.constant(np.frombuffer(b"a", np.uint8))], 0).output(0)
    return opset15.string_tensor_pack(begins, ends, letters).output(0)


def _letters_of(letters: ov.Output) -> ov.Output:
    """Return how many bytes there are, int32 (1,)."""
    return ops.convert(shape_of(letters), "i32").output(0)


def _check_tokens(model: ov.Model, role: str, read: Reader, row: _Row, texts: Sequence[str], frame: Frame) -> None:
    """Raise ModelError if a tokenizer's graph reads a text in another way than the pipeline does."""
    strings = ops.parameter([-1], ov.Type.string)
    ids, _ = _fitted(model, role, strings.output(0), row, frame)
    try:
        compiled = core().compile_model(ov.Model([ids], [strings], role), "CPU")
        found = compiled([ov.Tensor(np.array(list(texts), dtype=str))])[0]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"OpenVINO cannot run the tokenizer's graph: {reason}", where=role, hint="Fetch the tokenizer again."
        ) from error
    wanted = read([frame.asked(text) for text in texts], row.length)
    for text, theirs, ours in zip(texts, wanted, found, strict=True):
        if (theirs != ours).any():
            raise ModelError(
                f"the tokenizer's graph reads {text[:40]!r} as other tokens than the pipeline does",
                where=role,
                hint="Run the pipeline itself. If it is CLIP's, convert the model again, with the newest "
                "openvino_tokenizers.",
            )
