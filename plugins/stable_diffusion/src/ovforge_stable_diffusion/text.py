"""Prompts to embeddings, and what of a prompt did not fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge.results import Timings

__all__ = ["TextEncoder"]

Ids = NDArray[np.int64]
DEFAULT_LENGTH = 77
"""CLIP's number of tokens, for text encoders whose input leaves it open."""


class TextEncoder:
    """The tokenizer and the text encoder of CLIP (Radford et al. 2021), as OpenVINO models.

    Tokenizers of optimum-intel neither pad nor cut to the encoder's length, ours do both: rows are made to fit here.
    """

    def __init__(self, tokenizer: ov.CompiledModel, encoder: ov.CompiledModel) -> None:
        self._tokenizer = tokenizer.create_infer_request()
        self._encoder = encoder.create_infer_request()
        self._tokens = _port(tokenizer.outputs, "input_ids", "tokenizer")
        self._input = _port(encoder.inputs, "input_ids", "text encoder")
        self._output = _port(encoder.outputs, "last_hidden_state", "text encoder")
        length = self._input.get_partial_shape()[1]
        self._length = length.get_length() if length.is_static else DEFAULT_LENGTH
        # The tokenizer itself shows its end and padding tokens: nothing, beside something longer.
        nothing = self._raw(["", "a a a a"])[0]
        self._end, self._padding = int(nothing[1]), int(nothing[-1])

    def encode(self, prompts: Sequence[str], timings: Timings) -> NDArray[np.float32]:
        """Return the last hidden states, float32 (prompts, tokens, width)."""
        with timings.span("text_encoder"):
            with timings.span("text_encoder.tokenizer"):
                ids = self._fit(self._raw(prompts))
            self._encoder.infer({self._input: ids.astype(self._input.get_element_type().to_dtype(), copy=False)})
            return self._encoder.get_tensor(self._output).data.astype(np.float32)

    def cut(self, prompt: str) -> str | None:
        """Return the end of `prompt` that does not fit, from the first word that does not fit whole.

        CLIP joins no tokens across white space, so the words' lengths add up.
        """
        room = self._length - 2
        if self._content(self._raw([prompt])[0]) < room:
            return None
        words = prompt.split()
        used = 0
        for position, (word, row) in enumerate(zip(words, self._raw(words), strict=True)):
            length = self._content(row)
            used += length
            if used > room or (length == room and self._goes_on(word)):
                return " ".join(words[position:])
        return None

    def _goes_on(self, word: str) -> bool:
        """Say whether a word that fills every place goes on: one more letter then changes no token that is seen.

        Where it ends with the last place, that letter moves the mark of the word's end.
        """
        whole, longer = self._raw([word])[0], self._raw([word + word[-1]])[0]
        return bool(np.array_equal(whole, longer))

    def _content(self, row: Ids) -> int:
        """Return how many tokens lie between the start token and the first end token."""
        return int(np.flatnonzero(row == self._end)[0]) - 1

    def _fit(self, rows: Ids) -> Ids:
        """Return rows of the encoder's length: longer ones are cut before their end token, shorter ones padded."""
        fitted = np.full((len(rows), self._length), self._padding, np.int64)
        for target, row in zip(fitted, rows, strict=True):
            used = min(self._content(row) + 1, self._length - 1)
            target[:used] = row[:used]
            target[used] = self._end
        return fitted

    def _raw(self, prompts: Sequence[str]) -> Ids:
        """Return what the tokenizer gives, int64 (prompts, tokens)."""
        self._tokenizer.infer({0: ov.Tensor(np.array(list(prompts), dtype=str))})
        return np.array(self._tokenizer.get_tensor(self._tokens).data, dtype=np.int64)


def _port(ports: Sequence[ov.ConstOutput], name: str, model: str) -> ov.ConstOutput:
    for port in ports:
        if name in port.names:
            return port
    found = ", ".join(sorted(name for port in ports for name in port.names)) or "no named ones"
    raise ModelError(f"the {model} has no {name!r}", hint=f"It has: {found}. Convert the model again.")
