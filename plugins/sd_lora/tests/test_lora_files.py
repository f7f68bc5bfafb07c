"""Files from strangers, and the arithmetic of kinds without any model."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ovforge.errors import ModelError, OvforgeError
from ovforge.model.sources import FileSource
from ovforge_sd_lora import kinds
from ovforge_sd_lora.adapter import open_adapter
from ovforge_sd_lora.names import aliases, flat, parse_key
from ovforge_sd_lora.tensors import TensorFile

UP, DOWN = "lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight"


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {UP: entry([1 << 40, 1 << 40], 0, 1 << 82)},
        {UP: entry([2, 2], 0, 1 << 60)},
        {UP: entry([2, 2], 0, 8)},
        {UP: entry([-2, -2], 0, 16)},
        {UP: entry([2.0, 2], 0, 16)},
        {UP: entry([True, 4], 0, 16)},
        {UP: entry([2, 2], -16, 0)},
        {UP: entry([2, 2], 0, 16, "F31")},
        {UP: {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]}},
        {UP: {"dtype": {"F32": 1}, "shape": [2, 2], "data_offsets": [0, 16]}},
        {UP: {"dtype": "F32", "shape": "22", "data_offsets": [0, 16]}},
        {UP: {"dtype": "F32", "shape": [2, 2], "data_offsets": {"0": 1, "16": 2}}},
        {UP: entry([1] * 98 + [2, 2], 0, 16)},
        {UP: entry([float("inf"), 2], 0, 16)},
        {UP: entry([2, 2], 0, 16), DOWN: entry([2, 1], 8, 16)},
        {UP: entry([2, 2], 0, 16), DOWN: entry([2, 2], 0, 16)},
        {"\ud800.lora_up.weight": entry([2, 2], 0, 16)},
        {UP: {"shape": [2, 2]}},
        {UP: [1, 2]},
        {UP: entry([2, 2], 0, 16), "__metadata__": 3},
        [],
        b"not JSON",
        b"[" * 100_000,
    ],
    ids=lambda header: str(header)[:40],
)
def test_lying_headers_are_refused_before_anything_is_read(tmp_path: Path, header: Any) -> None:
    with pytest.raises(ModelError, match=r"not a whole \.safetensors file") as error:
        open_adapter(written(tmp_path / "x.safetensors", header, bytes(16)), "x")
    assert error.value.hint


@pytest.mark.parametrize("data", [b"", b"\x01", struct.pack("<Q", 1 << 62), struct.pack("<Q", 100) + b"{}"])
def test_files_that_are_cut_off_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match="not a whole"):
        open_adapter(path, "x")


@settings(max_examples=150)
@given(data=st.binary(max_size=80), length=st.integers(0, 90))
def test_any_bytes_give_an_error_in_words(tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int) -> None:
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + data)
    with pytest.raises(ModelError):
        open_adapter(path, "x")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(tmp_path: Path, kind: str, number: float) -> None:
    values = np.array([1, number, 2, 3], np.float32)
    raw = {"F32": values, "F16": values.astype("f2"), "BF16": (values.view(np.uint32) >> 16).astype("u2")}[
        kind
    ].tobytes()
    path = written(tmp_path / "x.safetensors", {UP: entry([2, 2], 0, len(raw), kind)}, raw)
    with pytest.raises(ModelError, match="NaN or infinite"):
        TensorFile(FileSource(path), path.name).read(UP)


def test_every_type_is_read_exactly(tmp_path: Path) -> None:
    values = np.array([[1.5, -0.25], [3.0, 0.0078125]], np.float32)
    raw = {
        "F64": values.astype("f8"),
        "F32": values,
        "F16": values.astype("f2"),
        "BF16": (values.view("u4") >> 16).astype("u2"),
    }
    for kind, stored in raw.items():
        path = written(tmp_path / f"{kind}.safetensors", {"a": entry([2, 2], 0, stored.nbytes, kind)}, stored.tobytes())
        assert np.array_equal(TensorFile(FileSource(path), path.name).read("a"), values)
    path = written(tmp_path / "u64.safetensors", {"a": entry([1], 0, 8, "U64")}, bytes(8))
    with pytest.raises(ModelError, match="U64"):
        TensorFile(FileSource(path), path.name).read("a")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("end", [".scale_weight", ".weight_scale", None])
def test_float8_is_read_as_torch_reads_it(tmp_path: Path, kind: str, end: str | None) -> None:
    """Every byte that is a number; scaled by one number, or by one for each row."""
    torch = pytest.importorskip("torch")
    theirs = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[kind]
    every = torch.arange(256, dtype=torch.uint8).view(theirs).float()
    bytes_ = torch.arange(256, dtype=torch.uint8)[torch.isfinite(every)]
    bytes_ = bytes_[: len(bytes_) // 2 * 2].reshape(2, -1)
    wanted, data = bytes_.view(theirs).float().numpy(), bytes_.numpy().tobytes()
    for scale in (np.array(0.25, np.float32), np.array([[0.5], [3.0]], np.float32)):
        header = {"x.lora_up.weight": entry(list(wanted.shape), 0, len(data), kind)}
        if end is not None:
            begin = len(data) + len(data) % 4
            header[f"x.lora_up{end}"] = entry(list(scale.shape), begin, begin + scale.nbytes)
            header["scaled_fp8"] = entry([0], begin + scale.nbytes, begin + scale.nbytes, kind)
        path = written(tmp_path / "f8.safetensors", header, data + bytes(len(data) % 4) + scale.tobytes())
        file = TensorFile(FileSource(path), path.name)
        assert set(file.tensors) == {"x.lora_up.weight"}
        assert np.array_equal(file.read("x.lora_up.weight"), wanted * scale if end else wanted)


class Explosive:
    def __reduce__(self) -> Any:
        return (Path("/nonexistent/exploded").write_text, ("bang",))


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Explosive()))
    with pytest.raises(ModelError, match="pickle, which can run code"):
        open_adapter(path, "x")
    renamed = tmp_path / "y.safetensors"
    renamed.write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="not a whole"):
        open_adapter(renamed, "y")


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ({DOWN: (2, 4)}, "it has no up"),
        ({DOWN: (2, 4), UP: (4, 3)}, "does not fit"),
        ({DOWN: (0, 4), UP: (4, 0)}, "empty"),
        ({DOWN: (2, 4), UP: (4,)}, "does not fit"),
        ({DOWN: (2, 4), UP: (4, 2), "lora_unet_conv_in.alpha": (2,)}, "alpha is"),
        ({DOWN: (2, 4), UP: (4, 2), "lora_unet_conv_in.hada_t1": (2, 2)}, "does not belong"),
        ({"lora_unet_conv_in.lokr_w1": (2, 2)}, "neither lokr_w2"),
        ({"lora_unet_conv_in.hada_w1_a": (2, 2)}, "it has no"),
        ({"lora_unet_conv_in.alpha": ()}, "alpha alone"),
        ({"lora_unet_conv_in.oft_diag": (2, 2)}, "'oft_diag' is not supported"),
        ({"lora_unet_conv_in.lambda_layer": (2, 2)}, "'lambda_layer' is not supported"),
        ({"base_model.model.conv_in.waveft_spectrum": (2,)}, "'waveft_spectrum' is not supported"),
        ({"base_model.model.conv_in.oft_R.weight": (2, 3)}, "adapter_config.json, .* is not there"),
        (
            {"base_model.model.x.vera_lambda_b": (2,), "base_model.model.x.vera_lambda_d": (2,)},
            "_config.json, .* is not",
        ),
        ({"base_model.model.x.randlora_lambda": (2,), "base_model.model.x.randlora_gamma": (2,)}, "no randlora_A"),
        ({"lora_unet_conv_in.a1.weight": (2, 2)}, "it has no a2, b1, b2"),
        ({"lora_unet_conv_in.dora_scale": (2, 1)}, "alone change nothing"),
        ({"first_stage_model.decoder.weight": (2, 2)}, "no adapter's tensor"),
    ],
)
def test_factors_that_do_not_belong_together_are_said(tmp_path: Path, tensors: dict[str, Any], why: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({key: np.ones(shape, np.float32) for key, shape in tensors.items()}, path)
    with pytest.raises(ModelError, match=why):
        open_adapter(path, "x")


def test_a_config_that_is_none_is_said(tmp_path: Path) -> None:
    save_file(
        {DOWN: np.ones((2, 4), np.float32), UP: np.ones((4, 2), np.float32)}, tmp_path / "adapter_model.safetensors"
    )
    for text in ("[]", "{", '{"r": "x"}', '{"r": 2, "lora_alpha": 1e999}', '{"r": 2, "alpha_pattern": {"a": null}}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match="not a PEFT config|expected a JSON object|not valid JSON"):
            open_adapter(tmp_path, "x")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8, "use_rslora": true}')
    assert open_adapter(tmp_path, "x").modules[0].factor == pytest.approx(8 / 2**0.5)


def peft_folder(folder: Path, **values: Any) -> Path:
    """Write a folder of PEFT with one linear layer's LoRA of rank 2."""
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": (2, 4), f"{name}.lora_B.weight": (4, 2)}
    folder.mkdir(exist_ok=True)
    save_file({key: np.ones(shape, np.float32) for key, shape in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"peft_type": "WAVEFT"}, "of the kind WAVEFT"),
        ({"peft_type": "PROMPT_TUNING"}, "of the kind PROMPT_TUNING"),
        ({"peft_type": ["LORA"]}, "of the kind"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"init_lora_weights": "lora_ga"}, "changed the base"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"kasa_config": {"x": 1}}, "KaSA"),
        ({"r": 1e999}, "not valid JSON"),
        ({"r": 0}, "not a PEFT config"),
        ({"lora_alpha": 10**400}, "not a PEFT config"),
        ({"alpha_pattern": ["to_q"]}, "not a PEFT config"),
        ({"alpha_pattern": {"to_(q": 2}}, "not a valid pattern"),
    ],
    ids=str,
)
def test_what_peft_has_and_cannot_be_applied_is_named(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelError, match=why):
        open_adapter(peft_folder(tmp_path / "adapter", **values), "x")


