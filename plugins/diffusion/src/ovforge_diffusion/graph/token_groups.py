"""Which tokens of a picture are alike, and merging those: the graph of token merging (Bolya & Hoffman 2023).

The upper left token of each 2x2 tokens stays (the destinations), the others (the sources) are each compared with all
of those; the sources that have the closest destination are merged into it. This is `bipartite_soft_matching_random2d`
of the authors' tomesd without its random choice of destinations, for every size and batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import openvino as ov
from openvino import opset13 as ops

__all__ = ["Groups", "grid", "matched"]

STRIDE = 2
"""Side of the squares of tokens in which one is a destination."""


@dataclass(frozen=True)
class Grid:
    """Places (1-D, int64) of sources and destinations among the tokens of a picture, row by row, and their count.

    The last source is a stand-in, the first destination again. If no token is to be merged, it is merged into itself,
    which changes nothing: tensors without elements end the process in OpenVINO 2026.4, if shapes are fixed.
    """

    sources: ov.Output
    destinations: ov.Output
    tokens: ov.Output


@dataclass(frozen=True)
class Groups:
    """How the tokens of each row of a batch are merged. All are int64, (batch, ...)."""

    kept: ov.Output
    """Places of the sources that stay as they are."""

    merged: ov.Output
    """Places of the sources that are merged, at least one: see `Grid`."""

    into: ov.Output
    """For each of those, the number of its destination."""

    places: ov.Output
    """For each token of the picture, its place among what is left: what stays, then the destinations."""

    sizes: ov.Output
    """float32 (batch, destinations, 1): how many tokens each destination stands for, itself included."""

    grid: Grid

    def merge(self, tokens: ov.Output) -> ov.Output:
        """Return (batch, what is left, width): each destination is the mean of itself and what is merged into it."""
        kept, merged = (_taken(tokens, places) for places in (self.kept, self.merged))
        destinations = ops.gather(tokens, self.grid.destinations, _number(1))
        indices = ops.broadcast(ops.unsqueeze(self.into, _number(2)), ops.shape_of(merged))
        # Sums and counts apart: the reduction "mean" takes five times as long on a CPU.
        sums = ops.scatter_elements_update(
            destinations, indices, merged, _number(1), reduction="sum", use_init_val=True
        )
        means = ops.divide(sums, self.sizes)
        return ops.concat([kept, means], 1).output(0)

    def unmerge(self, left: ov.Output) -> ov.Output:
        """Return (batch, tokens, width) of (batch, what is left, width): merged tokens all get what their mean gave."""
        return _taken(left, self.places).output(0)


def grid(picture: ov.Output) -> Grid:
    """Divide the tokens of a picture (batch, height, width, channels) into sources and destinations."""
    shape = ops.shape_of(picture)
    height, width = (ops.gather(shape, _number(axis), _number(0)) for axis in (1, 2))
    tokens = ops.multiply(height, width)
    # What is left over at the lower and right edge has no destination, unless the picture is one token wide or high.
    rows, columns = (_starts(side) for side in (height, width))
    starts = ops.add(ops.unsqueeze(ops.multiply(rows, width), _number(1)), ops.unsqueeze(columns, _number(0)))
    destinations = ops.reshape(starts, _list(-1), special_zero=False)
    every = _numbers(tokens)
    marks = ops.scatter_update(
        ops.broadcast(_flag(1), ops.unsqueeze(tokens, _number(0))),
        destinations,
        ops.broadcast(_flag(0), ops.shape_of(destinations)),
        _number(0),
    )
    sources = ops.gather(every, ops.squeeze(ops.non_zero(marks), _number(0)), _number(0))
    sources = ops.concat([sources, _list(0)], 0)
    return Grid(sources.output(0), destinations.output(0), tokens.output(0))


def matched(states: ov.Output, grid: Grid, ratio: Fraction) -> Groups:
    """Return the groups of tokens that merge `ratio` of all, by the cosine of `states` (batch, tokens, width)."""
    units = ops.normalize_l2(states, _list(-1), 1e-12, "max")
    sources, destinations = (ops.gather(units, places, _number(1)) for places in (grid.sources, grid.destinations))
    closeness = ops.matmul(sources, destinations, False, True)
    nearest = ops.topk(closeness, _number(1), -1, "max", "none", index_element_type="i64")
    best, target = (ops.squeeze(nearest.output(number), _number(2)) for number in (0, 1))
    every = _count(grid.sources)
    count = ops.subtract(every, _number(1))
    # The stand-in belongs to the first destination, and comes last.
    stand_in = ops.equal(_numbers(every), count)
    best, target = ops.select(stand_in, np.float32(-2), best), ops.select(stand_in, _number(0), target)
    order = ops.topk(best, every, -1, "max", "value", index_element_type="i64").output(1)
    share = ops.divide(ops.multiply(grid.tokens, _number(ratio.numerator)), _number(ratio.denominator))
    share = ops.minimum(share, count)
    begin = ops.multiply(count, ops.convert(ops.equal(share, _number(0)), "i64"))
    first = _columns(order, begin, ops.add(begin, ops.maximum(share, _number(1))))
    rest = _columns(order, share, count)
    kept, merged = (ops.gather(grid.sources, part, _number(0)) for part in (rest, first))
    into = _taken(target, first)
    places = _places(kept.output(0), merged.output(0), into.output(0), grid)
    return Groups(kept.output(0), merged.output(0), into.output(0), places, _sizes(into, grid), grid)


def _sizes(into: ov.Node, grid: Grid) -> ov.Output:
    """Return (batch, destinations, 1): one more than the tokens that are merged into each."""
    shape = ops.shape_of(into)
    batch, count = ops.gather(shape, _list(0), _number(0)), ops.shape_of(grid.destinations)
    one = ops.constant(np.float32(1))
    alone = ops.broadcast(one, ops.concat([batch, count], 0))
    more = ops.broadcast(one, shape)
    sizes = ops.scatter_elements_update(alone, into, more, _number(1), reduction="sum", use_init_val=True)
    return ops.unsqueeze(sizes, _number(2)).output(0)


def _places(kept: ov.Output, merged: ov.Output, into: ov.Output, grid: Grid) -> ov.Output:
    """Return (batch, tokens): the place of each token's group among what is left."""
    batch = ops.gather(ops.shape_of(kept), _list(0), _number(0))
    stays = ops.gather(ops.shape_of(kept), _number(1), _number(0))

    def rows(values: ov.Node) -> ov.Node:
        return ops.broadcast(values, ops.concat([batch, ops.shape_of(values)], 0))

    left = ops.concat([kept, rows(grid.destinations)], 1)
    empty = ops.broadcast(_number(0), ops.concat([batch, ops.unsqueeze(grid.tokens, _number(0))], 0))
    numbers = _numbers(ops.add(stays, _count(grid.destinations)))
    places = ops.scatter_elements_update(empty, left, rows(numbers), _number(1))
    return ops.scatter_elements_update(places, merged, ops.add(into, stays), _number(1)).output(0)


