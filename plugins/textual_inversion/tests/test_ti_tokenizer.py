"""New words in tokenizers: the same numbers as diffusers and transformers give, for any words and prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from openvino import opset15 as ops

import ovforge_lcm
from ovforge import testing
from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.runtime import core
from ovforge.model.sources import FileSource
from ovforge_textual_inversion.assets import add_to_files, remove_from_files
from ovforge_textual_inversion.tokenizer import (
    TokenizerGraph,
    extend_detokenizer,
    normalized,
    parts_of,
    restore_tokenizer,
)

transformers = pytest.importorskip("transformers")
FOLDER = Path(ovforge_lcm.__file__).parent / "model" / "tokenizer"


def bundle() -> ModelBundle:
    """Return the embedded model's tokenizer: 8,514 tokens, CLIP's own merges."""
    return ModelBundle.open(FileSource(FOLDER.parent))


def numbered(words: Mapping[str, int], first: int) -> dict[str, list[int]]:
    """Return the numbers of words that have so many vectors."""
    found: dict[str, list[int]] = {}
    for word, vectors in words.items():
        found[word] = list(range(first, first + vectors))
        first += vectors
    return found


def reader(model: ov.Model) -> Callable[[str], list[int]]:
    """Return a function from a prompt to its numbers, to the first end token, that one included."""
    compiled = core().compile_model(model, "CPU")
    port = next(port for port in compiled.outputs if "input_ids" in port.names)

    def read(prompt: str) -> list[int]:
        row = compiled([prompt])[port][0].tolist()
        return row[: row.index(8513) + 1]

    return read


def theirs(words: Mapping[str, int]) -> tuple[Any, Callable[[str], list[int]]]:
    """Return transformers' tokenizer with the words, and diffusers' way from a prompt to numbers."""
    from diffusers.loaders import TextualInversionLoaderMixin

    tokenizer = transformers.CLIPTokenizer.from_pretrained(FOLDER)
    for word, vectors in words.items():
        for name in parts_of(word, vectors):
            tokenizer.add_tokens(name)
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    return tokenizer, lambda prompt: tokenizer(convert(prompt, tokenizer), truncation=True, max_length=77).input_ids


def extended(words: Mapping[str, int]) -> Callable[[str], list[int]]:
    model = bundle().models["tokenizer"]
    graph = TokenizerGraph(model, "tokenizer")
    graph.extend(numbered(words, graph.size))
    return reader(model)


WORDS = {"<cat-toy>": 1, "zork": 3, "style|x": 2, "(a+b)*": 1, "<naïve>": 2, "<cat-toy>2": 1, "my  cat": 1, "old dog": 2,
         "a\u200bb": 1}  # fmt: skip
PROMPTS = [
    "", " ", "a photo", "<cat-toy>", "A <CAT-TOY> backpack", "a<cat-toy>backpack", "the <cat-toy>, zork; zork.",
    "zork_1 zork_2 zork_12 zork_3", "unzorked", "<cat-toy>2 <cat-toy>22", "'s<cat-toy>'s", '"zork" (a+b)*(a+b)*',
    "style|x style |x Style|X", "<naïve> <nai\u0308ve>", "<cat-to<cat-toy>y>", "zork\n\tzork", "a\u00a0zork",
    "<cat-toy", "zor k", "🦄zork🦄", "zork " * 40, "x " * 74 + "zork", "x " * 72 + "zork zork", "zork</w>",
    "see my cat, my\n\tcat's", "MY CATs mycat my", "an old dog", "an OLD  dog", "xa\u200bby a\u200bb",
]  # fmt: skip


@pytest.fixture(scope="module")
def both() -> tuple[Callable[[str], list[int]], Callable[[str], list[int]]]:
    return extended(WORDS), theirs(WORDS)[1]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_numbers_are_those_of_diffusers(prompt: str, both: Any) -> None:
    ours, wanted = both
    if any(name in prompt for name in ("zork_1", "CAT-TOY", "Style", "\u0308", "OLD")):
        # diffusers rewrites the letters as they stand in the prompt: words of several vectors that are written
        # otherwise than when they were learned lose all but one of them, and zork_1 is taken for zork.
        tokenizer, _ = theirs(WORDS)
        numbers = numbered(WORDS, 8514)
        wanted = functools.partial(by_hand, tokenizer, numbers)
    assert ours(prompt) == wanted(prompt)


def by_hand(tokenizer: Any, numbers: Mapping[str, list[int]], prompt: str) -> list[int]:
    """Replace each word's first number by all of them."""
    first = {each[0]: each for each in numbers.values()}
    start, *middle, end = tokenizer(prompt).input_ids
    return [start, *[n for number in middle for n in first.get(number, [number])][:75], end]


@pytest.mark.parametrize(
    "options", [{}, {"use_max_padding": True}, {"number_of_inputs": 1, "use_sentencepiece_backend": True}]
)
def test_tokenizers_as_others_convert_them(options: dict[str, Any]) -> None:
    """Those in folders of optimum-intel and openvino-genai neither pad nor cut."""
    model = pytest.importorskip("openvino_tokenizers").convert_tokenizer(theirs({})[0], **options)
    graph = TokenizerGraph(model, "tokenizer")
    graph.extend(numbered(WORDS, graph.size))
    ours, wanted = reader(model), theirs(WORDS)[1]
    for prompt in ("", "a <cat-toy>, zork", "zork " * 20 + "<cat-toy>"):
        assert ours(prompt) == wanted(prompt)


