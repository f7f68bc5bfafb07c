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
from ovforge_textual_inversion.graph import MARK, append, mark, named_alike, redirect

__all__ = ["extend_table", "width_of"]

_GATHERS = ["opset1.Gather", "opset7.Gather", "opset8.Gather"]
_SAME_NUMBERS = {"Convert", "Reshape", "Unsqueeze", "Squeeze", "Transpose"}
"""Operations that token numbers pass through between the model's input and the table."""

_FEW_BITS = {"i8", "u8", "i4", "u4", "i2", "u2", "u3", "u6", "nf4", "f4e2m1", "f8e4m3", "f8e5m2", "f8e8m0", "u1"}
_NEW = f"{MARK}new-rows-"
"""The look-up of vectors beside a compressed table."""

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
    """Return how many numbers a vector has in the table for `tokens` tokens. Raises ModelError if there is none."""
    beside = _beside(model)
    table = _table(beside[0]) if beside else _table(_find(model, tokens, role)[0])
    return int(table.get_partial_shape()[1].get_length())


def extend_table(model: ov.Model, tokens: int, rows: NDArray[np.float32], role: str) -> str:
    """Give the table `rows`, float32 (vectors, width), after its first `tokens`; return the type they are kept in.

    Constant -> Concat, which compilation folds to [tokens + vectors, width]. A compressed table would be folded to what
    it decompresses to, so it is left as it is, and the vectors are looked up beside it. Consumers that look nothing up
    keep the table as it was.
    """
    if beside := _beside(model):
        with named_alike(model):
            for gather in beside:
                append(gather.input(0), rows, "more-rows")
        chosen = next(node for node in model.get_ops() if node.get_friendly_name().startswith(f"{MARK}chosen-"))
        return str(chosen.get_output_element_type(0).get_type_name())
    gathers = _find(model, tokens, role)
    table = _table(gathers[0])
    with named_alike(model):
        if _compressed(table.get_node()):
            for number, gather in enumerate(gathers):
                _look_up_beside(gather, tokens, rows, number)
        else:
            _join(model, gathers, tokens, rows)
    return str(table.get_element_type().get_type_name())


def _join(model: ov.Model, gathers: list[ov.Node], tokens: int, rows: NDArray[np.float32]) -> None:
    """Let Gathers look into the table and `rows` as one."""
    number = sum(node.get_friendly_name().startswith(f"{MARK}table-") for node in model.get_ops())
    kept = table = _table(gathers[0])
    if table.get_partial_shape()[0].get_length() > tokens:  # rows that no token has
        kept = mark(ops.slice(table, [0], [tokens], [1], [0]), f"rows-{number}").output(0)
    added = ops.constant(rows)
    if table.get_element_type() != ov.Type.f32:
        added = ops.convert(added, table.get_element_type())
    joined = mark(ops.concat([kept, added], 0), f"table-{number}")
    for gather in gathers:
        gather.input(0).replace_source_output(joined.output(0))


def _compressed(node: ov.Node) -> bool:
    """Say whether a table is made from numbers of few bits."""
    if node.get_type_name() == "Constant":
        return node.get_element_type().get_type_name() in _FEW_BITS
    return any(_compressed(port.get_source_output().get_node()) for port in node.inputs())


def _look_up_beside(gather: ov.Node, tokens: int, rows: NDArray[np.float32], number: int) -> None:
    """Look the numbers from `tokens` on up in `rows`, and the others where they were: two look-ups and a choice."""
    numbers = gather.input(1).get_source_output()
    first, last, zero = (
        ops.constant(np.array(n, numbers.get_element_type().to_dtype())) for n in (tokens, tokens - 1, 0)
    )
    places = ops.maximum(ops.subtract(numbers, first), zero)
    found = new = mark(ops.gather(ops.constant(rows), places, ops.constant(np.int64(0))), f"new-rows-{number}")
    if gather.get_output_element_type(0) != ov.Type.f32:
        found = ops.convert(new, gather.get_output_element_type(0))
    is_new = ops.unsqueeze(ops.greater_equal(numbers, first), ops.constant(np.int64(-1)))
    chosen = mark(ops.select(is_new, found, gather), f"chosen-{number}", 2)
    gather.input(1).replace_source_output(mark(ops.minimum(numbers, last), f"old-{number}").output(0))
    redirect(gather.output(0), chosen.output(0), [chosen])


def _beside(model: ov.Model) -> list[ov.Node]:
    """Return the look-ups beside a compressed table, if there are some."""
    return [node for node in model.get_ordered_ops() if node.get_friendly_name().startswith(_NEW)]
