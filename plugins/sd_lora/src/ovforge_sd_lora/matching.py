"""Which of an adapter's modules meet which layers of a model, and why the others do not: the preflight."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ovforge.contracts import Skipped
from ovforge.errors import ConfigError, ModelError
from ovforge.model import ModelBundle
from ovforge_sd_lora.adapter import Adapter, Module, family_name
from ovforge_sd_lora.architectures import Place, family_of, is_idle, parts, places
from ovforge_sd_lora.control_lora import FIRST, condition_inputs
from ovforge_sd_lora.names import ROLES, flat, reads_as_t5
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.relative import RELATIVE
from ovforge_sd_lora.targets import Target, find_targets, kept_targets

__all__ = ["Match", "Preflight", "Scales", "preflight"]


_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True, slots=True)
class Match:
    """A module of the adapter and the layer it changes."""

    role: str
    module: Module
    target: Target


@dataclass
class Preflight:
    """What would be applied, what not and why, and the share of the model that is touched."""

    matches: list[Match] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    touched: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Role -> weights (numbers) in the layers touched, and in all layers where adapters can act."""
    names: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Role -> path of a layer -> every name that it, or a layer of releases that it is a part of, goes by, flat."""
    notes: list[str] = field(default_factory=list)

    def of(self, role: str) -> list[Match]:
        """Return the matches of a role."""
        return [match for match in self.matches if match.role == role]


def preflight(
    adapter: Adapter, bundle: ModelBundle, roles: Iterable[str] | None = None, *, kept: bool = False
) -> Preflight:
    """Look up every module of an adapter in the models of a bundle; `kept` says that a list of layers will do.

    Raises ModelError if the adapter was trained on another family: then its names may fit and its numbers do not.
    """
    wanted = set(roles) if roles is not None else None
    found = Preflight(skipped=list(adapter.unknown))
    models = _Models(bundle, kept=kept)
    of_role: dict[str, list[Module]] = {}
    for module in adapter.modules:
        role = models.role_of(module)
        if wanted is None or role in wanted:
            of_role.setdefault(role, []).append(module)
    if wanted is not None:
        _check_roles(wanted, of_role, [models.role_of(module) for module in adapter.modules], adapter)
    for role in sorted(of_role, key=lambda role: (*ROLES, role).index(role)):
        if role not in bundle.models:
            found.skipped += [Skipped(_shown(m, role), f"the model has no {role}") for m in of_role[role]]
            continue
        targets = models.targets(role)
        if role == "unet":
            _check_unet(adapter, targets)
        elif role == "transformer":
            _check_transformer(adapter, targets)
        shapes = {path: target.shape for path, target in targets.items()}
        names = places(shapes)
        found.names[role] = _names_by_path(names)
        idle: list[Module] = []
        for module in _with_sizes(of_role[role], names, targets):
            place = names.get(flat(module.name))
            if place is None and is_idle(module.name, shapes):
                idle.append(module)
                continue
            if place is None:
                found.skipped.append(Skipped(_shown(module, role), "the model has no such layer"))
                continue
            for own, path, why in parts(module, place, shapes):
                part = _widened(own, path, shapes[path])
                if part.beyond:
                    found.notes.append(f"{role}: {path} has {part.beyond} inputs that the adapter leaves alone")
                if reason := why or _misfit(part, targets[path]):
                    found.skipped.append(Skipped(_shown(module, role), reason))
                    break  # of a module in parts, the reason is that of all
                if not _idle(part, targets[path]):
                    found.matches.append(Match(role, part, targets[path]))
        paths = {match.target.path for match in found.of(role)}
        found.notes += _named_twice(role, found.of(role))
        if idle:
            found.notes.append(f"{role}: nothing takes what {len(idle)} of the file's layers give ({idle[0].name})")
        sizes = {path: math.prod(shape) for path, shape in shapes.items()}
        found.touched[role] = sum(sizes[path] for path in paths), sum(sizes.values())
    return found


class _Models:
    """The models that an adapter's modules are looked up in, and which of them a module is for."""

    def __init__(self, bundle: ModelBundle, *, kept: bool) -> None:
        self._bundle, self._kept = bundle, kept
        self._targets: dict[str, dict[str, Target]] = {}

    def targets(self, role: str) -> dict[str, Target]:
        """Return path -> layer of a role; layers that were written down will do, if so asked."""
        if role not in self._targets:
            known = kept_targets(self._bundle, role) if self._kept else None
            self._targets[role] = known or find_targets(role, self._bundle.models[role])
        return self._targets[role]

    def role_of(self, module: Module) -> str:
        """Return the role that a module is for: what files call by other names is found by what the models are."""
        role, present = module.role or "unet", self._bundle.models
        if role in _DENOISERS:  # kohya's and ComfyUI's names are the same for both
            return next((each for each in (role, *_DENOISERS) if each in present), role)
        if reads_as_t5(module.name):  # the third encoder of Stable Diffusion 3, the second of FLUX
            others = [each for each in present if each.startswith("text_encoder") and each != role]
            candidates = [role, *sorted(others)] if role in present else sorted(others)
            return next((each for each in candidates if any(map(reads_as_t5, self.targets(each)))), role)
        return role


