"""ControlNets beside transformers: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import ovforge
from families import agree, maker, original, seeded
from ovforge import Use
from ovforge.cli import app
from ovforge.errors import InputError, ModelError, OvforgeError
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "a beautiful pink unicorn, 8k"
PROMPTS = [PROMPT, "the blue cat on a mat"]
SIZE = {"width": 40, "height": 24}
ROLES = ("controlnet", "controlnet_1")
Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def source(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return a function that gives the folder of a pipeline, or of a ControlNet, made once.

    Transformers have more blocks than their ControlNets, so that some blocks share what is added.
    """
    small, nets = maker("test_transformers"), maker("test_transformer_controlnets")
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name) / "made"
        if name == "sd3":
            small.make_transformer_pipeline(folder, torch_lcm, "sd3")
        elif name in ("flux", "schnell"):
            depth = {"num_layers": 3, "num_single_layers": 3, "guidance_embeds": name == "flux"}
            small.make_transformer_pipeline(folder, torch_lcm, "flux", **depth)
            if name == "schnell":  # XLabs' ControlNets shrink a picture as much as FLUX's own autoencoder
                torch.manual_seed(0)
                diffusers.AutoencoderKL.from_config(
                    str(folder / "vae"), block_out_channels=(8, 8, 8, 16), down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4,
                ).save_pretrained(folder / "vae")  # fmt: skip
        elif name == "canny":
            channels = {"in_channels": 128, "out_channels": 64}
            small.make_transformer_pipeline(folder, torch_lcm, "flux", **channels)
        elif name == "qwenimage":
            maker("test_qwenimage").make_qwenimage_pipeline(folder, num_layers=3)
        elif name == "sana":
            maker("test_sana").make_sana_pipeline(folder)
        elif name == "zimage":
            zimage = maker("test_zimage")
            zimage.SMALL |= {"n_layers": 4}
            zimage.make_zimage_pipeline(folder)
        else:
            variety, _, seed = name.removeprefix("net-").partition(":")
            nets.make_controlnet(variety, int(seed or 0)).save_pretrained(folder)
        made[name] = folder
        return folder

    return give


def theirs(
    source: Sources, family: str, kind: str, nets: Sequence[str], prompt: Any, *, seeds: list[int], **call: Any
) -> list[Image.Image]:
    """Return diffusers' pictures. `nets` are varieties; one that ends with * is put into diffusers' class for several."""
    classes = {"sd3": "SD3", "qwenimage": "QwenImage", "sana": "Sana", "zimage": "ZImage"}
    name = classes.get(family, "Flux")
    stem = f"{name}ControlNetModel"
    made = [getattr(diffusers, stem).from_pretrained(source(f"net-{net.rstrip('*')}")) for net in nets]
    several = getattr(diffusers, f"{name}MultiControlNetModel", None)
    net = several(made) if len(made) > 1 or any(name.endswith("*") for name in nets) else (made or [None])[0]
    pipe = original(kind, source(family), **({"controlnet": net} if nets else {}))
    if family == "sana":  # whose small autoencoder makes 2 pixels of a latent, not 32
        pipe.check_inputs = lambda *given, **named: None
        call["use_resolution_binning"] = False
    images: list[Image.Image] = pipe(prompt, **call, generator=seeded(seeds)).images
    return images


def pipeline(
    source: Sources, cache: Cache, family: str, nets: Sequence[str], task: str | Use = "text-to-image", **options: Any
) -> Any:
    parts = {role: str(source(f"net-{name.rstrip('*')}")) for role, name in zip(ROLES, nets, strict=False)}
    load = {"weights": "f32", "parts": parts}
    return ovforge.Pipeline(
        task, source=source(family), load=load, device=Use("cpu", precision="f32"), cache=cache, **options
    )


