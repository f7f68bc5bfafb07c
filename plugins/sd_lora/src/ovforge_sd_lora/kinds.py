"""The kinds of adapters: what each adds to a weight, as published. Pure functions of numpy arrays, float32.

Weights are in torch's layout: (out, in) of a linear layer, (out, in, height, width) of a convolution. Sources:
LoRA: Hu et al. 2021, arXiv 2106.09685. AdaLoRA: Zhang et al. 2023, arXiv 2303.10512. LoCon, LoHa, LoKr, and their
Tucker forms: Yeh et al. 2023 (LyCORIS), arXiv 2309.14859; LoHa after Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098.
DoRA: Liu et al. 2024, arXiv 2402.09353.
Names of tensors are those of the files of kohya-ss/sd-scripts, KohakuBlueleaf/LyCORIS and huggingface/peft.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FACTORS", "Misshapen", "decompose", "delta", "delta_shape", "factors", "kind_of", "rank_of"]

Array = NDArray[np.float32]
Shape = tuple[int, ...]

FACTORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "AdaLoRA": (("singular", "down", "up"), ()),
    "LoRA": (("down", "up"), ("mid",)),
    "LoHa": (("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2")),
    "LoKr": ((), ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
    "full": (("diff",), ()),
    "bias": (("diff_b",), ()),
}
"""Kind -> tensors that it must have, tensors that it may have."""

_INNER = {"LoRA": ("down",), "AdaLoRA": ("down",), "LoHa": ("w1_b",), "LoKr": ("lokr_w1_b", "lokr_w2_b")}
"""Kind -> tensors whose first side is the rank."""


class Misshapen(ValueError):
    """The factors of one module do not belong together; the message says why."""


def kind_of(names: set[str]) -> str:
    """Return the kind of a module's tensors. Raises Misshapen if some are missing."""
    kind = next((kind for kind, (needed, more) in FACTORS.items() if names & {*needed[:1], *more}), None)
    kind = kind or next((kind for kind, (needed, _) in FACTORS.items() if names & {*needed}), None)
    if kind is None:
        raise Misshapen(f"{', '.join(sorted(names))} alone change nothing")
    if missing := set(FACTORS[kind][0]) - names:
        raise Misshapen(f"it has no {', '.join(sorted(missing))}")
    if kind == "LoKr":
        for half in ("lokr_w1", "lokr_w2"):
            if half not in names and not {f"{half}_a", f"{half}_b"} <= names:
                raise Misshapen(f"it has neither {half} nor both its factors")
    if kind == "LoHa" and ("t1" in names) != ("t2" in names):
        raise Misshapen("it has one of t1 and t2, and needs both or none")
    return kind


def rank_of(kind: str, shapes: Mapping[str, Shape]) -> int | None:
    """Return the rank that alpha is divided by; None if alpha has no part in it."""
    return next((shapes[name][0] for name in _INNER.get(kind, ()) if shapes.get(name)), None)


def delta_shape(kind: str, shapes: Mapping[str, Shape]) -> Shape:
    """Return the shape of what is added, from the factors' shapes alone.

    Raises Misshapen if they do not fit each other: nothing has been read or multiplied by then.
    """
    if kind == "full":
        return shapes["diff"]
    if kind == "bias":
        return shapes["diff_b"]
    if kind == "AdaLoRA":
        singular, down = shapes["singular"], shapes["down"]
        _need(singular == (down[0], 1), "the singular values", singular, "down", down)
    if kind in ("LoRA", "AdaLoRA"):
        if "mid" in shapes:
            return _tucker_shape(shapes["mid"], _flat2(shapes["up"])[::-1], _flat2(shapes["down"]))
        up, down = shapes["up"], shapes["down"]
        _need(len(up) >= 2 and len(down) >= 2 and up[1] == down[0] and math.prod(up[2:]) == 1, "up", up, "down", down)
        return (up[0], *down[1:])
    if kind == "LoHa":
        halves = [
            _tucker_shape(shapes[f"t{n}"], shapes[f"w{n}_a"], shapes[f"w{n}_b"])
            if f"t{n}" in shapes
            else _product_shape(shapes[f"w{n}_a"], shapes[f"w{n}_b"])
            for n in (1, 2)
        ]
        _need(halves[0] == halves[1], "the first half", halves[0], "the second", halves[1])
        return halves[0]
    first = shapes.get("lokr_w1") or _product_shape(shapes["lokr_w1_a"], shapes["lokr_w1_b"])
    if "lokr_w2" in shapes:
        second = shapes["lokr_w2"]
    elif "lokr_t2" in shapes:
        second = _tucker_shape(shapes["lokr_t2"], shapes["lokr_w2_a"], shapes["lokr_w2_b"])
    else:
        second = _product_shape(shapes["lokr_w2_a"], shapes["lokr_w2_b"])
    _need(len(first) == 2 and len(second) >= 2, "lokr_w1", first, "lokr_w2", second)
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def delta(kind: str, tensors: Mapping[str, Array]) -> Array:
    """Return what is added to the weight at strength 1, before alpha / rank; its shape is `delta_shape`."""
    if kind in ("full", "bias"):
        return tensors["diff" if kind == "full" else "diff_b"]
    if kind == "LoRA":
        return _lora(tensors["down"], tensors["up"], tensors.get("mid"))
    if kind == "AdaLoRA":
        return _lora(tensors["down"] * tensors["singular"], tensors["up"], None)
    if kind == "LoHa":
        return _half(tensors, "w1", "t1") * _half(tensors, "w2", "t2")
    return _kron(*_lokr_halves(tensors))


