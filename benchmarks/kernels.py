"""What other forms of the same arithmetic bring on this CPU: each beside the form that ovforge writes, taking turns.

    python benchmarks/kernels.py [--rounds 9] [--precision f32 bf16]

A self-attention of Stable Diffusion 1.5 at 512 pixels (4096 tokens, 8 heads of 40, with its projections), a residual
convolution block of its outermost level, and four pictures of the embedded model's UNet and decoder. Weights of the
first two are random. Times are processor time of all threads, the median of the rounds; the last column says how far
results are from the first form's, of their largest value.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

TOKENS, WIDTH, HEADS, SIZE = 4096, 320, 8, 40
RNG = np.random.default_rng(0)
Form = Callable[[], Any]
"""Runs once, and returns what was computed."""


# -- forms of an attention ------------------------------------------------------------------------------------------


def attention(size: int, *, joined: bool = False) -> ov.Model:
    """Return a self-attention whose heads are filled up with zeros to `size`; `joined`: q, k and v in one product."""
    rng = np.random.default_rng(1)
    x = ops.parameter([1, TOKENS, WIDTH], np.float32, name="x")
    weights = [rng.standard_normal((HEADS, SIZE, WIDTH), np.float32) * 0.05 for _ in range(3)]
    out = rng.standard_normal((WIDTH, HEADS, SIZE), np.float32) * 0.05
    filled = [np.pad(each, ((0, 0), (0, size - SIZE), (0, 0))).reshape(HEADS * size, WIDTH) for each in weights]
    if joined:
        whole = ops.matmul(x, ops.constant(np.concatenate(filled)), False, True)
        parts = ops.split(whole, ops.constant(np.int64(2)), 3).outputs()
    else:
        parts = [ops.matmul(x, ops.constant(each), False, True) for each in filled]
    heads = [
        ops.transpose(ops.reshape(part, np.array([0, 0, HEADS, size]), True), np.array([0, 2, 1, 3])) for part in parts
    ]
    scale = ops.constant(np.float32(SIZE**-0.5))
    zeros = ops.constant(np.zeros((), np.float32))
    mixed = ops.scaled_dot_product_attention(*heads, zeros, scale)
    rows = ops.reshape(ops.transpose(mixed, np.array([0, 2, 1, 3])), np.array([0, 0, HEADS * size]), True)
    back = np.pad(out, ((0, 0), (0, 0), (0, size - SIZE))).reshape(WIDTH, HEADS * size)
    return ov.Model([ops.result(ops.matmul(rows, ops.constant(back), False, True))], [x], "attention")


def convolutions(*, decomposed: bool = False) -> ov.Model:
    """Return GroupNorm, SiLU and a 3x3 convolution of 320 channels, twice, on 64x64 latents of two rows."""
    rng = np.random.default_rng(2)
    x = h = ops.parameter([2, WIDTH, 64, 64], np.float32, name="x")
    for _ in range(2):
        kernel = ops.constant(rng.standard_normal((WIDTH, WIDTH, 3, 3), np.float32) * 0.02)
        if decomposed:
            groups = ops.reshape(h, np.array([0, 32, -1]), True)
            normal = ops.mvn(groups, ops.constant(np.array([2])), True, 1e-5, "inside_sqrt")
            h = ops.reshape(normal, np.array([2, WIDTH, 64, 64]), False)
        else:
            ones, zeros = (ops.constant(np.full(WIDTH, value, np.float32)) for value in (1, 0))
            h = ov.opset12.group_normalization(h, ones, zeros, 32, 1e-5)
        h = ops.convolution(ops.swish(h), kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    return ov.Model([ops.result(ops.add(h, x))], [x], "block")


# -- measuring ------------------------------------------------------------------------------------------------------


def form(model: ov.Model, precision: str) -> Form:
    """Return a function that runs a model once on the same random input as its other forms."""
    request = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision}).create_infer_request()
    given = np.random.default_rng(3).standard_normal(list(model.input(0).shape), np.float32)
    return lambda: request.infer({0: given})[0].copy()


def four_pictures(role: str, precision: str) -> dict[str, Form]:
    """Return ways to run a model of the embedded pipeline for four pictures."""
    import ovforge

    bundle = ovforge.open_model("package:ovforge_lcm/model", cache=None)
    model, core = bundle.models[role], ov.Core()
    rng = np.random.default_rng(4)
    shapes = {"sample": [4, 4, 16, 16], "latent_sample": [4, 4, 16, 16], "timestep": [1]}
    given: dict[str, Any] = {}
    for port in model.inputs:
        name = next(iter(port.names))
        known = port.partial_shape
        shape = shapes.get(name) or [4, *(dim.get_length() if dim.is_static else 77 for dim in list(known)[1:])]
        values = rng.standard_normal(shape, np.float32) if shape != [1] else np.array([499.0], np.float32)
        given[name] = values.astype(port.element_type.to_dtype())
    hints = {"INFERENCE_PRECISION_HINT": precision}

    def compiled(rows: int, **more: Any) -> ov.CompiledModel:
        one = model.clone()
        one.reshape({name: [rows, *value.shape[1:]] if len(value) == 4 else [1] for name, value in given.items()})
        return core.compile_model(one, "CPU", {**hints, **more})

    def row(number: int) -> dict[str, Any]:
        return {name: value[number : number + 1] if len(value) == 4 else value for name, value in given.items()}

    whole, single, beside = compiled(4), compiled(1), compiled(1, NUM_STREAMS=2)
    together, alone = whole.create_infer_request(), single.create_infer_request()
    streams = [beside.create_infer_request() for _ in range(4)]

    def in_streams() -> Any:
        for number, request in enumerate(streams):
            request.start_async(row(number))
        for request in streams:
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request in streams])

    return {
        "one batch": lambda: together.infer(given)[0].copy(),
        "one after the other": lambda: np.concatenate([alone.infer(row(n))[0].copy() for n in range(4)]),
        "two streams": in_streams,
    }


def measure(what: str, forms: dict[str, Form], rounds: int, clock: Callable[[], float]) -> None:
    """Print a row for each form: its time, the share of the first form's, and how far results are from its."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    results = {name: each() for name, each in forms.items()}
    for _ in range(rounds):
        for name, each in forms.items():
            begun = clock()
            each()
            times[name].append(clock() - begun)
    first = next(iter(forms))
    for name in forms:
        away = np.abs(results[name] - results[first]).max() / np.abs(results[first]).max()
        share = median(times[name]) / median(times[first])
        print(f"| {what} | {name} | {median(times[name]) * 1e3:.1f} | {share:.2f} | {away:.1e} |", flush=True)


def main() -> None:
    """Measure all forms in each precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", nargs="*", default=["f32", "bf16"], choices=("f32", "bf16", "f16"))
    arguments = parser.parse_args()
    print("| what | form | ms | of the first | away |\n| --- | --- | ---: | ---: | ---: |")
    for precision in arguments.precision:
        heads = {
            "heads of 40": attention(SIZE),
            "heads filled up to 48": attention(48),
            "heads filled up to 64": attention(64),
            "q, k, v in one product": attention(SIZE, joined=True),
            "one product, heads filled up to 64": attention(64, joined=True),
        }
        forms = {name: form(model, precision) for name, model in heads.items()}
        measure(f"attention, {precision}", forms, arguments.rounds, time.process_time)
        blocks = {"GroupNormalization": convolutions(), "MVN": convolutions(decomposed=True)}
        forms = {name: form(model, precision) for name, model in blocks.items()}
        measure(f"convolutions, {precision}", forms, arguments.rounds, time.process_time)
        for role in ("unet", "vae_decoder"):
            ways = four_pictures(role, precision)
            measure(f"four pictures, {role}, {precision}", ways, arguments.rounds, time.perf_counter)


if __name__ == "__main__":
    main()