def picture(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def hole() -> Image.Image:
    mask = np.zeros((24, 40), np.uint8)
    mask[6:14, 10:30] = 255
    return Image.fromarray(mask)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers take the likeliest latents where it would draw them with torch's global generator."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    own = DiagonalGaussianDistribution.sample
    monkeypatch.setattr(
        DiagonalGaussianDistribution,
        "sample",
        lambda self, generator=None: self.mode() if generator is None else own(self, generator),
    )


def differs(pipe: Any, made: Any, call: Mapping[str, Any], control: Any) -> None:
    """Check that what was compared depends on the condition."""
    weak = [{**one, "scale": 0.0} for one in control]
    assert np.abs(pipe(control=weak, **call).latents - made.latents).max() > 1e-2


@pytest.mark.parametrize(
    ("nets", "guidance", "way"),
    [(["sd3"], 3.0, "split"), (["sd3-large"], 3.0, "joint"), (["sd3", "sd3:1"], 1.0, "joint")],
)
def test_stable_diffusion_3(
    source: Sources, session_cache: Cache, undrawn: None, nets: list[str], guidance: float, way: str
) -> None:
    """A batch of two, compiled for its size and for any; ControlNets with and without text, one and two."""
    images, several = [picture(n) for n in range(len(nets))], len(nets) > 1
    kind = "StableDiffusion3ControlNetPipeline"
    how = {"controlnet_conditioning_scale": [0.7, 1.2], "control_guidance_end": [0.5, 1.0], "control_guidance_start": [0.0, 0.3]}  # fmt: skip
    wanted = theirs(
        source, "sd3", kind, nets, PROMPTS, negative_prompt=["blue", ""], control_image=images if several else images[0],
        num_inference_steps=4, seeds=[3, 4], guidance_scale=guidance, **SIZE, **(how if several else {}),
    )  # fmt: skip
    given = {**SIZE, "guidance_scale": guidance}
    foreseen = {"input": {**given, "prompt": PROMPTS}} if way == "joint" else {}
    pipe = pipeline(source, session_cache, "sd3", nets, Use("text-to-image", guidance=way), **foreseen)
    ranges = [{"scale": 0.7, "end": 0.5}, {"scale": 1.2, "start": 0.3}] if several else [{}]
    control = [{"image": image, **more} for image, more in zip(images, ranges, strict=True)]
    call = {"prompt": PROMPTS, "steps": 4, "seed": [3, 4], **given}
    call |= {"negative_prompt": ["blue", ""]} if guidance > 1 else {}
    made = pipe(control=control, **call)
    agree(made, wanted)
    differs(pipe, made, call, control)
    fixed = dict(pipe.compiled.wanted)["controlnet"]
    assert (fixed is None) == (way == "split")


def test_stable_diffusion_3_in_a_masked_part(source: Sources, session_cache: Cache, undrawn: None) -> None:
    """By a ControlNet that sees the mask, as diffusers' pipeline does it: from noise."""
    call = {**SIZE, "guidance_scale": 3.0}
    wanted = theirs(
        source, "sd3", "StableDiffusion3ControlNetInpaintingPipeline", ["sd3-inpainting"], PROMPT, seeds=[3],
        control_image=picture(), control_mask=hole(), num_inference_steps=3, controlnet_conditioning_scale=0.9, **call,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "sd3", ["sd3-inpainting"])
    control = [{"image": picture(), "mask": hole(), "scale": 0.9}]
    agree(pipe(PROMPT, control=control, steps=3, seed=3, **call), wanted)
    with pytest.raises(InputError, match="for inpainting, and there is no mask"):
        pipe(PROMPT, control=picture(), steps=3, **call)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "nets", "modes", "way"),
    [
        ("flux", ["flux"], [None], "joint"),
        ("flux", ["flux-double"], [None], "split"),
        ("schnell", ["flux-xlabs"], [None], "joint"),
        ("flux", ["flux-union", "flux-union:1"], [2, 0], "joint"),
        ("flux", ["flux-union*"], [1, 0], "split"),
    ],
)
def test_flux(
    source: Sources, session_cache: Cache, family: str, nets: list[str], modes: list[int | None], way: str
) -> None:
    """True guidance, where ControlNets see the prompt alone; unions, of which one may get several conditions."""
    images, several = [picture(n) for n in range(len(modes))], len(modes) > 1
    how = {"controlnet_conditioning_scale": [0.7, 1.2], "control_guidance_end": [0.5, 1.0], "control_guidance_start": [0.0, 0.3],
           "control_mode": modes}  # fmt: skip
    call: dict[str, Any] = {**SIZE, "guidance_scale": 2.5}
    if family == "schnell":
        call |= {"width": 48, "height": 32}
    if nets != ["flux"]:
        call |= {"negative_prompt": ["blue", ""], "true_cfg_scale": 2.0}
    wanted = theirs(
        source, family, "FluxControlNetPipeline", nets, PROMPTS, seeds=[3, 4], control_image=images if several else images[0],
        num_inference_steps=4, **call, **(how if several else {}),
    )  # fmt: skip
    pipe = pipeline(source, session_cache, family, nets, Use("text-to-image", guidance=way))
    ranges = [{"scale": 0.7, "end": 0.5}, {"scale": 1.2, "start": 0.3}] if several else [{}]
    control = [{"image": image, "mode": mode, **more} for image, mode, more in zip(images, modes, ranges, strict=True)]
    given = {"prompt": PROMPTS, "steps": 4, "seed": [3, 4], **call}
    made = pipe(control=control, **given)
    agree(made, wanted)
    differs(pipe, made, given, control)


