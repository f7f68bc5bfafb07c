"""ControlNets, one and several, against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from PIL import Image

import ovforge
from families import agree, original
from ovforge import Use, testing
from ovforge.errors import InputError, ModelError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.store.cache import Cache

PROMPT = "a beautiful pink unicorn, 8k"
CALL: dict[str, Any] = {"guidance_scale": 2.0, "seed": 7}
ROLES = ("controlnet", "controlnet_1")

Folder = Callable[[str], Path]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def net(folder: Path, number: int) -> Path:
    """Return a ControlNet for a pipeline's UNet, whose conditions are halved once, as its small autoencoder does."""
    target = folder.parent / f"{folder.name}-small-net{number}"
    if not target.exists():
        diffusers, torch = pytest.importorskip("diffusers"), pytest.importorskip("torch")
        torch.manual_seed(number)
        made = diffusers.ControlNetModel.from_unet(
            diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
            conditioning_embedding_out_channels=(8, 16), load_weights_from_unet=False,
        )  # fmt: skip
        with torch.no_grad():  # a fresh ControlNet adds nothing: its last convolutions are zero
            for parameter in made.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.05)
        made.save_pretrained(target)
    return target


def pipeline(task: str, folder: Path, cache: Cache, *numbers: int, use: Any = None, **options: Any) -> Any:
    parts = {role: str(net(folder, number)) for role, number in zip(ROLES, numbers, strict=False)}
    return ovforge.Pipeline(
        Use(task, **(use or {})), source=folder, load={"weights": "f32", "parts": parts}, device=Use("cpu", precision="f32"),
        cache=cache, scheduler=Use("diffusers", class_name="DDIMScheduler"), **options,
    )  # fmt: skip


def reference(name: str, folder: Path, *numbers: int) -> Any:
    diffusers = pytest.importorskip("diffusers")
    nets = [diffusers.ControlNetModel.from_pretrained(net(folder, number)) for number in numbers]
    pipe = original(name, folder, controlnet=nets if len(nets) > 1 else nets[0])
    pipe.safety_checker = None
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def generator(seed: int = 7) -> Any:
    return pytest.importorskip("torch").Generator().manual_seed(seed)


@pytest.fixture
def folder(torch_family: Folder) -> Path:
    return torch_family("controlnet")


@pytest.mark.parametrize(
    ("control", "guidance", "way"),
    [
        ({}, 2.0, "joint"),
        ({"scale": 0.6}, 1.0, "joint"),
        ({"scale": 1.5, "start": 0.3, "end": 0.8}, 2.0, "split"),
    ],
)
def test_one(folder: Path, session_cache: Cache, control: dict[str, Any], guidance: float, way: str) -> None:
    image = picture(24, 32)
    wanted = reference("StableDiffusionControlNetPipeline", folder, 0)(
        PROMPT, image=image, num_inference_steps=5, guidance_scale=guidance, generator=generator(), width=24, height=32,
        controlnet_conditioning_scale=control.get("scale", 1.0), control_guidance_start=control.get("start", 0.0),
        control_guidance_end=control.get("end", 1.0),
    ).images  # fmt: skip
    pipe = pipeline("text-to-image", folder, session_cache, 0, use={"guidance": way})
    given = {"width": 24, "height": 32, "steps": 5, "seed": 7, "guidance_scale": guidance}
    ours = pipe(PROMPT, control={"image": image, **control}, **given)
    agree(ours, wanted)
    other = pipe(PROMPT, control={"image": image, "scale": 0.0}, **given)
    assert np.abs(other.latents - ours.latents).max() > 1e-2


def test_several_each_with_its_own_part(folder: Path, session_cache: Cache) -> None:
    """Also for a batch, where each picture gets the same conditions."""
    images = [picture(24, 32), picture(24, 32, 1)]
    wanted = reference("StableDiffusionControlNetPipeline", folder, 0, 1)(
        [PROMPT, "the blue cat"], image=images, num_inference_steps=5, guidance_scale=2.0, width=24, height=32,
        generator=[generator(7), generator(8)], controlnet_conditioning_scale=[0.7, 1.3],
        control_guidance_start=[0.0, 0.4], control_guidance_end=[0.5, 1.0],
    ).images  # fmt: skip
    pipe = pipeline("text-to-image", folder, session_cache, 0, 1)
    ours = pipe(
        [PROMPT, "the blue cat"], width=24, height=32, steps=5, guidance_scale=2.0, seed=[7, 8],
        control=[{"image": images[0], "scale": 0.7, "end": 0.5}, {"image": images[1], "scale": 1.3, "start": 0.4}],
    )  # fmt: skip
    agree(ours, wanted)


