"""Adapters of diffusion transformers in whole pipelines: pictures against diffusers with the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import TRANSFORMERS, agree, make_transformer, pipeline
from ovforge import Use
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

PROMPT = "a beautiful pink unicorn, 8k"


@pytest.mark.parametrize("family", sorted(TRANSFORMERS.keys() - {"pixart"}))  # which takes none in diffusers
def test_pictures_with_an_adapter(family: str, torch_lcm: Path, session_cache: Cache, tmp_path: Path) -> None:
    """Fused at 0.7; and switched while running, off and on again."""
    source = make_transformer(tmp_path / "model", family, torch_lcm)
    pipe = getattr(diffusers, TRANSFORMERS[family][1]).from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "to_add_out", "to_qkv_mlp_proj"]
    layers += ["img_mlp.net.2", "txt_mlp.net.2", "img_mod.1"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(config)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    kinds = {"transformer_lora_layers": peft.get_peft_model_state_dict(pipe.transformer)}
    type(pipe).save_lora_weights(tmp_path, **kinds, weight_name="adapter.safetensors")
    pipe.transformer.delete_adapters("default")
    guided: dict[str, Any] = {"guidance_scale": 2.0}
    if family == "qwenimage":
        guided = {"negative_prompt": "blue", "true_cfg_scale": 5.0}
    size: dict[str, Any] = {"width": 24, "height": 16, **guided}
    own: dict[str, Any] = {"use_resolution_binning": False} if family == "sana" else {}
    if family == "sana":  # its autoencoder makes 2 pixels of a latent here, and diffusers takes multiples of 32
        pipe.check_inputs = lambda *given, **named: None
    if family == "lumina2":  # which diffusers takes for 8 pixels of a latent
        pipe.vae_scale_factor = 2

    def theirs() -> list[Any]:
        made: list[Any] = pipe(
            prompt=PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(1), **size, **own
        ).images
        return made

    plain = theirs()
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors", adapter_name="a")
    pipe.set_adapters(["a"], [0.7])
    wanted = theirs()
    assert np.abs(np.asarray(plain[0], int) - np.asarray(wanted[0], int)).max() > 8, "the adapter acts"
    adapter = str(tmp_path / "adapter.safetensors")

    def ours(**options: Any) -> Any:
        return pipeline(source, session_cache, transforms=[Use("lora", path=adapter, scale=0.7, **options)])

    made = ours()(PROMPT, steps=3, seed=1, **size)
    agree(made, wanted)
    assert not [warning for warning in made.warnings if "no such layer" in warning]
    switched = ours(mode="runtime")
    agree(switched(PROMPT, steps=3, seed=1, **size), wanted)
    switched.adapters.off()
    agree(switched(PROMPT, steps=3, seed=1, **size), plain)
