"""Qwen-Image: its transformer, Qwen2.5-VL's states and the autoencoder for videos, converted folders against torch."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts.stages import Match
from ovforge.errors import ModelError
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")
tokenizers = pytest.importorskip("tokenizers")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

WIDTH, CHANNELS = 32, 16
SPECIAL = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
SMALL: dict[str, Any] = {
    "in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 3, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
VAE: dict[str, Any] = {
    "base_dim": 8, "z_dim": CHANNELS, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True],
}  # fmt: skip


def _zimage() -> Any:
    """Return the tests of Z-Image, which know how to train such a tokenizer."""
    spec = importlib.util.spec_from_file_location("small_zimage", Path(__file__).with_name("test_zimage.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_config(ids: dict[str, int], words: int) -> Any:
    """Return the config of a small Qwen2.5-VL whose windows are two merged tokens a side."""
    text = {
        "vocab_size": words, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": WIDTH,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def make_qwenimage_pipeline(folder: Path, *, kind: str = "QwenImagePipeline", **transformer: Any) -> Path:
    """Write a small pipeline with every kind of block, and weights that a fresh module has zero or one."""
    torch.manual_seed(0)
    small = _zimage()
    small.write_tokenizer(folder / "tokenizer")
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    qwen = transformers.Qwen2_5_VLForConditionalGeneration(text_config(ids, len(tokenizer)))
    small.noise(qwen).save_pretrained(folder / "text_encoder")
    small.noise(diffusers.QwenImageTransformer2DModel(**{**SMALL, **transformer})).save_pretrained(
        folder / "transformer"
    )
    small.noise(diffusers.AutoencoderKLQwenImage(**VAE)).save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
        time_shift_type="exponential",
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index: dict[str, Any] = {
        "_class_name": kind, "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"], "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwenimage_pipeline(tmp_path_factory.mktemp("qwenimage") / "torch")


@pytest.fixture(scope="module")
def bundle(folder: Path, opened: Callable[[Path], Any]) -> Any:
    return opened(folder)


def run(model: Any, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(model, "CPU", exact)
    result: np.ndarray = compiled(inputs)[name]
    return result


def close(ours: np.ndarray, theirs: Any, bound: float = 1e-4) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def batch(sizes: list[tuple[int, int]], lengths: list[int]) -> dict[str, np.ndarray]:
    """Return inputs for pictures of sizes in tokens, the latents first, and texts of different lengths."""
    rng = np.random.default_rng(sizes[0][0])
    rows, tokens = len(lengths), sum(high * wide for high, wide in sizes)
    return {
        "hidden_states": rng.standard_normal((rows, tokens, 4 * CHANNELS), np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, max(lengths), WIDTH), np.float32),
        "encoder_hidden_states_mask": (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64),
        "timestep": rng.random(rows, np.float32),
        "height": np.array([high for high, _ in sizes]), "width": np.array([wide for _, wide in sizes]),
    }  # fmt: skip


def theirs(module: Any, inputs: dict[str, np.ndarray]) -> Any:
    sizes = [(1, int(high), int(wide)) for high, wide in zip(inputs["height"], inputs["width"], strict=True)]
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items() if name not in ("height", "width")}
    with torch.no_grad():
        return module(**tensors, img_shapes=[sizes] * len(inputs["timestep"]), return_dict=False)[0]


@pytest.mark.parametrize(("height", "width", "lengths"), [(4, 4, [9]), (3, 7, [5, 30]), (6, 1, [1, 12, 3])])
def test_the_transformer(folder: Path, bundle: Any, height: int, width: int, lengths: list[int]) -> None:
    """Odd sides, and texts that are filled up."""
    inputs = batch([(height, width)], lengths)
    module = diffusers.QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    numbers = {name: inputs[name].reshape(()) for name in ("height", "width")}
    close(run(bundle.models["transformer"], {**inputs, **numbers}, "out_hidden_states"), theirs(module, inputs))


@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_pictures_beside_the_latents(folder: Path, tmp_path: Path, zero_cond_t: bool) -> None:
    """As a transformer alone is converted; models from 2511 on are told that there is no noise in such pictures."""
    torch.manual_seed(1)
    module = _zimage().noise(diffusers.QwenImageTransformer2DModel(**SMALL, zero_cond_t=zero_cond_t)).eval()
    module.save_pretrained(tmp_path)
    loader = DiffusersLoader(LoaderOptions(weights="f32"))
    assert loader.can_load(FileSource(tmp_path)) is Match.YES
    alone = loader.load(FileSource(tmp_path))
    assert list(alone.models) == ["transformer"]
    for sizes in ([(4, 3)], [(3, 5), (2, 2)], [(2, 3), (4, 3), (1, 9)]):
        inputs = batch(sizes, [4, 7])
        close(run(alone.models["transformer"], inputs, "out_hidden_states"), theirs(module, inputs))


def test_places_and_times_stay_exact_in_half_precision(folder: Path, bundle: Any) -> None:
    """What rounding of the weights does is as small late in a long text as at its beginning."""
    half = DiffusersLoader(LoaderOptions(weights="f16")).load(FileSource(folder)).models["transformer"]
    inputs = batch([(6, 10)], [900])
    inputs |= {name: inputs[name].reshape(()) for name in ("height", "width")}
    full = run(bundle.models["transformer"], inputs, "out_hidden_states")
    assert np.abs(run(half, inputs, "out_hidden_states") - full).max() <= 5e-3 * np.abs(full).max()


def test_the_runtime_fuses_rotations_and_attention(bundle: Any) -> None:
    compiled = ov.Core().compile_model(bundle.models["transformer"], "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("RoPE") == 2 * 4, "queries and keys of pictures and of texts in each of two blocks"
    assert "Softmax" not in kinds


def test_qwen_gives_the_states_that_the_pipeline_takes(folder: Path, bundle: Any) -> None:
    module = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder").eval()
    for lengths in ([7], [12, 3], [1, 60]):
        ids = np.random.default_rng(len(lengths)).integers(0, 500, (len(lengths), max(lengths)))
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        with torch.no_grad():
            wanted = module(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True).hidden_states[-1]
        ours = run(bundle.models["text_encoder"], {"input_ids": ids, "attention_mask": mask}, "last_hidden_state")
        for row, length in enumerate(lengths):
            close(ours[row, :length], wanted[row, :length])


def test_names_of_today_and_a_model_without_windows(folder: Path, bundle: Any, tmp_path: Path) -> None:
    """`model.language_model.` and `model.visual.`, as transformers calls them, and tied words that are stored once."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "text_encoder/model.safetensors"
    weights = load_file(path)
    assert "model.embed_tokens.weight" in weights, "as published"
    today = {
        "model." + name if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in weights.items()
    }
    save_file({name: tensor for name, tensor in today.items() if name != "lm_head.weight"}, path)
    inputs = {"input_ids": np.arange(9)[None], "attention_mask": np.ones((1, 9), np.int64)}
    wanted = run(bundle.models["text_encoder"], inputs, "last_hidden_state")
    loader = DiffusersLoader(LoaderOptions(weights="f32"))
    np.testing.assert_array_equal(
        run(loader.load(FileSource(copy)).models["text_encoder"], inputs, "last_hidden_state"), wanted
    )
    config = copy / "text_encoder/config.json"
    values = json.loads(config.read_text())
    values["text_config"] |= {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2}
    config.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="a window of the text"):
        _ = loader.load(FileSource(copy)).models["text_encoder"]