def test_flux_with_two_of_different_depths(
    source: Sources, session_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each counts as it does alone; diffusers would leave out what one has more than the other."""

    def alone(self: Any, controlnet_cond: Any, controlnet_mode: Any, conditioning_scale: Any, **given: Any) -> Any:
        sums: list[Any] = [[0] * 3, [0] * 3]  # for each of three blocks of two streams, and of one
        for net, image, mode, scale in zip(
            self.nets, controlnet_cond, controlnet_mode, conditioning_scale, strict=True
        ):
            kind = mode[:, None] if net.union else None
            for total, samples in zip(sums, net(controlnet_cond=image, controlnet_mode=kind, **given), strict=True):
                for block in range(3):
                    total[block] = total[block] + scale * samples[block // -(-3 // len(samples))]
        return sums

    monkeypatch.setattr(diffusers.FluxMultiControlNetModel, "forward", alone)
    nets, call = ["flux-union", "flux"], {**SIZE, "guidance_scale": 2.5}
    wanted = theirs(
        source, "flux", "FluxControlNetPipeline", nets, PROMPT, seeds=[3], control_image=[picture(0), picture(1)],
        control_mode=[1, None], controlnet_conditioning_scale=[0.7, 1.2], num_inference_steps=3, **call,
    )  # fmt: skip
    control = [{"image": picture(0), "mode": 1, "scale": 0.7}, {"image": picture(1), "scale": 1.2}]
    made = pipeline(source, session_cache, "flux", nets)(PROMPT, control=control, steps=3, seed=3, **call)
    agree(made, wanted)


@pytest.mark.parametrize("task", ["image-to-image", "inpainting"])
def test_flux_from_a_picture(source: Sources, session_cache: Cache, task: str) -> None:
    kinds = {"image-to-image": "FluxControlNetImg2ImgPipeline", "inpainting": "FluxControlNetInpaintPipeline"}
    masks = ({"mask_image": hole()}, {"mask": hole()}) if task == "inpainting" else ({}, {})
    call = {"image": picture(5), "strength": 0.7, "guidance_scale": 2.5}
    wanted = theirs(
        source, "flux", kinds[task], ["flux-union"], PROMPT, seeds=[3], control_image=picture(), control_mode=1,
        num_inference_steps=6, controlnet_conditioning_scale=0.8, control_guidance_end=0.7, **SIZE, **masks[0], **call,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "flux", ["flux-union"], task)
    control = [{"image": picture(), "mode": 1, "scale": 0.8, "end": 0.7}]
    given = {"prompt": PROMPT, "steps": 6, "seed": 3, **masks[1], **call}
    made = pipe(control=control, **given)
    agree(made, wanted)
    differs(pipe, made, given, control)


@pytest.mark.parametrize(("nets", "way"), [(["qwenimage"], "joint"), (["qwenimage*"], "split")])
def test_qwen_image(source: Sources, session_cache: Cache, nets: list[str], way: str) -> None:
    """Guided, where ControlNets see the prompt alone; one condition, and two for one ControlNet."""
    several = nets[0].endswith("*")
    images = [picture(0), picture(1)] if several else [picture(0)]
    how = {"controlnet_conditioning_scale": [0.7, 1.2], "control_guidance_end": [0.5, 1.0], "control_guidance_start": [0.0, 0.3]}  # fmt: skip
    call = {**SIZE, "true_cfg_scale": 2.0}
    wanted = theirs(
        source, "qwenimage", "QwenImageControlNetPipeline", nets, list(PROMPTS), seeds=[3, 4], negative_prompt=["blue", " "],
        control_image=images if several else images[0], num_inference_steps=4, **call, **(how if several else {}),
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "qwenimage", nets, Use("text-to-image", guidance=way))
    ranges = [{"scale": 0.7, "end": 0.5}, {"scale": 1.2, "start": 0.3}] if several else [{}]
    control = [{"image": image, **more} for image, more in zip(images, ranges, strict=True)]
    given = {"prompt": PROMPTS, "negative_prompt": ["blue", " "], "steps": 4, "seed": [3, 4], **call}
    made = pipe(control=control, **given)
    agree(made, wanted)
    differs(pipe, made, given, control)


def test_qwen_image_in_a_masked_part(source: Sources, session_cache: Cache, undrawn: None) -> None:
    wanted = theirs(
        source, "qwenimage", "QwenImageControlNetInpaintPipeline", ["qwenimage-inpainting"], PROMPT, seeds=[3],
        negative_prompt="blue", true_cfg_scale=2.0, control_image=picture(), control_mask=hole(), num_inference_steps=3,
        **SIZE,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "qwenimage", ["qwenimage-inpainting"])
    control = {"image": picture(), "mask": hole()}
    given = {"negative_prompt": "blue", "true_cfg_scale": 2.0, "steps": 3, "seed": 3, **SIZE}
    agree(pipe(PROMPT, control=control, **given), wanted)


def test_sana(source: Sources, session_cache: Cache) -> None:
    call = {**SIZE, "guidance_scale": 3.0, "max_sequence_length": 80}
    wanted = theirs(
        source, "sana", "SanaControlNetPipeline", ["sana"], PROMPTS, negative_prompt="Blue", seeds=[3, 4],
        control_image=picture(), num_inference_steps=3, controlnet_conditioning_scale=0.8, **call,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "sana", ["sana"])
    control = [{"image": picture(), "scale": 0.8}]
    given = {"prompt": PROMPTS, "negative_prompt": "Blue", "steps": 3, "seed": [3, 4], **call}
    made = pipe(control=control, **given)
    agree(made, wanted)
    differs(pipe, made, given, control)


@pytest.mark.parametrize(
    ("net", "guidance", "way"),
    [("zimage", 2.0, "joint"), ("zimage-refined", 2.0, "split"), ("zimage-shared", 0.0, "joint")],
)
def test_z_image(source: Sources, session_cache: Cache, net: str, guidance: float, way: str) -> None:
    """ControlNets that begin with the transformer's own weights; the scale of those that refine counts inside."""
    call = {**SIZE, "guidance_scale": guidance}
    wanted = theirs(
        source, "zimage", "ZImageControlNetPipeline", [net], list(PROMPTS), negative_prompt=["blue", ""], seeds=[3, 4],
        control_image=picture(), num_inference_steps=3, controlnet_conditioning_scale=0.7, **call,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "zimage", [net], Use("text-to-image", guidance=way))
    control = [{"image": picture(), "scale": 0.7}]
    given = {"prompt": PROMPTS, "steps": 3, "seed": [3, 4], **call}
    given |= {"negative_prompt": ["blue", ""]} if guidance else {}
    pipe(control=control, **{**given, "prompt": ["a cat in a hat on a mat, " * 12, PROMPT], "steps": 1})  # longer texts
    made = pipe(control=control, **given)
    agree(made, wanted)
    differs(pipe, made, given, control)


def test_z_image_in_a_masked_part(source: Sources, session_cache: Cache) -> None:
    """By a ControlNet that sees a picture around the mask, beside its condition."""
    call = {**SIZE, "guidance_scale": 2.0}
    wanted = theirs(
        source, "zimage", "ZImageControlNetInpaintPipeline", ["zimage-refined"], PROMPT, seeds=[3], negative_prompt="blue",
        control_image=picture(), image=picture(5), mask_image=hole(), num_inference_steps=3,
        controlnet_conditioning_scale=0.7, **call,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "zimage", ["zimage-refined"])
    control = {"image": picture(), "around": picture(5), "mask": hole(), "scale": 0.7}
    given = {"negative_prompt": "blue", "steps": 3, "seed": 3, **call}
    made = pipe(PROMPT, control=control, **given)
    agree(made, wanted)
    assert made.provenance["inputs"]["control"][0].keys() == {"image", "around", "mask", "scale"}
    with pytest.raises(InputError, match="one of them is missing"):
        pipe(PROMPT, control={"image": picture(), "mask": hole()}, **given)


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        ("text-to-image", "FluxControlPipeline"),
        ("image-to-image", "FluxControlImg2ImgPipeline"),
        ("inpainting", "FluxControlInpaintPipeline"),
    ],
)
def test_flux_that_sees_a_condition_itself(source: Sources, session_cache: Cache, task: str, kind: str) -> None:
    """FLUX.1 Canny and Depth, which take latents of it as further channels."""
    start = {} if task == "text-to-image" else {"image": picture(5), "strength": 0.7}
    masks = ({"mask_image": hole()}, {"mask": hole()}) if task == "inpainting" else ({}, {})
    call = {**start, "guidance_scale": 2.5}
    wanted = theirs(
        source, "canny", kind, [], PROMPT, seeds=[3], control_image=picture(), num_inference_steps=5, **SIZE, **masks[0],
        **call,
    )  # fmt: skip
    pipe = pipeline(source, session_cache, "canny", [], task)
    size = SIZE if task == "text-to-image" else {}
    given = {"steps": 5, "seed": 3, **masks[1], **call, **size}
    made = pipe(PROMPT, control=picture(), **given)
    agree(made, wanted)
    assert np.abs(pipe(PROMPT, control=picture(1), **given).latents - made.latents).max() > 1e-2
    with pytest.raises(InputError, match="0 given, and FLUX.1 of this kind sees one"):
        pipe(PROMPT, **given)
    with pytest.raises(InputError, match="sees the condition in each step"):
        pipe(PROMPT, control={"image": picture(), "scale": 0.5}, **given)


