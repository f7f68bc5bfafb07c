"""Text encoders alone in single files, safetensors and GGUF, with their tokenizers: against torch and transformers."""

from __future__ import annotations

import base64
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
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")
ov = pytest.importorskip("openvino")
tokenizers = pytest.importorskip("tokenizers")
pieces = pytest.importorskip("sentencepiece")

from safetensors.torch import save_file  # noqa: E402

from ovforge_diffusers.components import CLIP, find_components  # noqa: E402
from ovforge_diffusers.header import Part  # noqa: E402
from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402
from ovforge_diffusers.text_configs import text_encoder_config, text_encoder_names  # noqa: E402

Tensors = dict[str, Any]


def neighbour(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"small_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES, SMALL, ZIMAGE = neighbour("foreign_names"), neighbour("test_transformers"), neighbour("test_zimage")
WORDS = 700


def noise(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return module.eval()


def clip(width: int, projected: bool) -> Any:
    """CLIP-L's kind has no projection, OpenCLIP's has one, and another activation."""
    config = transformers.CLIPTextConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=width // 64,
        projection_dim=width, bos_token_id=WORDS - 2, eos_token_id=WORDS - 1, hidden_act="gelu" if projected else "quick_gelu",
    )  # fmt: skip
    return noise((transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config))


def t5(**changes: Any) -> Any:
    shape = {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "relative_attention_num_buckets": 8,
    }  # fmt: skip
    return noise(transformers.T5EncoderModel(transformers.T5Config(**{**shape, **changes})))


def qwen3(**changes: Any) -> Any:
    shape = {
        "vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    return noise(transformers.Qwen3Model(transformers.Qwen3Config(**{**shape, **changes})))


def gemma2() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=WORDS, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=256,
    )  # fmt: skip
    return noise(transformers.Gemma2Model(config))


def qwen2_5_vl(**changes: Any) -> Any:
    text = {
        "vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]},
        **changes,
    }  # fmt: skip
    vision = {"depth": 4, "hidden_size": 64, "intermediate_size": 40, "num_heads": 16, "out_hidden_size": 256,
              "fullatt_block_indexes": [0, 1, 2, 3]}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
        vision_end_token_id=151653,
    )  # fmt: skip
    return noise(transformers.Qwen2_5_VLForConditionalGeneration(config))


def load(path: Path, **options: Any) -> ModelBundle:
    loader = DiffusersLoader(LoaderOptions(**{"weights": "f32", **options}))
    assert loader.can_load(FileSource(path)) is Match.YES
    return loader.load(FileSource(path))


def run(model: Any, **inputs: Any) -> dict[str, np.ndarray]:
    compiled = ov.Core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    )
    result = compiled({name: np.asarray(value) for name, value in inputs.items()})
    return {name: result[port] for port in compiled.outputs for name in port.names}


def close(ours: np.ndarray, theirs: Any, bound: float = 1e-4) -> None:
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


IDS = np.array([[5, 9, 40, 80, WORDS - 1], [3, 17, 600, WORDS - 1, 0]])
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


def save(tensors: Tensors, path: Path) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("projected", [False, True])
def test_clip_gives_what_every_pipeline_takes(tmp_path: Path, projected: bool) -> None:
    """clip_l.safetensors and clip_g.safetensors: what is pooled before the projection and after, and all states."""
    module = clip(1024 if projected else 64, projected)
    file = save({**NAMES.clip_text(module.state_dict()), "logit_scale": torch.zeros(())}, tmp_path / "clip.safetensors")
    bundle = load(file)
    assert [role for role in bundle.models if "token" not in role] == ["text_encoder"]
    made = run(bundle.models["text_encoder"], input_ids=IDS)
    inner = module.text_model if projected else module
    with torch.no_grad():
        wanted = inner(torch.from_numpy(IDS), output_hidden_states=True)
        embeds = module.text_projection(wanted.pooler_output) if projected else wanted.pooler_output
    close(made["pooler_output"], wanted.pooler_output)
    close(made["text_embeds"], embeds)
    close(made["last_hidden_state"], wanted.last_hidden_state)
    for layer, states in enumerate(wanted.hidden_states):
        close(made[f"hidden_states.{layer}"], states)


