"""Graphs of tokenizer.json against the library tokenizers, and of lower case against Python: texts of all kinds."""

from __future__ import annotations

import base64
import json
import random
import struct
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13 as ops

from families import maker
from ovforge.errors import ModelError, PluginError
from ovforge.model import core
from ovforge_diffusion.single_graph import lower_case
from ovforge_diffusion.single_graph.token_graph import token_graph

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
pytest.importorskip("sentencepiece")

FRAGMENTS = [
    "a", "<extra_id_3>", "</s>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>user\n", "<bos>", "<eos>", "İ", "ΑΣ", "ß",
    "\x00a", "\x7f", "\u200b", "\u180e", "👍", "👨‍👩‍👧", "é", "e\u0301", "ﬁ", "Ꭰ", "it's", "'LL", "12", "!!!", "\x85",
    "\u2028", "\u3000", "\xa0", "\t", "\n", "\r\n", "▁", "▁▁", " ", "  ", "漢字", "क्", "한국어", "＜extra_id_3＞", "½", "x" * 40,
    "ｱ", "™️", "ﷺ", "word", "The", "\ufeff", "𝔘", "My Cat", "my cat", "\\1 $1",
]  # fmt: skip
File = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], File]:
    """Return a function that gives the tokenizer.json of a small tokenizer, by its kind."""
    made: dict[str, str] = {}

    def file(kind: str) -> File:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            {
                "t5": lambda: maker("test_transformers").write_t5_tokenizer(folder),
                "qwen": lambda: maker("test_zimage").write_tokenizer(folder),
                "gemma": lambda: maker("test_sana").write_tokenizer(folder),
                "sentencepiece": lambda: _sentencepiece(folder),
            }[kind]()
            made[kind] = (folder / "tokenizer.json").read_text(encoding="utf-8")
        whole: File = json.loads(made[kind])
        return whole

    return file


def _sentencepiece(folder: Path) -> None:
    """Write what transformers makes of a SentencePiece model of T5's kind, with its normalization (nmt_nfkc)."""
    pieces = pytest.importorskip("sentencepiece")
    transformers = pytest.importorskip("transformers")
    sentences = "\n".join(maker("test_transformers").SENTENCES).splitlines()
    with (folder / "spiece.model").open("wb") as file:
        pieces.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, vocab_size=500, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 10}))
    transformers.T5Tokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)


def _texts(kind: str) -> list[str]:
    rng = random.Random(kind)
    mixed = [
        "".join(rng.choice(FRAGMENTS) + rng.choice(["", " "]) for _ in range(rng.randint(1, 20))) for _ in range(250)
    ]
    many: list[str] = maker("test_transformers").MANY
    return many + mixed


def _compare(file: File, texts: list[str]) -> None:
    reader = tokenizers.Tokenizer.from_str(json.dumps(file))
    graph = token_graph({"tokenizer/tokenizer.json": json.dumps(file).encode()}, "tokenizer")
    compiled = core().compile_model(graph.model, "CPU")
    for begin in range(0, len(texts), 50):
        part = texts[begin : begin + 50]
        made = compiled([ov.Tensor(np.array(part))])
        for text, ids, mask in zip(part, made["input_ids"], made["attention_mask"], strict=True):
            assert ids[mask == 1].tolist() == reader.encode(text).ids, ascii(text)
    assert graph.end == (1 if reader.encode("").ids[-1:] == [1] else None)


@pytest.mark.parametrize("kind", ["t5", "sentencepiece", "qwen", "gemma"])
def test_every_token_is_that_of_the_library(written: Callable[[str], File], kind: str) -> None:
    texts = _texts(kind)
    assert len(texts) > 700
    _compare(written(kind), texts)