@pytest.mark.parametrize(
    ("patterns", "factor"),
    [
        ({"to_q": 8}, 4),
        ({"q": 8}, 1),  # a pattern is a whole name, or begins behind a dot
        ({r"attn\d\.to_q": 8}, 4),
        ({r"down_blocks\..*\.to_(q|k)": 8}, 4),
        ({r".*to_k": 8, "attn1.to_q": 6, "to_q": 10}, 3),  # the first that fits
        ({"to_k|.*to_q": 8}, 4),
        ({r"attn1\.(to_q|to_v)|x": 8}, 4),
    ],
    ids=str,
)
def test_patterns_match_as_in_peft(tmp_path: Path, patterns: dict[str, float], factor: float) -> None:
    other = pytest.importorskip("peft.utils.other")
    found = open_adapter(peft_folder(tmp_path / "adapter", alpha_pattern=patterns), "x").modules[0]
    key = other.get_pattern_key(patterns.keys(), found.name)
    assert found.factor == patterns.get(key, 2) / 2 == factor


def test_a_pattern_that_takes_for_ever_does_not(tmp_path: Path) -> None:
    """Python's own module would try every way to split the name."""
    folder = peft_folder(tmp_path / "adapter", alpha_pattern={r"([a-z._0-9]|[a-z0-9._])+(?<!q)": 8})
    assert open_adapter(folder, "x").modules[0].factor == 1


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def lora_at(*names: str, half: str = "lora_down.weight lora_up.weight") -> dict[str, Any]:
    down, up = half.split()
    pairs = [(f"{name}.{down}", (2, 4)) for name in names] + [(f"{name}.{up}", (4, 2)) for name in names]
    return {key: np.full(shape, 1 + number, np.float32) for number, (key, shape) in enumerate(pairs)}


