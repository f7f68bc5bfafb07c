"""Adapters of diffusion transformers, in the names of every program, against what diffusers makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.runtime import core
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.switch import running_adapter
from ovforge_sd_lora.transform import LoraTransform

from .conftest import compress, torch_weights, weights

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from diffusers.loaders import lora_conversion_utils as theirs  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from ovforge_convert import Port, convert_module  # noqa: E402

Array = np.ndarray[Any, Any]
HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
MODELS: dict[str, Callable[[], Any]] = {
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, caption_projection_dim=16, pooled_projection_dim=24, dual_attention_layers=(0,),
        pos_embed_max_size=8, qk_norm="rms_norm", **HEADS,
    ),
    "flux": lambda: diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(2, 2, 4), **HEADS
    ),
    "flux2": lambda: diffusers.Flux2Transformer2DModel(
        num_layers=1, num_single_layers=2, in_channels=16, axes_dims_rope=(2, 2, 2, 2), **HEADS
    ),
    "qwen": lambda: diffusers.QwenImageTransformer2DModel(num_layers=1, axes_dims_rope=(2, 2, 4), **HEADS),
    "z-image": lambda: diffusers.ZImageTransformer2DModel(
        n_layers=1, n_refiner_layers=1, dim=32, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 8],
        axes_lens=[16, 16, 16],
    ),
    "sana": lambda: diffusers.SanaTransformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=8,
    ),
    "t5": lambda: transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    ),
    "clip": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ),
}  # fmt: skip


def layers_of(module: Any) -> dict[str, Any]:
    """Return the linear layers and convolutions of a torch module by path, but those of each channel by itself."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    found = {name: each for name, each in module.named_modules() if isinstance(each, kinds)}
    return {name: each for name, each in found.items() if getattr(each, "groups", 1) == 1}


def traced(role: str, module: Any) -> ov.Model:
    """Convert a model of which every layer is called by itself: their names and weights are all that adapters need."""

    def forward(x: Any) -> Any:
        total = x.sum()
        for layer in layers_of(module).values():
            if isinstance(layer, torch.nn.Linear):
                total = total + layer(x[:, : layer.in_features]).sum()
            else:
                total = total + layer(x[:, : layer.in_channels, None, None].expand(-1, -1, 4, 4)).sum()
        return total

    wide = max(layer.weight.shape[1] for layer in layers_of(module).values())
    return convert_module(role, module, forward, [Port("x", (None, wide), (2, wide))], ["y"], "f32")


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, ov.Model]]:
    """Return (torch module, converted) by name, made once."""
    made: dict[str, tuple[Any, ov.Model]] = {}

    def get(name: str) -> tuple[Any, ov.Model]:
        if name not in made:
            torch.manual_seed(1)
            module = MODELS[name]().eval()
            role = {"t5": "text_encoder_3", "clip": "text_encoder"}.get(name, "transformer")
            made[name] = module, traced(role, module)
        return made[name]

    return get


@pytest.fixture
def bundle(models: Callable[[str], tuple[Any, ov.Model]]) -> Callable[..., ModelBundle]:
    """Return a bundle of models by role: bundle(transformer="flux", text_encoder_2="t5")."""

    def make(**roles: str) -> ModelBundle:
        found = ModelBundle()
        for role, name in roles.items():
            found.models[role] = models(name)[1].clone()
        return found

    return make


class Drawn:
    """A LoRA of random numbers: `tensors` as kohya or peft write them, and what each module adds."""

    def __init__(self, *, style: str = "kohya", prefix: str = "lora_unet_", alpha: bool = True) -> None:
        self.style, self.prefix, self.alpha = style, prefix, alpha
        self.rng = np.random.default_rng(3)
        self.tensors: dict[str, Array] = {}
        self.added: dict[str, Array] = {}

    def add(self, module: str, out: int, inner: int, rank: int = 3, kernel: tuple[int, ...] = ()) -> None:
        down = self.rng.normal(size=(rank, inner, *kernel)).astype(np.float32)
        up = self.rng.normal(size=(out, rank, *(1 for _ in kernel))).astype(np.float32)
        name = self.prefix + (module.replace(".", "_") if self.prefix.endswith("_") else module)
        halves = ("lora_down", "lora_up") if self.style == "kohya" else ("lora_A", "lora_B")
        self.tensors |= {f"{name}.{halves[0]}.weight": down, f"{name}.{halves[1]}.weight": up}
        factor = 2.0 if self.alpha else 1.0
        if self.alpha:
            self.tensors[f"{name}.alpha"] = np.array(rank * factor, np.float32)
        self.added[module] = factor * np.tensordot(up.reshape(out, rank), down, axes=(1, 0))

    def write(self, path: Path) -> Path:
        save_file(self.tensors, path)
        return path


