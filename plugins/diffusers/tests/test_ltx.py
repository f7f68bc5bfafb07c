"""LTX-Video: its transformer and the autoencoders of its versions, converted from folders and files, against torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts.stages import Match
from ovforge.errors import ModelError
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")
pytest.importorskip("tokenizers")

from safetensors.torch import save_file  # noqa: E402

from ovforge_diffusers.autoencoders import autoencoder_config  # noqa: E402
from ovforge_diffusers.components import find_components  # noqa: E402
from ovforge_diffusers.header import Part  # noqa: E402
from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.ltx_vae import compression  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

CHANNELS, WIDTH = 8, 32
TRANSFORMER: dict[str, Any] = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "num_attention_heads": 32, "attention_head_dim": 2,
    "cross_attention_dim": 64, "num_layers": 2, "caption_channels": WIDTH,
}  # fmt: skip
"""32 heads, as all published models have; 64 channels, of which 4 are not turned."""

LATER: dict[str, Any] = {
    "latent_channels": CHANNELS, "decoder_block_out_channels": (16, 32, 64), "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1, 2, 1, 2), "decoder_spatio_temporal_scaling": (True,) * 3, "upsample_residual": (True,) * 3,
    "upsample_factor": (2,) * 3, "timestep_conditioning": True,
}  # fmt: skip
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "0.9.0": {
        "latent_channels": CHANNELS, "block_out_channels": (8, 16, 16, 16), "decoder_block_out_channels": (8, 16, 16, 24),
        "layers_per_block": (2, 1, 1, 1, 1), "decoder_layers_per_block": (1, 2, 1, 1, 1),
    },
    "0.9.1": {
        **LATER, "block_out_channels": (8, 16, 16, 16), "decoder_inject_noise": (True, True, True, False),
    },
    "0.9.5": {
        **LATER, "block_out_channels": (8, 16, 32, 64, 128), "decoder_inject_noise": (False,) * 4,
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4, "spatio_temporal_scaling": (True,) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
    },
}  # fmt: skip
"""Version -> a small autoencoder of its structure."""


def _transformers() -> Any:
    """Return the tests of Stable Diffusion 3, whose T5 this model has, too."""
    spec = importlib.util.spec_from_file_location("small_t5", Path(__file__).with_name("test_transformers.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_autoencoder(version: str) -> Any:
    """Return an autoencoder with random weights and statistics of latents, which see to it that noise counts."""
    torch.manual_seed(1)
    vae = _transformers().noise(diffusers.AutoencoderKLLTXVideo(**AUTOENCODERS[version])).eval()
    vae.latents_mean += torch.randn(CHANNELS) * 0.2
    vae.latents_std += torch.rand(CHANNELS) * 0.5
    return vae


def make_ltx_pipeline(folder: Path, version: str = "0.9.0") -> Path:
    """Write a small pipeline with the autoencoder of a version."""
    torch.manual_seed(0)
    small = _transformers()
    small.write_t5(folder, "text_encoder", "")
    small.noise(diffusers.LTXVideoTransformer3DModel(**TRANSFORMER)).save_pretrained(folder / "transformer")
    make_autoencoder(version).save_pretrained(folder / "vae")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "LTXPipeline", "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"], "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTXVideo"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _compiled(bundle: Any, role: str) -> Any:
    return ov.Core().compile_model(bundle.models[role], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 2, 2)])
def test_the_transformer_gives_what_torch_gives(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """Of any size, with one timestep for all tokens and with one for each."""
    torch.manual_seed(2)
    module = _transformers().noise(diffusers.LTXVideoTransformer3DModel(**TRANSFORMER)).eval()
    module.save_pretrained(tmp_path)
    compiled = _compiled(DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(tmp_path)), "transformer")
    rng, tokens = np.random.default_rng(1), int(np.prod(shape))
    scale = np.array([8 / 24, 32, 32], np.float32)
    inputs = {
        "hidden_states": rng.standard_normal((2, tokens, CHANNELS), np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 9, WIDTH), np.float32),
        "encoder_attention_mask": (np.arange(9) < np.array([[9], [4]])).astype(np.int64),
    }
    sides = dict(zip(("num_frames", "height", "width"), shape, strict=True))
    for times in (np.array([[700.0], [31.0]]), rng.uniform(0, 1000, (2, tokens))):
        given = {**inputs, "timestep": times.astype(np.float32), "rope_interpolation_scale": scale}
        made = compiled({**given, **{name: np.array(side) for name, side in sides.items()}})["out_sample"]
        told = torch.tensor(given.pop("timestep"))
        del given["rope_interpolation_scale"]
        with torch.no_grad():
            wanted = module(
                **{name: torch.tensor(value) for name, value in given.items()}, **sides, timestep=told,
                rope_interpolation_scale=tuple(map(float, scale)),
            ).sample.numpy()  # fmt: skip
        np.testing.assert_allclose(made, wanted, atol=1e-3)  # angles of up to 15,700, in float32


@pytest.mark.parametrize("version", AUTOENCODERS)
def test_the_autoencoder_gives_what_torch_gives(tmp_path: Path, version: str) -> None:
    """A batch of videos; noise between layers is that which torch draws."""
    module = make_autoencoder(version)
    module.save_pretrained(tmp_path)
    bundle = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(tmp_path))
    np.testing.assert_allclose(bundle.configs["vae_decoder"]["latents_std_data"], module.latents_std.numpy())
    decoder, rng = _compiled(bundle, "vae_decoder"), np.random.default_rng(3)
    inputs = {"latent_sample": rng.standard_normal((2, CHANNELS, 3, 2, 3), np.float32)}
    if module.config.timestep_conditioning:
        inputs["timestep"] = np.array([0.05, 0.3], np.float32)
    torch.manual_seed(4)
    for port in decoder.inputs:
        if (name := port.any_name).startswith("noise_"):
            sides = [side * 2 ** int(name.removeprefix("noise_")) for side in (2, 3)]
            inputs[name] = torch.stack([torch.randn(sides) for _ in range(port.partial_shape[0].get_length())]).numpy()
    assert len(inputs) == {"0.9.0": 1, "0.9.1": 5, "0.9.5": 2}[version]
    torch.manual_seed(4)
    with torch.no_grad():
        wanted = module.decode(
            torch.tensor(inputs["latent_sample"]), torch.tensor(inputs["timestep"]) if "timestep" in inputs else None
        ).sample
    np.testing.assert_allclose(decoder(inputs)["sample"], wanted.numpy(), atol=2e-4)
    encoder = _compiled(bundle, "vae_encoder")
    for frames in (1, 9):
        video = rng.standard_normal((2, 3, frames, 32, 64), np.float32)
        with torch.no_grad():
            parameters = module.encode(torch.tensor(video)).latent_dist.parameters.numpy()
        np.testing.assert_allclose(encoder(video)["latent_parameters"], parameters, atol=2e-4)


def test_tokens_of_several_latents_are_refused(tmp_path: Path) -> None:
    diffusers.LTXVideoTransformer3DModel(**TRANSFORMER, patch_size=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a token of 2 latents"):
        DiffusersLoader(LoaderOptions()).load(FileSource(tmp_path)).models["transformer"]


UPSAMPLERS: dict[str, dict[str, Any]] = {
    "sides": {},
    "frames": {"spatial_upsample": False, "temporal_upsample": True},
    "both": {"temporal_upsample": True},
    "frame by frame": {"dims": 2},
}


def make_upsampler(**options: Any) -> Any:
    """Return a small latent upsampler, whose groups have one channel, and two if it is wider."""
    from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

    torch.manual_seed(5)
    small = {"in_channels": CHANNELS, "mid_channels": 64, "num_blocks_per_stage": 2}
    return _transformers().noise(LTXLatentUpsamplerModel(**{**small, **options})).eval()


def make_upsample_pipeline(folder: Path, version: str = "0.9.5", kind: str = "sides") -> Path:
    """Write what LTXLatentUpsamplePipeline is published as: the upsampler, one of `UPSAMPLERS`, and an autoencoder."""
    make_upsampler(**UPSAMPLERS[kind]).save_pretrained(folder / "latent_upsampler")
    make_autoencoder(version).save_pretrained(folder / "vae")
    index = {
        "_class_name": "LTXLatentUpsamplePipeline", "_diffusers_version": diffusers.__version__,
        "latent_upsampler": ["ltx", "LTXLatentUpsamplerModel"], "vae": ["diffusers", "AutoencoderKLLTXVideo"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", UPSAMPLERS)
def test_the_upsampler_gives_what_torch_gives(tmp_path: Path, kind: str) -> None:
    """Of its folder alone, and of the makers' file, whose config is known by the shapes."""
    module = make_upsampler(**UPSAMPLERS[kind])
    module.save_pretrained(tmp_path / "folder")
    save_file(module.state_dict(), tmp_path / "file.safetensors")
    rng = np.random.default_rng(2)
    for name in ("folder", "file.safetensors"):
        bundle = _load(tmp_path / name)
        config = bundle.configs["latent_upsampler"]
        assert {key: config[key] for key in module.config if key[0] != "_"} == {
            key: value for key, value in module.config.items() if key[0] != "_"
        }
        compiled = _compiled(bundle, "latent_upsampler")
        for shape in ((2, CHANNELS, 3, 2, 4), (1, CHANNELS, 1, 5, 3)):
            latents = rng.standard_normal(shape, np.float32)
            with torch.no_grad():
                wanted = module(torch.tensor(latents)).numpy()
            np.testing.assert_allclose(compiled(latents)["sample"], wanted, atol=2e-4)