def test_a_projection_that_pipelines_do_not_take_is_said(tmp_path: Path) -> None:
    state = NAMES.clip_text(clip(64, projected=False).state_dict())
    for number, projection in enumerate((torch.eye(64), torch.randn(64, 64))):
        path = save({**state, "text_projection.weight": projection}, tmp_path / f"{number}.safetensors")
        if number:
            with pytest.warns(UserWarning, match="text_projection is left out"):
                bundle = load(path)
        else:
            bundle = load(path)
        made = run(bundle.models["text_encoder"], input_ids=IDS)
        np.testing.assert_allclose(made["text_embeds"], made["pooler_output"], atol=1e-6)


def test_t5_in_float16_and_float8(tmp_path: Path) -> None:
    """As ComfyUI's files are: plain, rounded to float8, and scaled, in the old form and in the new one."""
    module = t5()
    state = {name: tensor for name, tensor in module.state_dict().items() if name != "encoder.embed_tokens.weight"}
    half = {name: tensor.half() for name, tensor in state.items()}
    eight = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor for name, tensor in state.items()}
    files: dict[str, tuple[Tensors, Tensors]] = {
        "t5xxl_fp16": (half, half), "t5xxl_fp8_e4m3fn": (eight, eight),
    }  # fmt: skip
    scaled: Tensors = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    newer: Tensors = {}
    rounded: Tensors = {}
    mark = torch.frombuffer(
        bytearray(b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'), dtype=torch.uint8
    )
    for name, tensor in state.items():
        if tensor.ndim != 2 or "Attention" not in name or "bias" in name:
            scaled[name] = newer[name] = rounded[name] = tensor
            continue
        scale, stem = tensor.abs().max() / 400, name.removesuffix(".weight")
        value = (tensor / scale).to(torch.float8_e4m3fn)
        rounded[name] = value.float() * scale
        scaled |= {name: value, f"{stem}.scale_weight": scale, f"{stem}.scale_input": torch.ones(())}
        newer |= {name: value.view(torch.uint8), f"{stem}.weight_scale": scale, f"{stem}.comfy_quant": mark}
        newer[f"{stem}.input_scale"] = torch.ones(())
    files |= {"t5xxl_fp8_e4m3fn_scaled": (scaled, rounded), "t5xxl_comfy_quant": (newer, rounded)}
    for name, (tensors, values) in files.items():
        module.load_state_dict({key: value.float() for key, value in values.items()}, strict=False)
        bundle = load(save(tensors, tmp_path / f"{name}.safetensors"))
        assert list(bundle.models) == ["text_encoder"]
        with torch.no_grad():
            wanted = module(torch.from_numpy(IDS)).last_hidden_state
        close(run(bundle.models["text_encoder"], input_ids=IDS)["last_hidden_state"], wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "nvfp4"}', r"q is stored as nvfp4, which is not read"),
        ('{"format": "int8_tensorwise", "convrot": true}', "int8_tensorwise"),
        ("{", "in which form its layers are|not valid JSON"),
        ("[]", "in which form its layers are|expected a JSON object"),
        (" " * 5000, "more bytes than a layer's form"),
    ],
)
def test_layers_in_other_forms_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    stem = "encoder.block.0.layer.0.SelfAttention.q"
    mark = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    path = save({**t5().state_dict(), f"{stem}.comfy_quant": mark}, tmp_path / "t5.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    save_file({name: tensor.clone() for name, tensor in t5().state_dict().items()}, path,
              metadata={"_quantization_metadata": json.dumps({"layers": {stem: {"format": "mxfp8"}}})})  # fmt: skip
    with pytest.raises(ModelError, match="mxfp8"):
        load(path)


def language_states(module: Any) -> Any:
    with torch.no_grad():
        return module(
            input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK), output_hidden_states=True
        ).hidden_states


