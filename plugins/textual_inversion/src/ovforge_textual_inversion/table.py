"""The text encoder's table of embeddings: found by what it is for, and made longer.

Source of the method: "Enable Textual Inversion with Stable Diffusion Pipeline via Optimum-Intel" (blog.openvino.ai,
2023), which finds the table by its name.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as ops
from openvino.passes import Manager, Matcher, MatcherPass, WrapType

from ovforge.errors import ModelError
from ovforge_textual_inversion.graph import MARK, mark, named_alike

__all__ = ["extend_table", "width_of"]

_GATHERS = ["opset1.Gather", "opset7.Gather", "opset8.Gather"]
_SAME_NUMBERS = {"Convert", "Reshape", "Unsqueeze", "Squeeze", "Transpose"}
"""Operations that token numbers pass through between the model's input and the table."""

_DEEPEST = 64
"""Most operations that make a table: a compressed one has six."""


class _TokenEmbeddings(MatcherPass):  # type: ignore[misc]
    """Finds each Gather that looks up token numbers, an input of the model, in a constant table.

    The table may be of any type, compressed, or joined from parts: whatever is made of constants alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[ov.Node] = []

        def callback(matcher: Matcher) -> bool:
            gather = matcher.get_match_root()
            table, numbers, axis = (port.get_source_output() for port in gather.inputs())
            shape = table.get_partial_shape()
            if (
                shape.is_static
                and len(shape) == 2
                and table.get_element_type().is_real()
                and axis.get_node().get_type_name() == "Constant"
                and not axis.get_node().data.any()
                and _constant(table.get_node(), set())
                and _is_input(numbers.get_node())
            ):
                self.found.append(gather)
            return False  # nothing is changed before all are known

        self.register_matcher(Matcher(WrapType(_GATHERS), "TokenEmbeddings"), callback)


def _constant(node: ov.Node, seen: set[str]) -> bool:
    """Say whether a node is computed from constants alone."""
    seen.add(node.get_friendly_name())
    if node.get_type_name() in ("Parameter", "ReadValue") or len(seen) > _DEEPEST:
        return False
    sources = [port.get_source_output().get_node() for port in node.inputs()]
    return all(s.get_friendly_name() in seen or _constant(s, seen) for s in sources)


def _is_input(node: ov.Node) -> bool:
    while node.get_type_name() in _SAME_NUMBERS:
        node = node.input(0).get_source_output().get_node()
    return bool(node.get_type_name() == "Parameter")


def _find(model: ov.Model, tokens: int, role: str) -> list[ov.Node]:
    """Return the Gathers on the one table of at least `tokens` rows."""
    search, manager = _TokenEmbeddings(), Manager()
    manager.register_pass(search)
    manager.run_passes(model)
    gathers = [node for node in search.found if _table(node).get_partial_shape()[0].get_length() >= tokens]
    tables = {(_table(node).get_node().get_friendly_name(), _table(node).get_index()) for node in gathers}
    if len(tables) != 1:
        sizes = [str(_table(node).get_partial_shape()) for node in (gathers or search.found)]
        raise ModelError(
            f"{len(tables) or 'no'} tables of embeddings for the tokenizer's {tokens} tokens",
            where=role,
            hint=f"Tables that token numbers are looked up in have the shapes: {', '.join(sizes) or 'none'}.",
        )
    return gathers


def _table(gather: ov.Node) -> ov.Output:
    return gather.input(0).get_source_output()


def width_of(model: ov.Model, tokens: int, role: str) -> int:
    """Return how many numbers a vector has in the table for `tokens` tokens. Raises ModelError where there is none."""
    return int(_table(_find(model, tokens, role)[0]).get_partial_shape()[1].get_length())


def extend_table(model: ov.Model, tokens: int, rows: NDArray[np.float32], role: str) -> str:
    """Give the table `rows`, float32 (vectors, width), after its first `tokens`; return the type they are kept in.

    Constant -> Concat, which compilation folds to [tokens + vectors, width]. Rows of a compressed table's kind would be
    rounded, so the new ones join what it decompresses to. Consumers that look nothing up keep the table as it was.
    """
    gathers = _find(model, tokens, role)
    table = _table(gathers[0])
    number = sum(node.get_friendly_name().startswith(f"{MARK}table-") for node in model.get_ops())
    kept, dtype = table, table.get_element_type()
    with named_alike(model):
        if table.get_partial_shape()[0].get_length() > tokens:  # rows that no token has
            kept = mark(ops.slice(table, [0], [tokens], [1], [0]), f"rows-{number}").output(0)
        added = ops.constant(rows)
        if dtype != ov.Type.f32:
            added = ops.convert(added, dtype)
        joined = mark(ops.concat([kept, added], 0), f"table-{number}")
        for gather in gathers:
            gather.input(0).replace_source_output(joined.output(0))
    return str(dtype.get_type_name())
