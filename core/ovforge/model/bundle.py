"""ModelBundle: what passes from stage to stage. ov.Models by role, with their configs, assets and controls.

On disk it is the folder layout of optimum-intel and openvino-genai: `model_index.json`, then a folder a role with
`openvino_model.xml`, `openvino_model.bin` and `config.json`; `tokenizer/openvino_tokenizer.xml` beside the tokenizer's
own files; `scheduler/scheduler_config.json`.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError
from ovforge.model.formats import read_from_memory
from ovforge.model.reasons import OPENVINO_ERRORS, reading_error
from ovforge.model.validation import check_model_file
from ovforge.store.documents import parse_object
from ovforge.store.files import atomic_folder

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.model.sources import Protection, Source

__all__ = ["Control", "ModelBundle", "Places", "Roles", "is_tokenizer", "read_json", "read_model"]

ASSET_LIMIT = 64 * 2**20
"""Largest file, in bytes, that is kept beside the models: vocabularies and configs are smaller."""

Places = dict[str, dict[str, list[int]]]
"""Role -> id of a variable -> its shape, in which -1 is an open dimension."""

_ASSET_SUFFIXES = {".json", ".txt", ".model", ".jinja"}
_MODEL = "openvino_model"


class Roles(MutableMapping[str, "ov.Model"]):
    """Role -> ov.Model, each read or converted when first asked for.

    A lazy role is a function. `release` forgets a model that can be made again, so that a whole
    pipeline can be walked with one model in memory at a time.
    """

    def __init__(self) -> None:
        self._made: dict[str, ov.Model] = {}
        self._makers: dict[str, Callable[[], ov.Model] | None] = {}
        self._touched: set[str] = set()

    def watch(self) -> set[str]:
        """Return a set that collects, from now on, every role that is read, set or removed."""
        self._touched = set()
        return self._touched

    def wrap(self, wrapper: Callable[[str, Callable[[], ov.Model]], Callable[[], ov.Model]]) -> None:
        """Let lazy roles be made by what `wrapper` returns for a role and its function."""
        for role, make in self._makers.items():
            if make is not None:
                self._makers[role] = wrapper(role, make)

    def is_lazy(self, role: str) -> bool:
        """Say whether a role's model can be made again."""
        return self._makers[role] is not None

    def lazy(self, role: str, make: Callable[[], ov.Model]) -> None:
        """Set `role` to what `make` returns when it is first needed."""
        self._touched.add(_role(role))
        self._makers[role] = make
        self._made.pop(role, None)

    def is_made(self, role: str) -> bool:
        """Say whether a role's model is in memory."""
        return role in self._made

    def take(self, role: str, other: Roles, name: str) -> None:
        """Set `role` to another's role `name`, made when first needed, and by itself where it is lazy there."""
        if (make := other._makers[name]) is None:
            self[role] = other[name]
        else:
            self.lazy(role, make)

    def copy(self) -> Roles:
        """Return the same roles as models of their own: changing one leaves ours as it is."""
        copied = Roles()
        for role, make in self._makers.items():
            copied.lazy(role, make or self._made[role].clone)
        return copied

    def release(self, role: str) -> None:
        """Forget the model of a lazy role; the next use makes it again."""
        if self._makers[role] is not None:
            self._made.pop(role, None)

    def __getitem__(self, role: str) -> ov.Model:
        if role not in self._made:
            make = self._makers[role]
            if make is None:
                raise KeyError(role)
            self._made[role] = make()
        self._touched.add(role)
        return self._made[role]

    def __setitem__(self, role: str, model: ov.Model) -> None:
        import openvino as ov

        if not isinstance(model, ov.Model):
            raise TypeError(f"the role {role!r} is set to something of type {type(model).__name__}, not ov.Model")
        self._touched.add(_role(role))
        self._makers[role] = None
        self._made[role] = model

    def __delitem__(self, role: str) -> None:
        self._touched.add(role)
        del self._makers[role]
        self._made.pop(role, None)

    def __contains__(self, role: object) -> bool:
        return role in self._makers  # Mapping's own way would make the model, to see whether it is there

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _role(name: object) -> str:
    """Return the name of a role, which names a folder too. Raises ValueError if it cannot."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ValueError(f"{name!r} is not a valid name of a role")
    return name


@dataclass(frozen=True, slots=True)
class Control:
    """Something adjustable after compilation: a named, typed value that a transform left in the models.

    `role` holds the model, `variable` the id of its OpenVINO variable (state); `default` its first value.
    """

    role: str
    variable: str
    shape: tuple[int, ...]
    default: float = 0.0
    summary: str = ""


@dataclass
class ModelBundle:
    """Models by role, and what goes with them.

    `configs` holds a role's config.json, `index` the model_index.json, `assets` every other small file by
    relative path (tokenizer/vocab.json, scheduler/scheduler_config.json). `identity` maps a role to a digest of
    its content, if that is known; the cache works on it.
    """

    models: Roles = field(default_factory=Roles)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    assets: dict[str, bytes] = field(default_factory=dict)
    controls: dict[str, Control] = field(default_factory=dict)
    adapters: dict[str, Places] = field(default_factory=dict)
    """Name of an adapter that is switched while running -> the variables that it fills, which a transform put there."""
    identity: dict[str, str] = field(default_factory=dict)
    location: dict[str, Path] = field(default_factory=dict)
    """Role -> its .xml, if the model lies in a plain file."""
    entries: dict[str, str] = field(default_factory=dict)
    """Role -> key of the cache's entry that the model is read from."""
    loader: str = ""
    """Name of the loader that opened it."""
    protection: Protection | None = None
    """What keeps all that is made from it unreadable on disk, if it comes from an encrypted source."""

    def __post_init__(self) -> None:
        if not isinstance(self.models, Roles):  # ModelBundle({"model": model})
            models, self.models = self.models, Roles()
            self.models.update(models)

    @classmethod
    def open(cls, source: Source) -> ModelBundle:
        """Open a folder of the layout above, or a single IR file (role "model"); models are read when needed."""
        bundle = cls(protection=source.protection)
        for path, size in source.files().items():
            file = PurePosixPath(path)
            if file.suffix == ".xml":
                bundle._add_model(source, file)
            elif file.name == "config.json" and len(file.parts) == 2:
                bundle.configs[file.parts[0]] = read_json(source, path)
            elif path == "model_index.json":
                bundle.index = read_json(source, path)
            elif file.suffix in _ASSET_SUFFIXES:
                if size > ASSET_LIMIT:
                    raise ModelError(f"{path} has {size} bytes, more than {ASSET_LIMIT}", where=source.name)
                bundle.assets[path] = source.read(path)
        return bundle

    def _add_model(self, source: Source, file: PurePosixPath) -> None:
        models = [path for path in source.files() if path.endswith(".xml")]
        role = "model" if models == [file.name] else role_of(file)
        if role in self.models:
            raise ModelError(f"two models for the role {role!r}, the second is {file}", where=source.name)
        weights = file.with_suffix(".bin").as_posix()
        self.models.lazy(role, lambda: read_model(source, file.as_posix()))
        parts = [source.digest(path) for path in (file.as_posix(), weights) if path in source.files()]
        self.identity[role] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        if local := source.local(file.as_posix()):
            self.location[role] = local

    def put(
        self,
        role: str,
        model: ov.Model | Callable[[], ov.Model],
        *,
        config: Mapping[str, Any] | None = None,
        identity: str | None = None,
        location: Path | None = None,
        entry: str | None = None,
    ) -> None:
        """Set a role's model, or a function that makes it when it is first needed.

        What was known of the role before is forgotten, but for its config, which stays unless another is given.
        """
        if callable(model):
            self.models.lazy(role, model)
        else:
            self.models[role] = model
        if config is not None:
            self.configs[role] = dict(config)
        facts: tuple[tuple[dict[str, Any], Any], ...] = (
            (self.identity, identity),
            (self.location, location),
            (self.entries, entry),
        )
        for known, value in facts:
            known.pop(role, None)
            if value is not None:
                known[role] = value

    def take(self, role: str, other: ModelBundle, name: str) -> None:
        """Set a role to another bundle's role `name`, with all that is known of it; a lazy one stays lazy."""
        self.models.take(role, other.models, name)
        facts: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (self.configs, other.configs),
            (self.identity, other.identity),
            (self.location, other.location),
            (self.entries, other.entries),
        )
        for ours, theirs in facts:
            ours.pop(role, None)
            if name in theirs:
                ours[role] = theirs[name]

    def changed(self, role: str) -> None:
        """Note that a role's model was changed in place: it cannot be made again by what made it before."""
        self.put(role, self.models[role])

    def forget(self, role: str) -> None:
        """Forget what is known of a role's content: another model was put there."""
        for known in (self.identity, self.location, self.entries):
            known.pop(role, None)

    def copy(self) -> ModelBundle:
        """Return a bundle of its own with the same content; lazy models stay so, and are made for it alone."""
        shared = ("models", "protection")
        parts = {part.name: copy.deepcopy(getattr(self, part.name)) for part in fields(self) if part.name not in shared}
        return ModelBundle(models=self.models.copy(), protection=self.protection, **parts)

    def scheduler_config(self) -> dict[str, Any]:
        """Return scheduler/scheduler_config.json, or {} if the model has none.

        If model_index.json names another class than it does, the index counts, as for diffusers.
        """
        data = self.assets.get("scheduler/scheduler_config.json")
        config = _parse_object(data, "scheduler/scheduler_config.json") if data else {}
        named = self.index.get("scheduler")
        if config and isinstance(named, list) and len(named) == 2 and isinstance(named[1], str):
            config["_class_name"] = named[1]
        return config

    def require(self, *roles: str, advice: str = "") -> None:
        """Raise ModelError, with advice on what to do, if a role is missing."""
        if missing := [role for role in roles if role not in self.models]:
            raise ModelError(
                f"the model has no {', '.join(missing)}",
                hint=f"It has: {', '.join(sorted(self.models)) or 'no model at all'}. {advice}".rstrip(),
            )

    def digest(self) -> str | None:
        """Return one digest over all content; None if a role's content is not known."""
        if any(role not in self.identity for role in self.models):
            return None
        total = hashlib.sha256()
        total.update(json.dumps([self.identity, self.configs, self.index], sort_keys=True).encode())
        for path in sorted(self.assets):
            total.update(f"{path}\0{hashlib.sha256(self.assets[path]).hexdigest()}\n".encode())
        return total.hexdigest()

    def save(self, folder: Path, *, replace: bool = False) -> None:
        """Write the bundle as a folder that appears whole or not at all.

        Models are written one at a time; lazy ones are released again. Raises ModelError for an encrypted one.
        """
        if self.protection is not None:
            raise ModelError(
                "the model is encrypted, and would be written plain",
                where=str(folder),
                hint="Run `ovforge decrypt` first if that is what you want; then convert, and encrypt the result.",
            )
        with atomic_folder(folder, replace=replace) as temporary:
            self.write_into(temporary)

    def write_into(self, folder: Path) -> None:
        """Write every part into an existing folder."""
        for path, data in self.small_files().items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        for role in self.models:
            self.write_model(role, folder)
            self.models.release(role)

    def small_files(self) -> dict[str, bytes]:
        """Return path -> content of every file but the models: the index, configs and assets."""
        files = {"model_index.json": _json_bytes(self.index)} if self.index else {}
        files |= {f"{role}/config.json": _json_bytes(config) for role, config in self.configs.items()}
        return files | self.assets

    def write_model(self, role: str, folder: Path) -> Path:
        """Write one role's IR below `folder`, its weights' types as they are; return the .xml."""
        import openvino as ov

        path = folder / path_of(role)
        path.parent.mkdir(parents=True, exist_ok=True)
        model = self.models[role]
        try:
            ov.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:
            # OpenVINO tells of a full disk as a failed stream; callers know it as an OSError.
            if "iostream" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
        return path


