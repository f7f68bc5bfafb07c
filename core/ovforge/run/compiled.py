"""Compiling a bundle's roles: side by side, and from the cache where the same was compiled before."""

from __future__ import annotations

import contextlib
import functools
import io
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ovforge.contracts.stages import Progress, ignore_progress
from ovforge.errors import CacheError, DeviceError, InputError, ModelError
from ovforge.model.bundle import is_tokenizer
from ovforge.model.formats import tensor_of
from ovforge.model.reasons import OPENVINO_ERRORS, reason_of
from ovforge.model.regions import MappedFile
from ovforge.model.runtime import core, instruction_set, openvino_version
from ovforge.run.adapters import Adapters, Variables
from ovforge.run.requests import ObservedModel
from ovforge.store.cache import DamagedError
from ovforge.store.digests import fingerprint

if TYPE_CHECKING:
    import openvino as ov
    from typing_extensions import Buffer

    from ovforge.contracts.quantization import Observer
    from ovforge.contracts.stages import DevicePlan, Inference
    from ovforge.model.bundle import ModelBundle
    from ovforge.model.sources import Protection
    from ovforge.run.ahead import ReadAhead
    from ovforge.store.cache import Cache, Entry

__all__ = [
    "CompiledBundle",
    "CompiledRole",
    "Shapes",
    "can_store",
    "compile_dependencies",
    "compile_model",
    "read_compiled",
]

_BLOB = "compiled.blob"

_PROGRESS: ContextVar[Callable[[Progress], None]] = ContextVar("progress", default=ignore_progress)

Shapes = Mapping[str, Sequence[int]]
"""Input name -> shape, whole numbers only."""


@dataclass(frozen=True, slots=True)
class CompiledRole:
    """One compiled model, how long it took (seconds), whether it came out of the cache, and when it was ready.

    `finished` is a reading of time.perf_counter(). `model` is None if it was released. `note` says what people
    should know of it.
    """

    model: ov.CompiledModel | None
    precision: str
    seconds: float
    cached: bool
    finished: float
    note: str | None = None


