"""The blocks of a diffusion transformer, by structure: sums along the stream of a picture's tokens.

A block adds branches to the stream, x + f(x), and the last normalization of the model takes what the last block gives.
Blocks that refine a picture's tokens before they meet the text (Z-Image, Lumina 2) are not counted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import openvino as ov

from ovforge_diffusion.graph.nodes import ancestors, kept_operand, operands, positions
from ovforge_diffusion.residuals import BLOCK

__all__ = ["Stream", "stream_of"]

_TEXT = "encoder_hidden_states"
_PIECES = ("Slice", "StridedSlice", "VariadicSplit")


@dataclass(frozen=True)
class Stream:
    """The stream of tokens, (rows, tokens, width), through the blocks in their order."""

    begin: ov.Output
    """What goes into the first block."""

    blocks: list[ov.Output]
    """What each block gives. Later blocks may hold the text's tokens beside the picture's."""

    ends: list[ov.Output]
    """For each block, what the last one makes of the tokens that it holds."""

    picture: ov.Node | None
    """A Slice that takes the picture's tokens out of those of the first block; None if there are no others."""

    refined: list[ov.Output]
    """What goes into the first block that refines the picture's tokens before they meet the text, and what each gives.

    Empty if there is none."""


@dataclass(frozen=True)
class _Sum:
    """x + f(x) on the stream."""

    before: ov.Node
    branch: ov.Node
    after: ov.Node
    part: int
    """Which tokens the stream holds: 0 at the end, and one more each time that they are cut or joined, backwards."""


def stream_of(model: ov.Model) -> Stream | None:
    """Return the stream of a transformer that reads encoder_hidden_states; None for a model of another structure."""
    ordered = model.get_ordered_ops()
    last = next((node for node in reversed(ordered) if node.get_type_name() == "MVN"), None)
    if last is None or last.get_output_partial_shape(0).rank != 3:
        return None
    given = [node for node in ordered if node.get_type_name() in ("Parameter", "ReadValue")]
    told = _following(ordered, [node for node in given if _TEXT in node.output(0).names])
    computed = _following(ordered, given)
    places = positions(model)
    sums, _ = _Walk(places, told).back(last.input_value(0).get_node(), 0)
    attends = [_attends(one, computed, places) for one in sums]
    every = _blocks(sums, attends)
    groups = [group for group in every if group[-1].after.get_name() in told]
    if not groups:
        return None
    refiners = [group for group in every if group[-1].after.get_name() not in told]
    refined = [refiners[0][0].before, *(group[-1].after for group in refiners)] if refiners else []
    final = groups[-1][-1]
    # The tokens of earlier blocks are those that are cut out of the last one's.
    ends = [final.after.output(0) if group[-1].part == final.part else last.input_value(0) for group in groups]
    cut = last.input_value(0).get_node()
    others = cut.get_type_name() == "Slice" and groups[0][-1].part == final.part
    blocks = [group[-1].after.output(0) for group in groups]
    begin = groups[0][0].before.output(0)
    return Stream(begin, blocks, ends, cut if others else None, [node.output(0) for node in refined])


class _Walk:
    """The way back along the stream. `told` names what depends on the text."""

    def __init__(self, places: Mapping[str, int], told: Collection[str]) -> None:
        self._places, self._told = places, told

    def back(self, node: ov.Node, part: int) -> tuple[list[_Sum], ov.Node]:
        """Return the sums on the way to a value, the first one first, and what the stream begins with."""
        sums: list[_Sum] = []
        after: ov.Node | None = None
        while True:
            kind = node.get_type_name()
            if (plain := _without_residual(node)) is not None:  # what a ControlNet adds belongs to the block before it
                node, after = plain, after or node
                continue
            chosen = operands(node)[2] if kind == "Select" else node  # layer-skipping keeps what went into a layer
            before = self._kept(chosen)
            if before is not None:
                branch = next(one for one in operands(chosen) if one.get_name() != before.get_name())
                sums.append(_Sum(before, branch, after or node, part))
                node, after = before, None
            elif kind == "FakeQuantize":
                node = operands(node)[0]
            elif kind in _PIECES:
                node, part = operands(node)[0], part + 1
            elif kind == "Concat":
                whole = {one.get_name(): one for piece in operands(node) for one in operands(piece)[:1]}
                if len(whole) == 1 and all(piece.get_type_name() in _PIECES for piece in operands(node)):
                    [node] = whole.values()  # cut and joined again
                    continue
                for piece in operands(node):
                    earlier, root = self.back(piece, part + 1)
                    if root.get_name() not in self._told:
                        return earlier + sums[::-1], root
                return sums[::-1], node
            else:
                return sums[::-1], node

    def _kept(self, node: ov.Node) -> ov.Node | None:
        """Return x of x + f(x), and x + f(x) of x + f(x) + g(x); None for other operations."""
        if node.get_type_name() != "Add":
            return None
        kept = kept_operand(node, self._places)
        for one, other in (operands(node), operands(node)[::-1]):
            first = kept_operand(one, self._places) if kept is None else None
            if first is not None:
                down_to = self._places[first.get_name()]
                if any(each.get_name() == first.get_name() for each in ancestors(other, self._places, down_to)):
                    return one
        return kept


def _without_residual(node: ov.Node) -> ov.Node | None:
    """Return what an addition takes beside a ControlNet's residual; None for other operations."""
    if node.get_type_name() != "Add":
        return None
    for kept, added in (operands(node), operands(node)[::-1]):
        source = operands(added)[0] if added.get_type_name() == "Pad" else added
        names = source.output(0).names if source.get_type_name() == "Parameter" else ()
        if any(name.startswith(BLOCK) for name in names):
            return kept
    return None


def _blocks(sums: Sequence[_Sum], attends: Sequence[bool]) -> list[list[_Sum]]:
    """Return the sums of each block: it ends with a multilayer perceptron, or is one sum with all that it does."""
    last = max((number for number, attention in enumerate(attends) if not attention), default=-1)
    blocks: list[list[_Sum]] = [[]]
    for number, (one, attention) in enumerate(zip(sums, attends, strict=True)):
        blocks[-1].append(one)
        if not attention or number > last:
            blocks.append([])
    return blocks[:-1]


def _attends(one: _Sum, computed: Collection[str], places: Mapping[str, int]) -> bool:
    """Say whether a branch multiplies values with each other, as attention does, rather than with weights."""
    for node in ancestors(one.branch, places, places[one.before.get_name()] + 1):
        if node.get_type_name() == "ScaledDotProductAttention":
            return True
        if node.get_type_name() == "MatMul" and all(each.get_name() in computed for each in operands(node)):
            return True
    return False


def _following(ordered: Sequence[ov.Node], begin: Sequence[ov.Node]) -> set[str]:
    """Return the names of some nodes and of all that depends on them."""
    found = {node.get_name() for node in begin}
    for node in ordered:
        if any(one.get_name() in found for one in operands(node)):
            found.add(node.get_name())
    return found
