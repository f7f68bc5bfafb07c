"""Text encoders that give a state for each token, such as T5 (Raffel et al. 2020), with their tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError, PluginError
from ovforge.model import Timings
from ovforge.store import parse_object
from ovforge_diffusion.network import not_finite
from ovforge_diffusion.text import LAYER, penultimate_output

if TYPE_CHECKING:
    import tokenizers

__all__ = ["SequenceEncoder", "SequenceTokenizer", "before_last", "stacked"]

Array = NDArray[np.float32]
Ids = NDArray[np.int64]


class SequenceTokenizer:
    """The tokenizer of the file tokenizer.json in the folder `role` of `assets`, as the library tokenizers reads it.

    `words` is how many the text encoder knows, if its config says so. Raises ModelError for a missing or damaged file,
    PluginError if the package tokenizers is not installed.
    """

    def __init__(self, assets: Mapping[str, bytes], role: str, words: object = None) -> None:
        self._role = role
        self._words = words if isinstance(words, int) else None
        self._reader = _read(assets, role)
        self._reader.no_truncation()
        self._reader.no_padding()
        settings = parse_object(assets.get(f"{role}/tokenizer_config.json", b"{}"), f"{role}/tokenizer_config.json")
        pad = settings.get("pad_token") or "<pad>"
        name = str(pad.get("content")) if isinstance(pad, dict) else str(pad)
        padding = self._reader.token_to_id(name)
        if padding is None:
            raise ModelError(
                f"its padding token {name!r} is not one of its words", where=role, hint="Fetch the tokenizer again."
            )
        self._padding = padding

    def word(self, text: str) -> int:
        """Return the id of a word. Raises ModelError if it is not one."""
        found = self._reader.token_to_id(text)
        if found is None:
            raise ModelError(f"{text!r} is not one of its words", where=self._role, hint="Fetch the tokenizer again.")
        return int(found)

    def padded(self, ids: Ids, length: int) -> Ids:
        """Return token ids, (length,), filled up."""
        row = np.full(length, self._padding, np.int64)
        row[: len(ids)] = ids
        return row

    def cut(self, text: str, length: int) -> tuple[Ids, str | None]:
        """Return up to `length` token ids, cut before the tokens that end a text; and what was cut off.

        Raises InputError for text that cannot be written in UTF-8, ModelError for words that the text encoder does not
        know: a graph would take any states for them.
        """
        try:
            read = self._reader.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(
                "holds half of a surrogate pair, which is not a character", where="prompt", hint="Remove it."
            ) from error
        except Exception as error:  # the library raises bare Exception for a vocabulary that does not hold together
            raise ModelError(
                f"its tokenizer.json cannot read a text: {error}", where=self._role, hint="Fetch the tokenizer again."
            ) from error
        room = max(length - self._reader.num_special_tokens_to_add(False), 0)
        cut = " ".join(text[read.offsets[room][0] :].split()) if len(read.ids) > room else None
        read.truncate(room)
        ids = self._reader.post_process(read, add_special_tokens=True).ids
        if self._words is not None and (largest := max(ids[:length], default=0)) >= self._words:
            raise ModelError(
                f"its word {largest} is not one of the {self._words} that the text encoder knows",
                where=self._role,
                hint="Take the tokenizer and the text encoder of one model.",
            )
        return np.array(ids[:length], np.int64), cut


class SequenceEncoder:
    """A tokenizer and an encoder that gives a state for each token, an OpenVINO model."""

    def __init__(
        self,
        tokenizer: SequenceTokenizer,
        model: ov.CompiledModel,
        role: str,
        outputs: Sequence[str] = ("last_hidden_state",),
    ) -> None:
        """Take states from `outputs`, one beside the other if there are several."""
        self._tokenizer, self._role = tokenizer, role
        self._request = model.create_infer_request()
        known = {name: port for port in model.outputs for name in port.names}
        missing = [name for name in outputs if name not in known]
        if missing or not any("input_ids" in port.names for port in model.inputs):
            others = ", ".join(sorted(name for name in known if name.startswith(LAYER))) if missing else ""
            raise ModelError(
                f"the text encoder has no input 'input_ids' or no output {(missing or outputs)[0]!r}",
                where=role,
                hint=f"It gives {others}, which another pipeline takes: convert it for this one, or by itself."
                if others
                else "Convert the model as optimum-intel or ovforge does.",
            )
        self._inputs = {name: port for port in model.inputs for name in port.names}
        self._outputs = [known[name] for name in outputs]
        self._ids = next(port for port in model.inputs if "input_ids" in port.names)
        self._mask = next((port for port in model.inputs if "attention_mask" in port.names), None)

    def encode(self, texts: Sequence[str], length: int, timings: Timings) -> tuple[Array, list[str]]:
        """Return states, float32 (texts, length, width), and warnings of what did not fit."""
        with timings.span("text_encoder.tokenizer"):
            read = [self._tokenizer.cut(text, length) for text in texts]
        rows = [self._tokenizer.padded(ids, length) for ids, _ in read]
        inputs: dict[ov.Output, NDArray[np.generic]] = {self._ids: np.stack(rows)}
        if self._mask is not None:
            inputs[self._mask] = np.stack([np.arange(length) < len(ids) for ids, _ in read])
        return self._states(inputs), self._notes(length, [cut for _, cut in read])

    def encode_each(
        self, texts: Sequence[str], length: int, timings: Timings, *, both: bool = False, dropped: range = range(0)
    ) -> tuple[list[Array], list[str]]:
        """Return the states of each text's own tokens, float32 (tokens, width), and warnings of what did not fit.

        The tokens `dropped`, such as an instruction's, are read beside the `length` that count, and left out.

        There is no padding if the model takes any number of tokens. If it does not, an attention_mask hides it, or the
        encoder reads from left to right, so that what stands after a text changes nothing: `both` says that it reads
        both ways. Raises InputError for a text of no tokens, ModelError for a model that would see the padding.
        """
        with timings.span("text_encoder.tokenizer"):
            read = [self._tokenizer.cut(text, len(dropped) + length) for text in texts]
        if not all(len(ids) > len(dropped) for ids, _ in read):
            raise InputError("has no tokens", where="prompt", hint="Write something.")
        made: dict[bytes, Array] = {}
        for ids, _ in read:
            if ids.tobytes() not in made:
                made[ids.tobytes()] = self._alone(ids, both=both)
        states = {key: np.delete(value, dropped, axis=0) for key, value in made.items()}
        return [states[ids.tobytes()] for ids, _ in read], self._notes(length, [cut for _, cut in read])

    def states(self, ids: Ids, more: Mapping[str, NDArray[Any]]) -> Array:
        """Return the states of one text's tokens, float32 (tokens, width); `more` are its further inputs by name.

        Raises ModelError for a model that lacks one of them, or takes another shape.
        """
        hint = "Convert the model with ovforge, all of its parts."
        for name, value in more.items():
            if name not in self._inputs:
                raise ModelError(f"the text encoder has no input {name!r}", where=self._role, hint=hint)
            shape, given = self._inputs[name].get_partial_shape(), list(value.shape)
            if not shape.compatible(ov.PartialShape(given)):
                raise ModelError(
                    f"the text encoder takes {name} of shape {shape}, not {given}", where=self._role, hint=hint
                )
        return self._alone(ids, more={self._inputs[name]: value for name, value in more.items()})

    def _alone(self, ids: Ids, *, both: bool = False, more: Mapping[ov.Output, NDArray[Any]] | None = None) -> Array:
        tokens = self._ids.get_partial_shape()[1]
        room = tokens.get_length() if tokens.is_static else len(ids)
        if room < len(ids):
            raise InputError(
                f"has {len(ids)} tokens, and the model was converted for {room}",
                where="prompt",
                hint=f"Set max_sequence_length = {room}, or convert the model for any length.",
            )
        if both and room > len(ids) and self._mask is None:
            raise ModelError(
                f"it was converted for {room} tokens and without an attention_mask, so that it would see the padding",
                where=self._role,
                hint="Convert the model with ovforge.",
            )
        inputs: dict[ov.Output, NDArray[np.generic]] = {self._ids: self._tokenizer.padded(ids, room)[None]}
        if self._mask is not None:
            inputs[self._mask] = (np.arange(room) < len(ids))[None]
        inputs |= self._no_pictures(room) if more is None else more
        return self._states(inputs)[0, : len(ids)]

    def _no_pictures(self, length: int) -> dict[ov.Output, NDArray[np.generic]]:
        """Return what an encoder that may see pictures takes if there are none: places in a row, and nothing seen."""
        inputs: dict[ov.Output, NDArray[np.generic]] = {}
        if (places := self._inputs.get("position_ids")) is not None:
            inputs[places] = np.broadcast_to(np.arange(length), (3, 1, length))
        if (seen := self._inputs.get("visual_states")) is not None:
            inputs[seen] = np.zeros((1, length, seen.get_partial_shape()[2].get_length()), np.float32)
        return inputs

    def _states(self, inputs: Mapping[ov.Output, NDArray[np.generic]]) -> Array:
        self._request.infer(
            {port: value.astype(port.get_element_type().to_dtype(), copy=False) for port, value in inputs.items()}
        )
        each = [self._request.get_tensor(port).data.astype(np.float32) for port in self._outputs]
        states: Array = each[0] if len(each) == 1 else np.concatenate(each, axis=2)
        if not np.isfinite(states).all():
            raise not_finite(self._role)
        return states

    def _notes(self, length: int, cuts: Sequence[str | None]) -> list[str]:
        return [
            f"the prompt is longer than the {length} tokens that {self._role} reads; cut off there: {cut!r}"
            for cut in dict.fromkeys(cuts)
            if cut
        ]


def before_last(model: ov.CompiledModel | ov.Model) -> tuple[str, ...]:
    """Return the output for the states before the last layer.

    Encoders that were converted alone have the states of all layers, by transformers' names. Of those that were
    converted for a pipeline that takes these, ours have no others under their name, or as last_hidden_state.
    """
    names = {name for port in model.outputs for name in port.names}
    if not any(name.startswith(LAYER) for name in names):
        return ("last_hidden_state",)
    if "last_hidden_state" in names:
        return (penultimate_output(model.outputs),)
    return (next(name for name in names if name.startswith(LAYER)),)


def stacked(rows: Sequence[Array], length: int = 0) -> tuple[Array, Array]:
    """Return states of texts, each (tokens, width), as one array (texts, tokens, width); and which count, of ones.

    What fills up, to the longest of them or to `length`, is zero in both.
    """
    states = np.zeros((len(rows), max(length, *map(len, rows)), rows[0].shape[1]), np.float32)
    mask = np.zeros(states.shape[:2], np.float32)
    for number, row in enumerate(rows):
        states[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return states, mask


def _read(assets: Mapping[str, bytes], role: str) -> tokenizers.Tokenizer:
    path = f"{role}/tokenizer.json"
    if path not in assets:
        raise ModelError(
            "the model has no tokenizer.json, without which its tokens cannot be exactly those of transformers",
            where=role,
            hint=f"Put the original model's {path} into that folder, or convert the model with ovforge; or name a "
            f"folder that holds the tokenizer: [load.parts] {role} = FOLDER",
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PluginError(
            "reading a model's tokenizer needs the package tokenizers",
            where=role,
            hint="Run: pip install tokenizers",
        ) from error
    try:
        return Tokenizer.from_str(assets[path].decode("utf-8"))
    except Exception as error:  # the library raises bare Exception for what it cannot read
        raise ModelError(f"cannot be read: {error}", where=path, hint="It may be damaged: fetch it again.") from error
