"""Recorded inputs from files, for models that no task runs: numpy's arrays, as the model takes them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.errors import ConfigError, did_you_mean
from ovforge_quality.recording import Record

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.model import ModelBundle

__all__ = ["ArrayCalibration", "are_arrays", "array_files"]

_SUFFIXES = (".npz", ".npy")
_FORMS = (
    "Give a .npz with an array for each input, whose rows are calls, or a folder of .npz or .npy files, one for each "
    "call."
)


def are_arrays(path: Path) -> bool:
    """Say whether a path is a file of arrays, or a folder that holds some, also by role."""
    return path.suffix.lower() in _SUFFIXES or (path.is_dir() and bool(array_files(path)))


def array_files(path: Path) -> list[Path]:
    """Return the files of arrays at a path: itself, or those of a folder and its subfolders, in order."""
    files = [path] if path.is_file() else [*path.glob("*"), *path.glob("*/*")]
    return sorted(file for file in files if file.suffix.lower() in _SUFFIXES)


class ArrayCalibration:
    """A `stages.Calibration` of the user's own arrays.

    `path` is a .npz whose arrays, by input name, hold a call in each row (or in as many rows as the model's batch has),
    or a folder whose files hold a call each: .npz, or .npy for models with one input. A folder for several models has
    subfolders by role. Arrays have the shapes that the model takes; their numbers are not changed.
    """

    def __init__(
        self,
        path: Path | None,
        bundle: ModelBundle,
        score: Callable[[Mapping[str, ov.Model]], float],
        samples: int = 300,
    ) -> None:
        self._path, self._bundle, self._score, self._samples = path, bundle, score, samples

    def inputs(self, role: str, count: int) -> Sequence[Record]:
        """Return up to `count` input sets of `role`. Raises ConfigError for arrays that do not fit its model."""
        if self._path is None:
            raise ConfigError(
                f"no task runs {role!r}, so its inputs are not known", where="calibration.file", hint=_FORMS
            )
        model, path = self._bundle.models[role], self._path / role if (self._path / role).is_dir() else self._path
        calls = _rows(path, model) if path.is_file() and path.suffix.lower() == ".npz" else _files(path, model)
        return list(islice(calls, min(count, self._samples)))

    def score(self, models: Mapping[str, ov.Model]) -> float:
        """Raise ConfigError: without a task there are no results to compare."""
        return self._score(models)


def _files(path: Path, model: ov.Model) -> Iterator[Record]:
    """Give the call in each file."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix.lower() in _SUFFIXES)
    for file in files:
        yield _fitting(_read(file, model), model, str(file))


def _rows(path: Path, model: ov.Model) -> Iterator[Record]:
    """Give the calls in the rows of one file's arrays."""
    arrays = _read(path, model)
    ports = _ports(model)
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        shape = ports[name].get_partial_shape()
        if not array.ndim or (shape.rank.is_static and array.ndim != len(shape)):
            raise ConfigError(
                f"{name} is {list(array.shape)}, and the model takes {shape}: its rows are not calls",
                where=f"calibration.file: {path}",
                hint=_FORMS,
            )
        batch = shape[0].get_length() if shape.rank.is_static and shape[0].is_static else 1
        sizes[name] = len(array) // batch
        if not batch or len(array) % batch or not len(array):
            raise ConfigError(
                f"{name} has {len(array)} rows, which are not whole batches of {batch}",
                where=f"calibration.file: {path}",
                hint="Add or remove rows.",
            )
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(f"its arrays hold different numbers of calls: {told}", where=f"calibration.file: {path}")
    total = next(iter(sizes.values()), 0)
    for call in range(total):
        each = {name: len(array) // total for name, array in arrays.items()}
        record = {name: array[call * each[name] : (call + 1) * each[name]] for name, array in arrays.items()}
        yield _fitting(record, model, f"{path}, call {call + 1}")


def _read(path: Path, model: ov.Model) -> Record:
    """Return a file's arrays by input name; pickled objects are not read."""
    import numpy as np

    where, ports = f"calibration.file: {path}", _ports(model)
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.ndarray):
            with loaded:
                arrays = {name: loaded[name] for name in loaded.files}
        elif len(model.inputs) != 1:
            raise ConfigError(
                f"an .npy holds one array, and the model has {len(model.inputs)} inputs", where=where, hint=_FORMS
            )
        else:
            arrays = {min(model.inputs[0].names): loaded}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"cannot be read as numpy's arrays: {error}", where=where, hint=_FORMS) from error
    for name in arrays:
        if name not in ports:
            raise ConfigError(
                f"the model has no input {name!r}.{did_you_mean(name, ports)}",
                where=where,
                hint=f"It has: {', '.join(sorted(ports))}.",
            )
    missing = [min(port.names) for port in model.inputs if not port.names & arrays.keys()]
    if missing:
        raise ConfigError(f"there is no array for the input {missing[0]!r}", where=where, hint=_FORMS)
    return arrays


def _fitting(record: Record, model: ov.Model, where: str) -> Record:
    """Return a call in the types of the model's inputs. Raises ConfigError for another shape, and for NaN."""
    import numpy as np
    import openvino as ov

    ports, fitting = _ports(model), dict[str, Any]()
    for name, array in record.items():
        shape, kind = ports[name].get_partial_shape(), ports[name].get_element_type()
        if not shape.compatible(ov.PartialShape(list(array.shape))):
            raise ConfigError(
                f"{name} is {list(array.shape)}, and the model takes {shape}",
                where=f"calibration.file: {where}",
                hint="Save arrays as the model is given them, with the batch and after all preparation.",
            )
        real = array.dtype.kind == "f"
        if array.dtype.kind not in "fiub" or (real and not kind.is_real()):
            raise ConfigError(
                f"{name} holds {array.dtype}, and the model takes {kind.get_type_name()}",
                where=f"calibration.file: {where}",
            )
        if real and not np.isfinite(array).all():
            raise ConfigError(f"{name} holds NaN or infinity", where=f"calibration.file: {where}")
        fitting[name] = np.asarray(array, kind.to_dtype(), order="C")
    return fitting


def _ports(model: ov.Model) -> dict[str, Any]:
    return {name: port for port in model.inputs for name in port.names}
