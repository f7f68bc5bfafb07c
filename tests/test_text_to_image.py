"""Whole pipelines: the plugins together, against diffusers on torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino import opset13 as ops

import ovforge
from families import agree, said_of_call
from ovforge import Use
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.store.cache import Cache

F32 = Use("cpu", precision="f32")
FULL = {"weights": "f32"}


def pipeline(source: Path, cache: Cache, **options: Any) -> ovforge.Pipeline:
    return ovforge.Pipeline("text-to-image", source=source, load=FULL, device=F32, cache=cache, **options)


@pytest.fixture
def lcm(torch_lcm: Path, session_cache: Cache) -> ovforge.Pipeline:
    return pipeline(torch_lcm, session_cache)


@pytest.fixture
def sd(torch_sd: Path, session_cache: Cache) -> ovforge.Pipeline:
    return pipeline(torch_sd, session_cache, scheduler=Use("diffusers", class_name="DDIMScheduler"))


@pytest.mark.parametrize(("width", "height", "steps"), [(16, 16, 4), (24, 40, 3), (32, 16, 1)])
def test_lcm_pictures_equal_diffusers(
    torch_lcm: Path, lcm: ovforge.Pipeline, width: int, height: int, steps: int
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.LatentConsistencyModelPipeline.from_pretrained(torch_lcm, requires_safety_checker=False)
    reference.set_progress_bar_config(disable=True)
    seeds = [1234567, 3]
    options: dict[str, Any] = {"width": width, "height": height}
    theirs = reference(
        ["a beautiful pink unicorn, 8k", "the blue cat!!"],
        num_inference_steps=steps,
        guidance_scale=5.5,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **options,
    ).images
    ours = lcm(
        ["a beautiful pink unicorn, 8k", "the blue cat!!"], steps=steps, guidance_scale=5.5, seed=seeds, **options
    )
    agree(ours, theirs)


def test_guided_pictures_with_a_negative_prompt_equal_diffusers(torch_sd: Path, sd: ovforge.Pipeline) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.StableDiffusionPipeline.from_pretrained(torch_sd, requires_safety_checker=False)
    reference.scheduler = diffusers.DDIMScheduler.from_config(reference.scheduler.config)
    reference.set_progress_bar_config(disable=True)
    theirs = reference(
        "a photo of the cat",
        negative_prompt="blue background",
        num_inference_steps=5,
        guidance_scale=2.0,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in (10, 11)],
    ).images
    ours = sd("a photo of the cat", negative_prompt="blue background", steps=5, guidance_scale=2.0, count=2, seed=10)
    # Guidance multiplies the runtime's own 1e-4, and random weights do not forgive it as trained ones do.
    agree(ours, theirs, anywhere=3, average=0.5)
    assert ours.seeds == (10, 11)
    alone = sd("a photo of the cat", negative_prompt="blue background", steps=5, guidance_scale=2.0, seed=11)
    agree(alone, theirs[1:], anywhere=3, average=0.5)


def test_a_call_changes_size_and_comes_back(lcm: ovforge.Pipeline) -> None:
    first = np.asarray(lcm("a cat", seed=5).images[0])
    lcm("a cat", seed=5, width=32, height=24, count=2)
    np.testing.assert_array_equal(np.asarray(lcm("a cat", seed=5).images[0]), first)


def test_timings_and_provenance_say_what_ran(lcm: ovforge.Pipeline) -> None:
    result = lcm("a cat", steps=3)
    spans = result.timings.spans
    assert len(spans["denoise.unet"]) == len(spans["denoise.scheduler"]) == 3
    assert sum(spans["denoise.unet"]) + sum(spans["denoise.scheduler"]) <= spans["denoise"][0]
    assert {"text_encoder", "denoise", "vae_decoder"} <= set(spans) and spans["denoise"][0] < result.timings.elapsed
    assert not {"load", "compile"} & set(spans), "of the call alone: results add up"
    assert {"load", "compile", "compile.unet"} <= set(lcm.start_timings().spans)
    assert result.provenance["precision"] == {"text_encoder": "f32", "unet": "f32", "vae_decoder": "f32"}
    assert result.provenance["inputs"]["seed"] == result.seeds[0]
    again = lcm(**result.provenance["inputs"])
    np.testing.assert_array_equal(np.asarray(again.images[0]), np.asarray(result.images[0]))


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("cat " * 75, None),
        ("cat " * 74 + "blue cat", "cat"),
        ("pink " * 100 + "unicorn", ("pink " * 25 + "unicorn")),
        ("the " * 74 + "qx the", "qx the"),
        ("x" * 76, "x" * 76),
        ("x" * 75, None),
    ],
)
def test_what_does_not_fit_is_said(lcm: ovforge.Pipeline, prompt: str, cut: str | None) -> None:
    warnings = said_of_call(lcm, lcm(prompt, seed=1, steps=1))
    assert bool(warnings) == (cut is not None)
    if cut is not None:
        assert warnings[0].endswith(f"cut off: {cut!r}")


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"width": 17}, InputError, "17 is not a multiple of 2"),
        ({"negative_prompt": "x"}, InputError, "takes no negative prompt"),
        ({"seed": [1, 2]}, InputError, "2 seeds for 1 pictures"),
        ({"steps": 51}, InputError, "51 is out of range"),
        ({"steps": 0}, ConfigError, "`steps` should be greater than or equal to 1"),
        ({"stps": 4}, ConfigError, "Did you mean 'steps'"),
        ({"prompt": 3}, ConfigError, "`prompt"),
        ({"prompt": []}, ConfigError, "at least one prompt"),
        ({"seed": 2**64}, InputError, "out of range"),
    ],
)
def test_bad_inputs_say_what_would_be_right(
    lcm: ovforge.Pipeline, inputs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        lcm(**{"prompt": "a cat", **inputs})
    assert message in str(raised.value)


def test_a_negative_prompt_without_guidance_is_refused(sd: ovforge.Pipeline) -> None:
    with pytest.raises(InputError, match="no effect"):
        sd("a cat", negative_prompt="x", guidance_scale=1)
    with pytest.raises(InputError, match="2 negative prompts for 1"):
        sd("a cat", negative_prompt=["x", "y"])


def test_damaged_weights_are_an_error_that_names_the_step(
    torch_lcm: Path, session_cache: Cache, tmp_path: Path
) -> None:
    bundle = pipeline(torch_lcm, session_cache).bundle
    result = bundle.models["unet"].get_results()[0]
    result.input(0).replace_source_output(
        ops.multiply(result.input_value(0), ops.constant(np.float32("nan"))).output(0)
    )
    bundle.save(tmp_path / "model")
    damaged = ovforge.Pipeline("text-to-image", source=tmp_path / "model", device=F32, cache=None)
    with pytest.raises(ModelError, match="step 1 of 4 gave numbers that are not finite"):
        damaged("a cat", seed=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy's functions on torch's tensors, in diffusers
@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("heun", "HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("dpm2", "KDPM2DiscreteScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        ("lms", "LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ],
)
def test_fractional_timesteps_run_on_a_default_conversion(
    torch_sd: Path, session_cache: Cache, name: str, theirs: str, options: dict[str, Any]
) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.StableDiffusionPipeline.from_pretrained(torch_sd, requires_safety_checker=False)
    reference.scheduler = getattr(diffusers, theirs).from_config(reference.scheduler.config, **options)
    reference.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"guidance_scale": 2.0, "width": 16, "height": 16}
    wanted = reference("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(4), **call).images
    assert (np.asarray(reference.scheduler.timesteps, np.float64) % 1).any()
    ours = pipeline(torch_sd, session_cache, scheduler=Use(name, **options))
    agree(ours("a cat", steps=3, seed=4, **call), wanted)


def test_whole_timesteps_give_the_same_of_either_type(torch_sd: Path, session_cache: Cache) -> None:
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 16, "height": 16}
    ddim = Use("diffusers", class_name="DDIMScheduler")
    changed = pipeline(torch_sd, session_cache, scheduler=ddim)
    stored = pipeline(torch_sd, session_cache, scheduler=ddim, optimize=False)
    types = [str(pipe.bundle.models["unet"].input("timestep").get_element_type()) for pipe in (changed, stored)]
    assert types == ["<Type: 'float32'>", "<Type: 'int64_t'>"]
    np.testing.assert_array_equal(changed("a cat", **call).latents, stored("a cat", **call).latents)
    dpm2 = pipeline(torch_sd, session_cache, scheduler="dpm2", optimize=False)
    with pytest.raises(InputError, match="have fractions, and the unet takes i64"):
        dpm2("a cat", **call)


MAPPED = """
import json, sys
import ovforge
pipeline = ovforge.load(json.loads(sys.argv[1]), cache=ovforge.Cache(sys.argv[2]))
image = pipeline("a red apple", steps=1, seed=1).images[0]
image.save(sys.argv[3])
cached, sizes, ours = [role.cached for _, role in pipeline.compiled.all()], {}, False
for line in open("/proc/self/smaps"):
    name, *values = line.split()
    if not name.endswith(":"):
        ours = line.strip().endswith("compiled.blob")
    elif ours and values[-1] == "kB":
        sizes[name] = sizes.get(name, 0) + int(values[0])