@pytest.mark.parametrize("level", ["model.", ""])
def test_qwen3_gives_the_states_of_all_layers(tmp_path: Path, level: str) -> None:
    module = qwen3()
    state = {level + name: tensor for name, tensor in module.state_dict().items()}
    bundle = load(save({**state, "lm_head.weight": torch.ones(WORDS, 24)}, tmp_path / "qwen_3_4b.safetensors"))
    made = run(bundle.models["text_encoder"], input_ids=IDS, attention_mask=MASK)
    wanted = language_states(module)
    for layer, states in enumerate(wanted):
        close(made[f"hidden_states.{layer}"][MASK > 0], states[torch.from_numpy(MASK > 0)])
    np.testing.assert_array_equal(made["last_hidden_state"], made["hidden_states.4"])


def gemma_model(path: Path) -> bytes:
    """Train a SentencePiece model with the words and the steps of Gemma's."""
    text = "\n".join(SMALL.SENTENCES).splitlines()
    with path.open("wb") as file:
        pieces.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_writer=file, model_type="bpe", vocab_size=WORDS, byte_fallback=True, pad_id=0,
            eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>", user_defined_symbols=["<mask>", "<start_of_turn>"],
            add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True, normalization_rule_name="identity",
            minloglevel=2, max_sentence_length=100000,
        )  # fmt: skip
    return path.read_bytes()


def test_gemma_brings_its_tokenizer(tmp_path: Path) -> None:
    """gemma_2_2b_fp16.safetensors: a SentencePiece model among the tensors; every token is transformers' own."""
    module, model = gemma2(), gemma_model(tmp_path / "tokenizer.model")
    brought = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    state = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
    bundle = load(save({**state, "spiece_model": brought}, tmp_path / "gemma_2_2b_fp16.safetensors"))
    assert set(bundle.models) == {"text_encoder", "tokenizer", "detokenizer"}
    made = run(bundle.models["text_encoder"], input_ids=IDS, attention_mask=MASK)
    wanted = language_states(module)
    for layer, states in enumerate(wanted):
        close(made[f"hidden_states.{layer}"][MASK > 0], states[torch.from_numpy(MASK > 0)])
    close(made["last_hidden_state"][MASK > 0], wanted[-1][torch.from_numpy(MASK > 0)])
    ours = tokenizers.Tokenizer.from_str(bundle.assets["tokenizer/tokenizer.json"].decode())
    theirs = pieces.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    texts = [text for text in SMALL.MANY if "<" not in text and "\x01" not in text]
    assert len(texts) > 400
    assert [text for text in texts if ours.encode(text).ids != [2, *theirs.encode(text)]] == []
    save({**state, "spiece_model": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match="a list of bytes"):
        load(tmp_path / "bad.safetensors")
    save({**state, "spiece_model": torch.zeros(40, dtype=torch.uint8)}, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match="cannot be converted"):
        load(tmp_path / "bad.safetensors")


def test_qwen2_5_vl_gives_what_its_folder_gives(tmp_path: Path) -> None:
    """qwen_2.5_vl_7b.safetensors, with the names of older transformers; the folder is one alone, too."""
    module = qwen2_5_vl()
    module.save_pretrained(tmp_path / "folder")
    rename = {"model.language_model.": "model.", "model.visual.": "visual."}
    state = {
        next((new + name.removeprefix(old) for old, new in rename.items() if name.startswith(old)), name): tensor
        for name, tensor in module.state_dict().items()
    }
    random = np.random.default_rng(0)
    inputs = {
        "text_encoder": {
            "input_ids": IDS, "attention_mask": MASK, "position_ids": np.broadcast_to(np.arange(5), (3, 2, 5)),
            "visual_states": np.zeros((2, 5, 256), np.float32),
        },
        "vision_encoder": {
            "pixel_values": random.standard_normal((2, 64, 1176)).astype(np.float32), "attention_mask": np.ones((2, 64), np.int64),
            "position_ids": random.integers(0, 8, (2, 64, 2)),
        },
    }  # fmt: skip
    eight = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 and "layers" in n else t for n, t in state.items()}
    rounded = {n: t.float() for n, t in eight.items()}
    folder = load(tmp_path / "folder")
    for name, tensors in (("plain", state), ("rounded", rounded), ("fp8", eight)):
        bundle = load(save(tensors, tmp_path / f"{name}.safetensors"))
        assert list(bundle.models) == list(folder.models) == ["text_encoder", "vision_encoder"]
        for role, values in inputs.items():
            made = run(bundle.models[role], **values)["last_hidden_state"]
            if name != "fp8":
                wanted = run(folder.models[role], **values)["last_hidden_state"]
            if name == "plain" or role == "vision_encoder":
                np.testing.assert_allclose(made, wanted, atol=1e-5)
            elif name == "rounded":
                kept = made
            else:
                np.testing.assert_allclose(made, kept, atol=1e-5)


