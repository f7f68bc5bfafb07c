"""Small models of the true architectures, and adapters for them that peft and LyCORIS make."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

import ovforge
from families import make_family, maker
from ovforge import Use
from ovforge.model.bundle import ModelBundle
from ovforge.model.runtime import core
from ovforge.model.sources import FileSource
from ovforge.store.cache import Cache
from ovforge_sd_lora.targets import find_targets, weight_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")

F32 = Use("cpu", precision="f32")
PROMPT = "a beautiful pink unicorn, 8k"
SIZE = {"width": 16, "height": 24}


def compress(model: ov.Model, mode: str) -> ov.Model:
    """Compress a model's weights; those of 4 bits in groups of 8."""
    nncf = pytest.importorskip("nncf")
    few = {} if "INT8" in mode else {"group_size": 8, "all_layers": True, "ratio": 1.0}
    return nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), **few)


@dataclass(frozen=True)
class Family:
    """A model's torch folder, and its conversion with f32 weights."""

    name: str
    torch: Path
    converted: Path

    def bundle(self) -> ModelBundle:
        return ModelBundle.open(FileSource(self.converted))

    def compressed(self, mode: str) -> ModelBundle:
        """Return a bundle whose UNet nncf has compressed, once for each mode."""
        bundle = self.bundle()
        kept = self.converted.with_name(f"{self.converted.name}-{mode}.xml")
        if not kept.exists():
            ov.save_model(compress(bundle.models["unet"], mode), kept, compress_to_fp16=False)
        bundle.models["unet"] = core().read_model(kept)
        return bundle

    def pipe(self) -> Any:
        """Return diffusers' pipeline."""
        diffusers = pytest.importorskip("diffusers")
        pipe = diffusers.DiffusionPipeline.from_pretrained(self.torch)
        pipe.safety_checker = None
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Return families by name: sd1, xl, and a small one. Norms have weights, as trained models' do."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    made: dict[str, Family] = {}
    root = tmp_path_factory.mktemp("families")

    def get(name: str) -> Family:
        if name not in made:
            from ovforge_diffusers.loader import DiffusersLoader
            from ovforge_diffusers.options import LoaderOptions

            if name == "small":
                folder = maker().make_pipeline(root / name, time_cond_proj_dim=None)
                maker().write_index(folder, _class_name="StableDiffusionPipeline", image_encoder=[None, None])
                diffusers.DDIMScheduler(
                    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                    set_alpha_to_one=False, steps_offset=1,
                ).save_pretrained(folder / "scheduler")  # fmt: skip
            else:
                folder = make_family(root / name, name, layers=2)  # which the numbers in files of SDXL count
            torch.set_num_threads(1)
            torch.manual_seed(5)
            parts = [(diffusers.UNet2DConditionModel, "unet"), (transformers.CLIPTextModel, "text_encoder")]
            for kind, part in parts:
                model = kind.from_pretrained(folder / part)
                with torch.no_grad():
                    for module in model.modules():
                        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
                            module.weight.add_(0.2 * torch.randn_like(module.weight))
                            module.bias.add_(0.1 * torch.randn_like(module.bias))
                model.save_pretrained(folder / part)
            target = root / f"{name}-openvino"
            DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(folder)).save(target)
            made[name] = Family(name, folder, target)
        return made[name]

    return get


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """Return a cache that the tests of this folder share."""
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def lora(family: Callable[[str], Family], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a maker of LoRA files by peft, in diffusers' own format: lora(family, seed, dora=..., text=...)."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    made: dict[Any, Path] = {}

    def make(name: str, seed: int = 0, *, dora: bool = False, text: bool = True) -> Path:
        key = (name, seed, dora, text)
        if key not in made:
            torch.manual_seed(seed)
            pipe = family(name).pipe()
            targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "conv1", "conv_out"]
            targets += ["conv_shortcut", "downsamplers.0.conv", "time_emb_proj"] if seed else []
            ranks = {"to_q": 3, "conv1": 2}
            config = peft.LoraConfig(
                r=4, lora_alpha=6, use_dora=dora, rank_pattern=ranks, alpha_pattern={"to_k": 2},
                init_lora_weights=False, target_modules=targets,
            )  # fmt: skip
            pipe.unet.add_adapter(config)
            layers = {"unet_lora_layers": peft.get_peft_model_state_dict(pipe.unet)}
            about = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()}
            if text:
                small = peft.LoraConfig(
                    r=2, lora_alpha=2, init_lora_weights=False, target_modules=["q_proj", "out_proj", "fc1"]
                )
                for role in ("text_encoder", "text_encoder_2")[: 1 + (name == "xl")]:
                    encoder = getattr(pipe, role)
                    encoder.add_adapter(small)
                    layers[f"{role}_lora_layers"] = peft.get_peft_model_state_dict(encoder)
                    about[f"{role}_lora_adapter_metadata"] = encoder.peft_config["default"].to_dict()
            if dora:
                for key_, value in layers["unet_lora_layers"].items():
                    if "magnitude" in key_:
                        value.mul_(1 + 0.2 * torch.randn_like(value))
            folder = tmp_path_factory.mktemp("lora")
            pipe.save_lora_weights(folder, **layers, **about)
            made[key] = folder / "pytorch_lora_weights.safetensors"
        return made[key]

    return make


def torch_weights(unet: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return every parameter of a torch module by name, without the levels that peft adds."""
    return {
        name.replace(".base_layer", ""): value.detach().float().numpy().copy()
        for name, value in unet.state_dict().items()
        if "lora_" not in name
    }


def weights(bundle: Any, role: str = "unet") -> dict[str, Any]:
    """Return the weights and biases of a model, by torch's names."""
    found = {}
    for path, target in find_targets(role, bundle.models[role]).items():
        found[f"{path}.weight"] = target.weight()
        if ports := target.bias_inputs():
            found[f"{path}.bias"] = weight_of(ports[0].get_source_output()).reshape(-1)
    return found


def pictures(pipe: Any, seed: int = 3) -> Any:
    return pipe(PROMPT, steps=3, guidance_scale=2.0, seed=seed, **SIZE)


def their_pictures(pipe: Any, seed: int = 3) -> Any:
    torch = pytest.importorskip("torch")
    made = pipe(
        PROMPT, num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(seed), **SIZE
    )
    return made.images


def ours(family: Family, cache: Cache | None, *transforms: Use, **more: Any) -> ovforge.Pipeline:
    scheduler = Use("diffusers", class_name="DDIMScheduler")
    return ovforge.Pipeline(
        "text-to-image", family.converted, transforms=transforms, device=F32, scheduler=scheduler, cache=cache, **more
    )
