"""LTX-Video: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import ovforge
from families import maker, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.cli import app
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.model import ModelBundle, read_provenance
from ovforge.store.cache import Cache
from ovforge_diffusion.graph.video_places import VideoPlaces
from ovforge_diffusion.sequence import SequenceEncoder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from safetensors.torch import save_file  # noqa: E402

PROMPT = "A beautiful pink unicorn, 8k"
CALL: dict[str, Any] = {"width": 96, "height": 64, "num_frames": 17, "guidance_scale": 3.0}


@pytest.fixture(scope="module", params=["0.9.0", "0.9.1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = maker("test_ltx").make_ltx_pipeline(tmp_path_factory.mktemp("ltx") / request.param, request.param)
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pipeline whose decoder takes no timestep."""
    made: Path = maker("test_ltx").make_ltx_pipeline(tmp_path_factory.mktemp("plain") / "0.9.0")
    return made


def theirs(source: Path, *, seeds: list[int], steps: int, image: Any = None, tiled: bool = False, **call: Any) -> Any:
    """Return diffusers' videos, uint8 (videos, frames, height, width, 3)."""
    kind = diffusers.LTXPipeline if image is None else diffusers.LTXImageToVideoPipeline
    pipe = kind.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    if tiled:
        pipe.vae.enable_tiling(64, 64, 16, 32, 32, 8)
        pipe.vae.use_framewise_decoding = True
    if image is not None:
        call["image"] = image
    torch.manual_seed(seeds[0])  # the noise between the decoder's layers
    made = pipe(**call, num_inference_steps=steps, generator=seeded(seeds), output_type="np").frames
    return (made * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pipeline as 0.9.5 has it, whose scheduler shifts nothing."""
    made: Path = maker("test_ltx").make_ltx_pipeline(tmp_path_factory.mktemp("later") / "0.9.5", "0.9.5")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(made / "scheduler")
    return made


def theirs_of(
    source: Path,
    *,
    seed: int,
    steps: int,
    conditions: list[dict[str, Any]] | None = None,
    tiled: bool = False,
    **call: Any,
) -> Any:
    """Return what LTXConditionPipeline makes, uint8 (1, frames, height, width, 3), or latents."""
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXConditionPipeline, LTXVideoCondition

    pipe = LTXConditionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    if tiled:
        pipe.vae.enable_tiling(64, 64, 16, 32, 32, 8)
        pipe.vae.use_framewise_decoding = True
    given = conditions and [LTXVideoCondition(**condition) for condition in conditions]
    call = {"output_type": "np", **call}
    made = pipe(conditions=given, **call, num_inference_steps=steps, generator=seeded([seed])).frames
    return made if call["output_type"] == "latent" else (made * 255).round().astype(np.uint8)


def clip(frames: int, seed: int = 0) -> list[Image.Image]:
    """Return frames of noise, smoothed, of another size than the video's."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((60, 50)) for _ in range(frames)]


def agree(ours: Any, theirs: Any) -> None:
    assert len(ours.videos) == len(theirs)
    for mine, wanted in zip(ours.videos, theirs, strict=True):
        assert mine.shape == wanted.shape
        difference = np.abs(mine.astype(np.int16) - wanted.astype(np.int16))
        assert difference.max() <= 2
        assert difference.mean() <= 0.2
        assert wanted.std() > 10


def test_a_video(folder: Path, session_cache: Cache) -> None:
    """With a negative prompt, guidance rescaled, another rate, and the last noise taken out by the decoder."""
    call = {**CALL, "negative_prompt": "blue", "guidance_rescale": 0.5, "frame_rate": 12}
    if folder.name == "0.9.1":
        call |= {"decode_timestep": 0.3, "decode_noise_scale": 0.2}
    wanted = theirs(folder, prompt=PROMPT, steps=3, seeds=[7], **call)
    made = ours(folder, session_cache, "text-to-video")(PROMPT, steps=3, seed=7, **call)
    agree(made, wanted)
    assert made.frame_rate == 12


def test_a_first_frame(folder: Path, session_cache: Cache) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (80, 120, 3), np.uint8)).resize((70, 50))
    wanted = theirs(folder, prompt=PROMPT, image=image, steps=3, seeds=[3], **CALL)
    made = ours(folder, session_cache, "image-to-video")(PROMPT, image=image, steps=3, seed=3, **CALL)
    agree(made, wanted)


