"""Inputs of a model as the flags describe them: shapes, layouts, types, batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import openvino as ov

from ovforge.errors import InputError, did_you_mean

__all__ = ["Input", "brackets", "describe_inputs", "element_type"]

_IMAGE_LAYOUTS = ("[N,C,H,W]", "[N,H,W,C]", "[C,H,W]", "[H,W,C]")
_MOST_COLOURS = 4


@dataclass
class Input:
    """One input. `shapes` are those of the data, one a group; `shape` is the model's, and may be open."""

    name: str
    names: frozenset[str]
    type: ov.Type
    shape: ov.PartialShape
    layout: ov.Layout
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    largest: int | None = None
    """Numbers below this are valid: the rows of the table that it looks up; None if nothing tells."""

    @property
    def is_image(self) -> bool:
        """Whether it looks like a picture of three channels."""
        if str(self.layout) not in _IMAGE_LAYOUTS or self.shape.rank.is_dynamic:
            return False
        channels = self.shape[self.layout.get_index_by_name("C")]
        return bool(channels.is_static and channels.get_length() == 3)

    @property
    def sides_known(self) -> bool:
        """Whether height and width are fixed, or have a limit."""
        sides = [self.shape[self.layout.get_index_by_name(letter)] for letter in "HW"]
        return all(side.get_max_length() > 0 for side in sides)

    def batch(self, shape: Sequence[int]) -> int | None:
        """Return the batch of data of this shape; None if there is no such dimension."""
        return shape[self.layout.get_index_by_name("N")] if self.layout.has_name("N") else None


def brackets(text: str | None, names: Sequence[frozenset[str]], flag: str) -> dict[int, list[str]]:
    """Read "input1[a][b],input2[c]", or "[a]" for all inputs: position -> what the brackets hold.

    Several brackets without a name are dealt out among the inputs, as benchmark_app does.
    """
    if not text:
        return {}
    groups = re.fullmatch(r"(?:[^\[\],]*(?:\[[^\[\]]*\])+,?)+", text.strip())
    if groups is None:
        raise InputError(f"{text!r} cannot be read", where=flag, hint=f"Write: {flag} input1[1,3,224,224],input2[1,4]")
    found: dict[int, list[str]] = {}
    for name, values in re.findall(r"([^\[\],]*)((?:\[[^\[\]]*\])+)", text):
        inside = re.findall(r"\[([^\[\]]*)\]", values)
        if name.strip():
            position = next((n for n, known in enumerate(names) if name.strip() in known), None)
            if position is None:
                known = sorted(set().union(*names))
                raise InputError(
                    f"no input {name!r}.{did_you_mean(name, known)}", where=flag, hint=f"Inputs: {', '.join(known)}."
                )
            found[position] = inside
            continue
        if len(inside) > 1 and len(inside) % len(names):
            raise InputError(f"{len(inside)} values for {len(names)} inputs", where=flag, hint="Name the inputs.")
        for number in range(max(len(inside), len(names))):
            found.setdefault(number % len(names), []).append(inside[number % len(inside)])
    return found


def element_type(name: str) -> ov.Type:
    """Return OpenVINO's type of this name, as the flags have it."""
    found: ov.Type = getattr(ov.Type, {"bool": "boolean"}.get(name, name))
    return found


def describe_inputs(ports: Sequence[Any], flags: Mapping[str, Any]) -> tuple[list[Input], bool]:
    """Return the inputs with what -shape, -data_shape, -layout, -b and the mean and scale flags say of them.

    The second value says whether the model must be reshaped. Raises InputError for what does not fit.
    """
    names = [frozenset(port.names) | {port.node.get_friendly_name()} for port in ports]
    shapes = brackets(flags["shape"], names, "-shape")
    layouts = brackets(flags["layout"], names, "-layout")
    inputs, reshape = [], False
    for position, port in enumerate(ports):
        shape, name = port.get_partial_shape(), port.any_name if port.names else port.node.get_friendly_name()
        if position in shapes:
            wanted = _shape(shapes[position][0], "-shape")
            if wanted.rank != shape.rank and shape.rank.is_static:
                raise InputError(f"{name} has {shape.rank} dimensions, as {shape}", where=f"-shape {wanted}")
            shape, reshape = wanted, True
        layout = _layout(port, shape, layouts.get(position))
        inputs.append(Input(name, names[position], port.get_element_type(), shape, layout, largest=_largest(port)))
    if flags["batch_size"]:
        reshape |= _set_batch(inputs, flags["batch_size"], bool(flags["data_shape"]))
    _set_data_shapes(inputs, brackets(flags["data_shape"], names, "-data_shape"))
    for flag in ("mean", "scale"):
        for position, values in brackets(flags[f"{flag}_values"], names, f"-{flag}_values").items():
            named = not flags[f"{flag}_values"].startswith("[")
            if named or inputs[position].is_image:
                setattr(inputs[position], flag, _numbers(values[0], f"-{flag}_values"))
    return inputs, reshape


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{text!r} are not numbers", where=flag) from error


