"""What sees pictures for Qwen2.5-VL, in a GGUF file of its own, as llama.cpp keeps it ("mmproj")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ovforge.errors import ModelError
from ovforge_convert import TensorWeight, Weight
from ovforge_diffusers.header import Shapes
from ovforge_diffusers.requirements import need
from ovforge_diffusers.stored import joined

__all__ = ["SIGHT", "picture_tokens", "sight_config", "sight_name", "sight_weights"]

SIGHT = "mmproj"
"""Naming of such files."""

_PATCH = "model.visual.patch_embed.proj.weight"
_TOP = {
    "v.patch_embd.weight": f"{_PATCH}.0",
    "v.patch_embd.weight.1": f"{_PATCH}.1",
    "v.post_ln.weight": "model.visual.merger.ln_q.weight",
    **{
        f"mm.{layer}.{kind}": f"model.visual.merger.mlp.{layer}.{kind}"
        for layer in (0, 2)
        for kind in ("weight", "bias")
    },
}
_BLOCK = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_out": "attn.proj",
    **{f"attn_{each}": f"attn.{each}" for each in ("q", "k", "v", "qkv")},
    **{f"ffn_{each}": f"mlp.{each}_proj" for each in ("gate", "up", "down")},
}
_QUERY = re.compile(r"(model\.visual\.blocks\.\d+\.attn)\.q\.(weight|bias)")
_PROJECTOR = "qwen2.5vl_merger"


def sight_name(name: str) -> str | None:
    """Return the name in transformers; queries, keys and values, and slices of patches, are parts of what it names."""
    if block := re.fullmatch(r"v\.blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name):
        number, inside, kind = block.groups()
        return f"model.visual.blocks.{number}.{_BLOCK[inside]}.{kind}" if inside in _BLOCK else None
    return _TOP.get(name)


def sight_weights(weights: Mapping[str, Weight], where: str) -> dict[str, Any]:
    """Put the parts together that llama.cpp stores apart, and turn round what old files of it name the wrong way.

    Raises ModelError if parts do not fit each other.
    """
    torch = need("torch", "converting a checkpoint")
    found = dict(weights)
    slices = [np.empty(found[name].shape, np.float32) for name in (f"{_PATCH}.0", f"{_PATCH}.1")]
    if slices[0].shape != slices[1].shape:
        raise ModelError("the slices of its patches have several shapes", where=where)
    for number, values in enumerate(slices):
        found.pop(f"{_PATCH}.{number}").fill(values)
    rows = {}
    for name in [name for name in found if _QUERY.fullmatch(name)]:
        three = [re.sub(r"\.q\.", f".{each}.", name) for each in "qkv"]
        if found.keys() >= set(three):  # else filling the module says what is missing
            rows[name.replace(".q.", ".qkv.")] = [(each, 0, found[each].shape[0]) for each in three]
    together = joined(found, rows)
    for parts in rows.values():
        for each, _, _ in parts:
            del found[each]
    if _is_turned({name: weight.shape for name, weight in found.items()}):
        turned = {".up_proj.": ".down_proj.", ".down_proj.": ".up_proj."}
        found = {re.sub(r"\.(up|down)_proj\.", lambda m: turned[m[0]], name): each for name, each in found.items()}
    return {**found, **together, _PATCH: TensorWeight(torch.from_numpy(np.stack(slices, axis=2)))}


def _is_turned(own: Mapping[str, tuple[int, ...]]) -> bool:
    """Say whether what leads up is called down: it then has as many rows as the gate."""
    mlp = "model.visual.blocks.0.mlp."
    return own[f"{mlp}down_proj.weight"][0] == own[f"{mlp}gate_proj.weight"][0]


def sight_config(own: Shapes, level: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of what sees, from shapes by transformers' names below `level`, or by those of `sight_name`.

    Raises ModelError if `metadata`, that of a GGUF file, is that of another kind of model.
    """
    kind = metadata.get("clip.projector_type", _PROJECTOR)
    if kind != _PROJECTOR:
        raise ModelError(f"what sees is of the kind {kind}, and that of Qwen2.5-VL is needed ({_PROJECTOR})")
    patches = level + "patch_embed.proj.weight"
    width, channels, *frames, patch, _ = own.get(patches) or own[f"{patches}.0"]
    layers = 0
    while f"{level}blocks.{layers}.norm1.weight" in own:
        layers += 1
    merged = own[f"{level}merger.mlp.0.weight"][1] // width
    return {
        "model_type": "qwen2_5_vl",
        "depth": layers,
        "hidden_size": width,
        "intermediate_size": own[f"{level}blocks.0.mlp.gate_proj.weight"][0],
        "num_heads": 16,
        "in_channels": channels,
        "patch_size": patch,
        "temporal_patch_size": frames[0] if frames else 2,
        "spatial_merge_size": round(merged**0.5),
        "window_size": 112,
        "out_hidden_size": own[f"{level}merger.mlp.2.weight"][0],
        "fullatt_block_indexes": [(number + 1) * layers // 4 - 1 for number in range(4)],  # 7, 15, 23, 31 of 32
    }


def picture_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of the tokens that stand for pictures: those of the words of a GGUF file, if it has them."""
    words = list(metadata.get("tokenizer.ggml.tokens", ()))
    tokens = {
        "image_token_id": ("<|image_pad|>", 151655),
        "video_token_id": ("<|video_pad|>", 151656),
        "vision_start_token_id": ("<|vision_start|>", 151652),
        "vision_end_token_id": ("<|vision_end|>", 151653),
    }
    return {name: words.index(word) if word in words else number for name, (word, number) in tokens.items()}