class CompiledBundle:
    """Compiled models by role, with the bundle's configs and assets.

    Compilation goes on in the background: `start` begins it, asking for a role waits for that role alone. A role may be
    compiled for fixed shapes, which runs faster, beside the form that takes any. With `execute=False` nothing is
    compiled and `wanted` tells what would be, for plans. `observe` is told of each inference, but for tokenizers'.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        plan: DevicePlan,
        roles: Iterable[str],
        cache: Cache | None,
        *,
        execute: bool = True,
        observe: Observer | None = None,
        ahead: ReadAhead | None = None,
    ) -> None:
        self.source = bundle
        self.variables = Variables()
        self.adapters: Adapters | None = None
        self.configs = bundle.configs
        self.index = bundle.index
        self.assets = bundle.assets
        self.wanted: list[tuple[str, Shapes | None]] = []
        self._roles = list(roles)
        self._plan, self._cache, self._execute, self._ahead = plan, cache, execute, ahead
        # Three at a time: the largest role keeps most cores busy, the small ones fit in its gaps.
        self._pool = ThreadPoolExecutor(max_workers=3, thread_name_prefix="ovforge-compile")
        self._futures: dict[tuple[str, str], Future[CompiledRole]] = {}
        self._released: dict[tuple[str, str], CompiledRole] = {}
        self._used: set[tuple[str, str]] = set()
        self._observe, self._lock = observe, threading.Lock()
        self._eager = True
        self._adjustable = {control.role for control in bundle.controls.values()}
        self._adjustable |= {role for places in bundle.adapters.values() for role in places}

    def start(self, role: str, shapes: Shapes | None = None) -> None:
        """Begin to compile a role, for fixed `shapes` of its inputs by name, or for any. Returns at once.

        Raises ModelError if the pipeline has no such role.
        """
        if role not in self._roles:
            raise ModelError(f"the pipeline has no {role!r}", hint=f"It has: {', '.join(self._roles)}.")
        key = _variant(role, shapes)
        if key in self._futures or (not self._execute and (role, shapes) in self.wanted):
            return
        if (role, shapes) not in self.wanted:
            self.wanted.append((role, shapes))
        if self._execute:
            self._released.pop(key, None)
            self._futures[key] = self._pool.submit(
                compile_model, self.source, role, self._plan, self._cache, shapes, self._ahead
            )

    def stored(self) -> list[str]:
        """Return the keys in the cache of what was started so far, as far as it can be read without a key of theirs.

        Properties that are not text are written in another form there than the runtime takes.
        """
        keys = []
        for role, shapes in self.wanted:
            identity = self.source.identity.get(role)
            texts = all(isinstance(value, str) for value in placement(role, self._plan)[1].values())
            if texts and identity and not self.source.protection and can_store(self.source, role, self._plan):
                keys.append(fingerprint(compile_dependencies(role, identity, self._plan, shapes)))
        return keys

    def on_demand(self) -> None:
        """Compile nothing before it is asked for: for tasks that hold one role at a time in memory."""
        self._eager = False

    def start_rest(self) -> None:
        """Begin to compile every role that nobody has started, unless the task wants them on demand."""
        for role in self._roles if self._eager else ():
            if not any(role == started for started, _ in self.wanted):
                self.start(role)

    def compiled(self, role: str, shapes: Shapes | None = None) -> CompiledRole:
        """Return a role, started now if it was not, waiting for its compilation."""
        self.start(role, shapes)
        future = self._futures[_variant(role, shapes)]
        if not future.done():
            self._tell(role.replace("_", " "))
            future.result()
            self._tell()
        return future.result()

    @contextlib.contextmanager
    def telling(self, progress: Callable[[Progress], None]) -> Iterator[None]:
        """Tell `progress` of compilation that this thread waits for in the block."""
        token = _PROGRESS.set(progress)
        try:
            yield
        finally:
            _PROGRESS.reset(token)

    def _tell(self, role: str = "") -> None:
        done = sum(future.done() for future in self._futures.values())
        _PROGRESS.get()(Progress("compile", done, len(self._futures), role))

    def get(self, role: str, shapes: Shapes | None = None) -> ov.CompiledModel:
        """Return a role's compiled model, for fixed shapes or any."""
        model = self.compiled(role, shapes).model
        assert model is not None
        if (key := _variant(role, shapes)) not in self._used:  # those that were used before have packed their weights
            self._used.add(key)
            _forget_read()
        observe = self._observe if not is_tokenizer(role) else None
        if observe is None and role not in self._adjustable:
            return model
        observed: Any = ObservedModel(
            model,
            role,
            variables=self.variables if role in self._adjustable else None,
            observe=None if observe is None else self._reporter(role, observe),
            names=() if observe is None else _input_names(self.source.models[role], model),
        )
        return observed

    def _reporter(self, role: str, observe: Observer) -> Callable[[Inference], None]:
        def report(inference: Inference) -> None:
            with self._lock:
                observe(role, inference)

        return report

    def __getitem__(self, role: str) -> ov.CompiledModel:
        return self.get(role)

    def __contains__(self, role: object) -> bool:
        return role in self._roles

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def release(self, role: str) -> None:
        """Forget a role's compiled models and its graph, to free their memory; asking for it compiles it again.

        Memory is freed when the user's own requests are gone, too.
        """
        for key in [key for key in self._futures if key[0] == role]:
            self._released[key] = replace(self._futures.pop(key).result(), model=None)
        self.source.models.release(role)

    def all(self) -> list[tuple[str, CompiledRole]]:
        """Return (role, compiled) of everything that was started, in that order, released or not; waits."""
        return [(role, self._released.get(_variant(role, s)) or self.compiled(role, s)) for role, s in self.wanted]

    def warnings(self) -> list[str]:
        """Return what people should know of the models that are compiled by now."""
        done = [future.result() for future in self._futures.values() if future.done() and not future.exception()]
        return [role.note for role in (*done, *self._released.values()) if role.note]

    def scheduler_config(self) -> dict[str, Any]:
        """Return the model's scheduler_config.json, or {}."""
        return self.source.scheduler_config()


def _input_names(model: ov.Model, compiled: ov.CompiledModel) -> list[str]:
    """Return the names of a compiled model's inputs in the model that quantizers get: compiling may add others."""
    known = {name for port in model.inputs for name in port.names}
    return [min(port.names & known) for port in compiled.inputs]