def test_a_first_frame_with_what_optimum_intel_exports(plain: Path, session_cache: Cache, tmp_path: Path) -> None:
    """Its folders tell the statistics of latents to the decoder alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))
    pipe = ours(plain, session_cache, "image-to-video")
    wanted = pipe(PROMPT, image=image, steps=2, seed=3, **CALL)
    ovforge.open_model(plain, cache=session_cache, options={"weights": "f32"}).save(tmp_path / "export")
    path = tmp_path / "export/vae_encoder/config.json"
    config = json.loads(path.read_text())
    assert config.pop("latents_mean_data") and config.pop("latents_std_data")
    path.write_text(json.dumps(config))
    opened = ovforge.Pipeline(
        "image-to-video", source=tmp_path / "export", device=Use("cpu", precision="f32"), cache=session_cache
    )
    assert opened(PROMPT, image=image, steps=2, seed=3, **CALL).compare(wanted, "psnr") > 60


def test_a_batch_in_tiles(plain: Path, session_cache: Cache) -> None:
    """Two prompts of one length and another, each half alone, low memory, and tiles in space and time."""
    texts = [PROMPT, "a cat " * 30]
    call = {**CALL, "width": 128, "num_frames": 25, "max_sequence_length": 40}
    wanted = theirs(plain, prompt=texts, steps=2, seeds=[1, 5], tiled=True, **call)
    use = Use("text-to-video", guidance="split", low_memory=True, tile=64, tile_frames=16)
    pipe = ours(plain, session_cache, use)
    made = pipe(texts, steps=2, seed=[1, 5], **call)
    agree(made, wanted)
    said = said_of_call(pipe, made)
    assert any("cut off" in warning for warning in said)
    assert any("tiles of 64x64 pixels and 16 frames" in warning for warning in said)
    alone = pipe(texts[1], steps=2, seed=5, **call)
    np.testing.assert_array_less(np.abs(alone.videos[0].astype(int) - made.videos[1]), 3)


def test_an_adapter(plain: Path, session_cache: Cache, tmp_path: Path) -> None:
    """In diffusers' names, and of the makers' own layers for what enters and the time."""
    peft = pytest.importorskip("peft")
    pipe = diffusers.LTXPipeline.from_pretrained(plain)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "net.2", "proj_in", "time_embed.linear"]
    torch.manual_seed(1)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=layers))
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    state = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path, state, weight_name="ours.safetensors")
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "num_frames": 9}
    wanted = pipe(PROMPT, **call, num_inference_steps=2, generator=seeded([1]), output_type="np").frames
    names = {f"diffusion_model.{name}": tensor.contiguous() for name, tensor in state.items()}
    theirs = {
        name.replace(".proj_in.", ".patchify_proj.").replace(".time_embed.", ".adaln_single."): tensor
        for name, tensor in names.items()
    }
    save_file(theirs, tmp_path / "theirs.safetensors")
    for name in ("ours", "theirs"):
        use = Use("lora", path=str(tmp_path / f"{name}.safetensors"))
        made = ours(plain, session_cache, "text-to-video", transforms=[use])(PROMPT, steps=2, seed=1, **call)
        agree(made, (wanted * 255).round().astype(np.uint8))
        assert not [warning for warning in made.warnings if "no such layer" in warning]


def test_previews_and_latents(plain: Path, session_cache: Cache) -> None:
    """Progress shows one frame of each video; the latents of a run without decoding are those of one with it."""
    call = {**CALL, "steps": 2, "seed": 4}
    pipe = ours(plain, session_cache, "text-to-video")
    seen: list[Any] = []
    made = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
    previews = [pictures for pictures in seen if pictures]
    assert [picture.size for pictures in previews for picture in pictures] == [(96, 64)] * 2
    latents = pipe(PROMPT, **call, decode=False)
    assert not latents.videos
    np.testing.assert_array_equal(latents.latents, made.latents)
    assert latents.latents.shape == (1, 8, 3, 2, 3)

    class Stopped(Exception):
        """What a callback may raise to end a run."""

    def stop(moment: Any) -> None:
        if moment.stage == "denoising":
            raise Stopped

    with pytest.raises(Stopped):
        pipe(PROMPT, **call, progress=stop)
    again = pipe(PROMPT, **made.provenance["inputs"] | {"prompt": PROMPT})
    assert again.compare(made, "psnr") == 100


def test_a_size_that_is_foreseen_and_steps_that_are_cached(plain: Path, session_cache: Cache) -> None:
    """The transformer is compiled for the size in [input]; a cache of every step changes nothing, of every other much."""
    call = {**CALL, "steps": 4, "seed": 4}
    wanted = ours(plain, session_cache, Use("text-to-video", static=False))(PROMPT, **call)
    size = {name: CALL[name] for name in ("width", "height", "num_frames")}
    for interval, low, high in ((1, 60, 101), (2, 5, 40)):
        use = Use("step-cache", interval=interval)
        pipe = ours(plain, session_cache, "text-to-video", input=size, transforms=[use])
        assert low < pipe(PROMPT, **call).compare(wanted, "psnr") < high


@pytest.mark.parametrize(
    ("recipe", "roles"),
    [
        ("weights-int8", {"transformer", "text_encoder", "vae_decoder"}),
        ("weights-int4", {"transformer", "text_encoder", "vae_decoder"}),
        ("transformer-ptq", {"transformer"}),
    ],
)
def test_quantized_models_are_held_to_a_quality(
    plain: Path, session_cache: Cache, recipe: str, roles: set[str]
) -> None:
    """Of all its models by weights, and of the transformer by what the pipeline gives it."""
    pytest.importorskip("nncf")
    few = {"steps": 2, "width": 96, "height": 64, "num_frames": 9}
    pipe = ours(
        plain,
        session_cache,
        "text-to-video",
        quantize=[recipe],
        calibration={"samples": 8, "runs": 4, "options": few},
        quality={"max_drop": 0.05, "samples": 2, "options": few},
    )
    layers = pipe.reports[-1].layers
    assert roles <= layers.keys()
    if recipe == "transformer-ptq":  # what conditions each token by its step stays as it is
        assert layers.keys() == roles
        assert not [layer for layer in layers["transformer"] if "time_embed" in layer or "proj_out" in layer]
        assert len([layer for layer in layers["transformer"] if "attn" in layer]) > 10
    made = pipe(PROMPT, seed=3, **{**CALL, "steps": 2})
    wanted = ours(plain, session_cache, "text-to-video")(PROMPT, seed=3, **{**CALL, "steps": 2})
    assert 0.95 < made.compare(wanted) < 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_places_of_tokens_are_told_to_a_graph_of_diffusers_own_module() -> None:
    """As optimum-intel traces it; a transformer that does not work places out of the sides is refused."""
    import openvino as ov
    from openvino import opset13 as ops

    small, rng = maker("test_ltx"), np.random.default_rng(1)
    torch.manual_seed(2)
    module = small._transformers().noise(diffusers.LTXVideoTransformer3DModel(**small.TRANSFORMER)).eval()

    class Traced(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(
            self, hidden: Any, text: Any, mask: Any, timestep: Any, frames: Any, height: Any, width: Any, scale: Any
        ) -> Any:
            return self.inner(hidden, text, timestep, mask, frames, height, width, scale, return_dict=False)[0]

    def given(tokens: int) -> dict[str, Any]:
        return {
            "hidden_states": rng.standard_normal((2, tokens, small.CHANNELS), np.float32),
            "encoder_hidden_states": rng.standard_normal((2, 7, small.WIDTH), np.float32),
            "encoder_attention_mask": (np.arange(7) < np.array([[7], [4]])).astype(np.int64),
            "timestep": rng.uniform(0, 1000, (2, tokens)).astype(np.float32),
        }

    example = {name: torch.tensor(value) for name, value in given(12).items()}
    sides = [torch.tensor(side) for side in (2, 2, 3)]
    with torch.no_grad():
        model = ov.convert_model(Traced(), example_input=(*example.values(), *sides, torch.tensor([0.3, 32.0, 32.0])))
    names = (*example, "num_frames", "height", "width", "rope_interpolation_scale")
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    bundle = ModelBundle()
    bundle.models["transformer"] = model
    bundle.configs["transformer"] = {"_class_name": "LTXVideoTransformer3DModel"}
    VideoPlaces().apply(bundle)
    told = bundle.models["transformer"]
    assert {port.any_name for port in told.inputs} == {*example, "video_coords"}
    inputs = given(14)
    places = np.stack([rng.uniform(0, 6, 14), *(rng.integers(0, 20, (2, 14)) * 32)]).astype(np.float32)
    compiled = ov.Core().compile_model(told, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = compiled({**inputs, "video_coords": places})[0]
    with torch.no_grad():
        wanted = module(
            **{name: torch.tensor(value) for name, value in inputs.items()},
            video_coords=torch.tensor(places)[None].repeat(2, 1, 1),
        ).sample
    np.testing.assert_allclose(made, wanted.numpy(), atol=1e-3)

    x = ops.parameter([1, 4], name="hidden_states")
    bundle.models["transformer"] = ov.Model([ops.relu(x)], [x])
    with pytest.raises(ModelError, match="nothing turns tokens by the sides"):
        VideoPlaces().apply(bundle)


CONDITIONS: dict[str, list[dict[str, Any]]] = {
    "first frame": [{"image": clip(1)[0]}],
    "weak first frame": [{"image": clip(1)[0], "strength": 0.6}],
    "two pictures": [
        {"image": clip(1)[0], "frame_index": 0},
        {"image": clip(1, 1)[0], "frame_index": 11, "strength": 0.7},
    ],
    "begin of a video": [{"video": clip(12)}],
    "videos": [{"video": clip(9, 1), "strength": 0.3}, {"video": clip(20), "frame_index": 8, "strength": 0.8}],
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_conditions(later: Path, session_cache: Cache, kind: str) -> None:
    """They show pictures and videos at any frame, which are kept wholly or in part. A video that is too long is cut."""
    call = {**CALL, "num_frames": 33, "negative_prompt": "blue", "decode_timestep": 0.1, "frame_rate": 30}
    if kind == "first frame":
        call |= {"image_cond_noise_scale": 0.4}
    given = CONDITIONS[kind]
    wanted = theirs_of(later, prompt=PROMPT, steps=5, seed=7, conditions=given, **call)
    made = ours(later, session_cache, "video-to-video")(PROMPT, steps=5, seed=7, conditions=given, **call)
    agree(made, wanted)
    assert any("frames are taken" in warning for warning in made.warnings) == (kind in ("begin of a video", "videos"))


def test_no_conditions(later: Path, session_cache: Cache) -> None:
    """Text alone; and the timesteps of distilled models."""
    pipe = ours(later, session_cache, "video-to-video")
    agree(pipe(PROMPT, steps=4, seed=2, **CALL), theirs_of(later, prompt=PROMPT, steps=4, seed=2, **CALL))
    times = [1000.0, 993.0, 725.0, 300.0, 0.03]
    wanted = theirs_of(later, prompt=PROMPT, steps=5, seed=2, timesteps=times, **CALL)
    agree(pipe(PROMPT, timesteps=times, seed=2, **CALL), wanted)


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the latent upsampler is published as, with the autoencoder of `later`."""
    made: Path = maker("test_ltx").make_upsample_pipeline(tmp_path_factory.mktemp("upsampler"))
    return made