# -- GGUF ------------------------------------------------------------------------------------------------------------------


def write(path: Path, architecture: str, tensors: Tensors, tell: Callable[[Any], None]) -> Tensors:
    """Write a file as llama.cpp does, matrices in eight bits where they fit; return the values that it holds."""
    writer = gguf.GGUFWriter(path, architecture)
    held = {}
    for name, tensor in tensors.items():
        kind = "Q8_0" if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "rel_b" not in name else "F32"
        number = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(tensor.numpy(), number)
        held[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, number))).reshape(tensor.shape)
        writer.add_tensor(name, data, raw_dtype=number)
    tell(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def t5_words(writer: Any, folder: Path, *, rows: int, charsmap: bytes | None) -> None:
    """Tell of T5's tokenizer as llama.cpp's converter does: the pieces, filled up to the rows of the embedding."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    known = [(word, score) for word, score in whole["model"]["vocab"] if not word.startswith("<extra_id_")]
    fill = rows - len(known)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [word.encode() for word, _ in known] + [f"[PAD{n}]".encode() for n in range(len(known), rows)]
    )
    writer.add_token_scores([score for _, score in known] + [-10000.0] * fill)
    writer.add_token_types([3, 3, 2] + [1] * (len(known) - 3) + [5] * fill)
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(True)
    if charsmap:
        writer.add_precompiled_charsmap(charsmap)


def test_t5_as_gguf_with_its_tokenizer(tmp_path: Path) -> None:
    """llama.cpp's names; every token is that of transformers, which made its tokenizer of the SentencePiece model."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    with (folder / "spiece.model").open("wb") as file:
        pieces.SentencePieceTrainer.train(
            sentence_iterator=iter("\n".join(SMALL.SENTENCES).splitlines()), model_writer=file, vocab_size=500, pad_id=0,
            eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    theirs = transformers.T5Tokenizer.from_pretrained(folder, local_files_only=True)
    theirs.save_pretrained(folder)
    charsmap = json.loads((folder / "tokenizer.json").read_text())["normalizer"]["precompiled_charsmap"]
    module = t5(vocab_size=len(theirs) + 28)
    held = write(
        tmp_path / "t5.gguf", "t5encoder", NAMES.t5_llama(module.state_dict()),
        lambda writer: t5_words(writer, folder, rows=len(theirs) + 28, charsmap=base64.b64decode(charsmap)),
    )  # fmt: skip
    bundle = load(tmp_path / "t5.gguf")
    assert set(bundle.models) == {"text_encoder", "tokenizer", "detokenizer"}
    ours = tokenizers.Tokenizer.from_str(bundle.assets["tokenizer/tokenizer.json"].decode())
    assert len(SMALL.MANY) > 480
    assert [text for text in SMALL.MANY if ours.encode(text).ids != theirs(text).input_ids] == []
    names = [name for name in module.state_dict() if name != "encoder.embed_tokens.weight"]
    module.load_state_dict(dict(zip(names, held.values(), strict=True)), strict=False)
    ids = IDS % 400
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids)).last_hidden_state
    close(run(bundle.models["text_encoder"], input_ids=ids)["last_hidden_state"], wanted)
    half = load(tmp_path / "t5.gguf", weights="f16").models["text_encoder"]
    close(run(half, input_ids=ids)["last_hidden_state"], wanted, 1e-2)
    types = {n.get_element_type().get_type_name() for n in half.get_ops() if n.get_type_name() == "Constant"}
    assert "i8" in types, "matrices stay compressed"