def drawn_over(module: Any, names: Mapping[str, tuple[str, ...]], **how: Any) -> tuple[Drawn, dict[str, Array]]:
    """Return a LoRA in a release's names, and the weights that it should make: its rows go to the layers in order."""
    layers, drawn = layers_of(module), Drawn(**how)
    wanted = {f"{path}.weight": each.weight.detach().numpy().copy() for path, each in layers.items()}
    for name, paths in names.items():
        found = [layers[path.removesuffix("~")].weight for path in paths]
        kernel = tuple(found[0].shape[2:])
        drawn.add(name, sum(each.shape[0] for each in found), found[0].shape[1], kernel=kernel)
        begin, added = 0, drawn.added[name]
        for path, each in zip(paths, found, strict=True):
            rows = added[begin : begin + each.shape[0]]
            if path.endswith("~"):  # its two halves change places
                rows = np.concatenate(np.split(rows, 2)[::-1])
            wanted[f"{path.removesuffix('~')}.weight"] += rows
            begin += each.shape[0]
    return drawn, wanted


def agree(ours: Mapping[str, Array], wanted: Mapping[str, Array]) -> None:
    for name, value in wanted.items():
        assert np.abs(ours[name] - value).max() <= 2e-5 * max(1.0, np.abs(value).max()), name