def test_a_video_that_is_enlarged_and_refined(
    later: Path, upsampler: Path, session_cache: Cache, tmp_path: Path
) -> None:
    """Latents of a small video, those of twice the sides, and a run over the rest of the steps."""
    from diffusers import LTXLatentUpsamplePipeline

    small = {**CALL, "width": 64, "num_frames": 9}
    pipe = ours(later, session_cache, "video-to-video")
    low = pipe(PROMPT, steps=3, seed=7, **small, decode=False)
    wanted = theirs_of(later, prompt=PROMPT, steps=3, seed=7, output_type="latent", **small)
    np.testing.assert_allclose(low.latents, wanted.numpy(), atol=2e-3)
    low.save(tmp_path / "low.npy")

    enlarge = LTXLatentUpsamplePipeline.from_pretrained(upsampler)
    enlarging = ours(upsampler, session_cache, Use("upsample-video", low_memory=True))
    for change in ({}, {"adain_factor": 0.3}, {"adain_factor": 1.0, "tone_map_compression_ratio": 0.6}):
        large = enlarging(latents=tmp_path / "low.npy", seed=3, **change)
        given = {"latents": torch.tensor(low.latents), "width": 128, "height": 128, **change}
        agree(large, (enlarge(**given, generator=seeded([3]), output_type="np").frames * 255).round().astype(np.uint8))
        theirs_large = enlarge(**given, output_type="latent").frames
        np.testing.assert_allclose(large.latents, theirs_large.numpy(), atol=2e-3)

    call = {**small, "width": 128, "height": 128, "guidance_scale": 1.0}
    first = {"image": clip(1)[0], "strength": 0.9}
    for times in ({"steps": 5}, {"timesteps": [1000.0, 909.0, 725.0, 421.9, 100.0]}):
        made = pipe(PROMPT, seed=5, latents=large.latents, strength=0.5, conditions=first, **times, **call)
        theirs_times = {key: value for key, value in times.items() if key != "steps"}
        wanted = theirs_of(
            later, prompt=PROMPT, seed=5, steps=5, latents=theirs_large, denoise_strength=0.5, conditions=[first],
            **theirs_times, **call,
        )  # fmt: skip
        agree(made, wanted)


