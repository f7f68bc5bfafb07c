"""Finding plugins and what they offer.

A plugin is imported when something of its is asked for. The catalogue says whose that is; plugins that are not in it
are imported when nothing in it fits. A plugin that cannot be used is set aside with its reason, and the rest goes on.
"""

from __future__ import annotations

import importlib
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from ovforge._version import API_VERSION, __version__
from ovforge.contracts import hookspecs
from ovforge.contracts.extensions import KINDS, Extension, QuantizerExtension, RecipeExtension
from ovforge.contracts.hookspecs import ENTRY_POINT_GROUP, HOOK_OF_KIND
from ovforge.errors import PluginError, UnknownNameError, did_you_mean
from ovforge.plugins.catalogue import PluginRecord, Registry

if TYPE_CHECKING:
    import logging

__all__ = ["Offer", "PluginStatus", "Plugins"]

BUILT_IN = "ovforge.builtin"

_CLASSES_OF_KIND: dict[str, tuple[type[Extension], ...]] = {
    **{extension.kind: (extension,) for extension in KINDS},
    "quantizer": (QuantizerExtension, RecipeExtension),
}


@dataclass(frozen=True, slots=True)
class Offer:
    """An extension and whose it is."""

    extension: Extension
    plugin: str
    version: str
    distribution: str | None = None
    """The installed distribution that brings it; None for a plugin that was registered by hand."""
    worker: Offer | None = None
    """The quantizer that a recipe names, whose plugin does the work."""


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """What is known of one plugin, for people.

    `state` is "built in", "imported", "installed" (not imported, since nothing asked for it), "disabled",
    "set aside" or "not installed".
    """

    name: str
    distribution: str
    version: str | None
    state: str
    reason: str
    summary: str
    provides: Mapping[str, Mapping[str, str]]
    needs: tuple[str, ...]


