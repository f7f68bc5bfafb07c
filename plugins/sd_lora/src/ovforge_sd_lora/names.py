"""What the keys of adapter files mean: which model, which module of it, which tensor.

A module is looked up among the paths that the model really has, each under all the names that it goes by: diffusers'
(`down_blocks.0.attentions.0.proj_in`), with dots or underscores, and Stable Diffusion's first ones
(`input_blocks.1.1.proj_in`), which SDXL adapters use. Sources: kohya-ss/sd-scripts (networks/lora.py); diffusers
(scripts/convert_diffusers_to_original_sdxl.py; loaders/lora_conversion_utils.py); peft (utils/save_and_load.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Key", "aliases", "canonical", "flat", "foreign_kind", "parse_key", "reads_as_t5", "word_of"]

ROLES = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a file: `role` is None if the key does not say; `module` is as written, without prefixes.

    `adapter` is the name that PEFT gave the adapter, None if there is none; `prefixes` are what was taken off the
    module, so that two keys that name one thing in two ways can be told apart.
    """

    role: str | None
    module: str
    tensor: str
    adapter: str | None = None
    prefixes: str = ""


_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_te_", "text_encoder"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("unet.", "unet"),
    ("transformer.", "transformer"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.clip_h.", "text_encoder"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
    ("t5xxl.", "text_encoder_3"),
    ("clip_l.", "text_encoder"),
    ("clip_g.", "text_encoder_2"),
    ("clip_h.", "text_encoder"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("lycoris_", None),
    ("base_model.model.", None),
    ("state_dict.", None),
    ("module.", None),
)

_NAME = r"(?:\.(?!weight$|bias$)(?P<adapter>[\w-]+))?"  # PEFT may put the adapter's name in
_TENSORS = tuple(
    (re.compile(rf"{pattern}$"), name)
    for pattern, name in (
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"(?:\.lora|_lora|\.lora_linear_layer|(?<=_lora[12]))\.down\.weight", "down"),
        (r"(?:\.lora|_lora|\.lora_linear_layer|(?<=_lora[12]))\.up\.weight", "up"),
        (rf"\.lora_A{_NAME}(?:\.weight)?", "down"),  # AdaLoRA leaves out ".weight"
        (rf"\.lora_B{_NAME}(?:\.weight)?", "up"),
        (rf"\.lora_E{_NAME}", "singular"),
        (rf"\.lora_B{_NAME}\.bias", "up_bias"),
        (rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "magnitude"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.alpha", "alpha"),
        (rf"\.hada_(?P<tensor>w[12]_[ab]|t[12]){_NAME}", ""),
        (rf"\.(?P<tensor>lokr_(?:w[12](?:_[ab])?|t2)){_NAME}", ""),
        (r"\.diff", "diff"),
        (r"\.diff_b", "diff_b"),
        (r"\.w_norm", "diff"),
        (r"\.b_norm", "diff_b"),
        (r"\.(?P<tensor>oft_blocks|rescale|on_input)", ""),
        (r"\.(?P<tensor>[ab][12]|bm)\.weight", ""),
        (rf"\.(?P<tensor>oft_R|gralora_[AB]_general){_NAME}\.weight", ""),
        (rf"\.(?P<tensor>ia3_l|boft_[Rs]|hra_u|hira_[AB]|miss_block|fourierft_spectrum|c3a_kernel){_NAME}", ""),
        (rf"\.(?P<tensor>shira_(?:weight|indices)|road_(?:theta|alpha)|gralora_[AB]){_NAME}", ""),
        (rf"\.(?P<tensor>(?:vera|randlora)_(?:A|B|lambda|gamma|lambda_[bd])){_NAME}", ""),
        (rf"\.(?P<tensor>delora_(?:A|B|lambda|w_norm)){_NAME}", ""),
        (rf"\.(?P<tensor>glora_[A-E]){_NAME}\.(?P<part>Xd|Xu|X|zeros)", ""),
        (rf"\.ln_tuning_layers{_NAME}\.weight", "new"),
        (rf"\.ln_tuning_layers{_NAME}\.bias", "new_b"),
    )
)
_WHOLE = tuple(
    (re.compile(rf"(?:\.base_layer|\.modules_to_save{_NAME})?\.{end}$"), name)
    for end, name in (("weight", "new"), ("bias", "new_b"))
)
"""Whole weights and biases beside an adapter's tensors, which PEFT writes under the module's own name."""

_NORMS = tuple(
    (re.compile(rf"(?:{'|'.join(f'(?<={name})' for name in names)})\.{end}$"), "scale")
    for names, end in (
        (("norm_q", "norm_k", "norm_added_q", "norm_added_k"), "weight"),
        (("query_norm", "key_norm"), "scale"),
    )
)
"""Norms of queries and keys, which Control LoRAs of FLUX.1 bring as they are: in diffusers' names and the release's."""

_SCALED = re.compile(r"\.weight$")
_WORDS = re.compile(r"(?:state_dict\.)?bundle_emb\.([^.]+)\.")

_UNKNOWN = re.compile(
    r"\.(?=oft_|bone_|lora_embedding|waveft_|vblora_|unilora_|psoft_|lily_|peanut_|deft_|frod_|beft_|adamss_|tinylora_|"
    r"pvera_|osf_|super_|trainable_tokens|prompt_embeddings|[qp]_layer\.|lambda_layer|set_weight|reshape_weight|"
    r"bias_(?:indices|values|size))"
)

_UNET = re.compile(
    r"(?:^|\.)(?=(?:down_blocks|mid_block|up_blocks|conv_in|conv_norm_out|conv_out|time_embedding|add_embedding)(?:\.|$))"
)
_TEXT = re.compile(
    r"(?:^|\.)(?=(?:encoder\.layers|encoder\.block|layers\.\d+|embeddings|final_layer_norm|text_projection)(?:\.|$))"
)
_AROUND = re.compile(r"^(?:(?:__module|self)\.)?(?:(?:transformer|model|module)\.)*(?=(?!__)[\w-]+(?:\.[\w-]+)*$)")
"""What stands around the paths of a diffusion transformer."""
_UNET_START = re.compile(
    r"(unet_|model_)?(down_blocks|mid_block|up_blocks|conv_|time_embed|add_embedding|"
    r"input_blocks|middle_block|output_blocks|label_emb|out_\d)"
)
_TEXT_START = re.compile(r"(text_model_)?(encoder_layers|embeddings|final_layer_norm|text_projection)")
_T5_START = re.compile(r"(encoder|decoder)_block_\d+_layer_\d")


def parse_key(key: str, *, scales: bool = False, whole: bool = False) -> Key | None:
    """Return what a key names; None if no adapter that is known here has such a tensor.

    `scales` says that a bare `.weight` is the vector of LyCORIS' (IA)3; `whole` that bare weights and biases are of a
    file of PEFT, which replaces them.
    """
    patterns = _TENSORS + (((_SCALED, "ia3_w"),) if scales else _WHOLE if whole else ())
    for pattern, name in patterns + _NORMS:
        found = pattern.search(key)
        if found:
            groups = found.groupdict()
            tensor = name or f"{groups['tensor']}{'.' + groups['part'] if groups.get('part') else ''}"
            role, module, prefixes = _module(key[: found.start()])
            return Key(role, module, tensor, groups.get("adapter"), prefixes)
    return None


def word_of(key: str) -> str | None:
    """Return the word whose embedding a key of an adapter file is; None if it is not such a key."""
    found = _WORDS.match(key)
    return found[1] if found else None


def foreign_kind(key: str) -> str | None:
    """Return the name of an adapter kind that is known and not supported, from one of its keys."""
    found = _UNKNOWN.search(key)
    return key[found.end() :].split(".")[0] if found else None


def _module(name: str) -> tuple[str | None, str, str]:
    """Return (role, module, prefixes). They may stand one after another: `unet.base_model.model.down_blocks...`."""
    role, whole = None, name
    while True:
        for prefix, meant in _PREFIXES:
            if name.startswith(prefix):
                role, name = role or meant, name.removeprefix(prefix)
                break
        else:
            break
    if name == "base_model":  # what all layers share
        name = ""
    prefixes = whole.removesuffix(name)
    if ".processor." in name:  # diffusers before peft, which left out that to_out is a list
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor", ""))
    return role or _role_of(name), name, prefixes


def _role_of(module: str) -> str | None:
    """Return the role that a module's own name tells of."""
    name = flat(module)
    if reads_as_t5(name):
        return "text_encoder_3"
    return "unet" if _UNET_START.match(name) else "text_encoder" if _TEXT_START.match(name) else None


def reads_as_t5(module: str) -> bool:
    """Say whether a module's name is one of T5."""
    return _T5_START.match(flat(module)) is not None


def flat(module: str) -> str:
    """Return a module's name as kohya writes it, without the levels that some frameworks put around a model."""
    return re.sub(r"^(?:unet_|model_|text_model_|transformer_(?!blocks_))+", "", module.replace(".", "_"))


def canonical(role: str, name: str) -> str | None:
    """Return diffusers' path in a name that holds it, as `__module.model.down_blocks.0`; None if there is none.

    CLIP's level `text_model.`, which transformers had until 5.6, is left out.
    """
    if role.startswith("transformer"):
        around = _AROUND.match(name)
        return name[around.end() :] if around else None
    found = (_UNET if role in ("unet", "model") or role.startswith("controlnet") else _TEXT).search(name)
    return name[found.end() :] if found else None


def aliases(paths: Iterable[str]) -> dict[str, str]:
    """Return flat name -> path, for every name that the module at a path goes by."""
    paths = list(paths)
    layers = 1 + max((int(m[1]) for p in paths if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", p))), default=1)
    attending = {m[1] for p in paths if (m := re.match(r"(up_blocks\.\d+)\.attentions\.", p))}
    known: dict[str, str] = {}
    for path in paths:
        for name in (path, _original(path, layers, attending), _short(path)):
            if name is not None:
                known.setdefault(flat(name), path)
    return known


def original_block(path: str, paths: Iterable[str]) -> str | None:
    """Return the first name of a UNet's module, as `input_blocks.1.1.proj_in`."""
    return next((name for name, found in aliases(paths).items() if found == path and "put_blocks" in name), None)


def _short(path: str) -> str | None:
    """Return the name that diffusers gave attention layers before peft: to_out, and to_q in text encoders."""
    if path.endswith(".to_out.0"):
        return path.removesuffix(".0")
    found = re.fullmatch(r"(.*self_attn)\.(q|k|v|out)_proj", path)
    return f"{found[1]}.to_{found[2]}" if found else None


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_TOP = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1":
    "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def _original(path: str, layers: int, attending: set[str]) -> str | None:
    """Return a module's name in the first releases of Stable Diffusion and SDXL.

    `layers` is the number of ResNets in a block; `attending` holds the up blocks with attention.
    """
    if path in _TOP:
        return _TOP[path]
    found = re.fullmatch(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path
    ) or re.fullmatch(r"(mid)_block()\.(resnets|attentions)\.(\d+)\.(.+)", path)
    if not found:
        return None
    side, block, what, number, rest = found.groups()
    if what == "resnets":
        head, _, tail = rest.partition(".")
        rest = f"{_RESNET[head]}{'.' + tail if tail else ''}" if head in _RESNET else rest
    if side == "mid":
        return f"middle_block.{1 if what == 'attentions' else 2 * int(number)}.{rest}"
    if side == "down":
        if what == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * (layers + 1)}.0.op"
        return f"input_blocks.{int(block) * (layers + 1) + int(number) + 1}.{int(what == 'attentions')}.{rest}"
    if what == "upsamplers":
        place = 2 if f"up_blocks.{block}" in attending else 1
        return f"output_blocks.{int(block) * (layers + 1) + layers}.{place}.conv"
    return f"output_blocks.{int(block) * (layers + 1) + int(number)}.{int(what == 'attentions')}.{rest}"
