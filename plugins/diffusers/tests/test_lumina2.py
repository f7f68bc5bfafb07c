"""Lumina-Image 2.0: its transformer over batches, and Gemma 2's states before the last layer, against torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")
pytest.importorskip("tokenizers")


CHANNELS, WIDTH, WINDOW = 16, 24, 16
SMALL: dict[str, Any] = {
    "sample_size": 16, "in_channels": CHANNELS, "hidden_size": 48, "num_layers": 3, "num_refiner_layers": 2,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 16, "axes_dim_rope": (4, 4, 4), "axes_lens": (300, 64, 64),
    "cap_feat_dim": WIDTH,
}  # fmt: skip


def _sana() -> Any:
    """Return the tests of Sana, whose tokenizer this model has, too."""
    spec = importlib.util.spec_from_file_location("small_sana", Path(__file__).with_name("test_sana.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_lumina2_pipeline(folder: Path) -> Path:
    """Write a small pipeline with every kind of block."""
    torch.manual_seed(0)
    small = _sana()
    words = small.write_tokenizer(folder / "tokenizer")
    config = transformers.Gemma2Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8,
    )  # fmt: skip
    small.noise(transformers.Gemma2Model(config)).save_pretrained(folder / "text_encoder")
    small.noise(diffusers.Lumina2Transformer2DModel(**SMALL)).save_pretrained(folder / "transformer")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "Lumina2Pipeline", "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizer"], "transformer": ["diffusers", "Lumina2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lumina2_pipeline(tmp_path_factory.mktemp("lumina2") / "torch")


@pytest.fixture(scope="module")
def bundle(folder: Path, opened: Callable[[Path], Any]) -> Any:
    return opened(folder)


def run(model: Any, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: np.ndarray = compiled(inputs)[name]
    return result


@pytest.mark.parametrize("size", [(8, 12), (10, 6)])
def test_the_transformer_gives_what_torch_gives(folder: Path, bundle: Any, size: tuple[int, int]) -> None:
    """Of texts of different lengths beside each other, where diffusers lays out each row by itself."""
    rng = np.random.default_rng(1)
    lengths, high, wide = np.array([9, 4]), size[0] // 2, size[1] // 2
    inputs = {
        "hidden_states": rng.standard_normal((2, CHANNELS, *size), np.float32),
        "timestep": np.array([0.3, 0.85], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 9, WIDTH), np.float32),
        "encoder_attention_mask": (np.arange(9) < lengths[:, None]).astype(np.float32),
    }
    module = diffusers.Lumina2Transformer2DModel.from_pretrained(folder / "transformer").eval()
    given = {name: torch.tensor(value) for name, value in inputs.items()}
    given["encoder_attention_mask"] = given["encoder_attention_mask"].long()
    with torch.no_grad():
        wanted = module(**given).sample.numpy()
    rows, columns = np.divmod(np.arange(high * wide), wide)
    picture = np.stack([np.stack([np.full_like(rows, length), rows, columns], axis=-1) for length in lengths])
    text = np.zeros((2, 9, 3), np.int64)
    text[..., 0] = np.arange(9)
    made = run(bundle.models["transformer"], {**inputs, "txt_ids": text, "img_ids": picture}, "sample")
    np.testing.assert_allclose(made, wanted, atol=1e-4 * np.abs(wanted).max())


def test_gemma_gives_the_states_before_its_last_layer(folder: Path, bundle: Any) -> None:
    ids = np.random.default_rng(2).integers(5, 300, (2, 40))
    mask = (np.arange(40) < np.array([[40], [4]])).astype(np.int64)
    module = transformers.Gemma2Model.from_pretrained(folder / "text_encoder").eval()
    with torch.no_grad():
        told = module(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
    wanted = told.hidden_states[-2].numpy()
    made = run(
        bundle.models["text_encoder"],
        {"input_ids": ids, "attention_mask": mask},
        f"hidden_states.{len(told.hidden_states) - 2}",
    )
    np.testing.assert_allclose(made[mask > 0], wanted[mask > 0], atol=1e-4)
