"""FLUX.1 Canny and Depth as adapters (Control LoRAs): pictures against diffusers, in the release's layout and diffusers'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families import agree, make_transformer, pipeline, seeded
from ovforge import Use
from ovforge.errors import InputError, ModelError
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.loaders import lora_conversion_utils, lora_pipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

PROMPT = "a beautiful pink unicorn, 8k"
CALL: dict[str, Any] = {"width": 40, "height": 24, "guidance_scale": 2.5}
NAME = "_convert_bfl_flux_control_lora_to_diffusers"


@pytest.fixture(scope="module")
def source(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_transformer(tmp_path_factory.mktemp("flux") / "model", "flux", torch_lcm)


@pytest.fixture
def small_reader(source: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return diffusers' reader of the release's layout, for the small model in place of FLUX.1's 57 blocks.

    Of the last modulation it swaps the halves of both factors; those of the first are ranks, whose order is put right.
    """
    config = diffusers.FluxTransformer2DModel.load_config(source / "transformer")
    width = config["attention_head_dim"] * config["num_attention_heads"]
    small = {19: config["num_layers"], 38: config["num_single_layers"], 3072: width}
    reader = getattr(lora_conversion_utils, NAME)
    code = reader.__code__
    small_reader = type(reader)(
        code.replace(
            co_consts=tuple(small.get(each, each) if isinstance(each, int) else each for each in code.co_consts)
        ),
        reader.__globals__,
    )

    def read(tensors: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = small_reader(tensors)
        name = "transformer.norm_out.linear.lora_A.weight"
        made[name] = lora_conversion_utils.swap_scale_shift(made[name])
        return made

    monkeypatch.setattr(lora_pipeline, NAME, read)
    return read


def control_lora(transformer: Any) -> dict[str, Any]:
    """Return a random Control LoRA as Black Forest Labs write it: factors, their biases, and norms as they are."""
    random, tensors = torch.Generator().manual_seed(5), {}
    layers = dict(transformer.named_modules())

    def add(name: str, *paths: str, inputs: int | None = None) -> None:
        out, rank = sum(layers[path].out_features for path in paths), 4
        inputs = inputs or layers[paths[0]].in_features
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=random) / inputs**0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=random) * 0.2
        tensors[f"{name}.lora_B.bias"] = torch.randn(out, generator=random) * 0.1

    def norm(name: str, path: str) -> None:
        tensors[f"{name}.scale"] = 1 + 0.5 * torch.randn(layers[path].weight.shape, generator=random)

    add("img_in", "x_embedder", inputs=2 * transformer.config.in_channels)
    add("txt_in", "context_embedder")
    embedders = [("time_in", "timestep_embedder"), ("vector_in", "text_embedder")]
    if transformer.config.guidance_embeds:
        embedders.append(("guidance_in", "guidance_embedder"))
    for name, path in embedders:
        add(f"{name}.in_layer", f"time_text_embed.{path}.linear_1")
        add(f"{name}.out_layer", f"time_text_embed.{path}.linear_2")
    add("final_layer.linear", "proj_out")
    add("final_layer.adaLN_modulation.1", "norm_out.linear")
    for number in range(transformer.config.num_layers):
        ours, theirs = f"transformer_blocks.{number}", f"double_blocks.{number}"
        for stream, names, out, feed, mod, added in (
            ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", "norm1", ""),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context", "norm1_context", "added_"),
        ):
            add(f"{theirs}.{stream}_mod.lin", f"{ours}.{mod}.linear")
            add(f"{theirs}.{stream}_attn.qkv", *(f"{ours}.attn.{name}" for name in names))
            add(f"{theirs}.{stream}_attn.proj", f"{ours}.attn.{out}")
            add(f"{theirs}.{stream}_mlp.0", f"{ours}.{feed}.net.0.proj")
            add(f"{theirs}.{stream}_mlp.2", f"{ours}.{feed}.net.2")
            norm(f"{theirs}.{stream}_attn.norm.query_norm", f"{ours}.attn.norm_{added}q")
            norm(f"{theirs}.{stream}_attn.norm.key_norm", f"{ours}.attn.norm_{added}k")
    for number in range(transformer.config.num_single_layers):
        ours, theirs = f"single_transformer_blocks.{number}", f"single_blocks.{number}"
        add(f"{theirs}.modulation.lin", f"{ours}.norm.linear")
        add(f"{theirs}.linear1", *(f"{ours}.attn.to_{letter}" for letter in "qkv"), f"{ours}.proj_mlp")
        add(f"{theirs}.linear2", f"{ours}.proj_out")
        norm(f"{theirs}.norm.query_norm", f"{ours}.attn.norm_q")
        norm(f"{theirs}.norm.key_norm", f"{ours}.attn.norm_k")
    return tensors