def test_qwen3_as_gguf_with_its_tokenizer_and_template(tmp_path: Path) -> None:
    words = ZIMAGE.write_tokenizer(tmp_path / "tokenizer")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    theirs.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    theirs.save_pretrained(tmp_path / "tokenizer")
    whole = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())

    def tell(writer: Any) -> None:
        known = sorted(whole["model"]["vocab"].items(), key=lambda item: item[1])
        added = [(token["content"], 3 if token["special"] else 4) for token in whole["added_tokens"]]
        writer.add_rope_freq_base(5000000.0)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([word for word, _ in known] + [word for word, _ in added] + ["[PAD600]", "[PAD601]"])
        writer.add_token_types([1] * len(known) + [kind for _, kind in added] + [5, 5])
        writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
        writer.add_eos_token_id(theirs.eos_token_id)
        writer.add_pad_token_id(theirs.pad_token_id)
        writer.add_chat_template(theirs.chat_template)

    module = qwen3(vocab_size=words + 3, hidden_size=32, rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    state = module.state_dict()
    held = write(tmp_path / "qwen.gguf", "qwen3", NAMES.qwen_llama(state), tell)
    bundle = load(tmp_path / "qwen.gguf")
    assert bundle.configs["text_encoder"]["rope_parameters"]["rope_theta"] == 5e6
    ours = tokenizers.Tokenizer.from_str(bundle.assets["tokenizer/tokenizer.json"].decode())
    texts = [*SMALL.MANY, "<|im_start|>user\n<think>hi</think><|im_end|>", "x<|endoftext|>y"]
    assert [text for text in texts if ours.encode(text).ids != theirs(text).input_ids] == []
    config = json.loads(bundle.assets["tokenizer/tokenizer_config.json"])
    assert (config["chat_template"], config["pad_token"]) == (theirs.chat_template, theirs.pad_token)
    module.load_state_dict(dict(zip(state, held.values(), strict=True)))
    ids, mask = IDS % words, MASK
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids), torch.from_numpy(mask), output_hidden_states=True).hidden_states[-2]
    made = run(bundle.models["text_encoder"], input_ids=ids, attention_mask=mask)["hidden_states.3"]
    close(made[mask > 0], wanted[torch.from_numpy(mask > 0)])


@pytest.mark.parametrize("turned", [False, True])
def test_qwen2_5_vl_as_two_gguf_files_gives_what_its_folder_gives(tmp_path: Path, turned: bool) -> None:
    """What reads in one file, what sees in another (mmproj), as llama.cpp keeps them."""
    module = qwen2_5_vl(rope_parameters={"rope_theta": 5e6, "rope_type": "default", "mrope_section": [16, 24, 24]})
    words = [f"word{number}" for number in range(WORDS)]
    words[33] = "<|image_pad|>"

    def reads(writer: Any) -> None:
        writer.add_rope_freq_base(5e6)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)

    def sees(writer: Any) -> None:
        writer.add_string("clip.projector_type", "qwen2.5vl_merger")

    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("model.visual.")}
    held = write(tmp_path / "qwen.gguf", "qwen2vl", NAMES.qwen_llama(state), reads)
    seen = module.model.visual.state_dict()
    held |= write(tmp_path / "mmproj.gguf", "clip", NAMES.qwen_mmproj(seen, turned=turned), sees)
    values = {name: held[new] for name, new in zip(state, NAMES.qwen_llama(state), strict=True)}
    for name, tensor in seen.items():
        parts = [held[new] for new in NAMES.qwen_mmproj({name: tensor}, turned=turned)]
        values[f"model.visual.{name}"] = torch.stack(parts, 2) if tensor.ndim == 5 else torch.cat(parts)
    module.load_state_dict(values)
    module.save_pretrained(tmp_path / "folder")
    random = np.random.default_rng(0)
    inputs = {
        "text_encoder": {
            "input_ids": np.where(IDS == 40, 33, IDS), "attention_mask": MASK, "position_ids": random.integers(0, 5, (3, 2, 5)),
            "visual_states": random.standard_normal((2, 5, 256)).astype(np.float32),
        },
        "vision_encoder": {
            "pixel_values": random.standard_normal((2, 64, 1176)).astype(np.float32), "attention_mask": np.ones((2, 64), np.int64),
            "position_ids": random.integers(0, 8, (2, 64, 2)),
        },
    }  # fmt: skip
    folder = load(tmp_path / "folder")
    for role, file in (("text_encoder", "qwen.gguf"), ("vision_encoder", "mmproj.gguf")):
        bundle = load(tmp_path / file)
        assert list(bundle.models) == [role]
        if role == "text_encoder":
            assert bundle.configs[role]["image_token_id"] == 33
            inputs[role]["input_ids"] = np.where(inputs[role]["input_ids"] == 33, 32, inputs[role]["input_ids"])
        made = run(bundle.models[role], **inputs[role])["last_hidden_state"]
        np.testing.assert_allclose(made, run(folder.models[role], **inputs[role])["last_hidden_state"], atol=1e-4)


