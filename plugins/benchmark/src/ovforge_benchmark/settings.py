"""What the flags ask of a device, and what it says that it really does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import openvino as ov

from ovforge.errors import DeviceError, InputError, did_you_mean
from ovforge.store import parse_json

__all__ = ["api_of", "check_device", "dump", "precision_of", "ran", "wanted"]

_VIRTUAL = ("AUTO", "MULTI", "HETERO", "BATCH")
_HINTS = {
    "latency": "LATENCY", "throughput": "THROUGHPUT", "tput": "THROUGHPUT",
    "cumulative_throughput": "CUMULATIVE_THROUGHPUT", "ctput": "CUMULATIVE_THROUGHPUT",
}  # fmt: skip


def api_of(flags: Mapping[str, Any]) -> str:
    """Return "sync" or "async": as asked, else what suits the hint."""
    return str(flags["api_type"] or ("sync" if flags["perf_hint"] == "latency" else "async"))


def check_device(core: ov.Core, text: str) -> list[str]:
    """Return the devices that -d names, without what combines them; AUTO alone means all. Raises DeviceError."""
    kind, _, rest = text.partition(":")
    here = core.available_devices
    names = [name.lstrip("-").partition("(")[0] for name in rest.split(",") if name] if kind in _VIRTUAL else [text]
    if kind in _VIRTUAL and not names:
        return list(here)
    for name in names:
        if not any(known == name or known.partition(".")[0] == name for known in here):
            raise DeviceError(
                f"not on this machine, or its driver is missing.{did_you_mean(name, [*here, *_VIRTUAL])}",
                where=f"-d {name}",
                hint=f"Here are: {', '.join(here) or 'none'}; they combine as AUTO, MULTI:A,B or HETERO:A,B.",
            )
    return names


def wanted(core: ov.Core, flags: Mapping[str, Any], api: str) -> tuple[dict[str, Any], list[str]]:
    """Return the properties to compile with, and remarks on what was chosen for the user."""
    device = flags["target_device"].partition(":")[0]
    devices = check_device(core, flags["target_device"])
    notes: list[str] = []
    properties = _loaded(flags["load_config"], device)
    tuned = [f"-{name}" for name, key in (("nstreams", "number_streams"), ("nthreads", "number_threads"),
             ("pin", "infer_threads_pinning")) if flags[key] is not None]  # fmt: skip
    hint = flags["perf_hint"]
    if tuned and hint not in (None, "none"):
        raise InputError(
            f"{', '.join(tuned)} are settings of one's own, and -hint {hint} leaves them to the device",
            where="-hint", hint="Set -hint none, or leave them out.",
        )  # fmt: skip
    if hint is None and tuned:
        notes.append(f"-hint none, since {', '.join(tuned)} is given")
    elif hint is None and "PERFORMANCE_HINT" not in properties:
        properties["PERFORMANCE_HINT"] = "LATENCY" if api == "sync" else "THROUGHPUT"
        notes.append(f"-hint was not given: {properties['PERFORMANCE_HINT'].lower()}, as -api {api} suggests")
    elif hint is not None and hint != "none":
        properties["PERFORMANCE_HINT"] = _HINTS[hint]
    if properties.get("PERFORMANCE_HINT") in _UNSET:  # so a config says that there is to be none
        properties.pop("PERFORMANCE_HINT", None)
    if flags["number_infer_requests"]:
        properties["PERFORMANCE_HINT_NUM_REQUESTS"] = str(flags["number_infer_requests"])
    if flags["perf_counts"] or flags["perf_counts_sort"] or flags["exec_graph_path"] or (
        flags["report_type"] in ("average_counters", "detailed_counters")
    ):  # fmt: skip
        properties["PERF_COUNT"] = True
    for flag, key, name in (
        ("-nstreams", "NUM_STREAMS", "number_streams"),
        ("-infer_precision", "INFERENCE_PRECISION_HINT", "infer_precision"),
    ):
        for where, value in _by_device(flags[name], devices, flag).items():
            _put(core, properties, device, where, key, value, flag)
    if flags["number_threads"]:
        where = device if device not in _VIRTUAL or device == "AUTO" else "CPU"
        _put(core, properties, device, where, "INFERENCE_NUM_THREADS", str(flags["number_threads"]), "-nthreads")
    if flags["infer_threads_pinning"]:
        where = device if device not in _VIRTUAL or device == "AUTO" else "CPU"
        _put(core, properties, device, where, "ENABLE_CPU_PINNING", flags["infer_threads_pinning"] == "YES", "-pin")
    if flags["batch_size"] and device in ("AUTO", "MULTI", "GPU", "BATCH"):
        properties["ALLOW_AUTO_BATCHING"] = False
    if flags["cache_dir"]:
        properties["CACHE_DIR"] = flags["cache_dir"]
    if flags["path_to_cldnn_config"]:
        if not any(name.startswith("GPU") for name in devices):
            raise InputError("is for GPUs", where="-c", hint="Take it out, or add -d GPU.")
        core.set_property("GPU", {"CONFIG_FILE": flags["path_to_cldnn_config"]})
    return properties, notes


def _put(core: ov.Core, properties: dict[str, Any], device: str, where: str, key: str, value: Any, flag: str) -> None:
    """Set a property of the device, or of one that it combines."""
    if where != device and device in _VIRTUAL:
        properties.setdefault("DEVICE_PROPERTIES", {}).setdefault(where, {})[key] = value
        return
    supported = core.get_property(device, "SUPPORTED_PROPERTIES")
    if key not in supported:
        raise DeviceError(f"the device has no {key}", where=f"{flag} on {device}", hint="Take it out.")
    properties[key] = value


def _by_device(text: str | None, devices: list[str], flag: str) -> dict[str, str]:
    """Read VALUE, or DEVICE:VALUE,DEVICE:VALUE."""
    found: dict[str, str] = {}
    for part in (text or "").split(",") if text else ():
        name, colon, value = part.rpartition(":")
        if colon and name not in devices:
            raise InputError(f"{name!r} is not among {', '.join(devices)}", where=flag)
        found |= {name: value} if colon else dict.fromkeys(devices, value)
    return found


def _loaded(path: str | None, device: str) -> dict[str, Any]:
    """Return the device's part of -load_config."""
    if path is None:
        return {}
    try:
        value = parse_json(Path(path).read_bytes(), f"-load_config {path}", error=InputError)
    except FileNotFoundError as error:
        raise InputError("no such file", where=f"-load_config {path}") from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=f"-load_config {path}") from error
    if not isinstance(value, dict) or not all(isinstance(part, dict) for part in value.values()):
        raise InputError("expected devices, each with its properties", where=f"-load_config {path}")
    if value and device not in value:
        raise InputError(f"has nothing for {device}", where=f"-load_config {path}", hint=f"It has: {', '.join(value)}.")
    where = f"-load_config {path}: {device}"
    properties = {key: _read(one, f"{where}.{key}") for key, one in value.get(device, {}).items()}
    return {key: one for key, one in properties.items() if key == "PERFORMANCE_HINT" or one not in _UNSET}


