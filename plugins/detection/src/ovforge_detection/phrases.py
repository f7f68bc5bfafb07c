"""Texts into phrases, tokens and masks, as GroundingDINO reads them; text features are kept for texts seen before."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError
from ovforge.model import DetectorSpec, Timings
from ovforge.store import parse_object

__all__ = ["Passage", "TextReader", "Wanted", "phrase_masks", "phrase_of", "wanted"]

REMEMBERED = 64
"""How many texts' features are kept."""

Ids = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Passage:
    """A text that a detector reads at once, or a part of one that is too long for that.

    All but `tokens` and `phrases` are inputs of the detector, for one picture. `phrases` has the number of the phrase
    that each token belongs to, int64 (tokens,), -1 where it belongs to none; `tokens` are the vocabulary's writing.
    """

    features: NDArray[np.float32]
    mask: Bools
    self_mask: Bools
    positions: Ids
    phrases: Ids
    tokens: Sequence[str]
    ids: Ids

    def padded(self, length: int) -> Passage:
        """Return it with `length` tokens, the last of which are padding, which nothing looks at."""
        more = length - len(self.tokens)
        if more <= 0:
            return self
        whole = np.eye(length, dtype=bool)[None]
        whole[:, : len(self.tokens), : len(self.tokens)] = self.self_mask
        return Passage(
            np.pad(self.features, ((0, 0), (0, more), (0, 0))),
            np.pad(self.mask, ((0, 0), (0, more))),
            whole,
            np.pad(self.positions, ((0, 0), (0, more))),
            np.pad(self.phrases, (0, more), constant_values=-1),
            [*self.tokens, *["[PAD]"] * more],
            np.pad(self.ids, ((0, 0), (0, more))),
        )


@dataclass(frozen=True)
class Wanted:
    """What to look for: `names` as they come back in results, and `phrases` as the models were trained on them.

    Phrases are in lower case, without full stops, and come once; `firsts` has the place of each among the names, and
    `notes` say what was changed.
    """

    names: Sequence[str]
    phrases: Sequence[str]
    firsts: Sequence[int]
    notes: Sequence[str] = ()


def wanted(text: str | Sequence[str]) -> Wanted:
    """Return what a text names: phrases that full stops end, or each item of a list, whose names stay as they are.

    Raises InputError if there is nothing.
    """
    if isinstance(text, str):
        parts = [phrase_of(part) for part in re.split(r"[.?]", text)]
        names = list(dict.fromkeys(part for part in parts if part))
        phrases = names
    else:
        names = list(text)
        phrases = [phrase_of(name) for name in names]
    if not names or not all(phrases):
        missing = next((repr(name) for name, phrase in zip(names, phrases, strict=True) if not phrase), "the text")
        raise InputError(
            f"there is nothing to look for in {missing}", where="text", hint='Name things: "horse. clouds."'
        )
    once = list(dict.fromkeys(phrases))
    read = " ".join(f"{phrase}." for phrase in once)
    same = text == read if isinstance(text, str) else names in (once, [f"{phrase}." for phrase in once])
    notes = () if same else (f"the text is read as: {read}",)
    return Wanted(names, once, [phrases.index(phrase) for phrase in once], notes)


def phrase_of(text: str) -> str:
    """Return a name as a phrase: in lower case, blanks joined, without full stops."""
    return " ".join(re.sub(r"[.?]", " ", text.lower()).split())


def phrase_masks(ids: Ids, delimiters: Sequence[int]) -> tuple[Bools, Ids]:
    """Return which tokens see each other, boolean (1, tokens, tokens), and positions in phrases, int64 (1, tokens).

    Tokens see those of their own phrase, to which the delimiter at its end belongs. Source: GroundingDINO's
    `generate_masks_with_special_tokens_and_transfer_map`. `ids` is (tokens,).
    """
    count = len(ids)
    mask, positions = np.eye(count, dtype=bool), np.zeros(count, np.int64)
    before = 0
    for end in np.flatnonzero(np.isin(ids, delimiters)):
        if 0 < end < count - 1:
            mask[before + 1 : end + 1, before + 1 : end + 1] = True
            positions[before + 1 : end + 1] = np.arange(end - before)
        before = int(end)
    return mask[None], positions[None]


