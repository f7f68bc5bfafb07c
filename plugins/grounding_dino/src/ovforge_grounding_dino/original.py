"""The original repository's checkpoints (IDEA-Research/GroundingDINO): their configs, and their names of tensors.

Names follow transformers' own conversion script; what it does by hand, key by key, is a table of patterns here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from ovforge.errors import ConfigError, ModelError
from ovforge.store import parse_object

__all__ = ["FUSION", "config_of", "is_original", "parse_config", "rename"]

SWINS: dict[str, dict[str, Any]] = {
    "swin_T_224_1k": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "swin_B_224_22k": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 7},
    "swin_B_384_22k": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
    "swin_L_224_22k": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 7},
    "swin_L_384_22k": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "window_size": 12},
}
"""The original repository's names of backbones."""

_MEANING = {
    "enc_layers": "encoder_layers",
    "dec_layers": "decoder_layers",
    "dim_feedforward": ("encoder_ffn_dim", "decoder_ffn_dim"),
    "hidden_dim": "d_model",
    "nheads": ("encoder_attention_heads", "decoder_attention_heads"),
    "num_queries": "num_queries",
    "query_dim": "query_dim",
    "num_feature_levels": "num_feature_levels",
    "enc_n_points": "encoder_n_points",
    "dec_n_points": "decoder_n_points",
    "transformer_activation": "activation_function",
    "pe_temperatureH": "positional_embedding_temperature",
    "dec_pred_bbox_embed_share": "decoder_bbox_embed_share",
    "embed_init_tgt": "embedding_init_target",
    "max_text_len": "max_text_len",
}
"""Keys of the original's config that change the network -> transformers'."""

_REQUIRED = {
    "modelname": "groundingdino",
    "position_embedding": "sine",
    "pre_norm": False,
    "num_patterns": 0,
    "two_stage_type": "standard",
    "two_stage_bbox_embed_share": False,
    "two_stage_class_embed_share": False,
    "use_text_enhancer": True,
    "use_fusion_layer": True,
    "use_text_cross_attention": True,
    "sub_sentence_present": True,
}
"""Keys with one value that transformers' class stands for."""

_UNUSED = re.compile(r"label_enc\.|bert\.pooler\.|bert\.embeddings\.position_ids|.*\.relative_position_index$")
"""Tensors for training, and tables that are computed."""

_SPLIT = {"in_proj_": ("query", "key", "value"), "qkv": ("q_proj", "k_proj", "v_proj")}

