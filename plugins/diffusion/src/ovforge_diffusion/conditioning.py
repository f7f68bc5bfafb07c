"""Which text conditions each call of the network: one for a whole run, or others from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import InputError
from ovforge_diffusion.architectures.base import Texts
from ovforge_diffusion.editing import EditedPrompt, split_parts
from ovforge_diffusion.request import Request

__all__ = ["ConditionPlan", "Schedule", "plan_conditions"]

Array = NDArray[np.float32]
Inputs = Mapping[str, NDArray[Any]]
"""What conditions the denoiser: arrays by the name of its input, each with a row for each text."""


@dataclass(frozen=True)
class Schedule:
    """Conditions of each call of the network. Rows are ordered by half, the unconditional one first, then by picture.

    `weights`, float32 (parts, pictures), says how strongly guidance goes along each half that is a part of the prompt.
    """

    inputs: Inputs
    orders: Sequence[tuple[int, ...]]
    halves: int
    weights: Array

    def at(self, number: int) -> dict[str, NDArray[Any]]:
        """Return the conditions of call `number`, counted from the beginning of a run."""
        picked = list(self._order(number))
        return {name: value[picked] for name, value in self.inputs.items()}

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

    texts: Sequence[Texts]
    negative: Sequence[bool]
    orders: Sequence[tuple[int, ...]]
    halves: int
    weights: Array
    zeros: bool
    warnings: list[str]

    def schedule(self, inputs: Inputs) -> Schedule:
        """Return the schedule; `inputs` have a row for each text."""
        if self.zeros:
            inputs = {name: np.concatenate([value, np.zeros_like(value[:1])]) for name, value in inputs.items()}
        return Schedule(inputs, self.orders, self.halves, self.weights)


def plan_conditions(request: Request, timesteps: int, *, weighted: bool) -> ConditionPlan:
    """Return what to encode for a run over a schedule of `timesteps`.

    Only `weighted` prompts are read for edits and AND. Raises InputError for parts that no guidance weighs.
    """
    pictures = [_parts(texts) if weighted else [(texts, 1.0)] for texts in request.prompts]
    most = max(map(len, pictures))
    if not request.guided and (most > 1 or any(weight != 1 for parts in pictures for _, weight in parts)):
        raise InputError(
            "AND, and a weight at the end of a prompt, say how strongly guidance follows it; there is none here",
            where="prompt",
            hint="Set guidance_scale above 1 with a model that takes it, or write the prompt without them.",
        )
    # A picture of fewer parts goes along its first one once more, at no weight.
    halves = [[parts[n] if n < len(parts) else (parts[0][0], 0.0) for parts in pictures] for n in range(most)]
    positive = [[_edited(each, weighted) for each, _ in half] for half in halves]
    negative = [_edited(each, weighted) for each in request.negatives or ()]
    # Methods that call the network twice a step count calls; those with one call more than steps count steps.
    calls = request.steps * max(1, round(timesteps / request.steps))
    texts: dict[tuple[Texts, bool], int] = {}
    orders: list[tuple[int, ...]] = []
    for call in range(timesteps):
        wanted = [(_at(each, call, calls), True) for each in negative]
        wanted += [(_at(each, call, calls), False) for half in positive for each in half]
        if request.skipped_layers:  # the prompt once more, for a prediction without these layers
            wanted += [(_at(each, call, calls), False) for each in positive[0]]
        orders.append(tuple(texts.setdefault(text, len(texts)) for text in wanted))
    zeros = request.guided and request.negatives is None
    if zeros:
        orders = [(*[len(texts)] * len(pictures), *order) for order in orders]
    return ConditionPlan(
        texts=[each for each, _ in texts],
        negative=[mark for _, mark in texts],
        orders=orders,
        halves=1 + most + bool(request.skipped_layers) if request.guided else 1,
        weights=np.array([[weight for _, weight in half] for half in halves], np.float32),
        zeros=zeros,
        warnings=_warnings(request) if weighted else [],
    )


def _parts(texts: Texts) -> list[tuple[Texts, float]]:
    """Split each text of a prompt at AND; weights are those of the first."""
    first, *others = [split_parts(text) for text in texts]
    for number, other in enumerate(others):
        if len(first) != len(other):
            raise InputError(
                f"{len(other)} parts between AND, and the prompt has {len(first)}",
                where=f"prompt_{number + 2}",
                hint=f"Give as many, or leave prompt_{number + 2} out.",
            )
    return [(tuple(part.text for part in parts), parts[0].weight) for parts in zip(first, *others, strict=True)]


def _edited(texts: Texts, weighted: bool) -> tuple[EditedPrompt | str, ...]:
    return tuple(EditedPrompt(text) for text in texts) if weighted else texts


def _at(texts: tuple[EditedPrompt | str, ...], call: int, calls: int) -> Texts:
    return tuple(text if isinstance(text, str) else text.at(call, calls) for text in texts)


def _warnings(request: Request) -> list[str]:
    """Say what of the notation means nothing in a negative prompt."""
    found = dict.fromkeys(text for texts in request.negatives or () for text in texts)
    return [f"AND in a negative prompt is read as a word: {text!r}" for text in found if len(split_parts(text)) > 1]
