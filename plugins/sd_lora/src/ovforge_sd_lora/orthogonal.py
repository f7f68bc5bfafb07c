"""Kinds that turn or mirror a weight: OFT, BOFT, HRA and RoAd, as published. Pure functions of float32 arrays.

A weight is in torch's layout, (out, in, ...); each `delta_*` returns what is added to it at strength 1, each `check_*`
raises Misshapen for tensors that do not fit it, from shapes alone. Sources: OFT: Qiu et al. 2023, arXiv 2306.07280.
BOFT: Liu et al. 2023, arXiv 2311.06243. HRA: Yuan et al. 2024, arXiv 2405.17484. RoAd: Liao and Monz 2024, arXiv
2409.00119. PEFT's OFT and BOFT turn the inputs, those of LyCORIS and kohya the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge_sd_lora.kinds import Misshapen

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Mapping[str, Array]
Settings = Mapping[str, Any]


def check_oft(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    rows, size = _two(shapes["oft_R"])
    if math.prod(weight[2:]) > 1:
        raise Misshapen("PEFT's OFT of a kernel: peft 0.21 trains it in one form and merges it in another")
    block, inner = _oft_block(size), math.prod(weight[1:])
    if block * (block - 1) // 2 != size or inner % block or rows != (1 if settings["share"] else inner // block):
        raise Misshapen(f"{rows} rotations of {size} numbers do not fit {inner} inputs")


def delta_oft(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return W (R - 1) for block-diagonal rotations R of the inputs: PEFT's OFT."""
    numbers = tensors["oft_R"]
    block = _oft_block(numbers.shape[1])
    skew = np.zeros((len(numbers), block, block), np.float32)
    skew[:, *np.triu_indices(block, 1)] = numbers
    skew -= skew.transpose(0, 2, 1)
    if settings["constraint"]:  # COFT: a rotation is kept near to none
        bound = settings["constraint"] / math.sqrt(len(skew))
        norm = np.linalg.norm(skew, axis=(1, 2), keepdims=True)
        skew = np.where(norm <= bound, skew, bound * skew / np.maximum(norm, np.finfo(np.float32).tiny))
    turned = _neumann(skew, settings["terms"]) if settings["terms"] else _cayley(-skew)
    blocks = weight.reshape(len(weight), -1, block).transpose(1, 0, 2) @ turned.transpose(0, 2, 1)
    return blocks.transpose(1, 0, 2).reshape(weight.shape) - weight


