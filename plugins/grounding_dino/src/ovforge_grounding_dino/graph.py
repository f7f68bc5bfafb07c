"""GroundingDINO (Liu et al. 2023) for tracing: transformers' modules, run by forwards that convert to plain operations.

The weights, and what each module computes, are transformers'; what differs is what a trace would fix or OpenVINO has no
operation for. Sizes of pictures stay open, masks of the text come from outside, and deformable attention is GridSample.
Imported where a model is converted, and nowhere else: it needs torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ovforge_grounding_dino.swin import swin

__all__ = ["detect", "encode_text"]

Size = tuple[Any, Any]
FAR = 1e4
"""Logit of places that are not proposals: their sigmoid is 1, as that of infinity is, and no sum makes it NaN."""


def encode_text(model: Any, input_ids: Tensor, text_self_mask: Tensor, text_position_ids: Tensor) -> Tensor:
    """Return text features, float32 (texts, tokens, width), by BERT, in which the tokens of a phrase see each other.

    `input_ids` and `text_position_ids` are int64 (texts, tokens), `text_self_mask` boolean (texts, tokens, tokens).
    """
    base = model.model
    hidden = base.text_backbone.embeddings(
        input_ids=input_ids, position_ids=text_position_ids, token_type_ids=torch.zeros_like(input_ids)
    )
    mask = _additive(text_self_mask[:, None])
    for layer in base.text_backbone.encoder.layer:
        attention = layer.attention.self
        heads, size = attention.num_attention_heads, attention.attention_head_size
        mixed = _attend(
            _heads(attention.query(hidden), heads, size),
            _heads(attention.key(hidden), heads, size),
            _heads(attention.value(hidden), heads, size),
            mask,
        )
        hidden = layer.attention.output(mixed, hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return base.text_projection(hidden)


def detect(
    model: Any,
    pixel_values: Tensor,
    pixel_mask: Tensor,
    text_features: Tensor,
    text_mask: Tensor,
    text_self_mask: Tensor,
    text_position_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return logits, float32 (pictures, queries, tokens), and boxes, (pictures, queries, 4): centre, width, height.

    `pixel_values` are float32 (pictures, 3, height, width), `pixel_mask` float32 (pictures, height, width): 1 in the
    picture, 0 in its padding, right and below. `text_mask` is boolean (pictures, tokens): false in padding. Boxes are
    relative to the picture without its padding. One picture may come with several texts: the backbone then runs once.
    """
    base, config = model.model, model.config
    with torch.no_grad():
        maps = _feature_maps(base, pixel_values)
        sizes = [(each.shape[2], each.shape[3]) for each in maps]
        masks = [functional.interpolate(pixel_mask[:, None], size=size)[:, 0] for size in sizes]
        positions = [
            _picture_positions(mask, config.d_model // 2, config.positional_embedding_temperature).flatten(1, 2) + level
            for mask, level in zip(masks, base.level_embed, strict=True)
        ]
        vision = torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)
        mask = torch.cat([each.flatten(1) for each in masks], 1)
        ratios = torch.stack([torch.stack([m[:, 0].mean(1), m[:, :, 0].mean(1)], -1) for m in masks], 1)
        vision, text = _encode(base, vision, mask, torch.cat(positions, 1), sizes, ratios, text_features, text_mask,
                               text_self_mask, text_position_ids)  # fmt: skip
        states, reference = _proposals(base, vision, mask, sizes, ratios, text, text_mask)
        return _decode(model, states, reference, vision, mask, sizes, ratios, text, text_mask)


# -- backbone -----------------------------------------------------------------------------------------------------


def _feature_maps(base: Any, pixels: Tensor) -> list[Tensor]:
    """Return feature maps (pictures, width of the model, height, width), from fine to coarse."""
    backbone = base.backbone.conv_encoder.model
    # Convolutions alone convert as they are.
    found = swin(backbone, pixels) if backbone.config.model_type == "swin" else backbone(pixels).feature_maps
    maps = [project(each) for project, each in zip(base.input_proj_vision, found, strict=False)]
    for project in base.input_proj_vision[len(found) :]:
        maps.append(project(found[-1] if len(maps) == len(found) else maps[-1]))
    return maps


