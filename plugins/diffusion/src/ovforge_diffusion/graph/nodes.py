"""Finding one's way in an ov.Model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import ModelError

__all__ = ["ancestors", "kept_operand", "operands", "port_named", "positions", "weights_of"]


def operands(node: ov.Node) -> list[ov.Node]:
    """Return the nodes that a node takes its inputs from, in their order."""
    return [port.get_source_output().get_node() for port in node.inputs()]


def positions(model: ov.Model) -> dict[str, int]:
    """Return each node's place in an order in which inputs come first, by its unique name."""
    return {node.get_name(): place for place, node in enumerate(model.get_ordered_ops())}


def ancestors(node: ov.Node, places: Mapping[str, int], down_to: int = 0) -> Iterator[ov.Node]:
    """Give `node` and all that it is computed from, back to the place `down_to`."""
    seen, left = {node.get_name()}, [node]
    while left:
        current = left.pop()
        yield current
        for operand in operands(current):
            name = operand.get_name()
            if name not in seen and places[name] >= down_to:
                seen.add(name)
                left.append(operand)


def kept_operand(add: ov.Node, places: Mapping[str, int]) -> ov.Node | None:
    """Return what a residual addition x + f(x) keeps: x. None if the node is not such an addition."""
    if add.get_type_name() != "Add":
        return None
    earlier, later = sorted(operands(add), key=lambda node: places[node.get_name()])
    down_to = places[earlier.get_name()]
    found = any(node.get_name() == earlier.get_name() for node in ancestors(later, places, down_to))
    return earlier if found and earlier.get_name() != later.get_name() else None


def port_named(ports: Iterable[ov.Output], name: str, role: str) -> ov.Output:
    """Return the input or output of a model that has a name. Raises ModelError if there is none."""
    listed = list(ports)
    for port in listed:
        if name in port.names:
            return port
    found = ", ".join(sorted(name for port in listed for name in port.names)) or "no named ones"
    raise ModelError(f"the model has no {name!r}", where=role, hint=f"It has: {found}. Convert the model again.")


def weights_of(node: ov.Node) -> NDArray[Any] | None:
    """Return a constant's values, also where it is stored in fewer bits of floating point; None for anything else."""
    if node.get_type_name() == "Convert" and node.get_element_type().is_real():
        [node] = operands(node)
        if not node.get_element_type().is_real():
            return None
    if node.get_type_name() != "Constant":
        return None
    kind = np.float32 if node.get_element_type().is_real() else None
    values: NDArray[Any] = node.get_data(dtype=kind)
    return values
