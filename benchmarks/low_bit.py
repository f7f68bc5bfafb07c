"""Methods of few bits on the embedded model's UNet, next to plain rounding and to NNCF's AWQ and GPTQ.

    python benchmarks/low_bit.py [--part products|all|pruning|softmax|runtime] [--pictures 8] [--samples 16] [--out
    FILE.json]

Columns: relative error |y - y'| / |y| of the UNet's output in float32, on inputs that calibration has not seen; SSIM of
pictures (4 steps, same seeds) with those of the unchanged pipeline, mean and worst; seconds that quantization takes;
the UNet's weights in the file; a UNet step, the best of 20. The part "runtime" compiles stacks of large layers, each in
a process of its own, and gives memory that is not of files. Times depend on the machine, and on what else it does.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ovforge
import ovforge_low_bit
from ovforge import Use, testing
from ovforge.model import ModelBundle, core, ssim

EMBEDDED = "package:ovforge_lcm/model"
CALIBRATION = [
    "a red car", "a green apple on a blue background", "a yellow duck", "a purple octopus", "a cat", "a blue teapot",
    "an orange guitar on a white background", "a black umbrella",
]  # fmt: skip
HELD_OUT = [
    "a beautiful pink unicorn, 8k", "a blue fish", "a brown dog on a green background", "a red rose", "a rocket",
    "a yellow bus on a pink background", "a green frog", "a purple butterfly",
]  # fmt: skip
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
Records = Sequence[Mapping[str, Any]]
Change = Callable[[ModelBundle, "Recorded"], None]


@dataclass
class Row:
    """What was measured of one variant."""

    name: str
    error: float
    ssim: float
    worst: float
    seconds: float
    file_bytes: int
    step_ms: float


class Recorded:
    """Recorded inputs as quantizers ask for them."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def inputs(self, role: str, count: int) -> Records:
        """Return the first `count`, which are in a random order."""
        assert role == "unet"
        return self.records[:count]


class Listening:
    """A compiled model, or a request of one, that notes what it is given, by the model's `names` of its inputs."""

    def __init__(self, inner: Any, names: Sequence[str], notes: list[dict[str, Any]]) -> None:
        self._inner, self._names, self._notes = inner, names, notes

    def create_infer_request(self) -> Listening:
        return Listening(self._inner.create_infer_request(), self._names, self._notes)

    def infer(self, *arguments: Any, **options: Any) -> Any:
        results = self._inner.infer(*arguments, **options)
        self._note()
        return results

    def wait(self) -> None:
        self._inner.wait()
        self._note()

    def _note(self) -> None:
        ports = zip(self._names, self._inner.model_inputs, strict=True)
        self._notes.append({name: self._inner.get_tensor(port).data.copy() for name, port in ports})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def pipeline(source: str) -> ovforge.Pipeline:
    """Return the pipeline in float32, with the model as it is."""
    options: dict[str, Any] = {"device": Use("cpu", precision="f32"), "optimize": False, "cache": None}
    return ovforge.Pipeline("text-to-image", source=source, **options)


def pictures(pipe: ovforge.Pipeline, prompts: Sequence[str]) -> list[Any]:
    """Draw each prompt with a seed of its own."""
    return [np.asarray(pipe(prompt, seed=seed).images[0].convert("RGB")) for seed, prompt in enumerate(prompts)]


