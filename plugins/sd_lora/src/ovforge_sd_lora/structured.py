"""Kinds that add a structured matrix to a weight, or scale it, as published. Pure functions of float32 arrays.

A weight is in torch's layout, (out, in, ...); each `delta_*` returns what is added to it at strength 1, each `check_*`
raises Misshapen for tensors that do not fit it, from shapes alone; a `bias_*` returns what is added to the bias.
Sources: (IA)3: Liu et al. 2022, arXiv 2205.05638. GLoRA: Chavan et al. 2023, arXiv 2306.07967. VeRA: Kopiczko et al.
2023, arXiv 2310.11454. RandLoRA: Albert et al. 2025, arXiv 2502.00987. FourierFT: Gao et al. 2024, arXiv 2405.03003.
MiSS: Kang and Yin 2024, arXiv 2409.15371. SHiRA: Bhardwaj et al. 2024, arXiv 2406.13175. C3A: Chen et al. 2024, arXiv
2407.19342. DeLoRA: Bini et al. 2025, arXiv 2503.18225. HiRA: Huang et al. 2025 (ICLR). GraLoRA: Jung et al. 2025, arXiv
2505.20355. PiSSA: Meng et al. 2024, arXiv 2404.02948. OLoRA: Büyükakyüz 2024, arXiv 2406.01775.
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


def initial(weight: Array, start: str, rank: int, factor: float) -> Array:
    """Return what training took out of a linear layer's weight at its start, so that the adapter stands for it.

    PiSSA takes the `rank` largest singular values; OLoRA `factor` times the first rows of the QR decomposition. Both
    are a projection of the weight, which is the same whichever signs a decomposition chooses.
    """
    whole = weight.astype(np.float64)
    if start == "olora":
        basis = np.linalg.qr(whole[:, :rank])[0]
        return (factor * basis @ (basis.T @ whole)).astype(np.float32)
    if len(whole) > whole.shape[1]:
        return initial(weight.T, start, rank, factor).T
    basis = np.linalg.eigh(whole @ whole.T)[1][:, -rank:]
    return (basis @ (basis.T @ whole)).astype(np.float32)


def check_ia3(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    shape = shapes["ia3_l"]
    inner = _scales_inputs(shape, weight, settings)
    if math.prod(shape) != weight[inner]:
        raise Misshapen(f"{math.prod(shape)} scales for a layer of {list(weight)}")


def delta_ia3(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return W l - W for a scale of each output or each input: PEFT's (IA)3."""
    scale = tensors["ia3_l"]
    return weight * (_along(scale, weight, _scales_inputs(scale.shape, weight.shape, settings)) - 1)


def bias_ia3(weight: Array, bias: Array, tensors: Tensors, settings: Settings) -> Array:
    scale = tensors["ia3_l"]
    if _scales_inputs(scale.shape, weight.shape, settings):
        return np.zeros_like(bias)
    return bias * (scale.reshape(-1) - 1)


def _scales_inputs(shape: Shape, weight: Shape, settings: Settings) -> int:
    """Return 1 where a vector scales inputs, 0 where outputs: (1, in) or (out, 1) of linear layers tell it."""
    if len(weight) == 2 and len(shape) == 2 and shape[0] != shape[1]:
        return int(shape[0] == 1)
    return int(settings["inputs"])


