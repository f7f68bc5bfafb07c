"""Where adapters act: the linear layers, convolutions and norms of an ov.Model, by the paths that torch gave them.

A layer is found by structure (a MatMul or Convolution whose second input depends on constants alone: stored as they
are, behind a Convert, or behind the subgraph that decompresses INT8, INT4 or NF4) and named by what the converter
wrote:
`__module.unet.down_blocks.0.../aten::linear/MatMul` (OpenVINO's torch frontend: ours, optimum-intel's),
`/down_blocks.0/.../to_q/MatMul` (models that went through ONNX, as the article's), or the constant's own name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_sd_lora.names import canonical

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Target", "find_targets", "keep_targets", "kept_targets", "plain_constant", "stored_nodes", "weight_of"]

Array = NDArray[np.float32]

_LAYERS = {"MatMul", "Convolution"}
_STORED = {
    "Constant", "Convert", "Subtract", "Multiply", "Add", "Reshape", "Transpose", "Unsqueeze", "Squeeze",
    "FakeQuantize", "FakeConvert",
}  # fmt: skip
_PLAIN = {"f32", "f16", "bf16"}
_KEPT = "lora/{}.json"

BRANCH = "/lora"
"""What the name of a layer ends with where a branch's result is added to it."""


@dataclass
class Target:
    """A module in the graph. `nodes` are its operations: several if the module is used several times.

    `shape` is the weight's in torch's layout; `transposed` says that the graph holds a linear weight as (in, out).
    """

    path: str
    kind: str
    """linear, conv or norm"""
    shape: tuple[int, ...]
    transposed: bool = False
    nodes: list[ov.Node] = field(default_factory=list)
    kept_bias: bool = False
    """Whether it has a bias, of a target that was written down without its operations."""

    @property
    def has_bias(self) -> bool:
        """Whether the model stores a bias that is not zero."""
        return bool(self.bias_inputs()) if self.nodes else self.kept_bias

    def weight_inputs(self) -> list[ov.Input]:
        """Return the inputs that take the weight; [] if a norm's weight is 1 and left out."""
        if self.kind != "norm":
            return [node.input(1) for node in self.nodes]
        return [found for node in self.nodes if (found := _norm_inputs(node)[0])]

    def bias_inputs(self) -> list[ov.Input]:
        """Return the inputs that take the bias; [] if there is none."""
        if self.kind == "norm":
            return [found for node in self.nodes if (found := _norm_inputs(node)[1])]
        return [found for node in self.nodes if (found := _constant_user(behind(node), "Add", self.shape[0]))]

    @property
    def compressed(self) -> bool:
        """Whether the weight is stored in fewer bits."""
        return any(plain_constant(port.get_source_output()) is None for port in self.weight_inputs())

    def weight(self) -> Array:
        """Return the weight as the model computes with it, float32, in torch's layout."""
        ports = self.weight_inputs()
        if not ports:  # a norm without weights multiplies by 1
            return np.ones(self.shape, np.float32)
        value = weight_of(_own(ports[0].get_source_output()))
        return value.T if self.transposed else value.reshape(self.shape)

    def bias(self) -> Array:
        """Return the bias as the model computes with it, float32, (out,); zeros if there is none."""
        ports = self.bias_inputs()
        if not ports:
            return np.zeros(self.shape[0], np.float32)
        return weight_of(_own(ports[0].get_source_output())).reshape(-1)


def find_targets(role: str, model: ov.Model) -> dict[str, Target]:
    """Return path -> target of every layer whose name tells where it belongs."""
    targets: dict[str, Target] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in _LAYERS:
            made = _layer(role, node)
        elif kind in ("GroupNormalization", "MVN"):
            made = _norm(role, node)
        elif kind == "ReduceMean":
            made = _root_mean_square_norm(role, node)
        else:
            continue
        if made is None:
            continue
        known = targets.setdefault(made.path, made)
        if known is not made and known.shape == made.shape:
            known.nodes += made.nodes
    return targets


def keep_targets(bundle: ModelBundle, role: str, targets: Mapping[str, Target]) -> None:
    """Write down where adapters act, so that a later adapter is matched without the model's being read."""
    written = {path: [target.kind, list(target.shape), target.has_bias] for path, target in targets.items()}
    bundle.assets[_KEPT.format(role)] = json.dumps(written, sort_keys=True).encode()


def kept_targets(bundle: ModelBundle, role: str) -> dict[str, Target] | None:
    """Return the targets that were written down, without their operations; None if they were not."""
    data = bundle.assets.get(_KEPT.format(role))
    if data is None:
        return None
    return {
        path: Target(path, kind, tuple(shape), kept_bias=biased)
        for path, (kind, shape, biased) in json.loads(data).items()
    }


def _layer(role: str, node: ov.Node) -> Target | None:
    source = node.input_value(1)
    if not is_stored(source):
        return None
    path = _path(role, node.get_friendly_name()) or _weight_path(role, source)
    shape = tuple(source.get_shape())
    if path is None or len(shape) < 2:
        return None
    if node.get_type_name() == "Convolution":
        return Target(path, "conv", shape, nodes=[node])
    if len(shape) != 2:
        return None
    transposed = not node.get_attributes()["transpose_b"]
    return Target(path, "linear", shape[::-1] if transposed else shape, transposed, [node])


def _norm(role: str, node: ov.Node) -> Target | None:
    path = _path(role, node.get_friendly_name())
    channels = node.get_output_partial_shape(0)[1 if node.get_type_name() == "GroupNormalization" else -1]
    if path is None or channels.is_dynamic:
        return None
    return Target(path, "norm", (channels.get_length(),), nodes=[node])