def streams(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {
        f"{theirs}.img_attn.qkv": tuple(f"{ours}.attn.to_{x}" for x in "qkv"),
        f"{theirs}.txt_attn.qkv": tuple(f"{ours}.attn.add_{x}_proj" for x in "qkv"),
        f"{theirs}.img_attn.proj": (f"{ours}.attn.to_out.0",),
        f"{theirs}.txt_attn.proj": (f"{ours}.attn.to_add_out",),
    }


def single(ours: str) -> tuple[str, ...]:
    return (*(f"{ours}.attn.to_{x}" for x in "qkv"), f"{ours}.proj_mlp")


RELEASES: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        **streams("double_blocks.0", "transformer_blocks.0"),
        **streams("double_blocks.1", "transformer_blocks.1"),
        "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",),
        "double_blocks.1.img_mlp.2": ("transformer_blocks.1.ff.net.2",),
        "double_blocks.1.txt_mlp.0": ("transformer_blocks.1.ff_context.net.0.proj",),
        "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2",),
        "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1.linear",),
        "double_blocks.0.txt_mod.lin": ("transformer_blocks.0.norm1_context.linear",),
        "single_blocks.1.linear1": single("single_transformer_blocks.1"),
        "single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out",),
        "single_blocks.0.modulation.lin": ("single_transformer_blocks.0.norm.linear",),
        "img_in": ("x_embedder",), "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear~",),
    },
    "flux2": {
        **streams("double_blocks.0", "transformer_blocks.0"),
        "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.linear_in",),
        "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.linear_out",),
        "single_blocks.1.linear1": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",),
        "single_blocks.0.linear2": ("single_transformer_blocks.0.attn.to_out",),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear~",),
    },
    "sd3": {
        "joint_blocks.0.x_block.attn.qkv": tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "joint_blocks.0.x_block.attn2.qkv": tuple(f"transformer_blocks.0.attn2.to_{x}" for x in "qkv"),
        "joint_blocks.1.context_block.attn.qkv": tuple(f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"),
        "joint_blocks.1.x_block.attn.proj": ("transformer_blocks.1.attn.to_out.0",),
        "joint_blocks.0.x_block.attn2.proj": ("transformer_blocks.0.attn2.to_out.0",),
        "joint_blocks.0.context_block.attn.proj": ("transformer_blocks.0.attn.to_add_out",),
        "joint_blocks.0.x_block.mlp.fc1": ("transformer_blocks.0.ff.net.0.proj",),
        "joint_blocks.0.context_block.mlp.fc2": ("transformer_blocks.0.ff_context.net.2",),
        "joint_blocks.0.x_block.adaLN_modulation.1": ("transformer_blocks.0.norm1.linear",),
        "joint_blocks.0.context_block.adaLN_modulation.1": ("transformer_blocks.0.norm1_context.linear",),
        "joint_blocks.1.context_block.adaLN_modulation.1": ("transformer_blocks.1.norm1_context.linear~",),
        "x_embedder.proj": ("pos_embed.proj",), "context_embedder": ("context_embedder",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear~",),
    },
    "z-image": {
        "layers.0.attention.qkv": tuple(f"layers.0.attention.to_{x}" for x in "qkv"),
        "noise_refiner.0.attention.qkv": tuple(f"noise_refiner.0.attention.to_{x}" for x in "qkv"),
        "context_refiner.0.attention.out": ("context_refiner.0.attention.to_out.0",),
        "layers.0.feed_forward.w1": ("layers.0.feed_forward.w1",),
        "layers.0.adaLN_modulation.0": ("layers.0.adaLN_modulation.0",),
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        "cap_embedder.1": ("cap_embedder.1",),
    },
    "qwen": {
        "transformer_blocks.0.attn.add_q_proj": ("transformer_blocks.0.attn.add_q_proj",),
        "transformer_blocks.0.img_mlp.net.0.proj": ("transformer_blocks.0.img_mlp.net.0.proj",),
        "transformer_blocks.0.txt_mod.1": ("transformer_blocks.0.txt_mod.1",), "img_in": ("img_in",),
    },
    "sana": {
        "blocks.0.attn.qkv": tuple(f"transformer_blocks.0.attn1.to_{x}" for x in "qkv"),
        "blocks.0.cross_attn.kv_linear": ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v"),
        "blocks.0.cross_attn.q_linear": ("transformer_blocks.0.attn2.to_q",),
        "blocks.0.cross_attn.proj": ("transformer_blocks.0.attn2.to_out.0",),
        "blocks.0.mlp.inverted_conv.conv": ("transformer_blocks.0.ff.conv_inverted",),
        "final_layer.linear": ("proj_out",),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize(("prefix", "style"), [("lora_unet_", "kohya"), ("diffusion_model.", "peft")])
def test_names_of_releases(models: Any, bundle: Any, tmp_path: Path, name: str, prefix: str, style: str) -> None:
    """kohya's and ComfyUI's (ai-toolkit's) names, with fused queries, keys and values, fuse into diffusers' layers."""
    module, _ = models(name)
    drawn, wanted = drawn_over(module, RELEASES[name], prefix=prefix, style=style)
    found = bundle(transformer=name)
    report = LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(found)
    assert not report.skipped
    agree(weights(found, "transformer"), wanted)


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"t5", "clip"}))
@pytest.mark.parametrize(
    ("prefix", "style"),
    [("transformer.", "peft"), ("transformer.", "kohya"), ("lycoris_", "kohya"), ("lora_transformer_", "kohya"),
     ("base_model.model.", "peft"), ("lora_unet_", "kohya"), ("", "peft")],
)  # fmt: skip
def test_names_of_diffusers(models: Any, bundle: Any, tmp_path: Path, name: str, prefix: str, style: str) -> None:
    """diffusers', SimpleTuner's, LyCORIS', OneTrainer's: every layer by its own name."""
    module, _ = models(name)
    every = {path: (path,) for path in layers_of(module)}
    drawn, wanted = drawn_over(module, every, prefix=prefix, style=style)
    found = bundle(transformer=name)
    assert not LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(found).skipped
    agree(weights(found, "transformer"), wanted)


