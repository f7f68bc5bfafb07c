"""What the changes to all models share: the nodes that they add have names by which they are taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops

__all__ = ["MARK", "append", "mark", "named_alike", "redirect", "remove_marked", "values"]

MARK = "learned_tokens/"
_INSIDE = "learned_tokens_part/"


def mark(node: ov.Node, what: str, keeps: int = 0) -> ov.Node:
    """Name a node as one of ours; return it. Where it is removed, input `keeps` (and what follows) takes its place."""
    node.set_friendly_name(f"{MARK}{what}/{keeps}")
    return node


def append(port: ov.Input, rows: NDArray[Any], what: str) -> None:
    """Make an input see `rows` after what it saw, by a Concat of constants that compilation folds into one."""
    joined = ops.concat([port.get_source_output(), ops.constant(rows)], 0)
    port.replace_source_output(mark(joined, what).output(0))


def redirect(old: ov.Output, new: ov.Output, but: Sequence[ov.Node] = ()) -> None:
    """Give the consumers of `old`, all but some nodes, `new` instead."""
    kept = {node.get_friendly_name() for node in but}
    for port in list(old.get_target_inputs()):
        if port.get_node().get_friendly_name() not in kept:
            port.replace_source_output(new)


def remove_marked(model: ov.Model) -> None:
    """Take out what `mark` named."""
    marked = [node for node in model.get_ordered_ops() if node.get_friendly_name().startswith(MARK)]
    for node in reversed(marked):
        keeps = int(node.get_friendly_name().rpartition("/")[2])
        for number, output in enumerate(node.outputs()):
            redirect(output, node.input(keeps + number).get_source_output())
    model.validate_nodes_and_infer_types()


@contextmanager
def named_alike(model: ov.Model) -> Iterator[None]:
    """Name the nodes that a block adds by their order: OpenVINO's own numbers run on through the process."""
    before = {node.get_friendly_name() for node in model.get_ops()}
    yield
    model.validate_nodes_and_infer_types()
    inside = sum(name.startswith(_INSIDE) for name in before)
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if name not in before and not name.startswith(MARK):
            node.set_friendly_name(f"{_INSIDE}{inside}")
            inside += 1


def values(output: ov.Output) -> NDArray[Any]:
    """Return the numbers of a constant. Raises TypeError for what is none."""
    node = output.get_node()
    if node.get_type_name() != "Constant":
        raise TypeError(f"{node.get_friendly_name()} is a {node.get_type_name()}, not a constant")
    return np.array(node.data)
