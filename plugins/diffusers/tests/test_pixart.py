"""PixArt-Sigma: its transformer, a converted folder against torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts import Match
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


def test_the_transformer_gives_what_torch_gives(folder: Path, opened: Callable[[Path], Any]) -> None:
    """At its own size and at others, which have other places."""
    model = opened(folder).models["transformer"]
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


def test_a_published_transformer_stands_alone(folder: Path, tmp_path: Path) -> None:
    """Published pipelines leave it out, and repositories of it hold nothing else."""
    published = Path(shutil.copytree(folder / "transformer", tmp_path / "transformer"))
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(published)) is Match.YES
    bundle = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(published))
    assert "encoder_attention_mask" in {name for port in bundle.models["transformer"].inputs for name in port.names}
    (published / "config.json").write_text(
        json.dumps({**config, "_class_name": "Transformer2DModel", "norm_type": "x"})
    )
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(published)) is Match.NO


def test_an_index_of_shards_names_something_else(folder: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(folder / "transformer", tmp_path / "transformer"))
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    for wrong in (3, "../secret.safetensors", None):
        weights = {"a": "diffusion_pytorch_model.safetensors", "b": wrong}
        index.write_text(json.dumps({"weight_map": weights}))
        with pytest.raises(ModelError, match="is missing, diffusion_pytorch_model.safetensors.index.json names it"):
            DiffusersLoader(LoaderOptions()).load(FileSource(part))


def test_a_pipeline_is_published_without_its_transformer(folder: Path, tmp_path: Path) -> None:
    """Its index names it all the same: the option skip leaves it out, as a component that is not read."""
    source = Path(shutil.copytree(folder, tmp_path / "base"))
    shutil.rmtree(source / "transformer")
    index = json.loads((source / "model_index.json").read_text())
    for kind in ("Transformer2DModel", "PixArtTransformer2DModel"):
        (source / "model_index.json").write_text(json.dumps({**index, "transformer": ["diffusers", kind]}))
        with pytest.raises(ModelError, match=r"transformer/config.json is missing") as raised:
            DiffusersLoader(LoaderOptions()).load(FileSource(source))
        assert "skip = ['transformer']" in str(raised.value)
        with pytest.warns(UserWarning, match="transformer .* is left out"):
            bundle = DiffusersLoader(LoaderOptions(skip=["transformer"])).load(FileSource(source))
        assert "text_encoder" in bundle.models and "transformer" not in bundle.models
        assert bundle.models["vae_decoder"].inputs


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_its_transformer_in_one_file_is_refused_by_name(folder: Path, tmp_path: Path, prefix: str) -> None:
    """In diffusers' names and in its own, as people have it for ComfyUI."""
    from safetensors.torch import load_file, save_file

    own = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    original = ("blocks.0.mlp.fc1.weight", "blocks.0.cross_attn.kv_linear.weight", "y_embedder.y_embedding")
    for tensors in (own, dict.fromkeys(original, torch.zeros(1))):
        path = tmp_path / "pixart.safetensors"
        save_file({prefix + name: value.clone() for name, value in tensors.items()}, path)
        assert DiffusersLoader(LoaderOptions()).can_load(FileSource(path)) is Match.YES
        with pytest.raises(
            ModelError, match="it holds a PixArtTransformer2DModel, which is read from a diffusers fold"
        ):
            DiffusersLoader(LoaderOptions()).load(FileSource(path))


@pytest.mark.parametrize("name", ["model.pth", "checkpoints/model.pt"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Alone, and in a folder as repositories of original weights have them."""
    path = tmp_path / "model" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\x80\x02}.")
    (tmp_path / "model/README.md").write_text("The original weights.")
    for source in (tmp_path / "model", path):
        with pytest.raises(ModelError, match=rf"{path.name} is a pickle"):
            DiffusersLoader(LoaderOptions()).load(FileSource(source))


def test_conditions_of_pixart_alpha_are_refused(folder: Path, tmp_path: Path) -> None:
    config = {**SMALL, "use_additional_conditions": True}
    diffusers.PixArtTransformer2DModel(**config).save_pretrained(tmp_path)
    bundle = DiffusersLoader(LoaderOptions()).load(FileSource(tmp_path))
    with pytest.raises(ModelError, match="size of the picture as a condition"):
        bundle.models["transformer"]