# -- single files -------------------------------------------------------------------------------------------------


def _makers_parts(version: str) -> tuple[list[str], list[str]]:
    """Return diffusers' places of the makers' numbered parts of encoder and decoder, as their own code lists them."""
    if version == "0.9.0":
        encoder = ["down_blocks.0", "down_blocks.0.downsamplers.0", "down_blocks.0.conv_out", "down_blocks.1",
                   "down_blocks.1.downsamplers.0", "down_blocks.1.conv_out", "down_blocks.2", "down_blocks.2.downsamplers.0",
                   "down_blocks.3", "mid_block"]  # fmt: skip
        decoder = ["mid_block", "up_blocks.0", "up_blocks.1.upsamplers.0", "up_blocks.1", "up_blocks.2.conv_in",
                   "up_blocks.2.upsamplers.0", "up_blocks.2", "up_blocks.3.conv_in", "up_blocks.3.upsamplers.0",
                   "up_blocks.3"]  # fmt: skip
        return encoder, decoder
    decoder = ["mid_block", *(f"up_blocks.{n}{part}" for n in range(3) for part in (".upsamplers.0", ""))]
    if version == "0.9.1":
        return _makers_parts("0.9.0")[0], decoder
    return [*(f"down_blocks.{n}{part}" for n in range(4) for part in ("", ".downsamplers.0")), "mid_block"], decoder