@pytest.fixture(scope="module")
def converted(upsampler: Path, session_cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same in float32, as parts have no options."""
    folder = tmp_path_factory.mktemp("converted") / "upsampler"
    ovforge.open_model(upsampler, options={"weights": "f32"}, cache=session_cache).save(folder)
    return folder


def upscaling(source: Path, upsampler: Path, cache: Cache, **options: Any) -> Any:
    """Return video-to-video with the upsampler beside its model."""
    load = {"weights": "f32", "parts": {"latent_upsampler": str(upsampler)}}
    use, exact = Use("video-to-video", **options), Use("cpu", precision="f32")
    return ovforge.Pipeline(use, source=source, load=load, device=exact, cache=cache)


def test_one_call_is_three(later: Path, upsampler: Path, converted: Path, session_cache: Cache) -> None:
    """Make small, enlarge, refine: ours as diffusers', and to the last bit what three calls of ours give."""
    from diffusers import LTXLatentUpsamplePipeline

    pipe = upscaling(later, converted, session_cache)
    first = {"image": clip(1)[0], "strength": 0.9}
    common = {"num_frames": 9, "conditions": [first], "frame_rate": 30}
    guided = {"guidance_scale": 3.0, "negative_prompt": "blue"}
    factors = {"adain_factor": 0.7, "tone_map_compression_ratio": 0.4}
    small, large = {"width": 64, "height": 64}, {"width": 128, "height": 128}
    end = {"decode_timestep": 0.1, "decode_noise_scale": 0.05}
    upscale = {**factors, "steps": 5, "strength": 0.5, "guidance_scale": 1.0, "image_cond_noise_scale": 0.3}
    made = pipe(PROMPT, steps=3, seed=7, **large, **common, **guided, **end, upscale=upscale)

    low = pipe(PROMPT, steps=3, seed=7, **small, **common, **guided, decode=False)
    high = ours(upsampler, session_cache, "upsample-video")(latents=low.latents, **factors, decode=False)
    rest = {"steps": 5, "guidance_scale": 1.0, "image_cond_noise_scale": 0.3}
    third = pipe(PROMPT, seed=7, latents=high.latents, strength=0.5, **rest, **large, **common, **end)
    np.testing.assert_array_equal(made.latents, third.latents)
    np.testing.assert_array_equal(made.videos[0], third.videos[0])

    begun = theirs_of(later, prompt=PROMPT, steps=3, seed=7, output_type="latent", **small, **common, **guided)
    enlarge = LTXLatentUpsamplePipeline.from_pretrained(upsampler)
    enlarged = enlarge(latents=begun, **large, **factors, output_type="latent").frames
    wanted = theirs_of(
        later, prompt=PROMPT, seed=7, latents=enlarged, denoise_strength=0.5, **rest, **large, **common, **end
    )
    agree(made, wanted)
    inputs = made.provenance["inputs"]
    assert (inputs["steps"], inputs["upscale"]["steps"], inputs["seed"]) == (3, 5, 7)
    again = pipe(**{**inputs, "conditions": [first]})
    np.testing.assert_array_equal(again.videos[0], made.videos[0])


def test_a_batch_that_is_enlarged_with_little_memory(later: Path, converted: Path, session_cache: Cache) -> None:
    """Each video is what its seed gives alone; the timesteps of distilled models."""
    pipe = upscaling(later, converted, session_cache, low_memory=True)
    times = {"timesteps": [1000.0, 725.0, 0.03], "guidance_scale": 1.0}
    upscale = {"timesteps": [1000.0, 909.0, 725.0, 421.0, 0.0], "strength": 0.999}
    call: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 9, **times, "upscale": upscale}
    both = pipe(PROMPT, count=2, seed=4, **call)
    alone = pipe(PROMPT, seed=5, **call)
    assert [video.shape for video in both.videos] == [(9, 64, 64, 3)] * 2
    assert both.seeds == (4, 5)
    np.testing.assert_array_less(np.abs(alone.videos[0].astype(int) - both.videos[1]), 3)


