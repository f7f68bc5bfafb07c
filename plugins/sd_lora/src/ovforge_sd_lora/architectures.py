"""What adapters call the layers of diffusion transformers, by family: one table, in place of code for each.

The names of the releases (`double_blocks.0.img_attn.qkv`), which kohya, ai-toolkit and ComfyUI write, beside those of
diffusers, which models here have. A release may hold in one layer what diffusers holds in several: rows follow one
another. Sources: huggingface/diffusers (loaders/single_file_utils.py, loaders/lora_conversion_utils.py),
black-forest-labs/flux, Stability-AI/sd3.5, Tongyi-MAI/Z-Image, NVlabs/Sana.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ovforge_sd_lora.adapter import Module
from ovforge_sd_lora.names import aliases, flat
from ovforge_sd_lora.relative import RELATIVE

__all__ = ["Place", "family_of", "is_idle", "parts", "places"]

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name leads: the layers whose rows follow one another in the file's own layer.

    `swapped` says that its two halves, shift and scale, stand the other way round.
    """

    paths: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True)
class Architecture:
    """A family: `mark` is a layer that it alone has; `rules` are names of a release and the layers that they mean.

    `{n}` is the number of a block. `swaps` are layers of AdaLayerNormContinuous: scale first, where releases have
    shift first. Such a layer has two rows for each input; of the same name with more rows, nothing is swapped.
    `idle` are flat names of layers whose results nothing takes, so that converted models lack them; `{n}` is there the
    number of the last block.
    """

    family: str
    mark: str
    rules: tuple[tuple[str, ...], ...]
    swaps: tuple[str, ...] = ()
    idle: str = ""


def _streams(block: str) -> tuple[tuple[str, ...], ...]:
    """Return the rules of double blocks, whose two streams are the picture's and the text's."""
    ours = "transformer_blocks.{n}.attn"
    return (
        (f"{block}.img_attn.qkv", f"{ours}.to_q", f"{ours}.to_k", f"{ours}.to_v"),
        (f"{block}.txt_attn.qkv", f"{ours}.add_q_proj", f"{ours}.add_k_proj", f"{ours}.add_v_proj"),
        (f"{block}.img_attn.proj", f"{ours}.to_out.0"),
        (f"{block}.txt_attn.proj", f"{ours}.to_add_out"),
        *(
            (f"{block}.{stream}_attn.norm.{theirs}_norm", f"{ours}.norm_{added}{theirs[0]}")
            for stream, added in (("img", ""), ("txt", "added_"))
            for theirs in ("query", "key")
        ),
        # XLabs': what they call a processor.
        (f"{block}.qkv_lora1", f"{ours}.to_q", f"{ours}.to_k", f"{ours}.to_v"),
        (f"{block}.qkv_lora2", f"{ours}.add_q_proj", f"{ours}.add_k_proj", f"{ours}.add_v_proj"),
        (f"{block}.proj_lora1", f"{ours}.to_out.0"),
        (f"{block}.proj_lora2", f"{ours}.to_add_out"),
    )


_SINGLE_NORMS = tuple(
    (f"single_blocks.{{n}}.norm.{theirs}_norm", f"single_transformer_blocks.{{n}}.attn.norm_{theirs[0]}")
    for theirs in ("query", "key")
)


def _embedders(ours: str, *names: tuple[str, str]) -> tuple[tuple[str, ...], ...]:
    """Return the rules of embedders of two layers: ("time_in", "timestep_embedder")."""
    return tuple(
        (f"{theirs}.{layer}", f"{ours}.{name}.linear_{number}")
        for theirs, name in names
        for number, layer in ((1, "in_layer"), (2, "out_layer"))
    )


