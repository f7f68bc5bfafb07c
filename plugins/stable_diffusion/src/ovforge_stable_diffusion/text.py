"""Prompts to embeddings, and what of a prompt did not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge.store import parse_object
from ovforge_stable_diffusion.prompts import Span, parse

__all__ = ["LAYER", "SKIPPED", "Conditions", "TextEncoder", "TextEncoders", "learned_tokens"]

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
DEFAULT_LENGTH = 77
"""CLIP's number of tokens, for text encoders whose input leaves it open."""

LAYER = "hidden_states."
"""What the outputs before and after each layer are called, before their number."""

SKIPPED = "skipped_states"
"""The output that stands for the text states of prompts, where the transform clip-skip made one."""

LEARNED = "learned_tokens.json"
"""The asset in which a transform leaves the words that it taught: {tokenizer's role: {word: [ids of its vectors]}}."""

Learned = Mapping[str, Sequence[int]]


def learned_tokens(assets: Mapping[str, bytes]) -> dict[str, Learned]:
    """Return the words that each tokenizer was taught, with their ids; {} where there are none."""
    try:
        roles = parse_object(assets.get(LEARNED, b"{}"), LEARNED)
        return {
            role: {word: [int(id_) for id_ in ids] for word, ids in taught.items()} for role, taught in roles.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"is no list of learned words: {error}", where=LEARNED) from error


@dataclass(frozen=True)
class Conditions:
    """What the UNet sees of prompts: states (prompts, tokens, width), and pooled ones (prompts, width) for SDXL."""

    states: Array
    pooled: Array | None

    def rows(self, order: Sequence[int]) -> Conditions:
        """Return these rows in this order."""
        picked = list(order)
        return Conditions(self.states[picked], None if self.pooled is None else self.pooled[picked])


