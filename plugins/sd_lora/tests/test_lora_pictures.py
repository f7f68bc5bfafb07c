"""Every kind of adapter, alone and in pairs: weights and pictures are those of LyCORIS, peft and diffusers on torch.

LyCORIS acts as in training, beside torch's layers: its merging applies alpha / rank of LoHa and LoKr twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import agree
from ovforge import Use
from ovforge.store.cache import Cache
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.transform import LoraTransform

from .conftest import Family, ours, pictures, their_pictures, weights

Families = Callable[[str], Family]
Lora = Callable[..., Path]

KINDS: dict[str, dict[str, Any]] = {
    "locon-tucker": {"algo": "lora", "use_tucker": True, "linear_alpha": 2, "conv_alpha": 1},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr-tucker": {"algo": "lokr", "use_tucker": True, "factor": 4, "decompose_both": True},
    "lokr-full": {"algo": "lokr", "full_matrix": True},
    "full-norms": {"algo": "full", "train_norm": True},
    "dora-outputs": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "dora-inputs": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "doha": {"algo": "loha", "dora_wd": True},
    "dokr": {"algo": "lokr", "dora_wd": True, "factor": 4},
    "ia3-outputs": {"algo": "ia3", "train_on_input": False},
    "ia3-inputs": {"algo": "ia3", "train_on_input": True},
    "glora": {"algo": "glora"},
    "glora-tucker": {"algo": "glora", "use_tucker": True},
    "oft": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4, "rescaled": True},
    "oft-bounded": {"algo": "diag-oft", "linear_dim": 4, "conv_dim": 4, "constraint": 0.02},
    "boft": {"algo": "boft", "linear_dim": 4, "conv_dim": 4, "rescaled": True},
}
BENT = ("oft", "oft-bounded", "boft", "glora", "glora-tucker")
"""Kinds that LyCORIS runs at other strengths than 1 in ways of its own."""

PAIRS = [("loha", "lokr-tucker"), ("doha", "locon-tucker"), ("full-norms", "loha-tucker")]


def lycoris(unet: Any, kind: str, strength: float, target: Path) -> Any:
    """Let LyCORIS put a random adapter at the layers of `unet`, at a strength, and write it."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("lycoris")
    torch.manual_seed(len(kind))
    library.LycorisNetwork.apply_preset(
        {"target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D"], "enable_conv": True}
    )
    options = {"linear_dim": 3, "linear_alpha": 1.5, "conv_dim": 2, "conv_alpha": 1, **KINDS[kind]}
    network = library.create_lycoris(unet, strength, **options)
    for name, parameter in ((name, p) for module in network.loras for name, p in module.named_parameters()):
        size = 0.05 if "norm" in name or options["algo"] == "full" else 0.3
        parameter.data += size * torch.randn_like(parameter.data) * (0.1 if "dora" in name else 1)
    network.apply_to()
    network.save_weights(str(target), torch.float32, {})
    if options["algo"] == "full":  # it takes weights off torch's layers; merged they are there for a second adapter
        network.restore()
        network.merge_to(strength)
    return network  # its hooks work as long as it lives


def shown_weights(unet: Any) -> dict[str, Any]:
    """Return the weights of layers as their own results show them, whatever is beside the stored ones."""
    torch = pytest.importorskip("torch")
    found = {}
    for name, layer in unet.named_modules():
        base = getattr(layer, "base_layer", layer)  # peft's layers hold torch's
        if isinstance(base, torch.nn.Linear):
            rows = layer(torch.cat([torch.eye(base.in_features), torch.zeros(1, base.in_features)]))
            found[name] = (rows[:-1] - rows[-1]).T
        elif isinstance(base, torch.nn.Conv2d):
            side, begin = base.kernel_size[0], base.stride[0] - base.padding[0]
            ones = torch.eye(base.in_channels * side * side).reshape(-1, base.in_channels, side, side)
            room = torch.nn.functional.pad(torch.cat([ones, torch.zeros_like(ones[:1])]), (begin, 4, begin, 4))
            there = layer(room)[:, :, 1, 1]  # the second pixel's kernel lies on the ones
            found[name] = (there[:-1] - there[-1]).T.reshape(base.out_channels, base.in_channels, side, side)
    return {name: value.detach().numpy() for name, value in found.items() if ".base_layer" not in name}