class TextReader:
    """The tokenizer and the text encoder of a detector that reads text."""

    def __init__(
        self,
        tokenizer: ov.CompiledModel,
        encoder: ov.CompiledModel,
        assets: Mapping[str, bytes],
        spec: DetectorSpec,
    ) -> None:
        self._tokenizer, self._encoder = tokenizer.create_infer_request(), encoder.create_infer_request()
        self._spec = spec
        self._words = _vocabulary(assets)
        self._known: OrderedDict[tuple[str, ...], list[Passage]] = OrderedDict()

    def read(self, phrases: Sequence[str], timings: Timings) -> list[Passage]:
        """Return passages of phrases, one where they fit the model's length. Texts read before are not read again.

        Raises InputError for a phrase that alone is too long.
        """
        key = tuple(phrases)
        if key not in self._known:
            with timings.span("text"):
                self._known[key] = [self._passage(phrases, part) for part in self._parts(phrases)]
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def _parts(self, phrases: Sequence[str]) -> list[list[int]]:
        """Divide phrases, by number, among as few passages as hold them in order."""
        parts: list[list[int]] = []
        used = room = self._spec.max_tokens - 2
        for number, phrase in enumerate(phrases):
            length = len(self._ids(f"{phrase}.")) - 2
            if length > room:
                raise InputError(
                    f"{phrase[:40]!r}... has {length} tokens, and the model reads {room}",
                    where="text",
                    hint="Part it by full stops.",
                )
            if used + length > room:
                parts.append([])
                used = 0
            parts[-1].append(number)
            used += length
        return parts

    def _passage(self, phrases: Sequence[str], part: Sequence[int]) -> Passage:
        ids = self._ids(" ".join(f"{phrases[number]}." for number in part))
        self_mask, positions = phrase_masks(ids, self._spec.delimiters)
        ends = np.isin(ids, self._spec.delimiters)
        # The first delimiter begins the text; after the last phrase there is the one that ends it.
        numbers = np.cumsum(ends) - 1
        inside = ~ends & (numbers < len(part))
        phrase = np.where(inside, np.array(part)[np.minimum(numbers, len(part) - 1)], -1)
        self._encoder.infer({"input_ids": ids[None], "text_self_mask": self_mask, "text_position_ids": positions})
        features = self._encoder.get_tensor("text_features").data.astype(np.float32)
        if not np.isfinite(features).all():
            raise ModelError(
                "gave numbers that are not finite", where="text_encoder", hint="Set device.precision = 'f32'."
            )
        return Passage(
            features, np.ones((1, len(ids)), bool), self_mask, positions, phrase.astype(np.int64),
            [self._words.get(int(token), "") for token in ids], ids[None],
        )  # fmt: skip

    def _ids(self, text: str) -> Ids:
        self._tokenizer.infer({0: ov.Tensor(np.array([text], dtype=str))})
        return np.array(self._tokenizer.get_tensor("input_ids").data[0], np.int64)


def _vocabulary(assets: Mapping[str, bytes]) -> dict[int, str]:
    """Return token ids with their texts, from the tokenizer's own files."""
    try:
        if (data := assets.get("tokenizer/vocab.txt")) is not None:
            return dict(enumerate(data.decode("utf-8").splitlines()))
        vocabulary = parse_object(assets["tokenizer/tokenizer.json"], "tokenizer/tokenizer.json")["model"]["vocab"]
        return {int(number): str(token) for token, number in vocabulary.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"its vocabulary cannot be read: {error!r}", where="tokenizer", hint="It needs vocab.txt or tokenizer.json."
        ) from error
