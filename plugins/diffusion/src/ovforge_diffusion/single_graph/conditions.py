"""What conditions a denoiser, family by family: the graphs of what each family's prompt encoder does in numpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovforge.errors import ModelError
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.architectures.flow import sequence_length
from ovforge_diffusion.architectures.flux import Flux
from ovforge_diffusion.architectures.sd3 import StableDiffusion3
from ovforge_diffusion.architectures.unet import STATES, StableDiffusion, StableDiffusionXL
from ovforge_diffusion.request import Request
from ovforge_diffusion.single_graph.joining import constant, part, reshaped, rows_of, shape_of, zeros
from ovforge_diffusion.single_graph.language import read_by_language_model
from ovforge_diffusion.single_graph.texts import Texts

__all__ = ["conditions", "constants"]

Values = dict[str, ov.Output]
"""By the name of the denoiser's input, each with a row for each picture of each half, the one to avoid first."""


def conditions(architecture: Architecture, texts: Texts, request: Request) -> Values:
    """Return what a denoiser takes of prompts."""
    match architecture:
        case StableDiffusionXL():
            states, pooled = _side_by_side(architecture, texts, penultimate=True)
            return {STATES: states, "text_embeds": pooled[-1]}
        case StableDiffusion():
            return {STATES: _side_by_side(architecture, texts, penultimate=False)[0]}
        case StableDiffusion3():
            return _of_three(architecture, texts, request)
        case Flux():
            length = sequence_length(request.given.max_sequence_length, architecture.length or 0)
            _, pooled_output = texts.clip("text_encoder", penultimate=False, pooled="pooler_output")
            assert pooled_output is not None
            return {
                "encoder_hidden_states": texts.sequence("text_encoder_2", length)[0],
                "pooled_projections": pooled_output,
            }
    return read_by_language_model(architecture, texts, request)


def _side_by_side(architecture: Architecture, texts: Texts, *, penultimate: bool) -> tuple[ov.Output, list[ov.Output]]:
    """Return the states of all of CLIP's text encoders, and the pooled ones of those that have them."""
    roles = [role for role in architecture.encoders if role not in architecture.sequence_encoders]
    each = []
    for role in roles:
        outputs = {name for port in texts.bundle.models[role].outputs for name in port.names}
        pools = "text_embeds" in outputs or (penultimate and role == roles[-1])
        each.append(texts.clip(role, penultimate=penultimate, pooled="text_embeds" if pools else None))
    states = each[0][0] if len(each) == 1 else ops.concat([states for states, _ in each], 2).output(0)
    return states, [pooled for _, pooled in each if pooled is not None]


def _of_three(architecture: Architecture, texts: Texts, request: Request) -> Values:
    """Return Stable Diffusion 3's: CLIP's states filled up to T5's width, T5's or zeros after them."""
    width = int(architecture.config.get("joint_attention_dim", 4096))
    states, pooled = _side_by_side(architecture, texts, penultimate=True)
    if len(pooled) < 2:
        raise ModelError("a text encoder has no output 'text_embeds'", where="text_encoder")
    length = sequence_length(request.given.max_sequence_length, architecture.length or 0)
    # Narrower ones are filled up; of wider ones, diffusers takes the first numbers.
    filling = zeros(ops.concat([part(shape_of(states), 0, 2, 0), constant([width])], 0).output(0))
    states = part(ops.concat([states, filling], 2).output(0), 0, width, 2)
    if (t5 := "text_encoder_3") in architecture.encoders:
        last, _ = texts.sequence(t5, length)
    else:
        last = zeros(ops.concat([texts.rows, constant([length, width])], 0).output(0))
    return {
        "encoder_hidden_states": ops.concat([states, last], 1).output(0),
        "pooled_projections": ops.concat(pooled, 1).output(0),
    }


def constants(
    architecture: Architecture,
    request: Request,
    halves: int,
    texts: Texts,
    ranks: Mapping[str, int | None],
) -> Values:
    """Return what a denoiser takes that holds for every prompt; `request` is for one picture.

    `ranks` are those of the denoiser's inputs, None if not known: some models take what all rows share for each row.
    There is a row for each string that a call brings. As constants, OpenVINO 2026.4's CPU would compute ahead with
    them, and fail to compile where they meet compressed weights.
    """
    rows, held = architecture.constants(request, halves)
    count = -1 if texts.pictures is None else texts.pictures * halves
    values: Values = {}
    for name, array in rows.items():
        if name in ranks:
            shape = ops.concat([constant([halves]), rows_of(texts.strings[0]), constant(list(array.shape[1:]))], 0)
            each = ops.broadcast(constant(np.ascontiguousarray(array[:, None])), shape).output(0)
            values[name] = reshaped(each, (count, *array.shape[1:]))
    for name, array in held.items():
        if ranks.get(name) == array.ndim + 1:
            all_rows = ops.multiply(rows_of(texts.strings[0]), constant([halves]))
            whole = ops.concat([all_rows, constant(list(array.shape))], 0)
            values[name] = reshaped(ops.broadcast(constant(array[None]), whole).output(0), (count, *array.shape))
        elif name in ranks:  # one number may be a list of one, which some models take without it
            values[name] = constant(array.reshape(()) if ranks[name] == 0 and array.size == 1 else array)
    return values