def factors(kind: str, tensors: Mapping[str, Array], limit: int) -> tuple[Array, Array] | None:
    """Return (A, B) of the delta = B @ A, exact, where that has at most `limit` rows of A; else None.

    A is (rank, in) or, of a convolution, (rank, in, height, width); B is (out, rank). A Hadamard product of two rank-r
    matrices has rank r * r (its factors are row-wise Kronecker products), a Kronecker product the product of the ranks.
    """
    if kind == "LoRA":
        up = _flat2(tensors["up"])
        if "mid" in tensors:  # up @ mid are the columns; down is folded into the kernel
            return _kernel(tensors["mid"], _flat2(tensors["down"])), up
        return tensors["down"], up
    if kind == "AdaLoRA":
        return tensors["down"] * tensors["singular"], tensors["up"]
    if kind == "LoHa" and tensors["w1_b"].shape[0] * tensors["w2_b"].shape[0] <= limit:
        (a1, b1), (a2, b2) = (_columns(tensors, n) for n in (1, 2))
        rows = (a1[:, None] * a2[None, :]).reshape(-1, *a1.shape[1:])
        return rows, (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), -1)
    if kind == "LoKr":
        (a1, b1), (a2, b2) = _lokr_factors(tensors, "lokr_w1"), _lokr_factors(tensors, "lokr_w2")
        if a1.shape[0] * a2.shape[0] > limit:
            return None
        return _kron(a1, a2), np.kron(b1, b2)
    return None


def decompose(weight: Array, added: Array, magnitude: Array, *, by_input: bool) -> Array:
    """Return a weight after DoRA, direction and magnitude apart: magnitude * V / |V| with V = weight + added.

    |V| is the norm of each output, as in the paper, or with `by_input` of each input.
    """
    direction = weight + added
    axis = 1 if by_input else 0
    others = tuple(n for n in range(direction.ndim) if n != axis)
    norm = np.sqrt(np.square(direction, dtype=np.float32).sum(axis=others, keepdims=True))
    changed: Array = direction * (magnitude.reshape(norm.shape) / (norm + np.finfo(np.float32).eps))
    return changed


def _lora(down: Array, up: Array, mid: Array | None) -> Array:
    """Return up @ down; with a Tucker core `mid` (rank, rank, height, width) between them."""
    if mid is not None:
        return _tucker(mid, _flat2(up).T, _flat2(down))
    product: Array = _flat2(up) @ down.reshape(len(down), -1)
    return product.reshape(len(up), *down.shape[1:])


def _half(tensors: Mapping[str, Array], name: str, core: str) -> Array:
    """Return one half of a LoHa or LoKr: a @ b, or its Tucker form, in which `a` lies transposed."""
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    return _tucker(tensors[core], a, b) if core in tensors else _lora(b, a, None)


def _tucker(core: Array, a: Array, b: Array) -> Array:
    """Return the sum over i, j of core[i, j, ...] a[i, out] b[j, in]: (out, in, ...)."""
    kernel = _kernel(core, b)
    product: Array = np.tensordot(a, kernel, axes=(0, 0))
    return product


def _kernel(core: Array, b: Array) -> Array:
    """Return the sum over j of core[i, j, ...] b[j, in]: (i, in, ...)."""
    return np.moveaxis(np.tensordot(core, b, axes=(1, 0)), -1, 1)


def _columns(tensors: Mapping[str, Array], n: int) -> tuple[Array, Array]:
    """Return (A, B) of one half of a LoHa."""
    a, b = tensors[f"w{n}_a"], tensors[f"w{n}_b"]
    return (_kernel(tensors[f"t{n}"], b), a.T) if f"t{n}" in tensors else (b, a)


def _lokr_halves(tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    return tuple(
        tensors[name] if name in tensors else _half(tensors, name, core)
        for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2"))
    )  # type: ignore[return-value]


def _lokr_factors(tensors: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    """Return (A, B) of one half of a LoKr; a whole matrix stands in its smaller side."""
    if name not in tensors:
        a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
        return (_kernel(tensors["lokr_t2"], b), a.T) if "lokr_t2" in tensors and name == "lokr_w2" else (b, a)
    whole = tensors[name]
    out, inner = whole.shape[0], math.prod(whole.shape[1:])
    if out <= inner or whole.ndim > 2:
        return whole, np.eye(out, dtype=np.float32)
    return np.eye(inner, dtype=np.float32), whole


def _kron(first: Array, second: Array) -> Array:
    """Return the Kronecker product of a matrix with a matrix or a stack of kernels."""
    (a, b), (c, d, *kernel) = first.shape, second.shape
    product = np.einsum("ab,cd...->acbd...", first, second)
    return np.ascontiguousarray(product.reshape(a * c, b * d, *kernel))


def _flat2(value: Any) -> Any:
    """Return (rows, columns) of an array, or of a shape, whose further dimensions are 1."""
    shape = value if isinstance(value, tuple) else value.shape
    _need(len(shape) >= 2 and math.prod(shape[2:]) == 1, "a factor", shape, "two dimensions", shape[:2])
    return shape[:2] if isinstance(value, tuple) else value.reshape(shape[:2])


def _product_shape(a: Shape, b: Shape) -> Shape:
    _need(len(a) >= 2 and len(b) >= 2 and a[1] == b[0] and math.prod(a[2:]) == 1, "a", a, "b", b)
    return (a[0], *b[1:])


def _tucker_shape(core: Shape, a: Shape, b: Shape) -> Shape:
    _need(len(core) >= 2 and len(a) == len(b) == 2 and core[:2] == (a[0], b[0]), "core", core, "factors", (*a, *b))
    return (a[1], b[1], *core[2:])


def _need(fits: bool, one: str, shape: Shape, other: str, another: Shape) -> None:
    if not fits:
        raise Misshapen(f"{one} {list(shape)} does not fit {other} {list(another)}")
