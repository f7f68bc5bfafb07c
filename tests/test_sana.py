"""Sana: whole pipelines against diffusers on torch, float32, with the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from families import agree, maker, original, said_of_call, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge.model import BatchGenerator
from ovforge.store.cache import Cache
from ovforge_diffusion.architectures import bins, sana
from ovforge_diffusion.sequence import SequenceTokenizer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPT = "  A beautiful Pink unicorn, 8k "
LONG = "a cat in a hat on a mat, " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("sana") / "pipeline")


@pytest.fixture(scope="module")
def sprint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("sprint") / "pipeline", sprint=True)


def made(folder: Path, **kind: bool) -> Path:
    small = maker("test_sana")
    path: Path = small.make_sana_pipeline(folder, **kind)
    return path


def theirs(
    source: Path, *, steps: int, seeds: list[int], scheduler: Any = None, kind: str = "SanaPipeline", **call: Any
) -> list[Image.Image]:
    pipe = original(kind, source)
    if scheduler is not None:
        pipe.scheduler = scheduler
    call = {"use_resolution_binning": False, **call}
    # The autoencoder makes 2 pixels of a latent here, and the pipeline refuses what is not a multiple of 32.
    pipe.check_inputs = lambda *given, **named: None
    made: list[Image.Image] = pipe(**call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.parametrize(("width", "height", "guidance"), [(32, 32, 4.5), (42, 26, 1.0), (20, 52, 3.0)])
def test_text_to_image(folder: Path, session_cache: Cache, width: int, height: int, guidance: float) -> None:
    """The prompt is read in lower case, and without blanks around it."""
    call = {"width": width, "height": height, "guidance_scale": guidance}
    wanted = theirs(folder, prompt=PROMPT, steps=4, seeds=[3], **call)
    agree(ours(folder, session_cache)(PROMPT, steps=4, seed=3, **call), wanted)


@pytest.mark.parametrize("guidance", ["joint", "split"])
def test_a_batch_with_a_long_prompt(folder: Path, session_cache: Cache, guidance: str) -> None:
    """One prompt is cut off, and the other one filled up; there is a negative prompt, without the instruction."""
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0, "max_sequence_length": 80}
    texts = {"negative_prompt": "Blue and green"}
    wanted = theirs(folder, prompt=[PROMPT, LONG], steps=3, seeds=[1, 2], **call, **texts)
    pipe = ours(folder, session_cache, Use("text-to-image", guidance=guidance))
    made = pipe([PROMPT, LONG], steps=3, seed=[1, 2], **call, **texts)
    agree(made, wanted)
    assert len([warning for warning in said_of_call(pipe, made) if "longer than the 80 tokens" in warning]) == 1
    assert (pipe([PROMPT, LONG], steps=3, seed=[1, 2], **call).latents != made.latents).any()


@pytest.mark.parametrize("lines", [None, ["Draw what follows.", "In few colours: "]])
@pytest.mark.parametrize("kind", ["SanaPipeline", "SanaSprintPipeline"])
def test_another_instruction(
    folder: Path, sprint: Path, session_cache: Cache, kind: str, lines: list[str] | None
) -> None:
    """Prompts that fit and that are cut, in a batch."""
    source = folder if kind == "SanaPipeline" else sprint
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 3.0, "max_sequence_length": 60}
    prompts = {"prompt": [PROMPT, LONG], "complex_human_instruction": lines}
    wanted = theirs(source, steps=2, seeds=[3, 4], kind=kind, **call, **prompts)
    pipe = ours(source, session_cache)
    told = "\n".join(lines or [])
    made = pipe([PROMPT, LONG], steps=2, seed=[3, 4], instruction=told, **call)
    agree(made, wanted)
    assert (pipe([PROMPT, LONG], steps=2, seed=[3, 4], **call).latents != made.latents).any()


def test_another_scheduler(folder: Path, session_cache: Cache) -> None:
    call: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0}
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    wanted = theirs(folder, prompt=PROMPT, steps=3, seeds=[1], scheduler=euler, **call)
    pipe = ours(folder, session_cache, scheduler=Use("flow-euler", shift=3.0))
    agree(pipe(PROMPT, steps=3, seed=1, **call), wanted)


@pytest.mark.parametrize(("size", "steps", "scale"), [((32, 32), 2, 4.5), ((42, 26), 1, 1.0), ((20, 52), 3, 6.0)])
def test_sprint(sprint: Path, session_cache: Cache, size: tuple[int, int], steps: int, scale: float) -> None:
    """A batch of two in a few steps, with guidance as an input."""
    call = {"width": size[0], "height": size[1], "guidance_scale": scale}
    angles = {} if steps == 2 else {"intermediate_timesteps": None}
    wanted = theirs(
        sprint, prompt=[PROMPT, LONG], steps=steps, seeds=[3, 4], kind="SanaSprintPipeline", **call, **angles
    )
    agree(ours(sprint, session_cache)([PROMPT, LONG], steps=steps, seed=[3, 4], **call), wanted)


def test_sprint_says_what_cannot_be(sprint: Path, session_cache: Cache) -> None:
    with pytest.raises(InputError, match="guidance built in"):
        ours(sprint, session_cache)(PROMPT, negative_prompt="x", steps=1)
    for option in ({"guidance_rescale": 0.5}, {"guidance_stop": 0.5}):
        with pytest.raises(InputError, match="no effect") as raised:
            ours(sprint, session_cache)(PROMPT, **option, steps=1)
        assert "guidance built in" in str(raised.value)
    with pytest.raises(ConfigError, match="samples along angles"):
        ours(sprint, session_cache, scheduler=Use("flow-euler"))(PROMPT, width=16, height=16, steps=1)
    with pytest.raises(ModelError, match="Sana-Sprint makes pictures from text or a picture alone"):
        ours(sprint, session_cache, "inpainting")


@pytest.mark.parametrize(("strength", "steps"), [(0.6, 2), (0.5, 4)])
def test_sprint_from_a_picture(sprint: Path, session_cache: Cache, strength: float, steps: int) -> None:
    """A batch of two from one picture, whose first steps are left out."""
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(small).resize((40, 24), Image.Resampling.BICUBIC)
    call: dict[str, Any] = {"image": image, "strength": strength, "guidance_scale": 3.0}
    angles = {} if steps == 2 else {"intermediate_timesteps": None}
    wanted = theirs(
        sprint, prompt=[PROMPT, LONG], steps=steps, seeds=[3, 4], kind="SanaSprintImg2ImgPipeline", width=40, height=24,
        **call, **angles,
    )  # fmt: skip
    pipe = ours(sprint, session_cache, "image-to-image")
    agree(pipe([PROMPT, LONG], steps=steps, seed=[3, 4], **call), wanted)


@pytest.mark.parametrize(("width", "height"), [(33, 31), (50, 20), (13, 40)])
def test_resolution_binning(
    folder: Path, session_cache: Cache, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    """The list of sizes is that of 512 pixels, a sixteenth of them, since this autoencoder makes few of many pixels."""
    from diffusers.pipelines.sana import pipeline_sana as original

    sizes = {ratio: [side / 16 for side in sides] for ratio, sides in original.ASPECT_RATIO_512_BIN.items()}
    monkeypatch.setattr(original, "ASPECT_RATIO_512_BIN", sizes)
    monkeypatch.setattr(sana, "_BINS", {16: 32})
    call: dict[str, Any] = {"width": width, "height": height, "guidance_scale": 2.0}
    wanted = theirs(folder, prompt=PROMPT, steps=2, seeds=[3], use_resolution_binning=True, **call)
    made = ours(folder, session_cache, input={"resolution_binning": True})(PROMPT, steps=2, seed=3, **call)
    agree(made, wanted)
    assert made.images[0].size == (width, height)
    assert (made.provenance["inputs"]["width"], made.provenance["inputs"]["resolution_binning"]) == (width, True)


def test_lists_of_sizes_are_those_of_diffusers() -> None:
    from diffusers.image_processor import PixArtImageProcessor
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha, pipeline_pixart_sigma
    from diffusers.pipelines.sana import pipeline_sana

    lists = {
        256: pipeline_pixart_alpha.ASPECT_RATIO_256_BIN, 512: pipeline_pixart_alpha.ASPECT_RATIO_512_BIN,
        1024: pipeline_pixart_alpha.ASPECT_RATIO_1024_BIN, 2048: pipeline_pixart_sigma.ASPECT_RATIO_2048_BIN,
        4096: pipeline_sana.ASPECT_RATIO_4096_BIN,
    }  # fmt: skip
    for side, ratios in lists.items():
        for width in range(100, 4000, 37):
            wanted = PixArtImageProcessor.classify_height_width_bin(1000, width, ratios)
            assert bins.binned(width, 1000, side) == wanted[::-1]


def test_words_that_the_text_encoder_does_not_know(folder: Path) -> None:
    """A graph would take any states for them; transformers' encoder fails."""
    path = folder / "tokenizer/tokenizer.json"
    assets = {"tokenizer/tokenizer.json": path.read_bytes()}
    ids, _ = SequenceTokenizer(assets, "tokenizer").cut(LONG, 50)
    largest = int(ids.max())
    np.testing.assert_array_equal(SequenceTokenizer(assets, "tokenizer", largest + 1).cut(LONG, 50)[0], ids)
    with pytest.raises(ModelError, match=f"its word {largest} is not one of the {largest} that the text encoder knows"):
        SequenceTokenizer(assets, "tokenizer", largest).cut(LONG, 50)
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<no>"}
    broken = json.dumps({**json.loads(path.read_text()), "model": model}).encode()
    with pytest.raises(ModelError, match="tokenizer.json cannot read a text"):
        SequenceTokenizer({"tokenizer/tokenizer.json": broken}, "tokenizer").cut(LONG, 50)