_UNSET: tuple[Any, ...] = ("", None, {})


def _read(value: Any, where: str) -> Any:
    """Return a value of a config as OpenVINO takes it; what is empty is not set.

    Properties of devices stand as an object, or as text without quotation marks: "{CPU:{NUM_STREAMS:2}}".
    """
    if isinstance(value, str) and value.startswith("{"):
        value = _read_braces(value, where)
    if isinstance(value, dict):
        parts = {str(key): _read(one, f"{where}.{key}") for key, one in value.items()}
        return {key: one for key, one in parts.items() if one not in _UNSET}
    if isinstance(value, list):
        raise InputError("is a list, and properties are single values", where=where)
    return {"YES": True, "NO": False}.get(value, value)


def _read_braces(text: str, where: str) -> dict[str, Any]:
    """Return the properties in "{NAME:VALUE,DEVICE:{NAME:VALUE}}", as benchmark_app writes them."""
    tokens = re.findall(r"[{}:,]|[^{}:,]+", text)

    def group(place: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        while place < len(tokens) and tokens[place] != "}":
            if tokens[place] == ",":
                place += 1
                continue
            if tokens[place].isspace():
                place += 1
                continue
            name, colon, rest = tokens[place : place + 1], tokens[place + 1 : place + 2], tokens[place + 2 : place + 3]
            if rest and rest[0].isspace() and tokens[place + 3 : place + 4] == ["{"]:
                rest, place = ["{"], place + 1
            if colon != [":"] or not rest or rest[0] in "}:,":
                raise InputError(f"{text!r} cannot be read", where=where, hint="Write {CPU:{NUM_STREAMS:2}}.")
            inner, place = group(place + 3) if rest[0] == "{" else (_bare(rest[0]), place + 3)
            found[_bare(name[0])] = inner
        return found, place + 1

    if text.count("{") > 64:
        raise InputError("its braces are nested too deep", where=where, hint="Write {CPU:{NUM_STREAMS:2}}.")
    found, end = group(1)
    if end != len(tokens):
        raise InputError(f"{text!r} cannot be read", where=where, hint="Write {CPU:{NUM_STREAMS:2}}.")
    return found


def _bare(text: str) -> str:
    return text.strip(" '\"")


def dump(device: str, properties: Mapping[str, Any]) -> bytes:
    """Return -dump_config's JSON, which benchmark_app reads as well: properties of devices are text in braces.

    That there is no hint is written, too: else a run that reads it would choose one.
    """
    settings = {key: _write(value) for key, value in {"PERFORMANCE_HINT": "", **properties}.items()}
    return (json.dumps({device.partition(":")[0]: settings}, indent=4) + "\n").encode()


def _write(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_write(one)}" for key, one in value.items()) + "}"
    return ("YES" if value else "NO") if isinstance(value, bool) else str(value)


def precision_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return what the model is computed in, by device if several combine; {} if the device does not say."""
    if "INFERENCE_PRECISION_HINT" in facts:
        return {"model": str(facts["INFERENCE_PRECISION_HINT"])}
    return {
        name.partition(".")[0]: str(value)
        for name, value in facts.items()
        if name.endswith(".INFERENCE_PRECISION_HINT")
    }


def ran(model: ov.CompiledModel) -> dict[str, Any]:
    """Return every property that a compiled model tells, as text."""
    found: dict[str, Any] = {}
    for key in model.get_property("SUPPORTED_PROPERTIES"):
        if key in ("SUPPORTED_PROPERTIES", "MODEL_PRIORITY"):
            continue
        try:
            value = model.get_property(key)
        except (RuntimeError, TypeError):  # of types that Python has not
            continue
        if key == "DEVICE_PROPERTIES":  # of AUTO, MULTI and HETERO: a table for each device that runs
            found |= {f"{device}.{name}": _text(one) for device, table in value.items() for name, one in table.items()
                      if name not in ("SUPPORTED_PROPERTIES", "MODEL_PRIORITY")}  # fmt: skip
        else:
            found[key] = _text(value)
    return found


def _text(value: Any) -> str:
    name = getattr(value, "get_type_name", None)
    return str(name() if name else getattr(value, "name", None) or value)
