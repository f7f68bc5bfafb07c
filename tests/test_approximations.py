"""Step caching and the interval of guidance against the same done to diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

import ovforge
import ovforge_diffusion
from families import agree
from ovforge import Use, testing
from ovforge.errors import InputError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.store.cache import Cache
from test_controlnet import net, picture

F32 = Use("cpu", precision="f32")
PROMPTS = ["a beautiful pink unicorn, 8k", "the blue cat!!"]
CALL: dict[str, Any] = {"steps": 7, "guidance_scale": 2.0, "width": 32, "height": 24}

Folder = Callable[[str], Path]


def pipeline(source: Path, cache: Cache, **options: Any) -> Any:
    load = {"weights": "f32", **options.pop("load", {})}
    return ovforge.Pipeline(
        options.pop("task", "text-to-image"), source=source, load=load, device=F32, cache=cache,
        scheduler=Use("diffusers", class_name="DDIMScheduler"), **options,
    )  # fmt: skip


def reference(name: str, source: Path, **parts: Any) -> Any:
    diffusers = pytest.importorskip("diffusers")
    pipe = getattr(diffusers, name).from_pretrained(source, **parts)
    pipe.safety_checker = None
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers: int) -> list[Any]:
    torch = pytest.importorskip("torch")
    return [torch.Generator().manual_seed(number) for number in numbers]


def cached(unet: Any, interval: int, depth: int) -> Any:
    """Give a diffusers UNet's last `depth` layers, in all but every `interval`-th call, what came from below then."""
    torch = pytest.importorskip("torch")
    layer = unet.up_blocks[-1].resnets[-depth]
    state = {"calls": 0, "below": None}

    def before(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        joined, *rest = inputs
        below = joined.shape[1] - unet.config.block_out_channels[0]
        if state["calls"] % interval == 0:
            state["below"] = joined[:, :below].clone()
        state["calls"] += 1
        return (torch.cat([state["below"], joined[:, below:]], dim=1), *rest)

    state["hook"] = layer.register_forward_pre_hook(before)
    return state


@pytest.fixture(scope="module")
def plain(torch_family: Folder) -> Any:
    return reference("StableDiffusionPipeline", torch_family("sd1"))


@pytest.mark.parametrize(("interval", "depth", "options"), [(3, 1, {}), (2, 3, {"guidance": "split"})])
def test_cached_steps_are_deepcache(
    torch_family: Folder, session_cache: Cache, plain: Any, interval: int, depth: int, options: dict[str, Any]
) -> None:
    state = cached(plain.unet, interval, depth)
    try:
        theirs = plain(
            PROMPTS, num_inference_steps=7, guidance_scale=2.0, width=32, height=24, generator=seeds(7, 8)
        ).images
    finally:
        state["hook"].remove()
    step_cache = Use("step-cache", interval=interval, depth=depth)
    pipe = pipeline(
        torch_family("sd1"), session_cache, task=Use("text-to-image", **options), transforms=[step_cache],
        input={"prompt": PROMPTS, **CALL},
    )  # fmt: skip
    first = pipe(seed=[7, 8])
    agree(first, theirs)
    assert pipe(seed=[3, 4]).images[0].tobytes() != first.images[0].tobytes()
    again = pipe(seed=[7, 8])
    assert [one.tobytes() for one in again.images] == [one.tobytes() for one in first.images], "each run begins anew"
    whole, outer = (len(first.timings.spans[f"denoise.{role}"]) for role in ("unet", "unet_shallow"))
    calls = 2 if options else 1
    assert (whole, outer) == (calls * -(-7 // interval), calls * (7 - -(-7 // interval)))
    assert "step-cache" in str(first.provenance["config"])
    assert any("whole every" in line for report in pipe.reports for line in report.applied)


def test_cached_steps_with_a_controlnet_and_another_size(torch_family: Folder, session_cache: Cache) -> None:
    folder = torch_family("controlnet")
    diffusers = pytest.importorskip("diffusers")
    theirs = reference(
        "StableDiffusionControlNetPipeline",
        folder,
        controlnet=diffusers.ControlNetModel.from_pretrained(net(folder, 1)),
    )
    cached(theirs.unet, 2, 1)
    image = picture(32, 24)
    wanted = theirs(
        PROMPTS[0], image=image, num_inference_steps=4, guidance_scale=2.0, width=32, height=24, generator=seeds(7)
    ).images
    pipe = pipeline(
        folder, session_cache, transforms=[Use("step-cache", interval=2)],
        load={"parts": {"controlnet": str(net(folder, 1))}},
    )  # fmt: skip
    agree(pipe(PROMPTS[0], control={"image": image}, seed=7, **{**CALL, "steps": 4}), wanted)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.3, 0.8)])