_ENDS: tuple[tuple[str, ...], ...] = (
    ("img_in", "x_embedder"),
    ("txt_in", "context_embedder"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
)

_FLUX1 = Architecture(
    "FLUX.1",
    r"single_transformer_blocks_\d+_proj_mlp",
    (
        *_streams("double_blocks.{n}"),
        ("double_blocks.{n}.img_mlp.0", "transformer_blocks.{n}.ff.net.0.proj"),
        ("double_blocks.{n}.img_mlp.2", "transformer_blocks.{n}.ff.net.2"),
        ("double_blocks.{n}.img_mod.lin", "transformer_blocks.{n}.norm1.linear"),
        ("double_blocks.{n}.txt_mlp.0", "transformer_blocks.{n}.ff_context.net.0.proj"),
        ("double_blocks.{n}.txt_mlp.2", "transformer_blocks.{n}.ff_context.net.2"),
        ("double_blocks.{n}.txt_mod.lin", "transformer_blocks.{n}.norm1_context.linear"),
        (
            "single_blocks.{n}.linear1",
            "single_transformer_blocks.{n}.attn.to_q",
            "single_transformer_blocks.{n}.attn.to_k",
            "single_transformer_blocks.{n}.attn.to_v",
            "single_transformer_blocks.{n}.proj_mlp",
        ),
        (
            "single_blocks.{n}.qkv",  # XLabs'
            "single_transformer_blocks.{n}.attn.to_q",
            "single_transformer_blocks.{n}.attn.to_k",
            "single_transformer_blocks.{n}.attn.to_v",
        ),
        ("single_blocks.{n}.linear2", "single_transformer_blocks.{n}.proj_out"),
        ("single_blocks.{n}.proj", "single_transformer_blocks.{n}.proj_out"),  # XLabs'
        ("single_blocks.{n}.modulation.lin", "single_transformer_blocks.{n}.norm.linear"),
        *_SINGLE_NORMS,
        *_ENDS,
        *_embedders(
            "time_text_embed",
            ("time_in", "timestep_embedder"),
            ("vector_in", "text_embedder"),
            ("guidance_in", "guidance_embedder"),
        ),
    ),
    ("norm_out.linear",),
)

_FLUX2 = Architecture(
    "FLUX.2",
    r"single_transformer_blocks_\d+_attn_to_qkv_mlp_proj",
    (
        *_streams("double_blocks.{n}"),
        ("double_blocks.{n}.img_mlp.0", "transformer_blocks.{n}.ff.linear_in"),
        ("double_blocks.{n}.img_mlp.2", "transformer_blocks.{n}.ff.linear_out"),
        ("double_blocks.{n}.txt_mlp.0", "transformer_blocks.{n}.ff_context.linear_in"),
        ("double_blocks.{n}.txt_mlp.2", "transformer_blocks.{n}.ff_context.linear_out"),
        ("single_blocks.{n}.linear1", "single_transformer_blocks.{n}.attn.to_qkv_mlp_proj"),
        ("single_blocks.{n}.linear2", "single_transformer_blocks.{n}.attn.to_out"),
        ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
        ("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
        ("single_stream_modulation.lin", "single_stream_modulation.linear"),
        *_SINGLE_NORMS,
        *_ENDS,
        *_embedders("time_guidance_embed", ("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")),
    ),
    ("norm_out.linear",),
)


def _joint(theirs: str, ours: str, names: tuple[str, str, str, str, str, str]) -> tuple[tuple[str, ...], ...]:
    """Return the rules of one stream of a joint block: projections, then feed-forward, then modulation."""
    q, k, v, out, feed, norm = (f"transformer_blocks.{{n}}.{name}" for name in names)
    return (
        (f"joint_blocks.{{n}}.{theirs}.{ours}.qkv", q, k, v),
        (f"joint_blocks.{{n}}.{theirs}.{ours}.proj", out),
        (f"joint_blocks.{{n}}.{theirs}.mlp.fc1", f"{feed}.net.0.proj"),
        (f"joint_blocks.{{n}}.{theirs}.mlp.fc2", f"{feed}.net.2"),
        (f"joint_blocks.{{n}}.{theirs}.adaLN_modulation.1", norm),
    )


_SD3 = Architecture(
    "Stable Diffusion 3",
    r"transformer_blocks_\d+_norm1_context_linear",
    (
        *_joint("x_block", "attn", ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff", "norm1.linear")),
        *_joint("x_block", "attn2", ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff", "norm1.linear")),
        *_joint(
            "context_block",
            "attn",
            (
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                "ff_context",
                "norm1_context.linear",
            ),
        ),
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        *_ENDS[2:],
    ),
    ("norm_out.linear", "norm1_context.linear"),
)


_QWEN = Architecture(
    "Qwen-Image",
    r"transformer_blocks_\d+_img_mod_1",
    (),
    idle=r"transformer_blocks_{n}_(attn_to_add_out|txt_mlp_net_.+)",
)

_SERIES = ("layers.{n}", "noise_refiner.{n}", "context_refiner.{n}")

_Z_IMAGE = Architecture(
    "Z-Image",
    r"layers_\d+_attention_to_q",
    (
        *((f"{b}.attention.qkv", f"{b}.attention.to_q", f"{b}.attention.to_k", f"{b}.attention.to_v") for b in _SERIES),
        *((f"{b}.attention.out", f"{b}.attention.to_out.0") for b in _SERIES),
        ("x_embedder", "all_x_embedder.2-1"),
        ("final_layer.linear", "all_final_layer.2-1.linear"),
        ("final_layer.adaLN_modulation.1", "all_final_layer.2-1.adaLN_modulation.1"),
    ),
)

_LUMINA2 = Architecture(
    "Lumina 2",
    r"layers_\d+_attn_to_q",
    (
        *((f"{b}.attention.qkv", f"{b}.attn.to_q", f"{b}.attn.to_k", f"{b}.attn.to_v") for b in _SERIES),
        *((f"{b}.attention.out", f"{b}.attn.to_out.0") for b in _SERIES),
        *((f"{b}.feed_forward.w{w}", f"{b}.feed_forward.linear_{w}") for b in _SERIES for w in (1, 2, 3)),
        *((f"{b}.adaLN_modulation.1", f"{b}.norm1.linear") for b in _SERIES),
    ),
)

_SANA = Architecture(
    "Sana",
    r"transformer_blocks_\d+_ff_conv_inverted",
    (
        (
            "blocks.{n}.attn.qkv",
            "transformer_blocks.{n}.attn1.to_q",
            "transformer_blocks.{n}.attn1.to_k",
            "transformer_blocks.{n}.attn1.to_v",
        ),
        ("blocks.{n}.attn.proj", "transformer_blocks.{n}.attn1.to_out.0"),
        ("blocks.{n}.cross_attn.q_linear", "transformer_blocks.{n}.attn2.to_q"),
        ("blocks.{n}.cross_attn.kv_linear", "transformer_blocks.{n}.attn2.to_k", "transformer_blocks.{n}.attn2.to_v"),
        ("blocks.{n}.cross_attn.proj", "transformer_blocks.{n}.attn2.to_out.0"),
        ("blocks.{n}.mlp.inverted_conv.conv", "transformer_blocks.{n}.ff.conv_inverted"),
        ("blocks.{n}.mlp.depth_conv.conv", "transformer_blocks.{n}.ff.conv_depth"),
        ("blocks.{n}.mlp.point_conv.conv", "transformer_blocks.{n}.ff.conv_point"),
        ("x_embedder.proj", "patch_embed.proj"),
        ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
        ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
        ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
        ("t_block.1", "time_embed.linear"),
        ("final_layer.linear", "proj_out"),
    ),
)

_TIMESTEP = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")

_LTX = Architecture(
    "LTX-Video",
    r"time_embed_linear$",
    (
        ("patchify_proj", "proj_in"),
        ("adaln_single.linear", "time_embed.linear"),
        *((f"adaln_single.emb.{layer}", f"time_embed.emb.{layer}") for layer in _TIMESTEP),
    ),
)

_ARCHITECTURES = (_FLUX2, _FLUX1, _SD3, _QWEN, _Z_IMAGE, _LUMINA2, _SANA, _LTX)
"""The first whose mark a model has counts: FLUX.1's double blocks are named as those of Stable Diffusion 3, and Sana
has LTX-Video's embedder of the timestep."""


def _architecture(paths: Iterable[str]) -> Architecture | None:
    names = [flat(path) for path in paths]
    return next((each for each in _ARCHITECTURES if any(re.match(each.mark, name) for name in names)), None)


def family_of(paths: Iterable[str]) -> str | None:
    """Return the family of a diffusion transformer with these layers; None if it is not one that is known."""
    found = _architecture(paths)
    return found.family if found else None


def places(shapes: Shapes) -> dict[str, Place]:
    """Return flat name -> place, for every name that layers of a model go by; `shapes` are those of their weights."""
    known = {name: Place((path,)) for name, path in aliases(shapes).items()}
    architecture = _architecture(shapes)
    if architecture is None:
        return known
    numbers = {int(number) for path in shapes for number in re.findall(r"\.(\d+)\.", path)}
    for theirs, *ours in architecture.rules:
        for number in sorted(numbers) if "{n}" in theirs else (0,):
            paths = tuple(path.format(n=number) for path in ours)
            if all(path in shapes for path in paths):
                known.setdefault(flat(theirs.format(n=number)), Place(paths, _swapped(architecture, paths, shapes)))
    return known


def is_idle(name: str, shapes: Shapes) -> bool:
    """Say whether a name is that of a layer whose result nothing takes: an adapter of it changes no picture."""
    architecture = _architecture(shapes)
    if architecture is None or not architecture.idle:
        return False
    last = max(int(block[1]) for path in shapes if (block := re.match(r"transformer_blocks\.(\d+)\.", path)))
    return re.fullmatch(architecture.idle.format(n=last), flat(name)) is not None


def _swapped(architecture: Architecture, paths: tuple[str, ...], shapes: Shapes) -> bool:
    return paths[0].endswith(architecture.swaps or ("-",)) and shapes[paths[0]][0] == 2 * shapes[paths[0]][1]


def parts(module: Module, place: Place, shapes: Shapes) -> Iterator[tuple[Module, str, str]]:
    """Yield (a part of a module, the path of its layer, why it cannot be there, or "")."""
    if len(place.paths) == 1 and not place.swapped:
        yield module, place.paths[0], ""
        return
    rows = [shapes[path][0] for path in place.paths]
    why = _indivisible(module, sum(rows))
    begin = 0
    for path, count in zip(place.paths, rows, strict=True):
        taken: tuple[tuple[int, int], ...] = ((begin, begin + count),)
        if place.swapped:
            taken = ((begin + count // 2, begin + count), (begin, begin + count // 2))
        part = module if why else replace(module, rows=taken, shape=(count, *module.shape[1:]))
        yield part, path, why
        begin += count


def _indivisible(module: Module, rows: int) -> str:
    """Return why a module's rows cannot be told apart; "" if they can."""
    if module.kind in RELATIVE or module.start:
        return f"{module.label} acts on all rows of its layer together, and the model has them in parts"
    if "dora_scale" in module.keys and module.by_input:
        return "its magnitudes are those of inputs, of all rows together, and the model has them in parts"
    if not module.shape or module.shape[0] != rows:
        return f"its shape is {list(module.shape)}, and the layers' rows are {rows}"
    return ""