@pytest.mark.parametrize("low_memory", [False, True])
def test_prompts_of_an_enlarged_video_are_read_once(
    later: Path,
    upsampler: Path,
    converted: Path,
    session_cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
    low_memory: bool,
) -> None:
    """The text encoder is opened once, and runs once for each text, whichever of the two runs asks for it."""
    opened, read = list[str](), list[int]()
    begin, states = SequenceEncoder.__init__, SequenceEncoder._states

    def count_opened(self: Any, tokenizer: Any, model: Any, role: str, *rest: Any) -> None:
        opened.append(role)
        begin(self, tokenizer, model, role, *rest)

    def count_read(self: Any, inputs: Any) -> Any:
        read.append(len(next(iter(inputs.values()))))
        return states(self, inputs)

    call: dict[str, Any] = {"num_frames": 9, "steps": 2, "seed": 3}
    small, large = {"width": 64, "height": 64}, {"width": 128, "height": 128}
    texts = {"prompt": "a [cat:dog:1] in snow", "negative_prompt": "blue"}  # the first run reads no dog
    pipe = upscaling(later, converted, session_cache, low_memory=low_memory, prompts="weighted")
    low = pipe(**texts, **small, **call, decode=False)
    high = ours(upsampler, session_cache, "upsample-video")(latents=low.latents, decode=False)
    wanted = pipe(**texts, **large, **call | {"steps": 3}, latents=high.latents, strength=0.5)
    monkeypatch.setattr(SequenceEncoder, "__init__", count_opened)
    monkeypatch.setattr(SequenceEncoder, "_states", count_read)
    made = pipe(**texts, **large, **call, upscale={"steps": 3, "strength": 0.5})
    np.testing.assert_array_equal(made.videos[0], wanted.videos[0])
    assert read == [1, 1, 1]
    assert len(opened) == low_memory
    assert len(made.timings.spans["text_encoder"]) == 1


