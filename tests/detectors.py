"""Small detectors with random weights: the true architecture at the true width, with fewer layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = [
    "horse",
    "clouds",
    "grasses",
    "sky",
    "hill",
    "a",
    "red",
    "cat",
    "on",
    "the",
    "##s",
    "remote",
    "control",
    "cloud",
]


def write_tokenizer(folder: Path) -> None:
    """Write BERT's tokenizer with the ids that GroundingDINO counts on, and a few words."""
    transformers = pytest.importorskip("transformers")
    words = [f"[unused{n}]" for n in range(1100)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words[1010], words[1012], words[1029] = ",", ".", "?"
    words[1030 : 1030 + len(WORDS)] = WORDS
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)


def make_config(**options: Any) -> dict[str, Any]:
    """Return Swin-T's config at full width: few layers, and each kind of layer."""
    return {
        "backbone_config": {
            "model_type": "swin", "embed_dim": 96, "depths": [1, 2, 1, 1], "num_heads": [3, 6, 12, 24],
            "window_size": 7, "out_features": ["stage2", "stage3", "stage4"], "drop_path_rate": 0.0,
        },
        "text_config": {"model_type": "bert", "vocab_size": 1100, "num_hidden_layers": 1},
        "encoder_layers": 1, "decoder_layers": 2, "num_queries": 100, **options,
    }  # fmt: skip


def make_model(kind: str = "GroundingDino", **options: Any) -> Any:
    """Return a torch model whose every part counts: what is initialised to zero gets values, too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**make_config(**options))
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    strong = ("vision_param", "text_param", "bias_table", "class_embed")
    zeros = (*strong, "sampling_offsets", "attention_weights", "bbox_embed", "query_position")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "model.decoder.layer_norm.weight":
                parameter *= 0.1  # scores that are not all 0 or 1
            if any(part in name for part in zeros):
                parameter += torch.randn(parameter.shape) * (0.3 if any(part in name for part in strong) else 0.05)
    return model


def make_folder(folder: Path, kind: str = "GroundingDino", **options: Any) -> Any:
    """Write a transformers folder; return the torch model."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(kind, **options)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    transformers.GroundingDinoImageProcessor(size={"shortest_edge": 256, "longest_edge": 400}).save_pretrained(folder)
    return model


def make_detr(folder: Path, kind: str = "RTDetr") -> Any:
    """Write a folder with a detector of COCO's classes; return the torch model."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    resnet = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    small: dict[str, Any] = {
        "encoder_hidden_dim": 32, "encoder_in_channels": [32, 48, 64], "encoder_ffn_dim": 64, "d_model": 32,
        "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 64, "num_queries": 40, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_denoising": 0,
    }  # fmt: skip
    labels = {n: ["person", "bicycle", "car", "motorcycle", "airplane"][n] for n in range(5)}
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=resnet, id2label=labels, label2id={v: k for k, v in labels.items()}, **small
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(
                part in name for part in ("offsets", "attention_weights", "bbox_embed", "class_embed", "score_head")
            ):
                parameter += torch.randn(parameter.shape) * 0.1
            if parameter.ndim == 4:  # a signal that does not fade: places that score alike could be chosen in any order
                torch.nn.init.kaiming_normal_(parameter)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    transformers.RTDetrImageProcessorPil(size={"height": 192, "width": 256}).save_pretrained(folder)
    return model