def _taken(values: ov.Output | ov.Node, places: ov.Output | ov.Node) -> ov.Node:
    """Return, (batch, places, ...), what stands at places, (batch, places), of each row of values.

    Gather does the same, but in OpenVINO 2026.4 that of the CPU takes wrong numbers if shapes are fixed and small.
    """
    return ops.gather_nd(values, ops.unsqueeze(places, _number(2)), batch_dims=1)


def _starts(side: ov.Node) -> ov.Node:
    """Return where squares begin along a side: 0, 2, 4... with only whole ones, but at least one."""
    whole = ops.maximum(ops.divide(side, _number(STRIDE)), _number(1))
    return ops.multiply(_numbers(whole), _number(STRIDE))


def _numbers(count: ov.Node) -> ov.Node:
    return ops.range(_number(0), count, _number(1), "i64")


def _columns(values: ov.Output, begin: ov.Node, end: ov.Node) -> ov.Node:
    """Return columns of (batch, columns) from one to before another."""
    first, last = (ops.unsqueeze(number, _number(0)) for number in (begin, end))
    return ops.slice(values, first, last, _list(1), _list(1))


def _count(values: ov.Output) -> ov.Node:
    return ops.squeeze(ops.shape_of(values), _number(0))


def _number(value: int) -> ov.Node:
    return ops.constant(np.int64(value))


def _list(*values: int) -> ov.Node:
    return ops.constant(np.array(values, np.int64))


def _flag(value: int) -> ov.Node:
    return ops.constant(np.int32(value))