@pytest.fixture(scope="module", params=["frames", "both"])
def longer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the pipeline of an upsampler that makes more frames, and one that makes twice the sides, too."""
    folder = tmp_path_factory.mktemp("longer") / request.param
    made: Path = maker("test_ltx").make_upsample_pipeline(folder, kind=request.param)
    return made


def test_one_call_is_three_for_more_frames(later: Path, longer: Path, session_cache: Cache, tmp_path: Path) -> None:
    """The first run makes each second frame, at half the rate, of each second frame of what is shown."""
    from diffusers import LTXLatentUpsamplePipeline

    ovforge.open_model(longer, options={"weights": "f32"}, cache=session_cache).save(tmp_path / "converted")
    pipe = upscaling(later, tmp_path / "converted", session_cache)
    side = 64 if longer.name == "frames" else 32
    shown, last = clip(20), clip(1, 1)[0]
    few = [{"video": shown[:17:2], "strength": 0.8}, {"image": last, "frame_index": 16}]
    many = [{"video": shown[:17], "strength": 0.8}, {"image": last, "frame_index": 32}]
    small = {"width": side, "height": side, "num_frames": 17, "frame_rate": 15, "guidance_scale": 3.0}
    large = {"width": 64, "height": 64, "num_frames": 33, "frame_rate": 30}
    upscale = {"adain_factor": 0.7, "steps": 5, "strength": 0.5, "guidance_scale": 1.0}
    given = [{**many[0], "video": shown}, many[1]]
    made = pipe(PROMPT, steps=3, seed=7, **large, guidance_scale=3.0, conditions=given, upscale=upscale)
    assert made.videos[0].shape == (33, 64, 64, 3)
    assert made.frame_rate == 30
    said = [warning for warning in made.warnings if "left out" in warning]
    assert said == [f"conditions.0.video: {text}, and the others left out" for text in (
        "of its first 17 frames the first run takes every second", "its first 17 frames are taken",
    )]  # fmt: skip

    low = pipe(PROMPT, steps=3, seed=7, **small, conditions=few, decode=False)
    high = ours(longer, session_cache, "upsample-video")(latents=low.latents, adain_factor=0.7, decode=False)
    rest = {"steps": 5, "guidance_scale": 1.0}
    third = pipe(PROMPT, seed=7, latents=high.latents, strength=0.5, conditions=many, **rest, **large)
    np.testing.assert_array_equal(made.videos[0], third.videos[0])

    begun = theirs_of(later, prompt=PROMPT, steps=3, seed=7, output_type="latent", conditions=few, **small)
    enlarge = LTXLatentUpsamplePipeline.from_pretrained(longer)
    sides = {name: large[name] for name in ("width", "height")}
    enlarged = enlarge(latents=begun, adain_factor=0.7, output_type="latent", **sides).frames
    np.testing.assert_allclose(high.latents, enlarged.numpy(), atol=2e-3)
    wanted = theirs_of(
        later, prompt=PROMPT, seed=7, latents=enlarged, denoise_strength=0.5, conditions=many, **rest, **large
    )
    agree(made, wanted)


def test_a_video_that_is_changed_before_it_gets_more_frames(later: Path, longer: Path, session_cache: Cache) -> None:
    """The first run starts from each second frame of it. What has no half is refused."""
    parts = {"parts": {"latent_upsampler": str(longer / "latent_upsampler")}}
    pipe = ovforge.Pipeline("video-to-video", source=later, load=parts, cache=session_cache)
    shown, side = clip(18), 64 if longer.name == "frames" else 32
    call: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "seed": 1, "strength": 0.6, "upscale": {}}
    made = pipe(PROMPT, num_frames=17, video=shown, **call)
    small = {**call, "width": side, "height": side, "upscale": None, "frame_rate": 12.5, "decode": False}
    low = pipe(PROMPT, num_frames=9, video=shown[:17:2], **small)
    high = ours(longer, session_cache, "upsample-video")(latents=low.latents, decode=False)
    assert high.latents.shape[2] == made.latents.shape[2] == 3
    again = pipe(PROMPT, num_frames=17, latents=low.latents, **{**call, "strength": 0.01, "steps": 100})
    assert again.compare(made, "psnr") > 15

    def never(_: Any) -> None:
        raise AssertionError("the run began")

    picture = clip(1)[0]
    for change, message in (
        ({"num_frames": 25}, r"25 is not one more than a multiple of 16(.|\n)*17 and 33"),
        ({"conditions": {"image": picture, "frame_index": 7}}, r"7 is not a multiple of 2, at which the first run has"),
        ({"conditions": {"video": [picture] * 9, "frame_index": 8}}, r"8 is not a multiple of 16(.|\n)*0 and 16"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(PROMPT, **{**call, "num_frames": 17, "video": shown, **change}, progress=never)
    with pytest.raises(InputError, match="17 of its frames can be taken, and 33 are to be made of it"):
        pipe(PROMPT, num_frames=33, video=shown, **call)


@pytest.mark.parametrize("kind", ["image", "enlarged"])
def test_generate_makes_videos_as_python_does(
    later: Path, converted: Path, session_cache: Cache, tmp_path: Path, kind: str
) -> None:
    """Into a folder, whose pictures are the frames as they were made."""
    clip(1)[0].save(tmp_path / "first.png")
    options = ["--upscaler", str(converted)] if kind == "enlarged" else []
    command = [
        "generate", "-m", str(later), "-p", PROMPT, "-s", "3", "--steps", "2", "-t", "FP32", "--precision", "f32",
        "--width", "64", "--height", "64", "--frames", "9", "--frame-rate", "12", "-c", str(session_cache.root),
        "-i", str(tmp_path / "first.png"), "-o", str(tmp_path / "made"), *options,
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    call: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 9, "frame_rate": 12, "steps": 2, "seed": 3}
    if kind == "image":
        made = ours(later, session_cache, "image-to-video")(PROMPT, image=clip(1)[0], **call)
    else:
        made = upscaling(later, converted, session_cache)(PROMPT, conditions=clip(1)[0], upscale={}, **call)
    shown = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "made").glob("*.png"))])
    assert shown.shape == (9, 64, 64, 3)
    assert np.abs(made.videos[0].astype(int) - shown).max() <= 2
    assert read_provenance(tmp_path / "made/0001.png")["inputs"]["frame_rate"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upscaler", "x"], "--upscaler: is for videos"),
        (["--frame-rate", "12"], "--frame-rate: is for videos"),
        (["--frames", "9", "--strength", "0.5"], "--strength: is for pictures"),
        (["--frames", "9", "-o", "x.png"], "cannot write .png"),
        (["-o", "x.mp4"], "cannot write .mp4"),
    ],
)
def test_generate_says_what_is_for_videos(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["generate", "-m", "package:ovforge_lcm/model", "-p", PROMPT, *options])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)


def test_what_cannot_be_enlarged_is_said(later: Path, converted: Path, session_cache: Cache, tmp_path: Path) -> None:
    """Before anything is made."""
    pipe = upscaling(later, converted, session_cache)
    call: dict[str, Any] = {"width": 128, "height": 64, "num_frames": 9, "upscale": {}}
    with pytest.raises(InputError, match=r"no latent_upsampler(.|\n)*load.parts"):
        ours(later, session_cache, "video-to-video")(PROMPT, **call)

    def never(_: Any) -> None:
        raise AssertionError("the run began")

    for change, message in (
        ({"width": 96}, "96 is not a multiple of 64"),
        ({"upscale": {"strength": 0.1, "steps": 3}}, r"upscale.strength: 0.1 of 3 steps leaves none"),
        ({"upscale": {"image_cond_noise_scale": 0.1}}, "upscale.image_cond_noise_scale: there are no conditions"),
        ({"upscale": {"timesteps": [900.0, 1.0], "sigmas": [1.0]}}, "upscale.sigmas"),
        ({"upscale": {"strength": 1.0}}, "less than 1"),
        ({"upscale": {"factor": 2}}, "factor"),
        ({"decode": False, "decode_timestep": 0.1}, "nothing is decoded"),
    ):
        with pytest.raises((InputError, ConfigError), match=message):
            pipe(PROMPT, **{**call, **change}, progress=never)


def test_a_video_that_gets_more_frames(longer: Path, session_cache: Cache, tmp_path: Path) -> None:
    """A file of n frames becomes one of 2n - 1 that takes as long, as its latents do."""
    from diffusers import LTXLatentUpsamplePipeline

    frames = [frame.resize((96, 64)) for frame in clip(10)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True, duration=100)
    pipe = ours(longer, session_cache, "upsample-video")
    call = {"decode_timestep": 0.2, "decode_noise_scale": 0.1}
    made = pipe(video=tmp_path / "x.webp", seed=6, **call)
    enlarge = LTXLatentUpsamplePipeline.from_pretrained(longer)
    wanted = enlarge(video=frames, width=96, height=64, generator=seeded([6]), output_type="np", **call).frames
    agree(made, (wanted * 255).round().astype(np.uint8))
    side = 1 if longer.name == "frames" else 2
    assert made.videos[0].shape == (17, side * 64, side * 96, 3)
    assert made.frame_rate == pytest.approx(20)
    assert pipe(video=tmp_path / "x.webp", seed=6, frame_rate=12, decode=False).frame_rate == 12


def test_a_video_that_is_enlarged(upsampler: Path, session_cache: Cache, tmp_path: Path) -> None:
    """A file, at its own size; the last noise is taken out by the decoder."""
    from diffusers import LTXLatentUpsamplePipeline

    frames = [frame.resize((96, 64)) for frame in clip(10)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    call = {"decode_timestep": 0.2, "decode_noise_scale": 0.1}
    made = ours(upsampler, session_cache, "upsample-video")(video=tmp_path / "x.webp", seed=6, **call)
    enlarge = LTXLatentUpsamplePipeline.from_pretrained(upsampler)
    wanted = enlarge(video=frames, width=96, height=64, generator=seeded([6]), output_type="np", **call).frames
    agree(made, (wanted * 255).round().astype(np.uint8))
    assert made.videos[0].shape == (9, 128, 192, 3)
    assert any("first 9 frames" in warning for warning in made.warnings)
    [example] = ours(upsampler, session_cache, "upsample-video").task.examples(1)
    assert example.video.shape == (9, 128, 128, 3)


def test_a_run_that_is_ended_holds_nothing_in_low_memory(
    later: Path, converted: Path, upsampler: Path, session_cache: Cache
) -> None:
    """Neither of its models, nor the upsampler's."""

    class Stopped(Exception):
        """What a callback may raise to end a run."""

    def stop(moment: Any) -> None:
        if moment.stage == "upsampling" and moment.done == 1:
            raise Stopped

    call: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 9, "steps": 2, "upscale": {}, "prompt": PROMPT}
    enlarging = ours(upsampler, session_cache, Use("upsample-video", low_memory=True))
    for pipe, given in (
        (upscaling(later, converted, session_cache, low_memory=True), call),
        (enlarging, {"latents": np.zeros((1, 8, 2, 2, 2), np.float32)}),
    ):
        with pytest.raises(Stopped):
            pipe(**given, progress=stop)
        compiled = dict(pipe.compiled.all())
        assert "latent_upsampler" in compiled
        assert not [role for role, each in compiled.items() if each.model is not None]