def _picture_positions(mask: Tensor, width: int, temperature: float) -> Tensor:
    """Return sine embeddings (pictures, h, w, 2 x width) of where in the unmasked part a place lies."""
    axes = []
    for axis in (1, 2):
        steps = mask.cumsum(axis)
        last = steps[:, -1:] if axis == 1 else steps[:, :, -1:]
        axes.append(_sines(steps / (last + 1e-6), width, temperature))
    return torch.cat(axes, -1)


def _sines(values: Tensor, width: int, temperature: float) -> Tensor:
    """Return sines and cosines of rising wave lengths, interleaved: (..., width) for values (...)."""
    numbers = torch.arange(width, dtype=torch.float32)
    waves = temperature ** (2 * torch.div(numbers, 2, rounding_mode="floor") / width)
    phases = values[..., None] * (2 * math.pi) / waves
    return torch.stack((phases[..., 0::2].sin(), phases[..., 1::2].cos()), -1).flatten(-2)


# -- feature enhancer ---------------------------------------------------------------------------------------------


def _encode(
    base: Any, vision: Tensor, mask: Tensor, positions: Tensor, sizes: list[Size], ratios: Tensor, text: Tensor,
    text_mask: Tensor, text_self_mask: Tensor, text_position_ids: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return vision (pictures, places, width) and text states (pictures, tokens, width) that have seen each other."""
    text_positions = _sines(text_position_ids.to(torch.float32), base.config.d_model, 10000)
    reference = _reference_points(sizes, ratios)
    see_vision, see_text = _additive(mask[:, None, None] > 0.5), _additive(text_mask[:, None, None])
    see_phrase = _additive(text_self_mask[:, None])
    for layer in base.encoder.layers:
        fusion = layer.fusion_layer
        seen, read = fusion.layer_norm_vision(vision), fusion.layer_norm_text(text)
        vision_change, text_change = _fuse(fusion.attn, seen, read, see_vision, see_text)
        vision = seen + fusion.vision_param * vision_change
        text = read + fusion.text_param * text_change
        text = _enhance(layer.text_enhancer_layer, text, text_positions, see_phrase)
        deformable = layer.deformable_layer
        moved = _deformable(deformable.self_attn, vision + positions, vision, mask, reference, sizes)
        vision = _feed_forward(deformable, deformable.self_attn_layer_norm(vision + moved))
    return vision, text


def _reference_points(sizes: list[Size], ratios: Tensor) -> Tensor:
    """Return the centre of each place, on each level: (pictures, places, levels, 2), x before y."""
    found = []
    for level, size in enumerate(sizes):
        x, y = _centres(size)
        found.append(torch.stack((x[None] / ratios[:, level, :1], y[None] / ratios[:, level, 1:]), -1))
    return torch.cat(found, 1)[:, :, None] * ratios[:, None]


def _centres(size: Size) -> tuple[Tensor, Tensor]:
    """Return x and y of each place of a map, relative to its size, both (h x w,)."""
    height, width = size
    x = ((torch.arange(width) + 0.5) / width)[None].expand(height, -1).reshape(-1)
    y = ((torch.arange(height) + 0.5) / height)[:, None].expand(-1, width).reshape(-1)
    return x, y


def _fuse(attn: Any, vision: Tensor, text: Tensor, see_vision: Tensor, see_text: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of pictures to text and of text to pictures, by the same scores.

    A picture has thousands of places, a text a few tokens. So projections of places to queries and values, and that of
    what they read, are multiplied onto the tokens first: places meet matrices of heads x tokens rows, and none as wide
    as all heads. It is the same sum in another order.
    """
    heads, size, tokens = attn.num_heads, attn.head_dim, text.shape[1]
    key = _heads(attn.text_proj(text) * attn.scale, heads, size)
    looked = (key @ attn.vision_proj.weight.reshape(1, heads, size, -1)).flatten(1, 2)
    bias = (key @ attn.vision_proj.bias.reshape(1, heads, size, 1)).transpose(2, 3) + see_text
    scores = (vision @ looked.transpose(1, 2)).reshape(-1, vision.shape[1], heads, tokens) + bias.transpose(1, 2)
    attended = _heads(attn.values_text_proj(text), heads, size)
    attended = attended @ attn.out_vision_proj.weight.reshape(1, -1, heads, size).permute(0, 2, 3, 1)
    to_text = scores.softmax(-1).flatten(2) @ attended.flatten(1, 2) + attn.out_vision_proj.bias
    # The bias of queries adds the same to a token's scores in all places, which a softmax over places does not see.
    turned = looked @ vision.transpose(1, 2) + see_vision[:, 0]
    found = (turned.softmax(-1) @ vision).reshape(-1, heads, tokens, vision.shape[2])
    found = found @ attn.values_vision_proj.weight.reshape(1, heads, size, -1).transpose(2, 3)
    return to_text, attn.out_text_proj(_joined(found) + attn.values_vision_proj.bias)


def _enhance(layer: Any, text: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    text = layer.layer_norm_before(text + _attention(layer.self_attn, text + positions, text + positions, text, mask))
    changed = layer.fc2(layer.activation(layer.fc1(text)))
    return layer.layer_norm_after(text + changed)


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    return layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))


