"""A small pipeline with random weights, in diffusers' own layout, and its conversion in f32."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ovforge
from conftest import session_cache
from ovforge.model.bundle import ModelBundle
from ovforge.store.cache import Cache

__all__ = ["session_cache"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = ["unicorn", "pink", "beautiful", "photo", "background", "the", "and", "cat", "blue", "8k", "café", "!!!"]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Build a vocabulary by CLIP's scheme: bytes, bytes ending a word, merges, two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    letters = {b: chr(b) if b in printable else chr(next(spare)) for b in range(256)}
    ordered = [chr(b) for b in printable] + [c for c in letters.values() if ord(c) >= 256]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [letters[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
            parts[:2] = ["".join(pair)]
    tokens = ordered + [c + "</w>" for c in ordered] + ["".join(pair) for pair in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def make_pipeline(folder: Path, **unet: Any) -> Path:
    """Write a pipeline: CLIP text encoder and tokenizer, UNet with guidance embedding, autoencoder, scheduler."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("openvino_tokenizers")
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    torch.manual_seed(0)
    vocabulary, merges = clip_vocabulary()
    end = vocabulary["<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    shape: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 32, "time_cond_proj_dim": 24,
    }  # fmt: skip
    diffusers.UNet2DConditionModel(**{**shape, **unet}).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=8, sample_size=16,
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.LCMScheduler().save_pretrained(folder / "scheduler")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (tokenizer / "merges.txt").write_text(lines + "\n", encoding="utf-8")
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({**special, "bos_token": "<|startoftext|>", "model_max_length": 77, "do_lower_case": True})
    )
    write_index(folder)
    return folder


def write_index(folder: Path, **changes: Any) -> None:
    """Write model_index.json with `changes`."""
    index = {
        "_class_name": "LatentConsistencyModelPipeline",
        "_diffusers_version": "0.42.1",
        "_name_or_path": "somewhere/private",
        "feature_extractor": [None, None],
        "requires_safety_checker": True,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "LCMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


@pytest.fixture(scope="session", name="write_index")
def write_index_fixture() -> Callable[..., None]:
    """Return `write_index`, for tests that change what a folder says it holds."""
    return write_index


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the torch pipeline's folder; read only."""
    return make_pipeline(tmp_path_factory.mktemp("torch") / "pipeline")


@pytest.fixture(scope="session")
def converted(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pipeline converted with f32 weights and saved."""
    from ovforge.model.sources import FileSource
    from ovforge_diffusers.loader import DiffusersLoader
    from ovforge_diffusers.options import LoaderOptions

    target = tmp_path_factory.mktemp("openvino") / "pipeline"
    DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(pipeline)).save(target)
    return target


@pytest.fixture(scope="session")
def opened(session_cache: Cache) -> Callable[[Path], ModelBundle]:
    """Return a function that opens a folder with f32 weights: what other tests of the run have converted, as they did."""
    return lambda folder: ovforge.open_model(folder, cache=session_cache, options={"weights": "f32"})


@pytest.fixture
def copy(pipeline: Path, tmp_path: Path) -> Path:
    """Return a copy of the torch pipeline that a test may damage."""
    import shutil

    return Path(shutil.copytree(pipeline, tmp_path / "copy"))
