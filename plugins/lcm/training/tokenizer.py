"""CLIP's tokenizer with a short merge list: a small vocabulary that still takes any text.

The byte-pair merges are those of OpenAI's CLIP (Radford et al. 2021; MIT), from `bpe_simple_vocab_16e6.txt.gz` in the
PyPI package open_clip_torch. Words that a cut merge would have joined fall into more pieces.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from transformers import CLIPTokenizer

MERGES = 8000
LENGTH = 77


def write_tokenizer(bpe: Path, folder: Path) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and their configs: 512 bytes, MERGES merges, 2 specials."""
    lines = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    merges = [tuple(line.split()) for line in lines]
    symbols = list(_byte_symbols().values())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)


def _byte_symbols() -> dict[int, str]:
    """Return the printable stand-in of each byte, as GPT-2 and CLIP order them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(256 + position) for position, byte in enumerate(others)}


def main() -> None:
    """Write the tokenizer's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bpe", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    write_tokenizer(arguments.bpe, arguments.output)
    tokenizer = CLIPTokenizer.from_pretrained(arguments.output)
    print(len(tokenizer), tokenizer.tokenize("a beautiful pink unicorn, 8k; naïve über-straße 🦄"))


if __name__ == "__main__":
    main()
