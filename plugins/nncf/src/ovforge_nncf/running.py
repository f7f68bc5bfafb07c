"""What all quantizers of this plugin share: roles, data, memory, silence, and NNCF's errors in plain words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.contracts import Calibration
from ovforge.errors import ConfigError, ModelError, OvforgeError, did_you_mean
from ovforge.model import ModelBundle, core

if TYPE_CHECKING:
    import openvino as ov
    from numpy.typing import NDArray

    from ovforge_nncf.scope import IgnoredScope

__all__ = [
    "available_memory",
    "check_memory",
    "chosen_roles",
    "dataset",
    "has_fast_int8",
    "in_plain_words",
    "models_of",
    "quiet",
    "speed_note",
]

STEPPED = ("unet", "transformer", "controlnet")
"""Roles that run at every step of sampling: what is gained elsewhere is little, and costs pictures more."""

GIB = 2**30


def chosen_roles(wanted: Sequence[str], bundle: ModelBundle, where: str, *, stepped: bool) -> list[str]:
    """Return the roles to quantize: those wanted, else all, or with `stepped` the ones of each step if there are some.

    A `*` in what is wanted stands for anything, as in "text_encoder*". Raises ConfigError if no role fits.
    """
    own = [role for role in bundle.models if not role.startswith(("tokenizer", "detokenizer"))]
    found: list[str] = []
    for pattern in wanted:
        fitting = [role for role in own if role == pattern or ("*" in pattern and fnmatchcase(role, pattern))]
        if not fitting:
            raise ConfigError(
                f"the model has no {pattern!r} to quantize.{did_you_mean(pattern, own)}",
                where=f"{where}.roles",
                hint=f"It has: {', '.join(own)}.",
            )
        found += fitting
    steps = [role for role in own if role in STEPPED] if stepped else []
    return list(dict.fromkeys(found)) or steps or own


def models_of(
    roles: Sequence[str],
    bundle: ModelBundle,
    scope: IgnoredScope,
    keep: Mapping[str, Collection[str]],
    where: str,
) -> dict[str, ov.Model]:
    """Return role -> model, with the ignored scope and what is to be kept checked. Raises ConfigError."""
    models = {role: bundle.models[role] for role in roles}
    scope.check_in(models, f"{where}.ignored_scope")
    for role, names in keep.items():
        known = {op.get_friendly_name() for op in models[role].get_ops()} if role in models else set(names)
        if missing := sorted(set(names) - known):
            raise ConfigError(
                f"{role} has no operation {missing[0]!r} to keep.{did_you_mean(missing[0], known)}", where=where
            )
    return models


def dataset(calibration: Calibration, role: str, count: int, where: str) -> tuple[Any, int]:
    """Return recorded inputs of a role as nncf.Dataset, and how many. Raises ModelError if there are none."""
    import nncf

    records: Sequence[Mapping[str, NDArray[Any]]] = calibration.inputs(role, count)
    if not len(records):
        raise ModelError(
            f"no inputs of {role!r} were recorded",
            where=where,
            hint="Give the pipeline more to run in [calibration], or leave the role out of `roles`.",
        )
    return nncf.Dataset(records, lambda record: dict(record)), len(records)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep nncf's tables and bars off the screen: the report says what was done."""
    import nncf

    logger = nncf.common.logging.logger.nncf_logger
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def in_plain_words(where: str, role: str) -> Iterator[None]:
    """Turn what NNCF and the runtime raise into our errors that name the stage and the role."""
    import nncf

    place = f"{where}, role {role}"
    try:
        with quiet():
            yield
    except OvforgeError:
        raise
    except MemoryError as error:
        raise ModelError("memory ran out", where=place, hint=_SAVING) from error
    except (nncf.errors.ParameterNotSupportedError, nncf.errors.ValidationError, NotImplementedError) as error:
        raise ConfigError(f"nncf refuses these options: {_line(error)}", where=place) from error
    except Exception as error:
        if "bad_alloc" in str(error):
            raise ModelError("memory ran out", where=place, hint=_SAVING) from error
        raise ModelError(
            f"nncf cannot quantize it: {_line(error)}",
            where=place,
            hint=_ONE_SHAPE if "cannot reshape" in str(error) else None,
        ) from error


_SAVING = (
    "End other programs, or take nncf-hybrid, which needs about half, or nncf-weights, which needs little without "
    "data. Records take little; a lower subset_size, or [calibration] spill = true, makes it less."
)


_ONE_SHAPE = "Records may differ in shape, which fast bias correction does not take here: set bias_correction = 'off'."


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def available_memory() -> int | None:
    """Return the bytes that this process may still take, or None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number: no limit
            found = min(found, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(found, 0)


def check_memory(need: int, where: str, role: str, hint: str = _SAVING) -> None:
    """Raise ModelError if `need`, bytes, is more than there is."""
    free = available_memory()
    if free is not None and need > free:
        raise ModelError(
            f"this will take about {need / GIB:.1f} GiB of memory, and {free / GIB:.1f} GiB are free",
            where=f"{where}, role {role}",
            hint=hint,
        )


def has_fast_int8() -> bool | None:
    """Say whether this CPU multiplies 8-bit integers faster than floats; None if the system does not say.

    The runtime lists INT8 as a capability of every CPU, since it computes it on all: only the processor's flags tell.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    flags = {flag for line in text.splitlines() if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp"}) if flags else None


def speed_note(fast: bool | None) -> str:
    """Return what INT8 brings on this CPU, for reports."""
    name = str(core().get_property("CPU", "FULL_DEVICE_NAME")).strip()
    if fast is None:
        return f"INT8 is smaller; it is faster only if the CPU has VNNI or AMX, which {name} does not say"
    if fast:
        return f"INT8 is smaller, and {name} multiplies it faster than floats"
    return f"{name} has no VNNI or AMX: here INT8 is smaller, and not faster"
