"""The transform `lora`: into the weights, or beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ovforge.contracts import Report
from ovforge.errors import ConfigError, ModelError
from ovforge.model import ModelBundle
from ovforge_sd_lora.adapter import open_adapter
from ovforge_sd_lora.control_lora import widen
from ovforge_sd_lora.fuse import Opened, fuse
from ovforge_sd_lora.matching import Match, Scales, preflight
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.runtime import attach
from ovforge_sd_lora.sums import Room
from ovforge_sd_lora.targets import find_targets, keep_targets

__all__ = ["LoraTransform"]


class LoraTransform:
    """Applies one adapter file. What of it finds no place is in the report; ModelError where nothing does."""

    def __init__(self, options: LoraOptions) -> None:
        self._options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change the models of the adapter's roles."""
        adapter = open_adapter(self._options.path, self._options.label, self._options.adapter)
        widened = widen(adapter, bundle) if self._changes_transformer else None
        found = preflight(adapter, bundle, self._options.roles)
        if not found.matches:
            first = found.skipped[0]
            raise ModelError(
                f"nothing of the adapter fits the model: {first.item}: {first.reason}",
                where=adapter.where,
                hint="Run `ovforge lora inspect FILE --model MODEL` for the whole table.",
            )
        report = Report(skipped=list(found.skipped), notes=[*adapter.notes, *found.notes])
        if widened:
            report.applied.append(widened)
        scales = Scales(self._options, found)
        for role in dict.fromkeys(match.role for match in found.matches):
            beside = [match for match in found.of(role) if self._beside(match)]
            fused = [match for match in found.of(role) if match not in beside]
            if beside:
                self._attach(role, beside, bundle, report)
            if fused:
                self._fuse(role, fused, scales, report)
        return report

    @property
    def _changes_transformer(self) -> bool:
        return self._options.roles is None or "transformer" in self._options.roles

    def _beside(self, match: Match) -> bool:
        """Say whether a module acts beside the weight rather than in it."""
        if self._options.mode == "auto":
            fused = self._options.compressed == "requantize"
            return not fused and not match.module.on_bias and match.target.compressed
        return self._options.mode == "runtime"

    def _attach(self, role: str, matches: Sequence[Match], bundle: ModelBundle, report: Report) -> None:
        name, model = self._options.label, bundle.models[role]
        if role in bundle.adapters.get(name, {}):
            raise ConfigError(
                f"two adapters are called {name!r}", where="lora: name", hint="Give each a name of its own."
            )
        targets = find_targets(role, model)
        keep_targets(bundle, role, targets)
        variables: dict[str, list[int]] = {}
        for match in matches:
            variables |= attach(model, match.target, "bias" if match.module.on_bias else "weight")
        if self._options.places == "all":
            for target in targets.values():
                variables |= attach(model, target, "weight") if target.kind != "norm" else {}
        bundle.adapters.setdefault(name, {})[role] = variables
        report.roles = tuple(dict.fromkeys((*report.roles, role)))
        report.applied.append(f"{role}: at run time: {describe(matches)}")
        if self._options.mode == "auto":
            report.notes.append(f"{role}: {len(matches)} layers have compressed weights, which stay as they are")

    def _fuse(self, role: str, matches: Sequence[Match], scales: Scales, report: Report) -> None:
        layers: dict[str, list[Match]] = {}
        for match in matches:
            layers.setdefault(match.target.path, []).append(match)
        opened: dict[str, list[Opened]] = {}
        room, again = Room(), self._options.compressed == "requantize"
        for path, layer in layers.items():
            strength = self._options.scale * scales.of(role, path)
            if strength == 0:
                continue
            was = fuse(layer[0].target, [(match.module, strength) for match in layer], room, again)
            if was:
                opened.setdefault(was.kind, []).append(was)
        report.roles = tuple(dict.fromkeys((*report.roles, role)))
        report.applied.append(f"{role}: fused: {describe(matches)}")
        report.notes += [f"{role}: {len(each)} layers {_said(kind, each, again)}" for kind, each in opened.items()]


def _said(kind: str, opened: Sequence[Opened], again: bool) -> str:
    """Return what became of compressed weights, in words."""
    if not again:
        return f"stored as f16, which were {kind}: they are not quantized again"
    changed, rounded = (math.sqrt(sum(getattr(each, name) for each in opened)) for name in ("changed", "rounded"))
    share = f": that rounds by {rounded / changed:.0%} of what the adapter changes" if changed else ""
    return f"quantized again to {kind}, as asked{share}"


def describe(matches: Sequence[Match]) -> str:
    """Return what is applied to a role, in words."""
    count = Counter(match.module.label for match in matches)
    ranks = sorted({match.module.rank for match in matches if match.module.rank})
    rank = f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "") if ranks else ""
    return ", ".join(f"{number} x {label}" for label, number in count.items()) + rank
