"""Text encoders in single files: their names in transformers, and their configs from the shapes of their tensors.

What shapes cannot tell are facts of the published models: CLIP's heads have 64 channels, those of Gemma 2 have 256 and
those of Qwen2.5 have 128; T5 counts distances up to 128; and so on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ovforge.errors import ModelError
from ovforge_diffusers import infer
from ovforge_diffusers.components import CLIP
from ovforge_diffusers.header import Part, Shapes
from ovforge_diffusers.qwen2_5_vl import CLASS as QWEN2_5_VL
from ovforge_diffusers.sight import SIGHT, picture_tokens, sight_config, sight_name

__all__ = ["text_encoder_config", "text_encoder_names", "uses_projection"]

_OPEN_CLIP_WIDTH = 1024
"""From this width on CLIP's text encoders are OpenCLIP's: another activation, and a projection that is used."""

_TEXT_LEVEL = "text_model."
_T5_TOP = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
_T5_BLOCK = {
    **{f"attn_{each}": f"layer.0.SelfAttention.{each}" for each in "qkvo"},
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_LANGUAGE_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LANGUAGE_BLOCK = {
    **{f"attn_{each}": f"self_attn.{each}_proj" for each in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")},
}
"""Of Qwen's language models in llama.cpp."""


def text_encoder_names(part: Part, shapes: Shapes) -> dict[str, str]:
    """Return the name in the file -> the name in transformers, of each tensor that a text encoder has a use for."""
    own = {name.removeprefix(part.prefix): name for name in shapes if name.startswith(part.prefix)}
    rename = _RENAMED.get((part.kind, part.naming), _plain)
    if part.kind == CLIP:
        level = _TEXT_LEVEL if any(name.startswith(_TEXT_LEVEL) for name in own) else ""
        names = {name: _clip_name(name, level) for name in own}
    else:
        names = {name: rename(name) for name in own}
    return {own[name]: new for name, new in names.items() if new is not None}


def _clip_name(name: str, level: str) -> str | None:
    if name == "text_projection.weight":
        return name
    inside = name.removeprefix(level)
    known = name.startswith(level) and inside.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return _TEXT_LEVEL + inside if known else None


def _plain(name: str) -> str | None:
    return name if name.startswith(("shared.", "encoder.", "model.", "embed_tokens.", "layers.", "norm.", "visual.",
                                    "lm_head.")) else None  # fmt: skip


def _t5_name(name: str) -> str | None:
    if block := re.fullmatch(r"enc\.blk\.(\d{1,4})\.(\w+)\.weight", name):
        return f"encoder.block.{block[1]}.{_T5_BLOCK[block[2]]}.weight" if block[2] in _T5_BLOCK else None
    return _T5_TOP.get(name)


def _language_name(name: str) -> str | None:
    if block := re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name):
        number, inside, kind = block.groups()
        return f"model.layers.{number}.{_LANGUAGE_BLOCK[inside]}.{kind}" if inside in _LANGUAGE_BLOCK else None
    return _LANGUAGE_TOP.get(name)


_RENAMED: dict[tuple[str, str], Callable[[str], str | None]] = {
    ("T5EncoderModel", "llama.cpp"): _t5_name,
    ("Qwen3Model", "llama.cpp"): _language_name,
    (QWEN2_5_VL, "llama.cpp"): _language_name,
    (QWEN2_5_VL, SIGHT): sight_name,
}


def uses_projection(part: Part, config: Mapping[str, Any]) -> bool:
    """Say whether pipelines take what a CLIP pools times its projection: OpenCLIP's, and not CLIP's own."""
    return part.kind == CLIP and config["hidden_act"] == "gelu"


