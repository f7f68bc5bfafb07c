"""Token ids are those of transformers, whatever lies in a tokenizer's folder."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ovforge.errors import InputError, ModelError
from ovforge_diffusion.editing import EditedPrompt, adapters_in, split_parts, without_comments
from ovforge_diffusion.prompts import parse
from ovforge_diffusion.text import TextEncoder
from ovforge_diffusion.tokenizer import FileTokenizer, Piece

TYPED = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
START, END = "<|startoftext|>", "<|endoftext|>"
FRAGMENTS = [
    "a", "<zork>", "<ZORK>", "my cat", "MY  CAT", "Big Dog", "big dog", "<sp>", START, END, END.upper(), "İ", "ΑΣ", "ß",
    "ſ", "\x00", "\x7f", "\u200b", "\u180e", "👍", "👨‍👩‍👧", "é", "e\u0301", "ﬁ", "Ꭰ", "it's", "'LL", "12", "!!!", "<s1>",
    "<S2>", "<pad>", "!", "cat-toy", "cat-toy_1", "Fo O", "l ", "cat", "<x>_1", "\t", "\n", " ", "x" * 90, "漢字", "क्",
]  # fmt: skip


def write(folder: Path, **config: Any) -> Path:
    """Write CLIP's scheme on a few merges: bytes, bytes that end a word, what merges make, start and end."""
    merges = [("c", "a"), ("ca", "t</w>"), ("t", "h"), ("th", "e</w>"), ("o", "n</w>"), ("Ã", "©</w>")]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(n) for n in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(f"{each}</w>" for each in letters), *("".join(pair) for pair in merges), START, END]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77, **config}))
    return folder