def _deformable(attn: Any, query: Tensor, vision: Tensor, mask: Tensor, reference: Tensor, sizes: list[Size]) -> Tensor:
    """Multi-scale deformable attention (Zhu et al. 2021): few places for each query, between pixels.

    `query` is (pictures, queries, width); `reference` (pictures, queries, levels, 2 or 4) says around where it looks.
    """
    heads, levels, points = attn.n_heads, attn.n_levels, attn.n_points
    size, queries = attn.d_model // heads, query.shape[1]
    value = attn.value_proj(vision) * mask[..., None]
    offsets = attn.sampling_offsets(query)
    if reference.shape[-1] == 2:
        # From steps of a map to GridSample's -1 to 1, which becomes part of the projection where sizes are fixed.
        scale = torch.stack([torch.stack([2 / _float(width), 2 / _float(height)]) for height, width in sizes])
        offsets = offsets * scale[None, :, None].expand(heads, -1, points, -1).reshape(-1)
    # Heads before queries, so that a head is one picture to GridSample; points before queries, so that sums run on
    # rows that lie together.
    offsets = offsets.reshape(-1, queries, heads, levels, points, 2).permute(0, 2, 3, 4, 1, 5)
    around = reference.transpose(1, 2)[:, None, :, None]
    if reference.shape[-1] == 4:
        offsets = offsets * (around[..., 2:] / points)
    grid = (offsets + (2 * around[..., :2] - 1)).flatten(0, 1)
    scores = attn.attention_weights.weight @ query.transpose(1, 2) + attn.attention_weights.bias[:, None]
    weights = scores.reshape(-1, levels * points, queries).softmax(1).reshape(-1, levels, points, queries)
    parts = value.split([height * width for height, width in sizes], 1)
    total: Any = 0
    for level, ((height, width), part) in enumerate(zip(sizes, parts, strict=True)):
        pictures = part.transpose(1, 2).reshape(-1, size, height, width)
        sampled = functional.grid_sample(pictures, grid[:, level], align_corners=False)
        total = total + sampled * weights[:, level][:, None]
    return attn.output_proj(total.sum(2).reshape(-1, heads * size, queries).transpose(1, 2))


def _float(number: Any) -> Tensor:
    """Return a size, a number or traced, as a scalar tensor."""
    return torch.as_tensor(number).to(torch.float32)


# -- queries and decoder ------------------------------------------------------------------------------------------


