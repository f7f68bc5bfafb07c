"""The task `detect`: pictures through a detector, one after the other or several at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import checked
from ovforge.contracts import Progress, TaskContext
from ovforge.errors import ConfigError, InputError, ModelError, did_you_mean
from ovforge.model import OPENVINO_ERRORS, PICTURE_SUFFIXES, DetectorSpec, Timings, open_picture, picture_name
from ovforge_detection.decode import MAX_CLASSES, Found, decode_classes, decode_text, join, suppress
from ovforge_detection.description import ExtraInput
from ovforge_detection.examples import examples
from ovforge_detection.frames import Frames
from ovforge_detection.outputs import decode_described
from ovforge_detection.phrases import Passage, TextReader, Wanted, phrase_of, wanted
from ovforge_detection.prepare import Prepared, mode_of, prepare
from ovforge_detection.results import Decoding, DetectInputs, Detections, DetectionsResult

__all__ = ["Detect", "DetectOptions"]

STEP = 32
"""Texts of a fixed length have a multiple of so many tokens."""

_KEPT = 8
"""Pictures of a call up to which the outputs are kept, so that other thresholds need no inference: about 1 MB each."""

Outputs = dict[str, NDArray[Any]]


class DetectOptions(BaseModel):
    """How the task runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[int, int] | None = Field(
        None,
        description="Height and width of the input, for models that take any: pictures are scaled into it and filled "
        "up, which runs faster. By default each is scaled as the model was trained.",
    )
    batch: int = Field(1, ge=1, le=256, description="Pictures of one size that run at once.")


@dataclass(frozen=True)
class _Job:
    """A picture on its way: its place in the result, and itself as the detector takes it."""

    place: int
    name: str
    prepared: Prepared


Reading = Callable[[DetectInputs], Found]
"""Decodes the outputs for one picture, with the thresholds of some inputs."""