def test_edges(torch_sd: Path, session_cache: Cache) -> None:
    cv2 = pytest.importorskip("cv2")
    image = picture(24, 32)
    edges = Image.fromarray(np.repeat(cv2.Canny(np.asarray(image), 20, 60)[:, :, None], 3, axis=2))
    assert 0 < np.asarray(edges).mean() < 255
    wanted = reference("StableDiffusionControlNetPipeline", torch_sd, 0)(
        PROMPT, image=edges, num_inference_steps=3, guidance_scale=2.0, generator=generator(), width=24, height=32
    ).images
    pipe = pipeline("text-to-image", torch_sd, session_cache, 0)
    control = {"image": image, "preprocess": "canny", "low": 20, "high": 60}
    agree(pipe(PROMPT, control=control, width=24, height=32, steps=3, **CALL), wanted)


def test_from_a_picture(folder: Path, session_cache: Cache) -> None:
    start, image = picture(32, 24, 5), picture(32, 24)
    wanted = reference("StableDiffusionControlNetImg2ImgPipeline", folder, 0)(
        PROMPT, image=start, control_image=image, strength=0.7, num_inference_steps=6, guidance_scale=2.0,
        controlnet_conditioning_scale=0.8, control_guidance_end=0.7, generator=generator(),
    ).images  # fmt: skip
    pipe = pipeline("image-to-image", folder, session_cache, 0)
    control = {"image": image, "scale": 0.8, "end": 0.7}
    agree(pipe(PROMPT, image=start, control=control, strength=0.7, steps=6, **CALL), wanted)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(folder: Path, torch_family: Folder, session_cache: Cache, channels: int, tmp_path: Path) -> None:
    """Also with a UNet that takes the mask, which a ControlNet does not see."""
    if channels == 9:
        fitting = net(folder, 0)
        folder = shutil.copytree(torch_family("inpaint"), tmp_path / "pipeline")
        shutil.copytree(fitting, tmp_path / "pipeline-small-net0")
    start, image = picture(32, 24, 5), picture(32, 24)
    mask = np.zeros((24, 32), np.uint8)
    mask[6:12, 8:24] = 255
    hole = Image.fromarray(mask)
    for strength in (0.6, 1.0):
        wanted = reference("StableDiffusionControlNetInpaintPipeline", folder, 0)(
            PROMPT, image=start, mask_image=hole, control_image=image, strength=strength, num_inference_steps=5,
            guidance_scale=2.0, width=32, height=24, generator=generator(), controlnet_conditioning_scale=0.8,
        ).images  # fmt: skip
        pipe = pipeline("inpainting", folder, session_cache, 0)
        ours = pipe(
            PROMPT, image=start, mask=hole, control={"image": image, "scale": 0.8}, strength=strength, steps=5, **CALL
        )
        agree(ours, wanted)


def test_xl(torch_family: Folder, session_cache: Cache) -> None:
    folder = torch_family("xl")
    image = picture(32, 24)
    wanted = reference("StableDiffusionXLControlNetPipeline", folder, 0)(
        PROMPT, image=image, num_inference_steps=3, guidance_scale=2.0, generator=generator(), width=32, height=24,
        controlnet_conditioning_scale=0.8,
    ).images  # fmt: skip
    pipe = pipeline("text-to-image", folder, session_cache, 0)
    ours = pipe(PROMPT, control={"image": image, "scale": 0.8}, width=32, height=24, steps=3, **CALL)
    agree(ours, wanted)


