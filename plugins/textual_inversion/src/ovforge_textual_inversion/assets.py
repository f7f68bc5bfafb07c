"""New words beside the models: in the tokenizer's files, for transformers and diffusers, and in a list for tasks."""

from __future__ import annotations

import json
from collections.abc import MutableMapping
from typing import Any

from ovforge.store import parse_object
from ovforge_textual_inversion.tokenizer import Words, parts_of

__all__ = ["LIST", "add_to_files", "read_list", "remove_from_files", "write_list"]

Assets = MutableMapping[str, bytes]

LIST = "learned_tokens.json"
"""The asset by which tasks know learned words: {tokenizer role: {word: [numbers of its vectors]}}."""


def read_list(assets: Assets) -> dict[str, dict[str, list[int]]]:
    """Return the words that tokenizers have learned, by role; {} if there are none."""
    return _read(assets, LIST) if LIST in assets else {}


def write_list(assets: Assets, words: dict[str, dict[str, list[int]]]) -> None:
    """Keep the words that tokenizers have learned."""
    assets[LIST] = _written(words)


def add_to_files(assets: Assets, role: str, words: Words) -> None:
    """Add words to a tokenizer's files as transformers' `add_tokens` and `save_pretrained` would leave them."""
    names = {
        name: number
        for word, numbers in words.items()
        for name, number in zip(parts_of(word, len(numbers)), numbers, strict=True)
    }
    whole, config, extra = (f"{role}/{name}.json" for name in ("tokenizer", "tokenizer_config", "added_tokens"))
    if whole in assets:
        content = _read(assets, whole)
        content["added_tokens"] = [
            *content.get("added_tokens", []),
            *({"id": n, **_entry(w)} for w, n in names.items()),
        ]
        assets[whole] = _written(content)
    if config in assets and "added_tokens_decoder" in (content := _read(assets, config)):
        content["added_tokens_decoder"] |= {str(number): _entry(name) for name, number in names.items()}
        assets[config] = _written(content)
    if f"{role}/vocab.json" in assets and whole not in assets:
        assets[extra] = _written({**(_read(assets, extra) if extra in assets else {}), **names})


def remove_from_files(assets: Assets, role: str, words: Words) -> None:
    """Take words out of a tokenizer's files again."""
    numbers = {number for each in words.values() for number in each}
    whole, config, extra = (f"{role}/{name}.json" for name in ("tokenizer", "tokenizer_config", "added_tokens"))
    if whole in assets:
        content = _read(assets, whole)
        content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] not in numbers]
        assets[whole] = _written(content)
    if config in assets and "added_tokens_decoder" in (content := _read(assets, config)):
        kept = content["added_tokens_decoder"].items()
        content["added_tokens_decoder"] = {number: entry for number, entry in kept if int(number) not in numbers}
        assets[config] = _written(content)
    if extra in assets:
        left = {name: number for name, number in _read(assets, extra).items() if number not in numbers}
        assets[extra] = _written(left)
        if not left:
            del assets[extra]


def _entry(name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {"content": name, **flags}


def _read(assets: Assets, path: str) -> dict[str, Any]:
    return parse_object(assets[path], path)


def _written(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
