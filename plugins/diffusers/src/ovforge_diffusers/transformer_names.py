"""From the published names of diffusion transformers to diffusers': which rows of which tensors make which weight.

What is one matrix in the published files (queries, keys and values) is several in diffusers, and shift and scale of the
last modulation lie the other way round. Both are matters of whole rows, so that quantized rows stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from ovforge.errors import ModelError
from ovforge_diffusers.header import Shapes

__all__ = ["Slice", "diffusers_rows"]

Slice = tuple[str, int, int]
"""A tensor of the file, its first row and the row after the last."""

_QKV = ("q", "k", "v")
_KINDS = (".weight", ".bias")

_FLUX = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
}
_FLUX_NORMS = {
    f"{old}.{each}": f"{new}.weight"
    for old, new in {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }.items()
    for each in ("scale", "weight")  # ComfyUI stores the second
}
_FLUX_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}

_FLUX2 = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_FLUX2_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FLUX2_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}

_STREAMS = ("layers", "noise_refiner", "context_refiner")
"""Blocks of Lumina-Image 2.0, and of Z-Image, which is built like it."""

_ZIMAGE = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    **{name: name for name in ("x_pad_token", "cap_pad_token")},
}
_ZIMAGE_BLOCK = {
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "adaLN_modulation.0": "adaLN_modulation.0",
    **{f"{name}{number}": f"{name}{number}" for name in ("attention_norm", "ffn_norm") for number in (1, 2)},
    **{f"feed_forward.w{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
}
_LUMINA2 = {
    "x_embedder": "x_embedder",
    "cap_embedder.0": "time_caption_embed.caption_embedder.0",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1",
    "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
_LUMINA2_BLOCK = {
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "adaLN_modulation.1": "norm1.linear",
    "attention_norm1": "norm1.norm",
    "attention_norm2": "norm2",
    **{f"ffn_norm{number}": f"ffn_norm{number}" for number in (1, 2)},
    **{f"feed_forward.w{number}": f"feed_forward.linear_{number}" for number in (1, 2, 3)},
}

_SD3 = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SD3_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}


def diffusers_rows(kind: str, own: Shapes) -> dict[str, list[Slice]]:
    """Return diffusers' name -> rows, for a transformer of class `kind` whose tensors have the shapes `own`.

    Raises ModelError for tensors that have no place there: a part of a model is never left out in silence.
    """
    found: dict[str, list[Slice]] = {}
    strange = []
    for name, shape in own.items():
        stem, suffix = next(((name.removesuffix(k), k) for k in _KINDS if name.endswith(k)), (name, ""))
        rows = shape[0] if shape else 0
        placed = list(_NAMINGS[kind](stem, suffix, rows, own))
        for new, begin, end in placed:
            found.setdefault(new, []).append((name, begin, end))
        if not placed:
            strange.append(name)
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise ModelError(f"{strange[0]}{more} belong nowhere in a {kind} of its kind")
    return found


Placed = Iterator[tuple[str, int, int]]


def _flux(stem: str, suffix: str, rows: int, own: Shapes) -> Placed:
    """Yield where a tensor of Black Forest Labs' FLUX.1 goes, and which of its rows."""
    if block := re.fullmatch(r"single_blocks\.(\d{1,4})\.linear1", stem):
        new = f"single_transformer_blocks.{block[1]}."
        width = own.get("img_in.bias", (0,))[0]
        names = [*(f"{new}attn.to_{each}{suffix}" for each in _QKV), f"{new}proj_mlp{suffix}"]
        yield from _split(names, [width, width, width, rows - 3 * width])
    else:
        yield from _of_two_streams(stem, suffix, rows, _FLUX, _FLUX_DOUBLE, _FLUX_SINGLE)


def _flux2(stem: str, suffix: str, rows: int, own: Shapes) -> Placed:
    """Yield where a tensor of Black Forest Labs' FLUX.2 goes, and which of its rows."""
    yield from _of_two_streams(stem, suffix, rows, _FLUX2, _FLUX2_DOUBLE, _FLUX2_SINGLE)