def test_one_of_several_adapters_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "several.safetensors"
    named = {f"unet.{LAYER}.lora_{half}.{name}.weight": np.full((2, 4) if half == "A" else (4, 2), n, np.float32)
             for n, name in enumerate(("hero", "style"), 1) for half in "AB"}  # fmt: skip
    save_file(named, path)
    with pytest.raises(ModelError, match=r"several adapters: hero, style\n.*adapter = \"hero\""):
        open_adapter(path, "x")
    assert [float(open_adapter(path, "x", name).modules[0].delta()[0, 0]) for name in ("hero", "style")] == [2, 8]
    with pytest.raises(OvforgeError, match=r"no adapter 'villain'\n.*hero, style"):
        open_adapter(path, "x", "villain")


def test_two_keys_for_one_tensor(tmp_path: Path) -> None:
    """Under two prefixes they are two modules, which add up; under the same the second is refused."""
    path = tmp_path / "twice.safetensors"
    save_file(
        lora_at("lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"), path
    )
    found = open_adapter(path, "x")
    assert {(m.role, m.keys["down"][:9]) for m in found.modules} == {
        ("text_encoder", "lora_te_t"), ("text_encoder", "lora_te1_")
    }  # fmt: skip
    save_file(lora_at(f"unet.{LAYER}") | lora_at(f"unet.{LAYER}", half="lora_A.weight lora_B.weight"), path)
    assert all("the same tensor as" in skipped.reason for skipped in open_adapter(path, "x").unknown)
    assert len(open_adapter(path, "x").unknown) == 2