def test_gguf_files_of_others_that_look_like_qwen2_5_vl_are_refused(tmp_path: Path) -> None:
    module = qwen2_5_vl()
    state = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("model.visual.")}
    write(tmp_path / "qwen2.gguf", "qwen2", NAMES.qwen_llama(state), lambda writer: None)
    with pytest.raises(ModelError, match="it is a qwen2, which only reads"):
        load(tmp_path / "qwen2.gguf")
    seen = NAMES.qwen_mmproj(module.model.visual.state_dict(), turned=False)
    write(
        tmp_path / "other.gguf", "clip", seen, lambda writer: writer.add_string("clip.projector_type", "qwen3vl_merger")
    )
    with pytest.raises(ModelError, match="of the kind qwen3vl_merger"):
        load(tmp_path / "other.gguf")


def test_a_tokenizer_of_another_scheme_is_left_alone(tmp_path: Path) -> None:
    """Then it comes from a folder: of the option, or beside the file; or not at all."""
    SMALL.write_t5_tokenizer(tmp_path / "folder/tokenizer_3")

    def tell(writer: Any) -> None:
        t5_words(writer, tmp_path / "folder/tokenizer_3", rows=WORDS, charsmap=None)
        writer.add_bool("tokenizer.ggml.unused", True)

    tensors = NAMES.t5_llama(t5().state_dict())
    write(tmp_path / "t5.gguf", "t5encoder", tensors, lambda writer: writer.add_tokenizer_model("llama"))
    assert list(load(tmp_path / "t5.gguf").models) == ["text_encoder"]
    brought = load(tmp_path / "t5.gguf", tokenizer=tmp_path / "folder")
    assert "tokenizer/tokenizer.json" in brought.assets
    with pytest.raises(ModelError, match=r"load\.tokenizer.*holds no T5Tokenizer"):
        load(tmp_path / "t5.gguf", tokenizer=tmp_path)

    def lying(writer: Any) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list(["<pad>", "</s>", "<unk>"])
        writer.add_token_types([1])

    write(tmp_path / "bad.gguf", "t5encoder", tensors, lying)
    with pytest.raises(ModelError, match="its tokenizer cannot be read") as caught:
        load(tmp_path / "bad.gguf")
    assert "tokenizer = FOLDER" in str(caught.value)


# -- configs of the published models, and files of other kinds -----------------------------------------------------------------

