"""Diffusion transformers, their text encoders and autoencoders: converted folders against torch, and tokens."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts.stages import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")
tokenizers = pytest.importorskip("tokenizers")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402
from ovforge_diffusers.tokenization import TokenizerFolder  # noqa: E402

WIDTH, POOLED = 32, 48
"""Of text states: CLIP's 24 and 24 channels lie beside each other in SD3's pooled states, and are padded to T5's width."""

SENTENCES = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parents[3].glob("docs/*.md"))[:4]]


def write_t5_tokenizer(folder: Path) -> None:
    """Train a unigram vocabulary with the steps of T5's, and write it as transformers does: the same bytes each time.

    The trainer finds the same pieces each time, with scores that differ in the fourth digit. Theirs are how often they
    occur, and no two are equal.
    """
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    reader = tokenizers.Tokenizer(models.Unigram())
    reader.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    reader.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = ["<pad>", "</s>", "<unk>"]
    reader.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>")
    )
    text = "▁".join(" ".join(SENTENCES).split())
    pieces = {piece for piece, _ in json.loads(reader.to_str())["model"]["vocab"]} - {*special}
    counted = sorted((-math.log(1 + text.count(piece)), piece) for piece in pieces)
    scores = [(piece, -cost - 1e-4 * rank - math.log(len(text))) for rank, (cost, piece) in enumerate(counted)]
    vocabulary = [*((token, 0.0) for token in special), *scores]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=10, model_max_length=512).save_pretrained(folder)


def text_config(words: int, width: int, **changes: Any) -> Any:
    """Return the config of a small CLIP."""
    return transformers.CLIPTextConfig(
        vocab_size=words, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=words - 2, eos_token_id=words - 1, pad_token_id=words - 1, **changes,
    )  # fmt: skip


