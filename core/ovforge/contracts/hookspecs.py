"""The hooks: what a plugin may offer, each with a whole plugin as an example.

A plugin is a module, registered under the entry-point group "ovforge", with any of these functions marked
`@ovforge.hookimpl`. Each yields descriptions and does nothing else: it may be called at any time, just to list.

The examples name their factories directly, to be short. In a plugin, write import strings ("package.module:Name"), so
that listing it imports nothing heavy. docs/hooks.md says what an implementation must keep; tests/test_hooks.py runs the
examples.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from ovforge.contracts.extensions import (
    CommandExtension,
    DeviceExtension,
    DriverExtension,
    GraphTransformExtension,
    LoaderExtension,
    QuantizerExtension,
    RecipeExtension,
    SchedulerExtension,
    SourceExtension,
    TaskExtension,
    TrackerExtension,
)

__all__ = ["ENTRY_POINT_GROUP", "HOOK_OF_KIND", "hookimpl", "hookspec"]

ENTRY_POINT_GROUP = "ovforge"

hookspec = pluggy.HookspecMarker("ovforge")
hookimpl = pluggy.HookimplMarker("ovforge")


@hookspec
def ovforge_sources() -> Iterable[SourceExtension]:
    """Ways to open what is not plain: encrypted or packed files and folders.

    Example: every file of a folder packed by gzip.

        import gzip
        from ovforge import hookimpl
        from ovforge.contracts import SourceExtension
        from ovforge.errors import ModelError

        class Packed:
            protection = None  # what is made from it may lie on disk as it is

            def __init__(self, packed):
                self.packed, self.name = packed, packed.name

            def files(self):
                return {path[:-3]: len(self.read(path[:-3])) for path in self.packed.files() if path.endswith(".gz")}

            def read(self, path, limit=None):
                try:
                    return gzip.decompress(self.packed.read(path + ".gz"))[:limit]
                except (OSError, EOFError) as error:
                    raise ModelError(f"{path}.gz is damaged: {error}", where=self.name) from error

            def read_into(self, path, buffer):
                buffer[:] = self.read(path)

            def local(self, path):
                return None  # there is no plain file

            def digest(self, path):
                return self.packed.digest(path + ".gz")

        class Opener:
            def __init__(self, options): ...

            def can_open(self, source):
                return any(path.endswith(".gz") for path in source.files())

            def open(self, source):
                return Packed(source)

        @hookimpl
        def ovforge_sources():
            yield SourceExtension(name="gzip", summary="Files packed by gzip", factory=Opener)
    """
    return ()


@hookspec
def ovforge_loaders() -> Iterable[LoaderExtension]:
    """Ways to turn files, or another framework's model, into ov.Models by role.

    Example: a model that is nothing but a matrix, in numpy's format.

        import io
        import numpy as np
        import openvino as ov
        from openvino import opset13 as ops
        from ovforge import hookimpl
        from ovforge.contracts import LoaderExtension, Match
        from ovforge.model import ModelBundle

        class Loader:
            def __init__(self, options): ...

            def can_load(self, source):
                return Match.YES if list(source.files()) == ["matrix.npy"] else Match.NO

            def load(self, source):
                matrix = np.load(io.BytesIO(source.read("matrix.npy")), allow_pickle=False).astype(np.float32)
                x = ops.parameter([-1, len(matrix)], np.float32, name="x")
                bundle = ModelBundle()
                bundle.models["model"] = ov.Model([ops.matmul(x, matrix, False, False)], [x], "matrix")
                return bundle

        @hookimpl
        def ovforge_loaders():
            yield LoaderExtension(name="matrix", summary="A matrix in matrix.npy", factory=Loader)
    """
    return ()


@hookspec
def ovforge_graph_transforms() -> Iterable[GraphTransformExtension]:
    """Changes to models: adapters, embeddings, folding, pre- and post-processing.

    Example: every output of a model between 0 and 1.

        from openvino import opset13 as ops
        from ovforge import hookimpl
        from ovforge.contracts import GraphTransformExtension, Phase, Report

        class Squash:
            def __init__(self, options): ...

            def apply(self, bundle):
                report = Report()
                for role, model in bundle.models.items():
                    for result in model.get_results():
                        source = result.input_value(0)
                        names, squashed = source.get_names(), ops.sigmoid(source)
                        source.get_tensor().set_names(set())
                        squashed.output(0).get_tensor().set_names(names)
                        result.input(0).replace_source_output(squashed.output(0))
                    report.roles += (role,)
                    report.applied.append(f"{role}: sigmoid")
                return report

        @hookimpl
        def ovforge_graph_transforms():
            yield GraphTransformExtension(
                name="squash", summary="Outputs between 0 and 1", factory=Squash, phase=Phase.LAYOUT
            )
    """
    return ()


@hookspec
def ovforge_quantizers() -> Iterable[QuantizerExtension | RecipeExtension]:
    """Ways to lower the precision of named models, and recipes: somebody's quantizer with options, under another name.

    Example: weights in half the bits.

        import numpy as np
        from openvino import opset13 as ops
        from ovforge import hookimpl
        from ovforge.contracts import QuantizerExtension, Report

        class Half:
            def __init__(self, options): ...

            def quantize(self, bundle, calibration, keep={}):
                report = Report()
                for role, model in bundle.models.items():
                    for op in model.get_ordered_ops():
                        if op.get_type_name() != "MatMul" or op.get_friendly_name() in keep.get(role, ()):
                            continue
                        weights = op.input_value(1).get_node()
                        if weights.get_type_name() == "Constant":
                            half = ops.constant(weights.get_data().astype(np.float16))
                            op.input(1).replace_source_output(ops.convert(half, np.float32).output(0))
                            report.layers.setdefault(role, []).append(op.get_friendly_name())
                report.roles = tuple(report.layers)
                report.notes = [f"{role}: {len(names)} layers in float16" for role, names in report.layers.items()]
                return report if report.roles else Report(notes=["there is no layer to lower"])

        @hookimpl
        def ovforge_quantizers():
            yield QuantizerExtension(name="half", summary="Weights in float16", factory=Half, needs="nothing")
    """
    return ()


@hookspec
def ovforge_drivers() -> Iterable[DriverExtension]:
    """Ways to calibrate quantizers, and to judge what they make.

    Example: calibration by noise, with a config table [noise]; nothing is judged.

        import numpy as np
        from ovforge import hookimpl
        from ovforge.contracts import DriverExtension, Quantized
        from ovforge.errors import ConfigError
        from pydantic import BaseModel, ConfigDict

        class Noise(BaseModel):
            model_config = ConfigDict(extra="forbid")
            seed: int = 0

        class Calibration:
            def __init__(self, bundle, seed):
                self.bundle, self.seed = bundle, seed

            def inputs(self, role, count):
                rng, ports = np.random.default_rng(self.seed), self.bundle.models[role].inputs
                shapes = {port.any_name: [side.min_length or 1 for side in port.partial_shape] for port in ports}
                return [{name: np.float32(rng.normal(size=shapes[name])) for name in shapes} for _ in range(count)]

            def score(self, models):
                raise ConfigError("noise cannot judge a model", where="quantize", hint="Use one that needs no score.")

        class Driver:
            judges = False

            def __init__(self, context):
                self.seed = context.sections.get("noise", Noise()).seed

            def content(self, need, digest):
                return {"seed": self.seed}

            def known(self, run):
                return None

            def run(self, run):
                return Quantized(*run.quantize(Calibration(run.bundle, self.seed)))

        @hookimpl
        def ovforge_drivers():
            yield DriverExtension(name="noise", summary="Calibrate by noise", factory=Driver, sections={"noise": Noise})
    """
    return ()


@hookspec
def ovforge_schedulers() -> Iterable[SchedulerExtension]:
    """Sampling methods of diffusion models.

    Example: Euler's method, for networks that predict the velocity from noise to picture (rectified flow).

        import numpy as np
        from ovforge import hookimpl
        from ovforge.contracts import SchedulerExtension

        class Flow:
            def __init__(self, options, model_config):
                self.trained = model_config.get("num_train_timesteps", 1000)

            def start(self, steps, strength=1.0):
                return Run(steps, steps - max(1, min(int(steps * strength), steps)), self.trained)

        class Run:
            init_noise_sigma = 1.0

            def __init__(self, steps, first, trained):
                self.first, self.sigmas = first, np.linspace(1, 0, steps + 1, dtype=np.float32)
                self.timesteps = self.sigmas[:-1] * np.float32(trained)

            def scale_input(self, latents, index):
                return latents

            def add_noise(self, original, noise, index):
                return (1 - self.sigmas[index]) * original + self.sigmas[index] * noise

            def step(self, output, index, latents, rng):
                return latents + (self.sigmas[index + 1] - self.sigmas[index]) * output

        @hookimpl
        def ovforge_schedulers():
            yield SchedulerExtension(name="flow", summary="Euler's method for rectified flow", factory=Flow)
    """
    return ()


@hookspec
def ovforge_devices() -> Iterable[DeviceExtension]:
    """Places to run, and how models are compiled for them.

    Example: the processor, set up for many requests at a time.

        from ovforge import hookimpl
        from ovforge.contracts import DeviceExtension, DevicePlan
        from ovforge.model import core

        class Busy:
            def __init__(self, options): ...

            def plan(self):
                return DevicePlan(
                    device="CPU",
                    properties={"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f32"},
                    full_name=str(core().get_property("CPU", "FULL_DEVICE_NAME")),
                    precision="f32",
                    can_export=True,
                )

        @hookimpl
        def ovforge_devices():
            yield DeviceExtension(name="busy", summary="The processor, for many requests at a time", factory=Busy)
    """
    return ()


@hookspec
def ovforge_tasks() -> Iterable[TaskExtension]:
    """What a pipeline is for: text-to-image, detect, ...

    Example: what a model answers to a list of numbers, as text.

        from dataclasses import dataclass
        from pathlib import Path
        import numpy as np
        from ovforge import hookimpl
        from ovforge.contracts import TaskExtension
        from ovforge.model import Result
        from pydantic import BaseModel, ConfigDict

        class Inputs(BaseModel):
            model_config = ConfigDict(extra="forbid")
            numbers: tuple[float, ...]

        @dataclass
        class Answer(Result):
            text: str = ""

            def save(self, path):
                Path(path).write_text(self.text)
                return [Path(path)]

        class Ask:
            def __init__(self, options, context):
                self.models = context.bundle

            def __call__(self, inputs, progress):
                request = self.models["model"].create_infer_request()  # one for each call: threads may call at once
                answer = str(request.infer([np.float32([inputs.numbers])])[0])
                return Answer(text=answer, provenance={"inputs": inputs.model_dump()})

            def examples(self, count):
                width = self.models["model"].input(0).get_partial_shape()[1].get_length()
                return [Inputs(numbers=(number,) * width) for number in range(count)]

        @hookimpl
        def ovforge_tasks():
            yield TaskExtension(
                name="ask", summary="Ask a model", factory=Ask, inputs=Inputs, roles=("model",), threads=True
            )
    """
    return ()


@hookspec
def ovforge_trackers() -> Iterable[TrackerExtension]:
    """What follows things through videos, for the task `video`.

    Example: a thing is the one of the picture before whose middle is nearest, and no further than its own width.

        import numpy as np
        from ovforge import hookimpl
        from ovforge.contracts import TrackerExtension
        from ovforge.model import Tracks

        class Nearest:
            def __init__(self, options, threshold):
                self.threshold = threshold
                self.ids, self.middles, self.last = np.zeros(0, np.int64), np.zeros((0, 2)), 0

            def update(self, found, picture, seconds):
                rows = np.flatnonzero(found.scores >= self.threshold)
                found = found.take(rows)
                middles = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2
                ids, free = np.zeros(len(found), np.int64), set(range(len(self.ids)))
                for row, (middle, box) in enumerate(zip(middles, found.boxes)):
                    near = sorted((np.hypot(*(self.middles[old] - middle)), old) for old in free)
                    if near and near[0][0] <= box[2] - box[0]:
                        ids[row] = self.ids[near[0][1]]
                        free.remove(near[0][1])
                    else:
                        self.last = ids[row] = self.last + 1
                self.ids, self.middles = ids, middles
                return Tracks(found.boxes, found.scores, found.classes, ids, rows)

        @hookimpl
        def ovforge_trackers():
            yield TrackerExtension(
                name="nearest", summary="The nearest middle", factory=Nearest, every_picture=True
            )
    """
    return ()


@hookspec
def ovforge_commands() -> Iterable[CommandExtension]:
    """Commands of the `ovforge` program; its own come through this hook, too.

    Example: `ovforge count FOLDER`.

        from pathlib import Path
        from typing import Annotated
        import typer
        from ovforge import hookimpl
        from ovforge.contracts import CommandExtension
        from ovforge.errors import InputError

        def count(folder: Annotated[Path, typer.Argument(help="Where to look.")]) -> None:
            \"\"\"Count the models in a folder.\"\"\"
            if not folder.is_dir():
                raise InputError("no such folder", where=str(folder), hint="Name one that is there.")
            print(sum(1 for _ in folder.rglob("*.xml")))

        @hookimpl
        def ovforge_commands():
            yield CommandExtension(name="count", summary="Count the models in a folder", factory=count)
    """
    return ()


HOOK_OF_KIND = {
    "source": "ovforge_sources",
    "loader": "ovforge_loaders",
    "transform": "ovforge_graph_transforms",
    "quantizer": "ovforge_quantizers",
    "driver": "ovforge_drivers",
    "scheduler": "ovforge_schedulers",
    "device": "ovforge_devices",
    "task": "ovforge_tasks",
    "tracker": "ovforge_trackers",
    "command": "ovforge_commands",
}
