"""What models are fed with: random numbers, or pictures and arrays from files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, did_you_mean
from ovforge.model import open_picture, reading_arrays
from ovforge_benchmark.shapes import Input

__all__ = ["Feed", "make_feeds"]

_PICTURES = {".bmp", ".jpg", ".jpeg", ".png", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
_ARRAYS = {".npy", ".npz", ".bin"}
_RANDOM, _TEXT = "random numbers", "a cat on a blue background"

Feed = dict[str, "ov.Tensor"]
"""Input name -> tensor, for one inference."""


def make_feeds(inputs: Sequence[Input], paths: Sequence[str]) -> tuple[list[Feed], dict[str, str]]:
    """Return what to feed, one set a group, to be used in turn, and what each input is filled with.

    An input of several files takes them in turn. Without files it gets random numbers of the shapes of its groups.
    Raises InputError if files do not fit, or an open shape has neither.
    """
    files = _assign(inputs, paths)
    columns: list[list[Any]] = []
    sources: dict[str, str] = {}
    rng = np.random.default_rng(0)
    for one in inputs:
        if mine := files.get(one.name):
            columns.append(_from_files(one, mine))
            sources[one.name] = ", ".join(path.name for path in mine[:3]) + (" ..." if len(mine) > 3 else "")
        elif one.shapes:
            columns.append([_random(one, shape, rng) for shape in one.shapes])
            sources[one.name] = _TEXT if one.type == ov.Type.string else _RANDOM
        else:
            raise InputError(
                f"{one.name} has the open shape {one.shape}",
                where="-data_shape",
                hint=f"Say what to feed: -data_shape {one.name}[...], -shape to fix it, or -i with files; "
                "-niter 0 only compiles.",
            )
    count = max(map(len, columns))
    if any(count % len(column) for column in columns):
        count = int(np.lcm.reduce([len(column) for column in columns]))
    turns = [list(itertools.islice(itertools.cycle(column), count)) for column in columns]
    feeds = [
        {one.name: ov.Tensor(np.ascontiguousarray(array)) for one, array in zip(inputs, turn, strict=True)}
        for turn in zip(*turns, strict=True)
    ]
    return feeds, sources


def _random(one: Input, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    """Return numbers of the input's type: 0 to 255 as a picture's, truths, rows of the table that it looks up."""
    name = one.type.get_type_name()
    if name == "string":
        return np.full(shape, _TEXT)
    if name in ("bf16", "f8e4m3", "f8e5m2") or (one.type.bitwidth < 8 and name != "boolean"):
        raise InputError(f"{one.name} is of type {name}, which numpy has not", where="inputs", hint="Set -ip f32.")
    kind = one.type.to_dtype()
    if kind.kind == "b":
        return rng.integers(0, 2, shape).astype(kind)
    if kind.kind == "f":
        return rng.uniform(0, 255, shape).astype(kind)
    top = min(one.largest or 256, np.iinfo(kind).max + 1)
    return rng.integers(0, top, shape).astype(kind)


def _assign(inputs: Sequence[Input], paths: Sequence[str]) -> dict[str, list[Path]]:
    """Return input name -> files. Without a name: .npz by its keys' input, pictures to picture inputs, in order."""
    found: dict[str, list[Path]] = {}
    loose: list[Path] = []
    for text in paths:
        name, colon, rest = text.rpartition(":")
        one = next((known for known in inputs if colon and name in known.names), None)
        if one is not None:
            found.setdefault(one.name, []).extend(itertools.chain(*(_files(part) for part in rest.split(","))))
        elif colon and not Path(text).exists() and not set(name) & set("/\\") and len(name) > 1:
            known = sorted(set().union(*(one.names for one in inputs)))
            raise InputError(
                f"the model has no input {name!r}.{did_you_mean(name, known)}", where=f"-i {text}",
                hint=f"Inputs: {', '.join(known)}.",
            )  # fmt: skip
        else:
            loose += _files(text)
    free = [one for one in inputs if one.name not in found]
    for path in list(loose):
        if path.suffix == ".npz":
            loose.remove(path)
            with reading_arrays(path):
                keys = list(np.load(path, allow_pickle=False).keys())
            named = [one for one in free if one.names & set(keys)]
            if not named and len(inputs) > 1:
                raise InputError(
                    f"it holds {', '.join(keys)}", where=str(path),
                    hint=f"Name its arrays as inputs: {', '.join(one.name for one in inputs)}.",
                )  # fmt: skip
            for one in named or inputs[:1]:
                found.setdefault(one.name, []).append(path)
    for kinds, takers in (
        (_PICTURES, [one for one in free if one.is_image]),
        (_ARRAYS, [one for one in free if one.name not in found]),
    ):
        mine = [path for path in loose if path.suffix.lower() in kinds]
        takers = takers or ([one for one in free if one.name not in found] if mine else [])
        if mine and not takers:
            raise InputError(
                f"no input is left for {mine[0].name}", where="-i",
                hint="An input takes pictures or arrays, not both; INPUT:FILE says which file is whose.",
            )  # fmt: skip
        for number, path in enumerate(mine):
            found.setdefault(takers[number % len(takers)].name, []).append(path)
    return found