class TextEncoder:
    """The tokenizer and the text encoder of CLIP (Radford et al. 2021), as OpenVINO models.

    Tokenizers of optimum-intel neither pad nor cut to the encoder's length, ours do both: rows are made to fit here.
    With `penultimate`, the states before the last layer are returned, not normalized, as SDXL takes them. `learned` are
    words that were taught beyond CLIP's own.
    """

    def __init__(
        self,
        tokenizer: ov.CompiledModel,
        encoder: ov.CompiledModel,
        *,
        penultimate: bool,
        learned: Learned | None = None,
    ) -> None:
        self.learned = learned or {}
        self._tokenizer = tokenizer.create_infer_request()
        self._encoder = encoder.create_infer_request()
        self._tokens = _port(tokenizer.outputs, "input_ids", "tokenizer")
        self._input = _port(encoder.inputs, "input_ids", "text encoder")
        name = _penultimate(encoder) if penultimate else "last_hidden_state"
        self._output = _port(encoder.outputs, name, "text encoder")
        self._pooled = next((port for port in encoder.outputs if "text_embeds" in port.names), None)
        self._skipped = next((port for port in encoder.outputs if SKIPPED in port.names), None)
        length = self._input.get_partial_shape()[1]
        self._length = length.get_length() if length.is_static else DEFAULT_LENGTH
        # The tokenizer itself shows its end and padding tokens: nothing, beside something longer.
        nothing = self._raw(["", "a a a a"])[0]
        self._start, self._end, self._padding = int(nothing[0]), int(nothing[1]), int(nothing[-1])

    @property
    def room(self) -> int:
        """How many tokens fit between the first and the last."""
        return self._length - 2

    def fitted(self, prompts: Sequence[str]) -> Ids:
        """Return a row of token ids for each prompt: cut before its end token, or padded."""
        rows = self._raw(prompts)
        fitted = np.full((len(rows), self._length), self._padding, np.int64)
        for target, row in zip(fitted, rows, strict=True):
            used = min(self._content(row) + 1, self._length - 1)
            target[:used] = row[:used]
            target[used] = self._end
        return fitted

    def weighted(self, spans: Sequence[Span], *, chunks: bool) -> tuple[Ids, Array]:
        """Return token ids and weights, both (chunks, length); one chunk, cut, where `chunks` is false."""
        content: list[list[tuple[int, float]]] = [[]]
        for span in spans:
            if span.ends_chunk:
                content.append([])
            # Word by word: tokenizers cut what is longer than the encoder reads.
            for row in self._raw(span.text.split()):
                for token in row[1 : 1 + self._content(row)]:
                    if len(content[-1]) == self.room:
                        content.append([])
                    content[-1].append((int(token), span.weight))
        content = content if chunks else content[:1]
        ids = np.full((len(content), self._length), self._padding, np.int64)
        weights = np.ones((len(content), self._length), np.float32)
        for number, tokens in enumerate(content):
            used = len(tokens)
            ids[number, 0], ids[number, used + 1] = self._start, self._end
            ids[number, 1 : used + 1] = [token for token, _ in tokens]
            weights[number, 1 : used + 1] = [weight for _, weight in tokens]
        return ids, weights

    def run(self, ids: Ids, whole: NDArray[np.bool_]) -> tuple[Array, Array | None]:
        """Return states, float32 (rows, tokens, width), and pooled ones, (rows, width), where the model has them.

        `whole` (rows,) says which rows go through all layers, where the model leaves some out for the others.
        """
        self._encoder.infer({self._input: ids.astype(self._input.get_element_type().to_dtype(), copy=False)})
        states = self._encoder.get_tensor(self._output).data.astype(np.float32)
        if self._skipped is not None and not whole.all():
            states[~whole] = self._encoder.get_tensor(self._skipped).data[~whole]
        if not np.isfinite(states).all():
            raise ModelError(
                "gave numbers that are not finite",
                where="text_encoder",
                hint="Set device.precision = 'f32'; if it stays, the model's weights are damaged.",
            )
        pooled = None if self._pooled is None else self._encoder.get_tensor(self._pooled).data.astype(np.float32)
        return states, pooled

    def cut(self, prompt: str) -> str | None:
        """Return the end of `prompt` that does not fit, from the first word that does not fit whole.

        CLIP joins no tokens across white space, so the words' lengths add up.
        """
        if self._content(self._raw([prompt])[0]) < self.room:
            return None
        words = prompt.split()
        used = 0
        for position, (word, row) in enumerate(zip(words, self._raw(words), strict=True)):
            length = self._content(row)
            used += length
            if used > self.room or (length == self.room and self._goes_on(word)):
                return " ".join(words[position:])
        return None

    def _goes_on(self, word: str) -> bool:
        """Say whether a word that fills every place goes on: one more letter then changes no token that is seen.

        Where it ends with the last place, that letter moves the mark of the word's end. Learned words have no such
        mark: there, one letter less breaks a word that ends.
        """
        whole = self._raw([word])[0]
        last = int(whole[self.room])
        if any(last in ids[:-1] for ids in self.learned.values()):
            return True
        ends = any(last == ids[-1] for ids in self.learned.values())
        return bool(np.array_equal(whole, self._raw([word[:-1] if ends else word + word[-1]])[0]))

    def learned_in(self, ids: Ids) -> list[str]:
        """Return the learned words that token ids hold."""
        there = set(ids.ravel().tolist())
        return [word for word, own in self.learned.items() if there.intersection(own)]

    def _content(self, row: Ids) -> int:
        """Return how many tokens lie between the start token and the first end token."""
        return int(np.flatnonzero(row == self._end)[0]) - 1

    def cut_words(self, prompt: str) -> list[str]:
        """Return the words of `prompt` that are longer than the model reads at once."""
        words = prompt.split()
        return [
            word
            for word, row in zip(words, self._raw(words), strict=True)
            if self._content(row) >= self.room and self._goes_on(word)
        ]

    def _raw(self, prompts: Sequence[str]) -> Ids:
        """Return what the tokenizer gives, int64 (prompts, tokens)."""
        if not prompts:
            return np.empty((0, 0), np.int64)
        self._tokenizer.infer({0: ov.Tensor(np.array(list(prompts), dtype=str))})
        return np.array(self._tokenizer.get_tensor(self._tokens).data, dtype=np.int64)