def _of_two_streams(
    stem: str, suffix: str, rows: int, whole: Mapping[str, str], double: Mapping[str, str], single: Mapping[str, str]
) -> Placed:
    """Yield the same for what both have in common: blocks of two streams, and then of one."""
    if stem in whole:
        yield whole[stem] + suffix, 0, rows
    elif stem == "final_layer.adaLN_modulation.1":
        yield from _swapped("norm_out.linear" + suffix, rows)
    elif block := re.fullmatch(r"(double|single)_blocks\.(\d{1,4})\.(.+)", stem):
        two, inside = block[1] == "double", block[3]
        new = f"{'' if two else 'single_'}transformer_blocks.{block[2]}."
        inner = double if two else single
        if inside in inner:
            yield new + inner[inside] + suffix, 0, rows
        elif inside + suffix in _FLUX_NORMS:
            yield new + _FLUX_NORMS[inside + suffix], 0, rows
        elif two and inside == "img_attn.qkv":
            yield from _split([f"{new}attn.to_{each}{suffix}" for each in _QKV], [rows // 3] * 3)
        elif two and inside == "txt_attn.qkv":
            yield from _split([f"{new}attn.add_{each}_proj{suffix}" for each in _QKV], [rows // 3] * 3)


def _zimage(stem: str, suffix: str, rows: int, own: Shapes) -> Placed:
    """Yield where a tensor of Z-Image goes in the names of ComfyUI, which has queries, keys and values as one."""
    yield from _of_streams(stem, suffix, rows, own, _ZIMAGE, _ZIMAGE_BLOCK, "attention")


def _lumina2(stem: str, suffix: str, rows: int, own: Shapes) -> Placed:
    """Yield where a tensor of Alpha-VLLM's Lumina-Image 2.0 goes, and which of its rows."""
    for new, begin, end in _of_streams(stem, suffix, rows, own, _LUMINA2, _LUMINA2_BLOCK, "attn"):
        yield new.replace(".norm1.norm.", ".norm1.") if new.startswith("context_refiner.") else new, begin, end


def _of_streams(
    stem: str, suffix: str, rows: int, own: Shapes, whole: Mapping[str, str], inner: Mapping[str, str], attention: str
) -> Placed:
    if stem in whole:
        yield whole[stem] + suffix, 0, rows
    elif block := re.fullmatch(rf"({'|'.join(_STREAMS)})\.(\d{{1,4}})\.(.+)", stem):
        new, inside = f"{block[1]}.{block[2]}.", block[3]
        if inside in inner:
            yield new + inner[inside] + suffix, 0, rows
        elif inside == "attention.qkv":
            width = own.get("x_embedder.weight", (0,))[0]  # several heads of queries may share keys and values
            shared = (rows - width) // 2
            yield from _split([f"{new}{attention}.to_{each}{suffix}" for each in _QKV], [width, shared, shared])


def _sd3(stem: str, suffix: str, rows: int, own: Shapes) -> Placed:
    """Yield where a tensor of Stability's Stable Diffusion 3 and 3.5 goes, and which of its rows."""
    if stem == "pos_embed" and not suffix:
        yield "pos_embed.pos_embed", 0, rows
    elif stem in _SD3:
        yield _SD3[stem] + suffix, 0, rows
    elif stem == "final_layer.adaLN_modulation.1":
        yield from _swapped("norm_out.linear" + suffix, rows)
    elif block := re.fullmatch(r"joint_blocks\.(\d{1,4})\.(.+)", stem):
        new, inside = f"transformer_blocks.{block[1]}.", block[2]
        last = f"joint_blocks.{int(block[1]) + 1}.x_block.attn.qkv.weight" not in own
        if inside == "context_block.adaLN_modulation.1" and last:
            yield from _swapped(new + "norm1_context.linear" + suffix, rows)
        elif inside in _SD3_BLOCK:
            yield new + _SD3_BLOCK[inside] + suffix, 0, rows
        elif qkv := re.fullmatch(r"(x|context)_block\.(attn2?)\.qkv", inside):
            form = "{}{}.to_{}{}" if qkv[1] == "x" else "{}{}.add_{}_proj{}"
            yield from _split([form.format(new, qkv[2], each, suffix) for each in _QKV], [rows // 3] * 3)


def _ltx(stem: str, suffix: str, rows: int, own: Shapes) -> Placed:
    """Yield where a tensor of Lightricks' LTX-Video goes: most names are diffusers' own."""
    new = re.sub(r"^patchify_proj", "proj_in", re.sub(r"^adaln_single\.", "time_embed.", stem))
    yield re.sub(r"\.([qk])_norm$", r".norm_\1", new) + suffix, 0, rows


def _split(names: Sequence[str], sizes: Sequence[int]) -> Placed:
    """Yield parts that follow each other."""
    begin = 0
    for name, size in zip(names, sizes, strict=True):
        yield name, begin, begin + size
        begin += size


def _swapped(name: str, rows: int) -> Placed:
    """Yield the second half and then the first: scale and shift, which the published files hold as shift and scale."""
    yield name, rows // 2, rows
    yield name, 0, rows // 2


_NAMINGS: dict[str, Callable[[str, str, int, Shapes], Placed]] = {
    "Flux2Transformer2DModel": _flux2,
    "ZImageTransformer2DModel": _zimage,
    "Lumina2Transformer2DModel": _lumina2,
    "FluxTransformer2DModel": _flux,
    "SD3Transformer2DModel": _sd3,
    "LTXVideoTransformer3DModel": _ltx,
}