class Plugins:
    """What is offered by the plugins that are installed and switched on."""

    def __init__(self, registry: Registry | None = None, found: Iterable[EntryPoint] | None = None) -> None:
        self.registry = registry if registry is not None else Registry.load()
        self._found = found
        self._offers: dict[tuple[str, str], Offer] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._set_aside: dict[str, str] = {}
        self._manager = pluggy.PluginManager("ovforge")
        self._manager.add_hookspecs(hookspecs)
        self._register_builtin()

    def find(self, kind: str, name: str) -> Offer:
        """Return who offers `name`, importing that plugin alone if the catalogue knows it.

        Raises PluginError that says what to install, enable or repair; UnknownNameError if nobody knows the name. A
        recipe is returned as the quantizer that it names, with the recipe's name and options.
        """
        offer = self.get(kind, name)
        if offer is None:
            raise self._unknown(kind, name)
        return offer

    def get(self, kind: str, name: str) -> Offer | None:
        """Return the same; None if no plugin here offers `name`."""
        for plugins in ((), self._providers(kind, name), self._uncatalogued(), list(self._installed)):
            for plugin in plugins:
                self._import(plugin)
            if (kind, name) in self._offers:
                return self._expanded(self._offers[kind, name])
        return None

    def all(self, kind: str) -> list[Offer]:
        """Return every offer of a kind; imports the plugins that may have one.

        Recipes whose quantizer is not here are left out, as are plugins that are not: `find` says why.
        """
        for name, record in self.registry.records.items():
            if record.provides.get(kind):
                self._import(name)
        for name in self._uncatalogued():
            self._import(name)
        offers = [offer for (of_kind, _), offer in self._offers.items() if of_kind == kind]
        return [self._expanded(offer) for offer in offers if self._can_work(offer)]

    def missing(self, *kinds: str) -> list[PluginRecord]:
        """Return the plugins of the catalogue that offer any of these kinds, and are not installed."""
        records = self.registry.records.values()
        return [one for one in records if one.name not in self._installed and any(one.provides.get(k) for k in kinds)]

    def summaries(self, kind: str) -> dict[str, str]:
        """Return name -> summary of every extension of a kind that is installed and switched on.

        Imports none of the plugins whose extensions the catalogue lists; what is built in comes first.
        """
        found = {name: offer.extension.summary for (of, name), offer in self._offers.items() if of == kind}
        for plugin, record in self.registry.records.items():
            if plugin in self._installed and plugin not in self.registry.disabled and plugin not in self._set_aside:
                for name, summary in record.provides.get(kind, {}).items():
                    found.setdefault(name, summary)
        for plugin in self._uncatalogued():
            self._import(plugin)
        return found | {name: offer.extension.summary for (of, name), offer in self._offers.items() if of == kind}

    def problems(self, plugin: str) -> tuple[list[str], list[str]]:
        """Import all that an imported plugin's descriptions name; return what is wrong with them, and what is absent.

        The second list names distributions of the catalogue's `needs`: parts of the plugin wait for their installation.
        """
        record = self.registry.records.get(plugin)
        needs = {need: _module_name(need) for need in (record.needs if record else ())}
        wrong, absent = [], set()
        for (kind, name), offer in self._offers.items():
            for error in offer.extension.problems() if offer.plugin == plugin else ():
                missing = _missing_module(error)
                if waiting := [need for need, module in needs.items() if module == missing]:
                    absent.update(waiting)
                else:
                    wrong.append(f"{kind} {name}: {error.where}: {error.what}")
        return wrong, sorted(absent)

    def import_all(self) -> None:
        """Import every plugin that is installed and switched on."""
        for name in self._installed:
            self._import(name)

    def register(self, module: types.ModuleType, name: str, version: str = "0") -> None:
        """Add a plugin that has no entry point, such as one under test. Raises PluginError if it breaks a rule."""
        self._add(module, name, version)

    def statuses(self) -> list[PluginStatus]:
        """Return what is known of every plugin, installed or in the catalogue."""
        names = dict.fromkeys(["builtin", *self.registry.records, *self._installed, *self._modules, *self._set_aside])
        return [self._status(name) for name in names]

    # -- how names are found ------------------------------------------------------------------------------------

    @cached_property
    def _installed(self) -> dict[str, EntryPoint]:
        """Plugin name -> entry point, in the catalogue's order, then by name; a second of a name is set aside."""
        found = entry_points(group=ENTRY_POINT_GROUP) if self._found is None else self._found
        order = {name: position for position, name in enumerate(self.registry.records)}
        chosen: dict[str, EntryPoint] = {}
        for entry in sorted(found, key=lambda e: (order.get(e.name, len(order)), e.name, _distribution(e))):
            if entry.name in chosen:
                first = _distribution(chosen[entry.name])
                self._set_aside[f"{entry.name} ({_distribution(entry)})"] = f"{first} has a plugin of this name"
            else:
                chosen[entry.name] = entry
        return chosen

    def _providers(self, kind: str, name: str) -> list[str]:
        return [record.name for record in self.registry.providers(kind, name)]

    def _uncatalogued(self) -> list[str]:
        records = self.registry.records
        return [name for name in self._installed if name not in records or not records[name].provides]

    def _unknown(self, kind: str, name: str) -> PluginError:
        """Say why `name` is not available, from the most to the least that is known."""
        where = f"{kind} {name!r}"
        for record in self.registry.providers(kind, name):
            if record.name in self._set_aside:
                return PluginError(
                    f"the plugin {record.name!r} that provides it was set aside: {self._set_aside[record.name]}",
                    where=where,
                    hint="See: ovforge plugins doctor",
                )
            if record.name in self.registry.disabled:
                return PluginError(
                    f"the plugin {record.name!r} that provides it is switched off",
                    where=where,
                    hint=f"Run: ovforge plugins enable {record.name}",
                )
            if record.name not in self._installed:
                return PluginError(
                    f"the plugin {record.name!r} that provides it is not installed",
                    where=where,
                    hint=f"Run: {record.install}",
                )
        known = {offered for of_kind, offered in self._offers if of_kind == kind} | self.registry.names(kind)
        listing = f"Known: {', '.join(sorted(known))}." if known else f"No plugin offers any {kind}."
        set_aside = f" Set aside: {', '.join(self._set_aside)}; see ovforge plugins doctor." * bool(self._set_aside)
        return UnknownNameError(f"unknown.{did_you_mean(name, known)}", where=where, hint=listing + set_aside)

    def _expanded(self, offer: Offer) -> Offer:
        """Return an offer as it is used: a recipe as its quantizer. Raises PluginError if that is not here."""
        recipe = offer.extension
        if not isinstance(recipe, RecipeExtension):
            return offer
        where = f"the recipe {recipe.name!r} of {offer.plugin}"
        worker = self._offers.get(("quantizer", recipe.quantizer)) or self.get("quantizer", recipe.quantizer)
        if worker is None:
            error = self._unknown("quantizer", recipe.quantizer)
            raise PluginError(error.what, where=f"{where}, {error.where}", hint=error.hint)
        if not isinstance(worker.extension, QuantizerExtension):
            raise PluginError(f"it names {recipe.quantizer!r}, which is a recipe, too", where=where)
        return replace(offer, extension=recipe.of(worker.extension), worker=worker)

    def _can_work(self, offer: Offer) -> bool:
        recipe = offer.extension
        return not isinstance(recipe, RecipeExtension) or self.get("quantizer", recipe.quantizer) is not None

    # -- importing -----------------------------------------------------------------------------------------------

    def _register_builtin(self) -> None:
        # By name: what is built in stands above this module, and comes through the same hooks as everybody's.
        self._add(importlib.import_module(BUILT_IN), "builtin", __version__, "ovforge")

    def _import(self, name: str) -> None:
        """Import and register one plugin; what is wrong with it becomes its reason to be set aside."""
        entry = self._installed.get(name)
        if entry is None or name in self._modules or name in self._set_aside or name in self.registry.disabled:
            return
        _log().info("importing the plugin %s from %s", name, entry.value)
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:  # a plugin's import may raise anything
            self._set_aside[name] = f"it cannot be imported: {type(error).__name__}: {error}"
            _log().info("the plugin %s is set aside: %s", name, self._set_aside[name])
            return
        try:
            self._add(module, name, _version(entry), entry.dist.name if entry.dist else None)
        except PluginError as error:
            self._set_aside[name] = error.what

    def _add(self, module: Any, name: str, version: str, distribution: str | None = None) -> None:
        wanted = getattr(module, "OVFORGE_API", API_VERSION)
        if wanted != API_VERSION:
            raise PluginError(f"it is for version {wanted} of the plugin API, and this is {API_VERSION}", where=name)
        try:
            self._manager.register(module, name)
            self._manager.check_pending()
            offers = {
                (kind, extension.name): Offer(extension, name, version, distribution)
                for kind in HOOK_OF_KIND
                for extension in self._extensions(module, kind, name)
            }
        except (PluginError, pluggy.PluginValidationError) as error:
            self._manager.unregister(module)
            what = error.what if isinstance(error, PluginError) else str(error)
            raise PluginError(what, where=name) from error
        self._offers.update(offers)
        self._modules[name] = module

    def _extensions(self, module: Any, kind: str, plugin: str) -> Iterable[Extension]:
        """Return what one plugin's hook yields, checked."""
        others = [other for other in self._manager.get_plugins() if other is not module]
        hook = self._manager.subset_hook_caller(HOOK_OF_KIND[kind], others)
        try:
            offered = [extension for result in hook() for extension in result]
        except Exception as error:  # a plugin's hook may raise anything
            raise PluginError(f"{HOOK_OF_KIND[kind]} raised {type(error).__name__}: {error}") from error
        seen: set[str] = set()
        for extension in offered:
            if not isinstance(extension, _CLASSES_OF_KIND[kind]):
                wanted = " or ".join(each.__name__ for each in _CLASSES_OF_KIND[kind])
                raise PluginError(f"{HOOK_OF_KIND[kind]} yields {type(extension).__name__}, not {wanted}")
            self._check_free(kind, extension.name, plugin, seen)
            seen.add(extension.name)
        return offered

    def _check_free(self, kind: str, name: str, plugin: str, seen: set[str]) -> None:
        """Refuse a name that somebody has, or that the catalogue gives to another plugin that is there."""
        if name in seen:
            raise PluginError(f"it offers the {kind} {name!r} twice")
        holder = self._offers.get((kind, name))
        owners = [
            owner
            for owner in self._providers(kind, name)
            if owner in self._installed and owner not in self.registry.disabled and owner not in self._set_aside
        ]
        taken = holder.plugin if holder else next((o for o in owners if plugin not in owners and o != plugin), None)
        if taken is not None:
            raise PluginError(f"it offers the {kind} {name!r}, which {taken!r} offers already")

    # -- for people ----------------------------------------------------------------------------------------------

    def _status(self, name: str) -> PluginStatus:
        entry = self._installed.get(name)
        record = self.registry.records.get(name) or PluginRecord(name, name, name, "")
        version = _version(entry) if entry and entry.dist else None
        reason = ""
        if name == "builtin":
            state, version = "built in", __version__
            record = PluginRecord(
                name, "ovforge", BUILT_IN, "What needs no other plugin: IR and other formats, devices, commands"
            )
        elif name in self.registry.disabled:
            state, reason = "disabled", f"switched on by: ovforge plugins enable {name}"
        elif name in self._set_aside:
            state, reason = "set aside", self._set_aside[name]
        elif name in self._modules:
            state = "imported"
        elif entry is None:
            state, reason = "not installed", f"installed by: {record.install}"
        else:
            state = "installed"
        return PluginStatus(
            name,
            _distribution(entry) if entry else record.distribution,
            version,
            state,
            reason,
            record.summary or _metadata_summary(entry),
            self._provided(name) or record.provides,
            record.needs,
        )

    def _provided(self, plugin: str) -> dict[str, dict[str, str]]:
        provided: dict[str, dict[str, str]] = {}
        for (kind, name), offer in self._offers.items():
            if offer.plugin == plugin:
                provided.setdefault(kind, {})[name] = offer.extension.summary
        return provided


def _log() -> logging.Logger:
    import logging

    return logging.getLogger("ovforge.plugins")


def _module_name(requirement: str) -> str:
    """Return the module that a distribution is taken to have: "torch" of "torch>=2"."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].replace("-", "_").lower()


def _missing_module(error: BaseException | None) -> str | None:
    """Return the top module whose absence caused `error`, or None."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0].lower()
        error = error.__cause__
    return None


def _distribution(entry: EntryPoint) -> str:
    return (entry.dist.name if entry.dist else "") or "unknown distribution"  # damaged metadata hold no name


def _version(entry: EntryPoint) -> str:
    return (entry.dist.version if entry.dist else "") or "0"


def _metadata_summary(entry: EntryPoint | None) -> str:
    """Return the summary that a distribution gives of itself, on one line; needs no import of the plugin."""
    if entry is None or entry.dist is None or "Summary" not in entry.dist.metadata:
        return ""
    summary = str(entry.dist.metadata["Summary"])
    return "".join(character if character.isprintable() else " " for character in summary)