def _files(text: str) -> list[Path]:
    path = Path(text)
    if not path.exists():
        raise InputError("no such file or folder", where=f"-i {text}")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    known = [file for file in files if file.suffix.lower() in _PICTURES | _ARRAYS]
    if not known:
        raise InputError("nothing to feed", where=f"-i {text}", hint="Pictures, .npy, .npz or .bin files.")
    return known


def _from_files(one: Input, files: Sequence[Path]) -> list[NDArray[Any]]:
    """Return arrays, one a group: pictures are stacked to batches, others are taken as they are."""
    if all(path.suffix.lower() in _PICTURES for path in files):
        return _pictures(one, files)
    if pictures := [path.name for path in files if path.suffix.lower() in _PICTURES]:
        raise InputError(
            f"{one.name} is given {pictures[0]} and arrays", where="-i", hint="Give pictures or arrays, not both."
        )
    arrays = [_array(one, path) for path in files]
    one.shapes = one.shapes or [tuple(array.shape) for array in arrays]
    return arrays


def _pictures(one: Input, files: Sequence[Path]) -> list[NDArray[Any]]:
    """Return batches: one a shape, or as many as all files fill if there is one shape."""
    if not one.shapes and one.shape.rank.is_static:
        one.shapes = [_picture_shape(one, files[0])]
    shapes = list(one.shapes)
    if len(shapes) == 1:
        shapes *= -(-len(files) // (one.batch(shapes[0]) or 1))
    taking, made = itertools.cycle(files), []
    for shape in shapes:
        arrays = [_picture(one, shape, next(taking)) for _ in range(one.batch(shape) or 1)]
        made.append(np.stack(arrays) if one.layout.has_name("N") else arrays[0])
    return made


def _picture_shape(one: Input, file: Path) -> tuple[int, ...]:
    """Return the shape of a picture fed as it is, where the model leaves its size open."""
    if not one.layout.has_name("H"):
        raise InputError(f"{one.name} is not a picture, apparently", where=str(file), hint="Set -layout.")
    image = open_picture(file, str(file))
    sides = {"H": image.height, "W": image.width, "N": 1, "C": 3}
    named = [letter for letter in str(one.layout) if letter.isalpha()]
    return tuple(
        one.shape[n].get_length() if one.shape[n].is_static else sides[letter] for n, letter in enumerate(named)
    )


def _picture(one: Input, shape: tuple[int, ...], file: Path) -> NDArray[Any]:
    """Return a picture, resized, without the batch dimension."""
    layout = one.layout
    if not (layout.has_name("H") and layout.has_name("W") and layout.has_name("C")):
        raise InputError(f"{one.name} is not a picture, apparently", where=str(file), hint="Set -layout.")
    height, width, channels = (shape[layout.get_index_by_name(letter)] for letter in "HWC")
    if channels not in (1, 3):
        raise InputError(f"{one.name} takes {channels} channels", where=str(file), hint="Feed it a .npy file.")
    image = open_picture(file, str(file), "L" if channels == 1 else "RGB").resize((width, height))
    pixels = np.asarray(image, one.type.to_dtype()).reshape(height, width, channels)
    first = layout.get_index_by_name("C") < layout.get_index_by_name("H")
    return pixels.transpose(2, 0, 1) if first else pixels


def _array(one: Input, file: Path) -> NDArray[Any]:
    """Return an array from .npy, .npz or .bin. Raises InputError if it does not fit the input."""
    kind = one.type.to_dtype()
    if file.suffix not in (".npy", ".npz"):
        return _binary(one, file, kind)
    with reading_arrays(file):
        array = np.load(file, allow_pickle=False)
        if file.suffix == ".npz":
            array = array[next((key for key in array if key in one.names), next(iter(array)))]
    if array.dtype != kind:
        raise InputError(f"holds {array.dtype}, and {one.name} takes {kind}", where=str(file), hint="Convert it.")
    if not one.shape.compatible(ov.PartialShape(list(array.shape))):
        raise InputError(f"has the shape {list(array.shape)}, and {one.name} takes {one.shape}", where=str(file))
    return np.asarray(array)


def _binary(one: Input, file: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    try:
        data = np.frombuffer(file.read_bytes(), np.uint8)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file)) from error
    for shape in one.shapes:
        if data.nbytes == int(np.prod(shape)) * kind.itemsize:
            return data.view(kind).reshape(shape)
    sizes = " or ".join(str(int(np.prod(shape)) * kind.itemsize) for shape in one.shapes) or "a -data_shape"
    raise InputError(f"has {data.nbytes} bytes, and {one.name} takes {sizes}", where=str(file))
