"""Sana: its transformer, Gemma 2's states and its autoencoder, converted folders against torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.errors import ConfigError, ModelError
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")
tokenizers = pytest.importorskip("tokenizers")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

WIDTH, CHANNELS, WINDOW = 24, 4, 16
SMALL: dict[str, Any] = {
    "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "num_attention_heads": 3,
    "attention_head_dim": 8, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
    "caption_channels": WIDTH, "sample_size": 16,
}  # fmt: skip


def write_tokenizer(folder: Path) -> int:
    """Train byte pairs with Gemma's steps, and write them as transformers does; return how many words there are."""
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    reader = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    reader.normalizer = normalizers.Replace(" ", "▁")
    reader.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    text = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[3].glob("docs/*.md"))[:3]]
    reader.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    model = json.loads(reader.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = transformers.GemmaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def noise(module: Any) -> Any:
    """Change every weight, since a fresh module has many that are zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module


def make_sana_pipeline(folder: Path, *, sprint: bool = False) -> Path:
    """Write a small pipeline with every kind of block and of layer."""
    torch.manual_seed(0)
    words = write_tokenizer(folder / "tokenizer")
    config = transformers.Gemma2Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8,
    )  # fmt: skip
    noise(transformers.Gemma2Model(config)).save_pretrained(folder / "text_encoder")
    kind = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if sprint else {}
    noise(diffusers.SanaTransformer2DModel(**SMALL, **kind)).save_pretrained(folder / "transformer")
    torch.manual_seed(0)
    diffusers.AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).save_pretrained(folder / "vae")  # fmt: skip
    flow = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    scheduler = diffusers.SCMScheduler() if sprint else diffusers.DPMSolverMultistepScheduler(**flow)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "SanaSprintPipeline" if sprint else "SanaPipeline", "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__], "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"], "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sana_pipeline(tmp_path_factory.mktemp("sana") / "torch")


@pytest.fixture(scope="module")
def bundle(folder: Path, opened: Callable[[Path], Any]) -> Any:
    return opened(folder)


def run(model: Any, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: np.ndarray = compiled(inputs)[name]
    return result


@pytest.mark.parametrize("size", [(4, 6), (9, 5)])
def test_the_transformer_gives_what_torch_gives(folder: Path, bundle: Any, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    inputs = {
        "hidden_states": rng.standard_normal((2, CHANNELS, *size), np.float32),
        "timestep": np.array([700, 31.5], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 9, WIDTH), np.float32),
        "encoder_attention_mask": (np.arange(9) < np.array([[9], [4]])).astype(np.float32),
    }
    module = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        wanted = module(**{name: torch.tensor(value) for name, value in inputs.items()}).sample.numpy()
    np.testing.assert_allclose(run(bundle.models["transformer"], inputs, "out_sample"), wanted, atol=1e-4)


def test_sprint_takes_guidance(tmp_path: Path) -> None:
    folder = make_sana_pipeline(tmp_path / "sprint", sprint=True)
    rng = np.random.default_rng(4)
    inputs = {
        "hidden_states": rng.standard_normal((2, CHANNELS, 3, 5), np.float32),
        "timestep": np.array([0.7, 0.2], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 6, WIDTH), np.float32),
        "encoder_attention_mask": (np.arange(6) < np.array([[6], [2]])).astype(np.float32),
        "guidance": np.array([0.45, 0.1], np.float32),
    }
    module = diffusers.SanaTransformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        wanted = module(**{name: torch.tensor(value) for name, value in inputs.items()}).sample.numpy()
    model = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(folder)).models["transformer"]
    np.testing.assert_allclose(run(model, inputs, "out_sample"), wanted, atol=1e-4)


@pytest.mark.parametrize("tokens", [7, 40])
def test_gemma_gives_what_torch_gives(folder: Path, bundle: Any, tokens: int) -> None:
    """Also if the text is longer than the window of every other layer."""
    ids = np.random.default_rng(2).integers(5, 300, (2, tokens))
    mask = (np.arange(tokens) < np.array([[tokens], [4]])).astype(np.int64)
    module = transformers.Gemma2Model.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        wanted = module(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    made = run(bundle.models["text_encoder"], {"input_ids": ids, "attention_mask": mask}, "last_hidden_state")
    np.testing.assert_allclose(made[mask > 0], wanted[mask > 0], atol=1e-4)


def test_the_autoencoder_gives_what_torch_gives(folder: Path, bundle: Any) -> None:
    module = diffusers.AutoencoderDC.from_pretrained(folder / "vae")
    rng = np.random.default_rng(3)
    latents, pixels = (rng.standard_normal(shape, np.float32) for shape in ((1, CHANNELS, 5, 7), (1, 3, 10, 14)))
    with torch.no_grad():
        decoded = module.decode(torch.tensor(latents)).sample.numpy()
        encoded = module.encode(torch.tensor(pixels)).latent.numpy()
    made = run(bundle.models["vae_decoder"], {"latent_sample": latents}, "sample")
    np.testing.assert_allclose(made, decoded, atol=1e-4)
    made = run(bundle.models["vae_encoder"], {"sample": pixels}, "latent_parameters")
    np.testing.assert_allclose(made, encoded, atol=1e-4)


def test_sizes_are_multiples_of_the_autoencoders_factor(folder: Path) -> None:
    """A token is one latent, so that odd numbers of them fit."""
    fixed = DiffusersLoader(LoaderOptions(weights="f32", batch=1, height=6, width=10)).load(FileSource(folder))
    assert list(fixed.models["transformer"].input("hidden_states").shape) == [2, CHANNELS, 3, 5]
    wrong = DiffusersLoader(LoaderOptions(weights="f32", height=7, width=8)).load(FileSource(folder))
    with pytest.raises(ConfigError, match="7 is not a multiple of 2"):
        wrong.models["transformer"]


def test_its_transformer_in_one_file_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    original = ("blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.cross_attn.kv_linear.weight")
    for tensors in (own, dict.fromkeys(original, torch.zeros(1))):
        path = tmp_path / "sana.safetensors"
        save_file({name: value.clone() for name, value in tensors.items()}, path)
        with pytest.raises(
            ModelError, match="it holds a SanaTransformer2DModel, which is read from a diffusers folder"
        ):
            DiffusersLoader(LoaderOptions()).load(FileSource(path))


def test_places_in_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    config = other / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "interpolation_scale": 2}))
    with pytest.raises(ModelError, match="adds places"):
        DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(other)).models["transformer"]