def check_boft(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    stages, *blocks = shapes["boft_R"] if len(shapes["boft_R"]) == 4 else (0, 0, 0, 0)
    inner = math.prod(weight[1:])
    if not stages or blocks[1] != blocks[2] or blocks[0] * blocks[1] != inner:
        raise Misshapen(f"rotations of {list(shapes['boft_R'])} do not fit {inner} inputs")
    if stages > 1 and (blocks[1] % 2 or stages > blocks[0].bit_length() or blocks[0] % 2 ** (stages - 1)):
        raise Misshapen(f"{stages} butterfly factors of {blocks} do not fit {inner} inputs")
    _size(shapes, "boft_s", weight[0])


def delta_boft(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return s W R - W for rotations R of the inputs and a scale of each output: PEFT's BOFT.

    R is a butterfly: each factor is block-diagonal, and mixes inputs that are farther apart than those of the one
    before it.
    """
    blocks = tensors["boft_R"]
    turned = _cayley(0.5 * (blocks.swapaxes(-1, -2) - blocks))
    _, count, size, _ = blocks.shape
    rows = weight.reshape(len(weight), -1).T
    for stage, turn in enumerate(turned):
        order = np.arange(count * size)
        if stage:
            order = order.reshape(count >> stage, -1, 2, size // 2).swapaxes(1, 2).reshape(-1)
        mixed = np.empty_like(rows)
        mixed[order] = rows
        rows = (turn @ mixed.reshape(count, size, -1)).reshape(rows.shape)[order]
    scaled: Array = rows.T * tensors["boft_s"].reshape(-1, 1)
    return scaled.reshape(weight.shape) - weight


def check_outer(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    blocks = shapes["oft_blocks"]
    if len(blocks) not in (3, 4) or blocks[-1] != blocks[-2] or blocks[-3] * blocks[-1] != weight[0]:
        raise Misshapen(f"rotations of {list(blocks)} do not fit {weight[0]} outputs")
    stages = len(blocks) == 4 and blocks[0]
    if stages and (blocks[-1] % 2 or weight[0] % (2 ** (stages - 1) * blocks[-1])):
        raise Misshapen(f"{stages} butterfly factors of {list(blocks[1:])} do not fit {weight[0]} outputs")
    if "rescale" in shapes:
        _size(shapes, "rescale", weight[0])
    if "alpha" in shapes:
        _size(shapes, "alpha", 1)


def delta_outer(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return s R W - W for rotations R of the outputs: OFT and BOFT of LyCORIS, and kohya's OFT.

    Three dimensions of blocks are one block-diagonal R; four are a butterfly: each stage mixes farther outputs.
    `alpha`, times the number of outputs, bounds the norm of all generators together.
    """
    blocks = tensors["oft_blocks"]
    skew = blocks - blocks.swapaxes(-1, -2)
    bound = float(tensors["alpha"].reshape(())) * len(weight) if "alpha" in tensors else 0.0
    norm = float(np.linalg.norm(skew)) + 1e-8
    if 0 < bound < norm:
        skew = skew * np.float32(bound / norm)
    turned, size = _cayley(skew), blocks.shape[-1]
    rows = weight.reshape(len(weight), -1)
    if blocks.ndim == 3:
        rows = (turned.swapaxes(-1, -2) @ rows.reshape(-1, size, rows.shape[1])).reshape(rows.shape)
    else:
        for stage, turn in enumerate(turned):
            step = 2**stage * size // 2
            mixed = rows.reshape(-1, 2, step, rows.shape[1]).swapaxes(1, 2).reshape(-1, size, rows.shape[1])
            mixed = (turn @ mixed).reshape(-1, step, 2, rows.shape[1])
            rows = mixed.swapaxes(1, 2).reshape(rows.shape)
    if "rescale" in tensors:
        rows = rows * tensors["rescale"].reshape(-1, 1)
    return rows.reshape(weight.shape) - weight


def check_hra(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    if _two(shapes["hra_u"])[0] != math.prod(weight[1:]):
        raise Misshapen(f"mirrors of {shapes['hra_u'][0]} inputs, and the layer has {math.prod(weight[1:])}")


def delta_hra(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return W H - W for a chain H of Householder reflections of the inputs."""
    flat = weight.reshape(len(weight), -1)
    vectors = tensors["hra_u"]
    if settings["orthogonal"]:  # Gram-Schmidt makes them one reflection
        found: list[Array] = []
        for vector in vectors.T:
            for other in found:
                vector = vector - (other @ vector) * other
            found.append(_unit(vector))
        basis = np.stack(found, axis=1)
        changed = -2 * (flat @ basis) @ basis.T
    else:
        turned: NDArray[Any] = flat
        for vector in vectors.T:
            unit = _unit(vector)
            turned = turned - 2 * np.outer(turned @ unit, unit)
        changed = turned - flat
    result: Array = np.asarray(changed.reshape(weight.shape), np.float32)
    return result


def check_road(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    group = settings["group"]
    if group % 2 or weight[0] % group or settings["variant"] not in _ROAD:
        raise Misshapen(f"{settings['variant']} with groups of {group} does not fit {weight[0]} outputs")
    for name in ("road_theta", "road_alpha"):
        _size(shapes, name, int(weight[0] * _ROAD[settings["variant"]]))


def delta_road(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return R W - W for rotations, scaled, of pairs of outputs."""
    flat = weight.reshape(len(weight), -1)
    first, second = _road_columns(tensors["road_theta"], tensors["road_alpha"], settings)
    halves = flat.reshape(-1, 2, settings["group"] // 2, flat.shape[1])
    swapped = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(flat.shape)
    return (first[:, None] * flat + second[:, None] * swapped - flat).reshape(weight.shape)


def bias_road(weight: Array, bias: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return what is added to the bias: it is an output, too."""
    return delta_road(bias.reshape(-1, 1), tensors, settings).reshape(-1)


_ROAD = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""Variant -> numbers for each output."""


def _road_columns(theta: Array, alpha: Array, settings: Settings) -> tuple[Array, Array]:
    """Return, for each output, what it keeps of itself and what it takes from the other one of its pair."""
    group = settings["group"]
    if settings["variant"] == "road_4":
        (one, other), (cosine, sine) = (value.reshape(-1, 2, group).swapaxes(0, 1) for value in (alpha, theta))
        return (one * np.cos(cosine)).reshape(-1), (other * np.sin(sine)).reshape(-1)
    if settings["variant"] == "road_1":
        theta, alpha = (value.reshape(-1, group // 2).repeat(2, axis=0).reshape(-1) for value in (theta, alpha))
    return alpha * np.cos(theta), alpha * np.sin(theta)


def _oft_block(numbers: int) -> int:
    """Return the side of a skew-symmetric matrix by how many numbers are above its diagonal."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def _cayley(skew: Array) -> Array:
    """Return (1 + Q) (1 - Q)^-1 of skew-symmetric matrices Q: rotations."""
    one = np.eye(skew.shape[-1], dtype=np.float32)
    # X (1 - Q) = 1 + Q, transposed; Q' = -Q.
    return np.linalg.solve(one + skew, one - skew).swapaxes(-1, -2)


def _neumann(skew: Array, terms: int) -> Array:
    """Return PEFT's series for the same: 1 + 2 Q + 2 Q^2 + ..., whose last power counts once."""
    total = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape).copy()
    if terms > 1:
        total += 2 * skew
    if terms > 2:
        power = skew @ skew
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total += 2 * power
        total += power @ skew
    return total


def _unit(vector: Array) -> Array:
    length = np.linalg.norm(vector)
    if not length:
        raise Misshapen("a reflection has the direction 0")
    unit: Array = vector / length
    return unit


def _two(shape: Shape) -> Shape:
    if len(shape) != 2:
        raise Misshapen(f"a matrix of {list(shape)}")
    return shape


def _size(shapes: Shapes, name: str, wanted: int) -> None:
    if math.prod(shapes[name]) != wanted:
        raise Misshapen(f"{name} is {list(shapes[name])}, and the layer needs {wanted} numbers")