def recorded(prompts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the UNet's inputs of all steps, in a random order that is always the same."""
    pipe, notes = pipeline(EMBEDDED), list[dict[str, Any]]()
    names = [port.any_name for port in pipe.bundle.models["unet"].inputs]
    pipe.compiled.wrap("unet", lambda model: Listening(model, names, notes))
    pictures(pipe, prompts)
    return [notes[index] for index in np.random.default_rng(0).permutation(len(notes))]


class Bench:
    """The references, and how a variant is held against them."""

    def __init__(self, count: int) -> None:
        self.prompts = HELD_OUT[:count]
        self.calibration = Recorded(recorded(CALIBRATION))
        self.records = recorded(self.prompts)
        self.source = pipeline(EMBEDDED)
        self.drawn = pictures(self.source, self.prompts)
        self.exact = self.outputs(self.fresh().models["unet"])[0]

    def fresh(self) -> ModelBundle:
        """Return the unchanged bundle, to be changed."""
        from ovforge.model import FileSource

        folder = Path(str(self.source.bundle.location["unet"])).parents[1]
        return ModelBundle.open(FileSource(folder))

    def outputs(self, model: Any) -> tuple[Any, Any]:
        """Return what the model says to all held-out inputs, and the compiled model."""
        compiled = core().compile_model(model, "CPU", EXACT)
        request = compiled.create_infer_request()  # which copies its inputs, where compiled(record) shares their memory
        return np.concatenate([request.infer(record)[0].ravel() for record in self.records]), compiled

    def measure(self, name: str, change: Change) -> Row:
        """Change a fresh bundle and measure it."""
        bundle = self.fresh()
        before = time.perf_counter()
        change(bundle, self.calibration)
        seconds = time.perf_counter() - before
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            bundle.save(saved)
            file_bytes = (saved / "unet" / "openvino_model.bin").stat().st_size
            given, compiled = self.outputs(ModelBundle.open(_source(saved)).models["unet"])
            alike = [ssim(a, b) for a, b in zip(pictures(pipeline(str(saved)), self.prompts), self.drawn, strict=True)]
        error = float(np.linalg.norm(given - self.exact) / np.linalg.norm(self.exact))
        return Row(
            name, error, float(np.mean(alike)), min(alike), seconds, file_bytes,
            step_ms(compiled, self.records[0]),
        )  # fmt: skip


def _source(folder: Path) -> Any:
    from ovforge.model import FileSource

    return FileSource(folder)


def step_ms(compiled: Any, record: Mapping[str, Any]) -> float:
    """Return the quickest of 20 steps, milliseconds."""
    request, spans = compiled.create_infer_request(), []
    for _ in range(20):
        before = time.perf_counter()
        request.infer(record)
        spans.append(time.perf_counter() - before)
    return min(spans) * 1000


# -- variants ---------------------------------------------------------------------------------------------------------


def ours(name: str, **options: Any) -> Change:
    """Return one of this plugin's quantizers."""
    described = testing.extension(ovforge_low_bit, "quantizer", name)

    def change(bundle: ModelBundle, calibration: Recorded) -> None:
        model = described.options_model()
        assert model is not None
        report = described.create(model(roles=["unet"], **options)).quantize(bundle, calibration)
        assert not report.skipped, report.skipped
        print(f"  {report.applied[0]}", flush=True)

    return change


def nncfs(bits: int, group: int, samples: int, **options: Any) -> Change:
    """Return nncf.compress_weights of products alone, in symmetric integers."""

    def change(bundle: ModelBundle, calibration: Recorded) -> None:
        import nncf

        data = {"dataset": nncf.Dataset(calibration.inputs("unet", samples)), "subset_size": samples} if options else {}
        bundle.models["unet"] = nncf.compress_weights(
            bundle.models["unet"], mode=nncf.CompressWeightsMode(f"int{bits}_sym"), group_size=group, all_layers=True,
            ratio=1.0, backup_mode=nncf.BackupMode.NONE, **data, **options,
        )  # fmt: skip

    return change


def of_products(samples: int, iterations: int) -> Iterator[tuple[str, Change]]:
    """Yield variants on the weights of MatMul alone, a scale a row: what nncf's methods work on."""
    same: dict[str, Any] = {"types": ["MatMul"], "group_size": -1}
    for bits in (4, 3):
        grid = {**same, "bits": bits, "symmetric": True}
        yield f"{bits} bits, to the nearest", ours("auto-round", **grid, iterations=0)
        yield f"{bits} bits, AutoRound", ours("auto-round", **grid, samples=samples, iterations=iterations)
        yield f"{bits} bits, LoRC rank 8", ours("lorc", **grid)
        yield f"{bits} bits, PowerQuant", ours("power-quant", **same, bits=bits)
        nupes = {"search": "layer", "iterations": iterations, "samples": samples}
        yield f"{bits} bits, NUPES", ours("power-quant", **same, bits=bits, **nupes)
        yield f"{bits} bits, NNCF to the nearest", nncfs(bits, -1, samples)
        yield f"{bits} bits, NNCF AWQ", nncfs(bits, -1, samples, awq=True)
        yield f"{bits} bits, NNCF GPTQ", nncfs(bits, -1, samples, gptq=True)


def of_all(samples: int, iterations: int) -> Iterator[tuple[str, Change]]:
    """Yield variants on all weights, convolutions too, in groups of up to 64."""
    for bits in (4, 3):
        yield f"{bits} bits, to the nearest", ours("auto-round", bits=bits, iterations=0)
        yield f"{bits} bits, AutoRound", ours("auto-round", bits=bits, samples=samples, iterations=iterations)
        yield f"{bits} bits, LoRC rank 8", ours("lorc", bits=bits)
        yield f"{bits} bits, LoRC rank 32", ours("lorc", bits=bits, rank=32)
        yield f"{bits} bits, PowerQuant", ours("power-quant", bits=bits)
        nupes = {"search": "layer", "iterations": iterations, "samples": samples}
        yield f"{bits} bits, NUPES", ours("power-quant", bits=bits, **nupes)
    yield "3 bits, packed, to the nearest", ours("auto-round", bits=3, iterations=0, packed=True)


def of_pruning(samples: int, _: int) -> Iterator[tuple[str, Change]]:
    """Yield shares of weights that become 0; by weights alone is Wanda on inputs of one size."""
    for share in (0.2, 0.3, 0.5):
        yield f"{share:.0%} by weights alone", by_weights(share)
        yield f"{share:.0%}, Wanda", ours("wanda", share=share, samples=samples)
    yield "2:4, Wanda", ours("wanda", pattern="2:4", samples=samples)


def by_weights(share: float) -> Change:
    """Return pruning by the size of weights alone, in each row."""
    from ovforge_low_bit import pruning
    from ovforge_low_bit.layers import find_layers
    from ovforge_low_bit.options import ScopeOptions
    from ovforge_low_bit.stage import Report

    def change(bundle: ModelBundle, _: Recorded) -> None:
        for layer in find_layers(bundle.models["unet"], ScopeOptions(), (), Report()):
            pruning.zero(layer, pruning.smallest(np.abs(layer.matrix()), share))

    return change


def of_softmax(samples: int, _: int) -> Iterator[tuple[str, Change]]:
    """Yield activations in 8 bits by nncf, softmax outputs among them, without and with correction."""
    for name, options in (("8 bits", None), *((f"8 bits, corrected by {by}", by) for by in ("tensor", "head"))):
        yield f"{name}, activations by NNCF", activations(samples, options)
        yield f"{name}, softmax outputs alone", softmax_alone(samples, options)


def opened(model: Any) -> list[Any]:
    """Replace each ScaledDotProductAttention by products and a Softmax; return the softmaxes."""
    from openvino import opset13 as ops

    softmaxes = []
    for op in model.get_ordered_ops():
        if op.get_type_name() != "ScaledDotProductAttention":
            continue
        assert op.get_input_size() == 3 or not op.get_attributes()["causal"]
        query, key, value = (op.input_value(place) for place in range(3))
        width = key.get_partial_shape()[-1].get_length()
        scaled = ops.multiply(query, ops.constant(np.float32(width**-0.5)))
        probabilities = ops.softmax(ops.matmul(scaled, key, False, True), -1)
        probabilities.set_friendly_name(f"{op.get_friendly_name()}/softmax")
        result = ops.matmul(probabilities, value, False, False)
        for reader in list(op.output(0).get_target_inputs()):
            reader.replace_source_output(result.output(0))
        softmaxes.append(probabilities)
    model.validate_nodes_and_infer_types()
    return softmaxes


def corrected(bundle: ModelBundle, calibration: Recorded, samples: int, by: str | None) -> None:
    """Correct the bias, if it is asked for."""
    if by:
        ours("softmax-bias", granularity=by, samples=samples)(bundle, calibration)


def activations(samples: int, by: str | None) -> Change:
    """Return nncf.quantize of the UNet with its attention opened."""

    def change(bundle: ModelBundle, calibration: Recorded) -> None:
        import nncf

        opened(bundle.models["unet"])
        data = nncf.Dataset(calibration.inputs("unet", samples))
        bundle.models["unet"] = nncf.quantize(
            bundle.models["unet"], data, subset_size=samples, preset=nncf.QuantizationPreset.MIXED,
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )  # fmt: skip
        corrected(bundle, calibration, samples, by)

    return change


def softmax_alone(samples: int, by: str | None) -> Change:
    """Return FakeQuantize of 256 levels from 0 to 1 after each softmax, and nothing else."""
    from openvino import opset13 as ops

    def change(bundle: ModelBundle, calibration: Recorded) -> None:
        for softmax in opened(bundle.models["unet"]):
            readers = list(softmax.output(0).get_target_inputs())
            low, high = ops.constant(np.float32(0)), ops.constant(np.float32(1))
            quantized = ops.fake_quantize(softmax, low, high, low, high, 256)
            for reader in readers:
                reader.replace_source_output(quantized.output(0))
        corrected(bundle, calibration, samples, by)

    return change


PARTS: dict[str, Callable[[int, int], Iterator[tuple[str, Change]]]] = {
    "products": of_products, "all": of_all, "pruning": of_pruning, "softmax": of_softmax,
}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return Markdown."""
    lines = [
        "| | error | SSIM | worst | seconds | file, MB | step, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.error:.4f} | {row.ssim:.3f} | {row.worst:.3f} | {row.seconds:.1f} |"
            f" {row.file_bytes / 1e6:.2f} | {row.step_ms:.1f} |"
        )
    return "\n".join(lines)


# -- what it costs to run ---------------------------------------------------------------------------------------------

RUNTIME: dict[str, tuple[str, dict[str, Any]] | None] = {
    "float16": None,
    "8 bits": ("auto-round", {"bits": 8, "iterations": 0}),
    "4 bits": ("auto-round", {"iterations": 0}),
    "4 bits, symmetric": ("auto-round", {"iterations": 0, "symmetric": True}),
    "3 bits, held in 4": ("auto-round", {"bits": 3, "iterations": 0}),
    "3 bits, packed": ("auto-round", {"bits": 3, "iterations": 0, "packed": True}),
    "2 bits": ("auto-round", {"bits": 2, "iterations": 0}),
    "4 bits, LoRC rank 32": ("lorc", {"rank": 32}),
    "4 bits, codebook of powers": ("power-quant", {"exponent": 0.7}),
}


def stack(kind: str) -> Any:
    """Return eight layers of 2048 inputs and outputs, with weights in float16: products, or convolutions of 1x1."""
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    shape = [256, 2048] if kind == "MatMul" else [1, 2048, 16, 16]
    value = parameter = ops.parameter(shape, np.float32, name="x")
    for _ in range(8):
        weights = (rng.standard_normal((2048, 2048), np.float32) / 45).astype(np.float16)
        if kind == "MatMul":
            value = ops.matmul(value, ops.convert(ops.constant(weights), "f32"), False, True)
        else:
            kernel = ops.convert(ops.constant(weights.reshape(2048, 2048, 1, 1)), "f32")
            value = ops.convolution(value, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    return ov.Model([value], [parameter])


def run_alone(path: str) -> None:
    """Compile a model in this process; print memory that it takes, MB, and the quickest of 20 runs, milliseconds."""

    def held() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1])

    core().compile_model(testing.small_model(), "CPU", EXACT)  # what the runtime takes in any case
    before = held()
    compiled = core().compile_model(path, "CPU", EXACT)
    request = compiled.create_infer_request()
    x = np.random.default_rng(1).standard_normal(compiled.inputs[0].shape, np.float32)
    spans = []
    for _ in range(20):
        start = time.perf_counter()
        request.infer([x])
        spans.append(time.perf_counter() - start)
    print((held() - before) / 1000, min(spans) * 1000)


def runtime() -> str:
    """Return a table of memory and time of each kind of storage, each in a process of its own."""
    import openvino as ov

    lines = [
        "| weights | MatMul: file, MB | memory, MB | ms | Convolution: memory, MB | ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, how in RUNTIME.items():
        cells = []
        for kind in ("MatMul", "Convolution"):
            bundle = ModelBundle()
            bundle.models["unet"] = stack(kind)
            if how is not None:
                ours(how[0], **how[1])(bundle, Recorded([]))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.xml"
                ov.save_model(bundle.models["unet"], path, compress_to_fp16=how is None)
                command = [sys.executable, __file__, "--alone", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                memory, span = (float(word) for word in done.stdout.split())
                size = path.with_suffix(".bin").stat().st_size / 1e6
            cells += ([f"{size:.1f}"] if kind == "MatMul" else []) + [f"{memory:.0f}", f"{span:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "runtime"], action="append", help="default: every part")
    parser.add_argument("--pictures", type=int, default=len(HELD_OUT))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound and NUPES")
    parser.add_argument("--alone", metavar="FILE.xml", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.alone:
        run_alone(arguments.alone)
        return
    parts = arguments.part or [*PARTS, "runtime"]
    if "runtime" in parts:
        print(f"\n### runtime\n\n{runtime()}\n", flush=True)
    if parts == ["runtime"]:
        return
    bench = Bench(arguments.pictures)
    results = {}
    for part in (part for part in parts if part != "runtime"):
        rows = [bench.measure("unchanged, float16", lambda *_: None)]
        for name, change in PARTS[part](arguments.samples, arguments.iterations):
            try:
                rows.append(bench.measure(name, change))
            except Exception as error:  # a peer's refusal is a result; the others are still wanted
                print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        print(f"\n### {part}\n\n{table(rows)}\n", flush=True)
        results[part] = [asdict(row) for row in rows]
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
