"""Weights in prompts: (word:1.3), (word), [word] and BREAK, as the AUTOMATIC1111 web UI reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Span", "parse", "plain", "weighs"]

_UP = 1.1
"""What one pair of round brackets multiplies by; square ones divide."""

_PIECE = re.compile(r"\\([\\()\[\]]|)|\(|\[|:\s*([+-]?[\d.]+)\s*\)|\)|\]|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)


@dataclass
class Span:
    """A part of a prompt with one weight. `ends_chunk` says that the next part begins another chunk of tokens."""

    text: str
    weight: float = 1.0
    ends_chunk: bool = False


def parse(prompt: str) -> list[Span]:
    r"""Split a prompt at its weights; `\(`, `\)`, `\[`, `\]` and `\\` stand for themselves, and `\` alone for nothing.

    Source of the notation: AUTOMATIC1111's stable-diffusion-webui, `modules/prompt_parser.py`. Round and square
    brackets are counted apart. A bracket that is not closed counts to the end; one that was not opened is text.
    """
    spans: list[Span] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, weight: float) -> None:
        for span in spans[opened[bracket].pop() :]:
            span.weight *= weight

    for match in _PIECE.finditer(prompt):
        piece, escaped, weight = match[0], match[1], match[2]
        if escaped is not None:
            spans.append(Span(escaped))
        elif piece in opened:
            opened[piece].append(len(spans))
        elif weight is not None and opened["("] and _number(weight) is not None:
            close("(", _number(weight) or 0.0)
        elif piece == ")" and opened["("]:
            close("(", _UP)
        elif piece == "]" and opened["["]:
            close("[", 1 / _UP)
        elif piece == "BREAK":
            spans.append(Span("", ends_chunk=True))
        else:
            spans.append(Span(piece))
    for bracket, weight in (("(", _UP), ("[", 1 / _UP)):
        while opened[bracket]:
            close(bracket, weight)
    return _joined(spans)


def plain(prompt: str) -> str:
    """Return a prompt's words without its weights, for text encoders that weigh nothing."""
    return "".join(f"{span.text} " if span.ends_chunk else span.text for span in parse(prompt))


def weighs(prompt: str) -> bool:
    """Say whether a prompt gives some of its words another weight than the rest."""
    return any(span.weight != 1 for span in parse(prompt))


def unweighted(prompts: Sequence[str], weighted: bool, model: str) -> tuple[list[str], list[str]]:
    """Return prompts as a text encoder that weighs nothing reads them, and a warning if that loses weights.

    `weighted` says whether the prompts are written with weights at all, `model` whose text encoder it is.
    """
    if not weighted:
        return list(prompts), []
    lost = f"weights in prompts have no effect: {model}'s text encoder reads the words without them"
    return [plain(prompt) for prompt in prompts], [lost] if any(map(weighs, prompts)) else []


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _joined(spans: list[Span]) -> list[Span]:
    """Join neighbours of one weight: words must not be cut where only the parser did."""
    joined: list[Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and not span.ends_chunk and not last.ends_chunk and last.weight == span.weight:
            last.text += span.text
        else:
            joined.append(Span(span.text, span.weight, span.ends_chunk))
    return [span for span in joined if span.text or span.ends_chunk]