def is_tokenizer(role: str) -> bool:
    """Say whether a role's model works on text: it runs on the CPU alone, and is never quantized."""
    return role.startswith(("tokenizer", "detokenizer"))


def role_of(file: PurePosixPath) -> str:
    """Return the role that an .xml's place in the layout gives it.

    `unet/openvino_model.xml` -> unet; `tokenizer_2/openvino_tokenizer.xml` -> tokenizer_2;
    `tokenizer/openvino_detokenizer.xml` -> detokenizer; at the top, `openvino_model.xml` -> model,
    `openvino_X_model.xml` -> X, `x.xml` -> x.
    """
    folder = file.parent.name
    if file.stem == "openvino_detokenizer":
        return folder.replace("tokenizer", "detokenizer") or "detokenizer"
    if file.stem in (_MODEL, "openvino_tokenizer") and folder:
        return folder
    return file.stem.removeprefix("openvino_").removesuffix("_model")


def path_of(role: str) -> PurePosixPath:
    """Return where a role's .xml lies in the layout."""
    if role.startswith("detokenizer"):
        return PurePosixPath(role.replace("detokenizer", "tokenizer"), "openvino_detokenizer.xml")
    if is_tokenizer(role):
        return PurePosixPath(role, "openvino_tokenizer.xml")
    return PurePosixPath(role, f"{_MODEL}.xml")


def read_model(source: Source, path: str) -> ov.Model:
    """Read a model file of any format that OpenVINO reads. Raises ModelError with the reason in plain words.

    Plain files are mapped into memory by OpenVINO; others (encrypted) are read from memory. `path` may be "." for
    TensorFlow's SavedModel.
    """
    from ovforge.model.runtime import core

    if hasattr(source, "check"):  # a cache's entry, whose content may be damaged
        source.check(path)
    check_model_file(source, path)
    try:
        local = source.local(path)
        return core().read_model(local) if local is not None else read_from_memory(source, PurePosixPath(path))
    except OPENVINO_ERRORS as error:
        raise reading_error(error, path, source.name) from error


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def read_json(source: Source, path: str) -> dict[str, Any]:
    """Return the JSON object in a source's file. Raises ModelError if it holds none."""
    return _parse_object(source.read(path, ASSET_LIMIT + 1), f"{source.name}: {path}")


def _parse_object(data: bytes, where: str) -> dict[str, Any]:
    # Configs of transformers may hold Infinity.
    return parse_object(data, where, size=ASSET_LIMIT, finite=False)