@pytest.mark.parametrize(
    ("key", "role", "module"),
    [
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder", "encoder_layers_0_mlp_fc1"),
        ("text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2", "encoder_layers_0_mlp_fc1"),
        ("clip_l.text_model.encoder.layers.0.mlp.fc1", "text_encoder", "encoder_layers_0_mlp_fc1"),
        ("clip_g.transformer.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2", "encoder_layers_0_mlp_fc1"),
        (f"state_dict.unet.{LAYER}", "unet", LAYER.replace(".", "_")),
        ("state_dict.lora_unet_conv_in", "unet", "conv_in"),
        (f"module.base_model.model.{LAYER}", "unet", LAYER.replace(".", "_")),
    ],
)  # fmt: skip
def test_prefixes_of_other_programs(key: str, role: str, module: str) -> None:
    found = parse_key(f"{key}.lora_down.weight")
    assert found is not None
    assert (found.role, flat(found.module)) == (role, module)


def test_words_in_an_adapter_are_told(tmp_path: Path) -> None:
    path = tmp_path / "bundle.safetensors"
    words = {f"bundle_emb.{name}.string_to_param.*": np.ones((2, 4), np.float32) for name in ("zork", "hero-face")}
    save_file(lora_at("lora_unet_conv_in") | words, path)
    found = open_adapter(path, "x")
    assert (sorted(found.words), len(found.modules), found.unknown) == (["hero-face", "zork"], 1, ())
    assert any("zork" in note and "textual-inversion" in note for note in found.notes)
    save_file(words, path)
    with pytest.raises(ModelError, match=r'the words .*\n.*"textual-inversion"'):
        open_adapter(path, "x")


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_3_linear1"), "FLUX.1 or FLUX.2"),
        (("lora_unet_double_blocks_0_img_mod_lin", "lora_unet_single_blocks_3_linear1"), "FLUX.1"),
        (("lora_unet_double_blocks_0_img_attn_proj", "transformer.single_stream_modulation.linear"), "FLUX.2"),
        (("transformer.single_transformer_blocks.0.attn.to_q",), "FLUX.1"),
        (("diffusion_model.double_blocks.0.img_mlp.fc1", "diffusion_model.double_blocks.0.img_attn_qkv"), "HunyuanVideo"),
        (("transformer.transformer_blocks.0.attn.add_q_proj",), "Stable Diffusion 3, FLUX or Qwen-Image"),
        (("lycoris_transformer_blocks_0_norm1_context_linear",), "Stable Diffusion 3 or FLUX.1"),
        (("diffusion_model.blocks.0.cross_attn.kv_linear",), "PixArt or Sana"),
        (("lora_unet_joint_blocks_1_x_block_attn_qkv",), "Stable Diffusion 3"),
        (("transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.img_mlp.net.0.proj"), "Qwen-Image"),
        (("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.ffn.0"), "Wan"),
        (("lora_unet_blocks_0_cross_attn_k",), "Wan"),
        (("diffusion_model.layers.0.attention.to_q",), "Z-Image or Lumina"),
        (("base_model.model.model.layers.0.self_attn.q_proj",), "a language model"),
        (("transformer.transformer_blocks.0.attn1.to_q",), "a diffusion transformer (as LTX-Video, CogVideoX or PixArt)"),
        (("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",), None),
        (("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_middle_block_1_proj_in"), None),
        (("lora_te_text_model_encoder_layers_0_self_attn_q_proj",), None),
        (("conv_in", "unet.up_blocks.1.resnets.0.conv1", "time_embedding.linear_1"), None),
    ],
)  # fmt: skip
def test_adapters_of_other_families_are_named(tmp_path: Path, names: tuple[str, ...], family: str | None) -> None:
    save_file(lora_at(*names), tmp_path / "other.safetensors")
    found = open_adapter(tmp_path / "other.safetensors", "x").family
    assert (found and found.name) == family