def check_ia3_lycoris(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    if math.prod(shapes["ia3_w"]) not in weight[:2]:
        raise Misshapen(f"{math.prod(shapes['ia3_w'])} scales for a layer of {list(weight)}")
    if math.prod(shapes["on_input"]) != 1:
        raise Misshapen("on_input is not one number")


def delta_ia3_lycoris(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return W l for a scale of each output or each input, around 0: the (IA)3 of LyCORIS."""
    inputs = int(bool(tensors["on_input"].reshape(-1)[0]))
    if tensors["ia3_w"].size != weight.shape[inputs]:
        raise Misshapen(
            f"{tensors['ia3_w'].size} scales for {weight.shape[inputs]} {'inputs' if inputs else 'outputs'}"
        )
    return weight * _along(tensors["ia3_w"], weight, inputs)


def check_glora(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    if len(weight) != 2:
        raise Misshapen("PEFT's GLoRA is for linear layers")
    out, inner = weight
    wanted = {"A": (out, inner), "B": (out, inner), "C": (inner, 1), "D": (out,), "E": (out,)}
    for letter, whole in wanted.items():
        made = _path_shape(shapes, f"glora_{letter}")
        vector = (whole[0], 1) if len(whole) == 2 else whole
        if made not in (None, (1,), vector, whole):
            raise Misshapen(f"glora_{letter} makes {list(made)}, and the layer is {list(weight)}")


def delta_glora(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return W A + B, elementwise: PEFT's GLoRA."""
    return weight * _path(tensors, "glora_A") + np.broadcast_to(_path(tensors, "glora_B"), weight.shape)


def bias_glora(weight: Array, bias: Array, tensors: Tensors, settings: Settings) -> Array:
    added = bias * _path(tensors, "glora_D").reshape(-1) + _path(tensors, "glora_E").reshape(-1)
    towards = np.broadcast_to(_path(tensors, "glora_C"), (weight.shape[1], 1))
    total: Array = added + (weight @ towards).reshape(-1)
    return total


def _path(tensors: Tensors, name: str) -> Array:
    """Return what one path of GLoRA makes: a product, a vector, a number, or nothing."""
    if f"{name}.Xd" in tensors:
        return tensors[f"{name}.Xd"] @ tensors[f"{name}.Xu"]
    return tensors.get(f"{name}.X", np.zeros(1, np.float32))


def _path_shape(shapes: Shapes, name: str) -> Shape | None:
    if f"{name}.Xd" in shapes or f"{name}.Xu" in shapes:
        left, right = shapes.get(f"{name}.Xd", ()), shapes.get(f"{name}.Xu", ())
        if len(left) != 2 or len(right) != 2 or left[1] != right[0]:
            raise Misshapen(f"{name} has factors of {list(left)} and {list(right)}")
        return (left[0], right[1])
    return shapes.get(f"{name}.X")


def check_glora_lycoris(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    inner, out = weight[1], weight[0]
    a1, a2, b1, b2 = (shapes[name] for name in ("a1", "a2", "b1", "b2"))
    rank = a2[0] if a2 else 0
    fits = len(a1) >= 2 and len(a2) >= 2 and a1[:2] == (inner, rank) and a2[:2] == (rank, inner)
    fits = fits and math.prod(a1) == math.prod(a2) == inner * rank and len(b1) >= 2 and len(b2) >= 2
    if "bm" in shapes:
        fits = fits and shapes["bm"] == (b1[1], b2[0], *weight[2:]) and math.prod(b2) == b2[0] * inner
    else:
        fits = fits and b1[1] == b2[0] and math.prod(b2) == b2[0] * math.prod(weight[1:])
    if not fits or math.prod(b1) != out * b1[1]:
        raise Misshapen(f"factors of {list(a1)}, {list(a2)}, {list(b1)} and {list(b2)} do not fit {list(weight)}")
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        raise Misshapen(f"alpha is {list(shapes['alpha'])}, not one number")


def delta_glora_lycoris(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return alpha / rank * (W a1 a2 + b1 b2): the GLoRA of LyCORIS."""
    a1, a2, b1, b2 = (tensors[name].reshape(len(tensors[name]), -1) for name in ("a1", "a2", "b1", "b2"))
    taps = np.moveaxis(weight, 1, -1)  # (out, ..., in)
    inner = np.moveaxis((taps @ a1) @ a2, -1, 1)
    outer: NDArray[Any]
    if "bm" in tensors:
        outer = np.moveaxis(np.tensordot(b1, np.tensordot(tensors["bm"], b2, axes=(1, 0)), axes=(1, 0)), -1, 1)
    else:
        outer = (b1 @ b2).reshape(weight.shape)
    alpha = float(tensors["alpha"].reshape(())) if "alpha" in tensors else len(a2)
    total: Array = np.asarray((inner + outer) * np.float32(alpha / len(a2)), np.float32)
    return total


def check_vera(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    rank = math.prod(shapes["vera_lambda_d"])
    if math.prod(shapes["vera_lambda_b"]) != weight[0] or not rank:
        raise Misshapen(f"{math.prod(shapes['vera_lambda_b'])} scales for {weight[0]} outputs")
    if "seed" in settings:
        if "widest" not in settings:
            raise Misshapen("its projections are not in the file, and the model lacks layers that give them their size")
        return
    a, b = shapes["vera_A"], shapes["vera_B"]
    if not (len(a) == len(b) == 2 and a[0] == b[1] == rank and a[1] >= weight[1] and b[0] >= weight[0]):
        raise Misshapen(f"projections of {list(a)} and {list(b)} do not fit {list(weight)}")


def delta_vera(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return diag(b) B diag(d) A of the A and B that all layers share, cut to this one; from the file, or drawn."""
    scale = tensors["vera_lambda_d"].reshape(-1, 1)
    if "seed" in settings:
        a, b = vera_projections(settings["seed"], len(scale), settings["widest"])
    else:
        a, b = tensors["vera_A"], tensors["vera_B"]
    product: Array = (tensors["vera_lambda_b"].reshape(-1, 1) * b[: len(weight)]) @ (scale * a[:, : weight.shape[1]])
    return product


def vera_projections(seed: int, rank: int, widest: tuple[int, int]) -> tuple[Array, Array]:
    """Return the A (rank, in) and B (out, rank) that PEFT draws for layers of at most `widest`, (out, in).

    They are uniform, by Kaiming's bound, from torch's generator: 24 bits of each of its numbers.
    """
    out, inner = widest
    drawn = np.random.RandomState(seed % 2**32).randint(0, 2**32, rank * (inner + out), np.uint32)
    parts = np.split((drawn & 0xFFFFFF) * 2.0**-24, [rank * inner])
    a, b = (
        part * 2 * float(bound) - float(bound)
        for part, bound in zip(parts, (np.float32(math.sqrt(6 / inner)), np.float32(math.sqrt(6 / rank))), strict=True)
    )
    return a.astype(np.float32).reshape(rank, inner), b.astype(np.float32).reshape(out, rank)


def check_randlora(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    a, b, scale, gamma = (shapes[f"randlora_{name}"] for name in ("A", "B", "lambda", "gamma"))
    if not (len(a) == len(b) == 3 and len(scale) == len(gamma) == 2):
        raise Misshapen("its factors have other dimensions than RandLoRA's")
    (rank, bases), small, large = scale, min(weight), max(weight)
    fits = a[0] == b[2] == rank and a[1] in (1, bases) and b[1] >= bases and a[2] >= small and b[0] >= large
    if not fits or gamma != (bases, small):
        raise Misshapen(f"bases of {list(a)} and {list(b)} do not fit {list(weight)}")


def delta_randlora(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return the sum over n of B_n diag(lambda_n) A_n diag(gamma_n), of the file's shared A and B, cut to the layer."""
    scale, gamma = tensors["randlora_lambda"], tensors["randlora_gamma"]
    bases, small, large = len(gamma), min(weight.shape), max(weight.shape)
    inner = scale[:, :, None] * tensors["randlora_A"][:, :, :small] * gamma[None]
    # PEFT pairs the ranks of one with the bases of the other as they lie in memory.
    product = tensors["randlora_B"][:large, :bases].reshape(large, -1) @ inner.reshape(-1, small)
    whole = product if weight.shape[1] == small else product.T
    return np.float32(settings["factor"]) * whole


def check_fourier(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    if not 0 < math.prod(shapes["fourierft_spectrum"]) <= math.prod(weight):
        raise Misshapen(f"{math.prod(shapes['fourierft_spectrum'])} frequencies for a layer of {list(weight)}")


def delta_fourier(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return the inverse Fourier transform of a few frequencies, whose places a seed chooses."""
    spectrum = tensors["fourierft_spectrum"].reshape(-1)
    places = first_of_permutation(weight.size, len(spectrum), settings["seed"])
    whole = np.zeros(weight.size, np.float32)
    whole[places] = spectrum
    changed: Array = (np.fft.ifft2(whole.reshape(weight.shape)).real * settings["factor"]).astype(np.float32)
    return changed


def first_of_permutation(size: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the first `count` numbers of torch.randperm(size) with a CPU generator of that seed."""
    drawn = np.random.RandomState(seed % 2**32).randint(0, 2**32, count, np.uint32).astype(np.int64)
    moved: dict[int, int] = {}
    found = np.empty(count, np.int64)
    for place in range(count):
        other = place + int(drawn[place]) % (size - place)
        found[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    return found


def check_miss(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    block, form = shapes["miss_block"], settings["form"]
    if form == "bat":
        side = block[-1]
        fits = len(block) == 3 and block[1] == side and block[0] * side == weight[0] and weight[1] % side == 0
    else:
        fits = len(block) == 2 and block[0] <= weight[1] and weight[0] % block[1] == 0
        fits = fits and (form == "mini" or block[1] == weight[0])
    if not fits:
        raise Misshapen(f"shards of {list(block)} do not fit {list(weight)}")


def delta_miss(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return one shard for every `rank` inputs; in the form "bat" W D + D for blocks D of a side."""
    block = tensors["miss_block"]
    out, inner = weight.shape
    if settings["form"] != "bat":
        every = np.tile(block, (1, out // block.shape[1]))
        return np.ascontiguousarray(every[np.arange(inner) % len(block)].T)
    side = block.shape[-1]
    parts = weight.reshape(out // side, side, inner // side, side).transpose(2, 0, 1, 3)
    return (parts @ block + block).transpose(1, 2, 0, 3).reshape(weight.shape)


def check_shira(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    if shapes["shira_indices"] != (2, math.prod(shapes["shira_weight"])):
        raise Misshapen(f"places of {list(shapes['shira_indices'])} for {math.prod(shapes['shira_weight'])} numbers")


def delta_shira(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return a sparse matrix: numbers and their places."""
    rows, columns = tensors["shira_indices"].astype(np.int64)
    if (rows < 0).any() or (columns < 0).any() or (rows >= weight.shape[0]).any() or (columns >= weight.shape[1]).any():
        raise Misshapen(f"a place outside of {list(weight.shape)}")
    added = np.zeros(weight.shape, np.float32)
    np.add.at(added, (rows, columns), tensors["shira_weight"].reshape(-1))
    return added


def check_c3a(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    kernel = shapes["c3a_kernel"]
    if len(kernel) != 3 or (kernel[0] * kernel[2], kernel[1] * kernel[2]) != tuple(weight):
        raise Misshapen(f"circulant blocks of {list(kernel)} do not fit {list(weight)}")


def delta_c3a(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return a matrix of circulant blocks, divided by the number of inputs."""
    kernel = tensors["c3a_kernel"]
    side = np.arange(kernel.shape[2])
    blocks = kernel[:, :, (side[None, :] - side[:, None]) % len(side)]  # (outer, inner, row, column)
    return blocks.transpose(0, 2, 1, 3).reshape(weight.shape) / np.float32(weight.shape[1])


def check_delora(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _product(shapes["delora_A"], shapes["delora_B"], weight)
    if math.prod(shapes["delora_lambda"]) != 1 or math.prod(shapes["delora_w_norm"]) != weight[1]:
        raise Misshapen(f"{math.prod(shapes['delora_w_norm'])} norms for a layer of {list(weight)}")


def delta_delora(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return B diag(lambda / (rank |A| |B|)) A, times the norm that each input's weights had."""
    a, b = tensors["delora_A"], tensors["delora_B"]
    norms = np.maximum(np.linalg.norm(a, axis=1), 1e-4) * np.maximum(np.linalg.norm(b, axis=0), 1e-4)
    strength = tensors["delora_lambda"].reshape(()) / len(a) / norms
    product: Array = ((b * strength) @ a) * tensors["delora_w_norm"].reshape(-1)
    return product


def check_hira(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _product(shapes["hira_A"], shapes["hira_B"], weight)


def delta_hira(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return W (B A), multiplied elementwise."""
    a, b = (tensors[name].reshape(len(tensors[name]), -1) for name in ("hira_A", "hira_B"))
    return weight * (b @ a).reshape(weight.shape)


def check_gralora(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    _linear(weight)
    a, b = shapes["gralora_A"], shapes["gralora_B"]
    fits = len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1] and a[2] % a[0] == 0
    if not fits or (a[0] * a[1], b[0] * b[2]) != (weight[1], weight[0]):
        raise Misshapen(f"blocks of {list(a)} and {list(b)} do not fit {list(weight)}")
    general = [shapes.get(f"gralora_{name}_general") for name in "AB"]
    if None in general and general != [None, None]:
        raise Misshapen("it has one of the general factors, and needs both or none")
    if general[0] is not None and general[1] is not None:
        _product(general[0], general[1], weight)


def delta_gralora(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return low-rank products of blocks, and with general factors one of the whole layer."""
    a, b = tensors["gralora_A"], tensors["gralora_B"]
    count, rank = len(a), a.shape[2]
    a = a.reshape(count, -1, count, rank // count)  # (from, input, to, rank)
    b = b.reshape(count, count, rank // count, -1)  # (to, from, rank, output)
    added = np.einsum("nisu,snuo->soni", a, b, optimize=True).reshape(weight.shape)
    if "gralora_A_general" in tensors:
        added = added + tensors["gralora_B_general"] @ tensors["gralora_A_general"]
        rank += len(tensors["gralora_A_general"])
    whole: Array = added * np.float32(settings["alpha"] / rank)
    return whole


def check_replaced(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    if "new" in shapes and math.prod(shapes["new"]) != math.prod(weight):
        raise Misshapen(f"a weight of {list(shapes['new'])} for a layer of {list(weight)}")
    if "new_b" in shapes and math.prod(shapes["new_b"]) != weight[0]:
        raise Misshapen(f"a bias of {list(shapes['new_b'])}, and the layer has {weight[0]} outputs")


def delta_replaced(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return what makes a weight the one in the file, which was trained as a whole."""
    return tensors["new"].reshape(weight.shape) - weight


def bias_replaced(weight: Array, bias: Array, tensors: Tensors, settings: Settings) -> Array:
    return tensors["new_b"].reshape(-1) - bias


def check_norm(shapes: Shapes, weight: Shape, settings: Settings) -> None:
    if shapes["scale"] != weight:
        raise Misshapen(f"a norm of {list(shapes['scale'])} for a layer of {list(weight)}")


def delta_norm(weight: Array, tensors: Tensors, settings: Settings) -> Array:
    """Return what makes the scales of a norm those in the file."""
    return tensors["scale"] - weight


def _along(scale: Array, weight: Array, axis: int) -> Array:
    return scale.reshape([-1 if n == axis else 1 for n in range(weight.ndim)])


def _linear(weight: Shape) -> None:
    if len(weight) != 2:
        raise Misshapen(f"it is for linear layers, and the layer is {list(weight)}")


def _product(a: Shape, b: Shape, weight: Shape) -> None:
    fits = len(a) >= 2 and len(b) >= 2 and a[0] == b[1] and math.prod(b) == b[0] * b[1]
    if not fits or b[0] != weight[0] or math.prod(a[1:]) != math.prod(weight[1:]):
        raise Misshapen(f"factors of {list(a)} and {list(b)} do not fit {list(weight)}")