def compare(family: Family, cache: Cache, pipe: Any, adapters: dict[Path, float], switched: Any = None) -> None:
    """Compare weights and pictures of torch's pipeline with ours: fused, and in a running pipeline."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        shown = shown_weights(pipe.unet)
    theirs = their_pictures(pipe)
    bundle, uses = family.bundle(), []
    for number, (path, scale) in enumerate(adapters.items()):
        assert not LoraTransform(LoraOptions(path=path, scale=scale)).apply(bundle).skipped
        uses.append(Use("lora", path=str(path), scale=scale, name=f"adapter{number}"))
    for name, value in weights(bundle).items():
        if (layer := name.removesuffix(".weight")) in shown:
            wanted = shown[layer]
            assert np.abs(value.reshape(wanted.shape) - wanted).max() <= 5e-5 * max(1, np.abs(wanted).max()), name
    fused = ours(family, cache, *uses)
    agree(pictures(fused), theirs)
    if switched is not None:
        before = pictures(switched)
        for use in uses:
            switched.adapters.load(use.use, **use.options)
        agree(pictures(switched), theirs)
        assert np.abs(np.asarray(theirs[0], int) - np.asarray(before.images[0], int)).mean() > 1
        for number in range(len(uses)):
            switched.adapters.unload(f"adapter{number}")
        assert np.array_equal(pictures(switched).latents, before.latents)


@pytest.fixture(scope="module")
def switched(family: Families, cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a running pipeline with a place at every layer, bias and norm; no adapter is on."""
    path = tmp_path_factory.mktemp("places") / "places.safetensors"
    lycoris(family("small").pipe().unet, "full-norms", 1.0, path)
    pipe = ours(family("small"), cache, Use("lora", path=path, mode="runtime", places="all"))
    pipe.adapters.off()
    return pipe


