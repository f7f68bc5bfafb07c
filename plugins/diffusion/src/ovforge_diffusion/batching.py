"""Several calls as one: ovforge.contracts.Batching. Pictures of one batch are what they are alone, but for rounding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from ovforge.errors import InputError
from ovforge.model import ImagesResult, Timings
from ovforge_diffusion.inputs import TextToImageInputs
from ovforge_diffusion.request import seeds_of

__all__ = ["joined", "key_of", "parts_of"]

_TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3")
_OWN = {*_TEXTS, "seed", "count"}
"""What each picture of a batch has for itself."""
_SETTLED = ("steps", "guidance_scale", "width", "height")
"""What the result says of all of them, whether or not a call gave it."""


def key_of(inputs: TextToImageInputs) -> Hashable | None:
    """Return what holds for a whole batch, and which texts are given; None for what comes with arrays or pictures."""
    if inputs.latents is not None or inputs.control is not None:
        return None
    shared = inputs.model_dump(exclude={*_OWN, "latents", "control"})
    return repr((shared, [getattr(inputs, name) is None for name in _TEXTS]))


def joined(calls: Sequence[TextToImageInputs]) -> TextToImageInputs:
    """Return one call for the pictures of all. Raises InputError for a wrong number of texts or seeds in one."""
    texts: dict[str, Any] = {
        name: [text for call in calls for text in _each(name, call)]
        for name in _TEXTS
        if getattr(calls[0], name) is not None
    }
    seeds = [seed for call in calls for seed in seeds_of(call.seed, _pictures(call))]
    return calls[0].model_copy(update={**texts, "seed": seeds, "count": 1})


def parts_of(result: ImagesResult, calls: Sequence[TextToImageInputs]) -> list[ImagesResult] | None:
    """Return each call's pictures; None if the result says something of prompts, since nobody knows of whose."""
    if result.warnings or result.provenance.keys() != {"inputs"}:
        return None
    made, parts, place = result.provenance["inputs"], [], 0
    for call in calls:
        own = slice(place, place + _pictures(call))
        place = own.stop
        seeds = tuple(result.seeds[own])
        given = {name: value for name in call.model_fields_set if (value := getattr(call, name)) is not None}
        settled = {name: made[name] for name in _SETTLED}
        seed = seeds[0] if len(seeds) == 1 else list(seeds)
        parts.append(
            replace(
                result,
                timings=Timings().merged(result.timings),
                warnings=[],
                provenance={"inputs": {**given, **settled, "seed": seed}},
                images=result.images[own],
                seeds=seeds,
                latents=None if result.latents is None else result.latents[own],
            )
        )
    return parts


def _each(name: str, call: TextToImageInputs) -> list[str]:
    """Return one text for each picture. Their number is checked as that of a call alone is."""
    given, prompts = getattr(call, name), 1 if isinstance(call.prompt, str) else len(call.prompt)
    texts = [given] * prompts if isinstance(given, str) else list(given)
    if len(texts) != prompts:
        raise InputError(f"{len(texts)} texts for {prompts} prompts", where=name, hint="Give one for each.")
    return [text for text in texts for _ in range(call.count)]


def _pictures(call: TextToImageInputs) -> int:
    return (1 if isinstance(call.prompt, str) else len(call.prompt)) * call.count
