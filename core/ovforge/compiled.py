"""Compiling a bundle's roles: side by side, and from the cache where the same was compiled before."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.errors import CacheError, DeviceError, ModelError, OvforgeError
from ovforge.runtime import core, enable_tokenizers, openvino_version

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.bundle import ModelBundle
    from ovforge.cache import Cache
    from ovforge.stages import DevicePlan

__all__ = ["CompiledBundle", "CompiledRole", "compile_ingredients", "compile_model"]

_BLOB = "compiled.blob"


@dataclass(frozen=True, slots=True)
class CompiledRole:
    """One compiled model, how long it took (seconds), whether it came out of the cache, and when it was ready.

    `finished` is a reading of time.perf_counter().
    """

    model: ov.CompiledModel
    precision: str
    seconds: float
    cached: bool
    finished: float


class CompiledBundle:
    """Compiled models by role, with the bundle's configs and assets.

    Compilation goes on in the background: asking for a role waits for that role alone.
    """

    def __init__(self, bundle: ModelBundle, plan: DevicePlan, roles: Iterable[str], cache: Cache | None) -> None:
        self.source = bundle
        self.configs = bundle.configs
        self.index = bundle.index
        self.assets = bundle.assets
        # Three at a time: the largest role keeps most cores busy, the small ones fit in its gaps.
        pool = ThreadPoolExecutor(max_workers=3, thread_name_prefix="ovforge-compile")
        self._futures: dict[str, Future[CompiledRole]] = {
            role: pool.submit(compile_model, bundle, role, plan, cache)
            for role in sorted(roles, key=_largest_first(bundle))
        }
        pool.shutdown(wait=False)

    def replace(self, role: str, wrap: Callable[[ov.CompiledModel], Any]) -> None:
        """Give users of `role` what `wrap` makes of its compiled model."""
        compiled = self.compiled(role)
        wrapped: Future[CompiledRole] = Future()
        wrapped.set_result(dataclasses.replace(compiled, model=wrap(compiled.model)))
        self._futures[role] = wrapped

    def __contains__(self, role: str) -> bool:
        return role in self._futures

    def __iter__(self) -> Iterator[str]:
        return iter(self._futures)

    def __getitem__(self, role: str) -> ov.CompiledModel:
        return self.compiled(role).model

    def compiled(self, role: str) -> CompiledRole:
        """Return a role, waiting for its compilation. Raises ModelError where the bundle has no such role."""
        if role not in self._futures:
            raise ModelError(f"the pipeline has no {role!r}", hint=f"It has: {', '.join(self._futures)}.")
        return self._futures[role].result()

    def scheduler_config(self) -> dict[str, Any]:
        """Return the model's scheduler_config.json, or {}."""
        return self.source.scheduler_config()


def _largest_first(bundle: ModelBundle) -> Any:
    def size(role: str) -> int:
        path = bundle.location.get(role)
        weights = path.with_suffix(".bin") if path else None
        return -weights.stat().st_size if weights and weights.is_file() else 0

    return size


def compile_ingredients(role: str, identity: str, plan: DevicePlan, properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a compiled model depends on, as the cache's key."""
    return {
        "stage": "compile",
        "input": identity,
        "role": role,
        "device": plan.device,
        "device_name": plan.full_name,
        "properties": {key: str(value) for key, value in sorted(properties.items())},
        "openvino": openvino_version(),
    }


def placement(role: str, plan: DevicePlan) -> tuple[str, Mapping[str, Any]]:
    """Return (device, properties) for a role: tokenizers work on strings, which only the CPU has."""
    if role.startswith(("tokenizer", "detokenizer")):
        return "CPU", {}
    return plan.device, plan.properties


def compile_model(bundle: ModelBundle, role: str, plan: DevicePlan, cache: Cache | None) -> CompiledRole:
    """Compile one role, or read it from the cache; what was compiled is put there."""
    start = time.perf_counter()
    device, properties = placement(role, plan)
    if role.startswith(("tokenizer", "detokenizer")):
        enable_tokenizers()
    identity = bundle.identity.get(role)
    if cache is None or identity is None or not plan.can_export:
        return _done(_compile(bundle, role, device, properties), start, cached=False)
    ingredients = compile_ingredients(role, identity, plan, properties)
    if (entry := cache.get(ingredients)) is not None:
        try:
            return _done(_import(entry.path / _BLOB, device, properties), start, cached=True)
        except RuntimeError as error:
            warnings.warn(f"compiled {role} in the cache cannot be read and is made again: {error}", stacklevel=2)
            cache.remove(entry.key)
    model = _compile(bundle, role, device, properties)
    try:
        cache.put(ingredients, lambda folder: _export(model, folder / _BLOB), label=f"{role} on {device}")
    except CacheError as error:
        warnings.warn(f"compiled {role} was not stored: {error}", stacklevel=2)
    return _done(model, start, cached=False)


def _done(model: ov.CompiledModel, start: float, *, cached: bool) -> CompiledRole:
    now = time.perf_counter()
    return CompiledRole(model, _precision(model), now - start, cached, now)


def _compile(bundle: ModelBundle, role: str, device: str, properties: Mapping[str, Any]) -> ov.CompiledModel:
    try:
        return core().compile_model(bundle.models[role], device, dict(properties))
    except OvforgeError:
        raise
    except RuntimeError as error:
        raise DeviceError(
            f"{role} does not compile: {error}",
            where=device,
            hint="Try device.use = 'cpu' and precision = 'f32' to tell the model from the device.",
        ) from error


def _export(model: ov.CompiledModel, path: Path) -> None:
    path.write_bytes(model.export_model().getbuffer())


def _import(path: Path, device: str, properties: Mapping[str, Any]) -> ov.CompiledModel:
    """Read a compiled model; its weights stay in the file, which the tensor keeps mapped for as long as it is used."""
    import openvino as ov

    return core().import_model(ov.tensor_from_file(path), device, dict(properties))


def _precision(model: ov.CompiledModel) -> str:
    """Return the floating-point type that the device really computes in: "f32", "bf16", "f16"."""
    try:
        return str(model.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    except (RuntimeError, AttributeError):
        return "unknown"
