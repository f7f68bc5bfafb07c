"""Prompts to embeddings, and what of a prompt did not fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from ovforge.errors import ModelError
from ovforge.results import Timings

__all__ = ["TextEncoder"]


class TextEncoder:
    """The tokenizer and the text encoder of CLIP (Radford et al. 2021), as OpenVINO models."""

    def __init__(self, tokenizer: ov.CompiledModel, encoder: ov.CompiledModel) -> None:
        self._tokenizer = tokenizer.create_infer_request()
        self._encoder = encoder.create_infer_request()
        if "input_ids" not in {name for port in encoder.inputs for name in port.names}:
            raise ModelError("the text encoder has no input 'input_ids'", hint="Convert the model again.")
        self._ids_type = encoder.input("input_ids").get_element_type().to_dtype()
        self._length = encoder.input("input_ids").get_partial_shape()[1]
        names = {name for port in encoder.outputs for name in port.names}
        self._output = "last_hidden_state" if "last_hidden_state" in names else 0

    def encode(self, prompts: Sequence[str], timings: Timings) -> NDArray[np.float32]:
        """Return the last hidden states, float32 (prompts, tokens, width)."""
        with timings.span("text_encoder"):
            with timings.span("text_encoder.tokenizer"):
                ids = self._ids(prompts)
            self._encoder.infer({"input_ids": ids.astype(self._ids_type, copy=False)})
            return self._encoder.get_tensor(self._encoder_output()).data.astype(np.float32)

    def _encoder_output(self) -> ov.ConstOutput:
        return self._encoder.model_outputs[0] if self._output == 0 else self._named_output()

    def _named_output(self) -> ov.ConstOutput:
        return next(port for port in self._encoder.model_outputs if self._output in port.names)

    def cut(self, prompt: str) -> str | None:
        """Return the end of `prompt` that the tokenizer cuts off, from the first word that does not fit whole.

        CLIP joins no tokens across white space, so the words' lengths add up.
        """
        ids = self._ids([prompt])[0]
        room = self._content(ids)
        if room < len(ids) - 2:
            return None
        words = prompt.split()
        used = 0
        for position, (word, length) in enumerate(zip(words, self._lengths(words), strict=True)):
            used += length
            if used > room or (length == room and self._is_longer(word)):
                return " ".join(words[position:])
        return None

    def _lengths(self, words: Sequence[str]) -> list[int]:
        return [self._content(row) for row in self._ids(words)]

    def _is_longer(self, word: str) -> bool:
        """Say whether a word that fills every place goes on: its last letter then changes no token that is seen."""
        return bool(np.array_equal(self._ids([word])[0], self._ids([word[:-1]])[0]))

    def _content(self, ids: NDArray[np.int64]) -> int:
        """Return how many tokens lie between the start token and the first end token."""
        ends = np.flatnonzero(ids == ids[-1])
        return int(ends[0]) - 1

    def _ids(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Return token numbers, int64 (prompts, tokens)."""
        self._tokenizer.infer({0: ov.Tensor(np.array(list(prompts), dtype=str))})
        port = next(port for port in self._tokenizer.model_outputs if "input_ids" in port.names)
        ids = np.array(self._tokenizer.get_tensor(port).data, dtype=np.int64)
        if self._length.is_static and ids.shape[1] != self._length.get_length():
            raise ModelError(
                f"the tokenizer gives {ids.shape[1]} tokens, and the text encoder takes {self._length}",
                where="tokenizer",
                hint="Convert tokenizer and text encoder together.",
            )
        return ids