_SWIN = "model.backbone.conv_encoder.model.swin."
_NORMS = "model.backbone.conv_encoder.model.hidden_states_norms.stage"
_NAMES = [
    (r"backbone\.0\.patch_embed\.proj\.", rf"{_SWIN}embeddings.patch_embeddings.projection."),
    (r"backbone\.0\.patch_embed\.norm\.", rf"{_SWIN}embeddings.norm."),
    (r"backbone\.0\.layers\.(\d+)\.downsample\.", rf"{_SWIN}encoder.layers.\1.downsample."),
    (r"backbone\.0\.norm(\d)\.", lambda found: f"{_NORMS}{int(found[1]) + 1}."),
    (r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.", rf"{_SWIN}encoder.layers.\1.blocks.\2."),
    (r"bert\.", "model.text_backbone."),
    (r"feat_map\.", "model.text_projection."),
    (r"input_proj\.", "model.input_proj_vision."),
    (r"transformer\.level_embed", "model.level_embed"),
    (r"transformer\.tgt_embed\.", "model.query_position_embeddings."),
    (r"transformer\.enc_output", "model.enc_output"),
    (r"transformer\.enc_out_bbox_embed\.", "model.encoder_output_bbox_embed."),
    (r"transformer\.decoder\.norm\.", "model.decoder.layer_norm."),
    (r"transformer\.decoder\.ref_point_head\.", "model.decoder.reference_points_head."),
    (r"transformer\.decoder\.bbox_embed\.", "model.decoder.bbox_embed."),
    (r"transformer\.decoder\.layers\.", "model.decoder.layers."),
    (r"transformer\.encoder\.layers\.(\d+)\.", r"model.encoder.layers.\1.deformable_layer."),
    (r"transformer\.encoder\.text_layers\.(\d+)\.", r"model.encoder.layers.\1.text_enhancer_layer."),
    (r"transformer\.encoder\.fusion_layers\.(\d+)\.", r"model.encoder.layers.\1.fusion_layer."),
    (r"bbox_embed\.", "bbox_embed."),
]
"""How names begin."""

_FEED_FORWARD = {"linear1.": "fc1.", "linear2.": "fc2."}
_PARTS: dict[str, dict[str, str]] = {
    "deformable_layer.": {**_FEED_FORWARD, "norm1.": "self_attn_layer_norm.", "norm2.": "final_layer_norm."},
    "text_enhancer_layer.": {**_FEED_FORWARD, "norm1.": "layer_norm_before.", "norm2.": "layer_norm_after."},
    "fusion_layer.": {
        "gamma_v": "vision_param", "gamma_l": "text_param",
        "layer_norm_v.": "layer_norm_vision.", "layer_norm_l.": "layer_norm_text.",
        "attn.v_proj.": "attn.vision_proj.", "attn.l_proj.": "attn.text_proj.",
        "attn.values_v_proj.": "attn.values_vision_proj.", "attn.values_l_proj.": "attn.values_text_proj.",
        "attn.out_v_proj.": "attn.out_vision_proj.", "attn.out_l_proj.": "attn.out_text_proj.",
    },
    "decoder.layers.": {
        **_FEED_FORWARD, "cross_attn.": "encoder_attn.", "ca_text.": "encoder_attn_text.",
        "catext_norm.": "encoder_attn_text_layer_norm.", "norm1.": "encoder_attn_layer_norm.",
        "norm2.": "self_attn_layer_norm.", "norm3.": "final_layer_norm.",
    },
    "swin.encoder.": {
        "norm1.": "layernorm_before.", "norm2.": "layernorm_after.", "attn.proj.": "attention.o_proj.",
        "attn.relative_position_bias_table": "attention.relative_position_bias.relative_position_bias_table",
        "attn.qkv.": "attention.qkv.",
    },
}  # fmt: skip
"""Inside which part, what follows is called."""


FUSION = "transformer.encoder.fusion_layers."
"""What names of layers that only GroundingDINO has begin with."""


def is_original(names: Mapping[str, Any]) -> bool:
    """Say whether tensors have the original repository's names."""
    return any(name.removeprefix("module.").startswith(FUSION) for name in names)


def rename(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors under transformers' names. Raises ModelError for one that has no place there."""
    found: dict[str, Any] = {}
    for stored, tensor in weights.items():
        name = stored.removeprefix("module.")
        if _UNUSED.match(name):
            continue
        for part, value in _split(_renamed(name), tensor, stored):
            found[part] = value
    return found


def _renamed(name: str) -> str:
    for begin, instead in _NAMES:
        new, count = re.subn(rf"^{begin}", instead, name)  # type: ignore[call-overload]
        if count:
            name = new
            break
    else:
        raise ModelError(f"{name} belongs nowhere in a GroundingDINO")
    for place, table in _PARTS.items():
        if place in name:
            head, inside, tail = name.partition(place)
            number = re.match(r"layers\.\d+\.blocks\.\d+\.|\d+\.", tail)
            kept = number[0] if number else ""
            rest = tail.removeprefix(kept)
            old = next((old for old in table if rest.startswith(old)), None)
            return head + inside + kept + (table[old] + rest.removeprefix(old) if old else rest)
    return name


def _split(name: str, tensor: Any, stored: str) -> list[tuple[str, Any]]:
    """Take apart queries, keys and values that lie in one matrix."""
    for joined, parts in _SPLIT.items():
        if f".{joined}" in name:
            if tensor.shape[0] % 3:
                raise ModelError(f"{stored} has {tensor.shape[0]} rows, which are not queries, keys and values")
            head, _, tail = name.partition(f".{joined}")
            tail = tail if tail.startswith(".") else f".{tail}"
            return [(f"{head}.{part}{tail}", rows) for part, rows in zip(parts, tensor.chunk(3), strict=True)]
    return [(name, tensor)]


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    """Return the names and plain values that a config assigns: JSON, or Python, which is read and never run."""
    try:
        text = data.decode("utf-8")
        if text.lstrip().startswith("{"):
            return parse_object(text, where, error=ConfigError)
        values = {}
        for line in ast.parse(text).body:
            if isinstance(line, ast.Assign) and len(line.targets) == 1 and isinstance(line.targets[0], ast.Name):
                values[line.targets[0].id] = ast.literal_eval(line.value)
            elif not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)):
                raise ValueError(f"line {line.lineno} is not a plain assignment")
        return values
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"it is not a config of GroundingDINO: {error}",
            where=where,
            hint="Give the repository's own, such as GroundingDINO_SwinT_OGC.py: names and plain values.",
        ) from error


def config_of(weights: Mapping[str, Any], given: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Return transformers' config for a checkpoint; `given` is the original's, by default that of its backbone.

    Raises ModelError if the backbone is not known, or the config asks for what transformers' class does not do.
    """
    settings = dict(given or {})
    for key, only in _REQUIRED.items():
        if settings.get(key, only) != only:
            raise ModelError(f"{key} = {settings[key]!r} cannot be converted, only {only!r}", where=where)
    name = settings.get("backbone") or _backbone(weights, where)
    if name not in SWINS:
        raise ModelError(f"the backbone {name!r} is not known", where=where, hint=f"Known: {', '.join(SWINS)}.")
    config: dict[str, Any] = {
        "backbone_config": {
            "model_type": "swin", "out_features": _stages(settings.get("return_interm_indices", [1, 2, 3]), where),
            "image_size": int(name.split("_")[2]), "drop_path_rate": 0.0, **SWINS[name],
        },
        "text_config": {"model_type": "bert"},
    }  # fmt: skip
    for key, ours in _MEANING.items():
        if key in settings:
            config |= dict.fromkeys((ours,) if isinstance(ours, str) else ours, settings[key])
    return config


def _stages(levels: Any, where: str) -> list[str]:
    if not isinstance(levels, list) or not all(isinstance(n, int) and 0 <= n < 4 for n in levels):
        raise ModelError(f"return_interm_indices = {levels!r} are not stages of a Swin Transformer", where=where)
    return [f"stage{level + 1}" for level in levels]


def _backbone(weights: Mapping[str, Any], where: str) -> str:
    """Tell the backbone from its weights: its width, depth, and window."""
    names = {name.removeprefix("module."): name for name in weights}
    try:
        width = weights[names["backbone.0.patch_embed.proj.weight"]].shape[0]
        table = weights[names["backbone.0.layers.0.blocks.0.attn.relative_position_bias_table"]].shape[0]
    except KeyError as error:
        raise ModelError(
            f"{error.args[0]} is missing", where=where, hint="It is not a GroundingDINO with Swin."
        ) from error
    window = (round(table**0.5) + 1) // 2
    for name, swin in SWINS.items():
        if (swin["embed_dim"], swin["window_size"]) == (width, window):
            return name
    raise ModelError(
        f"a Swin Transformer of width {width} with windows of {window} is not known",
        where=where,
        hint="Name the config with load.config.",
    )