CONVERTERS: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]], tuple[str, ...]]] = {
    # name -> model, how the file is written, diffusers' own reader of such files, what that cannot read or reads wrong
    "kohya's FLUX.1": ("flux", {"prefix": "lora_unet_"}, theirs._convert_kohya_flux_lora_to_diffusers,
                       ("linear1", "final_layer", "guidance_in", "time_in", "vector_in", "img_in", "txt_in")),
    "kohya's FLUX.2": ("flux2", {"prefix": "lora_unet_"}, theirs._convert_kohya_flux2_lora_to_diffusers,
                       ("modulation", "final_layer")),
    "ComfyUI's FLUX.2": ("flux2", {"prefix": "diffusion_model.", "style": "peft", "alpha": False},
                         theirs._convert_non_diffusers_flux2_lora_to_diffusers, ("final_layer",)),
    "kohya's Qwen-Image": ("qwen", {"prefix": "lora_unet_"}, theirs._convert_non_diffusers_qwen_lora_to_diffusers, ()),
    "kohya's Z-Image": ("z-image", {"prefix": "lora_unet_"}, theirs._convert_non_diffusers_z_image_lora_to_diffusers,
                        ("qkv", "final_layer", "x_embedder", "attention.out")),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTERS)
def test_files_are_read_as_diffusers_reads_them(models: Any, bundle: Any, tmp_path: Path, case: str) -> None:
    name, how, reader, left_out = CONVERTERS[case]
    module, _ = models(name)
    names = {key: paths for key, paths in RELEASES[name].items() if not any(part in key for part in left_out)}
    drawn, _ = drawn_over(module, names, **how)
    path = drawn.write(tmp_path / "x.safetensors")
    read = reader({key: torch.from_numpy(np.array(value)) for key, value in drawn.tensors.items()})
    wanted = {f"{key}.weight": each.weight.detach().numpy().copy() for key, each in layers_of(module).items()}
    for key in [key for key in read if key.endswith("lora_A.weight")]:
        layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        wanted[f"{layer}.weight"] += (read[key.replace("lora_A", "lora_B")] @ read[key]).numpy()
    found = bundle(transformer=name)
    assert not LoraTransform(LoraOptions(path=path)).apply(found).skipped
    agree(weights(found, "transformer"), wanted)


def test_xlabs_names(models: Any, bundle: Any, tmp_path: Path) -> None:
    module, _ = models("flux")
    names = {
        "double_blocks.1.processor.qkv_lora1": tuple(f"transformer_blocks.1.attn.to_{x}" for x in "qkv"),
        "double_blocks.1.processor.proj_lora2": ("transformer_blocks.1.attn.to_add_out",),
        "single_blocks.0.processor.qkv_lora": tuple(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "single_blocks.0.processor.proj_lora": ("single_transformer_blocks.0.proj_out",),
    }
    drawn, wanted = drawn_over(module, names, prefix="", style="kohya", alpha=False)
    drawn.tensors = {
        key.replace(".lora_down", ".down").replace(".lora_up", ".up"): v for key, v in drawn.tensors.items()
    }
    found = bundle(transformer="flux")
    assert not LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(found).skipped
    agree(weights(found, "transformer"), wanted)


@pytest.mark.parametrize(
    ("prefix", "roles"),
    [
        ("lora_te3_", {"text_encoder": "clip", "text_encoder_3": "t5"}),
        ("lora_te3_", {"text_encoder": "clip", "text_encoder_2": "t5"}),  # sd-scripts' FLUX
        ("lora_te2_", {"text_encoder": "clip", "text_encoder_2": "t5"}),  # OneTrainer's
        ("lora_te2_", {"text_encoder": "clip", "text_encoder_2": "clip", "text_encoder_3": "t5"}),
        ("text_encoders.t5xxl.transformer.", {"text_encoder": "clip", "text_encoder_2": "t5"}),
        ("text_encoder_3.", {"text_encoder": "clip", "text_encoder_3": "t5"}),
    ],
)
def test_t5(models: Any, bundle: Any, tmp_path: Path, prefix: str, roles: dict[str, str]) -> None:
    """T5 is the third encoder of one family and the second of another: its layers' names say which it is."""
    module, _ = models("t5")
    every = {path: (path,) for path in layers_of(module)}
    drawn, wanted = drawn_over(module, every, prefix=prefix)
    found = bundle(transformer="flux", **roles)
    report = LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(found)
    role = next(role for role, name in roles.items() if name == "t5")
    assert (report.skipped, report.roles) == ([], (role,))
    agree(weights(found, role), wanted)


class Halves:
    """diffusers' pipelines, of which a transformer and one text encoder are enough for adapters."""

    def __init__(self, name: str, module: Any, clip: Any) -> None:
        parts = {"transformer": module, "text_encoder": clip}
        kind = diffusers.FluxPipeline if name == "flux" else diffusers.StableDiffusion3Pipeline
        import inspect

        needed = set(inspect.signature(kind.__init__).parameters) - {"self", *parts}
        self.pipe = kind(**parts, **dict.fromkeys(needed))


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_own_files(models: Any, bundle: Any, tmp_path: Path, name: str, dora: bool) -> None:
    """What diffusers' pipeline saves, with its metadata, weighs the same in its hands and in ours."""
    import copy

    import peft

    if dora and name == "sd3":
        pytest.skip("diffusers leaves the magnitudes of SD 3 out")
    pipe = Halves(name, copy.deepcopy(models(name)[0]), copy.deepcopy(models("clip")[0])).pipe
    torch.manual_seed(4)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, init_lora_weights=False, use_dora=dora, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 1},
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "ff.net.0.proj", "norm1.linear", "proj_out"],
    )  # fmt: skip
    small = peft.LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "fc1"])
    pipe.transformer.add_adapter(config)
    pipe.text_encoder.add_adapter(small)
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipe.text_encoder),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=pipe.text_encoder.peft_config["default"].to_dict(),
    )
    fresh = Halves(name, copy.deepcopy(models(name)[0]), copy.deepcopy(models("clip")[0])).pipe
    fresh.load_lora_weights(tmp_path)
    fresh.fuse_lora(components=["transformer", "text_encoder"], lora_scale=1.0)
    found = bundle(transformer=name, text_encoder="clip")
    report = LoraTransform(LoraOptions(path=tmp_path / "pytorch_lora_weights.safetensors")).apply(found)
    assert not report.skipped
    for role in ("transformer", "text_encoder"):
        merged = torch_weights(getattr(fresh, role))
        merged = {key.removeprefix("text_model."): value for key, value in merged.items()}
        ours, before = weights(found, role), torch_weights(models({"text_encoder": "clip"}.get(role, name))[0])
        before = {key.removeprefix("text_model."): value for key, value in before.items()}
        agree(ours, {key: merged[key] for key in ours if key in merged})
        assert sum(not np.array_equal(merged[key], before[key]) for key in ours if key in merged) > 1