def write_t5(folder: Path, name: str, number: str) -> None:
    write_t5_tokenizer(folder / f"tokenizer{number}")
    config = transformers.T5Config(
        vocab_size=640, d_model=WIDTH, d_kv=16, d_ff=64, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False, relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    transformers.T5EncoderModel(config).save_pretrained(folder / name)


def noise(module: Any) -> Any:
    """Fill a module with random weights: biases and scales too, which a fresh module has zero or one."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return module


SD3: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 32, "pooled_projection_dim": POOLED,
    "pos_embed_max_size": 24, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1),
}  # fmt: skip
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}  # fmt: skip


def make_transformer_pipeline(folder: Path, clip: Path, family: str, **changes: Any) -> Path:
    """Write a small pipeline, "sd3" or "flux", with every kind of block; `clip` has a CLIP tokenizer."""
    torch.manual_seed(0)
    words = len(json.loads((clip / "tokenizer/vocab.json").read_text(encoding="utf-8")))
    shutil.copytree(clip / "tokenizer", folder / "tokenizer")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=16, layers_per_block=1, norm_num_groups=8, sample_size=16, scaling_factor=1.5305,
        shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if family == "sd3":
        for name in ("text_encoder", "text_encoder_2"):
            transformers.CLIPTextModelWithProjection(text_config(words, 24)).save_pretrained(folder / name)
            index[name] = ["transformers", "CLIPTextModelWithProjection"]
        shutil.copytree(clip / "tokenizer", folder / "tokenizer_2")
        write_t5(folder, "text_encoder_3", "_3")
        noise(diffusers.SD3Transformer2DModel(**{**SD3, **changes})).save_pretrained(folder / "transformer")
        index |= {
            "_class_name": "StableDiffusion3Pipeline", "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
        }  # fmt: skip
    else:
        transformers.CLIPTextModel(text_config(words, 24)).save_pretrained(folder / "text_encoder")
        write_t5(folder, "text_encoder_2", "_2")
        noise(diffusers.FluxTransformer2DModel(**{**FLUX, **changes})).save_pretrained(folder / "transformer")
        index |= {
            "_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
        }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def families(
    pipeline: Path, opened: Callable[[Path], ModelBundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Path]]:
    """Return family -> the torch folder and the converted one, in f32."""
    found = {}
    for family in ("sd3", "flux"):
        folder = make_transformer_pipeline(tmp_path_factory.mktemp(family) / "torch", pipeline, family)
        target = folder.parent / "converted"
        opened(folder).save(target)
        found[family] = (folder, target)
    return found


def run(model: Any, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
    )
    result = compiled({name: value.numpy() for name, value in inputs.items()})
    return {port.any_name: result[port] for port in compiled.outputs}


def close(ours: np.ndarray, theirs: Any, bound: float = 1e-4) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def sd3_inputs(rows: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    torch.manual_seed(height)
    return {
        "hidden_states": torch.randn(rows, 16, height, width), "timestep": torch.rand(rows) * 1000,
        "encoder_hidden_states": torch.randn(rows, tokens, WIDTH), "pooled_projections": torch.randn(rows, POOLED),
    }  # fmt: skip


def flux_inputs(rows: int, height: int, width: int, tokens: int) -> dict[str, Any]:
    torch.manual_seed(height)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2)).float()
    return {
        "hidden_states": torch.randn(rows, len(places), 64), "timestep": torch.rand(rows),
        "encoder_hidden_states": torch.randn(rows, tokens, WIDTH), "pooled_projections": torch.randn(rows, 24),
        "img_ids": places, "txt_ids": torch.zeros(tokens, 3), "guidance": torch.full((rows,), 3.5),
    }  # fmt: skip


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_gives_what_torch_gives(families: dict[str, tuple[Path, Path]], family: str) -> None:
    folder, converted = families[family]
    kind = diffusers.SD3Transformer2DModel if family == "sd3" else diffusers.FluxTransformer2DModel
    module = kind.from_pretrained(folder / "transformer").eval()
    make = sd3_inputs if family == "sd3" else flux_inputs
    for rows, height, width, tokens in ((1, 8, 8, 9), (3, 4, 14, 21), (2, 22, 6, 1)):
        inputs = make(rows, height, width, tokens)
        ours = run(converted / "transformer/openvino_model.xml", inputs)
        close(ours["out_sample"], module(**inputs, return_dict=False)[0])


def test_what_is_converted_twice_is_the_same(families: dict[str, tuple[Path, Path]]) -> None:
    """Whatever numbers OpenVINO gives to what has no name: else a pipeline without a cache takes it for changed."""
    from ovforge.model.comparison import same_model

    bundle = DiffusersLoader(LoaderOptions()).load(FileSource(families["flux"][0]))
    assert same_model(bundle.models["transformer"], bundle.copy().models["transformer"])


def test_the_runtime_fuses_rotations_norms_and_attention(families: dict[str, tuple[Path, Path]]) -> None:
    compiled = ov.Core().compile_model(families["flux"][1] / "transformer/openvino_model.xml", "CPU")
    kinds = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
    assert kinds.count("RoPE") == 2 * 4, "a query and a key in each of four blocks"
    assert kinds.count("RMS") == 2 * 4 + 2 * 2, "and the text's queries and keys in blocks of two streams"
    assert "Softmax" not in kinds


@pytest.mark.parametrize(("family", "role"), [("sd3", "text_encoder_3"), ("flux", "text_encoder_2")])
def test_t5_gives_what_torch_gives(families: dict[str, tuple[Path, Path]], family: str, role: str) -> None:
    folder, converted = families[family]
    module = transformers.T5EncoderModel.from_pretrained(folder / role).eval()
    for rows, tokens in ((1, 12), (2, 77), (3, 1)):
        ids = torch.randint(0, 600, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        ours = run(converted / role / "openvino_model.xml", {"input_ids": ids})
        assert list(ours) == ["last_hidden_state"]
        close(ours["last_hidden_state"], module(ids).last_hidden_state)


def test_clip_gives_the_states_that_each_family_takes(families: dict[str, tuple[Path, Path]]) -> None:
    ids = torch.tensor([[5, 9, 40, 80, 7]])
    for role in ("text_encoder", "text_encoder_2"):
        module = transformers.CLIPTextModelWithProjection.from_pretrained(families["sd3"][0] / role).eval()
        ours = run(families["sd3"][1] / role / "openvino_model.xml", {"input_ids": ids})
        theirs = module(ids, output_hidden_states=True)
        assert list(ours) == ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(3))]
        close(ours["text_embeds"], theirs.text_embeds)
        close(ours["hidden_states.1"], theirs.hidden_states[1])
    module = transformers.CLIPTextModel.from_pretrained(families["flux"][0] / "text_encoder").eval()
    ours = run(families["flux"][1] / "text_encoder/openvino_model.xml", {"input_ids": ids})
    assert list(ours) == ["last_hidden_state", "pooler_output"]
    close(ours["pooler_output"], module(ids).pooler_output)


def test_an_autoencoder_of_sixteen_channels_gives_what_torch_gives(families: dict[str, tuple[Path, Path]]) -> None:
    folder, converted = families["sd3"]
    module = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    for rows, height, width in ((1, 4, 4), (2, 5, 12)):
        latents = torch.randn(rows, 16, height, width)
        ours = run(converted / "vae_decoder/openvino_model.xml", {"latent_sample": latents})
        close(ours["sample"], module.decode(latents).sample)
        picture = torch.randn(rows, 3, 2 * height, 2 * width)
        ours = run(converted / "vae_encoder/openvino_model.xml", {"sample": picture})
        close(ours["latent_parameters"], module.encode(picture).latent_dist.parameters)
    config = ModelBundle.open(FileSource(converted)).configs["vae_decoder"]
    assert (config["scaling_factor"], config["shift_factor"], config["latent_channels"]) == (1.5305, 0.0609, 16)


def test_inputs_have_the_types_and_layout_of_optimum(families: dict[str, tuple[Path, Path]]) -> None:
    def ports(family: str) -> dict[str, tuple[str, str]]:
        model = ov.Core().read_model(families[family][1] / "transformer/openvino_model.xml")
        return {p.any_name: (str(p.partial_shape), p.element_type.get_type_name()) for p in model.inputs}

    assert ports("sd3") == {
        "hidden_states": ("[?,16,?,?]", "f32"), "timestep": ("[?]", "f32"),
        "encoder_hidden_states": ("[?,?,32]", "f32"), "pooled_projections": ("[?,48]", "f32"),
    }  # fmt: skip
    assert ports("flux") == {
        "hidden_states": ("[?,?,64]", "f32"), "timestep": ("[?]", "f32"), "encoder_hidden_states": ("[?,?,32]", "f32"),
        "pooled_projections": ("[?,24]", "f32"), "txt_ids": ("[?,3]", "f32"), "img_ids": ("[?,3]", "f32"),
        "guidance": ("[?]", "f32"),
    }  # fmt: skip


def test_fixed_sizes(families: dict[str, tuple[Path, Path]]) -> None:
    options = LoaderOptions(height=16, width=24, batch=1)
    shapes = {}
    for family, (folder, _) in families.items():
        model = DiffusersLoader(options).load(FileSource(folder)).models["transformer"]
        shapes[family] = {port.any_name: list(port.shape) for port in [*model.inputs, *model.outputs]}
    assert shapes["sd3"]["hidden_states"] == shapes["sd3"]["out_sample"] == [2, 16, 8, 12]
    assert shapes["sd3"]["encoder_hidden_states"] == [2, 77 + 256, 32]
    assert shapes["flux"]["hidden_states"] == shapes["flux"]["out_sample"] == [1, 4 * 6, 64]
    assert shapes["flux"]["img_ids"] == [24, 3]
    with pytest.raises(ConfigError, match="not a multiple of 4"):
        _ = (
            DiffusersLoader(LoaderOptions(height=18, width=16))
            .load(FileSource(families["flux"][0]))
            .models["transformer"]
        )


def test_a_transformer_alone_and_without_t5(families: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = families["flux"][0] / "transformer"
    loader = DiffusersLoader(LoaderOptions(weights="f32"))
    assert loader.can_load(FileSource(folder)) is Match.YES
    alone = loader.load(FileSource(folder))
    assert list(alone.models) == ["transformer"]
    inputs = flux_inputs(1, 4, 6, 3)
    whole = run(families["flux"][1] / "transformer/openvino_model.xml", inputs)["out_sample"]
    np.testing.assert_array_equal(run(alone.models["transformer"], inputs)["out_sample"], whole)
    copy = Path(shutil.copytree(families["sd3"][0], tmp_path / "copy"))
    shutil.rmtree(copy / "text_encoder_3")
    index = json.loads((copy / "model_index.json").read_text())
    gone = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (copy / "model_index.json").write_text(json.dumps({**index, **gone}))
    assert "text_encoder_3" not in loader.load(FileSource(copy)).models


TEXTS = [
    "", " ", "  ", "\t", "\n", "a", "A photo of a cat, 8k!!", "  leading", "trailing  ", "two  blanks", "tabs\tand\nlines",
    "naïve façade", "straße", "ﬁ ligature ½ ①", "Ελληνικά", "русский текст", "日本語のテキスト", "한국어", "עברית", "العربية",
    "हिन्दी", "ไทย", "🦄", "👩‍👩‍👧‍👦 family 🇩🇪", "zero\u200bwidth", "non\u00a0breaking", "soft\u00adhyphen", "\x01\x02 control",
    "\ufeffmark", "<extra_id_3> here", "</s> inside", "<pad>x<unk>", "▁ underline ▁▁", "a" * 700, "word " * 400,
    "cafe\u0301", "\u3000wide\u3000", "“quotes” – dash", "C++ & C#", "http://example.org/?q=1&b=2", "1234567890", "\u2028sep",
]  # fmt: skip
MANY = TEXTS + [
    f"{a}{between}{b}" for a in TEXTS[5:] for b, between in zip(TEXTS[7:19], " .\n-🦄 x,1_/\t", strict=True)
]


def test_every_token_equals_those_of_transformers(families: dict[str, tuple[Path, Path]]) -> None:
    """What a run reads is tokenizer.json, by the library that transformers itself uses."""
    assert len(MANY) > 480
    folder, converted = families["sd3"]
    theirs = transformers.T5Tokenizer.from_pretrained(folder / "tokenizer_3", local_files_only=True)
    assets = ModelBundle.open(FileSource(converted)).assets
    ours = tokenizers.Tokenizer.from_str(assets["tokenizer_3/tokenizer.json"].decode())
    wrong = [text for text in MANY if ours.encode(text).ids != theirs(text).input_ids]
    assert wrong == []
    assert (converted / "tokenizer_3/openvino_tokenizer.xml").is_file()


def test_a_sentencepiece_model_becomes_a_file_of_tokens(families: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """As older folders of T5 have it: spiece.model alone, with its normalisation."""
    pieces = pytest.importorskip("sentencepiece")
    copy = Path(shutil.copytree(families["flux"][0] / "tokenizer_2", tmp_path / "tokenizer_2"))
    (copy / "tokenizer.json").unlink()
    with (copy / "spiece.model").open("wb") as file:
        pieces.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(SENTENCES).splitlines()), model_writer=file, vocab_size=500, pad_id=0,
            eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    files = {f"tokenizer_2/{path.name}": path.read_bytes() for path in copy.iterdir()}
    folder = TokenizerFolder("tokenizer_2", "T5TokenizerFast", files, where="here", protected=False)
    ours = tokenizers.Tokenizer.from_str(folder.assets()["tokenizer_2/tokenizer.json"].decode())
    theirs = transformers.T5Tokenizer.from_pretrained(copy, local_files_only=True)
    assert [text for text in MANY if ours.encode(text).ids != theirs(text).input_ids] == []
    original = pieces.SentencePieceProcessor(model_file=str(copy / "spiece.model"))
    assert ours.encode("A ﬁne  photo").ids[:-1] == original.encode("A ﬁne  photo")


def test_a_tokenizer_without_files_is_an_error(
    families: dict[str, tuple[Path, Path]], tmp_path: Path, write_index: Callable[..., None]
) -> None:
    copy = Path(shutil.copytree(families["flux"][0], tmp_path / "copy"))
    (copy / "tokenizer_2/tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer_2 needs tokenizer.json, or .* or spiece.model"):
        DiffusersLoader(LoaderOptions()).load(FileSource(copy))
    (copy / "tokenizer_2/tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be converted"):
        DiffusersLoader(LoaderOptions()).load(FileSource(copy))


def test_a_config_that_asks_for_too_many_layers(pipeline: Path, tmp_path: Path) -> None:
    """It is refused soon, rather than built for hours."""
    folder = make_transformer_pipeline(tmp_path / "model", pipeline, "flux")
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": 10**9}))
    bundle = DiffusersLoader(LoaderOptions()).load(FileSource(folder))
    with pytest.raises(ModelError, match="it asks for more layers than any model has"):
        bundle.models["transformer"]
