"""Prompts that change while a picture is made, and prompts of several parts, as the AUTOMATIC1111 web UI reads them.

    [a:b:0.5]        a, and then b from half of the steps on; a whole number counts steps
    [a:0.5] [a::5]   a from there on; a until there
    [a|b|c]          another one at each step
    a AND b:0.5      two prompts, each pulling the prediction by its weight (Liu et al. 2022)
    <lora:x:0.8>     the adapter x at this strength, for this call
    # why            nothing, to the end of the line

Source of the notation: stable-diffusion-webui, `modules/prompt_parser.py`, `modules/extra_networks.py` and
`modules/processing_scripts/comments.py` (1.10).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ovforge.errors import InputError

__all__ = ["EditedPrompt", "Part", "adapters_in", "split_parts", "without_comments"]

_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)\s*\]")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"(\s*(?:\s|.)*?)(?:\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+)))?\s*")
_NETWORK = re.compile(r"<(\w+):([^>]+)>")
_COMMENTS = (re.compile(r"(^|\n)#[^\n]*(\n|$)"), re.compile(r"#[^\n]*(\n|$)"))
"""On a line of their own, then behind something: either leaves the end of a line."""

_ADAPTERS = ("lora", "lyco")
_DEEPEST = 64
"""Brackets inside brackets; more are a mistake, or an attack on the stack."""


@dataclass(frozen=True)
class _Edit:
    """One text until a step, another one after it."""

    before: Sequence[_Node]
    after: Sequence[_Node]
    when: str

    def step(self, steps: int) -> int:
        """Return the last step of `before`: with a point in it, a number is a part of all steps."""
        value = float(self.when) * (steps if "." in self.when else 1)
        return int(max(min(value, steps), -1))


@dataclass(frozen=True)
class _Turns:
    """One text after the other, step by step."""

    texts: Sequence[Sequence[_Node]]


_Node = str | _Edit | _Turns


@dataclass(frozen=True)
class Part:
    """A part of a prompt between ANDs, with its weight."""

    text: str
    weight: float


def split_parts(prompt: str) -> list[Part]:
    """Split a prompt at AND. Each part may end with `:` and a weight."""
    parts: list[Part] = []
    for piece in _AND.split(prompt):
        match = _WEIGHT.fullmatch(piece)
        assert match is not None  # every text matches
        parts.append(Part(match[1], 1.0 if match[2] is None else float(match[2])))
    return parts


def without_comments(prompt: str) -> str:
    """Return a prompt without its comments, from `#` to the end of the line."""
    for comment in _COMMENTS:
        prompt = comment.sub("\n", prompt)
    return prompt


def adapters_in(prompt: str) -> tuple[str, dict[str, float]]:
    """Return a prompt without its `<lora:NAME:STRENGTH>`, and the adapters with their strengths.

    Raises InputError for what ovforge cannot do: other kinds of networks, and strengths that differ by model.
    """
    found: dict[str, float] = {}
    for match in _NETWORK.finditer(prompt):
        kind, (name, *rest) = match[1], match[2].split(":")
        if kind not in _ADAPTERS:
            raise InputError(
                f"{match[0]!r} asks for a network of the kind {kind!r}, which is not supported",
                where="prompt",
                hint="Adapters are written <lora:NAME:STRENGTH>; remove this one.",
            )
        try:
            strengths = {float(text) for text in rest} or {1.0}
        except ValueError:
            strengths = {math.nan}
        if len(strengths) > 1 or not all(map(math.isfinite, strengths)):
            raise InputError(
                f"{match[0]!r} does not give one number as its strength",
                where="prompt",
                hint="Write <lora:NAME:STRENGTH>: one strength holds for the UNet and the text encoders.",
            )
        found[name] = strengths.pop()
    return _NETWORK.sub("", prompt), found


class EditedPrompt:
    """A prompt whose text depends on the step.

    What the notation does not cover, such as `|` outside of brackets, makes the whole prompt plain text, as there.
    """

    def __init__(self, text: str) -> None:
        self._nodes = _Parser(text).nodes
        found = list(_all(self._nodes))
        self._edits = [node for node in found if isinstance(node, _Edit)]
        self._turns = any(isinstance(node, _Turns) for node in found)

    def at(self, call: int, calls: int) -> str:
        """Return the text at a call of the network, counted from 0, of `calls` that a whole run has.

        A text counts until the call of its last step's number, that number included, because the web UI counts calls
        from 0 and steps from 1.
        """
        if self._turns:
            step = min(max(call, 1), calls)
        else:
            ends = sorted({calls, *(end for edit in self._edits if (end := edit.step(calls)) >= 1)})
            step = next((end for end in ends if call <= end), calls)
        return _written(self._nodes, step, calls)


def _all(nodes: Sequence[_Node]) -> Iterator[_Edit | _Turns]:
    for node in nodes:
        if isinstance(node, _Edit):
            yield node
            yield from _all([*node.before, *node.after])
        elif isinstance(node, _Turns):
            yield node
            for text in node.texts:
                yield from _all(text)


def _written(nodes: Sequence[_Node], step: int, steps: int) -> str:
    """Return the text of nodes at a step, counted from 1."""
    texts = []
    for node in nodes:
        if isinstance(node, _Edit):
            texts.append(_written(node.before if step <= node.step(steps) else node.after, step, steps))
        elif isinstance(node, _Turns):
            texts.append(_written(node.texts[(step - 1) % len(node.texts)], step, steps))
        else:
            texts.append(node)
    return "".join(texts)


@dataclass
class _Parser:
    """Reads a prompt from left to right. A bracket that begins nothing stands for itself, outside of other brackets."""

    text: str
    nodes: list[_Node] = field(default_factory=list)
    _known: dict[int, tuple[list[_Node], int] | None] = field(default_factory=dict)
    _depth: int = 0

    def __post_init__(self) -> None:
        position = 0
        while position < len(self.text):
            nodes, end = self._sequence(position)
            if end == position:
                if self.text[position] not in "[]():":
                    self.nodes = [self.text]
                    return
                nodes, end = [self.text[position]], position + 1
            self.nodes += nodes
            position = end

    def _sequence(self, position: int) -> tuple[list[_Node], int]:
        """Read plain text and whole brackets as far as they go."""
        nodes: list[_Node] = []
        while position < len(self.text):
            if plain := _PLAIN.match(self.text, position):
                nodes.append(plain[0])
                position = plain.end()
            elif (bracket := self._bracket(position)) is not None:
                nodes += bracket[0]
                position = bracket[1]
            else:
                break
        return nodes, position

    def _bracket(self, position: int) -> tuple[list[_Node], int] | None:
        """Read what a bracket encloses; None if it is not closed as it should be."""
        if self.text[position] not in "([":
            return None
        if position not in self._known:
            self._depth += 1
            if self._depth > _DEEPEST:
                raise InputError(
                    f"brackets lie inside each other more than {_DEEPEST} deep", where="prompt", hint="Close them."
                )
            read = self._round if self.text[position] == "(" else self._square
            self._known[position] = read(position + 1)
            self._depth -= 1
        return self._known[position]

    def _round(self, position: int) -> tuple[list[_Node], int] | None:
        inner, end = self._sequence(position)
        nodes: list[_Node] = ["(", *inner]
        if self._at(end) == ":":
            inner, end = self._sequence(end + 1)
            nodes += [":", *inner]
        return ([*nodes, ")"], end + 1) if self._at(end) == ")" else None

    def _square(self, position: int) -> tuple[list[_Node], int] | None:
        first, end = self._sequence(position)
        if self._at(end) == "]":
            return ["[", *first, "]"], end + 1
        if self._at(end) == "|":
            texts = [first]
            while self._at(end) == "|":
                text, end = self._sequence(end + 1)
                texts.append(text)
            return ([_Turns(texts)], end + 1) if self._at(end) == "]" else None
        if self._at(end) != ":":
            return None
        if when := _WHEN.match(self.text, end + 1):
            return [_Edit([], first, when[1])], when.end()
        second, end = self._sequence(end + 1)
        if self._at(end) == ":" and (when := _WHEN.match(self.text, end + 1)):
            return [_Edit(first, second, when[1])], when.end()
        return None

    def _at(self, position: int) -> str:
        return self.text[position : position + 1]
