"""Foreign names of tensors, written down apart from the code under test: what ComfyUI, makers and llama.cpp call them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Tensors = dict[str, Any]


def renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> Tensors:
    return {rename(name): tensor.clone().contiguous() for name, tensor in state.items()}


def vae_to_original(state: Mapping[str, Any], levels: int) -> Tensors:
    """Rename an autoencoder's tensors to CompVis' names; its attention was made of 1x1 convolutions."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def rename(name: str) -> str:
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for new, old in attention.items():
            name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
        return name

    return {
        rename(name): tensor[:, :, None, None] if "attentions" in name and tensor.ndim == 2 else tensor
        for name, tensor in state.items()
    }


def flux2_vae(state: Mapping[str, Any], levels: int) -> Tensors:
    """Return the names of flux2-vae.safetensors: CompVis', and the outermost convolutions inside encoder and decoder."""
    inside = {"quant_conv.": "encoder.quant_conv.", "post_quant_conv.": "decoder.post_quant_conv."}
    return {
        next((new + name.removeprefix(old) for old, new in inside.items() if name.startswith(old)), name): tensor
        for name, tensor in vae_to_original(state, levels).items()
    }


def wan_vae(state: Mapping[str, Any]) -> Tensors:
    """Return the names of qwen_image_vae.safetensors, which are those of Wan's autoencoder, of four levels."""
    residual = {"norm1.gamma": "residual.0.gamma", "conv1.": "residual.2.", "norm2.gamma": "residual.3.gamma",
                "conv2.": "residual.6.", "conv_shortcut.": "shortcut."}  # fmt: skip

    def inner(name: str) -> str:
        return next((new + name.removeprefix(old) for old, new in residual.items() if name.startswith(old)), name)

    def rename(name: str) -> str:
        if name.startswith(("quant_conv.", "post_quant_conv.")):
            return re.sub(r"^(post_)?quant_conv", lambda m: "conv2" if m[1] else "conv1", name)
        half, rest = name.split(".", 1)
        if m := re.match(r"mid_block\.resnets\.(\d)\.(.+)", rest):
            return f"{half}.middle.{2 * int(m[1])}.{inner(m[2])}"
        if m := re.match(r"mid_block\.attentions\.0\.(.+)", rest):
            return f"{half}.middle.1.{m[1]}"
        if m := re.match(r"down_blocks\.(\d+)\.(.+)", rest):
            return f"{half}.downsamples.{m[1]}.{inner(m[2])}"
        if m := re.match(r"up_blocks\.(\d)\.resnets\.(\d)\.(.+)", rest):
            return f"{half}.upsamples.{4 * int(m[1]) + int(m[2])}.{inner(m[3])}"
        if m := re.match(r"up_blocks\.(\d)\.upsamplers\.0\.(.+)", rest):
            return f"{half}.upsamples.{4 * int(m[1]) + 3}.{m[2]}"
        return half + "." + rest.replace("conv_in", "conv1").replace("norm_out", "head.0").replace("conv_out", "head.2")

    return renamed(state, rename)


# -- text encoders -------------------------------------------------------------------------------------------------------

T5 = {"layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm", "wi_0": "ffn_gate", "wi_1": "ffn_up",
      "wo": "ffn_down", "relative_attention_bias": "attn_rel_b"}  # fmt: skip
QWEN3 = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip


def clip_text(state: Mapping[str, Any]) -> Tensors:
    """Return the names of clip_l.safetensors and clip_g.safetensors: those of older transformers."""
    return renamed(state, lambda n: n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}")


def t5_llama(state: Mapping[str, Any]) -> Tensors:
    def rename(name: str) -> str:
        if name == "shared.weight":
            return "token_embd.weight"
        if name == "encoder.final_layer_norm.weight":
            return "enc.output_norm.weight"
        m = re.match(r"encoder\.block\.(\d+)\.(.+)\.weight", name)
        assert m, name
        inside = m[2].replace("layer.0.SelfAttention.", "").replace("layer.1.DenseReluDense.", "")
        return f"enc.blk.{m[1]}.{T5.get(inside, f'attn_{inside}')}.weight"

    return renamed({n: t for n, t in state.items() if n != "encoder.embed_tokens.weight"}, rename)


def qwen_llama(state: Mapping[str, Any]) -> Tensors:
    """Return llama.cpp's names of Qwen3, and of the half of Qwen2.5-VL that reads."""

    def rename(name: str) -> str:
        name = name.removeprefix("model.").removeprefix("language_model.")
        if m := re.match(r"layers\.(\d+)\.(.+)\.(weight|bias)", name):
            return f"blk.{m[1]}.{QWEN3[m[2]]}.{m[3]}"
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight"}[name]  # fmt: skip

    return renamed(state, rename)


SIGHT = {"norm1": "ln1", "norm2": "ln2", "attn.proj": "attn_out", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}  # fmt: skip