def makers_autoencoder(version: str, state: dict[str, Any]) -> dict[str, Any]:
    """Return an autoencoder's tensors as Lightricks' files name them."""
    found = {}
    for name, tensor in state.items():
        new = name.replace("latents_mean", "per_channel_statistics.mean-of-means")
        new = new.replace("latents_std", "per_channel_statistics.std-of-means")
        for side, parts, stem in zip(("encoder", "decoder"), _makers_parts(version), ("down", "up"), strict=True):
            for number, part in sorted(enumerate(parts), key=lambda each: -len(each[1])):
                if new.startswith(f"{side}.{part}."):
                    new = f"{side}.{stem}_blocks.{number}.{new.removeprefix(f'{side}.{part}.')}"
                    break
            if new.startswith((f"{side}.time_embedder", f"{side}.scale_shift_table")):
                new = new.replace(f"{side}.", f"{side}.last_")
        new = new.replace("resnets.", "res_blocks.").replace("conv_shortcut.conv.", "conv_shortcut.")
        found[new.replace(".norm3.", ".norm3.norm.")] = tensor.contiguous()
    return found | {"per_channel_statistics.mean-of-stds": torch.zeros(CHANNELS)}


def makers_transformer(state: dict[str, Any]) -> dict[str, Any]:
    """Return a transformer's tensors as Lightricks' files name them."""
    changed = (
        ("proj_in", "patchify_proj"),
        ("time_embed.", "adaln_single."),
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
    )
    found = {}
    for name, tensor in state.items():
        for ours, theirs in changed:
            name = name.replace(ours, theirs)
        found[name] = tensor.contiguous()
    return found


def _load(path: Path, **options: Any) -> Any:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(path)) is Match.YES
    return loader.load(FileSource(path))


def _same_constants(one: Any, other: Any) -> bool:
    """Say whether two graphs, which were traced of one module, have the same weights."""
    ours, theirs = (
        [op.data for op in model.get_ordered_ops() if op.get_type_name() == "Constant"] for model in (one, other)
    )
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