def test_the_autoencoder(folder: Path, bundle: Any) -> None:
    """Its convolutions over frames are those of two dimensions, and nothing else of the pictures differs."""
    module = diffusers.AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
    decoder, encoder = (bundle.models[role] for role in ("vae_decoder", "vae_encoder"))
    for rows, height, width in ((1, 4, 4), (2, 5, 12)):
        latents = torch.randn(rows, CHANNELS, 1, height, width)
        with torch.no_grad():
            close(run(decoder, {"latent_sample": latents.numpy()}, "sample"), module.decode(latents).sample)
            picture = torch.randn(rows, 3, 1, 2 * height, 2 * width)
            wanted = module.encode(picture).latent_dist.parameters
        close(run(encoder, {"sample": picture.numpy()}, "latent_parameters"), wanted)
    kernels = [node for node in decoder.get_ops() if node.get_type_name() == "Convolution"]
    assert kernels and all(node.input(1).get_partial_shape().rank.get_length() == 4 for node in kernels)
    assert bundle.configs["vae_decoder"]["latents_std"] == module.config.latents_std


def test_layout_of_optimum_and_fixed_sizes(folder: Path, bundle: Any) -> None:
    def shapes(model: Any) -> dict[str, str]:
        return {port.any_name: str(port.partial_shape) for port in [*model.inputs, *model.outputs]}

    assert shapes(bundle.models["transformer"]) == {
        "hidden_states": "[?,?,64]", "encoder_hidden_states": "[?,?,32]", "encoder_hidden_states_mask": "[?,?]",
        "timestep": "[?]", "height": "[]", "width": "[]", "out_hidden_states": "[?,?,64]",
    }  # fmt: skip
    decoder = shapes(bundle.models["vae_decoder"])
    assert decoder["latent_sample"] == "[?,16,1,?,?]"
    assert decoder["sample"].startswith("[?,3,1,")
    fixed = DiffusersLoader(LoaderOptions(height=16, width=24, batch=1)).load(FileSource(folder))
    assert shapes(fixed.models["transformer"])["hidden_states"] == "[1,24,64]"
    assert shapes(fixed.models["transformer"])["out_hidden_states"] == "[1,24,64]"
    assert shapes(fixed.models["vae_encoder"])["latent_parameters"] == "[1,32,1,8,12]"