def test_shapes_are_fixed_where_the_size_is_known(folder: Path, session_cache: Cache) -> None:
    """A size that the config names compiles for it; another size is any. Both give what the other gives."""
    given = {"width": 40, "height": 24, "guidance_scale": 2.0}  # latents of 20 x 12: halved to 10, 5, 3 and 6, 3, 2
    fixed = pipeline("text-to-image", folder, session_cache, 0, input=given)
    wanted = dict(fixed.compiled.wanted)
    assert wanted["unet"]["down_block_additional_residual_11"] == (2, 32, 2, 3)
    assert wanted["controlnet"]["controlnet_cond"] == (2, 3, 24, 40)
    open_ = pipeline("text-to-image", folder, session_cache, 0, use={"static": False})
    assert dict(open_.compiled.wanted)["unet"] is None
    call = {**given, "control": picture(40, 24), "steps": 2, "seed": 1}
    np.testing.assert_allclose(fixed("a cat", **call).latents, open_("a cat", **call).latents, atol=1e-4)
    call |= {"width": 24, "control": picture(24, 24)}
    np.testing.assert_allclose(fixed("a cat", **call).latents, open_("a cat", **call).latents, atol=1e-4)
    low = pipeline("text-to-image", folder, session_cache, 0, use={"low_memory": True})
    np.testing.assert_allclose(low("a cat", **call).latents, open_("a cat", **call).latents, atol=1e-4)
    stages = ovforge.plan(fixed.config, cache=session_cache).stages
    assert {"controlnet-inputs", "fold-upsample"} <= {stage.use for stage in stages if stage.state == "cached"}
    assert "compile controlnet" in {stage.stage for stage in stages}


def test_a_consistency_model(torch_lcm: Path, session_cache: Cache) -> None:
    """Its batch is one picture, and the guidance an input that the ControlNet has not."""
    image = picture(24, 16)
    wanted = reference("StableDiffusionControlNetPipeline", torch_lcm, 0)(
        PROMPT, image=image, num_inference_steps=3, guidance_scale=2.0, generator=generator(), width=24, height=16
    ).images
    given = {"width": 24, "height": 16, "guidance_scale": 2.0}
    pipe = pipeline("text-to-image", torch_lcm, session_cache, 0, input=given)
    agree(pipe(PROMPT, control=image, steps=3, seed=7, **given), wanted)
    assert dict(pipe.compiled.wanted)["controlnet"]["sample"] == (1, 4, 8, 12)


def test_timesteps_of_other_types(torch_sd: Path, session_cache: Cache) -> None:
    """Of the models as they are stored, the UNet takes float32, and the ControlNet int64, and no fractions."""
    call = {"control": picture(16, 16), "width": 16, "height": 16, "steps": 3, **CALL}
    parts = {"controlnet": str(net(torch_sd, 0))}

    def mixed(scheduler: Use, **options: Any) -> Any:
        return ovforge.Pipeline(
            "text-to-image", source=torch_sd, load={"weights": "f32", "timestep": "f32", "parts": parts},
            device=Use("cpu", precision="f32"), cache=session_cache, scheduler=scheduler, **options,
        )  # fmt: skip

    raw: dict[str, Any] = {"optimize": False, "transforms": ["controlnet-inputs"]}
    stored = mixed(Use("diffusers", class_name="DDIMScheduler"), **raw)
    plain = pipeline("text-to-image", torch_sd, session_cache, 0)
    np.testing.assert_allclose(stored("a cat", **call).latents, plain("a cat", **call).latents, atol=1e-4)
    linear = Use("diffusers", class_name="EulerDiscreteScheduler", options={"timestep_spacing": "linspace"})
    with pytest.raises(InputError, match="the controlnet takes i64"):
        mixed(linear, **raw)("a cat", **call)
    wanted = reference("StableDiffusionControlNetPipeline", torch_sd, 0)
    diffusers = pytest.importorskip("diffusers")
    wanted.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        wanted.scheduler.config, timestep_spacing="linspace"
    )
    theirs = wanted("a cat", image=call["control"], num_inference_steps=3, guidance_scale=2.0, width=16, height=16,
                    generator=generator()).images  # fmt: skip
    assert (np.asarray(wanted.scheduler.timesteps) % 1).any()
    agree(mixed(linear)("a cat", **call), theirs)


