"""Weights that are put into a graph one by one, in the type in which they are to be stored.

A module's large matrices are left uninitialised while it is traced, which costs no memory. Then each constant of the
graph is replaced by what its `Weight` gives: float16 that is read straight from a mapped file, or a compressed form.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ovforge.errors import ModelError, PluginError

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "EXACT",
    "SMALL",
    "Rows",
    "Stored",
    "TensorWeight",
    "Weight",
    "keeping_compressed",
    "noting_layers",
    "place_weights",
    "streamed_names",
]

Stored = Literal["f16", "f32"]

SMALL = 4096
"""Constants up to this size stay in float32: norms, biases, and frequencies, where rounding would shift phases."""

EXACT = ("/scale", "/zero_point")
"""Ends of the names of constants that belong to compressed weights, and stay in float32."""

LARGE = 4 * 2**30
"""Bytes of weights from which on they are kept in a file that has no name, and not in memory of their own."""

_LASTING = "/var/tmp"
"""Where systems keep large temporary files."""

_DECOMPRESSION = "decompression_0"
"""The name of OpenVINO's mark of conversions of weights to float32."""

_UNFOLDED = "DisableConstantFolding_0"
"""The name of OpenVINO's mark of operations whose values are not computed beforehand. It counts by being there."""

_ROOTS = ("self.", "self.model.")
"""What OpenVINO puts before the name of a parameter: the second where it wraps a module that leaves out arguments."""


class Weight(Protocol):
    """A parameter that is not read yet."""

    shape: tuple[int, ...]

    def fill(self, out: np.ndarray) -> None:
        """Write the values to `out`, float16 or float32 of this shape. What float16 cannot hold becomes infinite."""
        ...

    def rows(self, begin: int, end: int) -> Weight:
        """Return the rows (first axis) from `begin` to `end` as a weight of its own."""
        ...

    def compressed(self, name: str) -> ov.Output | None:
        """Return the weight as a constant of fewer bits of this name, and what makes float32 of it.

        None if it has no such form.
        """
        ...


class TensorWeight:
    """A torch tensor of any float type, mapped or not; times `scale`, if it has one (scaled float8)."""

    def __init__(self, tensor: Any, scale: float | None = None) -> None:
        self.shape = tuple(tensor.shape)
        self._tensor, self._scale = tensor, scale

    def fill(self, out: np.ndarray) -> None:
        """Write the values."""
        import torch

        target = torch.from_numpy(out)
        if self._scale is None:
            target.copy_(self._tensor)
            return
        for begin in range(0, len(target), 1024):
            rows = slice(begin, begin + 1024)
            target[rows].copy_(self._tensor[rows].to(torch.float32) * self._scale)

    def rows(self, begin: int, end: int) -> TensorWeight:
        """Return some rows, not copied."""
        return TensorWeight(self._tensor[begin:end], self._scale)

    def compressed(self, name: str) -> None:
        """Return None: its values are floats."""


