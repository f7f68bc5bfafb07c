"""GroundingDINO against transformers on torch, float32: any size, any text, padding, several pictures at once."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovforge_grounding_dino
from detectors import make_folder, make_model, write_tokenizer
from ovforge import testing
from ovforge.contracts.stages import Match
from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.model.runtime import core
from ovforge.model.sources import FileSource
from ovforge_grounding_dino import original
from ovforge_grounding_dino.loader import GroundingDinoLoader
from ovforge_grounding_dino.options import LoaderOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
NARROW = {"num_queries": 50, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
NARROW |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
HORSE, CLOUDS, DOT, ASKS = 1030, 1031, 1012, 1029


class Compiled:
    """The roles of a folder or checkpoint, in f32."""

    def __init__(self, source: Path, **options: Any) -> None:
        bundle = GroundingDinoLoader(LoaderOptions(weights="f32", **options)).load(FileSource(source))
        self.bundle = bundle
        self.text, self.detector = (
            core().compile_model(bundle.models[role], "CPU", EXACT) for role in ("text_encoder", "detector")
        )

    def __call__(self, pixels: Any, mask: Any, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        module = transformers.models.grounding_dino.modeling_grounding_dino
        see, positions = module.generate_masks_with_special_tokens_and_transfer_map(
            ids, torch.tensor([101, 102, DOT, ASKS])
        )
        text = {"text_self_mask": see.numpy(), "text_position_ids": positions.numpy()}
        features = self.text({"input_ids": ids.numpy(), **text})["text_features"]
        found = self.detector(
            {
                "pixel_values": pixels.numpy(),
                "pixel_mask": mask.numpy(),
                "text_features": features,
                "text_mask": (ids != 0).numpy(),
                **text,
            }
        )
        return found["logits"], found["boxes"]


def text_ids(words: int, number: int = 0, padding: int = 0) -> Any:
    """Return ids of a text of phrases of up to three words, ended as GroundingDINO's are."""
    draw = np.random.default_rng(number)
    ids = [101]
    for n in range(words):
        ids.append(HORSE + int(draw.integers(12)))
        if n == words - 1 or draw.random() < 0.5:
            ids.append(DOT)
    return torch.tensor([ids + [102] + [0] * padding])


def agree(model: Any, compiled: Compiled, pixels: Any, mask: Any, ids: Any) -> None:
    """Check logits to 1e-3 of their size, boxes to half a pixel, and the kept set away from the threshold.

    One picture may come with several texts. Two of fifty queries may differ: those of nearly the same score change
    places, or the last one is another, as a processor rounds.
    """
    each = {"pixel_values": pixels.expand(len(ids), -1, -1, -1), "pixel_mask": mask.long().expand(len(ids), -1, -1)}
    with torch.no_grad():
        expected = model(**each, input_ids=ids, attention_mask=(ids != 0).long())
    logits, boxes = compiled(pixels, mask, ids)
    tokens = ids != 0
    wanted = expected.logits[..., : ids.shape[1]]
    assert logits.shape == wanted.shape
    real = tokens[:, None].expand_as(wanted).numpy()
    wanted = wanted.numpy()
    side = max(pixels.shape[2:])
    close = (np.isclose(logits, wanted, atol=1e-3, rtol=1e-4) | ~real).all(-1)
    close &= (np.abs(boxes - expected.pred_boxes.numpy()) * side <= 0.5).all(-1)
    assert (close.mean(-1) >= 0.96).all(), close.mean(-1)
    assert (logits[~real] < -1e3).all()
    best = np.where(real, wanted, -np.inf).max(-1)
    threshold = np.median(best)
    clear = (np.abs(best - threshold) > 1e-2) & close
    np.testing.assert_array_equal((logits.max(-1) > threshold)[clear], (best > threshold)[clear])


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("dino") / "grounding-dino"
    return folder, make_folder(folder)


