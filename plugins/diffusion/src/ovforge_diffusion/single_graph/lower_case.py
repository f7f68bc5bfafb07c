"""Strings in lower case inside a graph, as Python's `str.lower` and `str.strip` give them.

When a graph is written, Python is asked what it does with every code point, and openvino_tokenizers' operations are
told. Their own operation for lower case knows other letters, and one form of sigma.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from openvino import opset15

from ovforge.errors import ModelError, PluginError
from ovforge.model import core

__all__ = ["lowered"]

_ALL = (*range(0xD800), *range(0xE000, 0x110000))
"""Code points that UTF-8 can write."""

_SIGMA, _FINAL = "\u03a3", "\u03c2"
"""Capital sigma, and what it becomes at the end of a word."""

_BESIDE = ("{}", " {} ", "A{}\u03a3", "A\u03a3{}", "A\u03a3{}A", "{}\u03a3")
"""What each letter that matters is tried beside."""


def lowered(text: ov.Output) -> ov.Output:
    """Return strings, (texts,), as `text.lower().strip()` has them.

    Raises PluginError if the package sentencepiece is not installed, ModelError if the operations do not do what Python
    does.
    """
    return _written(text, _checked_rules())


@dataclass(frozen=True)
class _Rules:
    """What the operations are told, as regular expressions and as a map that SentencePiece compiled."""

    final: str
    """A capital sigma at the end of a word: after a cased letter, and before none, whatever is ignored between them."""

    letters: bytes
    around: str
    """Blanks around a text."""


def _written(text: ov.Output, rules: _Rules) -> ov.Output:
    from openvino_tokenizers.tokenizer_pipeline import CharsmapStep, RegexNormalizationStep

    value = list(opset15.string_tensor_unpack(text).outputs())
    for step in (
        RegexNormalizationStep(rules.final, _FINAL),
        CharsmapStep(charsmap=rules.letters, remove_extra_whitespaces=False),
        RegexNormalizationStep(rules.around, ""),
    ):
        value = step.get_ov_subgraph(value)
    return opset15.string_tensor_pack(*value[:3]).output(0)


@cache
def _checked_rules() -> _Rules:
    """Return the rules, tried on every letter that they are about, alone and beside a sigma."""
    letters = {chr(code): low for code in _ALL if (low := chr(code).lower()) != chr(code)}
    # What stands after a sigma decides its form: a cased letter does itself, what is ignored leaves it to the next one.
    cased = {code for code in _ALL if _form_before(f"{chr(code)} ") != _FINAL}
    ignored = [code for code in _ALL if code not in cased and _form_before(f"{chr(code)}A") != _FINAL]
    blank = [code for code in _ALL if chr(code).isspace()]
    between, ends, blanks = f"[{_ranges(ignored)}]*+", f"[{_ranges(cased)}]", f"[{_ranges(blank)}]"
    # Nothing is given back while it is looked for, so that the time grows with the text alone.
    rules = _Rules(
        rf"{ends}{between}\K{_SIGMA}(?!{between}{ends})",
        _compiled(letters),
        rf"\A{blanks}++|(?<!{blanks}){blanks}++\z",
    )
    known = sorted({*map(ord, letters), *cased, *ignored, *blank})
    _try(rules, [beside.format(chr(code)) for code in known for beside in _BESIDE])
    return rules


def _form_before(following: str) -> str:
    """Return what becomes of a sigma after a letter and before a text."""
    return f"A{_SIGMA}{following}".lower()[1]


def _ranges(codes: Iterable[int]) -> str:
    """Return the inside of a class of a regular expression."""
    runs: list[list[int]] = []
    for code in sorted(codes):
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(rf"\x{{{first:x}}}-\x{{{last:x}}}" for first, last in runs)


def _compiled(letters: dict[str, str]) -> bytes:
    """Return a map of letters as SentencePiece compiles it."""
    try:
        from sentencepiece import SentencePieceNormalizer, set_min_log_level

        set_min_log_level(1)  # it would tell of each map
        normalizer = SentencePieceNormalizer(norm_map=list(letters.items()))
    except (ImportError, TypeError) as error:  # versions before 0.2.2 take no map
        raise PluginError(
            "reading prompts in lower case inside a graph needs the package sentencepiece, 0.2.2 or newer",
            where="single-graph",
            hint="Run: pip install 'ovforge-diffusion[single-graph]'",
        ) from error
    # A message of protocol buffers, whose first field is the map: a key, a length of 7 bits a byte, and its bytes.
    spec, length, place = normalizer.serialized_normalizer_spec(), 0, 1
    while True:
        length |= (spec[place] & 127) << 7 * (place - 1)
        place += 1
        if spec[place - 1] < 128:
            return bytes(spec[place : place + length])


def _try(rules: _Rules, texts: list[str]) -> None:
    """Raise ModelError if the operations do with a text what Python does not."""
    text = ops.parameter([-1], ov.Type.string)
    compiled = core().compile_model(ov.Model([_written(text.output(0), rules)], [text], "lower_case"), "CPU")
    found = compiled([ov.Tensor(np.array(texts))])[0]
    for given, made in zip(texts, found, strict=True):
        if made != (wanted := given.lower().strip()):
            raise ModelError(
                f"openvino_tokenizers' operations make {str(made)!a} of {given!a}, and Python makes {wanted!a}",
                where="single-graph",
                hint="Run the pipeline itself, or write the graph with another version of openvino_tokenizers.",
            )