def test_the_interval_of_guidance_is_that_of_diffusers(
    torch_family: Folder, session_cache: Cache, plain: Any, start: float, stop: float
) -> None:
    torch = pytest.importorskip("torch")
    guiders = pytest.importorskip("diffusers.guiders")
    guider = guiders.ClassifierFreeGuidance(guidance_scale=2.0, start=start, stop=stop)
    scheduler, unet, steps = plain.scheduler, plain.unet, 7
    with torch.no_grad():
        text, blank = plain.encode_prompt(PROMPTS[0], "cpu", 1, True)
        latents = plain.prepare_latents(1, 4, 24, 32, torch.float32, torch.device("cpu"), seeds(7)[0])
        scheduler.set_timesteps(steps)
        for number, timestep in enumerate(scheduler.timesteps):
            guider.set_state(number, steps, timestep)
            seen = scheduler.scale_model_input(latents, timestep)
            along, without = (unet(seen, timestep, states).sample for states in (text, blank))
            latents = scheduler.step(guider.forward(along, without).pred, timestep, latents).prev_sample
    pipe = pipeline(
        torch_family("sd1"), session_cache,
        input={"prompt": PROMPTS[0], **CALL, "guidance_start": start, "guidance_stop": stop},
    )  # fmt: skip
    result = pipe(seed=7, decode=False)
    np.testing.assert_allclose(result.latents, latents.numpy(), atol=2e-4)
    inside = sum(int(start * steps) <= number < int(stop * steps) for number in range(steps))
    assert len(result.timings.spans["denoise.unet"]) == steps + inside, "half the work outside"
    assert result.provenance["inputs"]["guidance_stop"] == stop


def test_both_together_never_use_features_of_another_half_or_run(torch_family: Folder, session_cache: Cache) -> None:
    """A half that joins in the middle runs whole first, whatever the others do."""
    pipe = pipeline(torch_family("sd1"), session_cache, transforms=[Use("step-cache", interval=4)])
    call = {**CALL, "guidance_start": 0.3, "seed": 7}
    first = pipe(PROMPTS[0], **call)
    assert len(first.timings.spans["denoise.unet"]) == 2 + 2, "steps 0 and 4 with the prompt, 2 and 6 without"
    pipe(PROMPTS[1], **CALL, seed=1)
    assert pipe(PROMPTS[0], **call).images[0].tobytes() == first.images[0].tobytes()


def test_intervals_without_effect_are_refused(torch_family: Folder, session_cache: Cache) -> None:
    pipe = pipeline(torch_family("sd1"), session_cache)
    for change, said in (
        ({"guidance_stop": 0.5, "guidance_scale": 1.0}, "no effect"),
        ({"guidance_start": 0.5, "guidance_stop": 0.4}, "before it begins"),
    ):
        with pytest.raises(InputError, match=said):
            pipe(PROMPTS[0], **{**CALL, **change})
    weighted = pipeline(torch_family("sd1"), session_cache, task=Use("text-to-image", prompts="weighted"))
    with pytest.raises(InputError, match="AND"):
        weighted("a cat AND a dog", **CALL, guidance_stop=0.5)


def test_what_cannot_be_cut_is_told(torch_family: Folder, session_cache: Cache) -> None:
    with pytest.raises(ModelError, match="outermost level has 3 layers"):
        pipeline(torch_family("sd1"), session_cache, transforms=[Use("step-cache", depth=4)])
    transform = testing.extension(ovforge_diffusion, "transform", "step-cache")
    step = transform.create(transform.options_model()())
    assert "no UNet" in step.apply(ModelBundle()).skipped[0].reason
    other = testing.small_bundle()
    other.models["unet"] = other.models["model"]
    assert "skip connections" in step.apply(other).skipped[0].reason


def test_both_graphs_share_their_weights(torch_family: Folder, session_cache: Cache) -> None:
    bundle = ovforge.open_model(torch_family("sd1"), options={"weights": "f32"}, cache=session_cache)
    transform = testing.extension(ovforge_diffusion, "transform", "step-cache")
    transform.create(transform.options_model()()).apply(bundle)

    def constants(model: ov.Model) -> dict[str, int]:
        return {
            op.get_friendly_name(): op.data.__array_interface__["data"][0]
            for op in model.get_ops()
            if op.get_type_name() == "Constant" and op.data.size > 16
        }

    whole, outer = constants(bundle.models["unet"]), constants(bundle.models["unet_shallow"])
    assert 0 < len(outer) < len(whole) / 4
    assert all(whole[name] == place for name, place in outer.items()), "the same memory"