def _with_sizes(modules: list[Module], names: Mapping[str, Place], targets: Mapping[str, Target]) -> Iterable[Module]:
    """Tell VeRA's modules without projections how wide the widest of their layers is, if all are known."""
    drawn = [module for module in modules if module.kind == "VeRA" and "seed" in module.settings]
    found = [names.get(flat(module.name)) for module in drawn]
    shapes = [targets[place.paths[0]].shape for place in found if place is not None and len(place.paths) == 1]
    if not drawn or len(shapes) != len(drawn):
        return modules
    widest = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    sized = {id(module): replace(module, settings={**module.settings, "widest": widest}) for module in drawn}
    return [sized.get(id(module), module) for module in modules]


def _widened(module: Module, path: str, shape: tuple[int, ...]) -> Module:
    """Let a LoRA for FLUX.1 dev act on models whose first layer sees more than the latents, as diffusers does.

    It is a mask behind them (Fill), or a condition (Canny, Depth, and dev with a Control LoRA).
    """
    plain = module.kind == "LoRA" and not module.relative and not module.on_bias
    beyond = shape[1] - module.shape[1] if len(shape) == len(module.shape) == 2 else 0
    if path != FIRST or not plain or beyond <= 0:
        return module
    return replace(module, shape=(module.shape[0], shape[1]), beyond=beyond)


def _idle(module: Module, target: Target) -> bool:
    """Say whether a module scales or turns a bias that the layer does not have."""
    kind = RELATIVE.get(module.kind)
    return module.on_bias and kind is not None and not kind.makes_bias and not target.has_bias


def _named_twice(role: str, matches: Iterable[Match]) -> list[str]:
    """Return a note where several of the file's modules mean one layer: they add up."""
    count = Counter((match.target.path, match.module.on_bias) for match in matches)
    twice = [path for (path, _), number in count.items() if number > 1]
    if not twice:
        return []
    return [f"{role}: the file names {len(twice)} layers in more than one way ({twice[0]}): what it says adds up"]


def _shown(module: Module, role: str) -> str:
    return f"{role}: {module.name}"


def _check_roles(wanted: set[str], found: Mapping[str, object], present: Iterable[str], adapter: Adapter) -> None:
    if missing := sorted(wanted - set(found)):
        here = sorted(set(present))
        raise ConfigError(
            f"the adapter has no part for {', '.join(missing)}",
            where=f"{adapter.name}: roles",
            hint=f"It has parts for: {', '.join(here)}.",
        )


_ADVICE = "An adapter works on the family it was trained on: take another adapter, or another model."


def _check_transformer(adapter: Adapter, targets: Mapping[str, Target]) -> None:
    """Raise ModelError if names tell that the adapter is for another family than a diffusion transformer's."""
    ours, theirs = family_of(targets), adapter.family
    if ours is None or (theirs is not None and ours in theirs.fits):
        _check_channels(adapter, targets)
        return
    name = "a UNet of Stable Diffusion's kind" if theirs is None else theirs.name
    raise ModelError(f"the adapter is for {name}, and this is {ours}", where=adapter.where, hint=_ADVICE)