def added(folder: Path, tokens: Sequence[Any], without: str = "") -> Path:
    """Write what transformers saves after `add_tokens`; without one of its files."""
    transformers = pytest.importorskip("transformers")
    plain = write(folder.with_name("plain"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(plain)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(plain / name, folder)
    if without:
        (folder / without).unlink()
    return folder


def layout(name: str, root: Path) -> Path:
    folder = root / "tokenizer"
    if name == "plain":
        return write(folder)
    if name == "typed":
        return write(folder, bos_token={**TYPED, "content": START}, eos_token={**TYPED, "content": END}, pad_token="!")
    if name == "new pad":
        return write(folder, pad_token="<pad>")
    if name == "added_tokens.json":
        write(folder)
        count = len(json.loads((folder / "vocab.json").read_text()))
        words = ("<zork>", "my cat", "Fo O", "cat-toy", "cat-toy_1")
        (folder / name).write_text(json.dumps({word: count + number for number, word in enumerate(words)}))
        return folder
    if name == "special_tokens_map.json":
        special = {**TYPED, "content": START}
        del special["__type"]
        write(folder)
        (folder / name).write_text(json.dumps({"bos_token": special, "additional_special_tokens": ["<s1>", "<S2>"]}))
        return folder
    token = pytest.importorskip("transformers").AddedToken
    odd = [token("<sp>", special=True), token("Big Dog", normalized=False, single_word=True), token("l ", lstrip=True)]
    return added(folder, ["<zork>", "my cat", "cat", "<x>_1", *odd], "" if name == "saved" else name)


@pytest.mark.parametrize(
    "name",
    ["plain", "typed", "new pad", "added_tokens.json", "special_tokens_map.json", "saved", "tokenizer_config.json",
     "tokenizer.json"],
)  # fmt: skip
def test_every_token_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = layout(name, tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    ours = FileTokenizer({f"tokenizer/{path.name}": path.read_bytes() for path in folder.iterdir()}, "tokenizer")
    assert (ours.start, ours.end, ours.padding) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    rng = random.Random(name)
    for _ in range(200):
        prompt = "".join(rng.choice(FRAGMENTS) + rng.choice(["", " "]) for _ in range(rng.randint(0, 30)))
        read = [id_ for piece in ours.pieces(prompt) for id_ in piece.ids]
        assert [ours.start, *read, ours.end] == theirs(prompt).input_ids, ascii(prompt)


@pytest.mark.parametrize(
    ("file", "content"),
    [("vocab.json", "{"), ("merges.txt", "a b c\n"), ("tokenizer_config.json", "[]"), ("vocab.json", '{"a": 0}')],
)
def test_damaged_files_are_said(file: str, content: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tokenizer")
    (folder / file).write_text(content)
    with pytest.raises(ModelError):
        FileTokenizer({f"tokenizer/{path.name}": path.read_bytes() for path in folder.iterdir()}, "tokenizer")


def test_half_a_character_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "tokenizer")
    ours = FileTokenizer({f"tokenizer/{path.name}": path.read_bytes() for path in folder.iterdir()}, "tokenizer")
    with pytest.raises(InputError, match="surrogate"):
        ours.pieces("a \ud83d cat")


class Letters:
    """A tokenizer of one token a letter, but for the word "abc", which was learned with five vectors."""

    start, end, padding = 0, 1, 2

    def pieces(self, text: str) -> list[Piece]:
        found, place = [], 0
        while place < len(text):
            length = 3 if text.startswith("abc", place) else 1
            ids = tuple(range(500, 505)) if length == 3 else (ord(text[place]),)
            found.append(Piece(ids, place, place + length))
            place += length
        return found


def letters(length: int) -> TextEncoder:
    import openvino as ov
    from openvino import opset13 as ops

    ids = ops.parameter([-1, length], np_type(), "input_ids")
    states = ops.unsqueeze(ops.convert(ids, "f32"), 2)
    states.output(0).get_tensor().set_names({"last_hidden_state"})
    ids.output(0).get_tensor().set_names({"input_ids"})
    return TextEncoder(Letters(), ov.Core().compile_model(ov.Model([states], [ids]), "CPU"), penultimate=False)


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        (f"{'x' * 20},{'y' * 30}", [f"{'x' * 20},", "y" * 30]),
        (f"{'x' * 19},{'y' * 30}", [f"{'x' * 19},{'y' * 20}", "y" * 10]),  # 21 after the comma
        (f"{'x' * 20},{'y' * 19}", [f"{'x' * 20},{'y' * 19}"]),  # fits whole
        (f"{'x' * 39},y", [f"{'x' * 39},", "y"]),
        (f"{'x' * 40},y", ["x" * 40, ",y"]),
        (f"{'x' * 25},{'y' * 13},{'z' * 50}", [f"{'x' * 25},{'y' * 13},", "z" * 40, "z" * 10]),
        (f"{'x' * 35},yyabc", [f"{'x' * 35},yy", "abc"]),  # a learned word moves alone
        (f"{'x' * 30},BREAK,{'y' * 45}", [f"{'x' * 30},", f",{'y' * 39}", "y" * 6]),
    ],
)
def test_what_follows_a_comma_moves_to_the_next_chunk(prompt: str, chunks: list[str]) -> None:
    encoder = letters(42)
    rows, _ = encoder.weighted(parse(prompt), chunks=True, wrap=True)
    assert ["".join(map(chr, row[1 : row.index(1)])).replace("\u01f4\u01f5\u01f6\u01f7\u01f8", "abc")
            for row in rows.tolist()] == chunks  # fmt: skip
    assert "".join(chunks) == prompt.replace("BREAK", "")


def test_comments_are_left_out() -> None:
    """As two substitutions of the web UI's `strip_comments` do it."""
    text = "# a plan\na cat # not a dog\n#\nin red#\n\nend #"
    assert without_comments(text) == "\na cat \nin red\n\nend \n"


def test_a_learned_word_stays_in_one_chunk() -> None:
    encoder = letters(12)
    rows, weights = encoder.weighted(parse("xxxxxxx(abc:1.5)y"), chunks=True)
    assert rows.tolist() == [
        [0, *[ord("x")] * 7, 1, 2, 2, 2],
        [0, 500, 501, 502, 503, 504, ord("y"), 1, 2, 2, 2, 2],
    ]
    assert weights[1].tolist() == [1, *[1.5] * 5, *[1] * 6]
    assert encoder.cut(parse("xxxxxxx(abc:1.5)y")) == "xxxxxxxabcy"
    assert encoder.cut(parse("xxxxxxxxxx")) is None


def np_type() -> Any:
    import numpy as np

    return np.int64


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a cat", ["a cat"] * 6),
        ("a [cat:dog:0.5]", ["a cat"] * 4 + ["a dog"] * 2),
        ("a [cat:dog:3]", ["a cat"] * 4 + ["a dog"] * 2),
        ("a [cat:0.5]", ["a "] * 4 + ["a cat"] * 2),
        ("a [cat::2] x", ["a cat x"] * 3 + ["a  x"] * 3),
        ("[a|b|]c", ["ac", "ac", "bc", "c", "ac", "bc"]),
        ("[a:[b:c:4]:2]", ["a"] * 3 + ["b"] * 2 + ["c"]),
        ("[(a:1.2): b : 1 ]", ["(a:1.2)"] * 2 + [" b "] * 4),
        ("[a:b:99]", ["a"] * 6),
        ("[a:b:0]", ["b"] * 6),
        (r"[a\:b:c:1.]", [r"a\:b"] * 6),
        (r"\[a:b:0.5\]", [r"\[a:b:0.5\]"] * 6),
        ("a | [b:c:0.5]", ["a | [b:c:0.5]"] * 6),
        ("[a:b] ((c)", ["[a:b] ((c)"] * 6),
        ("[a [b:c:1]", ["[a b"] * 2 + ["[a c"] * 4),
    ],
)
def test_edits_are_read_as_the_web_ui_does(prompt: str, texts: list[str]) -> None:
    """A run of six calls: the web UI counts them from 0, and a text holds until its step's number, that included."""
    edited = EditedPrompt(prompt)
    assert [edited.at(call, 6) for call in range(6)] == texts


def test_brackets_too_deep_are_said() -> None:
    with pytest.raises(InputError, match="deep"):
        EditedPrompt("[" * 5000)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat AND a dog:0.5", [("a cat", 1), (" a dog", 0.5)]),
        ("a:1.2 AND b : -.5 AND c", [("a", 1.2), (" b", -0.5), (" c", 1)]),
        ("SAND and AND", [("SAND and", 1), ("", 1)]),
        ("a\nb:2", [("a\nb", 2)]),
    ],
)
def test_parts_and_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert [(part.text, part.weight) for part in split_parts(prompt)] == parts


def test_adapters_by_name() -> None:
    assert adapters_in("a <lora:x:0.8> cat<lyco:y>") == ("a  cat", {"x": 0.8, "y": 1.0})
    assert adapters_in("a <zork> cat") == ("a <zork> cat", {})
    for prompt in ("<lora:x:high>", "<lora:x:0.5:0.6>", "<hypernet:x:1>", "<lora:x:inf>"):
        with pytest.raises(InputError):
            adapters_in(prompt)