def picture(seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((40, 24), Image.Resampling.BICUBIC)


def theirs(source: Path, kind: str, files: dict[Path, float], **call: Any) -> Any:
    """Return diffusers' pictures with adapters, each at its scale, on a pipeline of FLUX.1 dev."""
    pipe = getattr(diffusers, kind).from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    for file in files:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
    pipe.set_adapters([file.stem for file in files], list(files.values()))
    return pipe(
        prompt=PROMPT, control_image=picture(), num_inference_steps=3, generator=seeded([3]), **CALL, **call
    ).images


@pytest.mark.parametrize("scale", [1.0, 0.85])
def test_in_both_layouts(
    source: Path, session_cache: Cache, tmp_path: Path, small_reader: Callable[..., Any], scale: float
) -> None:
    """Fused, and switched while running; norms take the place of the model's at any scale, as in diffusers."""
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(source / "transformer")
    release, own = tmp_path / "release.safetensors", tmp_path / "own.safetensors"
    save_file(control_lora(transformer), release)
    save_file({name: value.contiguous() for name, value in small_reader(control_lora(transformer)).items()}, own)
    wanted = theirs(source, "FluxControlPipeline", {release: scale})
    given = {"prompt": PROMPT, "control": picture(), "steps": 3, "seed": 3, **CALL}
    for file, mode in ((release, "fuse"), (own, "fuse"), (release, "runtime")):
        adapter = Use("lora", path=str(file), scale=scale, mode=mode)
        pipe = pipeline(source, session_cache, transforms=[adapter])
        made = pipe(**given)
        agree(made, wanted)
        assert not any("no such layer" in warning for warning in made.warnings)
    other = pipe(**{**given, "control": picture(1)})
    assert np.abs(other.latents - made.latents).max() > 1e-2, "the condition counts"
    pipe.adapters.off()
    plain = pipe(**given)
    assert np.abs(plain.latents - made.latents).max() > 1e-2
    np.testing.assert_array_equal(pipe(**{**given, "control": picture(0)}).latents, plain.latents)


@pytest.fixture
def release(source: Path, tmp_path: Path, small_reader: Callable[..., Any]) -> Path:
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(source / "transformer")
    save_file(control_lora(transformer), tmp_path / "release.safetensors")
    return tmp_path / "release.safetensors"


def test_beside_another_adapter_from_a_picture(source: Path, session_cache: Cache, release: Path) -> None:
    """The other one, for dev, leaves alone what reads the condition. It may stand before or behind."""
    random, plain = torch.Generator().manual_seed(9), release.with_name("plain.safetensors")
    shapes = {"x_embedder": (32, 64), "transformer_blocks.1.attn.to_q": (32, 32)}
    tensors = {}
    for name, (out, inputs) in shapes.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, inputs, generator=random)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 2, generator=random) * 0.1
    save_file(tensors, plain)
    call = {"image": picture(2), "strength": 0.7}
    wanted = theirs(source, "FluxControlImg2ImgPipeline", {release: 1.0, plain: 0.5}, **call)
    adapters = [Use("lora", path=str(release)), Use("lora", path=str(plain), scale=0.5)]
    for transforms in (adapters, adapters[::-1]):
        pipe = pipeline(source, session_cache, "image-to-image", transforms=transforms)
        given = {key: value for key, value in CALL.items() if key not in ("width", "height")}
        agree(pipe(PROMPT, control=picture(), steps=3, seed=3, **call, **given), wanted)


def test_on_a_quantized_transformer(source: Path, session_cache: Cache, release: Path) -> None:
    """Beside weights of eight bits at run time; the first layer, which is made wider, has float16."""
    adapter = Use("lora", path=str(release), mode="runtime")
    given = {"prompt": PROMPT, "control": picture(), "steps": 3, "seed": 3, **CALL}
    whole = pipeline(source, session_cache, transforms=[adapter])(**given)
    light = pipeline(
        source, session_cache, transforms=[adapter], quantize=[Use("weights-int8", roles=["transformer"])]
    )(**given)
    assert 0 < np.abs(light.latents - whole.latents).max() < 0.1 * np.abs(whole.latents).max()


def test_on_what_has_no_room_for_a_condition(source: Path, session_cache: Cache, release: Path, tmp_path: Path) -> None:
    """A pipeline that runs, an adapter at run time before it, FLUX.1 Kontext; and no condition given."""
    adapter = Use("lora", path=str(release))
    running = pipeline(
        source, session_cache, transforms=[Use("lora", path=str(release), roles=["transformer"], scale=0.0)]
    )
    with pytest.raises(InputError, match="0 given, and FLUX.1 of this kind sees one"):
        running(PROMPT, steps=1, **CALL)
    plain = release.with_name("plain.safetensors")
    save_file(
        {"transformer.x_embedder.lora_A.weight": torch.ones(2, 64), "transformer.x_embedder.lora_B.weight": torch.ones(32, 2)},
        plain,
    )  # fmt: skip
    first = Use("lora", path=str(plain), mode="runtime", places="all")
    with pytest.raises(ModelError, match="it is a Control LoRA, for a transformer that takes a condition"):
        pipeline(source, session_cache, transforms=[first]).adapters.load("lora", path=str(release))
    with pytest.raises(ModelError, match="Name a Control LoRA before other adapters"):
        pipeline(source, session_cache, transforms=[first, Use("lora", path=str(release), mode="runtime")])(PROMPT)
    cached = pipeline(source, session_cache, transforms=["step-cache", adapter])
    assert cached(PROMPT, control=picture(), steps=3, seed=3, **CALL).images[0].size == (40, 24)
    kontext = tmp_path / "kontext"
    shutil.copytree(source, kontext)
    index = json.loads((kontext / "model_index.json").read_text(encoding="utf-8"))
    (kontext / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "FluxKontextPipeline"}), encoding="utf-8"
    )
    with pytest.raises(ModelError, match="Kontext sees pictures as further tokens"):
        pipeline(kontext, session_cache, "image-to-image", transforms=[adapter])(PROMPT, image=picture(), steps=1)