names = st.text(st.sampled_from("abz<>-_|.*+?^$\\(){}[]#'é1 "), min_size=1, max_size=8).map(str.strip).filter(bool)
pieces = st.sampled_from(["a ", "cat", ", ", " ", "<", ">", "'s", "1", "É", "unicorn ", "🦄"])


@settings(max_examples=25)
@given(data=st.data())
def test_any_words_in_any_prompt(data: st.DataObject) -> None:
    words = data.draw(st.dictionaries(names, st.integers(1, 3), min_size=1, max_size=4))
    graph = TokenizerGraph(bundle().models["tokenizer"], "tokenizer")
    every = [normalized(name) for word, count in words.items() for name in parts_of(word, count + 1)]
    assume(len(set(every)) == len(every))
    assume(not any(map(graph.knows, every)))
    ours, (tokenizer, _) = extended(words), theirs(words)
    for _ in range(8):
        parts = data.draw(st.lists(st.one_of(pieces, st.sampled_from(list(words))), min_size=1, max_size=12))
        prompt = "".join(parts)
        assert ours(prompt) == by_hand(tokenizer, numbered(words, graph.size), prompt), (words, prompt)


@settings(max_examples=40)
@given(prompt=st.lists(st.one_of(pieces, st.sampled_from(list(WORDS)), st.text(max_size=5)), max_size=12).map("".join))
def test_prompts_without_words_are_read_as_before(prompt: str, both: Any, plain: Callable[[str], list[int]]) -> None:
    """Whatever the tokenizer makes of other text, it still does."""
    for word in WORDS:
        prompt = normalized(prompt).replace(normalized(word), "")
    assume(not any(normalized(word) in normalized(prompt) for word in WORDS))
    assert both[0](prompt) == plain(prompt)


@pytest.fixture(scope="module")
def plain() -> Callable[[str], list[int]]:
    return reader(bundle().models["tokenizer"])


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json", "added_tokens_decoder"])
def test_the_files_say_the_same(layout: str, tmp_path: Path) -> None:
    """transformers reads the words from the files as if they had been added to it, whichever files there are."""
    assets = {path: data for path, data in bundle().assets.items() if path.startswith("tokenizer/")}
    if layout != "tokenizer.json":
        del assets["tokenizer/tokenizer.json"]
    if layout == "added_tokens_decoder":
        tokenizer, _ = theirs({})
        special = {
            str(n): {"content": t.content, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
            for n, t in tokenizer.added_tokens_decoder.items()
        }
        import json

        config = json.loads(assets["tokenizer/tokenizer_config.json"])
        assets["tokenizer/tokenizer_config.json"] = json.dumps({**config, "added_tokens_decoder": special}).encode()
    before = dict(assets)
    numbers = numbered(WORDS, 8514)
    add_to_files(assets, "tokenizer", numbers)
    for path, data in assets.items():
        (tmp_path / Path(path).name).write_bytes(data)
    read, (added, _) = transformers.CLIPTokenizer.from_pretrained(tmp_path), theirs(WORDS)
    assert len(read) == len(added)
    for prompt in PROMPTS:
        assert read(prompt).input_ids == added(prompt).input_ids
    remove_from_files(assets, "tokenizer", numbers)
    import json

    assert {path: json.loads(data) for path, data in assets.items() if path.endswith(".json")} == {
        path: json.loads(data) for path, data in before.items() if path.endswith(".json")
    }


def test_taken_out_again_nothing_is_left(tmp_path: Path) -> None:
    def data(model: ov.Model) -> list[bytes]:
        ov.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
        return [(tmp_path / f"m.{end}").read_bytes() for end in ("xml", "bin")]

    model = bundle().models["tokenizer"]
    before = data(model)
    for _ in range(2):
        TokenizerGraph(model, "tokenizer").extend(numbered(WORDS, 8514))
        first = data(model)
        assert first != before
        ov.save_model(model, tmp_path / "again.xml", compress_to_fp16=False)
        stored = core().read_model(tmp_path / "again.xml")
        restore_tokenizer(model)
        assert data(model) == before
        restore_tokenizer(stored)
        assert data(stored) == before
    TokenizerGraph(model, "tokenizer").extend(numbered(WORDS, 8514))
    assert data(model) == first, "the same words give the same bytes"


def test_the_detokenizer_knows_the_words(ti_bundle: Callable[..., ModelBundle]) -> None:
    model = ti_bundle("sd1").models["detokenizer"]
    extend_detokenizer(model, {"<cat-toy>": [559, 560]})
    decoded = core().compile_model(model, "CPU")([np.array([[64, 559, 560]])])
    assert "<cat-toy> <cat-toy>_1" in str(next(iter(decoded.values()))[0])


def test_other_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match="tokenizer: is not a CLIP tokenizer"):
        TokenizerGraph(testing.small_model(), "tokenizer")
    model = bundle().models["tokenizer"]
    graph = TokenizerGraph(model, "tokenizer")
    first = next(node for node in model.get_ordered_ops() if node.get_type_name() == "RegexNormalization")
    pattern = first.input(4)
    pattern.replace_source_output(ops.constant(np.frombuffer(b"zork", np.uint8).copy()).output(0))
    with pytest.raises(ModelError, match="'zork' is not read as one word"):
        graph.extend({"zork": [8514]})