def _check_channels(adapter: Adapter, targets: Mapping[str, Target]) -> None:
    """Raise ModelError for a Control LoRA of FLUX.1 on a transformer that has no room for its condition."""
    own = targets.get(FIRST)
    wide = condition_inputs(adapter, own.shape[1]) if own is not None else None
    if own is not None and wide is not None:
        raise ModelError(
            f"it is a Control LoRA, for a transformer that takes a condition as further channels: {wide} of them, and "
            f"this one takes {own.shape[1]}",
            where=adapter.where,
            hint="Name it in the pipeline's transforms: room for the condition is made before the pipeline starts.",
        )


def _check_unet(adapter: Adapter, targets: Mapping[str, Target]) -> None:
    if adapter.family is not None:
        raise ModelError(
            f"the adapter is for {adapter.family.name}, and this is a UNet of Stable Diffusion's kind",
            where=adapter.where,
            hint=_ADVICE,
        )
    ours = next((t.shape[1] for path, t in targets.items() if path.endswith("attn2.to_k")), None)
    theirs = adapter.width()
    if ours is not None and theirs is not None and ours != theirs:
        raise ModelError(
            f"the adapter was trained on {family_name(theirs)} (its cross-attention is {theirs} wide), "
            f"and this is {family_name(ours)} ({ours})",
            where=adapter.where,
            hint=_ADVICE,
        )


def _misfit(module: Module, target: Target) -> str:
    """Return why a module's numbers do not fit a layer's; "" if they do."""
    size, shape = math.prod(module.shape), module.shape
    if module.kind in RELATIVE:
        if target.kind == "norm" and not RELATIVE[module.kind].norms:
            return f"{module.label} cannot act on a norm"
        return module.misfit(target.shape)
    if module.on_bias:
        return "" if size == target.shape[0] else f"a bias of {size}, and the layer has {target.shape[0]} outputs"
    if target.kind == "norm" and module.kind != "full":
        return f"a {module.label} cannot act on a norm"
    whole = size == math.prod(target.shape) and shape[0] == target.shape[0]
    same = len(shape) == len(target.shape)
    if not whole or (same and shape != target.shape) or (not same and math.prod(shape[2:]) != 1):
        return f"its shape is {list(shape)}, and the layer's {list(target.shape)}"
    for key in ("magnitude", "dora_scale"):
        if key in module.keys:
            magnitudes = sum(e - b for b, e in module.rows) or math.prod(module.file.tensors[module.keys[key]].shape)
            allowed = target.shape[:1] if key == "magnitude" else target.shape[:2]
            if magnitudes not in allowed:
                return f"{magnitudes} magnitudes for a layer of {list(target.shape)}"
    return ""


class Scales:
    """The strength of each layer beside the adapter's own: factors of roles and blocks."""

    def __init__(self, options: LoraOptions, found: Preflight) -> None:
        """Raise ConfigError for a factor that no layer of the adapter would take."""
        self._roles, self._blocks = options.role_scales, options.block_scales
        self._names = found.names
        roles = {match.role for match in found.matches}
        for role in self._roles:
            if role not in roles:
                raise ConfigError(
                    f"the adapter has no part for {role!r}",
                    where=f"{options.label}: role_scales",
                    hint=f"It has: {', '.join(sorted(roles))}.",
                )
        for block in self._blocks:
            if not any(self._fits(block, match.role, match.target.path) for match in found.matches):
                raise ConfigError(
                    f"no layer of the adapter is in {block!r}",
                    where=f"{options.label}: block_scales",
                    hint='Blocks are named as in diffusers, "down_blocks.1" or "transformer_blocks.3", or as in the '
                    'release, "input_blocks.4" or "double_blocks.3".',
                )

    def of(self, role: str, path: str) -> float:
        """Return the factor of a layer."""
        fitting = [block for block in self._blocks if self._fits(block, role, path)]
        block = self._blocks[max(fitting, key=len)] if fitting else 1.0
        return self._roles.get(role, 1.0) * block

    def _fits(self, block: str, role: str, path: str) -> bool:
        start = flat(block) + "_"
        return any(f"{name}_".startswith(start) for name in self._names.get(role, {}).get(path, (flat(path),)))


def _names_by_path(names: Mapping[str, Place]) -> dict[str, list[str]]:
    by_path: dict[str, list[str]] = {}
    for name, place in names.items():
        for path in place.paths:
            by_path.setdefault(path, []).append(name)
    return by_path
