"""Prompts of whole pipelines: edits, parts, adapters by name, special tokens, against diffusers where it can do it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovforge
from families import agree
from ovforge import Use
from ovforge.errors import InputError
from ovforge.store.cache import Cache

F32 = Use("cpu", precision="f32")
SMALL: dict[str, Any] = {"steps": 4, "width": 16, "height": 16, "guidance_scale": 2.0, "seed": 3}
Folder = Callable[[str], Path]


def pipeline(source: Path, cache: Cache, **options: Any) -> Any:
    task = Use("text-to-image", prompts="weighted", **options.pop("task", {}))
    return ovforge.Pipeline(task, source=source, load={"weights": "f32"}, device=F32, cache=cache, **options)


def reference(source: Path, name: str = "StableDiffusionPipeline") -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = getattr(diffusers, name).from_pretrained(source)
    pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def weighted(torch_family: Folder, session_cache: Cache) -> Any:
    return pipeline(torch_family("sd1"), session_cache)


def test_an_edit_changes_the_text_between_steps(torch_family: Folder, weighted: Any) -> None:
    torch = pytest.importorskip("torch")
    pipe = reference(torch_family("sd1"))
    first, second = (pipe.encode_prompt(text, "cpu", 1, True)[::-1] for text in ("a pink cat", "a blue cat"))

    def change(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.cat(second)} if step == 2 else tensors  # before the fourth call

    theirs = pipe(
        prompt_embeds=first[1], negative_prompt_embeds=first[0], num_inference_steps=4, guidance_scale=2.0, width=16,
        height=16, generator=torch.Generator().manual_seed(3), callback_on_step_end=change,
    ).images  # fmt: skip
    ours = weighted("a [pink:blue:0.5] cat", **SMALL)
    agree(ours, theirs, anywhere=3, average=0.5)
    assert (ours.latents != weighted("a pink cat", **SMALL).latents).any()


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_parts_add_up(torch_family: Folder, session_cache: Cache, guidance: str) -> None:
    """Twice the same part is twice the guidance, and a part of no weight is not a part; also beside another prompt."""
    pipe = pipeline(torch_family("sd1"), session_cache, task={"guidance": guidance})
    twice = pipe("a cat AND  a cat", **SMALL)
    np.testing.assert_allclose(twice.latents, pipe("a cat", **{**SMALL, "guidance_scale": 4.0}).latents, atol=2e-3)
    both = pipe(["a cat AND the pink unicorn:0", "a cat AND the pink unicorn:0.7"], **{**SMALL, "seed": [3, 3]})
    np.testing.assert_allclose(both.latents[:1], pipe("a cat", **SMALL).latents, atol=2e-3)
    assert np.abs(both.latents[1] - both.latents[0]).max() > 1e-2
    with pytest.raises(InputError, match="AND"):
        pipe("a cat AND a dog", **{**SMALL, "guidance_scale": 1.0})


def test_parts_of_sdxl(torch_family: Folder, session_cache: Cache) -> None:
    pipe = pipeline(torch_family("xl"), session_cache)
    twice = pipe("a cat AND  a cat", **SMALL)
    np.testing.assert_allclose(twice.latents, pipe("a cat", **{**SMALL, "guidance_scale": 4.0}).latents, atol=2e-3)
    with pytest.raises(InputError, match="parts between AND"):
        pipe("a cat AND a dog", prompt_2="a cat", **SMALL)


def test_the_end_token_in_a_prompt(torch_family: Folder, session_cache: Cache) -> None:
    torch = pytest.importorskip("torch")
    prompt = "a <|endoftext|> pink cat"
    theirs = reference(torch_family("sd1"))(
        prompt,
        num_inference_steps=4,
        guidance_scale=2.0,
        width=16,
        height=16,
        generator=torch.Generator().manual_seed(3),
    ).images
    plain = ovforge.Pipeline(
        "text-to-image", source=torch_family("sd1"), load={"weights": "f32"}, device=F32, cache=session_cache
    )
    ours = plain(prompt, **SMALL)
    agree(ours, theirs, anywhere=3, average=0.5)
    assert "<|endoftext|>" in ours.warnings[0]


def test_adapters_by_name(torch_family: Folder, session_cache: Cache, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v"
    tensors = {f"{name}.lora_down.weight": (4, 32), f"{name}.lora_up.weight": (32, 4)}
    save_file(
        {key: rng.normal(size=size).astype(np.float32) for key, size in tensors.items()}, tmp_path / "x.safetensors"
    )
    use = Use("lora", path=str(tmp_path / "x.safetensors"), mode="runtime", name="x", scale=0.1)
    pipe = pipeline(torch_family("sd1"), session_cache, transforms=[use])
    before = pipe("a cat", **SMALL)
    named = pipe("a <lora:x:0.9>cat", **SMALL)
    assert dict(pipe.adapters) == {"x": 0.1}
    np.testing.assert_array_equal(pipe("a cat", **SMALL).latents, before.latents)
    pipe.adapters.set({"x": 0.9})
    np.testing.assert_array_equal(pipe("a cat", **SMALL).latents, named.latents)
    assert (named.latents != before.latents).any()
    with pytest.raises(InputError, match="'y'"):
        pipe("a cat <lora:y:1>", **SMALL)


def test_a_model_without_tokenizer_files_says_so(torch_family: Folder, session_cache: Cache, tmp_path: Path) -> None:
    """Its OpenVINO tokenizer reads the prompt, and gives the same for plain words."""
    from ovforge.model.sources import FileSource
    from ovforge_diffusers.loader import DiffusersLoader
    from ovforge_diffusers.options import LoaderOptions

    folder = tmp_path / "model"
    DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(torch_family("sd1"))).save(folder)
    for path in (folder / "tokenizer").iterdir():
        if path.suffix in (".json", ".txt"):
            path.unlink()
    task = Use("text-to-image", prompts="weighted")
    pipe = ovforge.Pipeline(task, source=folder, device=F32, cache=session_cache)
    with pytest.warns(UserWarning, match="no tokenizer.json"):
        ours = pipe("a (pink:1.3) unicorn, 8k", **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wanted = pipeline(torch_family("sd1"), session_cache)("a (pink:1.3) unicorn, 8k", **SMALL)
    np.testing.assert_array_equal(ours.latents, wanted.latents)
