"""FLUX.2 klein: its transformer, the layers of Qwen3, and the statistics of its autoencoder, against torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.errors import ModelError
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")
pytest.importorskip("tokenizers")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

WIDTH, CHANNELS, LAYERS = 8, 4, 28
SMALL: dict[str, Any] = {
    "in_channels": 4 * CHANNELS, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": 3 * WIDTH, "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False,
}  # fmt: skip


def _zimage() -> Any:
    """Return the tests of Z-Image, whose tokenizer this model has, too."""
    spec = importlib.util.spec_from_file_location("small_zimage", Path(__file__).with_name("test_zimage.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_flux2_pipeline(folder: Path, *, distilled: bool = False) -> Path:
    """Write a small pipeline with every kind of block, and statistics that a fresh module has zero or one."""
    torch.manual_seed(0)
    small = _zimage()
    words = small.write_tokenizer(folder / "tokenizer")
    config = transformers.Qwen3Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    small.noise(transformers.Qwen3ForCausalLM(config)).save_pretrained(folder / "text_encoder")
    small.noise(diffusers.Flux2Transformer2DModel(**SMALL)).save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=8, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.randn(4 * CHANNELS) * 0.3)
    vae.bn.running_var.copy_(torch.rand(4 * CHANNELS) + 0.3)
    vae.save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Flux2KleinPipeline", "_diffusers_version": diffusers.__version__, "is_distilled": distilled,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"], "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux2_pipeline(tmp_path_factory.mktemp("flux2") / "torch")


@pytest.fixture(scope="module")
def bundle(folder: Path, opened: Callable[[Path], Any]) -> Any:
    return opened(folder)


def compiled(model: Any) -> Any:
    return ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize(("tokens", "patches"), [(3, 12), (9, 20), (1, 1)])
def test_the_transformer(folder: Path, bundle: Any, tokens: int, patches: int) -> None:
    rng = np.random.default_rng(tokens)
    inputs = {
        "hidden_states": rng.standard_normal((2, patches, 4 * CHANNELS), np.float32),
        "timestep": rng.random(2, np.float32),
        "encoder_hidden_states": rng.standard_normal((2, tokens, 3 * WIDTH), np.float32),
        "txt_ids": np.tile(rng.integers(0, 9, (tokens, 4)).astype(np.float32), (2, 1, 1)),
        "img_ids": np.tile(rng.integers(0, 30, (patches, 4)).astype(np.float32), (2, 1, 1)),
    }
    module = diffusers.Flux2Transformer2DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        wanted = module(**{name: torch.from_numpy(value) for name, value in inputs.items()}, return_dict=False)[0]
    made = compiled(bundle.models["transformer"])(inputs)["out_sample"]
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-4)


def test_the_layers_of_the_text_encoder(folder: Path, bundle: Any) -> None:
    """All of them, those of what fills up as well: transformers gives it the states of what stands before it."""
    ids = np.array([[5, 6, 7, 8, 0, 0], [9, 8, 7, 6, 5, 4]])
    mask = np.array([[1, 1, 1, 1, 0, 0], [1] * 6])
    module = transformers.Qwen3ForCausalLM.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        wanted = module(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True
        )
    made = compiled(bundle.models["text_encoder"])({"input_ids": ids, "attention_mask": mask})
    assert len(wanted.hidden_states) == LAYERS + 1
    for layer, states in enumerate(wanted.hidden_states):
        np.testing.assert_allclose(made[f"hidden_states.{layer}"], states.numpy(), atol=1e-4)
    np.testing.assert_array_equal(made["last_hidden_state"], made[f"hidden_states.{LAYERS}"])


def test_the_statistics_of_latents_are_in_the_config(folder: Path, bundle: Any, tmp_path: Path) -> None:
    """Under the names of optimum-intel's exports, since they belong neither to the encoder nor to the decoder."""
    vae = diffusers.AutoencoderKLFlux2.from_pretrained(folder / "vae")
    config = bundle.configs["vae_decoder"]
    np.testing.assert_allclose(config["bn_running_mean_data"], vae.bn.running_mean.numpy())
    np.testing.assert_allclose(config["bn_running_var_data"], vae.bn.running_var.numpy())
    assert config["bn_eps"] == vae.bn.eps
    broken = make_flux2_pipeline(tmp_path / "broken")
    path = broken / "vae/diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    del weights["bn.running_var"]
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"bn\.running_var is missing"):
        DiffusersLoader(LoaderOptions()).load(FileSource(broken))