class Detect:
    """Runs any detector whose model says, by a DetectorSpec, how it is used."""

    def __init__(self, options: DetectOptions, context: TaskContext) -> None:
        self._options, self._bundle = options, context.bundle
        self.spec = DetectorSpec.of(context.bundle.configs.get("detector", {}))
        self._requests: dict[str, ov.InferRequest] = {}
        self._dividing: dict[int, bool] = {}
        self._reader: TextReader | None = None
        self._inputs = [ExtraInput.model_validate(entry) for entry in self.spec.inputs]
        if options.size and (self.spec.height or self.spec.resize == "multiple"):
            own = (
                f"{self.spec.height}x{self.spec.width}, whatever the picture's size"
                if self.spec.height
                else "what each picture gives"
            )
            raise ConfigError(
                f"the model's input is {own}",
                where="task.size",
                hint="Take it out, or load the model for another size: load.height and load.width.",
            )
        shapes = self._shapes(1)
        if shapes or options.size is None:
            context.bundle.start("detector", shapes)

    def __call__(self, inputs: DetectInputs, progress: Callable[[Progress], None]) -> DetectionsResult:
        """Find things in every picture. Raises InputError for one that cannot be read; in a folder it is passed over.

        Raises InputError for an empty text, a text where the model knows classes, and classes that it does not know.
        """
        timings, said = Timings(), list(self.spec.notes)
        names, passages, classes = self.looked_for(inputs, timings, said)
        paths, whole = _pictures(inputs.image)
        found: dict[int, Detections] = {}
        readings: list[tuple[_Job, Reading]] = []
        progress(Progress("detect", 0, len(paths)))
        for jobs in self._batches(paths, whole, timings, said):
            for job, read in zip(jobs, self._run(jobs, passages, classes, timings), strict=True):
                found[job.place] = self._sorted(read(inputs), job, names, inputs)
                if len(paths) <= _KEPT:
                    readings.append((replace(job, prepared=job.prepared.emptied()), read))
            progress(Progress("detect", max(job.place for job in jobs) + 1, len(paths), jobs[-1].name))
        if not found:
            raise InputError("none of its pictures can be read", where=str(inputs.image), hint="; ".join(said))
        return DetectionsResult(
            timings=timings,
            warnings=said,
            provenance={"inputs": _as_inputs(inputs)},
            detections=[found[place] for place in sorted(found)],
            pictures=[paths[place] for place in sorted(found)],
            _decoding=self._decoding(inputs, readings, names) if readings else None,
        )

    # -- several calls as one: ovforge.contracts.Batching -----------------------------------------------------------

    def batch_key(self, inputs: DetectInputs) -> Hashable | None:
        """Return all but the pictures; None if one runs at a time, and for a folder, which may hold bad ones."""
        given = inputs.image if isinstance(inputs.image, list) else [inputs.image]
        if self.batch == 1 or not given or any(isinstance(each, Path) and each.is_dir() for each in given):
            return None
        return repr(inputs.model_dump(exclude={"image"}))

    def join(self, calls: Sequence[DetectInputs]) -> DetectInputs:
        """Return a call with all pictures."""
        return calls[0].model_copy(update={"image": [each for call in calls for each in _pictures(call.image)[0]]})

    def split(self, result: DetectionsResult, calls: Sequence[DetectInputs]) -> list[DetectionsResult]:
        """Return what was found in each call's pictures; what the text warns of holds for all."""
        parts, place = [], 0
        for call in calls:
            own = slice(place, place + len(_pictures(call.image)[0]))
            place = own.stop
            parts.append(
                DetectionsResult(
                    timings=Timings().merged(result.timings),
                    warnings=list(result.warnings),
                    provenance={"inputs": _as_inputs(call)},
                    detections=result.detections[own],
                    pictures=result.pictures[own],
                )
            )
        return parts

    def _decoding(
        self, inputs: DetectInputs, readings: Sequence[tuple[_Job, Reading]], names: Sequence[str]
    ) -> Decoding:
        """Return what decodes the outputs again, with the thresholds that count for this kind of model."""
        spec, described = self.spec, self.spec.kind == "described"
        values: dict[str, Any] = {"limit": inputs.limit}
        if inputs.threshold is not None or not described or len(spec.outputs) == 1:
            values["threshold"] = spec.threshold if inputs.threshold is None else inputs.threshold
        if spec.kind == "text":
            values["text_threshold"] = inputs.text_threshold
        if inputs.nms is not None or not described:  # a description may say more than one number how boxes give way
            values["nms"] = inputs.nms if inputs.nms is not None else 1.0 if spec.nms is None else spec.nms

        def decode(wanted: Mapping[str, Any]) -> list[Detections]:
            given = checked(DetectInputs, {**dict(inputs), **wanted}, where="input")
            ordered = sorted(readings, key=lambda reading: reading[0].place)
            return [self._sorted(read(given), job, names, given) for job, read in ordered]

        return Decoding(values, decode)

    # -- frames of video ------------------------------------------------------------------------------------------

    def frames(self, **inputs: Any) -> Frames:
        """Return what finds things in frames of video: an `ovforge.contracts.FrameDetector`.

        `inputs` are those of a call without `image`. Raises ConfigError and InputError for wrong ones.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        return Frames(self, checked(DetectInputs, {**given, "image": Image.new("RGB", (1, 1))}, where="input"))

    @property
    def batch(self) -> int:
        """How many pictures run at once."""
        return self._options.batch

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width that pictures of any size are scaled into."""
        return self._options.size

    def parallel(self) -> int:
        """Return how many requests the device works on at a time; waits for the detector's compilation."""
        shapes = self._shapes(1) if self.spec.kind != "text" else None
        return int(self._bundle.get("detector", shapes).get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

    def beside(self) -> Detect:
        """Return a task with the same models and requests of its own, for another thread."""
        other = copy.copy(self)
        other._requests = {}
        return other

    def find(
        self,
        pictures: Sequence[Prepared],
        names: Sequence[str],
        passages: Sequence[Passage],
        classes: NDArray[np.bool_] | None,
        inputs: DetectInputs,
    ) -> list[Detections]:
        """Return what is in prepared pictures. Those of one size run at once; a batch is filled up to its length.

        So what is found in a picture does not depend on how many come with it.
        """
        timings, groups = Timings(), dict[tuple[int, int], list[int]]()
        for place, picture in enumerate(pictures):
            groups.setdefault(picture.canvas, []).append(place)
        found: dict[int, Detections] = {}
        for places in groups.values():
            for start in range(0, len(places), self.batch):
                chosen = places[start : start + self.batch]
                jobs = [_Job(place, "", pictures[place]) for place in chosen]
                if self.spec.kind != "described" or self._divides(self.batch):
                    jobs += [jobs[-1]] * (self.batch - len(jobs))
                readings = self._run(jobs, passages, classes, timings)
                for place, job, read in zip(chosen, jobs, readings, strict=False):
                    found[place] = self._sorted(read(inputs), job, names, inputs)
        return [found[place] for place in range(len(pictures))]

    def examples(self, count: int) -> Sequence[DetectInputs]:
        """Return drawn scenes, with a text that names what is drawn where the model reads one."""
        return examples(count, text=self.spec.kind == "text")

    # -- what to look for -----------------------------------------------------------------------------------------

    def looked_for(
        self, inputs: DetectInputs, timings: Timings, said: list[str]
    ) -> tuple[Sequence[str], Sequence[Passage], NDArray[np.bool_] | None]:
        """Return the names of classes, passages of the text, and which classes of the model's own are wanted."""
        if self.spec.kind == "text":
            if inputs.text is None:
                raise InputError("say what to look for", where="text", hint='For example "horse. clouds."')
            sought = wanted(inputs.text)
            passages = [_renumbered(each, sought) for each in self._text_reader().read(sought.phrases, timings)]
            said += sought.notes
            if len(passages) > 1:
                said.append(
                    f"the text is longer than {self.spec.max_tokens} tokens, and is read in {len(passages)} parts"
                )
            return sought.names, passages, None
        return self.spec.labels, (), None if inputs.text is None else self._own_classes(inputs.text)

    def _own_classes(self, text: str | list[str]) -> NDArray[np.bool_]:
        """Return which of the model's own classes a text names, in any case. Raises InputError for an unknown one."""
        labels = [label.lower() for label in self.spec.labels]
        whole = isinstance(text, str) and text.lower() in labels  # though it may hold a full stop
        sought = Wanted([str(text)], [str(text)], [0]) if whole else wanted(text)
        found = np.zeros(len(labels), bool)
        for name in sought.names:
            same = np.array([label in (name.lower(), phrase_of(name)) for label in labels], bool)
            if not same.any():
                raise InputError(
                    f"the model does not know {name!r}.{did_you_mean(name.lower(), labels)}",
                    where="text",
                    hint=f"It has {len(labels)} classes of its own: {', '.join(list(self.spec.labels)[:8])}, ... "
                    "A GroundingDINO finds anything.",
                )
            found |= same
        return found

    def _text_reader(self) -> TextReader:
        if self._reader is None:
            bundle = self._bundle
            self._reader = TextReader(bundle["tokenizer"], bundle["text_encoder"], bundle.assets, self.spec)
        return self._reader

    # -- pictures -------------------------------------------------------------------------------------------------

    def _batches(self, paths: Sequence[Any], whole: bool, timings: Timings, said: list[str]) -> Iterator[list[_Job]]:
        """Yield pictures as they are read, those of one size together, up to the number that runs at once."""
        waiting: dict[tuple[int, int], list[_Job]] = {}
        for place, path in enumerate(paths):
            with timings.span("pictures"):
                try:
                    image = open_picture(path, "image", mode_of(self.spec))
                except InputError as error:
                    if not whole:
                        raise
                    said.append(f"passed over: {error.what}")
                    continue
                job = _Job(place, picture_name(path), prepare(image, self.spec, self._options.size))
            jobs = waiting.setdefault(job.prepared.canvas, [])
            jobs.append(job)
            if len(jobs) == self._options.batch:
                yield waiting.pop(job.prepared.canvas)
        yield from waiting.values()

    def _run(
        self, jobs: Sequence[_Job], passages: Sequence[Passage], classes: NDArray[np.bool_] | None, timings: Timings
    ) -> list[Reading]:
        """Run the detector on pictures of one size; return what decodes its outputs, for each of them."""
        if self.spec.kind == "described":
            return self._described(jobs, classes, timings)
        if self.spec.kind == "text":
            return self._run_text(jobs, passages, timings)
        pixels = np.stack([job.prepared.pixels for job in jobs])
        outputs = self._infer({"pixel_values": pixels}, self._shapes(len(jobs)), timings)
        return [
            partial(self._read_classes, outputs["logits"][n], outputs["boxes"][n], job.prepared.emptied(), classes)
            for n, job in enumerate(jobs)
        ]

    def _read_classes(
        self,
        logits: NDArray[np.float32],
        boxes: NDArray[np.float32],
        picture: Prepared,
        classes: NDArray[np.bool_] | None,
        inputs: DetectInputs,
    ) -> Found:
        return decode_classes(logits, boxes, picture, self._threshold(inputs), classes)

    def _threshold(self, inputs: DetectInputs) -> float:
        return self.spec.threshold if inputs.threshold is None else inputs.threshold

    def _described(self, jobs: Sequence[_Job], classes: NDArray[np.bool_] | None, timings: Timings) -> list[Reading]:
        """Run pictures at once if each output has a part for each of them, and one by one otherwise."""
        if len(jobs) > 1 and not self._divides(len(jobs)):
            return [each for job in jobs for each in self._described([job], classes, timings)]
        pixels = np.stack([job.prepared.pixels for job in jobs])
        given = pixels if self.spec.layout == "NCHW" else pixels.transpose(0, 2, 3, 1)
        values = {self.spec.input: np.ascontiguousarray(given)}
        values |= {each.name: _filled(each, jobs[0].prepared) for each in self._inputs}
        outputs = self._infer(values, self._shapes(len(jobs)), timings)
        return [
            partial(
                self._read_described, _parts(outputs, n) if len(jobs) > 1 else outputs, job.prepared.emptied(), classes
            )
            for n, job in enumerate(jobs)
        ]

    def _read_described(
        self, outputs: Outputs, picture: Prepared, classes: NDArray[np.bool_] | None, inputs: DetectInputs
    ) -> Found:
        found = decode_described(outputs, self.spec, picture, inputs.threshold, suppressed=inputs.nms is None)
        return found if classes is None else found.take(np.flatnonzero(_named(classes, found.classes)))

    def _divides(self, count: int) -> bool:
        """Say whether the model takes `count` pictures, and gives a part of each output to each of them."""
        if self._inputs or self.spec.kind != "described":
            return False
        if count not in self._dividing:
            try:
                ports = self._bundle.get("detector", self._shapes(count)).outputs
                whole = all(
                    port.partial_shape.rank.get_length() >= 3 and port.partial_shape[0] == count for port in ports
                )
            except (InputError, *OPENVINO_ERRORS):
                whole = False
            self._dividing[count] = whole
        return self._dividing[count]

    def _run_text(self, jobs: Sequence[_Job], passages: Sequence[Passage], timings: Timings) -> list[Reading]:
        """Run pictures at once; with a text in several parts one by one, all parts at once: the backbone runs once."""

        def run(pictures: list[Prepared], pairs: list[tuple[Prepared, Passage]]) -> list[Reading]:
            outputs = self._infer_text(pictures, [passage for _, passage in pairs], timings)
            rows = zip(outputs["logits"], outputs["boxes"], pairs, strict=True)
            return [
                partial(self._read_text, logits[:, : len(passage.tokens)], boxes, passage, picture.emptied())
                for logits, boxes, (picture, passage) in rows
            ]

        pictures = [job.prepared for job in jobs]
        if len(passages) == 1:
            return run(pictures, [(picture, passages[0]) for picture in pictures])
        return [_joined(run([picture], [(picture, passage) for passage in passages])) for picture in pictures]

    def _read_text(
        self,
        logits: NDArray[np.float32],
        boxes: NDArray[np.float32],
        passage: Passage,
        picture: Prepared,
        inputs: DetectInputs,
    ) -> Found:
        return decode_text(logits, boxes, passage, picture, self._threshold(inputs), inputs.text_threshold)

    def _infer_text(self, pictures: Sequence[Prepared], passages: Sequence[Passage], timings: Timings) -> Outputs:
        """Run pictures with a passage each, or one picture with several."""
        tokens, shapes = max(len(passage.tokens) for passage in passages), None
        if self._options.size:
            tokens += -tokens % STEP
        padded = [passage.padded(tokens) for passage in passages]
        given = {
            "pixel_values": np.stack([each.pixels for each in pictures]),
            "pixel_mask": np.stack([each.mask for each in pictures]),
            "text_features": np.concatenate([passage.features for passage in padded]),
            "text_mask": np.concatenate([passage.mask for passage in padded]),
            "text_self_mask": np.concatenate([passage.self_mask for passage in padded]),
            "text_position_ids": np.concatenate([passage.positions for passage in padded]),
        }  # fmt: skip
        if self._options.size:
            shapes = {name: value.shape for name, value in given.items()}
        return self._infer(given, shapes, timings)

    def _infer(self, given: Outputs, shapes: dict[str, Any] | None, timings: Timings) -> Outputs:
        """Return the detector's outputs by name, copied."""
        key = str(shapes)
        if key not in self._requests:
            self._requests[key] = self._bundle.get("detector", shapes).create_infer_request()
        request = self._requests[key]
        types = {name: port.element_type for port in request.model_inputs for name in port.names}
        given = {name: _as_type(value, types[name]) for name, value in given.items()}
        with timings.span("detector"):
            request.infer(given)
        values = [(port.names, _copied(request.get_tensor(port).data)) for port in request.model_outputs]
        return {name: value for names, value in values for name in names}

    def _shapes(self, count: int) -> dict[str, Any] | None:
        """Return the shapes of a detector of one size, or one that knows classes and is to have one; else None."""
        own = (self.spec.height, self.spec.width) if self.spec.height and self.spec.width else None
        size = own or (self._options.size if self.spec.kind == "classes" else None)
        if size is None:
            return None
        sides = (*size, self.spec.channels) if self.spec.layout == "NHWC" else (self.spec.channels, *size)
        return {self.spec.input: (count, *sides), **{each.name: each.shape for each in self._inputs}}

    def _sorted(self, found: Found, job: _Job, names: Sequence[str], inputs: DetectInputs) -> Detections:
        """Return the best ones, after the suppression that was asked for, or that the model needs."""
        most = self.spec.nms if inputs.nms is None else inputs.nms
        kept = found if most is None else suppress(found, most)
        kept = kept.take(np.argsort(-kept.scores, kind="stable")[: inputs.limit])
        height, width = job.prepared.size
        known = list(names)
        least, last = int(kept.classes.min(initial=0)), int(kept.classes.max(initial=-1))
        if least < 0 or last >= MAX_CLASSES:
            raise ModelError(
                f"it found an object of the class {min(least, 0) or last}, and classes are 0 to {MAX_CLASSES - 1}",
                where=job.name,
                hint="Its outputs are not what its description says, or the model is damaged.",
            )
        known += [f"class {number}" for number in range(len(known), last + 1)]
        return Detections(
            job.name, (width, height), kept.boxes, kept.scores, kept.classes, known, kept.words, kept.spans
        )


def _joined(readings: Sequence[Reading]) -> Reading:
    """Return several passes over one picture as one."""
    return lambda inputs: join([read(inputs) for read in readings])


def _renumbered(passage: Passage, sought: Wanted) -> Passage:
    """Return a passage whose phrases have the numbers of their names."""
    firsts = np.array([*sought.firsts, -1], np.int64)
    return replace(passage, phrases=firsts[passage.phrases])


def _named(wanted_classes: NDArray[np.bool_], classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Say which classes are wanted; those without a label are not."""
    known = (classes >= 0) & (classes < len(wanted_classes))
    which: NDArray[np.bool_] = known & np.append(wanted_classes, False)[np.where(known, classes, -1)]
    return which


def _parts(outputs: Outputs, place: int) -> Outputs:
    """Return the outputs of one picture of several; those of several names stay one array."""
    parts = {id(value): value[place : place + 1] for value in outputs.values()}
    return {name: parts[id(value)] for name, value in outputs.items()}


def _filled(extra: ExtraInput, picture: Prepared) -> NDArray[np.float32]:
    """Return an input beside the picture: DL Streamer's `image_info`, ones, or PaddleDetection's sizes and scales."""
    if extra.content == "im_shape":
        values: list[float] = list(picture.content)
    elif extra.content == "scale_factor":
        values = [picture.scale[1], picture.scale[0]]
    else:
        values = [*picture.canvas] if extra.content == "image_info" else []
    filled = np.full(extra.shape, extra.scale, np.float32)
    filled.reshape(-1)[: len(values)] = values
    return filled


def _as_type(value: NDArray[Any], kind: ov.Type) -> NDArray[Any]:
    """Return values in the type that an input has, rounded if it takes whole numbers."""
    dtype = np.dtype(kind.to_dtype())
    if np.issubdtype(dtype, np.integer) and np.issubdtype(value.dtype, np.floating):
        value = np.rint(value)
    return value.astype(dtype, copy=False)


def _copied(value: NDArray[Any]) -> NDArray[Any]:
    """Return a copy of an output, floating-point numbers as float32."""
    return np.array(value) if np.issubdtype(value.dtype, np.integer) else np.array(value, np.float32)


def _pictures(given: Any) -> tuple[list[Any], bool]:
    """Return pictures, those of a folder in order of their names, and whether it was a folder."""
    each = list(given) if isinstance(given, list | tuple) else [given]
    if not each:
        raise InputError("there is no picture", where="image")
    if len(each) == 1 and isinstance(each[0], Path) and each[0].is_dir():
        paths: list[Any] = sorted(path for path in each[0].iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
        if not paths:
            raise InputError(
                f"{each[0]}: no picture is in the folder",
                where="image",
                hint=f"It looks for {', '.join(sorted(PICTURE_SUFFIXES))}.",
            )
        return paths, True
    for path in each:
        if isinstance(path, Path) and path.is_dir():
            raise InputError(f"{path} is a folder among pictures", where="image", hint="Give one folder alone.")
    return each, False


def _as_inputs(inputs: DetectInputs) -> dict[str, Any]:
    """Return inputs as JSON, pictures by path or digest."""
    given = inputs.image if isinstance(inputs.image, list) else [inputs.image]
    names = [picture_name(each) for each in given]
    return {**inputs.model_dump(exclude={"image"}), "image": names if isinstance(inputs.image, list) else names[0]}