def qwen_mmproj(state: Mapping[str, Any], *, turned: bool) -> Tensors:
    """Return llama.cpp's names of what sees pictures for Qwen2.5-VL; old files have up and down the other way round."""
    made: Tensors = {}
    for name, tensor in state.items():
        if name == "patch_embed.proj.weight":
            made |= {"v.patch_embd.weight": tensor[:, :, 0], "v.patch_embd.weight.1": tensor[:, :, 1]}
        elif name.startswith("merger."):
            made[name.replace("merger.mlp", "mm").replace("merger.ln_q", "v.post_ln")] = tensor
        else:
            m = re.match(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
            assert m, name
            if m[2] == "attn.qkv":
                made |= {
                    f"v.blk.{m[1]}.attn_{each}.{m[3]}": part for each, part in zip("qkv", tensor.chunk(3), strict=True)
                }
                continue
            inside = SIGHT[m[2]]
            if turned:
                inside = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(inside, inside)
            made[f"v.blk.{m[1]}.{inside}.{m[3]}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in made.items()}


# -- transformers --------------------------------------------------------------------------------------------------------

FLUX2 = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer", "proj_out": "final_layer.linear",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    **{f"{which}.linear": f"{which}.lin" for which in (
        "double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")},
}  # fmt: skip
FLUX2_BLOCK = {
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj", "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2", "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
}  # fmt: skip
FLUX2_NORMS = {"attn.norm_q": "img_attn.norm.query_norm", "attn.norm_k": "img_attn.norm.key_norm",
               "attn.norm_added_q": "txt_attn.norm.query_norm", "attn.norm_added_k": "txt_attn.norm.key_norm"}  # fmt: skip


def flux2(state: Mapping[str, Any], join: Callable[[list[Any]], Any]) -> Tensors:
    """Return Black Forest Labs' names of FLUX.2; `join` puts matrices one below the other."""
    made: Tensors = {}
    for name, tensor in state.items():
        stem, kind = name.rsplit(".", 1)
        if stem == "norm_out.linear":
            made[f"final_layer.adaLN_modulation.1.{kind}"] = join(list(tensor.chunk(2))[::-1])
        elif stem in FLUX2:
            made[f"{FLUX2[stem]}.{kind}"] = tensor
        elif m := re.match(r"(single_)?transformer_blocks\.(\d+)\.(.+)", stem):
            place, inside = f"{'single' if m[1] else 'double'}_blocks.{m[2]}", m[3]
            if inside in FLUX2_NORMS:
                norm = FLUX2_NORMS[inside]
                made[f"{place}.{norm.removeprefix('img_attn.') if m[1] else norm}.scale"] = tensor
            elif inside in FLUX2_BLOCK:
                made[f"{place}.{FLUX2_BLOCK[inside]}.{kind}"] = tensor
            elif inside in ("attn.to_q", "attn.add_q_proj"):
                side = "img_attn" if inside == "attn.to_q" else "txt_attn"
                parts = [state[name.replace("_q", f"_{each}")] for each in "qkv"]
                made[f"{place}.{side}.qkv.{kind}"] = join(parts)
            else:
                assert re.search(r"(to|add)_[kv]", inside), name
        else:
            raise AssertionError(name)
    return made


def streams(state: Mapping[str, Any], join: Callable[[list[Any]], Any], names: Mapping[str, str]) -> Tensors:
    """Return names of Z-Image and Lumina-Image 2.0 as ComfyUI has them, by replacing parts of diffusers'."""
    made: Tensors = {}
    for name, tensor in state.items():
        if re.search(r"\.to_[kv]\.", name):
            continue
        old = name
        if ".to_q." in name:
            tensor, old = (
                join([state[name.replace("to_q", f"to_{each}")] for each in "qkv"]),
                name.replace("to_q", "qkv"),
            )
        for ours, theirs in names.items():
            old = re.sub(ours, theirs, old)
        made[old] = tensor
    return made


ZIMAGE = {
    r"^all_x_embedder\.2-1": "x_embedder", r"^all_final_layer\.2-1": "final_layer", r"attention\.to_out\.0": "attention.out",
    r"attention\.norm_q": "attention.q_norm", r"attention\.norm_k": "attention.k_norm",
}  # fmt: skip
LUMINA2 = {
    r"^time_caption_embed\.caption_embedder": "cap_embedder", r"^time_caption_embed\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
    r"^time_caption_embed\.timestep_embedder\.linear_2": "t_embedder.mlp.2", r"^norm_out\.linear_1": "final_layer.adaLN_modulation.1",
    r"^norm_out\.linear_2": "final_layer.linear", r"\.attn\.": ".attention.", r"attention\.to_out\.0": "attention.out",
    r"attention\.norm_q": "attention.q_norm", r"attention\.norm_k": "attention.k_norm", r"\.norm1\.linear": ".adaLN_modulation.1",
    r"\.norm1\.norm\.": ".attention_norm1.", r"(context_refiner\.\d+)\.norm1\.": r"\1.attention_norm1.",
    r"\.norm2\.": ".attention_norm2.", r"feed_forward\.linear_": "feed_forward.w",
}  # fmt: skip
