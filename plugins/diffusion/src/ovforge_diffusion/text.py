"""Prompts to embeddings, and what of a prompt did not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge.store import parse_object
from ovforge_diffusion.network import not_finite
from ovforge_diffusion.prompts import Span, parse
from ovforge_diffusion.tokenizer import END, Learned, Piece, Tokenizer

__all__ = [
    "DEFAULT_LENGTH",
    "LAYER",
    "SKIPPED",
    "TextEncoder",
    "TextEncoders",
    "TextStates",
    "fitted",
    "learned_tokens",
    "penultimate_output",
]

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
DEFAULT_LENGTH = 77
"""CLIP's number of tokens, for text encoders whose input leaves it open."""

WRAPPED = 20
"""Tokens after the last comma that move to the next chunk, if they do not fit: the web UI's own default."""

LAYER = "hidden_states."
"""What the outputs before and after each layer are called, before their number."""

SKIPPED = "skipped_states"
"""The output that stands for the text states of prompts, where the transform clip-skip made one."""

LEARNED = "learned_tokens.json"
"""The asset in which a transform leaves the words that it taught: {tokenizer's role: {word: [ids of its vectors]}}."""


def learned_tokens(assets: Mapping[str, bytes]) -> dict[str, Learned]:
    """Return the words that each tokenizer was taught, with their ids; {} if there are none."""
    try:
        roles = parse_object(assets.get(LEARNED, b"{}"), LEARNED)
        return {
            role: {word: [int(id_) for id_ in ids] for word, ids in taught.items()} for role, taught in roles.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"is not a list of learned words: {error}", where=LEARNED) from error


@dataclass(frozen=True)
class TextStates:
    """What text encoders make of prompts: states, (prompts, tokens, width), and what each of them pools, or None."""

    states: Array
    pooled: list[Array | None]


