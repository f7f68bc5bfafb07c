"""Adapters into weights: each changed weight is stored again in the type that it had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge_sd_lora import kinds
from ovforge_sd_lora.adapter import Module
from ovforge_sd_lora.relative import RELATIVE
from ovforge_sd_lora.requantize import requantize
from ovforge_sd_lora.structured import initial
from ovforge_sd_lora.sums import Room, add_product
from ovforge_sd_lora.targets import Target, behind, plain_constant, stored_nodes, weight_of

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["Opened", "after", "bias_difference", "difference", "fuse", "store"]

Array = NDArray[np.float32]

_LARGEST = {"f16": 65504.0, "bf16": 3.38e38, "f32": 3.4e38}


@dataclass(frozen=True)
class Opened:
    """A compressed weight that was changed: the type that it had; where it was quantized again, what that rounded.

    `rounded` and `changed` are sums of squares: stored minus wanted, and wanted minus what it was.
    """

    kind: str
    rounded: float = 0.0
    changed: float = 0.0


def changed_weight(weight: Array, module: Module, strength: float) -> Array:
    """Return a weight, in torch's layout, with a module applied at a strength. Float32.

    All but norms that are replaced are linear in it: DoRA and rotations, too, go straight from the weight to what they
    make of it.
    """
    return weight + np.float32(module.strength(strength)) * difference(weight, module)


def difference(weight: Array, module: Module) -> Array:
    """Return what a module adds to a weight at strength 1; of relative kinds, that depends on the weight.

    Raises ModelError if a relative kind's numbers, which only now are read, do not fit it.
    """
    if module.kind in RELATIVE:
        try:
            return RELATIVE[module.kind].delta(weight, module.tensors(), module.settings)
        except (kinds.Misshapen, np.linalg.LinAlgError) as error:
            raise ModelError(
                f"{module.name}: {error}", where=module.file.where, hint="The file is damaged: fetch it again."
            ) from error
    added = module.delta().reshape(weight.shape)
    begun = weight
    if module.start:
        begun = weight - initial(weight, module.start, module.rank or 1, module.factor)
    if not module.dora:
        return added + begun - weight if module.start else added
    by_input, magnitude = magnitudes(module)
    return kinds.decompose(begun, added, magnitude, by_input=by_input) - weight


def bias_difference(module: Module, bias: Callable[[], Array], weight: Callable[[], Array]) -> Array:
    """Return what a module adds to a bias at strength 1; relative kinds ask for the layer's bias and weight."""
    if module.kind in RELATIVE:
        change = RELATIVE[module.kind].bias
        assert change is not None
        return change(weight(), bias(), module.tensors(), module.settings)
    return module.delta().reshape(-1)


def magnitudes(module: Module) -> tuple[bool, Array]:
    """Return (whether they are the inputs', DoRA's magnitudes). PEFT has those of outputs alone."""
    value = module.file.read(module.keys["dora_scale" if "dora_scale" in module.keys else "magnitude"])
    return module.by_input, value if module.by_input else module.own(value)


def fuse(target: Target, modules: Iterable[tuple[Module, float]], room: Room, again: bool = False) -> Opened | None:
    """Change a layer's weight and bias by modules, each at its strength.

    Returns what was a compressed weight, which is now float16, or with `again` compressed as before; else None.
    Raises ModelError if the result does not fit the weight's type.
    """
    opened = None
    pairs = list(modules)
    weights = [(module, strength) for module, strength in pairs if not module.on_bias]
    biases = [  # before the weight is changed, which some are made from
        np.float32(strength) * bias_difference(module, target.bias, target.weight)
        for module, strength in pairs
        if module.on_bias
    ]
    while weights and _add_low_rank(target, *weights[0], room):
        weights = weights[1:]
    if weights:
        opened = _change(target, weights, again)
    added = np.sum(biases, axis=0) if biases else np.zeros(1, np.float32)
    if added.any():
        _add_bias(target, added)
    return opened


def _change(target: Target, weights: Sequence[tuple[Module, float]], again: bool) -> Opened | None:
    before = value = target.weight()
    for module, strength in weights:
        value = changed_weight(value, module, strength)
    ports = target.weight_inputs()
    if not ports:
        for node in target.nodes:
            after(node, "Multiply", value)
        return None
    stored = value.T if target.transposed else value
    if not target.compressed:
        store(ports, stored, target.path)
        return None
    kind = _stored_type(ports[0].get_source_output())
    if not again:
        store(ports, stored, target.path)
        return Opened(kind)
    requantize(ports, stored, target.path)
    return Opened(kind, _squares(target.weight() - value), _squares(value - before))


def _squares(value: Array) -> float:
    return float(np.square(value, dtype=np.float64).sum())