def _proposals(
    base: Any, vision: Tensor, mask: Tensor, sizes: list[Size], ratios: Tensor, text: Tensor, text_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the decoder's first states (pictures, queries, width), and boxes (pictures, queries, 4).

    Language-guided query selection: the places whose best score for a token is highest.
    """
    if not base.config.two_stage:
        queries = base.query_position_embeddings.weight[None] + vision[:, :1] * 0
        return queries, (base.reference_points.weight[None] + vision[:, :1, :1] * 0).sigmoid()
    found = []
    for level, size in enumerate(sizes):
        x, y = _centres(size)
        centre = torch.stack((x[None] / ratios[:, level, :1], y[None] / ratios[:, level, 1:]), -1)
        found.append(torch.cat((centre, torch.ones_like(centre) * (0.05 * 2.0**level)), -1))
    boxes = torch.cat(found, 1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & (mask[..., None] > 0.5)
    logits = torch.where(valid, torch.log(boxes / (1 - boxes)), FAR)
    objects = base.enc_output_norm(base.enc_output(torch.where(valid, vision, 0.0)))
    scores = _contrast(base.encoder_output_class_embed, objects, text, text_mask).max(-1)[0]
    best = torch.topk(scores, base.config.num_queries, dim=1)[1]
    logits = torch.gather(logits.expand(best.shape[0], -1, -1), 1, best[..., None].expand(-1, -1, 4))
    # Boxes of the places that were chosen alone: the head does not look at others.
    chosen = torch.gather(objects, 1, best[..., None].expand(-1, -1, base.config.d_model))
    reference = (base.encoder_output_bbox_embed(chosen) + logits).sigmoid()
    if base.config.embedding_init_target:
        return base.query_position_embeddings.weight[None] + chosen * 0, reference
    return chosen, reference


def _contrast(head: Any, vision: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """Return how well vision states fit each token, (pictures, states, tokens); padding is far below all others."""
    scores = vision @ text.transpose(1, 2)
    if hasattr(head, "bias"):  # MM-GroundingDINO's
        scores = scores / math.sqrt(vision.shape[-1]) + head.bias
    return torch.where(text_mask[:, None], scores, -FAR)


def _decode(
    model: Any, states: Tensor, reference: Tensor, vision: Tensor, mask: Tensor, sizes: list[Size], ratios: Tensor,
    text: Tensor, text_mask: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Refine states and boxes layer by layer; return logits and boxes of the last."""
    decoder, width = model.model.decoder, model.config.d_model
    see_text = _additive(text_mask[:, None, None])
    levels = torch.cat([ratios, ratios], -1)[:, None]
    for number, layer in enumerate(decoder.layers):
        places = reference[:, :, None] * levels
        x, y, *extent = (_sines(places[:, :, 0, axis], width // 2, 10000) for axis in range(4))
        positions = decoder.reference_points_head(torch.cat([y, x, *extent], -1))
        looked = states + positions
        states = layer.self_attn_layer_norm(states + _attention(layer.self_attn, looked, looked, states, None))
        attended = _attention(layer.encoder_attn_text, states + positions, text, text, see_text)
        states = layer.encoder_attn_text_layer_norm(states + attended)
        seen = _deformable(layer.encoder_attn, states + positions, vision, mask, places, sizes)
        states = _feed_forward(layer, layer.encoder_attn_layer_norm(states + seen))
        before = reference.clamp(1e-5, 1 - 1e-5)
        before = torch.log(before / (1 - before))
        if number + 1 < len(decoder.layers):
            reference = (decoder.bbox_embed[number](states) + before).sigmoid()
    last = decoder.layer_norm(states)
    boxes = (model.bbox_embed[number](last) + before).sigmoid()
    return _contrast(model.class_embed[number], last, text, text_mask), boxes


# -- attention ----------------------------------------------------------------------------------------------------


def _attention(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    heads, size = attn.num_attention_heads, attn.attention_head_size
    mixed = _attend(
        _heads(attn.query(query), heads, size), _heads(attn.key(key), heads, size),
        _heads(attn.value(value), heads, size), mask,
    )  # fmt: skip
    return attn.out_proj(mixed)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return _joined(functional.scaled_dot_product_attention(query, key, value, attn_mask=mask))


def _heads(states: Tensor, heads: int, size: int) -> Tensor:
    """Return (pictures, states, heads x size) as (pictures, heads, states, size)."""
    return states.reshape(states.shape[0], states.shape[1], heads, size).transpose(1, 2)


def _joined(states: Tensor) -> Tensor:
    """Undo `_heads`."""
    return states.transpose(1, 2).flatten(2)


def _additive(mask: Tensor) -> Tensor:
    """Return 0 where a mask is true, and what no score outweighs elsewhere."""
    return torch.where(mask, 0.0, -FAR)
