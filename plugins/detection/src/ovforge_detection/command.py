"""`ovforge detect`: a detector in one command, with the flags of the article that it comes from.

Source: "Enable OpenVINO Optimization for GroundingDINO" (blog.openvino.ai, 2023).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.errors import InputError
from ovforge.model import PACKAGE, PICTURE_SUFFIXES, package_path

__all__ = ["detect"]

MODELS = (".xml", ".onnx", ".pdmodel", ".tflite", ".pb")
"""Suffixes of ready models, which a description tells how to use."""


def detect(
    images: Annotated[list[str], typer.Argument(help="Pictures, or a folder of them.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="A folder, file or package:NAME/PATH with a detector.")],
    text: Annotated[
        str | None,
        typer.Option("--text", "-t", help='What to find: "Horse. Clouds."; or which of the model\'s classes.'),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="An annotated picture, .json (COCO), .csv, or a folder for all.")
    ] = Path("detections.png"),
    device: Annotated[str, typer.Option("--device", "-d", help="CPU, GPU, NPU or AUTO.")] = "CPU",
    precision: Annotated[
        str, typer.Option("--precision", help="What the device computes in: auto, f32, bf16 or f16.")
    ] = "auto",
    weights: Annotated[
        str | None, typer.Option("--weights", help="How a model that is converted stores its weights: f16 or f32.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Score that boxes need; by default the model's own.")
    ] = None,
    text_threshold: Annotated[
        float, typer.Option("--text-threshold", help="Score that words need to be named with a box.")
    ] = 0.25,
    nms: Annotated[
        float | None, typer.Option("--nms", help="Overlap above which the lower score goes. 1 keeps all.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="HEIGHTxWIDTH",
            help="Size of the model's input, if it takes any: needed by ready models, and faster for others.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Pictures of one size that run at once.")] = 1,
    proc: Annotated[
        Path | None,
        typer.Option("--model-proc", help="A ready model's description, in DL Streamer's model-proc format."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="An original checkpoint's: bert-base-uncased, or its vocab.txt.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="torch", help="Run PyTorch, too, and draw both side by side.")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", "-c", help="Folder of the cache.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Find things in pictures and folders, by text or by classes.

    Example: ovforge detect photo.jpg -m models/grounding-dino-tiny -t 'Horse. Clouds.' -o out.png
    """
    import ovforge
    from ovforge import Cache
    from ovforge.cli import check_writable, print_result, progress_bar
    from ovforge_detection.results import DetectionsResult

    check_writable(output, DetectionsResult)
    if compare not in (None, "torch"):
        raise InputError(f"{compare!r} is nothing to compare with", where="--compare", hint="Give torch.")
    paths = [path if path.startswith(PACKAGE) else str(Path(path).resolve()) for path in images]
    inputs: dict[str, Any] = {
        "image": paths[0] if len(paths) == 1 else paths, "text": text, "threshold": threshold,
        "text_threshold": text_threshold, "nms": nms,
    }  # fmt: skip
    load, task = _tables(model, proc, _size(size) if size else None, weights)
    config = {
        "task": {"use": "detect", "batch": batch, **task},
        "load": {**load, **({"tokenizer": str(tokenizer.resolve())} if tokenizer else {})},
        "device": {"use": device.lower(), **({"precision": precision} if precision != "auto" else {})},
        "input": {name: value for name, value in inputs.items() if value is not None},
    }
    store: Any = Cache(cache) if cache else "default"
    with progress_bar(quiet) as show:
        pipe = ovforge.load(config, cache=store, progress=show)
        result = pipe(progress=show)
        files = _compared(pipe, result, model, output) if compare else result.save(output)
    print_result(result, files, pipe, quiet=quiet)


def _tables(
    model: str, proc: Path | None, size: tuple[int, int] | None, weights: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tables `load` and `task` of a config: whose option a flag is depends on what is loaded."""
    load: dict[str, Any] = {"source": model}
    ready = proc is not None or (Path(model).suffix in MODELS and not model.startswith(PACKAGE))
    if ready:
        load |= {"use": "model-proc", **({"proc": str(proc.resolve())} if proc else {})}
    if weights:
        if ready or _holds(model, "*.xml", "*/*.xml"):
            raise InputError(
                "the model is converted already, and its weights stay as they are", where="--weights",
                hint="Leave it out; or name the model that it was converted from.",
            )  # fmt: skip
        load["weights"] = weights
    if size and (ready or _converts(model)):
        return {**load, "height": size[0], "width": size[1]}, {}
    return load, {"size": size} if size else {}


def _holds(model: str, *patterns: str) -> bool:
    """Say whether a folder, or one in a package, holds files of these names."""
    folder = package_path(model) if model.startswith(PACKAGE) else Path(model).expanduser()
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _converts(model: str) -> bool:
    """Say whether the model is one that `detr` converts, for a size of input."""
    from ovforge import open_file
    from ovforge.contracts import Match
    from ovforge_detection.detr import DetrLoader, DetrOptions

    if model.startswith(PACKAGE) or _holds(model, "*.xml", "*/*.xml") or not _holds(model, "config.json"):
        return False
    return DetrLoader(DetrOptions.model_construct()).can_load(open_file(Path(model).expanduser())) is Match.YES


def _size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise InputError(f"{text!r} is not a HEIGHTxWIDTH", where="--size", hint="For example 800x1216.")
    return int(height), int(width)


def _compared(pipe: Any, result: Any, model: str, output: Path) -> list[Path]:
    """Run torch on the same inputs; write both side by side, and say how they differ."""
    from PIL import Image

    from ovforge.config import checked
    from ovforge.contracts import ignore_progress
    from ovforge.store import atomic_write
    from ovforge_detection.compare import differences, on_torch, side_by_side

    if output.suffix.lower() not in PICTURE_SUFFIXES:
        raise InputError("only a picture shows both", where="--output", hint="Name a .png or .jpg file.")
    kind = Image.registered_extensions()[output.suffix.lower()]
    task = on_torch(pipe.task, model)
    inputs = checked(pipe.inputs_model, pipe.config.input, where="input", base=pipe.base)
    theirs = task(inputs, ignore_progress)
    result.timings.add("torch", theirs.timings.total("detector"))
    written = []
    for n, each in enumerate(result.detections):
        buffer = io.BytesIO()
        side_by_side(["PyTorch", "OpenVINO"], [theirs, result], n).save(buffer, kind)
        file = output.with_stem(f"{output.stem}-{n + 1}") if len(result.detections) > 1 else output
        atomic_write(file, buffer.getvalue())
        written.append(file)
        result.warnings.append(f"{each.picture}: {differences(each, theirs.detections[n])}")
    return written