def flux_port(module: Any) -> tuple[Callable[..., Any], list[Any], dict[str, Array]]:
    """Return FLUX's own computation, its inputs, and numbers for them."""
    places = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(3)).float()
    inputs = {
        "hidden_states": torch.randn(1, 6, 64), "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 24), "timestep": torch.rand(1), "img_ids": places,
        "txt_ids": torch.zeros(5, 3), "guidance": torch.full((1,), 3.5),
    }  # fmt: skip
    run = type(module).forward

    def forward(
        hidden_states: Any, encoder_hidden_states: Any, pooled_projections: Any, timestep: Any, img_ids: Any,
        txt_ids: Any, guidance: Any,
    ) -> Any:  # fmt: skip
        return run(
            module, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
            return_dict=False,
        )  # fmt: skip

    ports = [Port(name, tuple(value.shape), tuple(value.shape)) for name, value in inputs.items()]
    return forward, ports, {name: value.numpy() for name, value in inputs.items()}


@pytest.mark.parametrize("stored", ["f32", "INT8_ASYM", "INT4_SYM"])
def test_outputs_fused_and_switched(models: Any, tmp_path: Path, stored: str) -> None:
    """A transformer that computes: fused, beside its weights, and on compressed ones, as torch on the same weights."""
    import copy

    torch.manual_seed(2)
    module, _ = models("flux")
    forward, ports, inputs = flux_port(module)
    plain = convert_module("transformer", module, forward, ports, ["out_sample"], "f32")
    names = {key: paths for key, paths in RELEASES["flux"].items() if "final" not in key}
    drawn, _ = drawn_over(module, names)
    path = drawn.write(tmp_path / "x.safetensors")
    if stored != "f32":
        plain = compress(plain, stored)
    base = ModelBundle({"transformer": plain.clone()})
    reference = copy.deepcopy(module)
    stored_weights = weights(base, "transformer")
    with torch.no_grad():
        for key, layer in layers_of(reference).items():
            layer.weight.copy_(torch.from_numpy(stored_weights[f"{key}.weight"]).reshape(layer.weight.shape))
        for key, paths in names.items():
            begin = 0
            for each in paths:
                layer = layers_of(reference)[each]
                layer.weight += 0.1 * torch.from_numpy(drawn.added[key][begin : begin + len(layer.weight)])
                begin += len(layer.weight)
        wanted = flux_port(reference)[0](*(torch.from_numpy(value) for value in inputs.values()))[0].numpy()

    def computed(found: ModelBundle, mode: str) -> Array:
        options = LoraOptions(path=path, scale=0.1, mode=mode)
        assert not LoraTransform(options).apply(found).skipped
        compiled = core().compile_model(found.models["transformer"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        adapter = running_adapter(options, found)
        if adapter is not None:
            values = adapter.values(0.1)["transformer"]
            for state in request.query_state():
                state.state = ov.Tensor(np.ascontiguousarray(values[state.name]))
        return request.infer(inputs)["out_sample"]

    for mode in ("fuse", "runtime"):
        ours = computed(ModelBundle({"transformer": plain.clone()}), mode)
        # Fused into compressed weights they become float16; the CPU computes INT4 with rounded activations.
        bound = {"f32": 1e-4, "INT8_ASYM": 2e-2, "INT4_SYM": 5e-2}[stored]
        assert np.abs(ours - wanted).max() <= bound * np.abs(wanted).max(), mode


def test_dora_of_a_fused_layer(models: Any, bundle: Any, tmp_path: Path) -> None:
    """Magnitudes are those of rows: each part keeps its own."""
    module, _ = models("flux")
    paths = tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
    drawn, wanted = drawn_over(module, {"double_blocks.0.img_attn.qkv": paths})
    magnitude = np.random.default_rng(5).uniform(0.5, 2, (48, 1)).astype(np.float32)
    drawn.tensors["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"] = magnitude
    whole = np.concatenate([wanted[f"{path}.weight"] for path in paths])
    whole *= magnitude / np.linalg.norm(whole, axis=1, keepdims=True)
    found = bundle(transformer="flux")
    assert not LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(found).skipped
    ours = weights(found, "transformer")
    agree({"all": np.concatenate([ours[f"{path}.weight"] for path in paths])}, {"all": whole})


def test_a_kronecker_product_over_a_fused_layer(models: Any, bundle: Any, tmp_path: Path) -> None:
    module, _ = models("flux2")
    rng = np.random.default_rng(6)
    one, two = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file({f"{name}.lokr_w1": one, f"{name}.lokr_w2": two}, tmp_path / "x.safetensors")
    found = bundle(transformer="flux2")
    assert not LoraTransform(LoraOptions(path=tmp_path / "x.safetensors")).apply(found).skipped
    ours, added = weights(found, "transformer"), np.split(np.kron(one, two), 3)
    for part, letter in zip(added, "qkv", strict=True):
        path = f"transformer_blocks.0.attn.to_{letter}"
        np.testing.assert_allclose(
            ours[f"{path}.weight"], layers_of(module)[path].weight.detach().numpy() + part, atol=1e-5
        )


@pytest.mark.parametrize(
    ("names", "prefix", "on", "message"),
    [
        (("joint_blocks.0.x_block.attn.qkv",), "lora_unet_", "flux", "for Stable Diffusion 3, and this is FLUX.1"),
        (("double_blocks.0.img_mod.lin",), "lora_unet_", "sd3", "for FLUX.1, and this is Stable Diffusion 3"),
        (("single_transformer_blocks.0.proj_mlp",), "transformer.", "flux2", "for FLUX.1, and this is FLUX.2"),
        (("blocks.0.self_attn.q",), "diffusion_model.", "qwen", "for Wan, and this is Qwen-Image"),
        (("down_blocks.0.attentions.0.proj_in",), "lora_unet_", "flux", "a UNet of .*, and this is FLUX.1"),
        (("layers.0.attention.qkv",), "diffusion_model.", "sana", "for Z-Image or Lumina, and this is Sana"),
        (("transformer_blocks.7.attn.to_q",), "transformer.", "flux", "the model has no such layer"),
        (("double_blocks.0.img_attn.qkv",), "lora_unet_", "flux", r"its shape is \[99, 16\], and the layers' rows are 48"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(
    bundle: Any, tmp_path: Path, names: tuple[str, ...], prefix: str, on: str, message: str
) -> None:
    drawn = Drawn(prefix=prefix)
    for name in names:
        drawn.add(name, 99, 16)
    with pytest.raises(ModelError, match=message):
        LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(bundle(transformer=on))


@pytest.mark.parametrize("fewer", [8, -8])
def test_a_first_layer_that_sees_more(models: Any, bundle: Any, tmp_path: Path, fewer: int) -> None:
    """FLUX.1 Fill sees a mask behind the latents, which an adapter for dev leaves alone; but not the other way round."""
    module, _ = models("flux")
    weight = layers_of(module)["x_embedder"].weight.detach().numpy()
    drawn = Drawn(prefix="lora_unet_")
    drawn.add("img_in", weight.shape[0], weight.shape[1] - fewer)
    transform = LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors")))
    found = bundle(transformer="flux")
    if fewer < 0:
        with pytest.raises(ModelError, match="img_in: its shape is"):
            transform.apply(found)
        return
    report = transform.apply(found)
    assert any("8 inputs that the adapter leaves alone" in note for note in report.notes)
    wanted = weight + np.pad(drawn.added["img_in"], ((0, 0), (0, fewer)))
    agree(weights(found, "transformer"), {"x_embedder.weight": wanted})


def test_what_is_in_a_file_whole_and_in_parts_counts_once(models: Any, bundle: Any, tmp_path: Path) -> None:
    """As some trainers of Z-Image write it, and diffusers reads it."""
    module, _ = models("z-image")
    width = layers_of(module)["layers.0.attention.to_q"].weight.shape[0]
    drawn = Drawn(prefix="diffusion_model.", alpha=False)
    for name in ("to.q", "to.k", "to.v", "to_out.0", "out"):
        drawn.add(f"layers.0.attention.{name}", width, width)
    drawn.add("layers.0.attention.qkv", 3 * width, width)
    drawn.tensors = {key.replace("lora_", "lora."): value for key, value in drawn.tensors.items()}
    read = theirs._convert_non_diffusers_z_image_lora_to_diffusers(
        {key: torch.from_numpy(value) for key, value in drawn.tensors.items()}
    )
    assert len(read) == 8
    found = bundle(transformer="z-image")
    report = LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(found)
    assert not report.skipped
    assert any("2 fused layers" in note for note in report.notes)
    wanted = {}
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        path = f"layers.0.attention.{name}"
        down, up = (read[f"transformer.{path}.lora_{half}.weight"].numpy() for half in "AB")
        wanted[f"{path}.weight"] = layers_of(module)[path].weight.detach().numpy() + up @ down
    agree(weights(found, "transformer"), wanted)


def test_rotations_of_a_fused_layer_are_refused(bundle: Any, tmp_path: Path) -> None:
    drawn = Drawn()
    drawn.add("img_in", 16, 64)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    drawn.tensors |= {
        f"{name}.oft_blocks": np.zeros((4, 12, 12), np.float32),
        f"{name}.alpha": np.array(1, np.float32),
    }
    report = LoraTransform(LoraOptions(path=drawn.write(tmp_path / "x.safetensors"))).apply(bundle(transformer="flux"))
    assert [skip.reason.split(",")[0] for skip in report.skipped] == [
        "OFT of the outputs acts on all rows of its layer together"
    ]
    assert len(load_file(tmp_path / "x.safetensors")) == 5


def test_scales_of_blocks(models: Any, bundle: Any, tmp_path: Path) -> None:
    """Blocks go by both names, those of the release and diffusers'."""
    module, _ = models("flux")
    drawn, _ = drawn_over(module, RELEASES["flux"])
    path = drawn.write(tmp_path / "x.safetensors")
    first, second = bundle(transformer="flux"), bundle(transformer="flux")
    LoraTransform(LoraOptions(path=path, block_scales={"double_blocks.0": 0.0})).apply(first)
    LoraTransform(LoraOptions(path=path, block_scales={"transformer_blocks.0": 0.0})).apply(second)
    ours = weights(first, "transformer")
    agree(weights(second, "transformer"), ours)
    name = "transformer_blocks.0.attn.to_q.weight"
    np.testing.assert_array_equal(ours[name], layers_of(module)[name.removesuffix(".weight")].weight.detach().numpy())