@pytest.fixture(scope="module")
def compiled(dino: tuple[Path, Any]) -> Compiled:
    return Compiled(dino[0])


@pytest.mark.parametrize(("height", "width", "words"), [(256, 341, 5), (197, 263, 1), (64, 400, 30), (301, 160, 3)])
def test_sizes_and_texts_agree_with_torch(
    dino: tuple[Path, Any], compiled: Compiled, height: int, width: int, words: int
) -> None:
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height))
    agree(dino[1], compiled, pixels, torch.ones(1, height, width), text_ids(words, height))


def test_padded_pictures_and_texts_of_one_batch(dino: tuple[Path, Any], compiled: Compiled) -> None:
    pixels = torch.randn(2, 3, 224, 256, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 224, 256)
    mask[0, 150:], mask[1, :, 200:] = 0, 0
    pixels = pixels * mask[:, None]
    ids = torch.cat([text_ids(4, 1), text_ids(4, 1)])
    short = text_ids(2, 5)[0]
    ids[1] = 0
    ids[1, : len(short)] = short
    agree(dino[1], compiled, pixels, mask, ids)


def test_one_picture_with_several_texts(dino: tuple[Path, Any], compiled: Compiled) -> None:
    pixels = torch.randn(1, 3, 160, 192, generator=torch.Generator().manual_seed(4))
    texts = [text_ids(6, 1)[0], text_ids(2, 5)[0], text_ids(4, 3)[0]]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    agree(dino[1], compiled, pixels, torch.ones(1, 160, 192), ids)


def test_mm_grounding_dino(tmp_path: Path) -> None:
    model = make_folder(tmp_path / "mm", "MMGroundingDino", **NARROW)
    agree(model, Compiled(tmp_path / "mm"), torch.randn(1, 3, 128, 160), torch.ones(1, 128, 160), text_ids(5))


def test_contract(dino: tuple[Path, Any], tmp_path: Path) -> None:
    testing.check_plugin(ovforge_grounding_dino)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "clip"}')
    (other / "model.safetensors").write_bytes(b"")
    bundle: ModelBundle = testing.check_loader(ovforge_grounding_dino, "grounding-dino", dino[0], other)
    types = {node.get_type_name() for role in bundle.models for node in bundle.models[role].get_ops()}
    assert "PythonOp" not in types
    assert "GridSample" in types


# -- the original checkpoints -------------------------------------------------------------------------------------

_BACK = [
    ("model.backbone.conv_encoder.model.swin.embeddings.patch_embeddings.projection.", "backbone.0.patch_embed.proj."),
    ("model.backbone.conv_encoder.model.swin.embeddings.norm.", "backbone.0.patch_embed.norm."),
    ("model.backbone.conv_encoder.model.swin.encoder.", "backbone.0."),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage2.", "backbone.0.norm1."),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage3.", "backbone.0.norm2."),
    ("model.backbone.conv_encoder.model.hidden_states_norms.stage4.", "backbone.0.norm3."),
    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj"),
    ("attention.relative_position_bias.", "attn."), ("attention.q_proj", "attn.qkv|0"),
    ("attention.k_proj", "attn.qkv|1"), ("attention.v_proj", "attn.qkv|2"),
    ("model.text_backbone.", "bert."), ("model.text_projection.", "feat_map."),
    ("model.input_proj_vision.", "input_proj."), ("model.level_embed", "transformer.level_embed"),
    ("model.query_position_embeddings.", "transformer.tgt_embed."),
    ("model.encoder_output_bbox_embed.", "transformer.enc_out_bbox_embed."),
    ("model.enc_output", "transformer.enc_output"), ("model.decoder.layer_norm.", "transformer.decoder.norm."),
    ("model.decoder.reference_points_head.", "transformer.decoder.ref_point_head."),
    ("model.decoder.bbox_embed.", "transformer.decoder.bbox_embed."),
]  # fmt: skip
"""transformers' names of today -> the original's, as its own conversion script has them."""

