"""Autoencoders alone in single files, in each of their namings: what they give, against their folders and torch."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts.stages import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
ov = pytest.importorskip("openvino")

from safetensors.torch import save_file  # noqa: E402

from ovforge_diffusers.autoencoders import autoencoder_config  # noqa: E402
from ovforge_diffusers.components import find_components  # noqa: E402
from ovforge_diffusers.header import Part  # noqa: E402
from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

Tensors = dict[str, Any]


def _names() -> Any:
    spec = importlib.util.spec_from_file_location("foreign_names", Path(__file__).with_name("foreign_names.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = _names()
FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **FOUR, "block_out_channels": (8, 8, 16, 16), "latent_channels": 16, "norm_num_groups": 8, "sample_size": 1024,
        "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False,
    },
    "AutoencoderKLFlux2": {
        **FOUR, "block_out_channels": (8, 8, 16, 16), "latent_channels": 32, "norm_num_groups": 8,
    },
    "AutoencoderKLQwenImage": {"base_dim": 8, "z_dim": 16},
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**SMALL["AutoencoderKL"], "block_out_channels": (128, 256, 512, 512), "norm_num_groups": 32},
    "AutoencoderKLFlux2": {},
    "AutoencoderKLQwenImage": {},
}  # fmt: skip


def original(kind: str, state: Tensors) -> Tensors:
    if kind == "AutoencoderKLQwenImage":
        made: Tensors = NAMES.wan_vae(state)
    elif kind == "AutoencoderKLFlux2":
        made = NAMES.flux2_vae(state, 4)
    else:
        made = NAMES.vae_to_original(state, 4)
    return made


def make(kind: str) -> Any:
    torch.manual_seed(0)
    module = getattr(diffusers, kind)(**SMALL[kind]).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
        if kind == "AutoencoderKLFlux2":
            module.bn.running_mean.copy_(torch.randn(128) * 0.3)
            module.bn.running_var.copy_(torch.rand(128) + 0.3)
    return module


def load(path: Path, **options: Any) -> ModelBundle:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(path)) is Match.YES
    return loader.load(FileSource(path))


def run(model: Any, value: Any) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: np.ndarray = compiled([value.numpy()])[0]
    return result


@pytest.mark.filterwarnings("ignore:.*does not say whether it is that of FLUX.1")
@pytest.mark.parametrize("kind", SMALL)
def test_a_file_gives_what_its_folder_gives(tmp_path: Path, kind: str) -> None:
    """In the makers' names and in diffusers', with the prefix of a checkpoint or without; and what torch gives."""
    module = make(kind)
    module.save_pretrained(tmp_path / "folder")
    state = module.state_dict()
    own = {name: tensor.contiguous() for name, tensor in original(kind, state).items()}
    files = {"makers": own, "diffusers": state, "prefixed": {f"vae.{name}": tensor for name, tensor in own.items()}}
    wanted = load(tmp_path / "folder")
    frame = (1,) if kind == "AutoencoderKLQwenImage" else ()
    latents = torch.randn(1, module.config.get("latent_channels", 16), *frame, 3, 4)
    picture = torch.randn(1, 3, *frame, 24, 32)
    with torch.no_grad():
        decoded = module.decode(latents).sample.numpy()
        encoded = module.encode(picture).latent_dist.parameters.numpy()
    np.testing.assert_allclose(run(wanted.models["vae_decoder"], latents), decoded, atol=1e-4)
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        bundle = load(tmp_path / f"{name}.safetensors")
        assert list(bundle.models) == ["vae_encoder", "vae_decoder"]
        assert bundle.index == {}
        np.testing.assert_allclose(run(bundle.models["vae_decoder"], latents), decoded, atol=1e-4)
        np.testing.assert_allclose(run(bundle.models["vae_encoder"], picture), encoded, atol=1e-4)
        found, said = bundle.configs["vae_decoder"], wanted.configs["vae_decoder"]
        unknown = {"scaling_factor", "shift_factor"} if kind == "AutoencoderKL" else set()
        assert {key: found[key] for key in said.keys() - unknown if key[0] != "_"} == {
            key: said[key] for key in said.keys() - unknown if key[0] != "_"
        }
        assert all(found[key] is None for key in unknown)


def test_what_a_file_does_not_tell_is_said_and_a_folder_tells_it(tmp_path: Path) -> None:
    """FLUX.1's and Stable Diffusion 3's autoencoders have the same tensors, and scale latents by other factors."""
    module = make("AutoencoderKL")
    save_file(original("AutoencoderKL", module.state_dict()), tmp_path / "ae.safetensors")
    with pytest.warns(UserWarning, match=r"FLUX\.1 or of Stable Diffusion 3.*null.*config = FOLDER"):
        load(tmp_path / "ae.safetensors")
    module.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    module.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    config = load(tmp_path / "ae.safetensors", config=tmp_path / "vae").configs["vae_decoder"]
    assert (config["scaling_factor"], config["shift_factor"]) == (1.5305, 0.0609)
    make("AutoencoderKLFlux2").save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"load\.config.*has no AutoencoderKL"):
        load(tmp_path / "ae.safetensors", config=tmp_path / "other")
    with pytest.raises(ConfigError, match="holds none") as caught:
        load(tmp_path / "ae.safetensors", config=tmp_path / "vae", tokenizer=tmp_path)
    assert "[load.parts]" in str(caught.value)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_autoencoders_are_known_by_their_shapes(kind: str) -> None:
    with torch.device("meta"):
        module = getattr(diffusers, kind)(**PUBLISHED[kind])
    state = module.state_dict()
    told = json.loads(json.dumps(dict(module.config)))
    for naming, tensors in (("original", original(kind, state)), ("diffusers", state)):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert find_components(shapes) == {"vae": Part(kind, "", naming)}
        ours = autoencoder_config(Part(kind, "", naming), shapes, (0.3611, 0.1159))
        assert {key: told[key] for key in ours if key[0] != "_"} == {key: ours[key] for key in ours if key[0] != "_"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SMALL)
def test_damaged_files_end_in_words(tmp_path: Path, kind: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in original(kind, make(kind).state_dict()).items()}
    rng = np.random.default_rng(0)
    refused: list[ModelError] = []
    for _ in range(6):
        tensors = dict(state)
        for name in rng.choice(list(tensors), 3):
            change = int(rng.integers(5))
            if change == 0 or name not in tensors:
                tensors.pop(name, None)
            elif change == 1:
                tensors[f"{name}.more"] = tensors[name]
            else:
                tensors[name] = (tensors[name].flatten(), tensors[name][:0], tensors[name][None])[change - 2].clone()
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
        try:
            _ = DiffusersLoader(LoaderOptions()).load(FileSource(tmp_path / "x.safetensors")).models["vae_decoder"]
        except ModelError as error:
            refused.append(error)
    assert len(refused) > 3
    assert all(str(tmp_path) in str(error) for error in refused)