class TextEncoder:
    """A tokenizer and the text encoder of CLIP (Radford et al. 2021), an OpenVINO model.

    With `penultimate`, the states before the last layer are returned, not normalized, as SDXL takes them. `learned` are
    words that were taught beyond CLIP's own, `pooled` is the output for a whole prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: ov.CompiledModel,
        *,
        penultimate: bool,
        learned: Learned | None = None,
        pooled: str = "text_embeds",
    ) -> None:
        self.learned = learned or {}
        self._tokenizer = tokenizer
        self._comma = next((piece.ids for piece in tokenizer.pieces(",")), ())
        self._encoder = encoder.create_infer_request()
        self._input = _port(encoder.inputs, "input_ids", "text encoder")
        name = penultimate_output(encoder.outputs) if penultimate else "last_hidden_state"
        self._output = _port(encoder.outputs, name, "text encoder")
        self._pooled = next((port for port in encoder.outputs if pooled in port.names), None)
        self._skipped = next((port for port in encoder.outputs if SKIPPED in port.names), None)
        length = self._input.get_partial_shape()[1]
        self._length = length.get_length() if length.is_static else DEFAULT_LENGTH

    @property
    def room(self) -> int:
        """How many tokens fit between the first and the last."""
        return self._length - 2

    def fitted(self, prompts: Sequence[str]) -> Ids:
        """Return a row of token ids for each prompt, (prompts, length): cut before its end token, or padded."""
        return fitted(self._tokenizer, prompts, self._length)

    def weighted(self, spans: Sequence[Span], *, chunks: bool, wrap: bool = False) -> tuple[Ids, Array]:
        """Return token ids and weights, both (chunks, length); one chunk, cut, if `chunks` is false.

        The vectors of a learned word stay in one chunk, unless it has more of them than a chunk has places. With
        `wrap`, what stands after a comma moves to the next chunk if it is short and does not fit whole. Source: the web
        UI's `sd_hijack_clip.tokenize_line`.
        """
        content: list[list[tuple[int, float]]] = [[]]
        comma: int | None = None  # place of the last one in its chunk
        for piece, span, _ in self._pieces(spans):
            if piece is None:
                content.append([])
                comma = None
                continue
            if piece.ids == self._comma:
                comma = len(content[-1])
            elif wrap and comma is not None and len(content[-1]) == self.room and self.room - comma <= WRAPPED:
                content.append(content[-1][comma + 1 :])
                del content[-2][comma + 1 :]
                comma = None
            if len(piece.ids) > 1 and len(content[-1]) + len(piece.ids) > self.room:
                content.append([])
                comma = None
            for token in piece.ids:
                if len(content[-1]) == self.room:
                    content.append([])
                    comma = None
                content[-1].append((token, span.weight))
        content = content if chunks else content[:1]
        ids = np.stack([_row(self._tokenizer, [token for token, _ in tokens], self._length) for tokens in content])
        weights = np.ones((len(content), self._length), np.float32)
        for number, tokens in enumerate(content):
            weights[number, 1 : len(tokens) + 1] = [weight for _, weight in tokens]
        return ids, weights

    def _pieces(self, spans: Sequence[Span]) -> Iterator[tuple[Piece | None, Span, int]]:
        """Give each piece, its span, and where the span begins in the joined text; None ends a chunk."""
        begin = 0
        for span in spans:
            if span.ends_chunk:
                yield None, span, begin
            for piece in self._tokenizer.pieces(span.text):
                yield piece, span, begin
            begin += len(span.text)

    def run(self, ids: Ids, whole: NDArray[np.bool_]) -> tuple[Array, Array | None]:
        """Return states, float32 (rows, tokens, width), and pooled ones, (rows, width), where the model has them.

        `whole` (rows,) says which rows go through all layers, where the model leaves some out for the others.
        """
        self._encoder.infer({self._input: ids.astype(self._input.get_element_type().to_dtype(), copy=False)})
        states = self._encoder.get_tensor(self._output).data.astype(np.float32)
        if self._skipped is not None and not whole.all():
            states[~whole] = self._encoder.get_tensor(self._skipped).data[~whole]
        if not np.isfinite(states).all():
            raise not_finite("text_encoder")
        pooled = None if self._pooled is None else self._encoder.get_tensor(self._pooled).data.astype(np.float32)
        return states, pooled

    def cut(self, spans: Sequence[Span]) -> str | None:
        """Return the end of a prompt that does not fit into one chunk, from the first word that does not fit whole."""
        text = "".join(span.text for span in spans)
        used = 0
        for piece, _, begin in self._pieces(spans):
            used += len(piece.ids) if piece else 0
            if piece and used > self.room:
                before = text[: begin + piece.begin]
                word = len(before) - len(before.split()[-1]) if before and not before[-1].isspace() else len(before)
                return " ".join(text[word:].split())
        return None

    def too_long(self, spans: Sequence[Span]) -> str | None:
        """Return the first learned word that has more vectors than a chunk has places."""
        for piece, span, _ in self._pieces(spans):
            if piece and len(piece.ids) > self.room:
                return span.text[piece.begin : piece.end]
        return None

    def ends_early(self, spans: Sequence[Span]) -> bool:
        """Say whether a prompt itself holds the token that marks the end."""
        return any(piece and self._tokenizer.end in piece.ids for piece, _, _ in self._pieces(spans))

    def learned_in(self, ids: Ids) -> list[str]:
        """Return the learned words that token ids hold."""
        there = set(ids.ravel().tolist())
        return [word for word, own in self.learned.items() if there.intersection(own)]


def fitted(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> Ids:
    """Return a row of token ids for each prompt, (prompts, length): cut before its end token, or padded."""
    rows = [[id_ for piece in tokenizer.pieces(text) for id_ in piece.ids] for text in prompts]
    return np.stack([_row(tokenizer, row[: length - 2], length) for row in rows])


def _row(tokenizer: Tokenizer, content: Sequence[int], length: int) -> Ids:
    """Return what an encoder reads, (length,): the start token, content, the end token, padding."""
    row = np.full(length, tokenizer.padding, np.int64)
    row[: len(content) + 2] = [tokenizer.start, *content, tokenizer.end]
    return row


class TextEncoders:
    """One text encoder, or the two of SDXL, whose states stand side by side. Warnings call them `reader`."""

    def __init__(
        self, encoders: Sequence[TextEncoder], *, weighted: bool, chunks: bool, reader: str = "the model"
    ) -> None:
        self._encoders, self._reader = list(encoders), reader
        self._weighted, self._chunks, self._wrap = weighted, chunks, weighted and chunks

    def encode(
        self, prompts: Sequence[tuple[str, ...]], timings: Timings, whole: Sequence[bool] = ()
    ) -> tuple[TextStates, list[str]]:
        """Return states, and warnings of what did not fit.

        A prompt is a text for each text encoder. `whole` says which prompts no layer is left out for: the negative
        ones; by default none.
        """
        marks = np.array(whole, bool) if whole else np.zeros(len(prompts), bool)
        warnings: list[str] = []
        states: list[Array] = []
        pooled: list[Array | None] = []
        with timings.span("text_encoder"):
            for number, encoder in enumerate(self._encoders):
                # A model that has the second text encoder alone, as SDXL's refiner, takes the first prompt there.
                texts = [each[number] for each in prompts]
                made, whole_prompts = self._run(encoder, texts, marks, timings)
                states.append(made)
                pooled.append(whole_prompts)
                warnings += [note for text in texts for note in self._notes(encoder, text) if note not in warnings]
        length = max(each.shape[1] for each in states)
        states = [np.pad(each, ((0, 0), (0, length - each.shape[1]), (0, 0))) for each in states]
        return TextStates(np.concatenate(states, axis=2), pooled), warnings

    def learned(self, prompts: Sequence[tuple[str, ...]]) -> list[list[str]]:
        """Return the learned words in what the text encoders read of each prompt, cut as it is."""
        found: list[dict[str, None]] = [{} for _ in prompts]
        for number, encoder in enumerate(self._encoders):
            for words, pair in zip(found, prompts, strict=True):
                words |= dict.fromkeys(encoder.learned_in(self._ids(encoder, pair[number])))
        return [list(words) for words in found]

    def _ids(self, encoder: TextEncoder, text: str) -> Ids:
        if self._weighted or self._chunks:
            return encoder.weighted(self._spans(text), chunks=self._chunks, wrap=self._wrap)[0]
        return encoder.fitted([text])

    def _run(
        self, encoder: TextEncoder, texts: list[str], whole: NDArray[np.bool_], timings: Timings
    ) -> tuple[Array, Array | None]:
        if not (self._weighted or self._chunks):
            with timings.span("text_encoder.tokenizer"):
                ids = encoder.fitted(texts)
            return encoder.run(ids, whole)
        with timings.span("text_encoder.tokenizer"):
            rows = [encoder.weighted(self._spans(text), chunks=self._chunks, wrap=self._wrap) for text in texts]
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

    def _notes(self, encoder: TextEncoder, text: str) -> Iterator[str]:
        """Give warnings of what a prompt loses."""
        spans = self._spans(text)
        if not self._chunks and (cut := encoder.cut(spans)):
            yield f"the prompt is longer than {self._reader} reads; cut off: {cut!r}"
        if self._chunks and (word := encoder.too_long(spans)):
            yield f"the word {word!r} has more vectors than a chunk has places, and goes on in the next one"
        if encoder.ends_early(spans):
            yield (
                f"the prompt has {END} in it, the token at which the text encoder takes a prompt to end: "
                "what follows may have little effect, or none"
            )


def _emphasize(states: Array, weights: Array) -> None:
    """Multiply states (tokens, width) by the tokens' weights, in place, and bring their mean back.

    Source: the web UI's `sd_emphasis.EmphasisOriginal`.
    """
    if (weights == 1).all():
        return
    before = states.mean()
    states *= weights[:, None]
    states *= before / states.mean()


def penultimate_output(ports: Sequence[ov.ConstOutput]) -> str:
    """Return the name of the output for the states that go into the last layer. Raises ModelError if there is none."""
    names = [name for port in ports for name in port.names if name.startswith(LAYER)]
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