def test_without_the_inputs_it_is_said(torch_sd: Path, session_cache: Cache) -> None:
    pipe = pipeline("text-to-image", torch_sd, session_cache, 0, optimize=False)
    with pytest.raises(ModelError, match="takes no residuals") as raised:
        pipe("a cat", control=picture(16, 16), width=16, height=16, steps=1)
    assert "controlnet-inputs" in str(raised.value)
    asked = pipeline("text-to-image", torch_sd, session_cache, 0, optimize=False, transforms=["controlnet-inputs"])
    assert asked("a cat", control=picture(16, 16), width=16, height=16, steps=1).images


def test_a_pipeline_without_one_has_nothing_to_do(torch_family: Folder, session_cache: Cache) -> None:
    pipe = pipeline("text-to-image", torch_family("sd1"), session_cache)
    assert ["nothing to do: no ControlNet"] in [report.notes for report in pipe.reports]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_attention_dim": 40}, "encoder_hidden_states"),
        ({"layers_per_block": 2}, "it gives 7 residuals, and the UNet takes 5"),
        ({"block_out_channels": (16, 64)}, "down_block_additional_residual_3 is f32"),
        ("vae", "it has no input"),
    ],
)
def test_a_controlnet_of_another_family(
    torch_sd: Path, session_cache: Cache, tmp_path: Path, change: Any, message: str
) -> None:
    diffusers = pytest.importorskip("diffusers")
    other = tmp_path / "net"
    if change == "vae":
        pipe = pipeline("text-to-image", torch_sd, session_cache)
        bundle = ModelBundle()
        bundle.models["controlnet"] = pipe.bundle.models["vae_decoder"].clone()
        bundle.configs["controlnet"] = {"_class_name": "ControlNetModel"}
        bundle.save(other)
    else:
        config = json.loads((net(torch_sd, 0) / "config.json").read_text())
        diffusers.ControlNetModel.from_config({**config, **change}).save_pretrained(other)
    pipe = ovforge.Pipeline(
        "text-to-image", source=torch_sd, load={"weights": "f32", "parts": {"controlnet": str(other)}},
        device=Use("cpu", precision="f32"), cache=session_cache,
        scheduler=Use("diffusers", class_name="DDIMScheduler"),
    )  # fmt: skip
    with pytest.raises(OvforgeError) as raised:
        pipe("a cat", control=picture(16, 16), width=16, height=16, steps=1)
    assert message in str(raised.value)
    assert "UNet's own architecture" in str(raised.value)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        (None, "0 given for 1 ControlNets"),
        ([picture(8, 8)] * 2, "2 given for 1 ControlNets"),
        ({"image": picture(8, 8), "start": 0.5, "end": 0.5}, "not before end"),
        ({"image": "nowhere.png"}, "nowhere.png"),
    ],
)
def test_bad_conditions_are_said(torch_sd: Path, session_cache: Cache, control: Any, message: str) -> None:
    with pytest.raises(OvforgeError, match=message):
        pipeline("text-to-image", torch_sd, session_cache, 0)("a cat", control=control, width=16, height=16, steps=1)


def test_the_contract_of_the_transform_is_kept(torch_sd: Path, session_cache: Cache) -> None:
    import ovforge_diffusion

    plain = pipeline("text-to-image", torch_sd, session_cache).bundle.models["unet"]

    def bundle() -> ModelBundle:
        made = ModelBundle()
        made.models["unet"], made.models["controlnet"] = plain.clone(), testing.small_model()
        return made

    report = testing.check_transform(ovforge_diffusion, "controlnet-inputs", {}, bundle)
    assert report.applied == ["unet: 5 inputs for a ControlNet's residuals"]


def test_another_structure_is_refused() -> None:
    from ovforge_diffusion.graph.controlnet_inputs import ControlNetInputs

    bundle = ModelBundle()
    bundle.models["unet"], bundle.models["controlnet"] = testing.small_model(), testing.small_model()
    with pytest.raises(ModelError, match="skip connections"):
        ControlNetInputs().apply(bundle)
    assert isinstance(bundle.models["unet"], ov.Model)
