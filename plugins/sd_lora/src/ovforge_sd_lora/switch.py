"""The adapter of a running pipeline: what it puts into the places that the transform left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from ovforge.contracts import Skipped
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_sd_lora.adapter import Module, open_adapter
from ovforge_sd_lora.fuse import bias_difference, difference
from ovforge_sd_lora.matching import Match, Preflight, Scales, preflight
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.runtime import module_factors, strengths, variables_of
from ovforge_sd_lora.targets import Target, find_targets

__all__ = ["RunningAdapter", "running_adapter"]

Array = NDArray[np.float32]


def running_adapter(options: LoraOptions, bundle: ModelBundle) -> RunningAdapter | None:
    """Return the adapter as it is switched; None if all of it has gone into the weights.

    One that no transform has prepared takes the places that others made.
    """
    planned = bundle.adapters.get(options.label)
    if planned is None and (options.mode == "fuse" or not bundle.adapters):
        return None
    adapter = open_adapter(options.path, options.label, options.adapter)
    found = preflight(adapter, bundle, options.roles, kept=True)
    known: dict[str, set[str]] = {}
    for places in [planned] if planned is not None else bundle.adapters.values():
        for role, variables in places.items():
            known.setdefault(role, set()).update(variables)
    matches = [match for match in found.matches if set(_variables(match)) <= known.get(match.role, set())]
    skipped: list[Skipped] = []
    if planned is None:
        skipped = found.skipped + [
            Skipped(
                f"{match.role}: {match.module.name}",
                'no place was made there when the pipeline started (places = "all" makes all)',
            )
            for match in found.matches
            if match not in matches
        ]
    return RunningAdapter(
        options, bundle, matches, Scales(options, found), found, skipped, [*adapter.notes, *found.notes]
    )


class RunningAdapter:
    """A `stages.Adapter` over an adapter file. Factors are read once; strengths are computed for each weight."""

    def __init__(
        self,
        options: LoraOptions,
        bundle: ModelBundle,
        matches: list[Match],
        scales: Scales,
        found: Preflight,
        skipped: list[Skipped],
        notes: list[str],
    ) -> None:
        self.name = options.label
        self.weight = options.scale
        self.skipped = skipped
        self.notes = notes
        self._bundle, self._matches, self._scales = bundle, matches, scales
        self._factors: dict[int, tuple[Array, Array]] = {}
        self._added: dict[int, Array] = {}
        self._layers: dict[str, dict[str, Target]] = {}
        self._joined: dict[tuple[str, str], Array] = {}

    def values(self, weight: float) -> Mapping[str, Mapping[str, Array]]:
        """Return role -> variable -> value at a weight."""
        parts: dict[str, dict[str, list[Array]]] = {}
        for number, match in enumerate(self._matches):
            strength = weight * self._scales.of(match.role, match.target.path)
            for variable, value in self._values(number, match, strength).items():
                parts.setdefault(match.role, {}).setdefault(variable, []).append(value)
        self._layers.clear()  # they hold the whole model
        return {
            role: {variable: self._join((role, variable), found) for variable, found in variables.items()}
            for role, variables in parts.items()
        }

    def _values(self, number: int, match: Match, strength: float) -> dict[str, Array]:
        names = _variables(match)
        layer = functools.partial(self._layer, match.role, match.target.path)
        if len(names) == 1:
            if number not in self._added:
                self._added[number] = _added(match.module, layer)
            return {names[0]: np.float32(match.module.strength(strength)) * self._added[number]}
        if number not in self._factors:
            self._factors[number] = module_factors(match.target, match.module, lambda: layer().weight())
        a, b = self._factors[number]
        return dict(zip(names, (a, strengths(match.module, strength, b.shape[1]), b), strict=True))

    def _join(self, place: tuple[str, str], found: list[Array]) -> Array:
        """Return one value of a place that several modules of the file share: the same array as long as they are."""
        if len(found) == 1:
            return found[0]
        name = place[1]
        if not name.endswith((".A", ".B")):
            return np.concatenate(found, axis=1) if name.endswith(".s") else np.sum(found, axis=0)
        joined = np.concatenate(found, axis=0 if name.endswith(".A") else 1)
        before = self._joined.get(place)
        if before is None or not np.array_equal(before, joined):
            self._joined[place] = joined
        return self._joined[place]

    def _layer(self, role: str, path: str) -> Target:
        """Return a layer, whose own weight or bias relative kinds start from."""
        if role not in self._layers:
            self._layers[role] = find_targets(role, self._bundle.models[role])
        if path not in self._layers[role]:
            raise ModelError(
                f"{role} has no {path} any more, whose weight the adapter needs: a later transform has replaced it",
                where=f"adapters: {self.name}",
                hint='Set mode = "fuse".',
            )
        return self._layers[role][path]


def _added(module: Module, layer: Callable[[], Target]) -> Array:
    """Return what a module adds to a bias or a norm at strength 1, flat."""
    if module.on_bias:
        return bias_difference(module, lambda: layer().bias(), lambda: layer().weight())
    return (difference(layer().weight(), module) if module.relative else module.delta()).reshape(-1)


def _variables(match: Match) -> list[str]:
    return list(variables_of(match.target, "bias" if match.module.on_bias else "weight"))
