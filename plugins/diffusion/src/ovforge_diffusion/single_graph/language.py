"""What conditions a denoiser if a language model reads the prompt: states of as many tokens as a prompt may have.

Of a prompt's own tokens, the pipeline gives a denoiser no more than there are. Here the rest is there, and masked, so
that one graph serves prompts of any length; a model that reads from left to right, or is told what counts, gives the
same states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovforge_diffusion.architectures.base import Architecture, tokenizer_of
from ovforge_diffusion.architectures.flow import sequence_length
from ovforge_diffusion.architectures.flux2 import Flux2, states_of
from ovforge_diffusion.architectures.lumina2 import Lumina2, before
from ovforge_diffusion.architectures.pixart import PixArt
from ovforge_diffusion.architectures.qwenimage import DROPPED, LONGEST, TEMPLATE, QwenImage
from ovforge_diffusion.architectures.sana import Sana, instruction_of, tokens_left_out
from ovforge_diffusion.architectures.zimage import MULTIPLE, ZImage, filled
from ovforge_diffusion.chat import ChatTemplate
from ovforge_diffusion.request import Request
from ovforge_diffusion.sequence import SequenceTokenizer, before_last
from ovforge_diffusion.single_graph.joining import constant, converted, longer, part, shape_of
from ovforge_diffusion.single_graph.texts import Frame, Texts

__all__ = ["read_by_language_model"]

Values = dict[str, ov.Output]

_ROLE = "text_encoder"


def read_by_language_model(architecture: Architecture, texts: Texts, request: Request) -> Values:
    """Return what a denoiser takes of prompts, of a family whose only text encoder is a language model."""
    given = request.given.max_sequence_length
    match architecture:
        case Flux2():
            # Its transformer sees what fills up a prompt, too.
            frames, length = _chat(texts, thinking=False), sequence_length(given, Flux2.length)
            layers = states_of(texts.bundle.models[_ROLE], texts.bundle.configs.get(_ROLE, {}))
            return {"encoder_hidden_states": texts.sequence(_ROLE, length, frames, layers)[0]}
        case ZImage():
            return _zimage(architecture, texts, request)
        case Lumina2():
            return _lumina2(architecture, texts, request)
        case QwenImage():
            length = DROPPED + sequence_length(given, QwenImage.length, LONGEST)
            before, after = TEMPLATE.split("{}")
            frames = [Frame(before, after, TEMPLATE.format)] * len(texts.strings)
            states, mask = (part(value, DROPPED, length, 1) for value in texts.sequence(_ROLE, length, frames))
            return {"encoder_hidden_states": _masked(states, mask), "encoder_hidden_states_mask": mask}
        case PixArt():
            length, frames = sequence_length(given, PixArt.length), [Frame(lower=True)] * len(texts.strings)
            states, mask = texts.sequence(_ROLE, length, frames, both=True)
            return _with_mask(states, mask)
        case Sana():
            return _sana(texts, request)
    raise AssertionError(architecture.name)


def _chat(texts: Texts, *, thinking: bool = True) -> list[Frame]:
    chat = ChatTemplate(texts.bundle.assets, "tokenizer")

    def ask(text: str) -> str:
        return chat.question(text, thinking=thinking)

    return [Frame(*chat.around(thinking=thinking), ask)] * len(texts.strings)


def _zimage(architecture: ZImage, texts: Texts, request: Request) -> Values:
    """Return states, which of them are words, and the places of all tokens: what stands at 0 is hidden."""
    length = sequence_length(request.given.max_sequence_length, ZImage.length)
    states, mask = texts.sequence(_ROLE, length, _chat(texts), before_last(texts.bundle.models[_ROLE]))
    room = filled(length)
    states, mask = (longer(value, room - length) for value in (_masked(states, mask), mask))
    tokens = ops.reduce_sum(mask, constant([1]), True)
    # Without a division: the CPU's gives fractions of whole numbers, too.
    above = ops.add(tokens, constant(MULTIPLE - 1))
    full = ops.subtract(above, ops.floor_mod(above, constant(MULTIPLE)))
    numbers = constant(np.arange(1, room + 1, dtype=np.int64)[None])
    first = ops.select(ops.less_equal(numbers, full), numbers, constant(0))
    return {
        "encoder_hidden_states": states,
        "encoder_attention_mask": ops.select(
            ops.equal(mask, constant(1)),
            constant(np.zeros(1, np.float32)),
            constant(np.array([np.finfo(np.float32).min], np.float32)),
        ).output(0),
        "txt_ids": _first_of_three(first),
        "img_ids": _after_texts(lambda text: architecture.places(request, [text])[0], full),
    }


def _lumina2(architecture: Lumina2, texts: Texts, request: Request) -> Values:
    length = architecture.words(request)
    told = before(request.given.instruction)
    asked = Frame(told, "", lambda text: told + text)
    frames, outputs = [Frame(), asked][-len(texts.strings) :], before_last(texts.bundle.models[_ROLE])
    states, mask = texts.sequence(_ROLE, length, frames, outputs)
    numbers = ops.broadcast(constant(np.arange(length, dtype=np.int64)[None]), shape_of(mask))
    return {
        **_with_mask(states, mask),
        "txt_ids": _first_of_three(numbers),
        "img_ids": _after_texts(
            lambda text: architecture.places(request, [text])[0], ops.reduce_sum(mask, constant([1]), True)
        ),
    }


def _sana(texts: Texts, request: Request) -> Values:
    """Return the states of each prompt's first token, and of those after the instruction before it."""
    length = sequence_length(request.given.max_sequence_length, Sana.length)
    told = instruction_of(request)
    out = tokens_left_out(SequenceTokenizer(texts.bundle.assets, tokenizer_of(_ROLE)), told)
    asked = Frame(told, ask=lambda text: told + text, lower=True, length=out + length)
    frames = [Frame(lower=True, length=length), asked][-len(texts.strings) :]
    states, mask = texts.sequence(_ROLE, max(length, out + length), frames)
    kept = [[*range(length)], [0, *range(out + 1, out + length)]][-len(texts.strings) :]
    return _with_mask(_tokens(states, kept), _tokens(mask, kept))