def _variant(role: str, shapes: Shapes | None) -> tuple[str, str]:
    return role, str(sorted(shapes.items())) if shapes else ""


def compile_dependencies(
    role: str, identity: str, plan: DevicePlan, shapes: Shapes | None, protection: Protection | None = None
) -> dict[str, Any]:
    """Return what a compiled model depends on, as the cache's key, with the name of the key that encrypts it there."""
    properties = placement(role, plan)[1]
    return {
        "stage": "compile",
        "input": identity,
        "role": role,
        "device": plan.device,
        "device_name": plan.full_name,
        "properties": {key: str(value) for key, value in sorted(properties.items())},
        "shapes": {name: list(shape) for name, shape in sorted(shapes.items())} if shapes else None,
        "openvino": openvino_version(),
        "instructions": instruction_set(),
        **({"encrypted": protection.identity} if protection else {}),
    }


def placement(role: str, plan: DevicePlan) -> tuple[str, Mapping[str, Any]]:
    """Return (device, properties) for a role: tokenizers work on strings, which only the CPU has."""
    if is_tokenizer(role):
        return "CPU", {}
    return plan.device, plan.properties


def can_store(bundle: ModelBundle, role: str, plan: DevicePlan) -> bool:
    """Say whether a role's compiled model can be stored and read back.

    One with places for adapters cannot: OpenVINO 2026.4 writes the branches that it fused, and does not read them.
    """
    return plan.can_export and not any(role in places for places in bundle.adapters.values())


def compile_model(
    bundle: ModelBundle,
    role: str,
    plan: DevicePlan,
    cache: Cache | None,
    shapes: Shapes | None = None,
    ahead: ReadAhead | None = None,
) -> CompiledRole:
    """Compile one role, or read it from the cache; what was compiled is put there.

    A model that does not compile for fixed shapes is compiled for any: OpenVINO 2026.4 fails so at a UNet whose weights
    are compressed, if its middle is a picture of 1x1 in a batch of two.
    """
    try:
        return _compile_or_read(bundle, role, plan, cache, shapes, ahead)
    except DeviceError as error:
        if not shapes:
            raise
        name, shape = next(iter(shapes.items()))
        note = f"{role} is compiled for any size, which is slower; for {name} {list(shape)}, {error.what}"
        return replace(_compile_or_read(bundle, role, plan, cache, None, ahead), note=note)


def _compile_or_read(
    bundle: ModelBundle,
    role: str,
    plan: DevicePlan,
    cache: Cache | None,
    shapes: Shapes | None,
    ahead: ReadAhead | None,
) -> CompiledRole:
    start = time.perf_counter()
    device, properties = placement(role, plan)
    identity = bundle.identity.get(role)
    if cache is None or identity is None or not can_store(bundle, role, plan):
        return _done(_compile(bundle, role, device, properties, shapes), start, cached=False)
    sealed = bundle.protection
    dependencies = compile_dependencies(role, identity, plan, shapes, sealed)
    if (entry := cache.get(dependencies)) is not None:
        try:
            model = ahead.take(entry.key) if ahead else None
            if model is None:
                model = read_compiled(entry, sealed, device, properties)
            return _done(model, start, cached=True)
        except DamagedError as damage:
            cache.discard(entry, damage)
        except (*OPENVINO_ERRORS, ModelError) as error:
            reason = reason_of(error)
            warnings.warn(f"compiled {role} in the cache cannot be read and is made again: {reason}", stacklevel=2)
            cache.remove(entry.key)
    model = _compile(bundle, role, device, properties, shapes)
    try:
        key = fingerprint(dependencies)
        parents = [bundle.entries[role]] if role in bundle.entries else []
        cache.put(
            dependencies,
            lambda folder: _export(model, folder, sealed, key),
            label=f"{role} on {device}",
            parents=parents,
        )
    except CacheError as error:
        warnings.warn(f"compiled {role} was not stored: {error}", stacklevel=2)
    return _done(model, start, cached=False)


def _done(model: ov.CompiledModel, start: float, *, cached: bool) -> CompiledRole:
    now = time.perf_counter()
    return CompiledRole(model, _precision(model), now - start, cached, now)


