"""The tensors of a transformer's checkpoint as weights that are read one by one: safetensors, float8 and GGUF."""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object
from ovforge_convert import SMALL, Rows, TensorWeight, Weight
from ovforge_diffusers.components import Contents
from ovforge_diffusers.gguf_blocks import BLOCKS, FLOATS, Groups, read_groups
from ovforge_diffusers.gguf_file import Entry, read_gguf_header
from ovforge_diffusers.requirements import need
from ovforge_diffusers.transformer_names import Slice
from ovforge_diffusers.weights import read_weights

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["SCALES", "GgufWeight", "check_layers", "dequantized", "joined", "read_gguf", "read_scaled"]

SCALES = (".scale_weight", ".weight_scale")
"""What a float8 weight is to be multiplied with, by the names of ComfyUI and its successors, instead of `.weight`."""

_ROWS = 1024
"""Rows that are dequantized at once."""


_LAYER = ".comfy_quant"
_LAYER_LIMIT = 4096
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
"""Forms of layers, by ComfyUI's names, that are one scale times float8 values."""


def check_layers(source: Source, path: str, contents: Contents) -> dict[str, str]:
    """Return layer -> form, of the layers that a safetensors file says ComfyUI is to compute in fewer bits.

    It says so in a tensor `comfy_quant` beside a weight, which holds JSON, or in its metadata. Raises ModelError for a
    form that is not one scale times float8 values.
    """
    said = [name for name, shape in contents.shapes.items() if name.endswith(_LAYER)]
    if any(math.prod(contents.shapes[name]) > _LAYER_LIMIT for name in said):
        raise ModelError(f"{said[0]} has more bytes than a layer's form", where=source.name)
    layers: dict[str, Any] = {}
    try:
        if text := contents.metadata.get("_quantization_metadata"):
            layers |= parse_object(str(text).encode(), f"{source.name}: _quantization_metadata").get("layers", {})
        for name, tensor in read_weights(source, [path], {name: name for name in said}.get).items():
            layers[name.removesuffix(_LAYER)] = parse_object(tensor.numpy().tobytes(), f"{source.name}: {name}")
        forms = {layer: str(form["format"] if isinstance(form, dict) else form) for layer, form in layers.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"it does not say in which form its layers are: {error!r}",
            where=source.name,
            hint="The file may be damaged: fetch it again.",
        ) from error
    for layer, form in forms.items():
        if form not in _FLOAT8:
            raise ModelError(
                f"{layer} is stored as {form}, which is not read",
                where=source.name,
                hint=f"Take a file in bfloat16, float16 or float8 ({', '.join(_FLOAT8)}), or a GGUF file.",
            )
    return forms


def read_scaled(
    source: Source, path: str, names: Mapping[str, str], forms: Mapping[str, str] | None = None
) -> dict[str, Weight]:
    """Read the tensors that `names` (name in the file -> name) lists, times the scales beside them.

    `forms` are those of `check_layers`: they tell float8 values that are stored as plain bytes.
    """
    scales = {
        stem + suffix: new.removesuffix(".weight")
        for stored, new in names.items()
        if stored.endswith(".weight")
        for suffix in SCALES
        for stem in (stored.removesuffix(".weight"),)
    }
    tensors = read_weights(source, [path], lambda name: names.get(name) or (name if name in scales else None))
    for stored, new in names.items():
        tensor, form = tensors.get(new), (forms or {}).get(stored.removesuffix(".weight"))
        if form and stored.endswith(".weight") and tensor is not None and tensor.element_size() == 1:
            tensors[new] = tensor.view(getattr(need("torch", "converting a checkpoint"), form))
    found = {}
    for name in scales.keys() & tensors.keys():
        if tensors[name].numel() != 1:
            raise ModelError(
                f"{name} has the shape {list(tensors[name].shape)}, and one number is known", where=source.name
            )
        found[scales[name] + ".weight"] = float(tensors.pop(name))
    return {name: TensorWeight(tensor, found.get(name)) for name, tensor in tensors.items()}


def read_gguf(source: Source, path: str, names: Mapping[str, str]) -> dict[str, Weight]:
    """Return the tensors of a GGUF file that `names` (name in the file -> name) lists; plain files stay mapped."""
    entries = read_gguf_header(source, path).tensors
    local = source.local(path)
    if local is None:
        data = np.frombuffer(source.read(path), np.uint8)
    else:
        with local.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
    where = source.name
    return {new: _weight(entries[name], data, f"{where}: {name}") for name, new in names.items()}


def dequantized(entries: Mapping[str, Entry], rows: Mapping[str, list[Slice]] | None) -> dict[str, list[str]]:
    """Return type -> names, of quantized tensors that do not stay so: those that are not matrices, or put together.

    `entries` are a GGUF file's by the names that `rows` takes them by, which may be None: then nothing is taken apart.
    """
    together = {stored for slices in (rows or {}).values() if len(slices) > 1 for stored, _, _ in slices}
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        whole = len(entry.shape) == 2 and entry.shape[-1] % BLOCKS[entry.type][0] == 0
        small = math.prod(entry.shape) <= SMALL
        if entry.type not in FLOATS and (not whole or small or name in together):
            found.setdefault(entry.type, []).append(name)
    return found