def _add_low_rank(target: Target, module: Module, strength: float, room: Room) -> bool:
    """Add a plain LoRA to a plain weight, as most are; say whether it was one."""
    ports = target.weight_inputs()
    constant = plain_constant(ports[0].get_source_output()) if ports else None
    if constant is None or module.kind != "LoRA" or module.relative or "mid" in module.keys:
        return False
    tensors = module.tensors()
    up, down = (tensors[name].reshape(len(tensors[name]), -1) for name in ("up", "down"))
    up = module.own(up) * np.float32(strength * module.factor)
    kind = constant.get_element_type().get_type_name()
    total, largest = add_product(constant, *((down.T, up.T) if target.transposed else (up, down)), room)
    _check_range(largest, kind, target.path)
    _put(ports, total)
    return True


def _add_bias(target: Target, added: Array) -> None:
    ports = target.bias_inputs()
    if ports:
        store(ports, weight_of(ports[0].get_source_output()).reshape(-1) + added, target.path)
        return
    for node in target.nodes:
        if target.kind == "norm" and (weight := target.weight_inputs()):
            node = weight[0].get_node()
        after(behind(node), "Add", added.reshape(-1, 1, 1) if target.kind == "conv" else added)


def after(node: ov.Node, operation: str, value: Any, name: str = "/adapted") -> ov.Node:
    """Put an elementwise operation with `value`, an array or a node, behind a node; its users see the result.

    It is called as the node, with `name` at the end.
    """
    from openvino import opset13 as ops

    output = node.output(0)
    if isinstance(value, np.ndarray):
        value = _constant(value, output.get_element_type().get_type_name(), node.get_friendly_name())
    users = list(output.get_target_inputs())
    made = (ops.add if operation == "Add" else ops.multiply)(output, value)
    for user in users:
        user.replace_source_output(made.output(0))
    if any(user.get_node().get_type_name() == "Result" for user in users):  # the model's output keeps its name
        made.output(0).get_tensor().set_names(output.get_tensor().get_names())
        output.get_tensor().set_names(set())
    made.set_friendly_name(f"{node.get_friendly_name()}{name}")
    return made


def store(ports: Sequence[ov.Input], value: Array, where: str, *, reshaped: bool = False) -> None:
    """Give inputs a new constant of the type that they had; float16 where that was compressed.

    It has the shape of the old one, or its own if `reshaped`.
    """
    source = ports[0].get_source_output()
    plain = plain_constant(source)
    kind = plain.get_element_type().get_type_name() if plain is not None else "f16"
    shape = value.shape if reshaped else tuple(source.get_shape())
    _put(ports, _constant(value.reshape(shape), kind, where))


def _put(ports: Sequence[ov.Input], made: ov.Node) -> None:
    """Let inputs take a constant, through a Convert where they took one."""
    from openvino import opset13 as ops

    source = ports[0].get_source_output()
    plain = plain_constant(source)
    if plain is not None:
        made.set_friendly_name(plain.get_friendly_name())
    node = source.get_node()
    if plain is not None and node.get_type_name() == "Convert" and _alone(node, ports) and _users(plain) == 1:
        node.input(0).replace_source_output(made.output(0))
        return
    if source.get_element_type() != made.get_element_type():
        name = node.get_friendly_name()
        made = ops.convert(made, source.get_element_type())
        made.set_friendly_name(name)
    for port in ports:
        port.replace_source_output(made.output(0))


def _alone(node: ov.Node, ports: Sequence[ov.Input]) -> bool:
    """Say whether a node serves these inputs and no other."""
    return len(node.output(0).get_target_inputs()) == len(ports)


def _users(node: ov.Node) -> int:
    return len(node.output(0).get_target_inputs())


def _stored_type(source: ov.Output) -> str:
    """Return the type of the compressed numbers."""
    stored = [node for node in stored_nodes(source.get_node()) if node.get_type_name() == "Constant"]
    largest = max(stored, key=lambda node: int(np.prod(list(node.get_output_shape(0)))))
    return str(largest.get_element_type().get_type_name())


def _constant(value: Array, kind: str, where: str) -> ov.Node:
    """Return a constant of a type. Raises ModelError if a number is too large for it."""
    import openvino as ov
    from openvino import opset13 as ops

    _check_range(float(np.abs(value).max(initial=0)), kind, where)
    if kind == "bf16":  # round to nearest, ties to even
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        tensor = ov.Tensor(ov.Type.bf16, list(value.shape))
        tensor.data.view(np.uint16)[...] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return ops.constant(tensor, shared_memory=True)
    return ops.constant(np.ascontiguousarray(value, {"f16": np.float16, "f32": np.float32}[kind]))


def _check_range(largest: float, kind: str, where: str) -> None:
    """Refuse what a type cannot hold; NaN is larger than anything."""
    if not largest <= _LARGEST[kind]:
        raise ModelError(
            f"the changed weight has numbers up to {largest:g}, too large for {kind}",
            where=where,
            hint='Lower the adapter\'s scale, or convert the model with weights = "f32".',
        )