def _compile(
    bundle: ModelBundle, role: str, device: str, properties: Mapping[str, Any], shapes: Shapes | None
) -> ov.CompiledModel:
    model = _reshaped(bundle.models[role], role, shapes) if shapes else bundle.models[role]
    try:
        return core().compile_model(model, device, dict(properties))
    except OPENVINO_ERRORS as error:
        raise DeviceError(
            f"{role} does not compile: {reason_of(error)}",
            where=device,
            hint="Try device.use = 'cpu' and precision = 'f32' to tell the model from the device.",
        ) from error


def _reshaped(model: ov.Model, role: str, shapes: Shapes) -> ov.Model:
    """Return a copy for fixed shapes. Raises InputError if the model was converted for others."""
    import openvino as ov

    copy = model.clone()
    for port in copy.inputs:
        for name in port.names & set(shapes):
            if not port.get_partial_shape().compatible(ov.PartialShape(list(shapes[name]))):
                raise InputError(
                    f"the model takes {name} of shape {port.get_partial_shape()}, not {list(shapes[name])}",
                    where=role,
                    hint="It was converted for a fixed size: use that size, or convert it with dynamic shapes.",
                )
    try:
        copy.reshape({name: ov.PartialShape(list(shape)) for name, shape in shapes.items()})
    except OPENVINO_ERRORS as error:
        said = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise InputError(
            f"the model cannot work with inputs of these shapes: {said}",
            where=role,
            hint=f"Take another size, or a model that fits the others. OpenVINO says: {reason_of(error)}",
        ) from error
    return copy


def _export(model: ov.CompiledModel, folder: Path, sealed: Protection | None, key: str) -> None:
    """Write a compiled model, encrypted whole: the runtime's own cache encryption leaves weights plain."""
    if sealed is not None:
        sealed.write(folder, _BLOB, model.export_model().getbuffer(), key)
        return
    with (folder / _BLOB).open("wb") as file:
        into = _Into(file)
        model.export_model(into)
        if into.failed is not None:
            raise into.failed


class _Into(io.BytesIO):
    """Hands on what is written to it, since the runtime writes to a BytesIO alone: the model is not held twice.

    The runtime goes on after an error, which is therefore kept in `failed`.
    """

    failed: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def write(self, data: Buffer, /) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed = self.failed or error
            raise

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_compiled(
    entry: Entry, sealed: Protection | None, device: str, properties: Mapping[str, Any]
) -> ov.CompiledModel:
    """Read a compiled model; its weights stay in the file, or in the tensor that it was decrypted into."""
    if sealed is not None:
        tensor = tensor_of(sealed.open(entry.path, entry.key), _BLOB)
        return core().import_model(tensor, device, dict(properties))
    path = entry.checked(_BLOB)
    status = path.stat()
    file, tensor = _mapped(path, status.st_ino, status.st_mtime_ns)
    model = core().import_model(tensor, device, dict(properties))
    if device == "CPU":
        if file not in _read_once:  # it may be read again after a release
            _read_once.append(file)
        _forget_read()
    return model


_read_once: list[MappedFile] = []
"""Mapped models of the CPU, which packs most weights anew when it reads a model, and others at the first inference."""


def _forget_read() -> None:
    """Take what was read of mapped models out of memory; what is used again comes back from the system's cache.

    A page that was written to would be lost: the CPU writes to none, which a test sees to.
    """
    for file in _read_once:
        file.forget()


@functools.cache
def _mapped(path: Path, inode: int, modified: int) -> tuple[MappedFile, ov.Tensor]:
    """Return a file as a tensor that is mapped, not read: a start takes a quarter of the time, and half the memory.

    It stays mapped for as long as the process runs, for requests may outlive their model. That costs no memory: pages
    that nobody uses go back to the system. What the device writes there, if anything, stays in this process.
    """
    import numpy as np
    import openvino as ov

    file = MappedFile(path)
    return file, ov.Tensor(np.frombuffer(file.bytes, np.uint8), shared_memory=True)


def _precision(model: ov.CompiledModel) -> str:
    """Return the floating-point type that the device really computes in: "f32", "bf16", "f16"."""
    try:
        return str(model.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    except (RuntimeError, AttributeError):
        return "unknown"
