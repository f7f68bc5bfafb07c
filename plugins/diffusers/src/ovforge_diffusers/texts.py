"""Text encoders: what they take and give, by their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ovforge_convert import Port
from ovforge_diffusers.ports import Submodel

__all__ = ["TEXT_ENCODERS", "text_encoder"]

T5_SCALE = (("ACTIVATIONS_SCALE_FACTOR", "8.0"),)
"""T5's activations overflow float16; the hint of optimum-intel's export."""


def text_encoder(module: Any, *, hidden_states: bool) -> Submodel:
    """Describe a text encoder; `hidden_states` gives those of all layers, too, if it is a CLIP."""
    return TEXT_ENCODERS[type(module).__name__](module, hidden_states)


def _clip(module: Any, hidden_states: bool) -> Submodel:
    first = ("text_embeds", "last_hidden_state")
    if not hasattr(module, "text_projection"):
        first = ("last_hidden_state", "pooler_output")
    layers = tuple(f"hidden_states.{i}" for i in range(module.config.num_hidden_layers + 1))
    hidden_states = hidden_states or module.config.output_hidden_states
    run = type(module).forward

    def forward(input_ids: Any) -> tuple[Any, ...]:
        result = run(module, input_ids, output_hidden_states=hidden_states, return_dict=True)
        named = tuple(result[name] for name in first)
        return (*named, *result.hidden_states) if hidden_states else named

    tokens = module.config.max_position_embeddings
    return Submodel(
        forward,
        (Port("input_ids", (None, None), (2, tokens), "i64"),),
        first + (layers if hidden_states else ()),
    )


def _t5(module: Any, hidden_states: bool) -> Submodel:
    """Describe the encoder of T5 (Raffel et al. 2020). Pipelines of diffusers give it no mask: padding counts."""
    run = type(module).forward

    def forward(input_ids: Any) -> tuple[Any, ...]:
        return (run(module, input_ids, return_dict=True).last_hidden_state,)

    return Submodel(forward, (Port("input_ids", (None, None), (2, 12), "i64"),), ("last_hidden_state",), T5_SCALE)


TEXT_ENCODERS: dict[str, Callable[[Any, bool], Submodel]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
}
"""Class -> what describes it."""