ranks, sides = st.integers(1, 5), st.integers(1, 9)


@settings(max_examples=60)
@given(data=st.data(), rank=ranks, out=sides, inner=sides, kernel=st.sampled_from([(), (1, 1), (3, 3)]))
def test_factors_are_exact(data: st.DataObject, rank: int, out: int, inner: int, kernel: tuple[int, ...]) -> None:
    """B @ A is the delta, whatever the kind, and the shape said before reading is the delta's."""
    kind = data.draw(st.sampled_from(["LoRA", "LoHa", "LoKr"]))
    tucker = bool(kernel) and data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    shapes: dict[str, tuple[int, ...]]
    if kind == "LoRA":
        shapes = {"down": (rank, inner, *(() if not kernel else (1, 1) if tucker else kernel)), "up": (out, rank)}
        shapes |= {"mid": (rank, rank, *kernel)} if tucker else {}
    elif kind == "LoHa":
        other = data.draw(ranks)
        shapes = {}
        for n, r in ((1, rank), (2, other)):
            flat_ = inner * int(np.prod(kernel))
            shapes |= {f"w{n}_a": (r, out) if tucker else (out, r), f"w{n}_b": (r, inner) if tucker else (r, flat_)}
            shapes |= {f"t{n}": (r, r, *kernel)} if tucker else {}
    else:
        first, second = (data.draw(st.tuples(sides, sides)) for _ in range(2))
        shapes = (
            {"lokr_w1": first}
            if data.draw(st.booleans())
            else {"lokr_w1_a": (first[0], rank), "lokr_w1_b": (rank, first[1])}
        )
        if tucker:
            shapes |= {"lokr_t2": (rank, rank, *kernel), "lokr_w2_a": (rank, second[0]), "lokr_w2_b": (rank, second[1])}
        elif data.draw(st.booleans()):
            shapes |= {"lokr_w2": (*second, *kernel)}
        else:
            shapes |= {"lokr_w2_a": (second[0], rank), "lokr_w2_b": (rank, second[1])}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    assert kinds.kind_of(set(shapes)) == kind
    whole = kinds.delta(kind, tensors)
    assert whole.shape == kinds.delta_shape(kind, shapes)
    a, b = kinds.factors(kind, tensors, 10**6) or (None, None)
    product = np.tensordot(b, a, axes=(1, 0))
    assert np.allclose(product.reshape(whole.shape), whole, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(whole).max()))
    assert kinds.factors(kind, tensors, 0) is None or kind == "LoRA"