def text_encoder_config(part: Part, own: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a text encoder whose tensors have the shapes `own`, by transformers' names.

    `metadata` is that of a GGUF file, which says what shapes do not. Raises ModelError if a tensor is missing that
    tells of the config.
    """
    try:
        return {"architectures": [part.kind], **_CONFIGS[part.kind](part, own, metadata)}
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ModelError(
            f"its tensors are not those of a {part.kind}: {error}", hint="The file may be damaged: fetch it again."
        ) from error


def _clip(part: Part, own: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    config = infer.text_config(Part(part.kind, _TEXT_LEVEL, "diffusers"), own)
    width = config["hidden_size"]
    wide = width >= _OPEN_CLIP_WIDTH or "clip_g" in part.prefix
    projection = own.get("text_projection.weight", (width, width))
    return config | {
        "hidden_act": "gelu" if wide else "quick_gelu",
        "projection_dim": projection[0] if wide else width,
        "pad_token_id": 0 if wide else config["vocab_size"] - 1,
    }


def _t5(part: Part, own: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    first = "encoder.block.0.layer.{}.{}.weight"
    buckets, heads = own[first.format(0, "SelfAttention.relative_attention_bias")]
    inner, width = own[first.format(0, "SelfAttention.q")]
    words = own.get("shared.weight") or own["encoder.embed_tokens.weight"]
    return {
        "model_type": "t5",
        "vocab_size": words[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": own[first.format(1, "DenseReluDense.wi_0")][0],
        "num_layers": _count(own, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": _said(metadata, "attention.layer_norm_rms_epsilon", 1e-6),
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
    }


def _language(own: Shapes, level: str, head: int, default: dict[str, Any]) -> dict[str, Any]:
    """Return what language models have alike, for heads of `head` channels."""
    words, width = own[f"{level}embed_tokens.weight"]
    block = f"{level}layers.0."
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": own[f"{block}mlp.gate_proj.weight"][0],
        "num_hidden_layers": _count(own, level + "layers.{}.self_attn.q_proj.weight"),
        "num_attention_heads": own[f"{block}self_attn.q_proj.weight"][0] // head,
        "num_key_value_heads": own[f"{block}self_attn.k_proj.weight"][0] // head,
        **default,
    }


def _qwen3(part: Part, own: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    level = _level(own)
    head = own[f"{level}layers.0.self_attn.q_norm.weight"][0]
    shared = _language(own, level, head, {})
    return {
        "model_type": "qwen3",
        **shared,
        "layer_types": ["full_attention"] * shared["num_hidden_layers"],
        "head_dim": head,
        "hidden_act": "silu",
        "rms_norm_eps": _said(metadata, "attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": {"rope_type": "default", "rope_theta": _said(metadata, "rope.freq_base", 1e6)},
        "max_position_embeddings": 40960,
        "tie_word_embeddings": "lm_head.weight" not in own,
    }


def _gemma2(part: Part, own: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    level = _level(own)
    wide = own[f"{level}embed_tokens.weight"][1] >= 4608  # 27B
    head = 128 if wide else 256
    shared = _language(own, level, head, {})
    kinds = ("sliding_attention", "full_attention")
    return {
        "model_type": "gemma2",
        **shared,
        "layer_types": [kinds[number % 2] for number in range(shared["num_hidden_layers"])],
        "head_dim": head,
        "query_pre_attn_scalar": 144 if wide else 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def _qwen2_5_vl(part: Part, own: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the whole, or of what reads or sees alone: the other half's is None then."""
    vision = "model.visual." if "model.visual.merger.mlp.0.weight" in own else "visual."
    text = "model.language_model." if "model.language_model.embed_tokens.weight" in own else "model."
    tied = "lm_head.weight" not in own
    return {
        "model_type": "qwen2_5_vl",
        "text_config": None if part.naming == SIGHT else _qwen2_5_vl_text(own, text, tied, metadata),
        "vision_config": None if part.naming == "llama.cpp" else sight_config(own, vision, metadata),
        **picture_tokens(metadata),
        "tie_word_embeddings": tied,
    }


def _qwen2_5_vl_text(own: Shapes, level: str, tied: bool, metadata: Mapping[str, Any]) -> dict[str, Any]:
    named = metadata.get("general.architecture", "qwen2vl")
    if named != "qwen2vl":  # those of Qwen2 have tensors of the same names
        raise ModelError(f"it is a {named}, which only reads, and a Qwen2.5-VL (qwen2vl) is needed")
    shared = {
        "hidden_act": "silu",
        "rms_norm_eps": _said(metadata, "attention.layer_norm_rms_epsilon", 1e-6),
        "tie_word_embeddings": tied,
    }
    theta = _said(metadata, "rope.freq_base", 1e6)
    return {
        "model_type": "qwen2_5_vl_text",
        **_language(own, level, 128, shared),
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128000,
    }


_CONFIGS: dict[str, Callable[[Part, Shapes, Mapping[str, Any]], dict[str, Any]]] = {
    CLIP: _clip,
    "T5EncoderModel": _t5,
    "Qwen3Model": _qwen3,
    "Gemma2Model": _gemma2,
    QWEN2_5_VL: _qwen2_5_vl,
}


def _level(own: Shapes) -> str:
    return "model." if "model.embed_tokens.weight" in own else ""


def _count(own: Shapes, pattern: str) -> int:
    """Return for how many numbers from 0 on a name is there."""
    number = 0
    while pattern.format(number) in own:
        number += 1
    return number


def _said(metadata: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number that a GGUF file says of its model, with the digits that float32 has.

    Raises ModelError for one that makes no sense.
    """
    value = metadata.get(f"{metadata.get('general.architecture')}.{name}", default)
    if not isinstance(value, int | float) or not 0 < value < 1e12:
        raise ModelError(f"its metadata says {name} = {value!r}", hint="The file may be damaged: fetch it again.")
    return float(f"{value:.7g}")
