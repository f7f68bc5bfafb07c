"""Z-Image: its transformer over batches and Qwen3's states, converted folders against torch."""

from __future__ import annotations

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

WIDTH, CHANNELS = 24, 16
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
SMALL: dict[str, Any] = {
    "in_channels": CHANNELS, "dim": 48, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 3, "n_kv_heads": 3,
    "cap_feat_dim": WIDTH, "axes_dims": (4, 6, 6), "axes_lens": (600, 64, 64),
}  # fmt: skip


def write_tokenizer(folder: Path) -> int:
    """Train byte pairs with the steps of Qwen's tokenizer, and write it as transformers does; return its words."""
    from tokenizers import models, pre_tokenizers, trainers

    reader = tokenizers.Tokenizer(models.BPE())
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = pre_tokenizers.ByteLevel.alphabet()
    text = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[3].glob("docs/*.md"))[:3]]
    reader.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters))
    model = json.loads(reader.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], pad_token="<|endoftext|>",
        eos_token="<|im_end|>", unk_token=None, extra_special_tokens=["<|im_start|>"], model_max_length=131072,
    )  # fmt: skip
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_zimage_pipeline(folder: Path) -> Path:
    """Write a small pipeline with every kind of block, and weights that a fresh module has zero or one."""
    torch.manual_seed(0)
    words = write_tokenizer(folder / "tokenizer")
    config = transformers.Qwen3Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    noise(transformers.Qwen3Model(config)).save_pretrained(folder / "text_encoder")
    noise(diffusers.ZImageTransformer2DModel(**SMALL)).save_pretrained(folder / "transformer")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=0.3611,
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")  # fmt: skip
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline", "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"], "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def noise(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zimage_pipeline(tmp_path_factory.mktemp("zimage") / "torch")


@pytest.fixture(scope="module")
def bundle(folder: Path, opened: Callable[[Path], Any]) -> Any:
    return opened(folder)


def run(model: Any, inputs: dict[str, np.ndarray], name: str) -> np.ndarray:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result: np.ndarray = compiled(inputs)[name]
    return result


def as_lists(inputs: dict[str, np.ndarray], lengths: list[int]) -> tuple[Any, ...]:
    """Return what diffusers' transformer takes: a list of pictures of one frame, times, a list of texts."""
    pictures = list(torch.from_numpy(inputs["hidden_states"]).unsqueeze(2))
    states = torch.from_numpy(inputs["encoder_hidden_states"])
    texts = [row[:length] for row, length in zip(states, lengths, strict=True)]
    return pictures, torch.from_numpy(inputs["timestep"]), texts


def batch(height: int, width: int, lengths: list[int]) -> dict[str, np.ndarray]:
    """Return inputs for texts of different lengths, as diffusers' `_pad_with_ids` counts their places."""
    rng = np.random.default_rng(height)
    rows, tokens = len(lengths), height // 2 * (width // 2)
    full = [length + -length % 32 for length in lengths]
    grid = np.stack(np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij"), -1).reshape(-1, 2)
    mask = np.full((rows, max(full)), np.finfo(np.float32).min, np.float32)
    texts = np.zeros((rows, max(full), 3), np.int64)
    pictures = np.zeros((rows, tokens + -tokens % 32, 3), np.int64)
    for row, (length, end) in enumerate(zip(lengths, full, strict=True)):
        mask[row, :length] = 0
        texts[row, :end, 0] = np.arange(1, end + 1)
        pictures[row, :tokens, 0] = end + 1
        pictures[row, :tokens, 1:] = grid
    return {
        "hidden_states": rng.standard_normal((rows, CHANNELS, height, width), np.float32),
        "timestep": rng.random(rows, np.float32),
        "encoder_hidden_states": rng.standard_normal((rows, max(full), WIDTH), np.float32),
        "encoder_attention_mask": mask, "txt_ids": texts, "img_ids": pictures,
    }  # fmt: skip


@pytest.mark.parametrize(("height", "width", "lengths"), [(8, 16, [32]), (6, 10, [3, 40]), (22, 4, [64, 1, 33])])
def test_a_batch_gives_what_lists_give(folder: Path, bundle: Any, height: int, width: int, lengths: list[int]) -> None:
    """Of one size, texts that need no filling up and that do, tokens of a picture that fill a multiple of 32 and not."""
    inputs = batch(height, width, lengths)
    module = diffusers.ZImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    with torch.no_grad():
        theirs = torch.stack(module(*as_lists(inputs, lengths), return_dict=False)[0]).squeeze(2).numpy()
    ours = run(bundle.models["transformer"], inputs, "sample")
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_places_and_times_stay_exact_in_half_precision(folder: Path, bundle: Any) -> None:
    """What rounding of the weights does is as small late in a long text as at its beginning."""
    half = DiffusersLoader(LoaderOptions(weights="f16")).load(FileSource(folder)).models["transformer"]
    inputs = batch(6, 10, [500])
    full = run(bundle.models["transformer"], inputs, "sample")
    assert np.abs(run(half, inputs, "sample") - full).max() <= 5e-3 * np.abs(full).max()


def test_the_runtime_fuses_rotations_and_attention(bundle: Any) -> None:
    compiled = ov.Core().compile_model(bundle.models["transformer"], "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("RoPE") == 2 * 6, "a query and a key in each of six blocks"
    assert "Softmax" not in kinds


def test_qwen3_gives_the_states_that_the_pipeline_takes(folder: Path, bundle: Any) -> None:
    module = transformers.Qwen3Model.from_pretrained(folder / "text_encoder").eval()
    for lengths in ([7], [12, 3], [1, 40]):
        ids = np.random.default_rng(len(lengths)).integers(0, 500, (len(lengths), max(lengths)))
        mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
        with torch.no_grad():
            wanted = module(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True).hidden_states[-2]
        ours = run(bundle.models["text_encoder"], {"input_ids": ids, "attention_mask": mask}, "last_hidden_state")
        for row, length in enumerate(lengths):
            theirs = wanted[row, :length].numpy()
            assert np.abs(ours[row, :length] - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_a_language_models_names_and_a_transformer_alone(folder: Path, bundle: Any, tmp_path: Path) -> None:
    """As the published text encoder is stored: `model.` before each name."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / "text_encoder/model.safetensors"
    weights = load_file(path)
    save_file({f"model.{name}": weight for name, weight in weights.items()}, path)
    inputs = {"input_ids": np.arange(9)[None], "attention_mask": np.ones((1, 9), np.int64)}
    loader = DiffusersLoader(LoaderOptions(weights="f32"))
    renamed = loader.load(FileSource(copy)).models["text_encoder"]
    wanted = run(bundle.models["text_encoder"], inputs, "last_hidden_state")
    np.testing.assert_array_equal(run(renamed, inputs, "last_hidden_state"), wanted)
    assert loader.can_load(FileSource(folder / "transformer")) is Match.YES
    assert list(loader.load(FileSource(folder / "transformer")).models) == ["transformer"]


def test_layout_of_optimum_and_fixed_sizes(folder: Path, bundle: Any) -> None:
    model = bundle.models["transformer"]
    assert {port.any_name: str(port.partial_shape) for port in [*model.inputs, *model.outputs]} == {
        "hidden_states": "[?,16,?,?]", "timestep": "[?]", "encoder_hidden_states": "[?,?,24]",
        "encoder_attention_mask": "[?,?]", "txt_ids": "[?,?,3]", "img_ids": "[?,?,3]", "sample": "[?,16,?,?]",
    }  # fmt: skip
    fixed = DiffusersLoader(LoaderOptions(height=16, width=24, batch=1)).load(FileSource(folder)).models["transformer"]
    shapes = {port.any_name: str(port.partial_shape) for port in [*fixed.inputs, *fixed.outputs]}
    assert shapes["hidden_states"] == shapes["sample"] == "[2,16,8,12]"
    assert shapes["img_ids"] == "[2,32,3]"


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"all_patch_size": [4]}, "2 is needed"),
        (
            "text_encoder",
            {"layer_types": ["sliding_attention"] * 3, "use_sliding_window": True},
            "a window of the text",
        ),
    ],
)
def test_other_varieties_are_refused(
    folder: Path, tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        _ = DiffusersLoader(LoaderOptions()).load(FileSource(copy)).models[part]