def test_the_kinds_are_those_of_lycoris() -> None:
    torch = pytest.importorskip("torch")
    general = pytest.importorskip("lycoris.functional.general")
    loha = pytest.importorskip("lycoris.functional.loha")
    lokr = pytest.importorskip("lycoris.functional.lokr")
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    core, a, b = draw(2, 2, 3, 3), draw(2, 5), draw(2, 4)
    other = (draw(2, 2, 3, 3), draw(2, 5), draw(2, 4))
    ours = {"t1": core, "w1_a": a, "w1_b": b, "t2": other[0], "w2_a": other[1], "w2_b": other[2]}
    theirs = loha.diff_weight(b, a, other[2], other[1], core, other[0], gamma=torch.tensor(1.0))
    assert np.allclose(kinds.delta("LoHa", {k: v.numpy() for k, v in ours.items()}), theirs.numpy(), atol=1e-4)
    first, t2, wa, wb = draw(3, 2), draw(2, 2, 3, 3), draw(2, 4), draw(2, 5)
    theirs = lokr._kron_weight(first, None, None, None, wa, wb, t2, 1.0)
    mine = kinds.delta(
        "LoKr", {k: v.numpy() for k, v in {"lokr_w1": first, "lokr_t2": t2, "lokr_w2_a": wa, "lokr_w2_b": wb}.items()}
    )
    assert np.allclose(mine, theirs.numpy(), atol=1e-4)
    weight, added = draw(5, 4, 3, 3), draw(5, 4, 3, 3)
    for by_input, scale in ((False, draw(5, 1, 1, 1)), (True, draw(1, 4, 1, 1))):
        theirs = general._weight_decompose(weight + added, scale, 1, not by_input)
        mine = kinds.decompose(weight.numpy(), added.numpy(), scale.numpy(), by_input=by_input)
        assert np.allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-5)


def architecture(levels: int, layers: int, attending: list[bool]) -> list[str]:
    """Return the paths of some modules of a UNet with `layers` ResNets in each down block."""
    found = ["conv_in", "conv_out", "time_embedding.linear_1", "mid_block.attentions.0.proj_in"]
    found += [f"mid_block.resnets.{number}.conv1" for number in (0, 1)]
    inside = ("proj_in", "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.ff.net.0.proj")
    for level in range(levels):
        for side, count in (("down", layers), ("up", layers + 1)):
            attends = attending[level if side == "down" else levels - 1 - level]
            for number in range(count):
                block = f"{side}_blocks.{level}"
                found += [f"{block}.resnets.{number}.{part}" for part in ("conv1", "conv2", "time_emb_proj", "norm1")]
                found += [f"{block}.attentions.{number}.{part}" for part in inside if attends]
        if level + 1 < levels:
            found += [f"down_blocks.{level}.downsamplers.0.conv", f"up_blocks.{level}.upsamplers.0.conv"]
    return found


@settings(max_examples=25)
@given(levels=st.integers(1, 4), layers=st.integers(1, 3), attending=st.lists(st.booleans(), min_size=4, max_size=4))
def test_every_path_is_found_under_all_its_names(levels: int, layers: int, attending: list[bool]) -> None:
    found = architecture(levels, layers, attending)
    known = aliases(found)
    for path in found:
        assert known[flat(path)] == path
        for prefix in (
            "lora_unet_{}",
            "lycoris_{}",
            "unet.{}",
            "base_model.model.{}",
            "unet.base_model.model.{}",
            "unet.unet.{}",
        ):
            written_ = path.replace(".", "_") if prefix.endswith("_{}") else path
            key = parse_key(prefix.format(written_) + ".lora_down.weight")
            assert key is not None
            assert (key.role, known[flat(key.module)], key.tensor) == ("unet", path, "down")
    numbered = [name for name in known if "put_blocks" in name or "middle_block" in name]
    blocks = [path for path in found if "_block" in path]
    assert len(numbered) == len(blocks) + 1  # conv_in is input_blocks.0.0, too
    assert sorted({known[name] for name in numbered}) == sorted([*blocks, "conv_in"])