class Rows:
    """Rows (first axis) of several weights, one after the other."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self._parts = parts
        self.shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def fill(self, out: np.ndarray) -> None:
        """Write the values."""
        done = 0
        for part in self._parts:
            part.fill(out[done : done + part.shape[0]])
            done += part.shape[0]

    def rows(self, begin: int, end: int) -> Weight:
        """Raises ValueError: what is put together is not taken apart again."""
        raise ValueError("rows of rows")

    def compressed(self, name: str) -> None:
        """Return None."""


def streamed_names(module: Any) -> set[str]:
    """Return the names of a torch module's large matrices and kernels, which need no values while it is traced.

    They are the weights of layers of torch that use them in one way, so that nothing is computed of them alone.
    """
    import torch

    kinds = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return {
        f"{name}.weight"
        for name, layer in module.named_modules()
        if type(layer) in kinds and layer.weight.numel() > SMALL
    }


@contextlib.contextmanager
def noting_layers(module: Any) -> Iterator[list[set[str]]]:
    """Give a list that collects the names of the weight of each layer that runs inside."""
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    ran: list[set[str]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, _: ran.append(names[id(layer.weight)]))
        for layer in module.modules()
        if id(getattr(layer, "weight", None)) in names
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def place_weights(
    model: ov.Model, weights: Mapping[str, Weight], stored: Stored, ran: Sequence[set[str]], *, disk: bool
) -> None:
    """Replace the constants of a graph that has just been traced by the weights of their names.

    A weight that float16 cannot hold stays in float32. `ran` has the names of each parameter that a layer used (several
    if layers share it). Raises PluginError if the graph lacks one.
    """
    found = {}
    for node in model.get_ops():
        for root in _ROOTS if node.get_type_name() == "Constant" else ():
            name = node.get_friendly_name().removeprefix(root)
            if name in weights and tuple(node.shape) == tuple(weights[name].shape):
                found[name] = node
    if lost := [names for names in ran if names & weights.keys() and not names & found.keys()]:
        raise PluginError(f"the traced graph has no {min(lost[0])}, which the module uses", hint="Please report this.")
    width = 2 if stored == "f16" else 4
    allocate = _allocator([width * int(np.prod(node.shape)) for node in found.values()], disk)
    converts = iter(_decompressions(len(found) if stored == "f16" else 0))
    for name, node in found.items():
        weight = weights[name]
        users = list(node.output(0).get_target_inputs())
        value = weight.compressed(node.get_friendly_name()) if stored == "f16" else None
        if value is None:
            value = _value(weight, stored, allocate, converts, node.get_friendly_name())
        for user in users:
            user.replace_source_output(value)
    model.validate_nodes_and_infer_types()


@contextlib.contextmanager
def keeping_compressed(model: ov.Model) -> Iterator[None]:
    """Keep transformations of a graph, inside, from making float32 of constants that are stored in float16.

    They compute whatever depends on constants alone, and would hold all weights in float32 at once.
    """
    converts = [node for node in model.get_ops() if _DECOMPRESSION in node.get_rt_info()]
    for node in converts:
        node.get_rt_info()[_UNFOLDED] = True
    try:
        yield
    finally:
        for node in model.get_ops():
            if _UNFOLDED in (marks := node.get_rt_info()):
                del marks[_UNFOLDED]


def _value(weight: Weight, stored: Stored, allocate: _Allocate, converts: Iterator[ov.Node], name: str) -> ov.Output:
    """Return a weight as a constant, with its conversion to float32 if it is stored in float16."""
    if stored == "f16":
        half = allocate(weight.shape, np.float16)
        with np.errstate(over="ignore"):
            weight.fill(half)
        if np.isfinite(half).all():
            convert = next(converts)
            convert.input(0).replace_source_output(_constant(half, f"{name}_compressed"))
            convert.validate_and_infer_types()
            convert.set_friendly_name(name)
            return convert.output(0)
    whole = allocate(weight.shape, np.float32)
    weight.fill(whole)
    return _constant(whole, name)


def _constant(data: np.ndarray, name: str) -> ov.Output:
    from openvino.op import Constant

    constant = Constant(data, shared_memory=True)
    constant.set_friendly_name(name)
    return constant.output(0)


_Allocate = Callable[[tuple[int, ...], Any], np.ndarray]


def _allocator(sizes: Sequence[int], disk: bool) -> _Allocate:
    """Return a function that makes arrays: in memory, or mapped from a file if all `sizes`, bytes, are many together.

    The system writes pages of the file to the disk when memory is short. It has no name, so it goes with the arrays.
    """
    if sum(sizes) < LARGE or not disk:
        return np.empty
    file = _reserved(sum(map(_whole_pages, sizes)))
    end = 0

    def allocate(shape: tuple[int, ...], kind: Any) -> np.ndarray:
        nonlocal end
        begin, size = end, int(np.prod(shape)) * np.dtype(kind).itemsize
        end = begin + _whole_pages(size)
        if end > os.fstat(file.fileno()).st_size:  # a weight that float16 cannot hold takes twice its bytes
            _reserve(file.fileno(), begin, end - begin)
        return np.memmap(file, kind, "r+", begin, shape)

    return allocate


def _whole_pages(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _reserved(size: int) -> Any:
    """Return an open file without a name that has `size` bytes. Raises ModelError if there is no room for it."""
    # On many systems /tmp is in memory, and /var/tmp is not. What the user sets counts first.
    chosen = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    folder = _LASTING if not chosen and os.access(_LASTING, os.W_OK) else None
    file = tempfile.TemporaryFile(prefix="ovforge-", dir=folder)  # noqa: SIM115 - the arrays' maps keep it
    _reserve(file.fileno(), 0, size, folder)
    return file


def _reserve(handle: int, begin: int, size: int, folder: str | None = None) -> None:
    """Make room in a file: writing to a map that has none would end the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, begin, size)
            return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ModelError(
                f"converting this model takes {size / 2**30:.1f} GiB of room for temporary files, and there is less",
                where=folder or tempfile.gettempdir(),
                hint="Make room there, or set the variable TMPDIR to a folder on a larger disk.",
            ) from error
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot reserve
            raise
    os.ftruncate(handle, begin + size)


def _decompressions(count: int) -> list[ov.Node]:
    """Return conversions to float32 that carry OpenVINO's mark of compressed weights, which Python cannot set."""
    import openvino as ov
    from openvino import opset13 as ops
    from openvino._offline_transformations import compress_model_transformation

    if not count:
        return []
    total = source = ops.parameter([1, 2], np.float32)
    for number in range(count):
        total = ops.add(total, ops.constant(np.full((1, 2), number + 1, np.float32)))
    model = ov.Model([total], [source])
    compress_model_transformation(model)
    return [node for node in model.get_ordered_ops() if node.get_type_name() == "Convert"]