print(json.dumps([cached, sizes]))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is mapped")
@pytest.mark.parametrize(
    "more",
    [{"device": {"use": "cpu", "precision": "f32"}}, {}, {"quantize": ["weights-int8"]}],
    ids=["f32", "auto", "int8"],
)
def test_compiled_models_are_read_from_the_cache_and_let_go(tmp_path: Path, more: dict[str, Any]) -> None:
    """What the device wrote to a mapped model would be lost with its pages: it writes to none."""
    config = {"task": "text-to-image", "load": "package:ovforge_lcm/model", "scheduler": "lcm", **more}
    told = []
    for n in range(2):
        command = [
            sys.executable,
            "-c",
            MAPPED,
            json.dumps(config),
            str(tmp_path / "cache"),
            str(tmp_path / f"{n}.png"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout))
    (cached, none), (again, sizes) = told
    assert (any(cached), none) == (False, {})
    assert all(again)
    assert sizes["Private_Dirty:"] == 0
    assert sizes["Rss:"] < sizes["Size:"] / 2
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_a_size_that_was_foreseen_and_is_never_asked_for_takes_no_memory(session_cache: Cache) -> None:
    pipeline = ovforge.load(
        {"task": "text-to-image", "load": "package:ovforge_lcm/model", "scheduler": "lcm"}, cache=session_cache
    )
    for size in (64, 128):  # 128 is the model's own
        pipeline("a red apple", steps=1, width=size, height=size)
        foreseen, any_size = [role.model for name, role in pipeline.compiled.all() if name == "unet"]
        assert (foreseen is None) == (size == 64)
        assert any_size is not None