class TextEncoders:
    """One text encoder, or the two of SDXL, whose states stand side by side."""

    def __init__(self, encoders: Sequence[TextEncoder], *, weighted: bool, chunks: bool) -> None:
        self._encoders = list(encoders)
        self._weighted, self._chunks = weighted, chunks

    def encode(
        self, prompts: Sequence[tuple[str, str]], timings: Timings, whole: Sequence[bool] = ()
    ) -> tuple[Conditions, list[str]]:
        """Return conditions, and warnings of what did not fit.

        A prompt is a pair: for the first text encoder, and for the second. `whole` says which prompts no layer is left
        out for: the negative ones; by default none.
        """
        marks = np.array(whole, bool) if whole else np.zeros(len(prompts), bool)
        warnings: list[str] = []
        states, pooled = [], None
        with timings.span("text_encoder"):
            for number, encoder in enumerate(self._encoders):
                # A model that has the second text encoder alone, as SDXL's refiner, takes the first prompt there.
                texts = [pair[number] for pair in prompts]
                each, pooled = self._run(encoder, texts, marks, timings)
                states.append(each)
                warnings += [said for text in texts if (said := self._cut(encoder, text)) and said not in warnings]
        length = max(each.shape[1] for each in states)
        states = [np.pad(each, ((0, 0), (0, length - each.shape[1]), (0, 0))) for each in states]
        return Conditions(np.concatenate(states, axis=2), pooled), warnings

    def learned(self, prompts: Sequence[tuple[str, str]]) -> list[list[str]]:
        """Return the learned words in what the text encoders read of each prompt, cut as it is."""
        found: list[dict[str, None]] = [{} for _ in prompts]
        for number, encoder in enumerate(self._encoders):
            for words, pair in zip(found, prompts, strict=True):
                words |= dict.fromkeys(encoder.learned_in(self._ids(encoder, pair[number])))
        return [list(words) for words in found]

    def _ids(self, encoder: TextEncoder, text: str) -> Ids:
        if self._weighted or self._chunks:
            return encoder.weighted(self._spans(text), chunks=self._chunks)[0]
        return encoder.fitted([text])

    def _run(
        self, encoder: TextEncoder, texts: list[str], whole: NDArray[np.bool_], timings: Timings
    ) -> tuple[Array, Array | None]:
        if not (self._weighted or self._chunks):
            with timings.span("text_encoder.tokenizer"):
                ids = encoder.fitted(texts)
            return encoder.run(ids, whole)
        with timings.span("text_encoder.tokenizer"):
            rows = [encoder.weighted(self._spans(text), chunks=self._chunks) for text in texts]
            # All prompts of a run get the same number of chunks: the shorter ones end with empty ones.
            empty, ones = encoder.weighted([], chunks=True)
            most = max(len(ids) for ids, _ in rows)
            rows = [
                (np.concatenate([ids, *[empty] * (most - len(ids))]), np.concatenate([w, *[ones] * (most - len(w))]))
                for ids, w in rows
            ]
        states, pooled = encoder.run(np.concatenate([ids for ids, _ in rows]), np.repeat(whole, most))
        for chunk, weights in zip(states, np.concatenate([w for _, w in rows]), strict=True):
            _emphasize(chunk, weights)
        states = states.reshape(len(texts), -1, states.shape[-1])
        # What is pooled is the first chunk of each: SDXL has one such vector a prompt.
        return states, None if pooled is None else pooled[::most]

    def _spans(self, text: str) -> list[Span]:
        spans = parse(text) if self._weighted else [Span(text)]
        if not self._chunks and any(span.ends_chunk for span in spans):
            raise InputError(
                "BREAK begins another chunk of tokens, and long prompts are cut here",
                where="prompt",
                hint='Set task.long_prompts = "chunks".',
            )
        return spans

    def _cut(self, encoder: TextEncoder, text: str) -> str | None:
        plain = "".join(span.text for span in parse(text)) if self._weighted else text
        cut = " ".join(encoder.cut_words(plain)) if self._chunks else encoder.cut(plain)
        return f"the prompt is longer than the model reads; cut off: {cut!r}" if cut else None


def _emphasize(states: Array, weights: Array) -> None:
    """Multiply states (tokens, width) by the tokens' weights, in place, and bring their mean back.

    Source: the web UI's `sd_emphasis.EmphasisOriginal`.
    """
    if (weights == 1).all():
        return
    before = states.mean()
    states *= weights[:, None]
    states *= before / states.mean()


def _penultimate(encoder: ov.CompiledModel) -> str:
    """Return the name of the states that go into the last layer."""
    names = [name for port in encoder.outputs for name in port.names if name.startswith(LAYER)]
    last = max((int(name.rpartition(".")[2]) for name in names), default=0)
    if not last:
        raise ModelError(
            "the text encoder has no output 'hidden_states.N', and this model takes the states before the last layer",
            where="text_encoder",
            hint="Convert the model as optimum-intel or ovforge does.",
        )
    return f"hidden_states.{last - 1}"


def _port(ports: Sequence[ov.ConstOutput], name: str, model: str) -> ov.ConstOutput:
    for port in ports:
        if name in port.names:
            return port
    found = ", ".join(sorted(name for port in ports for name in port.names)) or "no named ones"
    raise ModelError(f"the {model} has no {name!r}", hint=f"It has: {found}. Convert the model again.")
