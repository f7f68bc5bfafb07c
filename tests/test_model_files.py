"""Files as ComfyUI keeps them, for diffusion transformers: whole pipelines of them against diffusers on torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovforge
from families import agree, maker, seeded
from ovforge import Use
from ovforge.errors import ModelError
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
gguf = pytest.importorskip("gguf")
pytest.importorskip("ovforge_diffusers")

from safetensors.torch import load_file, save_file  # noqa: E402

NAMES, FILES = maker("foreign_names"), maker("test_transformer_files")
PROMPT = "a beautiful pink unicorn, 8k"
Tensors = dict[str, Any]
SIZE = {"width": 32, "height": 16}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*brings no tokenizer", "ignore:.*does not say whether it is", "ignore:.*text_projection is left out"
)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def state(folder: Path) -> Tensors:
    [file] = folder.glob("*.safetensors")
    read: Tensors = load_file(file)
    return read


def save(tensors: Tensors, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def round_parts(folder: Path) -> None:
    """Round what goes into a pipeline as parts to float16, which is how parts are stored: they have no options."""
    for component in ("text_encoder", "vae"):
        [file] = (folder / component).glob("*.safetensors")
        save({name: each.half().float() for name, each in state(folder / component).items()}, file)


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def join(tensors: list[Any]) -> Any:
    return torch.cat(tensors)


def by_rule(folder: Path) -> Path:
    """Give text encoders what cannot be told from shapes as the published models have it; their weights stay."""
    for number, encoder in enumerate(("text_encoder", "text_encoder_2", "text_encoder_3")):
        if not (folder / encoder).is_dir():
            continue
        config = json.loads((folder / encoder / "config.json").read_text())
        if "CLIP" in config["architectures"][0]:
            edit(folder / encoder / "config.json", num_attention_heads=1, hidden_act="gelu" if number else "quick_gelu")
        elif config["architectures"] == ["T5EncoderModel"]:
            edit(folder / encoder / "config.json", relative_attention_max_distance=128)
        elif "Qwen3" in config["architectures"][0]:
            edit(folder / encoder / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    return folder


def write_scheduler(folder: Path, **facts: Any) -> None:
    """Give a pipeline the published noise schedule, which a file does not hold."""
    diffusers.FlowMatchEulerDiscreteScheduler(**facts).save_pretrained(folder / "scheduler")


def theirs(folder: Path, kind: str, *without: str, **call: Any) -> Any:
    pipe = getattr(diffusers, kind).from_pretrained(folder, **dict.fromkeys(without))
    pipe.set_progress_bar_config(disable=True)
    if kind == "Lumina2Pipeline":
        pipe.vae_scale_factor = 2  # which the pipeline takes for 8, as of the published model
    return pipe(prompt=PROMPT, num_inference_steps=3, generator=seeded([3]), **SIZE, **call).images


def ours(source: Path, cache: Cache, parts: dict[str, Path] | None = None, **call: Any) -> Any:
    options = call.pop("options", {})
    load = {"weights": "f32", **options, "parts": {role: str(path) for role, path in (parts or {}).items()}}
    device = Use("cpu", precision="f32")
    pipe = ovforge.Pipeline("text-to-image", source=source, load=load, device=device, cache=cache, input=dict(SIZE))
    return pipe(PROMPT, steps=3, seed=3, **call)


@pytest.fixture(scope="module")
def flux(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "folder"
    small = maker("test_transformers")
    small.make_transformer_pipeline(folder, torch_lcm, "flux", attention_head_dim=32, axes_dims_rope=(4, 14, 14))
    edit(folder / "vae/config.json", scaling_factor=0.3611, shift_factor=0.1159)
    write_scheduler(folder, shift=3.0, use_dynamic_shifting=True)
    return by_rule(folder)


@pytest.fixture(scope="module")
def sd3(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "folder"
    small = maker("test_transformers")
    small.make_transformer_pipeline(
        folder, torch_lcm, "sd3", attention_head_dim=32, caption_projection_dim=64, dual_attention_layers=(0, 1),
        pos_embed_max_size=64,
    )  # fmt: skip
    first = state(folder / "text_encoder")  # what CLIP-L pools is taken as it is: in the folder by a projection of ones
    save({**first, "text_projection.weight": torch.eye(24)}, folder / "text_encoder/model.safetensors")
    edit(folder / "tokenizer_2/tokenizer_config.json", pad_token="!")
    return by_rule(folder)


def texts_of(folder: Path, encoders: dict[str, str]) -> Tensors:
    """Return text encoders as ComfyUI keeps them in a checkpoint, by their names there."""
    made: Tensors = {}
    for encoder, name in encoders.items():
        tensors = state(folder / encoder)
        tensors = NAMES.clip_text(tensors) if "clip" in name else tensors
        made |= prefixed(f"text_encoders.{name}.transformer.", tensors)
        made[f"text_encoders.{name}.logit_scale"] = torch.zeros(())
    return made


FLUX_CALL = {"guidance_scale": 2.5}


def flux_checkpoint(folder: Path) -> Tensors:
    transformer = FILES.to_original("flux", state(folder / "transformer"))
    vae = NAMES.vae_to_original(state(folder / "vae"), 2)
    return {
        **prefixed("model.diffusion_model.", transformer), **prefixed("vae.", vae),
        **texts_of(folder, {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"}),
        "text_encoders.clip_l.transformer.text_projection.weight": torch.eye(24),
    }  # fmt: skip


def test_comfyuis_checkpoint_of_flux(flux: Path, tmp_path: Path, session_cache: Cache) -> None:
    """One file and a folder of tokenizers: flux1-dev-fp8.safetensors, here in float32."""
    file = save(flux_checkpoint(flux), tmp_path / "flux1-dev.safetensors")
    made = ours(file, session_cache, options={"tokenizer": str(flux)}, **FLUX_CALL)
    agree(made, theirs(flux, "FluxPipeline", **FLUX_CALL))
    parts = {"tokenizer": flux / "tokenizer", "tokenizer_2": flux / "tokenizer_2"}
    with pytest.warns(UserWarning, match=r"brings no tokenizer_2.*\[load.parts\] tokenizer_2 = FOLDER"):
        again = ours(file, session_cache, parts, **FLUX_CALL)
    np.testing.assert_allclose(again.latents, made.latents, atol=1e-5)
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as caught:
        ours(file, session_cache, {"tokenizer": flux / "tokenizer"}, **FLUX_CALL)
    assert "[load.parts] tokenizer_2 = FOLDER" in str(caught.value)


def test_comfyuis_checkpoint_of_flux_in_float8(flux: Path, tmp_path: Path, session_cache: Cache) -> None:
    """All of it rounded, as ComfyUI publishes it: the picture is that of a folder with the rounded values."""
    copy = Path(shutil.copytree(flux, tmp_path / "copy"))
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        [file] = (copy / part).glob("*.safetensors")
        save({n: t.to(torch.float8_e4m3fn).float() for n, t in load_file(file).items()}, file)
    eight = {n: t if n.startswith("vae.") else t.to(torch.float8_e4m3fn) for n, t in flux_checkpoint(flux).items()}
    file = save(eight, tmp_path / "flux1-dev-fp8.safetensors")
    made = ours(file, session_cache, options={"tokenizer": str(flux)}, **FLUX_CALL)
    agree(made, theirs(copy, "FluxPipeline", **FLUX_CALL))


def test_the_files_of_a_comfyui_folder_for_flux(flux: Path, tmp_path: Path, session_cache: Cache) -> None:
    """A transformer, two text encoders, an autoencoder, each in its file; T5 also as GGUF."""
    models = tmp_path / "models"
    transformer = save(
        FILES.to_original("flux", state(flux / "transformer")), models / "diffusion_models/flux1-dev.safetensors"
    )
    clip = {n: t for n, t in NAMES.clip_text(state(flux / "text_encoder")).items() if "projection" not in n}
    ae = save(NAMES.vae_to_original(state(flux / "vae"), 2), models / "vae/ae.safetensors")
    parts = {
        "text_encoder": save(clip, models / "text_encoders/clip_l.safetensors"),
        "text_encoder_2": save(state(flux / "text_encoder_2"), models / "text_encoders/t5xxl_fp16.safetensors"),
        "vae_encoder": ae, "vae_decoder": ae, "tokenizer": flux / "tokenizer", "tokenizer_2": flux / "tokenizer_2",
    }  # fmt: skip
    wanted = theirs(flux, "FluxPipeline", **FLUX_CALL)
    agree(ours(transformer, session_cache, parts, **FLUX_CALL), wanted)
    writer = gguf.GGUFWriter(models / "t5.gguf", "t5encoder")
    for name, tensor in NAMES.t5_llama(state(flux / "text_encoder_2")).items():
        writer.add_tensor(name, tensor.numpy())
    words = maker("test_text_encoder_files")
    words.t5_words(writer, flux / "tokenizer_2", rows=640, charsmap=None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts |= {"text_encoder_2": models / "t5.gguf", "tokenizer_2": models / "t5.gguf"}
    agree(ours(transformer, session_cache, parts, **FLUX_CALL), wanted)


@pytest.mark.parametrize("with_t5", [False, True])
def test_stable_diffusion_3_with_its_text_encoders(
    sd3: Path, tmp_path: Path, session_cache: Cache, with_t5: bool
) -> None:
    """sd3_medium_incl_clips.safetensors, and the one with T5."""
    encoders = {
        "text_encoder": "clip_l",
        "text_encoder_2": "clip_g",
        **({"text_encoder_3": "t5xxl"} if with_t5 else {}),
    }
    tensors = {
        **prefixed("model.diffusion_model.", FILES.to_original("sd3", state(sd3 / "transformer"))),
        **prefixed("first_stage_model.", NAMES.vae_to_original(state(sd3 / "vae"), 2)), **texts_of(sd3, encoders),
    }  # fmt: skip
    file = save(tensors, tmp_path / "sd3_medium_incl_clips.safetensors")
    made = ours(file, session_cache, options={"tokenizer": str(sd3)}, guidance_scale=3.0)
    without = [] if with_t5 else ["text_encoder_3", "tokenizer_3"]
    agree(made, theirs(sd3, "StableDiffusion3Pipeline", *without, guidance_scale=3.0))


def test_the_autoencoder_of_sixteen_channels_is_scaled_as_the_transformer_has_it(
    sd3: Path, tmp_path: Path, session_cache: Cache
) -> None:
    """The same file beside Stable Diffusion 3, whose factors differ from those of FLUX.1."""
    file = save(NAMES.vae_to_original(state(sd3 / "vae"), 2), tmp_path / "sd3_vae.safetensors")
    made = ours(sd3, session_cache, {"vae_encoder": file, "vae_decoder": file}, guidance_scale=3.0)
    agree(made, theirs(sd3, "StableDiffusion3Pipeline", guidance_scale=3.0))


# -- the other families, a file for each part ------------------------------------------------------------------------------

Make = Callable[[Path], Path]


def zimage(folder: Path) -> tuple[Path, dict[str, Any]]:
    by_rule(maker("test_zimage").make_zimage_pipeline(folder))
    round_parts(folder)
    return folder, {
        "pipeline": "ZImagePipeline", "call": {"guidance_scale": 2.0}, "vae": NAMES.vae_to_original(state(folder / "vae"), 2),
        "transformer": NAMES.streams(state(folder / "transformer"), join, NAMES.ZIMAGE), "level": "model.",
    }  # fmt: skip


def flux2(folder: Path) -> tuple[Path, dict[str, Any]]:
    by_rule(maker("test_flux2").make_flux2_pipeline(folder))
    round_parts(folder)
    write_scheduler(folder, shift=3.0, use_dynamic_shifting=True, time_shift_type="exponential")
    return folder, {
        "pipeline": "Flux2KleinPipeline", "call": {"guidance_scale": 2.0}, "vae": NAMES.flux2_vae(state(folder / "vae"), 2),
        "transformer": NAMES.flux2(state(folder / "transformer"), join), "level": "",
    }  # fmt: skip


def lumina2(folder: Path) -> tuple[Path, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    small = maker("test_lumina2")
    small.make_lumina2_pipeline(folder)
    torch.manual_seed(5)
    words = json.loads((folder / "text_encoder/config.json").read_text())["vocab_size"]
    config = transformers.Gemma2Config(  # whose heads have the width of all published ones
        vocab_size=words, hidden_size=small.WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    transformers.Gemma2Model(config).save_pretrained(folder / "text_encoder")
    round_parts(folder)
    return folder, {
        "pipeline": "Lumina2Pipeline", "call": {"guidance_scale": 2.0}, "vae": NAMES.vae_to_original(state(folder / "vae"), 2),
        "transformer": NAMES.streams(state(folder / "transformer"), join, NAMES.LUMINA2), "level": "model.",
    }  # fmt: skip


def qwenimage(folder: Path) -> tuple[Path, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    small = maker("test_qwenimage")
    small.VAE.update({"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]})
    small.WIDTH = 256
    small.SMALL.update({"joint_attention_dim": 256, "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)})
    small.make_qwenimage_pipeline(folder)
    torch.manual_seed(5)
    write_scheduler(
        folder, shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    words = json.loads((folder / "text_encoder/config.json").read_text())["text_config"]["vocab_size"]
    config = maker("test_text_encoder_files").qwen2_5_vl(vocab_size=words).config
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    round_parts(folder)
    return folder, {
        "pipeline": "QwenImagePipeline", "call": {"negative_prompt": "", "true_cfg_scale": 2.0}, "level": "",
        "vae": NAMES.wan_vae(state(folder / "vae")), "transformer": state(folder / "transformer"),
    }  # fmt: skip


@pytest.mark.parametrize("family", [zimage, flux2, lumina2, qwenimage])
def test_the_files_of_other_families(
    tmp_path: Path, session_cache: Cache, family: Callable[[Path], tuple[Path, dict[str, Any]]]
) -> None:
    """z_image_turbo, flux-2-klein-base-4b, lumina_2, qwen_image: a transformer, a text encoder, an autoencoder."""
    folder, facts = family(tmp_path / "folder")
    transformer = save(facts["transformer"], tmp_path / "klein-base.safetensors")
    text = save(prefixed(facts["level"], state(folder / "text_encoder")), tmp_path / "text.safetensors")
    vae = save(facts["vae"], tmp_path / "vae.safetensors")
    parts = {"text_encoder": text, "vae_encoder": vae, "vae_decoder": vae, "tokenizer": folder / "tokenizer"}
    call = facts["call"]
    made = ours(transformer, session_cache, parts, **call)
    agree(made, theirs(folder, facts["pipeline"], **call))
