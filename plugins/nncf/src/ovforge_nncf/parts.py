"""Parts of a diffusion transformer, found by what depends on what: by no name of a model, a class or a layer.

A denoiser takes a step (an input of one axis or none, or of two, whose sines are embedded) and a sample (inputs of
three axes and more). What depends on inputs of at most two axes, the step among them, conditions the denoiser. Its
layers are embeddings while another such layer comes after them, and modulation at the end (scales, shifts and gates of
adaptive layer norm, Peebles and Xie 2022). Places and steps are what sines and cosines are taken of. Products of
activations that are divided by a sum of their own are attention without softmax (Katharopoulos et al. 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Literal

from ovforge_nncf.graph import CONVOLUTIONS, PASSING

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["PARTS", "Part", "parts_of", "positions_of"]

Part = Literal["positions", "embeddings", "modulation", "first", "last", "linear_attention", "depthwise"]

PARTS: dict[Part, str] = {
    "positions": "places and steps, from the inputs through sines and cosines to the rotated queries and keys",
    "embeddings": "layers that embed the step, the guidance and pooled text",
    "modulation": "layers that make scales, shifts and gates of those, and what applies them",
    "first": "the layer that an input of tokens goes through first",
    "last": "the layer that gives the output",
    "linear_attention": "products of activations that are divided by their own sums",
    "depthwise": "convolutions of each channel by itself",
}
"""Part -> what it is. The first and the last two are found in any model, the others in denoisers."""

_ROTATING = ("Multiply", "Add", "Subtract")
_JOINING = ("Multiply", "Add", "Subtract", "Divide")
_MOVING = {*PASSING, "Gather", "Convert", "ConvertLike"} - {"MaxPool", "ReduceMax", "Relu", "ReLU", "Interpolate"}
"""Operations that move values, and change none."""


def parts_of(model: ov.Model) -> dict[Part, frozenset[str]]:
    """Return part -> names of the operations in it, empty for a part that the model has not.

    Constants and Parameters are in no part; an operation may be in two, as what comes before the sines of a step is.
    """
    graph = _Graph(model)
    positions = _positions(graph)
    conditions = _conditions(graph)
    layers, others = graph.layers & conditions, graph.layers - conditions
    embeddings = graph.above(layers) & conditions
    joints = {
        op
        for op in graph.computed - conditions - positions
        if graph.kinds[op] in _JOINING and any(source in conditions for source in graph.sources[op])
    }
    found: dict[Part, Collection[int]] = {
        "positions": positions,
        "embeddings": embeddings,
        "modulation": (conditions - embeddings) | (joints if layers else set()),
        "first": _first(graph, conditions | positions) if conditions else (),
        "last": others - graph.above(others) if conditions else (),
        "linear_attention": _linear_attention(graph),
        "depthwise": {op for op in graph.layers if graph.is_depthwise(op)},
    }
    return {part: graph.named(ops) for part, ops in found.items()}


def positions_of(model: ov.Model) -> frozenset[str]:
    """Return the names of the operations of `positions` alone."""
    graph = _Graph(model)
    return graph.named(_positions(graph))


class _Graph:
    """A model as numbers of operations in the order in which they run, sources and users by number."""

    def __init__(self, model: ov.Model) -> None:
        self._ops = model.get_ordered_ops()
        number = {op.get_name(): place for place, op in enumerate(self._ops)}
        self.kinds = [op.get_type_name() for op in self._ops]
        self.sources = [[number[value.get_node().get_name()] for value in op.input_values()] for op in self._ops]
        self.users: list[list[int]] = [[] for _ in self._ops]
        for op, sources in enumerate(self.sources):
            for source in dict.fromkeys(sources):
                self.users[source].append(op)
        self.constant: set[int] = set()
        for op, sources in enumerate(self.sources):
            if self.kinds[op] == "Constant" or (sources and self.constant.issuperset(sources)):
                self.constant.add(op)
        self.computed = {
            op for op, kind in enumerate(self.kinds) if op not in self.constant and kind not in ("Parameter", "Result")
        }
        """All but inputs, outputs, and what depends on constants alone."""
        self.inputs = {
            op: len(shape) if (shape := self._ops[op].get_output_partial_shape(0)).rank.is_static else 3
            for op, kind in enumerate(self.kinds)
            if kind == "Parameter"
        }
        """Input -> its axes; 3 if the model does not say."""

    def named(self, ops: Iterable[int]) -> frozenset[str]:
        """Return the friendly names of operations."""
        return frozenset(self._ops[op].get_friendly_name() for op in ops)

    def size(self, op: int) -> int:
        """Return how many numbers an operation gives; 0 if that is not known before it runs."""
        shape = self._ops[op].get_output_partial_shape(0)
        return prod(side.get_length() for side in shape) if shape.is_static else 0

    @cached_property
    def layers(self) -> set[int]:
        """Convolutions, and products with a matrix of weights."""
        return {op for op in self.computed if self._has_weights(op)}

    def _has_weights(self, op: int) -> bool:
        if self.kinds[op] not in ("MatMul", *CONVOLUTIONS):
            return False
        return any(source in self.constant for source in self.sources[op]) and not self.is_outer(op)

    def is_outer(self, op: int) -> bool:
        """Say whether it is a product that sums nothing up, as places times frequencies are."""
        if self.kinds[op] != "MatMul":
            return False
        turned = self._ops[op].get_attributes()
        axes = (-2 if turned["transpose_a"] else -1, -1 if turned["transpose_b"] else -2)
        for side, axis in enumerate(axes):
            shape = self._ops[op].input_value(side).get_partial_shape()
            if shape.rank.is_static and len(shape) > 1:
                summed = shape[len(shape) + axis]
                if summed.is_static and summed.get_length() == 1:
                    return True
        return False

    def is_depthwise(self, op: int) -> bool:
        """Say whether it is a convolution whose groups have one channel each."""
        if self.kinds[op] not in ("GroupConvolution", "GroupConvolutionBackpropData"):
            return False
        weights = self._ops[op].input_value(1).get_partial_shape()  # groups, and the channels of one, in and out
        side = weights[2 if self.kinds[op] == "GroupConvolution" else 1]
        return bool(side.is_static and side.get_length() == 1)

    def reached(self, start: Iterable[int], step: Callable[[int], Iterable[int]]) -> set[int]:
        """Return all that repeated steps lead to, without the start itself."""
        found: set[int] = set()
        waiting = list(start)
        while waiting:
            for op in step(waiting.pop()):
                if op not in found:
                    found.add(op)
                    waiting.append(op)
        return found

    def values(self, op: int) -> Iterator[int]:
        """Give what an operation takes values of, but for constants and shapes."""
        if self.kinds[op] != "ShapeOf":
            yield from (source for source in self.sources[op] if source not in self.constant)

    def above(self, ops: Iterable[int]) -> set[int]:
        """Return all whose values they depend on, inputs of the model among them."""
        return self.reached(ops, self.values)

    def depends(self) -> list[frozenset[int]]:
        """Return for each operation the inputs of the model that its values depend on."""
        found: list[frozenset[int]] = []
        for op in range(len(self._ops)):
            sources = () if self.kinds[op] == "ShapeOf" else self.sources[op]
            own = frozenset((op,)) if op in self.inputs else frozenset()
            found.append(own.union(*(found[source] for source in sources)))
        return found


def _positions(graph: _Graph) -> set[int]:
    """Return what lies between inputs and sines of places and steps, and from there to what they rotate."""
    found: set[int] = set()
    for op in graph.computed:
        if graph.kinds[op] not in ("Sin", "Cos"):
            continue
        above = graph.above([op]) & graph.computed
        if any(graph.kinds[each] in _LAYERS and not graph.is_outer(each) for each in above):
            continue  # of features, as some activations are
        found |= {op, *above}
        found |= _rotations(graph, op)
    return found


_LAYERS = ("MatMul", "ScaledDotProductAttention", *CONVOLUTIONS)


def _rotations(graph: _Graph, op: int) -> set[int]:
    """Return the operations that multiply by a sine or cosine, up to the sum of both; nothing if it goes elsewhere.

    x cos + (x turned by a quarter) sin, or its real and imaginary parts apart (RoFormer, Su et al. 2021).
    """

    def scaled(each: int) -> bool:
        constants = [source for source in graph.sources[each] if source in graph.constant]
        by_one_number = len(constants) == 1 and graph.size(constants[0]) == 1
        return graph.kinds[each] == "Negative" or (graph.kinds[each] == "Multiply" and by_one_number)

    def moves(each: int) -> bool:
        return graph.kinds[each] in _MOVING or scaled(each)

    spread = {op, *graph.reached([op], lambda each: (user for user in graph.users[each] if moves(user)))}
    products = {
        user for each in spread for user in graph.users[each] if graph.kinds[user] == "Multiply" and not scaled(user)
    }
    if not products:
        return set()
    turned = graph.reached(
        products, lambda each: (source for source in graph.values(each) if moves(source) and source not in spread)
    )
    sums = {user for product in products for user in graph.users[product] if graph.kinds[user] in _ROTATING}
    return (spread - {op}) | products | turned | {each for each in sums if graph.kinds[each] != "Multiply"}


def _linear_attention(graph: _Graph) -> set[int]:
    """Return products of activations that are divided by a part or a sum of themselves, and those that they are of.

    Their sums are many times as large as what is divided, so that a range that holds both leaves it few of 256 steps.
    """

    def products(start: int, through: Collection[str]) -> set[int]:
        found = {start, *graph.reached([start], lambda op: graph.values(op) if graph.kinds[op] in through else ())}
        return {op for op in found if graph.kinds[op] == "MatMul" and op not in graph.layers | graph.constant}

    found: set[int] = set()
    for op in graph.computed:
        if graph.kinds[op] == "Divide":
            divided, by = graph.sources[op]
            found |= products(divided, _MOVING) & products(by, _SUMMING)
    return found.union(*(products(source, _MOVING) for op in found for source in graph.sources[op]))


_SUMMING = {*_MOVING, "Add", "Maximum", "ReduceSum"}
"""What leads from products to what they are divided by: a number that is more than zero is added."""


def _conditions(graph: _Graph) -> set[int]:
    """Return what depends on the step, alone or with other inputs of two axes at most, and what leads there.

    Nothing if the model takes no step, or no tokens: it does not denoise.
    """
    depends = graph.depends()
    steps = {op for op, axes in graph.inputs.items() if axes <= 1} | _embedded(graph, depends)
    tokens = {op for op, axes in graph.inputs.items() if axes >= 3}
    if not steps or not tokens:
        return set()
    of_steps = {op for op in graph.computed if depends[op] & steps and not depends[op] & tokens}
    return of_steps | (graph.above(of_steps) & graph.computed)


def _embedded(graph: _Graph, depends: list[frozenset[int]]) -> set[int]:
    """Return the inputs of two axes whose sines go through layers: a step for each token of a video, but no places."""

    def goes_through_layers(wave: int) -> bool:
        alone = graph.reached([wave], lambda op: (user for user in graph.users[op] if depends[user] <= depends[wave]))
        return bool(alone & graph.layers)

    waves = [op for op in graph.computed if graph.kinds[op] in ("Sin", "Cos") and goes_through_layers(op)]
    return {each for wave in waves for each in depends[wave] if graph.inputs[each] == 2}


def _first(graph: _Graph, apart: Collection[int]) -> set[int]:
    """Return for each input of tokens the layer that all of it goes through; none if several take it themselves."""
    found: set[int] = set()
    for op, axes in graph.inputs.items():
        if axes < 3:
            continue
        passed = graph.reached(
            [op],
            lambda each: (
                user
                for user in graph.users[each]
                if each not in graph.layers and user not in apart and graph.kinds[user] != "ShapeOf"
            ),
        )
        reached = passed & graph.layers
        found |= reached if len(reached) == 1 else set()
    return found
