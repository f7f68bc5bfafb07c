"""The model that ships: its size, its files, and its pictures against diffusers on torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import ovforge
import ovforge_lcm
from ovforge import Use
from ovforge.cli import app
from ovforge.errors import OvforgeError

MODEL = Path(ovforge_lcm.__file__).parent / "model"
TINY = "package:ovforge_lcm/tiny_decoder"
WEIGHTS = Path(__file__).parent / "data" / "embedded-diffusers"
LIMIT = 25_000_000


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_is_small_and_brings_its_card_and_notice() -> None:
    assert size(MODEL) <= LIMIT
    assert size(WEIGHTS) <= LIMIT
    assert {"README.md", "NOTICE", "model_index.json"} <= {path.name for path in MODEL.iterdir()}


def test_it_proposes_its_own_defaults() -> None:
    defaults = json.loads((MODEL / "ovforge.json").read_text())["defaults"]
    result = ovforge.Pipeline("text-to-image", source=ovforge_lcm.EMBEDDED_MODEL)("a cat", seed=1)
    assert result.provenance["inputs"]["steps"] == defaults["steps"]
    assert result.provenance["inputs"]["guidance_scale"] == defaults["guidance_scale"]
    assert result.images[0].size == (128, 128)


@pytest.mark.parametrize(("width", "height"), [(128, 128), (160, 104)])
def test_pictures_equal_diffusers(width: int, height: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.LatentConsistencyModelPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    device = ovforge.Use("cpu", precision="f32")
    pipeline = ovforge.Pipeline("text-to-image", source=ovforge_lcm.EMBEDDED_MODEL, device=device)
    for prompt, seed in (("a beautiful pink unicorn, 8k", 1234567), ("a red car on a blue background", 7)):
        options = {"width": width, "height": height, "guidance_scale": 3.0}
        generator = torch.Generator().manual_seed(seed)
        theirs = reference(prompt, num_inference_steps=4, generator=generator, **options).images[0]
        ours = pipeline(prompt, steps=4, seed=seed, **options).images[0]
        difference = np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16))
        assert difference.max() <= 2
        assert difference.mean() <= 0.2


def test_the_tiny_decoder_makes_pictures_and_previews_much_like_the_models_own() -> None:
    plain, tiny, previewing = (
        ovforge.Pipeline(
            "text-to-image", source=ovforge_lcm.EMBEDDED_MODEL, load={"parts": parts} if parts else {},
            device=Use("cpu", precision="f32"),
        )
        for parts in ({}, {"vae_decoder": TINY}, {"preview_decoder": TINY})
    )  # fmt: skip
    scores, seen = [], []
    for seed, prompt in enumerate(
        ("a red car on a blue background", "a cute cat", "a green frog on a pink background")
    ):
        wanted, made = plain(prompt, seed=seed), tiny(prompt, seed=seed)
        np.testing.assert_array_equal(wanted.latents, made.latents)
        scores.append(made.compare(wanted, "ssim"))
        seen.clear()
        shown = previewing(prompt, seed=seed, progress=lambda moment: seen.append(moment.preview and moment.preview()))
        np.testing.assert_array_equal(np.asarray(shown.images[0]), np.asarray(wanted.images[0]))
        previews = [images[0] for images in seen if images]
        np.testing.assert_allclose(np.asarray(previews[-1], int), np.asarray(made.images[0], int), atol=1)
    assert np.mean(scores) > 0.9


@pytest.mark.parametrize("role", ["unet", "text_encoder", "tokenizer", "vae_decoder"])
def test_a_part_brings_what_lies_beside_it(role: str, tmp_path: Path) -> None:
    """The folder of one model, as a part of another pipeline whose own says something else."""
    other = tmp_path / "model"
    shutil.copytree(MODEL, other)
    if role == "tokenizer":
        for name in ("tokenizer.json", "vocab.json"):
            (other / role / name).unlink()
    else:
        (other / role / "config.json").write_text("{}")
    part = {"parts": {role: f"{ovforge_lcm.EMBEDDED_MODEL}/{role}"}}
    call: dict[str, Any] = {"prompt": "a red car", "steps": 2, "seed": 3, "width": 64, "height": 64}
    plain, made = (
        ovforge.Pipeline("text-to-image", source=source, load=load, device=Use("cpu", precision="f32"))(**call)
        for source, load in ((MODEL, {}), (other, part))
    )
    assert (made.compare(plain, "ssim"), made.warnings) == (1.0, plain.warnings)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"vae_decodr": TINY},
            "load.parts: the task 'text-to-image' has no role 'vae_decodr'. Did you mean 'vae_decoder'?",
        ),
        (
            {"vae_decoder": f"{ovforge_lcm.EMBEDDED_MODEL}/unet"},
            "vae_decoder/config.json: it is a UNet2DConditionModel",
        ),
        ({"preview_decoder": "wide"}, "preview_decoder/config.json: it has latents of 16 channels, and the model's"),
    ],
)
def test_a_part_that_cannot_be_is_refused_before_a_run(
    parts: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODEL / "vae_decoder", "wide")
    config = json.loads(Path("wide/config.json").read_text())
    Path("wide/config.json").write_text(json.dumps({**config, "latent_channels": 16}))
    with pytest.raises(OvforgeError) as raised:
        ovforge.Pipeline("text-to-image", source=ovforge_lcm.EMBEDDED_MODEL, load={"parts": parts})
    assert message in str(raised.value)


def test_the_embedded_model_draws_the_same_in_int8() -> None:
    """The recipe in a config, calibrated by the pipeline itself: half the bytes, pictures close to those of float32."""
    pytest.importorskip("ovforge_nncf")
    options: dict[str, Any] = {
        "source": ovforge_lcm.EMBEDDED_MODEL,
        "cache": None,
        "device": Use("cpu", precision="f32"),
    }
    plain = ovforge.Pipeline("text-to-image", **options)
    small = ovforge.Pipeline(
        "text-to-image", quantize=[Use("lcm-int8", subset_size=6)], calibration={"samples": 6, "runs": 2}, **options
    )
    report = next(report for report in small.reports if report.sizes)
    before, after = report.sizes["unet"]
    assert after < 0.55 * before
    assert report.roles == ("unet",)
    assert not any("time_emb" in name for name in report.layers["unet"])
    assert any("in ignored_scope" in note for note in report.notes)
    expected, found = (
        np.asarray(pipe("a beautiful pink unicorn, 8k", seed=1234567, steps=4).images[0], np.float32)
        for pipe in (plain, small)
    )
    assert 0 < np.abs(expected - found).mean() < 6


def test_one_command_makes_a_picture(tmp_path: Path) -> None:
    from PIL import Image

    target = tmp_path / "car.png"
    command = [
        "lcm",
        "a red car on a blue background",
        "-o",
        str(target),
        "-s",
        "7",
        "--steps",
        "2",
        "--precision",
        "f32",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert str(target) in done.stdout
    pipe = ovforge.Pipeline("text-to-image", source=ovforge_lcm.EMBEDDED_MODEL, device=Use("cpu", precision="f32"))
    wanted = pipe("a red car on a blue background", seed=7, steps=2).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(target)), np.asarray(wanted))
    done = CliRunner().invoke(app, ["lcm", "-o", str(tmp_path / "nowhere" / "a.png")])
    assert done.exit_code and "no such folder" in str(done.exception)