def _shape(text: str, flag: str) -> ov.PartialShape:
    try:
        shape = ov.PartialShape(f"[{text}]")
    except RuntimeError as error:
        raise InputError(
            f"{text!r} is not a shape", where=flag, hint="Write whole numbers, ? or a range: [1..8,3,?,224]"
        ) from error
    if shape.rank.is_static and any(side.get_max_length() == 0 for side in shape):
        raise InputError(f"[{text}] holds nothing: a side is 0", where=flag, hint="Write sides of 1 or more.")
    return shape


def _layout(port: Any, shape: ov.PartialShape, asked: list[str] | None) -> ov.Layout:
    """Return the layout that is asked for, the model's own, or what the place of few channels tells."""
    if asked:
        try:
            layout = ov.Layout(asked[0])
        except RuntimeError as error:
            raise InputError(
                f"{asked[0]!r} is not a layout", where="-layout", hint="Write: NCHW, NC or N..."
            ) from error
        if "..." not in asked[0] and shape.rank.is_static and len(str(layout).split(",")) != shape.rank.get_length():
            raise InputError(f"{asked[0]} does not fit the shape {shape}", where="-layout")
        return layout
    own: ov.Layout = port.node.layout
    if own != ov.Layout():
        return own
    if shape.rank.is_dynamic or shape.rank.get_length() not in (3, 4):
        return ov.Layout()
    image = [dimension.get_max_length() for dimension in shape][shape.rank.get_length() - 3 :]
    few = [0 <= side <= _MOST_COLOURS for side in image]
    batch = "N" if shape.rank.get_length() == 4 else ""
    if few[0] and not few[2]:
        return ov.Layout(f"{batch}CHW")
    if few[2] and not few[0]:
        return ov.Layout(f"{batch}HWC")
    return ov.Layout()


def _set_batch(inputs: list[Input], text: str, data_shapes: bool) -> bool:
    """Put -b into every input's batch dimension; return whether that changes a shape."""
    try:
        batch = ov.Dimension(text)
    except RuntimeError as error:
        raise InputError(
            f"{text!r} is not a batch size", where="-b", hint="A whole number, or a range: 1..8"
        ) from error
    if batch.get_max_length() == 0:
        raise InputError("a batch of 0 holds nothing", where="-b", hint="Write 1 or more.")
    if batch.is_static and data_shapes:
        return False
    found = changed = False
    for one in inputs:
        index = one.layout.get_index_by_name("N") if one.layout.has_name("N") else None
        if index is None and one.layout == ov.Layout() and one.shape.rank.is_static and len(one.shape):
            first = one.shape[0]
            if first.is_dynamic or first.get_length() in (0, 1):
                index, one.layout = 0, ov.Layout("N...")
        if index is not None:
            found = True
            if one.shape[index] != batch:
                one.shape[index] = batch
                changed = True
    if not found:
        raise InputError("no input has a batch dimension", where="-b", hint="Name the layouts: -layout [NC]")
    return changed


def _set_data_shapes(inputs: list[Input], asked: Mapping[int, list[str]]) -> None:
    for position, one in enumerate(inputs):
        if one.shape.is_static:
            one.shapes = [tuple(one.shape.to_shape())]
        for text in asked.get(position, []):
            shape = _shape(text, "-data_shape")
            if shape.is_dynamic:
                raise InputError(f"[{text}] is open, and data has whole sizes", where=f"-data_shape {one.name}")
            if not one.shape.compatible(shape):
                raise InputError(
                    f"[{text}] does not fit {one.shape}", where=f"-data_shape {one.name}",
                    hint="-shape changes the shape of the model itself.",
                )  # fmt: skip
            if one.shape.is_dynamic:
                one.shapes.append(tuple(shape.to_shape()))


def _largest(port: Any) -> int | None:
    """Return the rows of the smallest table that an input of whole numbers looks up."""
    if not port.get_element_type().is_integral():
        return None
    rows: list[int] = []
    readers = list(port.get_target_inputs())
    while readers:
        reader = readers.pop()
        node = reader.get_node()
        if node.get_type_name() in ("Convert", "Reshape", "Unsqueeze", "Squeeze"):
            readers += node.output(0).get_target_inputs()
        elif node.get_type_name() == "Gather" and reader.get_index() == 1:
            table = node.input_value(0).get_partial_shape()
            axis = node.input_value(2).get_node()
            place = int(axis.data.item()) if axis.get_type_name() == "Constant" else 0
            if table.rank.is_static and table[place].is_static:
                rows.append(table[place].get_length())
    return min(rows, default=None)
