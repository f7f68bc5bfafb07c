"""What may make a pipeline faster: changes of its config, as the installed extensions offer them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ovforge import PipelineConfig, Plugins
from ovforge.contracts import Extension, GraphTransformExtension, TunableExtension
from ovforge.errors import OvforgeError

__all__ = ["KINDS", "Change", "changed", "changes_for", "has_approximations", "label_of", "plain"]

KINDS = ("task", "device", "transform", "quantizer")
"""Kinds of extensions that offer changes; what costs least to try comes first."""

_LISTS = {"transform": "transform", "quantizer": "quantize"}
"""The key of a config that a kind of extension is listed under."""


@dataclass(frozen=True, slots=True)
class Change:
    """One extension with one of its `tunings`; of a task, inputs."""

    kind: str
    use: str
    options: Mapping[str, Any] = field(hash=False)
    by: str = ""
    """The plugin, and the one that does a recipe's work, with their versions."""
    approximates: bool = False
    """Whether it changes results by design, so that a gate holds it."""

    @property
    def label(self) -> str:
        """What it is called in tables."""
        options = " ".join(f"{name}={_shown(value)}" for name, value in self.options.items())
        return options if self.kind in ("device", "task") else f"{self.use} {options}".strip()

    @property
    def slot(self) -> tuple[str, str]:
        """What a pipeline can have one of."""
        return self.kind, self.use

    def as_json(self) -> dict[str, Any]:
        """Return it for reports, and for keys of the cache."""
        return {"kind": self.kind, "use": self.use, "options": dict(self.options), "by": self.by}


def plain(config: PipelineConfig) -> dict[str, Any]:
    """Return a config as a dict without its gate, which would judge each trial a second time."""
    written = config.as_dict()
    written.pop("quality", None)
    if config.load.key is not None:
        load = written["load"]
        written["load"] = {**(load if isinstance(load, dict) else {"source": load}), "key": config.load.key}
    return written


def changed(config: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Return a config's dict with changes made."""
    made: dict[str, Any] = json.loads(json.dumps(config))
    for change in changes:
        options = json.loads(json.dumps(dict(change.options)))
        if change.kind in _LISTS:
            made.setdefault(_LISTS[change.kind], []).append({"use": change.use, **options})
        elif change.kind == "device":
            device = made.get("device", change.use)
            made["device"] = {**({"use": device} if isinstance(device, str) else device), **options}
        else:
            made["input"] = {**made.get("input", {}), **options}
    if not any(change.kind == "quantizer" for change in changes) and not made.get("quantize"):
        made.pop("calibration", None)
    return made


def changes_for(config: PipelineConfig, roles: Collection[str], plugins: Plugins) -> Iterator[Change]:
    """Yield every change that an extension here offers for a pipeline whose models are `roles`.

    What the config itself uses is left as it says, as are quantizers for roles that it has not. An extension that
    cannot say what to try offers nothing.
    """
    used = _used(config)
    for kind in KINDS:
        for offer in plugins.all(kind):
            extension = offer.extension
            named = {"task": config.task, "device": config.device}.get(kind)
            if not isinstance(extension, TunableExtension) or (kind, extension.name) in used:
                continue
            if kind in ("task", "device") and (named is None or named.use != extension.name):
                continue
            try:
                tables = extension.tables()
                meant = set(_roles(extension))
            except OvforgeError:
                continue
            given = set(config.input) if kind == "task" else set(named.options) if named and kind == "device" else set()
            for options in tables:
                wanted = set(options.get("roles", ())) or meant
                fitting = any(fnmatchcase(role, pattern) for role in roles for pattern in wanted)
                if given & set(options) or (wanted and not fitting):
                    continue
                doers = {each.plugin: each.version for each in (offer, offer.worker) if each is not None}
                by = ", ".join(f"{name} {version}" for name, version in doers.items())
                yield Change(kind, extension.name, options, by, _approximates(kind, extension))


def has_approximations(config: PipelineConfig, plugins: Plugins) -> bool:
    """Say whether a config has quantizers or transforms that approximate, as `[quality]` needs them."""
    used = _used(config)
    return any(
        (kind, offer.extension.name) in used and _approximates(kind, offer.extension)
        for kind in _LISTS
        for offer in plugins.all(kind)
    )


def label_of(changes: Sequence[Change]) -> str:
    """Return what a set of changes is called; that of none is the original."""
    return " + ".join(change.label for change in changes) or "original"


def _used(config: PipelineConfig) -> set[tuple[str, str]]:
    """Return kind and name of what a config lists."""
    return {("transform", use.use) for use in config.transform} | {("quantizer", use.use) for use in config.quantize}


def _approximates(kind: str, extension: Extension) -> bool:
    """Say whether an extension changes results by design."""
    return kind == "quantizer" or (isinstance(extension, GraphTransformExtension) and extension.approximates)


def _roles(extension: TunableExtension) -> Sequence[str]:
    """Return the roles that an extension's options name by default; none if they name none."""
    model = extension.options_model()
    known = model.model_fields.get("roles") if model else None
    default = known.get_default(call_default_factory=True) if known and not known.is_required() else None
    return tuple(default) if isinstance(default, list | tuple) else ()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
