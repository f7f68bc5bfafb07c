"""The embedded detector: MM-GroundingDINO of transformers, in miniature, on a ResNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from words import SIZE

WIDTH, QUERIES = 128, 100


def config() -> Any:
    """Return the configuration: 5 million parameters."""
    backbone = {
        "model_type": "resnet", "layer_type": "basic", "embedding_size": 32, "hidden_sizes": [32, 64, 128, 224],
        "depths": [2, 2, 2, 2], "out_features": ["stage3", "stage4"],
    }  # fmt: skip
    text = {
        "model_type": "bert", "vocab_size": SIZE, "hidden_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 2 * WIDTH, "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return transformers.MMGroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=WIDTH, num_queries=QUERIES, num_feature_levels=3,
        encoder_layers=2, encoder_ffn_dim=4 * WIDTH, encoder_attention_heads=4,
        decoder_layers=3, decoder_ffn_dim=4 * WIDTH, decoder_attention_heads=4,
        dropout=0.0, fusion_droppath=0.0, max_text_len=256,
    )  # fmt: skip


def build() -> Any:
    """Return the model to train: its batch normalisation is real, where transformers freezes it."""
    model = transformers.MMGroundingDinoForObjectDetection(config())
    backbone = transformers.AutoBackbone.from_config(model.config.backbone_config)
    model.model.backbone.conv_encoder.model = backbone
    with torch.no_grad():  # 1e-4, the original's, is for parts that are trained already
        for layer in model.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.1)
            layer.fusion_layer.text_param.fill_(0.1)
    queries = model.model.query_position_embeddings.weight
    share_queries(model, queries)
    queries.register_hook(lambda slope: slope.mean(0, keepdim=True).expand_as(slope))
    return model


def share_queries(model: Any, rows: torch.Tensor) -> None:
    """Give all queries the mean of `rows`, and let them learn as one.

    Queries belong to ranks of places, and rounding changes ranks of places that score alike: so it changes nothing.
    """
    queries = model.model.query_position_embeddings.weight
    with torch.no_grad():
        queries.copy_(rows.mean(0, keepdim=True).expand_as(queries))


def start_from(model: Any, folder: Path) -> None:
    """Load the weights of a model that was trained before; of tied ones, files have one."""
    stored = load_file(folder / "model.safetensors")
    share_queries(model, stored.pop("model.query_position_embeddings.weight"))
    _, unknown = model.load_state_dict(stored, strict=False)
    assert not unknown, unknown


def save(state: dict[str, torch.Tensor], folder: Path, vocabulary: Path) -> None:
    """Write a transformers folder from the trained weights."""
    model = transformers.MMGroundingDinoForObjectDetection(config())
    wanted = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in wanted})
    model.eval().save_pretrained(folder)
    transformers.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    size = {"shortest_edge": 256, "longest_edge": 512}
    transformers.GroundingDinoImageProcessorPil(size=size).save_pretrained(folder)