def test_low_memory_previews_and_latents(folder: Path, session_cache: Cache) -> None:
    seen: list[Any] = []
    call: dict[str, Any] = {"steps": 2, "seed": 1, "width": 24, "height": 16}
    pipe = ours(folder, session_cache, Use("text-to-image", low_memory=True))
    first = pipe(PROMPT, **call, progress=lambda moment: seen.append(moment.preview and moment.preview()))
    assert {image.size for images in seen if images for image in images} == {(24, 16)}
    noise = BatchGenerator([1]).randn((1, 4, 8, 12))
    np.testing.assert_array_equal(pipe(PROMPT, **call, latents=noise).latents, first.latents)


def test_what_cannot_be_is_said(folder: Path, session_cache: Cache) -> None:
    with pytest.raises(InputError, match="25 is not a multiple of 2"):
        ours(folder, session_cache)(PROMPT, width=25, steps=1)
    for task in ("image-to-image", "inpainting"):
        with pytest.raises(ModelError, match="from text alone"):
            ours(folder, session_cache, task)


def test_an_encoder_of_lumina_is_refused(folder: Path, session_cache: Cache, tmp_path: Path) -> None:
    """Its Gemma 2 lacks the last layer; one that is converted by itself gives what either takes."""
    lumina = maker("test_lumina2").make_lumina2_pipeline(tmp_path / "lumina")
    whole = ovforge.open_model(lumina, options={"weights": "f32"}, cache=session_cache)
    whole.save(tmp_path / "converted")
    load = {"weights": "f32", "parts": {"text_encoder": str(tmp_path / "converted")}}
    pipe = ovforge.Pipeline(
        "text-to-image", source=folder, load=load, device=Use("cpu", precision="f32"), cache=session_cache
    )
    with pytest.raises(
        ModelError, match=r"no output 'last_hidden_state'\n.*hidden_states\.\d, which another pipeline takes"
    ):
        pipe(PROMPT, steps=1, seed=1, width=16, height=16)