def test_steps_of_published_files(written: Callable[[str], File]) -> None:
    """T5 as it was published: without a split at blanks, and with tokens that take in the blanks around them."""
    file = written("sentencepiece")
    file["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    for token in file["added_tokens"][3:]:
        token["lstrip"] = token["rstrip"] = True
    file["added_tokens"].append({**file["added_tokens"][0], "id": 510, "content": "my cat"})
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    blanks = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    file["normalizer"] = {"type": "Sequence", "normalizers": [file["normalizer"], strip, blanks]}
    _compare(file, _texts("published"))


def _charsmap(unit: int) -> str:
    """Return a compiled map of one node, with a text of one byte."""
    return base64.b64encode(struct.pack("<257I", 1024, unit, *[0] * 255) + b"\0").decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "its step normalizer: Lowercase has no exact operations"),
        ({"pre_tokenizer": {"type": "Digits", "individual_digits": True}}, "pre_tokenizer: Digits"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}}, "scheme first"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}}, "post_processor: Bert"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model: WordPiece"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}}, "without unk_id"),
        ({"model": {"type": "Unigram", "vocab": [["a"]], "unk_id": 0}}, "is not a tokenizer as the library"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**30}, "merges": []}}, "numbers words up to"),
        ({"model": None}, "is not a tokenizer as the library"),
        (
            {"normalizer": {"type": "NFC"}, "added_tokens": [{"id": 9, "content": "x", "normalized": True}]},
            "normalized",
        ),
        ({"added_tokens": [{"id": 9, "content": "x", "single_word": True}]}, "'x' with single_word"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, "is not a tokenizer as the library"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": _charsmap(1023 << 10)}}, "leads out of itself"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": _charsmap(2**31 + 9)}}, "leads out of itself"),
    ],
)
def test_what_has_no_operations_is_refused(
    written: Callable[[str], File], changes: dict[str, Any], message: str
) -> None:
    data = json.dumps({**written("t5"), **changes}).encode()
    with pytest.raises(ModelError, match="tokenizer/tokenizer.json") as raised:
        token_graph({"tokenizer/tokenizer.json": data}, "tokenizer")
    assert message in str(raised.value)


@cache
def _lower_case() -> ov.CompiledModel:
    text = ops.parameter([-1], ov.Type.string)
    return core().compile_model(ov.Model([lower_case.lowered(text.output(0))], [text]), "CPU")


def _lowered(texts: list[str]) -> list[str]:
    """Return what the operations for lower case make of texts. numpy's strings end before zeros, where they end."""
    return [str(made) for made in _lower_case()([ov.Tensor(np.array(texts))])[0]]


def test_lower_case_of_every_letter_is_pythons() -> None:
    """Alone, and where it decides which sigma it is; letters that are not cased, and zero, stay."""
    letters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x110000))]
    texts = [
        " ".join(f"{each} A{each}Σ AΣ{each} AΣ{each}A {each}Σ" for each in letters[begin : begin + 512]) + "|"
        for begin in range(0, len(letters), 512)
    ]
    assert _lowered(texts) == [text.lower().strip() for text in texts]


def test_lower_case_of_texts_is_pythons() -> None:
    cased = ["Σ", "ΑΣ", "İ", "ǅ", "\u0345", "\u00ad", ".", "ʰ", "\x1c", "\u180e", "Ⅷ"]
    rng = random.Random(0)
    mixed = ["".join(rng.choices([*FRAGMENTS, *cased], k=rng.randint(0, 12))) for _ in range(2000)]
    # Long runs of what is skipped, and of blanks: the time must not grow with their square.
    long = [f"  A{'.' * 200_000}Σ{' ' * 200_000}b ", "AΣ..." * 50_000, "Σ" * 200_000, " " * 200_000]
    for texts in ([text.rstrip("\0") for text in [*_texts("lower"), *mixed, ""]], long):
        assert _lowered(texts) == [text.lower().strip().rstrip("\0") for text in texts]


@given(st.lists(st.text() | st.text(st.sampled_from("AΣaς.'\u0345\u0301 \u2003İ1")), min_size=1))
@settings(max_examples=60)
def test_lower_case_of_any_text_is_pythons(texts: list[str]) -> None:
    texts = [text.rstrip("\0") for text in texts]
    assert _lowered(texts) == [text.lower().strip().rstrip("\0") for text in texts]


def test_lower_case_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, rules = lower_case._compiled, lower_case._checked_rules.__wrapped__
    monkeypatch.setattr(lower_case, "_compiled", lambda letters: compiled({**letters, "Ω": "w"}))
    with pytest.raises(ModelError, match=r"operations make 'w' of '\\u03a9', and Python makes '\\u03c9'"):
        rules()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(PluginError, match=r"pip install 'ovforge-diffusion\[single-graph\]'"):
        rules()