def test_other_changes_beside_it(source: Sources, session_cache: Cache) -> None:
    """Low memory gives the same, with previews; skipped layers another picture."""
    call = {**SIZE, "guidance_scale": 3.0, "steps": 4, "seed": 3}
    control = [{"image": picture(), "scale": 0.8}]
    plain = pipeline(source, session_cache, "sd3", ["sd3"])
    made = plain(PROMPT, control=control, **call)
    seen: list[Any] = []
    low = pipeline(source, session_cache, "sd3", ["sd3"], Use("text-to-image", low_memory=True))
    again = low(PROMPT, control=control, **call, progress=lambda moment: seen.append(moment.preview))
    np.testing.assert_allclose(again.latents, made.latents, atol=1e-4)
    assert {image.size for preview in seen if preview for image in preview()} == {(40, 24)}
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    assert np.abs(plain(PROMPT, control=control, **call, **skipped).latents - made.latents).max() > 1e-2


@pytest.mark.parametrize(
    ("family", "net", "depth"), [("sd3", "sd3", 2), ("flux", "flux", 1), ("flux", "flux", 4), ("sana", "sana", 1)]
)
def test_step_cache_cuts_behind_what_is_added(
    source: Sources, session_cache: Cache, family: str, net: str, depth: int
) -> None:
    """What the outer part makes with what the whole keeps is what the whole makes, with residuals on both sides."""
    import openvino as ov

    from ovforge_diffusion.shallow import CACHED

    options = {"transforms": [Use("step-cache", depth=depth)]}
    bundle = pipeline(source, session_cache, family, [net], **options).bundle
    whole, outer = (
        ov.Core().compile_model(bundle.models[role], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for role in ("transformer", "transformer_shallow")
    )
    random = np.random.default_rng(0)
    sizes = {"sd3": (2, 16, 8, 6), "sana": (2, 4, 8, 6), "flux": (2, 12, 64)}[family]
    tokens = {"sd3": 12, "sana": 48, "flux": 12}[family]
    inputs: dict[str, Any] = {}
    for port in whole.inputs:
        name = port.any_name
        rank = port.partial_shape
        shape = [2 if n == 0 else 7 if d.is_dynamic else d.get_length() for n, d in enumerate(rank)]
        if name == "hidden_states":
            shape = list(sizes)
        elif name.startswith("block_additional"):
            shape = [2, tokens, shape[2]]
        elif name in ("img_ids", "txt_ids"):
            shape = [{"img_ids": 12, "txt_ids": 7}[name], 3]
        values = random.standard_normal(shape)
        inputs[name] = np.zeros(shape, bool) if port.element_type == ov.Type.boolean else values.astype(np.float32)
    assert [name for name in inputs if name.startswith("block_additional")]
    results = whole(inputs)
    kept = next(port for port in whole.outputs if CACHED in port.names)
    known = {name: value for name, value in inputs.items() if any(name in port.names for port in outer.inputs)}
    again = outer({**known, CACHED: results[kept]})[0]
    np.testing.assert_allclose(again, results[whole.output(0)], atol=1e-4)
    added = [name for name in known if name.startswith("block_additional")]
    first = "block_additional_residual_1" if family == "sana" else "block_additional_residual_0"
    assert (first in added) == (family != "sana")


@pytest.mark.parametrize(
    ("family", "more"),
    [("flux", {"true_cfg_scale": 2.0, "negative_prompt": "blue"}), ("sd3", {"guidance_stop": 0.6}), ("qwenimage", {})],
)
def test_steps_are_kept_with_a_condition(
    source: Sources, session_cache: Cache, family: str, more: dict[str, Any]
) -> None:
    """With the whole in each step, all is as without; with fewer, each picture of a batch is what it is alone."""
    call = {"steps": 5, "control": {"image": picture(2)}, **SIZE, **more}
    made = pipeline(source, session_cache, family, [family])(PROMPTS, seed=[1, 2], **call)
    whole = pipeline(source, session_cache, family, [family], transforms=[Use("step-cache", interval=1)])
    np.testing.assert_allclose(whole(PROMPTS, seed=[1, 2], **call).latents, made.latents, atol=1e-5)
    rules: list[dict[str, Any]] = [{"interval": 3, "order": 1}, {"threshold": 0.3}]
    for options in rules:
        pipe = pipeline(source, session_cache, family, [family], transforms=[Use("step-cache", **options)])
        both = pipe(PROMPTS, seed=[1, 2], **call)
        for number, prompt in enumerate(PROMPTS):
            alone = pipe(prompt, seed=number + 1, **call)
            np.testing.assert_allclose(both.latents[[number]], alone.latents, atol=1e-4)
        assert len(both.timings.spans["denoise.transformer_shallow"]) >= 3
        assert np.abs(both.latents - made.latents).mean() < 0.5 * np.abs(made.latents).mean()


@pytest.mark.parametrize(
    ("family", "net", "control", "error", "message"),
    [
        ("sd3", "flux", {}, ModelError, "it is a FluxControlNetModel, made for a FluxTransformer2DModel"),
        ("canny", "flux", {}, ModelError, "not with Fill, Kontext, Canny or Depth"),
        ("flux", "flux-union", {}, InputError, "for 3 kinds of conditions, and nothing says which"),
        ("flux", "flux-union", {"mode": 3}, InputError, "it has no 3"),
        ("flux", "flux", {"mode": 0}, InputError, "takes no mode"),
        ("flux", "flux", {"mask": hole()}, InputError, "takes no mask"),
        ("flux", "flux", {"around": hole()}, InputError, "takes no picture beside its condition"),
        ("flux", "flux", None, InputError, "0 given for 1 ControlNets"),
    ],
)
def test_what_does_not_fit_is_said(
    source: Sources, session_cache: Cache, family: str, net: str, control: Any, error: Any, message: str
) -> None:
    given = {} if control is None else {"control": {"image": picture(), **control}}
    with pytest.raises(OvforgeError, match=message) as raised:
        pipeline(source, session_cache, family, [net])(PROMPT, steps=1, **SIZE, **given)
    assert isinstance(raised.value, error)


def test_a_family_without_controlnets_says_so(source: Sources, session_cache: Cache, tmp_path: Path) -> None:
    folder = maker("test_lumina2").make_lumina2_pipeline(tmp_path / "lumina2")
    load = {"weights": "f32", "parts": {"controlnet": str(source("net-flux"))}}
    with pytest.raises(ModelError, match="no ControlNet goes with a Lumina2Transformer2DModel"):
        ovforge.Pipeline("text-to-image", source=folder, load=load, cache=session_cache)(PROMPT, steps=1)


def test_an_adapter_and_eight_bits_beside_it(source: Sources, session_cache: Cache, tmp_path: Path) -> None:
    """An adapter of the transformer, fused and switched while running, as in diffusers; the ControlNet in eight bits."""
    peft = pytest.importorskip("peft")
    net = diffusers.FluxControlNetModel.from_pretrained(source("net-flux"))
    pipe = diffusers.FluxControlNetPipeline.from_pretrained(source("flux"), controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0", "to_add_out"]))
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers, weight_name="adapter.safetensors")
    call: dict[str, Any] = {"guidance_scale": 2.5, **SIZE}
    wanted = pipe(PROMPT, control_image=picture(), num_inference_steps=3, generator=seeded([3]), **call).images
    given = {"prompt": PROMPT, "control": picture(), "steps": 3, "seed": 3, **call}
    for mode in ("fuse", "runtime"):
        adapter = Use("lora", path=str(tmp_path / "adapter.safetensors"), mode=mode)
        made = pipeline(source, session_cache, "flux", ["flux"], transforms=[adapter])(**given)
        agree(made, wanted)
    plain = pipeline(source, session_cache, "flux", ["flux"])(**given)
    assert np.abs(plain.latents - made.latents).max() > 1e-2
    light = pipeline(source, session_cache, "flux", ["flux"], quantize=[Use("weights-int8", roles=["controlnet"])])
    assert any("controlnet" in line for report in light.reports for line in report.applied if "int8" in line.lower())
    assert 0 < np.abs(light(**given).latents - plain.latents).max() < 0.5


@pytest.mark.parametrize(
    ("family", "net", "conditions", "wanted"),
    [
        ("flux", "net-flux-union", ["{0},mode=2,scale=0.7,end=0.5", "{1}, mode=0,start=0.3"],
         [{"mode": 2, "scale": 0.7, "end": 0.5}, {"mode": 0, "start": 0.3}]),
        ("zimage", "net-zimage-refined", ["{0},mask={mask},around={1},scale=0.7"], [{"scale": 0.7}]),
        ("canny", None, ["{0}"], [{}]),
    ],
)  # fmt: skip
def test_generate_gives_conditions_as_python_does(
    source: Sources, session_cache: Cache, tmp_path: Path, family: str, net: str | None, conditions: list[str],
    wanted: list[dict[str, Any]],
) -> None:  # fmt: skip
    """A union of kinds, a mask and a picture around it; and a model that takes a condition without a ControlNet."""
    files = [tmp_path / "edges, bold.png", tmp_path / "other.png"]
    for number, file in enumerate(files):
        picture(number).save(file)
    hole().save(tmp_path / "mask.png")
    written = [text.format(*files, mask=tmp_path / "mask.png") for text in conditions]
    options = [part for text in written for part in ("--control", text)]
    if net:
        options[:2] = ["--controlnet", f"{source(net)}={written[0]}"]
    for number, more in enumerate(wanted):
        more["image"] = picture(number)
    if family == "zimage":
        wanted[0] |= {"around": picture(1), "mask": hole()}
    command = [
        "generate", "-m", str(source(family)), "-p", PROMPT, "-s", "3", "--steps", "3", "-t", "FP32", "--precision", "f32",
        "--width", "40", "--height", "24", "-o", str(tmp_path / "made.png"), "-c", str(session_cache.root), "-q", *options,
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    pipe = pipeline(source, session_cache, family, [net.removeprefix("net-")] if net else [])
    made = pipe(PROMPT, control=wanted, steps=3, seed=3, **SIZE).images[0]
    assert np.abs(np.asarray(made, int) - np.asarray(Image.open(tmp_path / "made.png"), int)).max() <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--controlnet", "net"], "'net' is not FOLDER=PICTURE"),
        (["--controlnet", "net=,mode=1"], "names no picture"),
        (["--controlnet", "net=a.png,mod=1"], "'mod' is unknown in 'a.png,mod=1'"),
        (["--controlnet", "net=a.png,mode="], "'mode' is empty"),
        (["--controlnet", "net=a.png,mode=1,mode=2"], "'mode' is given twice"),
        (["--controlnet", "net=a.png"] * 5, "5 ControlNets, and a pipeline takes 4"),
        (["--control", ",mode=1"], "names no picture"),
        (["--control", "a.png,mode=one"], "`control.0.mode` should be a whole number, not 'one'"),
        (["--canny"], "there is no condition"),
    ],
)
def test_generate_says_what_it_cannot_read(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["generate", "-m", "package:ovforge_lcm/model", "-p", PROMPT, *options])
    assert isinstance(done.exception, OvforgeError)
    assert message in str(done.exception)
