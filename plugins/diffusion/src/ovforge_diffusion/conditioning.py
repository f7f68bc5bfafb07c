"""Which text conditions each call of the network: one for a whole run, or others from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import InputError
from ovforge_diffusion.editing import EditedPrompt, split_parts
from ovforge_diffusion.request import Request
from ovforge_diffusion.text import Conditions

__all__ = ["ConditionPlan", "Schedule", "plan_conditions"]

Array = NDArray[np.float32]
Pair = tuple[str, str]
"""A text for the first text encoder and for the second."""


@dataclass(frozen=True)
class Schedule:
    """Conditions of each call of the network. Rows are ordered by half, the unconditional one first, then by picture.

    `weights`, float32 (halves - 1, pictures), says how strongly guidance goes along each half after the first.
    """

    conditions: Conditions
    orders: Sequence[tuple[int, ...]]
    halves: int
    weights: Array

    def at(self, number: int) -> Conditions:
        """Return the conditions of call `number`, counted from the beginning of a run."""
        return self.conditions.rows(self._order(number))

    def changes(self, number: int) -> bool:
        """Say whether a call has other conditions than the one before it."""
        return number > 0 and self._order(number) != self._order(number - 1)

    def _order(self, number: int) -> tuple[int, ...]:
        return self.orders[min(number, len(self.orders) - 1)]


@dataclass(frozen=True)
class ConditionPlan:
    """Texts to encode, each once, and how a schedule is made of them. `negative` says which of them to avoid.

    With `zeros` a last row of nothing takes the place of an unconditional text.
    """

    texts: Sequence[Pair]
    negative: Sequence[bool]
    orders: Sequence[tuple[int, ...]]
    halves: int
    weights: Array
    zeros: bool
    warnings: list[str]

    def schedule(self, conditions: Conditions) -> Schedule:
        """Return the schedule; `conditions` has a row for each text."""
        if self.zeros:
            states, pooled = conditions.states, conditions.pooled
            conditions = Conditions(
                np.concatenate([states, np.zeros_like(states[:1])]),
                None if pooled is None else np.concatenate([pooled, np.zeros_like(pooled[:1])]),
            )
        return Schedule(conditions, self.orders, self.halves, self.weights)


def plan_conditions(request: Request, timesteps: int, *, weighted: bool) -> ConditionPlan:
    """Return what to encode for a run over a schedule of `timesteps`.

    Only `weighted` prompts are read for edits and AND. Raises InputError for parts that no guidance weighs.
    """
    pictures = [_parts(pair) if weighted else [(pair, 1.0)] for pair in request.prompts]
    most = max(map(len, pictures))
    if not request.guided and (most > 1 or any(weight != 1 for parts in pictures for _, weight in parts)):
        raise InputError(
            "AND, and a weight at the end of a prompt, say how strongly guidance follows it; there is none here",
            where="prompt",
            hint="Set guidance_scale above 1 with a model that takes it, or write the prompt without them.",
        )
    # A picture of fewer parts goes along its first one once more, at no weight.
    halves = [[parts[n] if n < len(parts) else (parts[0][0], 0.0) for parts in pictures] for n in range(most)]
    positive = [[_edited(pair, weighted) for pair, _ in half] for half in halves]
    negative = [_edited(pair, weighted) for pair in request.negatives or ()]
    # Methods that call the network twice a step count calls; those with one call more than steps count steps.
    calls = request.steps * max(1, round(timesteps / request.steps))
    texts: dict[tuple[Pair, bool], int] = {}
    orders: list[tuple[int, ...]] = []
    for call in range(timesteps):
        wanted = [(_at(pair, call, calls), True) for pair in negative]
        wanted += [(_at(pair, call, calls), False) for half in positive for pair in half]
        orders.append(tuple(texts.setdefault(text, len(texts)) for text in wanted))
    zeros = request.guided and request.negatives is None
    if zeros:
        orders = [(*[len(texts)] * len(pictures), *order) for order in orders]
    return ConditionPlan(
        texts=[pair for pair, _ in texts],
        negative=[mark for _, mark in texts],
        orders=orders,
        halves=1 + most if request.guided else 1,
        weights=np.array([[weight for _, weight in half] for half in halves], np.float32),
        zeros=zeros,
        warnings=_warnings(request) if weighted else [],
    )


def _parts(pair: Pair) -> list[tuple[Pair, float]]:
    """Split both texts of a prompt at AND; weights are those of the first."""
    first, second = ([split_parts(text) for text in pair]) if pair[0] != pair[1] else [split_parts(pair[0])] * 2
    if len(first) != len(second):
        raise InputError(
            f"{len(second)} parts between AND, and the prompt has {len(first)}",
            where="prompt_2",
            hint="Give as many, or leave prompt_2 out.",
        )
    return [((a.text, b.text), a.weight) for a, b in zip(first, second, strict=True)]


def _edited(pair: Pair, weighted: bool) -> tuple[EditedPrompt, EditedPrompt] | Pair:
    return (EditedPrompt(pair[0]), EditedPrompt(pair[1])) if weighted else pair


def _at(pair: tuple[EditedPrompt, EditedPrompt] | Pair, call: int, calls: int) -> Pair:
    first, second = (text if isinstance(text, str) else text.at(call, calls) for text in pair)
    return first, second


def _warnings(request: Request) -> list[str]:
    """Say what of the notation means nothing in a negative prompt."""
    texts = dict.fromkeys(text for pair in request.negatives or () for text in pair)
    return [f"AND in a negative prompt is read as a word: {text!r}" for text in texts if len(split_parts(text)) > 1]