PUBLISHED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "clip_l": (
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "quick_gelu", "vocab_size": 49408},
    ),
    "clip_g": (
        lambda: transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32, projection_dim=1280)),
        {"hidden_size": 1280, "num_attention_heads": 20, "num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280},
    ),
    "t5xxl": (
        lambda: transformers.T5EncoderModel(transformers.T5Config(
            d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")),
        {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "relative_attention_num_buckets": 32},
    ),
    "qwen_3_4b": (
        lambda: transformers.Qwen3Model(transformers.Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8)),
        {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "gemma_2_2b": (
        lambda: transformers.Gemma2Model(transformers.Gemma2Config()),
        {"hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text_encoders_are_known_by_their_shapes(name: str) -> None:
    make, wanted = PUBLISHED[name]
    with torch.device("meta"):
        module = make()
    state = {key: tensor for key, tensor in module.state_dict().items() if "position_ids" not in key}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if name.startswith("clip"):
        shapes = {key if key.startswith("text_") else f"text_model.{key}": shape for key, shape in shapes.items()}
    [part] = find_components(shapes).values()
    names = text_encoder_names(part, shapes)
    ours = text_encoder_config(part, {new: shapes[old] for old, new in names.items()}, {})
    assert {key: ours[key] for key in wanted} == wanted


def test_the_published_qwen2_5_vl_is_known_by_its_shapes() -> None:
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    with torch.device("meta"):
        module = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(
                text_config=text, vision_config={"hidden_size": 1280, "out_hidden_size": 3584}
            )
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    [part] = find_components(shapes).values()
    ours = text_encoder_config(part, shapes, {})
    assert {key: ours["text_config"][key] for key in text} == text
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "spatial_merge_size": 2,
              "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
    assert {key: ours["vision_config"][key] for key in vision} == vision


def test_text_encoders_of_other_models_are_not_claimed() -> None:
    base = {name: tuple(t.shape) for name, t in qwen3().state_dict().items()}
    assert find_components({f"model.{n}": s for n, s in base.items()})[""] == Part("Qwen3Model", "", "transformers")
    gemma3 = {**{f"model.{n}": s for n, s in base.items()}, "model.layers.0.post_feedforward_layernorm.weight": (24,)}
    assert find_components(gemma3) == {}
    t5_shapes = {name: tuple(t.shape) for name, t in t5().state_dict().items()}
    again = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
    assert find_components({**t5_shapes, again: (8, 2)}) == {}, "UMT5 has distances in each layer"
    adapter = {f"{name}.lora_A.weight": (4, 4) for name in t5_shapes} | t5_shapes
    assert find_components(adapter) == {}


def test_a_config_folder_decides(tmp_path: Path) -> None:
    """Of a pipeline's folder, the component of this class; also of another width than is usual."""
    module = t5(relative_attention_max_distance=20)
    module.save_pretrained(tmp_path / "pipe/text_encoder_3")
    index = {"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": ["transformers", "T5EncoderModel"]}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    path = save(module.state_dict(), tmp_path / "t5.safetensors")
    ids = np.arange(120)[None] % WORDS
    with torch.no_grad():
        wanted = module(torch.from_numpy(ids)).last_hidden_state
    close(run(load(path, config=tmp_path / "pipe").models["text_encoder"], input_ids=ids)["last_hidden_state"], wanted)
    assert (
        np.abs(run(load(path).models["text_encoder"], input_ids=ids)["last_hidden_state"] - wanted.numpy()).max() > 1e-3
    )
    with pytest.raises(ModelError, match=r"load\.config.*has no CLIPTextModelWithProjection"):
        load(save(NAMES.clip_text(clip(64, False).state_dict()), tmp_path / "c.safetensors"), config=tmp_path / "pipe")


def test_a_tokenizer_alone_in_a_folder(tmp_path: Path) -> None:
    SMALL.write_t5_tokenizer(tmp_path / "tokenizer")
    bundle = load(tmp_path / "tokenizer")
    assert set(bundle.models) == {"tokenizer", "detokenizer"}
    assert "tokenizer/tokenizer.json" in bundle.assets
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(tmp_path / "tokenizer")) is Match.NO


def test_several_text_encoders_without_a_transformer_are_refused(tmp_path: Path) -> None:
    state = {f"text_encoders.t5xxl.transformer.{name}": tensor for name, tensor in t5().state_dict().items()}
    more = NAMES.clip_text(clip(64, False).state_dict())
    both = {**state, **{f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in more.items()}}
    with pytest.raises(ModelError, match="several text encoders"):
        load(save(both, tmp_path / "both.safetensors"))
    alone = load(save(state, tmp_path / "one.safetensors"))
    assert list(alone.models) == ["text_encoder"]
    assert (
        Part(CLIP, "text_encoders.clip_l.transformer.", "transformers")
        in find_components({name: tuple(tensor.shape) for name, tensor in both.items()}).values()
    )