_LAYERS = {
    r"model.encoder.layers.N.deformable_layer.": ("transformer.encoder.layers.N.", {
        "self_attn_layer_norm": "norm1", "final_layer_norm": "norm2", "fc1": "linear1", "fc2": "linear2"}),
    r"model.encoder.layers.N.text_enhancer_layer.": ("transformer.encoder.text_layers.N.", {
        "layer_norm_before": "norm1", "layer_norm_after": "norm2", "fc1": "linear1", "fc2": "linear2"}),
    r"model.encoder.layers.N.fusion_layer.": ("transformer.encoder.fusion_layers.N.", {
        "vision_param": "gamma_v", "text_param": "gamma_l", "layer_norm_vision": "layer_norm_v",
        "layer_norm_text": "layer_norm_l", "attn.values_vision_proj": "attn.values_v_proj",
        "attn.values_text_proj": "attn.values_l_proj", "attn.out_vision_proj": "attn.out_v_proj",
        "attn.out_text_proj": "attn.out_l_proj", "attn.vision_proj": "attn.v_proj", "attn.text_proj": "attn.l_proj"}),
    r"model.decoder.layers.N.": ("transformer.decoder.layers.N.", {
        "encoder_attn_text_layer_norm": "catext_norm", "encoder_attn_layer_norm": "norm1",
        "self_attn_layer_norm": "norm2", "final_layer_norm": "norm3", "encoder_attn_text": "ca_text",
        "encoder_attn.": "cross_attn.", "fc1": "linear1", "fc2": "linear2"}),
}  # fmt: skip


def original_name(name: str) -> str:
    for number in range(6):
        for head, (instead, table) in _LAYERS.items():
            if name.startswith(head := head.replace("N", str(number))):
                tail = name.removeprefix(head)
                for ours, theirs in table.items():
                    if tail.startswith(ours):
                        tail = theirs + tail.removeprefix(ours)
                        break
                if "deformable" not in head and "fusion" not in head:
                    for which, part in enumerate(("query", "key", "value")):
                        tail = re.sub(rf"(attn|ca_text)\.{part}\.(weight|bias)$", rf"\1.in_proj_\2|{which}", tail)
                return instead.replace("N", str(number)) + tail
    for ours, theirs in _BACK:
        name = name.replace(ours, theirs)
    return name


def original_weights(model: Any) -> dict[str, Any]:
    """Return a model's weights as the original repository stores them."""
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        if ".swin.layernorm." in name:  # transformers makes it, and nobody uses it
            continue
        head, _, which = original_name(name).partition("|")
        which, _, end = which.partition(".")
        parts.setdefault(f"{head}.{end}" if end else head, {})[which] = tensor
    found = {
        f"module.{name}": torch.cat([rows[key] for key in sorted(rows)]) if len(rows) > 1 else rows[""]
        for name, rows in parts.items()
    }
    found["module.bert.pooler.dense.weight"] = torch.ones(2)
    found["module.label_enc.weight"] = torch.ones(2)
    return found


def original_config(**options: Any) -> str:
    """Return a config as the repository's own .py files are written."""
    values: dict[str, Any] = {
        "batch_size": 1, "modelname": "groundingdino", "backbone": "swin_T_224_1k", "position_embedding": "sine",
        "return_interm_indices": [1, 2, 3], "enc_layers": 1, "dec_layers": 2, "num_queries": 50, "hidden_dim": 64,
        "dim_feedforward": 128, "nheads": 4, "two_stage_type": "standard", "use_checkpoint": True, **options,
    }  # fmt: skip
    return "".join(f"{key} = {value!r}\n" for key, value in values.items())