def _tokens(value: ov.Output, places: Sequence[Sequence[int]]) -> ov.Output:
    """Return some of each row's tokens: their places are given for the rows of each half."""
    halves = ops.split(value, constant(0), len(places)).outputs()
    each = [ops.gather(half, constant(own), constant(1)) for half, own in zip(halves, places, strict=True)]
    return ops.concat(each, 0).output(0)


def _with_mask(states: ov.Output, mask: ov.Output) -> Values:
    return {"encoder_hidden_states": _masked(states, mask), "encoder_attention_mask": converted(mask, ov.Type.f32)}


def _masked(states: ov.Output, mask: ov.Output) -> ov.Output:
    """Return states, zero where a mask is."""
    seen = ops.unsqueeze(ops.equal(mask, constant(1)), constant([2]))
    return ops.select(seen, converted(states, ov.Type.f32), constant(np.zeros(1, np.float32))).output(0)


def _first_of_three(numbers: ov.Node) -> ov.Output:
    """Return places (rows, tokens, 3) of which the first number is given, (rows, tokens), and the others are 0."""
    unit = constant(np.array([1, 0, 0], np.int64))
    return ops.multiply(ops.unsqueeze(numbers, constant([2])), unit).output(0)


def _after_texts(places: Callable[[int], np.ndarray], tokens: ov.Node) -> ov.Output:
    """Return the places of a picture's tokens, i64 (rows, tokens, 3), after texts of so many, (rows, 1).

    `places` returns those of one picture after a text of so many tokens, of which they are a linear function.
    """
    origin = places(0)
    way = constant((places(1) - origin)[None])
    after = ops.multiply(ops.unsqueeze(tokens, constant([2])), way)
    return ops.add(after, constant(origin[None])).output(0)