def test_a_video_that_is_changed(later: Path, session_cache: Cache, tmp_path: Path) -> None:
    """A file is what its latents are; less strength leaves more of it; what was made is made again from its inputs."""
    frames = [frame.resize((96, 64)) for frame in clip(9)]
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / f"frames/{number:03}.png")
    pipe = ours(later, session_cache, "video-to-video")
    call = {**CALL, "num_frames": 9, "steps": 4, "seed": 1}
    vae = diffusers.AutoencoderKLLTXVideo.from_pretrained(later / "vae")
    pixels = torch.tensor(np.stack(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
    own = (mean - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)
    wanted = theirs_of(
        later, prompt=PROMPT, seed=1, steps=4, latents=own, denoise_strength=0.5, **{**CALL, "num_frames": 9}
    )
    for video in (tmp_path / "frames", np.stack(frames), frames):
        made = pipe(PROMPT, video=video, strength=0.5, **call)
        agree(made, wanted)
    assert (
        str(tmp_path / "frames/003.png")
        in pipe(PROMPT, video=tmp_path / "frames", **call).provenance["inputs"]["video"]
    )
    again = {
        **call,
        "conditions": {"image": tmp_path / "frames/000.png"},
        "video": tmp_path / "frames",
        "strength": 0.5,
    }
    first = pipe(PROMPT, **again)
    second = pipe(**{**first.provenance["inputs"], "prompt": PROMPT})
    np.testing.assert_array_equal(first.videos[0], second.videos[0])


def test_a_scheduler_with_shifts_is_read_without_them(plain: Path, session_cache: Cache, tmp_path: Path) -> None:
    """The first versions have one, which diffusers refuses here; it is said."""
    shutil.copytree(plain, tmp_path / "model")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "model/scheduler")
    wanted = theirs_of(tmp_path / "model", prompt=PROMPT, steps=3, seed=2, conditions=[{"image": clip(1)[0]}], **CALL)
    pipe = ours(plain, session_cache, "video-to-video")
    agree(pipe(PROMPT, steps=3, seed=2, conditions=clip(1)[0], **CALL), wanted)
    assert any("use_dynamic_shifting = false" in note for note in pipe.task.notes())


def test_a_long_condition_in_tiles(later: Path, session_cache: Cache) -> None:
    """It is encoded, and the video decoded, in tiles of space and time."""
    call = {**CALL, "width": 96, "height": 64, "num_frames": 25}
    given = [{"video": clip(25), "strength": 0.8}]
    wanted = theirs_of(later, prompt=PROMPT, steps=2, seed=7, conditions=given, tiled=True, **call)
    use = Use("video-to-video", tile=64, tile_frames=16)
    made = ours(later, session_cache, use)(PROMPT, steps=2, seed=7, conditions=given, **call)
    agree(made, wanted)
    whole = ours(later, session_cache, "video-to-video")(PROMPT, steps=2, seed=7, conditions=given, **call)
    assert np.abs(whole.videos[0].astype(int) - wanted[0]).max() > 10


def test_conditions_of_a_batch(later: Path, session_cache: Cache) -> None:
    """Each video is what its seed gives alone, on a machine with little memory, too."""
    pipe = ours(later, session_cache, Use("video-to-video", low_memory=True, guidance="split"))
    call = {
        **CALL,
        "num_frames": 17,
        "steps": 2,
        "conditions": [{"video": clip(9)}, {"image": clip(1)[0], "frame_index": 9}],
    }
    made = pipe([PROMPT, "a cat"], seed=[4, 8], **call)
    alone = pipe("a cat", seed=8, **call)
    np.testing.assert_array_less(np.abs(alone.videos[0].astype(int) - made.videos[1]), 3)


def test_what_cannot_be_of_conditions_is_said(
    later: Path, plain: Path, upsampler: Path, session_cache: Cache, tmp_path: Path
) -> None:
    pipe = ours(later, session_cache, "video-to-video")
    (tmp_path / "x.mp4").write_bytes(b"no video")
    picture = clip(1)[0]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"conditions": {"image": picture, "frame_index": 17}}, "there is no frame 17"),
        ({"conditions": {"video": [picture] * 9, "frame_index": 3}}, "The nearest are 0 and 8"),
        ({"conditions": {"video": tmp_path / "x.mp4"}}, "not a readable video"),
        ({"conditions": {"video": tmp_path / "y.mp4"}}, "no such file"),
        ({"conditions": {"frame_index": 3}}, "give image or video"),
        ({"strength": 0.5}, "nothing to change"),
        ({"image_cond_noise_scale": 0.5}, "there are no conditions"),
        ({"video": [picture] * 9}, "9 of its frames can be taken, and 17 are to be made"),
        ({"video": [picture] * 17, "strength": 0.1, "steps": 2}, "leaves none"),
        ({"video": [picture] * 17, "latents": np.zeros((1, 8, 3, 2, 3), np.float32)}, "given beside a video"),
        ({"video": []}, "0 pictures"),
        ({"video": tmp_path}, "has 0 pictures"),
        ({"video": np.zeros((2, 4, 4), np.uint8)}, "must be uint8"),
    ]
    for given, message in wrong:
        with pytest.raises((InputError, ConfigError), match=message):
            pipe(PROMPT, **{**CALL, **given})
    enlarging = ours(upsampler, session_cache, "upsample-video")
    for given, message in (
        ({}, "nothing to enlarge"),
        ({"latents": np.zeros((1, 7, 3, 2, 3), np.float32)}, "latents of shape"),
        ({"latents": np.zeros((1, 8, 3, 2, 3), np.float32), "width": 64}, "latents have their size"),
        ({"latents": np.zeros((1, 8, 1, 1, 1), np.float32), "adain_factor": 1}, "one latent has no deviation"),
        ({"video": [picture], "width": 64}, "height: is missing"),
        ({"video": [picture], "width": 64, "height": 50}, "50 is not a multiple of 32"),
    ):
        with pytest.raises((InputError, ConfigError), match=message):
            enlarging(**given)
    with pytest.raises(ModelError, match="latent_upsampler"):
        ours(plain, session_cache, "upsample-video")


def test_what_cannot_be_is_said(plain: Path, session_cache: Cache) -> None:
    pipe = ours(plain, session_cache, "text-to-video")
    with pytest.raises(InputError, match="The nearest numbers are 17 and 25"):
        pipe(PROMPT, **{**CALL, "num_frames": 18})
    with pytest.raises(InputError, match="100 is not a multiple of 32"):
        pipe(PROMPT, **{**CALL, "width": 100})
    with pytest.raises(InputError, match="decoder takes no timestep"):
        pipe(PROMPT, **CALL, decode_timestep=0.05)
    with pytest.raises(ModelError, match="LTX-Video makes videos from text or the first frame or other videos alone"):
        ours(plain, session_cache, "text-to-image")
