"""PixArt-Sigma: its transformer, a converted folder against torch."""

from __future__ import annotations

import importlib.util
import json
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

CHANNELS, WIDTH = 4, 32
SMALL: dict[str, Any] = {
    "in_channels": CHANNELS, "out_channels": 2 * CHANNELS, "num_layers": 3, "num_attention_heads": 2,
    "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": WIDTH, "sample_size": 16, "patch_size": 2,
    "use_additional_conditions": False,
}  # fmt: skip


def _transformers() -> Any:
    """Return the tests of Stable Diffusion 3, whose T5 this model has, too."""
    spec = importlib.util.spec_from_file_location("small_t5", Path(__file__).with_name("test_transformers.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_pixart_pipeline(folder: Path, *, published: bool = False) -> Path:
    """Write a small pipeline; with `published`, under the class that the published configs name."""
    torch.manual_seed(0)
    small = _transformers()
    small.write_t5(folder, "text_encoder", "")
    small.noise(diffusers.PixArtTransformer2DModel(**SMALL)).save_pretrained(folder / "transformer")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=0.13025,
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    kind = "Transformer2DModel" if published else "PixArtTransformer2DModel"
    index = {
        "_class_name": "PixArtSigmaPipeline", "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"], "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"], "transformer": ["diffusers", kind], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    path = folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": kind}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pixart_pipeline(tmp_path_factory.mktemp("pixart") / "torch")


def test_the_transformer_gives_what_torch_gives(folder: Path) -> None:
    """At its own size and at others, which have other places."""
    model = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(folder)).models["transformer"]
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    module = diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer").eval()
    rng = np.random.default_rng(1)
    for height, width in ((16, 16), (6, 20), (24, 10)):
        inputs = {
            "hidden_states": rng.standard_normal((2, CHANNELS, height, width), np.float32),
            "timestep": np.array([700, 31], np.float32),
            "encoder_hidden_states": rng.standard_normal((2, 9, WIDTH), np.float32),
            "encoder_attention_mask": (np.arange(9) < np.array([[9], [4]])).astype(np.float32),
        }
        with torch.no_grad():
            wanted = module(**{name: torch.tensor(value) for name, value in inputs.items()}).sample.numpy()
        np.testing.assert_allclose(compiled(inputs)["out_sample"], wanted, atol=1e-4)


def test_conditions_of_pixart_alpha_are_refused(folder: Path, tmp_path: Path) -> None:
    config = {**SMALL, "use_additional_conditions": True}
    diffusers.PixArtTransformer2DModel(**config).save_pretrained(tmp_path)
    bundle = DiffusersLoader(LoaderOptions()).load(FileSource(tmp_path))
    with pytest.raises(ModelError, match="size of the picture as a condition"):
        bundle.models["transformer"]
