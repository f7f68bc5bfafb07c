"""Text encoders: what they take and give, by their classes. `qwen2_5_vl` is one that sees pictures, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ovforge_convert import Port
from ovforge_diffusers.attention import before, check_windows
from ovforge_diffusers.ports import SCALE, Submodel

__all__ = ["TEXT_ENCODERS", "text_encoder"]

_MASKED = tuple(Port(name, (None, None), (2, 12), "i64") for name in ("input_ids", "attention_mask"))
"""What encoders take whose texts are filled up: [batch, tokens] both."""


def text_encoder(module: Any, *, hidden_states: bool, alone: bool = False) -> Submodel:
    """Describe a text encoder; `hidden_states` gives those of all layers, too, if it is a CLIP, and of a Gemma 2 those
    before its last layer. One that is `alone` gives whatever a pipeline may take of it.
    """
    if alone and (describe := _ALONE.get(type(module).__name__)):
        return describe(module)
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


def _clip_alone(module: Any) -> Submodel:
    """Describe a CLIP with what it pools before its projection and after, and the states of all layers."""
    model = getattr(module, "text_model", module)
    project = getattr(module, "text_projection", None)
    run = type(model).forward
    layers = tuple(f"hidden_states.{i}" for i in range(module.config.num_hidden_layers + 1))

    def forward(input_ids: Any) -> tuple[Any, ...]:
        result = run(model, input_ids, output_hidden_states=True, return_dict=True)
        pooled = result.pooler_output
        embeds = project(pooled) if project is not None else pooled * 1.0
        return (embeds, result.last_hidden_state * 1.0, pooled, *result.hidden_states)

    tokens = module.config.max_position_embeddings
    return Submodel(
        forward,
        (Port("input_ids", (None, None), (2, tokens), "i64"),),
        ("text_embeds", "last_hidden_state", "pooler_output", *layers),
    )


def _t5(module: Any, hidden_states: bool) -> Submodel:
    """Describe the encoder of T5 (Raffel et al. 2020). Pipelines of diffusers give it no mask: padding counts."""
    run = type(module).forward

    def forward(input_ids: Any) -> tuple[Any, ...]:
        return (run(module, input_ids, return_dict=True).last_hidden_state,)

    return Submodel(forward, (Port("input_ids", (None, None), (2, 12), "i64"),), ("last_hidden_state",), SCALE)


def _qwen3(module: Any, hidden_states: bool) -> Submodel:
    """Describe Qwen3 (Yang et al. 2025) up to its last layer but one, whose states Z-Image takes: hidden_states[-2].

    A token sees those before it that attention_mask has 1 for, and itself. Raises ModelError for windows of attention.
    """
    import torch

    check_windows(module.config)

    def forward(input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
        states = module.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        turns = module.rotary_emb(states, places)
        _, seen = before(places, attention_mask)
        for layer in module.layers[:-1]:
            states = layer(states, attention_mask=seen.unsqueeze(1), position_embeddings=turns)
        return (states,)

    return Submodel(
        forward,
        _MASKED,
        ("last_hidden_state",),
        SCALE,
    )


def _qwen3_layers(module: Any, hidden_states: bool = True) -> Submodel:
    """Describe Qwen3 as FLUX.2 reads it: the states of all layers, the last ones normalized.

    A token sees itself and those before it, of those that attention_mask has 1 for: what fills up sees the text alone.
    """
    import torch

    model = getattr(module, "model", module)
    check_windows(module.config)
    layers = tuple(f"hidden_states.{i}" for i in range(len(model.layers) + 1))

    def forward(input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
        states = model.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        turns = model.rotary_emb(states, places)
        seen = (places.unsqueeze(2) >= places.unsqueeze(1)) & (attention_mask[:, None] > 0)
        each = [states]
        for layer in model.layers:
            states = layer(states, attention_mask=seen.unsqueeze(1), position_embeddings=turns)
            each.append(states)
        each[-1] = model.norm(states)
        return (each[-1] * 1.0, *each)  # outputs of one name each

    return Submodel(
        forward,
        _MASKED,
        ("last_hidden_state", *layers),
        SCALE,
    )


def _gemma2_alone(module: Any) -> Submodel:
    """Describe Gemma 2 with the normalized states that Sana takes, and those of all layers."""
    return _gemma2(module, hidden_states=False, layers=True)


def _gemma2(module: Any, hidden_states: bool, *, layers: bool = False) -> Submodel:
    """Describe Gemma 2 (Gemma Team 2024): a token sees those before it that attention_mask has 1 for.

    Every other layer sees a window of the last ones only. With `hidden_states`, the states are those before the last
    layer, which Lumina-Image 2.0 takes: hidden_states[-2], under their own name, so that Sana does not take them for
    the last. With `layers`, those of all layers come besides.
    """
    import torch

    kinds, window = module.config.layer_types, module.config.sliding_window

    def forward(input_ids: Any, attention_mask: Any) -> tuple[Any, ...]:
        states = module.embed_tokens(input_ids)
        places = torch.arange(input_ids.shape[1])[None]
        turns = module.rotary_emb(states, places)
        distance, seen = before(places, attention_mask)
        near = seen & (distance < window)
        masks = {"full_attention": _added(seen), "sliding_attention": _added(near)}
        each = [states]
        for kind, layer in list(zip(kinds, module.layers, strict=True))[: -1 if hidden_states else None]:
            each.append(layer(each[-1], attention_mask=masks[kind], position_embeddings=turns))
        if hidden_states:
            return (each[-1],)
        last = module.norm(each.pop())
        return (last, *each, last * 1.0) if layers else (last,)

    names = tuple(f"hidden_states.{i}" for i in range(len(module.layers) + 1))
    return Submodel(
        forward,
        _MASKED,
        (names[-2],) if hidden_states else ("last_hidden_state", *(names if layers else ())),
        SCALE,
    )


def _added(seen: Any) -> Any:
    """Return what is added to scores of attention, [batch, 1, tokens, tokens], of what a token sees.

    Gemma's scores are softly capped, which transformers computes by an attention that takes no booleans.
    """
    import torch

    return torch.where(seen, 0.0, torch.finfo(torch.float32).min).unsqueeze(1)


TEXT_ENCODERS: dict[str, Callable[[Any, bool], Submodel]] = {
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip,
    "T5EncoderModel": _t5,
    "Qwen3Model": _qwen3,
    "Gemma2Model": _gemma2,
    "Qwen3ForCausalLM": _qwen3_layers,
}
"""Class -> what describes it."""

_ALONE: dict[str, Callable[[Any], Submodel]] = {
    "CLIPTextModel": _clip_alone,
    "CLIPTextModelWithProjection": _clip_alone,
    "Qwen3Model": _qwen3_layers,
    "Qwen3ForCausalLM": _qwen3_layers,
    "Gemma2Model": _gemma2_alone,
}
"""The same, for those that pipelines take different things of."""