def _root_mean_square_norm(role: str, node: ov.Node) -> Target | None:
    """Return the norm that a mean belongs to, if its root divides what it is a mean of, and a weight follows."""
    path, divided = _path(role, node.get_friendly_name()), _divided(node)
    if path is None or divided is None or divided.get_output_partial_shape(0)[-1].is_dynamic:
        return None
    made = Target(path, "norm", (divided.get_output_partial_shape(0)[-1].get_length(),), nodes=[divided])
    return made if made.weight_inputs() else None


def _divided(mean: ov.Node) -> ov.Node | None:
    """Return what a mean's root divides, or its inverse multiplies; None if it does neither."""
    node = mean
    while len(users := list(node.output(0).get_target_inputs())) == 1:
        [user] = users
        node = user.get_node()
        kind = node.get_type_name()
        others = [value for value in node.input_values() if value != user.get_source_output()]
        if kind in ("Multiply", "Divide") and not all(map(is_stored, others)):
            return node
        if kind not in ("Add", "Sqrt", "Power", "Divide"):
            break
    return None


def _path(role: str, name: str) -> str | None:
    """Return a module's path from an operation's name."""
    if name.startswith("/"):  # ONNX: a level for each module, then the operation
        levels = [level for level in name.split("/")[1:] if not re.match(r"[A-Z]|\w+::", level)]
        return canonical(role, ".".join(levels))
    head, slash, _ = name.partition("/")
    return canonical(role, head) if slash else None


def _weight_path(role: str, source: ov.Output) -> str | None:
    """Return a module's path from the name of its weight."""
    names = [constant.get_friendly_name() for constant in stored_nodes(source.get_node())]
    for name in names:
        found = re.match(r"(.+)\.weight\b", name)
        if found and (path := canonical(role, found[1])):
            return path
    return None


def is_stored(output: ov.Output) -> bool:
    """Say whether an output depends on constants alone, through what stores weights."""
    return bool(stored_nodes(output.get_node()))


def stored_nodes(node: ov.Node) -> list[ov.Node]:
    """Return the nodes from which a weight is made, from the last to the constants; [] if it is not a stored weight."""
    found: list[ov.Node] = []
    waiting, seen = [node], set()
    while waiting:
        current = waiting.pop(0)
        name = current.get_friendly_name()
        if current.get_type_name() not in _STORED or len(found) > 32:
            return []
        if name in seen:
            continue
        seen.add(name)
        found.append(current)
        waiting += [value.get_node() for value in current.input_values()]
    return found


def plain_constant(output: ov.Output) -> ov.Node | None:
    """Return the constant behind an output where it is stored as f32, f16 or bf16, bare or behind a Convert."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in _PLAIN:
        return node
    return None


def weight_of(output: ov.Output) -> Array:
    """Return what a stored weight is worth, float32: decompressed as the model itself would."""
    constant = plain_constant(output)
    if constant is not None:
        return _decoded(constant)
    import openvino as ov
    from openvino.passes import ConstantFolding, Manager

    copy = ov.Model([output], []).clone()
    passes = Manager()
    passes.register_pass(ConstantFolding())
    passes.run_passes(copy)
    folded = copy.get_result().input_value(0).get_node()
    if folded.get_type_name() != "Constant":
        raise ModelError("its weight cannot be decompressed", where=output.get_node().get_friendly_name())
    return _decoded(folded)


def _decoded(constant: ov.Node) -> Array:
    values: Any = constant.data
    if constant.get_element_type().get_type_name() == "bf16":
        raw = np.frombuffer(values.tobytes(), np.uint16)
        decoded: Array = (raw.astype(np.uint32) << 16).view(np.float32)
        return decoded.reshape(tuple(constant.get_output_shape(0)))
    return np.asarray(values, dtype=np.float32)


def behind(node: ov.Node) -> ov.Node:
    """Return the node whose result is a layer's before its bias: the layer's own, or that of a branch beside it."""
    users = list(node.output(0).get_target_inputs())
    if len(users) == 1 and users[0].get_node().get_friendly_name() == f"{node.get_friendly_name()}{BRANCH}":
        return users[0].get_node()
    return node


def _norm_inputs(node: ov.Node) -> tuple[ov.Input | None, ov.Input | None]:
    """Return the inputs of a norm's weight and bias."""
    if node.get_type_name() == "GroupNormalization":
        return node.input(1), node.input(2)
    channels = node.get_output_partial_shape(0)[-1].get_length()
    weight = _constant_user(node, "Multiply", channels)
    return weight, _constant_user(weight.get_node() if weight else node, "Add", channels)


def _constant_user(node: ov.Node, kind: str, size: int) -> ov.Input | None:
    """Return the input by which the one user of `node`, of a kind, takes `size` numbers, stored or adjustable."""
    users = list(node.output(0).get_target_inputs())
    if len(users) != 1 or users[0].get_node().get_type_name() != kind:
        return None
    other = users[0].get_node().input(1 - users[0].get_index())
    source, shape = other.get_source_output(), other.get_partial_shape()
    if shape.is_static and int(np.prod(list(shape.to_shape()))) == size and (is_stored(source) or _adjustable(source)):
        return other
    return None


def _own(output: ov.Output) -> ov.Output:
    """Return what the model itself stores, where an adapter's variable is added to it."""
    if not _adjustable(output):
        return output
    terms = output.get_node().input_values()
    return next((term for term in terms if is_stored(term)), output)


def _adjustable(output: ov.Output) -> bool:
    """Say whether numbers are the sum of a constant and a variable that an adapter fills."""
    node = output.get_node()
    if node.get_type_name() != "Add":
        return False
    terms = [value.get_node() for value in node.input_values()]
    terms = [term.input_value(0).get_node() if term.get_type_name() == "Reshape" else term for term in terms]
    return any(term.get_type_name() == "ReadValue" for term in terms)