@pytest.mark.filterwarnings("ignore:.*brings no tokenizer")
@pytest.mark.parametrize("version", AUTOENCODERS)
def test_a_file_gives_what_its_folder_gives(tmp_path: Path, version: str) -> None:
    """Transformer and autoencoder in one file, in the makers' names; and each alone is known, in either naming."""
    folder = make_ltx_pipeline(tmp_path / "folder", version)
    transformer = diffusers.LTXVideoTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
    vae = make_autoencoder(version).state_dict()
    both = {f"model.diffusion_model.{name}": tensor for name, tensor in makers_transformer(transformer).items()}
    both |= {f"vae.{name}": tensor for name, tensor in makers_autoencoder(version, vae).items()}
    files = {"both": both, "vae": makers_autoencoder(version, vae), "named": vae, "transformer": transformer}
    wanted = _load(folder)
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        bundle = _load(tmp_path / f"{name}.safetensors")
        for role in bundle.models:
            told, said = bundle.configs[role], wanted.configs[role]
            assert {key for key in told.keys() & said.keys() if told[key] != said[key]} <= {
                "_diffusers_version", "spatial_compression_ratio", "temporal_compression_ratio",
            }  # fmt: skip
            if role.startswith("vae"):
                assert compression(told) == compression(said) == 32
            if name == "both":
                assert _same_constants(bundle.models[role], wanted.models[role]), role
    bundle = _load(tmp_path / "both.safetensors")
    assert bundle.index["_class_name"] == "LTXPipeline"
    config = {key: value for key, value in bundle.scheduler_config().items() if key[0] != "_"}
    shifted = {**wanted.scheduler_config(), "use_dynamic_shifting": False}
    assert config.items() <= (shifted if version == "0.9.5" else wanted.scheduler_config()).items()


def test_published_autoencoders_are_known_by_their_shapes() -> None:
    """The sizes of 0.9.0, 0.9.1 and 0.9.5; the last is also that of 0.9.7 and 0.9.8."""
    published = {
        "0.9.0": {},
        "0.9.1": {"decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 6, 7, 8)},
        "0.9.5": {
            "block_out_channels": (128, 256, 512, 1024, 2048), "layers_per_block": (4, 6, 6, 2, 2),
            "decoder_block_out_channels": (256, 512, 1024), "decoder_layers_per_block": (5, 5, 5, 5),
        },
    }  # fmt: skip
    for version, sizes in published.items():
        small = {} if version == "0.9.0" else AUTOENCODERS[version]
        widths = {"latent_channels": 128, **sizes}
        if version == "0.9.1":
            widths |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": (4, 3, 3, 3, 4)}
        with torch.device("meta"):
            module = diffusers.AutoencoderKLLTXVideo(**{**small, **widths})
        shapes = {
            name: tuple(tensor.shape) for name, tensor in makers_autoencoder(version, module.state_dict()).items()
        }
        assert find_components(shapes) == {"vae": Part("AutoencoderKLLTXVideo", "", "original")}
        ours = autoencoder_config(Part("AutoencoderKLLTXVideo", "", "original"), shapes, None)
        told = json.loads(json.dumps(dict(module.config)))
        assert {key: told[key] for key in ours if key[0] != "_"} == {key: ours[key] for key in ours if key[0] != "_"}


def test_files_of_the_next_generation_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    state = makers_autoencoder("0.9.5", make_autoencoder("0.9.5").state_dict())
    untimed = {name: tensor for name, tensor in state.items() if "time" not in name and "shift" not in name}
    save_file(untimed, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="LTX-2"):
        _load(tmp_path / "x.safetensors")
    del state["decoder.up_blocks.2.res_blocks.0.conv2.conv.bias"]
    save_file(state, tmp_path / "y.safetensors")
    with pytest.raises(ModelError, match=r"up_blocks\.0\.resnets\.0\.conv2\.conv\.bias is missing"):
        _ = _load(tmp_path / "y.safetensors").models["vae_decoder"]


@pytest.mark.filterwarnings("ignore:.*do not stay compressed", "ignore:.*brings no tokenizer")
def test_a_gguf_transformer(tmp_path: Path) -> None:
    """As ComfyUI-GGUF writes it; matrices of eight bits stay so."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(2)
    state = makers_transformer(_transformers().noise(diffusers.LTXVideoTransformer3DModel(**TRANSFORMER)).state_dict())
    writer, held = gguf.GGUFWriter(tmp_path / "x.gguf", "ltxv"), {}
    for name, tensor in state.items():
        kind = "Q8_0" if name.startswith("transformer_blocks") and tensor.shape[-1] % 32 == 0 else "F32"
        number = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(tensor.numpy(), number)
        held[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, number))).reshape(tensor.shape)
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(held, tmp_path / "held.safetensors")
    ours, wanted = (_load(tmp_path / name).models["transformer"] for name in ("x.gguf", "held.safetensors"))
    assert _same_constants(ours, wanted)
    half = _load(tmp_path / "x.gguf", weights="f16").models["transformer"]
    types = [op.get_element_type().get_type_name() for op in half.get_ops() if op.get_type_name() == "Constant"]
    assert types.count("i8") == 4  # the others are small, and stay exact