def test_every_token_equals_those_of_transformers(folder: Path, bundle: Any) -> None:
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ours = tokenizers.Tokenizer.from_str(bundle.assets["tokenizer/tokenizer.json"].decode())
    texts = [
        "",
        " a",
        "straße\n\n ﬁ 🦄",
        "<|im_start|>x<|im_end|>\n",
        "cafe\u0301 1234  don't",
        "<|vision_start|><|image_pad|>",
    ]
    assert [ours.encode(text).ids for text in texts] == [theirs(text).input_ids for text in texts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_embeds": True}, "a guidance scale as an input"),
        ({"use_layer3d_rope": True}, "makes pictures of layers"),
        ({"use_additional_t_cond": True}, "makes pictures of layers"),
    ],
)
def test_other_varieties_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        _ = DiffusersLoader(LoaderOptions()).load(FileSource(copy)).models["transformer"]


@pytest.mark.parametrize("edits", [False, True])
def test_a_transformer_in_one_file(tmp_path: Path, edits: bool) -> None:
    """In ComfyUI's form, with its mark of models that edit from 2511 on; in diffusers' names; and as GGUF."""
    gguf = pytest.importorskip("gguf")
    from safetensors.torch import save_file

    torch.manual_seed(2)
    shape = {**SMALL, "attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (4, 14, 14)}
    module = _zimage().noise(diffusers.QwenImageTransformer2DModel(**shape, zero_cond_t=edits)).eval()
    state = module.state_dict()
    comfy = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    if edits:
        comfy["model.diffusion_model.__index_timestep_zero__"] = torch.empty(0)
    save_file(comfy, tmp_path / "comfy.safetensors")
    inputs = batch([(3, 4), (2, 5)], [4, 9])
    bundle = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(tmp_path / "comfy.safetensors"))
    close(run(bundle.models["transformer"], inputs, "out_hidden_states"), theirs(module, inputs))
    found, own = bundle.configs["transformer"], json.loads(json.dumps(dict(module.config)))
    assert {key: found[key] for key in SMALL} == {key: own[key] for key in SMALL}
    assert bundle.scheduler_config()["shift_terminal"] == 0.02
    if edits:
        return
    save_file(state, tmp_path / "plain.safetensors")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen_image")
    kind = gguf.GGMLQuantizationType
    for name, tensor in state.items():
        number = kind.Q8_0 if tensor.ndim == 2 else kind.F32
        data = gguf.quants.quantize(tensor.numpy(), number)
        writer.add_tensor(name, data, raw_dtype=number)
        if number == kind.Q8_0:
            tensor.copy_(torch.from_numpy(gguf.quants.dequantize(data, number)))
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    held = theirs(module, inputs)
    for weights, bound in (("f32", 1e-4), ("f16", 5e-3)):
        bundle = DiffusersLoader(LoaderOptions(weights=weights)).load(FileSource(tmp_path / "x.gguf"))
        close(run(bundle.models["transformer"], inputs, "out_hidden_states"), held, bound)
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(tmp_path / "plain.safetensors")) is Match.YES
