"""From sources to a bundle: loaded, or converted once and found in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ovforge.contracts.extensions import LoaderExtension
from ovforge.contracts.stages import Progress
from ovforge.errors import ModelError
from ovforge.model import memory
from ovforge.model.bundle import ModelBundle, path_of
from ovforge.model.sources import FileSource, Protection
from ovforge.run.ingredients import load_ingredients
from ovforge.run.recipe import Origin, Recipe
from ovforge.store.cache import Cache, Entry, key_of

__all__ = ["EntrySource", "bundle_of", "check_plain", "open_bundle", "open_origin", "put_part", "write_role"]


def open_bundle(recipe: Recipe, cache: Cache | None, progress: Callable[[Progress], None]) -> ModelBundle:
    """Load, or find the conversion in the cache; then put the parts that come from elsewhere in their places."""
    bundle = open_origin(recipe.origin, cache, progress)
    bundle.protection = recipe.protection
    for role, origin in recipe.parts.items():
        put_part(bundle, role, open_origin(origin, cache, progress), origin.source.name)
    return bundle


def open_origin(origin: Origin, cache: Cache | None, progress: Callable[[Progress], None]) -> ModelBundle:
    """Load one source, or find its conversion in the cache."""
    loader = origin.loader.extension
    assert isinstance(loader, LoaderExtension)

    def make() -> ModelBundle:
        progress(Progress("load", 0, 1, f"{loader.name}: {origin.source.name}"))
        bundle: ModelBundle = loader.create(origin.options).load(origin.source)
        return bundle

    check_plain(origin)
    sealed = origin.source.protection
    if cache is None or not loader.converts or (sealed and not memory.AVAILABLE):
        return make()
    ingredients = load_ingredients(origin, cache)
    key = key_of(ingredients)

    def write(folder: Path) -> None:
        bundle = make()
        bundle.protection = sealed
        _write_bundle(bundle, folder, key)

    entry, _ = cache.get_or_make(ingredients, write, label=f"{loader.name} {origin.source.name}")
    return bundle_of(entry, sealed)


def check_plain(origin: Origin) -> None:
    """Refuse to convert what is encrypted where a loader lays some of it out in files while it converts."""
    loader = origin.loader.extension
    if origin.source.protection and isinstance(loader, LoaderExtension) and loader.converts and not loader.in_memory:
        raise ModelError(
            f"the loader {loader.name!r} converts, and would leave parts of an encrypted model in plain files",
            where=origin.source.name,
            hint="Convert first (ovforge convert), then encrypt the result (ovforge encrypt).",
        )


def put_part(bundle: ModelBundle, role: str, part: ModelBundle, name: str) -> None:
    """Give `bundle` another model for `role`: the one of that role in `part`, or the only one that `part` has."""
    found = role if role in part.models else next(iter(part.models), None)
    if found is None or (found != role and len(part.models) > 1):
        raise ModelError(
            f"it has no {role!r}", where=f"load.parts.{role}: {name}", hint=f"It has: {', '.join(sorted(part.models))}."
        )
    bundle.models.take(role, part.models, found)
    for ours in (bundle.configs, bundle.identity, bundle.location):
        ours.pop(role, None)
    if found in part.configs:
        bundle.configs[role] = part.configs[found]
    if found in part.identity:
        bundle.identity[role] = part.identity[found]
    if found in part.location:
        bundle.location[role] = part.location[found]


def bundle_of(entry: Entry, sealed: Protection | None) -> ModelBundle:
    """Open an entry that holds a whole bundle; the manifest of a plain one already knows every file's digest."""
    return ModelBundle.open(sealed.open(entry.path, entry.key) if sealed else EntrySource(entry))


class EntrySource(FileSource):
    """A cache entry's files, whose digests its manifest holds."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry.path, f"cache entry {entry.key[:12]}")
        self._entry = entry

    def files(self) -> Mapping[str, int]:
        return {name: facts["size"] for name, facts in self._entry.files.items()}

    def digest(self, path: str) -> str:
        return str(self._entry.files[path]["sha256"])


def _write_bundle(bundle: ModelBundle, folder: Path, key: str) -> None:
    """Write a whole bundle for the cache, one model at a time; encrypted where the bundle is."""
    sealed = bundle.protection
    if sealed is None:
        bundle.write_into(folder)
        return
    for path, data in bundle.small_files().items():
        sealed.write(folder, path, data, key)
    for role in bundle.models:
        write_role(bundle, role, folder, key)
        bundle.models.release(role)


def write_role(bundle: ModelBundle, role: str, folder: Path, key: str) -> None:
    """Write a role's IR for the cache: encrypted where the bundle is, and then through memory alone."""
    if bundle.protection is None:
        bundle.write_model(role, folder)
        return
    xml = path_of(role)
    files = (xml.as_posix(), xml.with_suffix(".bin").as_posix())
    with memory.memory_folder("storing a model") as plain:
        for file in files:
            plain.place(file)
        bundle.write_model(role, plain.root)
        for file in files:
            with plain.content(file) as data:
                bundle.protection.write(folder, file, data, key)