def _weight(entry: Entry, data: np.ndarray, where: str) -> Weight:
    own = data[entry.begin : entry.begin + entry.size]
    if entry.type in FLOATS:
        torch = need("torch", "converting a checkpoint")
        kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        tensor = torch.frombuffer(own, dtype=kinds[entry.type]) if len(own) else torch.empty(0)
        return TensorWeight(tensor.reshape(entry.shape))
    width, size = BLOCKS[entry.type]
    columns = entry.shape[-1]
    if columns % width:  # stored in another shape than the model has: its rows are not whole blocks
        values = read_groups(entry.type, own.reshape(1, -1, size)).values().reshape(entry.shape)
        return TensorWeight(need("torch", "converting a checkpoint").from_numpy(values))
    rows = len(own) // (columns // width * size)
    return GgufWeight(entry.type, entry.shape, own.reshape(rows, columns // width, size), where)


class GgufWeight:
    """A quantized tensor of a GGUF file: blocks [rows, blocks of a row, bytes]."""

    def __init__(self, kind: str, shape: tuple[int, ...], blocks: np.ndarray, where: str) -> None:
        self.kind, self.shape = kind, shape
        self._blocks, self._where = blocks, where

    def rows(self, begin: int, end: int) -> GgufWeight:
        """Return some rows (of a matrix), not copied."""
        return GgufWeight(self.kind, (end - begin, *self.shape[1:]), self._blocks[begin:end], self._where)

    def fill(self, out: np.ndarray) -> None:
        """Write the values: bit for bit those of llama.cpp in float32."""
        flat = out.reshape(len(self._blocks), -1)
        for begin in range(0, len(flat), _ROWS):
            part = slice(begin, begin + _ROWS)
            flat[part] = self._groups(self._blocks[part]).values().reshape(flat[part].shape)

    def compressed(self, name: str) -> ov.Output | None:
        """Return a matrix as integers with a scale for each group, in the form that the runtime multiplies with."""
        if len(self.shape) != 2:
            return None
        from openvino import opset13 as ops

        groups = self._groups(self._blocks)
        scale, zero = _zero_points(groups)
        value = ops.convert(_integers(groups, name), "f32")
        if zero is not None:
            value = ops.subtract(value, ops.constant(zero, name=f"{name}/zero_point"))
        value = ops.multiply(value, ops.constant(scale, name=f"{name}/scale"))
        return ops.reshape(value, ops.constant(np.array(self.shape)), special_zero=False).output(0)

    def _groups(self, blocks: np.ndarray) -> Groups:
        groups = read_groups(self.kind, blocks)
        for part in (groups.scale, groups.offset):
            if part is not None and not np.isfinite(part).all():
                raise ModelError(
                    "it holds NaN or infinity", where=self._where, hint="The file is damaged: fetch it again."
                )
        return groups


def _zero_points(groups: Groups) -> tuple[np.ndarray, np.ndarray | None]:
    """Return scale and zero point of `scale * (q - zero)`, which is what the runtime computes.

    Where the scale is 0, all integers of a group count as 0: it becomes the offset, and the zero point 1.
    """
    if groups.offset is None:
        return groups.scale, None
    flat = (groups.scale == 0) & (groups.offset != 0)
    if flat.any():
        groups.q[np.broadcast_to(flat, groups.q.shape)] = 0
    scale = np.where(flat, groups.offset, groups.scale).astype(np.float32)
    zero = np.divide(groups.offset, scale, out=np.zeros_like(scale), where=scale != 0)
    return scale, zero


def _integers(groups: Groups, name: str) -> ov.Node:
    """Return the integers as a constant; two of four bits make a byte, the first one its lower half."""
    import openvino as ov
    from openvino.op import Constant

    if groups.type in ("i8", "u8"):
        constant = Constant(np.ascontiguousarray(groups.q), shared_memory=True)
    else:
        nibbles = groups.q.reshape(-1).view(np.uint8) & np.uint8(15)
        packed = nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
        tensor = ov.Tensor(packed, ov.Shape(list(groups.q.shape)), getattr(ov.Type, groups.type))
        constant = Constant(tensor, shared_memory=False)
    constant.set_friendly_name(name)
    return constant


def joined(weights: Mapping[str, Weight], rows: Mapping[str, list[Slice]]) -> dict[str, Any]:
    """Return the weights under new names: rows of one, or rows of several, one after the other."""
    found: dict[str, Any] = {}
    for name, slices in rows.items():
        parts = [_rows(weights[stored], begin, end) for stored, begin, end in slices]
        found[name] = parts[0] if len(parts) == 1 else Rows(parts)
    return found


def _rows(weight: Weight, begin: int, end: int) -> Weight:
    return weight if (begin, end) == (0, weight.shape[0]) else weight.rows(begin, end)
