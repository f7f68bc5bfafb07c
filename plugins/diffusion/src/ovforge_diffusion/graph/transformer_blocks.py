"""The transformer blocks of a UNet, by structure: residual branches on normalized tokens of a picture.

A branch is what lies between a layer normalization of x and the addition to x. It is self-attention if its keys come
from the normalized tokens, cross-attention if they come from elsewhere, and a multilayer perceptron (MLP) if none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import openvino as ov

from ovforge_diffusion.graph.nodes import ancestors, kept_operand, operands, positions, weights_of

__all__ = ["Block", "Branch", "Kind", "blocks_of"]


class Kind(StrEnum):
    """What a branch does."""

    SELF = "self-attention"
    CROSS = "cross-attention"
    MLP = "MLP"


@dataclass(frozen=True)
class Branch:
    """One residual branch: x + f(norm(x))."""

    kind: Kind
    states: ov.Output
    """x: (batch, tokens, width)."""

    begin: ov.Output
    """norm(x), which the branch's products take."""

    end: ov.Input
    """The addition's input for f(norm(x))."""


@dataclass(frozen=True)
class Block:
    """Self-attention, and the branches up to the next."""

    picture: ov.Output
    """What the tokens were made of: (batch, height, width, channels)."""

    branches: list[Branch] = field(default_factory=list)


def blocks_of(model: ov.Model) -> list[Block]:
    """Return the blocks that begin with self-attention on the tokens of a picture, in order."""
    places = positions(model)
    blocks: list[Block] = []
    last: dict[str, Block] = {}  # addition -> the block it ends
    for node in model.get_ordered_ops():
        branch = _branch(node, places)
        if branch is None:
            continue
        block = last.get(branch.states.get_node().get_name())
        if branch.kind == Kind.SELF:
            picture = _picture(branch.states.get_node(), places)
            block = None if picture is None else Block(picture)
            blocks += [block] if block else []
        if block:
            block.branches.append(branch)
            last[branch.end.get_node().get_name()] = block
    return blocks


def _branch(node: ov.Node, places: Mapping[str, int]) -> Branch | None:
    """Return the branch that begins with a layer normalization; None for another node."""
    if node.get_type_name() != "MVN" or node.get_output_partial_shape(0).rank != 3:
        return None
    states = node.input_value(0)
    for end in _residual_inputs(states):
        inside = list(ancestors(end.get_source_output().get_node(), places, places[node.get_name()]))
        if any(other.get_name() == node.get_name() for other in inside):
            begin = _normalized(node)
            return Branch(_kind(inside, begin.get_node(), places), states, begin, end)
    return None


def _residual_inputs(states: ov.Output) -> Iterator[ov.Input]:
    """Give, for each addition to the states, its other input. Quantization may stand between."""
    for port in states.get_target_inputs():
        node = port.get_node()
        if node.get_type_name() == "FakeQuantize":
            yield from _residual_inputs(node.output(0))
        elif node.get_type_name() == "Add":
            yield node.input(1 - port.get_index())


def _normalized(node: ov.Node) -> ov.Output:
    """Return the end of a normalization: after the scale and shift by constants, which may have been folded away."""
    while len(users := node.output(0).get_target_inputs()) == 1:
        [port] = users
        user = port.get_node()
        if user.get_type_name() not in ("Multiply", "Add"):
            break
        if weights_of(user.input_value(1 - port.get_index()).get_node()) is None:
            break
        node = user
    return node.output(0)


def _kind(inside: list[ov.Node], begin: ov.Node, places: Mapping[str, int]) -> Kind:
    keys = [found for node in inside if (found := _keys(node)) is not None]
    if not keys:
        return Kind.MLP
    name, down_to = begin.get_name(), places[begin.get_name()]
    own = all(any(node.get_name() == name for node in ancestors(one, places, down_to)) for one in keys)
    return Kind.SELF if own else Kind.CROSS


def _keys(node: ov.Node) -> ov.Node | None:
    """Return where an attention takes its keys from, be it one operation or written out; None for another node."""
    if node.get_type_name() == "ScaledDotProductAttention":
        return node.input_value(1).get_node()
    if node.get_type_name() != "Softmax":
        return None
    while node.get_type_name() != "MatMul":
        if not (before := [one for one in operands(node) if weights_of(one) is None]):
            return None
        node = before[0]
    return node.input_value(1).get_node()


def _picture(states: ov.Node, places: Mapping[str, int]) -> ov.Output | None:
    """Return the picture (batch, height, width, channels) whose tokens the states are; None if they are of none."""
    node = states
    while node.get_type_name() != "Reshape":
        kept = kept_operand(node, places)
        before = [kept] if kept else [one for one in operands(node) if weights_of(one) is None]
        if not before or node.get_output_partial_shape(0).rank != 3:
            return None
        node = before[0]
    picture = node.input_value(0)
    made = picture.get_node()
    if made.get_type_name() != "Transpose" or made.get_output_partial_shape(0).rank != 4:
        return None
    order = weights_of(made.input_value(1).get_node())
    return picture if order is not None and order.tolist() == [0, 2, 3, 1] else None
