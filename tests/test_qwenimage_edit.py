"""Qwen-Image-Edit: what Qwen2.5-VL sees and reads against transformers, and whole pipelines against diffusers."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families import agree, maker, seeded
from families import pipeline as ours
from ovforge import Use
from ovforge.errors import InputError, ModelError
from ovforge.model.sources import FileSource
from ovforge.store.cache import Cache
from ovforge_diffusers.loader import DiffusersLoader
from ovforge_diffusers.options import LoaderOptions
from ovforge_diffusion.architectures import qwenimage_edit
from ovforge_diffusion.vision import PictureProcessor, VisionEncoder, token_places

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")

PROMPT = "let the cat wear a hat"
PICTURE = "<|image_pad|>"
SETTINGS = {
    "min_pixels": 56 * 56,
    "max_pixels": 112 * 140,
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.3, 0.2, 0.25],
}
KINDS = {"one": "QwenImageEditPipeline", "several": "QwenImageEditPlusPipeline"}
MASKED = "QwenImageEditInpaintPipeline"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the folder of a model that sees one picture, or several (as 2511)."""
    made = {}
    for name, kind in KINDS.items():
        target = tmp_path_factory.mktemp("edit") / name
        made[name] = maker("test_qwenimage").make_qwenimage_pipeline(target, kind=kind, zero_cond_t=name == "several")
        index = json.loads((target / "model_index.json").read_text())
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        (target / "model_index.json").write_text(json.dumps(index))
        (target / "processor").mkdir()
        (target / "processor/preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return made.__getitem__


class Processor:
    """transformers' Qwen2_5_VLProcessor without videos, which need torchvision."""

    def __init__(self, source: Path) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.pictures = Qwen2VLImageProcessorPil(**SETTINGS)
        self.tokenizer = transformers.Qwen2Tokenizer.from_pretrained(source / "tokenizer", local_files_only=True)

    def __call__(self, text: list[str], images: Any, **_: Any) -> Any:
        given = images if isinstance(images, list) else [images]
        seen = self.pictures(given * len(text), return_tensors="pt")
        counts = [int(grid.prod()) // 4 for grid in seen["image_grid_thw"][: len(given)]]
        whole = []
        for each in text:
            for count in counts:
                each = each.replace(PICTURE, "\0" * count, 1)
            whole.append(each.replace("\0", PICTURE))
        read = self.tokenizer(whole, padding=True, return_tensors="pt")
        kinds = (read["input_ids"] == self.tokenizer.convert_tokens_to_ids(PICTURE)).int()
        return transformers.BatchFeature({**read, **seen, "mm_token_type_ids": kinds})


def text_encoder(source: Path) -> Any:
    """Return transformers' model, told which tokens are a picture's even if diffusers does not pass it on."""
    module = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(source / "text_encoder").eval()
    run = module.forward

    def forward(input_ids: Any = None, image_grid_thw: Any = None, **given: Any) -> Any:
        kinds = (input_ids == module.config.image_token_id).int()
        given["mm_token_type_ids"] = kinds
        return run(input_ids=input_ids, image_grid_thw=image_grid_thw, **given)

    module.forward = forward
    return module


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(100, 70), (30, 40), (300, 500), (56, 112)])
def test_pictures_are_cut_as_transformers_cuts_them(folder: Callable[[str], Path], size: tuple[int, int]) -> None:
    """Of sizes within the bounds, below and above them."""
    config = json.loads((folder("one") / "text_encoder/config.json").read_text())
    processor = PictureProcessor.of({"processor/preprocessor_config.json": json.dumps(SETTINGS).encode()}, config)
    patches = processor.cut(picture(*size))
    wanted = Processor(folder("one")).pictures([picture(*size)], return_tensors="np")
    _, high, wide = wanted["image_grid_thw"][0]
    assert patches.grid == (high // 2, wide // 2)
    tokens = patches.pixels.reshape(-1, 4, patches.pixels.shape[-1])[patches.order]
    difference = np.abs(tokens.reshape(-1, tokens.shape[-1]) - wanted["pixel_values"])
    assert difference.max() <= 1 / 255 / 0.2 + 1e-6
    assert patches.mask.sum() == high * wide


def test_states_of_pictures_and_text(folder: Callable[[str], Path]) -> None:
    """Windows that are whole and that are filled up, several pictures, and text before, between and behind them."""
    source = folder("several")
    bundle = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(source))
    module = text_encoder(source)
    processor = PictureProcessor.of(bundle.assets, bundle.configs["text_encoder"])
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    vision = VisionEncoder(ov.Core().compile_model(bundle.models["vision_encoder"], "CPU", exact), "vision_encoder")
    read = ov.Core().compile_model(bundle.models["text_encoder"], "CPU", exact)
    images = [picture(140, 84), picture(56, 112, 1)]
    theirs = Processor(source)
    text = f"a b{PICTURE}c d{PICTURE} e"
    inputs = theirs([text], images)
    with torch.no_grad():
        seen = module.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        wanted = module(**inputs, output_hidden_states=True).hidden_states[-1]
    patches = [processor.cut(image) for image in images]
    mine = np.concatenate([vision(each) for each in patches])
    assert np.abs(mine - seen.numpy()).max() <= 1e-4 * seen.abs().max()
    ids = inputs["input_ids"].numpy()
    token = module.config.image_token_id
    places = token_places(ids[0], token, [each.grid for each in patches])[:, None]
    expected, _ = module.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    np.testing.assert_array_equal(places, expected.numpy())
    visual = np.zeros((1, ids.shape[1], mine.shape[1]), np.float32)
    visual[0, ids[0] == token] = mine
    given = {
        "input_ids": ids, "attention_mask": inputs["attention_mask"].numpy(), "position_ids": places,
        "visual_states": visual,
    }  # fmt: skip
    states = read(given)["last_hidden_state"]
    assert np.abs(states - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both make pictures of 96 x 96 pixels instead of a megapixel, and show Qwen2.5-VL 64 x 64 of several."""
    for name in ("edit", "edit_plus", "edit_inpaint"):
        code = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{name}")
        own = code.calculate_dimensions
        monkeypatch.setattr(
            code, "calculate_dimensions",
            lambda area, ratio, own=own: own(96 * 96 if area == 1024 * 1024 else 64 * 64, ratio),
        )  # fmt: skip
    monkeypatch.setattr(qwenimage_edit, "_AREA", 96 * 96)
    monkeypatch.setattr(qwenimage_edit, "_SMALL_AREA", 64 * 64)


def theirs(source: Path, kind: str, *, steps: int, seeds: list[int], **call: Any) -> list[Image.Image]:
    pipe = getattr(diffusers, MASKED if "mask_image" in call else KINDS[kind])(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(source / "scheduler"),
        vae=diffusers.AutoencoderKLQwenImage.from_pretrained(source / "vae"),
        text_encoder=text_encoder(source),
        tokenizer=None,
        processor=Processor(source),
        transformer=diffusers.QwenImageTransformer2DModel.from_pretrained(source / "transformer"),
    )
    pipe.set_progress_bar_config(disable=True)
    made: list[Image.Image] = pipe(**call, num_inference_steps=steps, generator=seeded(seeds)).images
    return made


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "images", "call"),
    [
        ("one", [(100, 60)], {"negative_prompt": " "}),
        ("one", [(64, 90)], {"width": 40, "height": 24}),
        ("several", [(70, 66)], {"negative_prompt": "blue", "true_cfg_scale": 2.0}),
        ("several", [(64, 90), (131, 70)], {"width": 24, "height": 40}),
    ],
)
def test_edited_pictures(
    folder: Callable[[str], Path],
    session_cache: Cache,
    small: None,
    kind: str,
    images: list[tuple[int, int]],
    call: dict[str, Any],
) -> None:
    given = [picture(*size, seed) for seed, size in enumerate(images)]
    shown = given[0] if kind == "one" else list(given)
    wanted = theirs(folder(kind), kind, image=shown, prompt=PROMPT, steps=2, seeds=[5], **call)
    pipe = ours(folder(kind), session_cache, Use("image-to-image", low_memory=kind == "several"))
    agree(pipe(PROMPT, image=given, steps=2, seed=5, **call), wanted)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting(folder: Callable[[str], Path], session_cache: Cache, small: None, strength: float) -> None:
    """It sees the picture, too, and paints in one of the size that it is trained on."""
    hole = np.zeros((60, 100), np.uint8)
    hole[20:41, 10:50] = 255
    image, mask = picture(100, 60), Image.fromarray(hole)
    call: dict[str, Any] = {"image": image, "strength": strength, "negative_prompt": " ", "true_cfg_scale": 2.0}
    wanted = theirs(folder("one"), "one", mask_image=mask, prompt=PROMPT, steps=4, seeds=[5], **call)
    agree(ours(folder("one"), session_cache, "inpainting")(PROMPT, mask=mask, steps=4, seed=5, **call), wanted)


def test_inpainting_in_a_part(folder: Callable[[str], Path], session_cache: Cache, small: None) -> None:
    """The transformer sees the part, and Qwen2.5-VL the whole picture."""
    hole = np.zeros((96, 96), np.uint8)
    hole[20:41, 10:50] = 255
    image, mask = picture(96, 96), Image.fromarray(hole)
    call: dict[str, Any] = {"image": image, "negative_prompt": " ", "true_cfg_scale": 2.0, "padding_mask_crop": 8}
    wanted = theirs(folder("one"), "one", mask_image=mask, prompt=PROMPT, steps=4, seeds=[5], strength=0.7, **call)
    made = ours(folder("one"), session_cache, "inpainting")(PROMPT, mask=mask, steps=4, seed=5, strength=0.7, **call)
    agree(made, wanted)


@pytest.fixture(scope="module")
def held_out(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with the numbers of diffusers' own tests: two heads of 8, no layer that sees a whole picture."""
    source = Path(shutil.copytree(folder("one"), tmp_path_factory.mktemp("held-out") / "pipeline"))
    known = json.loads((source / "text_encoder/config.json").read_text())
    ids = {name: value for name, value in known.items() if name.endswith("_token_id")}
    words = transformers.AutoConfig.from_pretrained(source / "text_encoder").get_text_config().vocab_size
    narrow = {"hidden_size": 16, "intermediate_size": 16}
    text = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": words, **narrow}
    text["rope_parameters"] = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 16, **narrow}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    parts = {
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "transformer": diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        ),
    }  # fmt: skip
    for name, part in parts.items():
        maker("test_zimage").noise(part).save_pretrained(source / name)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(source / "scheduler")
    return source


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_by_a_held_out_model(held_out: Path, session_cache: Cache, small: None, strength: float) -> None:
    hole = np.zeros((60, 100), np.uint8)
    hole[20:41, 10:50] = 255
    call: dict[str, Any] = {"image": picture(100, 60), "strength": strength, "sigmas": [1.0, 0.6, 0.2]}
    call |= {"negative_prompt": "bad quality", "true_cfg_scale": 2.0}
    mask = Image.fromarray(hole)
    wanted = theirs(held_out, "one", mask_image=mask, prompt="dance monkey", steps=3, seeds=[5], **call)
    pipe = ours(held_out, session_cache, "inpainting")
    agree(pipe("dance monkey", mask=mask, seed=5, **call), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_pixels": 2**40, "max_pixels": 2**41}, "pixels at most"),
        ({"image_std": [0.0, 1.0, 1.0]}, "must not be zero"),
        ({"image_mean": [0.5]}, "cannot be used"),
        ({"size": 7}, "cannot be used"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        PictureProcessor.of({"processor/preprocessor_config.json": json.dumps(settings).encode()}, {})


def test_a_megapixel_and_what_cannot_be(folder: Callable[[str], Path], session_cache: Cache, tmp_path: Path) -> None:
    code = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    for width, height in ((1500, 1001), (64, 90), (4000, 300)):
        for area in (1024 * 1024, 384 * 384):
            size = qwenimage_edit._size(Image.new("RGB", (width, height)), area)
            assert size == code.calculate_dimensions(area, width / height)
    pipe = ours(folder("one"), session_cache, "image-to-image")
    for inputs, message in (
        ({"image": [picture(40, 40)] * 2}, "Qwen-Image-Edit sees one"),
        ({"image": picture(2000, 3)}, "sides"),
        ({"image": picture(40, 40), "strength": 0.5}, "sees the whole picture"),
        ({"image": picture(40, 40), "negative_prompt": f"x{PICTURE}"}, "stands for a picture"),
        ({}, "no picture to edit"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(PROMPT, steps=2, width=16, height=16, **inputs)
    with pytest.raises(ModelError, match="from a picture or a masked picture alone"):
        ours(folder("one"), session_cache)(PROMPT, steps=2)
    with pytest.raises(ModelError, match="changes pictures as a whole"):
        ours(folder("several"), session_cache, "inpainting")(PROMPT, image=picture(9, 9), mask=picture(9, 9), steps=2)
    strange = shutil.copytree(folder("one"), tmp_path / "strange")
    path = strange / "text_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token_id": 3}))
    with pytest.raises(ModelError, match="its image_token_id is 3"):
        ours(strange, session_cache, "image-to-image")(PROMPT, image=picture(40, 40), steps=2)