@pytest.mark.sweep
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), *PAIRS], ids=" + ".join)
def test_kinds_of_lycoris(
    family: Families, cache: Cache, switched: Any, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """Strengths are 1 where magnitudes are apart: between 0 and 1 everybody bends them otherwise."""
    pipe = family("small").pipe()
    strengths = [
        1.0 if KINDS[kind].get("dora_wd") or kind in BENT else 0.7 - 1.1 * place for place, kind in enumerate(kinds)
    ]
    paths = [tmp_path / f"{kind}.safetensors" for kind in kinds]
    networks = [lycoris(pipe.unet, *each) for each in zip(kinds, strengths, paths, strict=True)]
    compare(family("small"), cache, pipe, dict(zip(paths, strengths, strict=True)), switched)
    del networks


LINEAR = ["to_q", "to_v", "to_out.0", "ff.net.2"]
CONV = [*LINEAR, "conv1"]
TURNED = [*LINEAR, "proj_in"]
PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5, "target_modules": ["to_q", "to_v", "conv1"], "init_weights": False}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 5, "target_modules": ["to_q", "to_v", "conv1"], "init_weights": False}),
    "lokr-patterns": (
        "LoKrConfig",
        {"r": 64, "alpha": 5, "target_modules": ["to_q", "to_v"], "init_weights": False,
         "rank_pattern": {r".*attn1\.to_q": 40}, "alpha_pattern": {"up_blocks.*to_v": 30}},
    ),
    "patterns": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": False, "use_rslora": True,
         "rank_pattern": {r"attn\d\.to_q": 2, "to_q": 3}, "alpha_pattern": {r"down_blocks\..*\.to_(q|v)": 20}},
    ),
    "biases": ("LoraConfig", {"r": 2, "target_modules": LINEAR, "init_lora_weights": False, "bias": "all"}),
    "own-biases": (
        "LoraConfig", {"r": 2, "target_modules": LINEAR, "init_lora_weights": False, "bias": "lora_only"}
    ),
    "whole-layers": (
        "LoraConfig",
        {"r": 2, "target_modules": LINEAR, "init_lora_weights": False, "modules_to_save": ["time_embedding.linear_1"]},
    ),
    "pissa": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "init_lora_weights": "olora"}),
    "pissa-dora": ("LoraConfig", {"r": 4, "target_modules": LINEAR, "init_lora_weights": "pissa", "use_dora": True}),
    "adalora": ("AdaLoraConfig", {"init_r": 5, "lora_alpha": 9, "target_modules": CONV, "total_step": 10}),
    "ia3": ("IA3Config", {"target_modules": CONV, "feedforward_modules": ["ff.net.2", "conv1"]}),
    "oft": ("OFTConfig", {"target_modules": TURNED, "oft_block_size": 4}),
    "oft-exact": ("OFTConfig", {"target_modules": TURNED, "oft_block_size": 4, "use_cayley_neumann": False,
                                "block_share": True}),
    "coft": ("OFTConfig", {"target_modules": TURNED, "oft_block_size": 4, "coft": True, "eps": 1.5}),
    "boft": ("BOFTConfig", {"target_modules": CONV, "boft_block_size": 4}),
    "hra": ("HRAConfig", {"target_modules": CONV, "r": 4}),
    "hra-gs": ("HRAConfig", {"target_modules": CONV, "r": 4, "apply_GS": True}),
    "hira": ("HiraConfig", {"target_modules": CONV, "r": 4}),
    "glora": ("GloraConfig", {"target_modules": LINEAR, "r": 3}),
    "glora-vectors": ("GloraConfig", {"target_modules": LINEAR, "config_A_B": "vector", "config_C": "vector",
                                      "config_D_E": "vector"}),
    "vera": ("VeraConfig", {"target_modules": LINEAR, "r": 4}),
    "vera-drawn": ("VeraConfig", {"target_modules": LINEAR, "r": 4, "save_projection": False,
                                  "projection_prng_key": 2**33 + 5}),
    "randlora": ("RandLoraConfig", {"target_modules": LINEAR, "r": 5, "randlora_alpha": 60}),
    "fourierft": ("FourierFTConfig", {"target_modules": LINEAR, "n_frequency": 20, "random_loc_seed": 9}),
    "miss": ("MissConfig", {"target_modules": LINEAR, "r": 5}),
    "miss-bat": ("MissConfig", {"target_modules": LINEAR, "r": 4, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {"target_modules": LINEAR, "r": 4, "mini_r": 4, "init_weights": "mini"}),
    "shira": ("ShiraConfig", {"target_modules": LINEAR, "r": 2}),
    "c3a": ("C3AConfig", {"target_modules": LINEAR, "block_size": 4}),
    "road": ("RoadConfig", {"target_modules": LINEAR, "group_size": 4}),
    "road-2": ("RoadConfig", {"target_modules": LINEAR, "group_size": 8, "variant": "road_2"}),
    "road-4": ("RoadConfig", {"target_modules": LINEAR, "group_size": 4, "variant": "road_4"}),
    "delora": ("DeloraConfig", {"target_modules": LINEAR, "r": 4}),
    "gralora": ("GraloraConfig", {"target_modules": LINEAR, "r": 4, "alpha": 9}),
    "gralora-hybrid": ("GraloraConfig", {"target_modules": LINEAR, "r": 4, "hybrid_r": 2}),
    "ln-tuning": ("LNTuningConfig", {"target_modules": ["norm1", "norm3"]}),
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("kind", PEFT)
def test_kinds_of_peft(family: Families, cache: Cache, switched: Any, tmp_path: Path, kind: str) -> None:
    """A folder of PEFT, trained from where peft lets a kind begin: by what torch's layers then make of their inputs."""
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(3)
    pipe = family("small").pipe()
    name, options = PEFT[kind]
    model = peft.get_peft_model(pipe.unet, getattr(peft, name)(**options))  # it changes the UNet itself
    size = {
        "ia3": 0.5,
        "oft": 0.15,
        "shira": 0.3,
        "hira": 0.4,
        "c3a": 3,
        "delora": 0.5,
        "vera": 1.0,
        "vera-drawn": 1.0,
        "road-2": 0.8,
        "coft": 0.6,
    }.get(kind, 0.25)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    model.eval()
    # The running pipeline has places for the biases of attention layers, and none for embeddings of time.
    compare(family("small"), cache, pipe, {tmp_path: 1.0}, None if kind in ("biases", "whole-layers") else switched)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["sd1", "xl"])
def test_adapters_of_diffusers(family: Families, lora: Lora, cache: Cache, name: str) -> None:
    """Text encoders as well: two LoRA of SDXL; of Stable Diffusion one, and DoRA with a LoRA after it."""
    files = {"first": lora(name, 0, text=name == "sd1"), "second": lora(name, 1, dora=name == "sd1")}
    pairs = [{"first": 0.7, "second": -0.4}] if name == "xl" else [{"first": 0.7}, {"second": 1.0, "first": -0.6}]
    pipe = family(name).pipe()
    plain = their_pictures(pipe)
    for adapter, path in files.items():
        pipe.load_lora_weights(path, adapter_name=adapter)
    for scales in pairs:
        pipe.set_adapters(list(scales), list(scales.values()))
        assert np.abs(np.asarray(their_pictures(pipe)[0], int) - np.asarray(plain[0], int)).mean() > 1
        compare(family(name), cache, pipe, {files[n]: scale for n, scale in scales.items()})