def test_an_original_checkpoint_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**original.SWINS["swin_T_224_1k"], "depths": [1, 2, 1, 1]}
    monkeypatch.setitem(original.SWINS, "swin_T_224_1k", small)
    text = {"model_type": "bert", "num_hidden_layers": 12}
    model = make_model(**NARROW, text_config=text)
    torch.save({"model": original_weights(model)}, tmp_path / "groundingdino_swint_ogc.pth")
    (tmp_path / "GroundingDINO_SwinT_OGC.py").write_text(original_config())
    write_tokenizer(tmp_path)
    compiled = Compiled(
        tmp_path / "groundingdino_swint_ogc.pth",
        config=tmp_path / "GroundingDINO_SwinT_OGC.py",
        tokenizer=tmp_path / "vocab.txt",
    )
    agree(model, compiled, torch.randn(1, 3, 128, 160), torch.ones(1, 128, 160), text_ids(5))


@pytest.mark.parametrize(("backbone", "width", "window"), [("swin_T_224_1k", 96, 7), ("swin_B_384_22k", 128, 12)])
def test_the_backbone_is_told_from_the_weights(backbone: str, width: int, window: int) -> None:
    weights = {
        "module.backbone.0.patch_embed.proj.weight": torch.ones(width, 3, 4, 4),
        "module.backbone.0.layers.0.blocks.0.attn.relative_position_bias_table": torch.ones((2 * window - 1) ** 2, 3),
    }
    found = original.config_of(weights, None, "x.pth")["backbone_config"]
    assert found["window_size"] == window
    assert found["depths"] == original.SWINS[backbone]["depths"]


# -- bad input ----------------------------------------------------------------------------------------------------


def refuse(source: Path, match: str, kind: type[OvforgeError] = ModelError, **options: Any) -> OvforgeError:
    with pytest.raises(kind, match=match) as caught:
        bundle = GroundingDinoLoader(LoaderOptions(**options)).load(FileSource(source))
        for role in bundle.models:
            _ = bundle.models[role]
    return caught.value


def test_a_config_that_runs_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": {"transformer.encoder.fusion_layers.0.gamma_v": torch.ones(2)}}, tmp_path / "x.pth")
    assert GroundingDinoLoader(LoaderOptions()).can_load(FileSource(tmp_path / "x.pth")) is Match.YES
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nenc_layers = 6\n")
    refuse(tmp_path / "x.pth", "not a plain assignment", ConfigError, config=tmp_path / "evil.py")
    assert not (tmp_path / "ran").exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("ran", "w")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    refuse(tmp_path / "evil.pth", "cannot be read as weights")
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    refuse(tmp_path / "evil.pth", "cannot be read as weights")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_models_are_refused(dino: tuple[Path, Any], tmp_path: Path) -> None:
    for file in dino[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((dino[0] / "config.json").read_text())
    weights = (dino[0] / "model.safetensors").read_bytes()

    def write(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))

    write(num_queries=90)
    assert "come from one model" in str(refuse(tmp_path, r"query_position_embeddings.weight is \[100, 256\]"))
    write(num_feature_levels=3)
    refuse(tmp_path, "belongs nowhere")
    write(backbone_config={**config["backbone_config"], "use_absolute_embeddings": True})
    refuse(tmp_path, "use_absolute_embeddings = True cannot be converted")
    write(model_type="detr")
    refuse(tmp_path, "config.json is that of a 'detr'")
    write()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refuse(tmp_path, "cannot be read")
    (tmp_path / "model.safetensors").unlink()
    refuse(tmp_path, "model.safetensors is missing")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    refuse(tmp_path, "a tokenizer is missing")
    torch.save({"model": {"conv1.weight": torch.ones(2)}}, tmp_path / "resnet.pth")
    assert GroundingDinoLoader(LoaderOptions()).can_load(FileSource(tmp_path / "resnet.pth")) is Match.NO
    refuse(tmp_path / "resnet.pth", "do not have GroundingDINO's names")
    refuse(dino[0], "is for an original checkpoint", ConfigError, tokenizer=dino[0])
