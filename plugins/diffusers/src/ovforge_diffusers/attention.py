"""What tokens of a text see of each other."""

from __future__ import annotations

from typing import Any

from ovforge.errors import ModelError

__all__ = ["before", "check_windows"]


def before(places: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Return how far tokens lie behind others, [1, tokens, tokens], and which they see, [batch, tokens, tokens].

    They see those before them that attention_mask [batch, tokens] has 1 for, and themselves.
    """
    distance = places.unsqueeze(2) - places.unsqueeze(1)
    return distance, ((distance > 0) & (attention_mask[:, None] > 0)) | (distance == 0)


def check_windows(config: Any) -> None:
    """Raise ModelError for a language model whose layers see the last tokens only."""
    if set(config.layer_types) != {"full_attention"}:
        raise ModelError(
            "its layers see a window of the text only, which this loader does not convert",
            where="text_encoder/config.json: layer_types",
            hint="The text encoders of Z-Image, FLUX.2 and Qwen-Image have full_attention in every layer.",
        )
