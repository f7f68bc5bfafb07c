"""`ovforge video`: streams in one command, or by one of DL Streamer's lines.

Source: "Intel DL Streamer Optimize Media-AI pipeline on Intel Data Center Flex dGPU" (blog.openvino.ai, 2022).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovforge.errors import InputError
from ovforge.model import PACKAGE

if TYPE_CHECKING:
    from ovforge_video.frame import Frame
    from ovforge_video.result import VideoResult

__all__ = ["video"]

MODELS = (".xml", ".onnx", ".pdmodel", ".tflite", ".pb")
"""Suffixes of ready models, which a description tells how to use."""


def video(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Videos, folders or patterns of pictures, addresses, /dev/video0, -.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A folder, file or package:NAME/PATH with a detector.")
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option("--output", "-o", help=".mp4, .mkv, .265, .264, .jsonl, .json, .txt (MOT), .csv; - prints JSON."),
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text", "-t", help='What to find: "person. car."; or which of the model\'s classes.')
    ] = None,
    proc: Annotated[
        Path | None, typer.Option("--model-proc", help="A ready model's description, in DL Streamer's format.")
    ] = None,
    track: Annotated[str, typer.Option("--track", help="The tracker; none for boxes alone.")] = "steady",
    interval: Annotated[int, typer.Option("--interval", help="The detector looks at every so many frames.")] = 1,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Score of sure boxes; by default the model's own.")
    ] = None,
    describe: Annotated[
        list[str] | None,
        typer.Option(
            "--describe", metavar="MODEL", help="A model that looks at each thing; its model-proc lies beside it."
        ),
    ] = None,
    every: Annotated[int, typer.Option("--every", help="Frames after which it looks at a thing again.")] = 10,
    reidentify: Annotated[
        str | None,
        typer.Option("--reidentify", metavar="MODEL", help="An embedding model that knows things that come back."),
    ] = None,
    tiles: Annotated[int, typer.Option("--tiles", help="Look at so many parts a side, too: for small things.")] = 1,
    region: Annotated[
        str | None, typer.Option("--region", metavar="X,Y X,Y X,Y", help="A polygon, in shares of width and height.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option("--name", help="A name for each stream.")] = None,
    start: Annotated[float, typer.Option("--start", help="Seconds to skip at the beginning.")] = 0.0,
    end: Annotated[float | None, typer.Option("--end", help="Second to end at.")] = None,
    fps: Annotated[float | None, typer.Option("--fps", help="Most frames to look at in a second.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WIDTHxHEIGHT", help="Size that frames are scaled to.")
    ] = None,
    loop: Annotated[int, typer.Option("--loop", help="How often each file is read.")] = 1,
    codec: Annotated[str | None, typer.Option("--codec", help="h265, h264 or av1.")] = None,
    crf: Annotated[int | None, typer.Option("--crf", help="Quality of the video: less is better.")] = None,
    bitrate: Annotated[int | None, typer.Option("--bitrate", help="Kilobits a second, constant.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="The encoder's speed, such as medium.")] = None,
    audio: Annotated[bool, typer.Option("--audio", help="Copy the sound as it is.")] = False,
    device: Annotated[str, typer.Option("--device", "-d", help="CPU, GPU, NPU or AUTO.")] = "CPU",
    precision: Annotated[str, typer.Option("--precision", help="What the device computes in.")] = "auto",
    batch: Annotated[int, typer.Option("--batch", help="Frames of one size that run at once.")] = 1,
    demo: Annotated[
        bool, typer.Option("--demo", help="Find emoji that move over a photograph, by the detector that ships.")
    ] = False,
    gst: Annotated[
        str | None, typer.Option("--gst", help="A line of DL Streamer's, instead of all other options.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the config, and run nothing.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Show the live picture as a page on this machine.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The page's port; 0 is a free one.")] = 0,
    numbers: Annotated[bool, typer.Option("--numbers", help="Print the counts as JSON at the end.")] = False,
    cache: Annotated[Path | None, typer.Option("--cache", "-c", help="Folder of the cache.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Find and follow things in videos and streams; draw, count and encode them.

    Example: ovforge video street.mp4 -m models/rt-detr -t person -o out.mp4 -o out.jsonl
    """
    from ovforge.cli import print_json, print_note

    outputs = list(output or [])
    if demo:
        from ovforge_video.demo import MODEL, TEXT

        if inputs or model or gst is not None:
            raise InputError("--demo brings its clip and model", where="--demo", hint="Leave INPUT and --model out.")
        inputs, model, text, outputs = ["demo.mp4"], MODEL, text or TEXT, outputs or ["demo.mp4"]
    if gst is not None:
        from ovforge_video.gst import parse_line

        if inputs or model or outputs:
            raise InputError("--gst says inputs, model and outputs itself", where="--gst", hint="Give the line alone.")
        line = parse_line(gst)
        config, outputs = line.config, line.outputs
        for note in line.notes:
            print_note(note)
    else:
        if not inputs or not model:
            missing = "an input" if not inputs else "--model"
            raise InputError(f"{missing} is missing", where="video", hint="Write: ovforge video a.mp4 -m DETECTOR.")
        encode = {"codec": codec, "crf": crf, "bitrate": bitrate, "preset": preset}
        task = {"use": "video", "track": track, "interval": interval, "tiles": tiles}
        encode = {key: value for key, value in encode.items() if value is not None}
        encode |= {"rate_control": "cbr"} if bitrate else {}
        given = {
            "video": [_path(each) for each in inputs] if len(inputs) > 1 else _path(inputs[0]), "name": name or [],
            "text": text, "threshold": threshold, "start": start, "end": end, "fps": fps, "loop": loop,
            "size": _size(size) if size else None, "region": _region(region) if region else [],
        }  # fmt: skip
        described = [{"model": _path(each), "every": every} for each in describe or []]
        config = {
            "task": {
                **task, **({"describe": described} if described else {}),
                **({"reidentify": {"model": _path(reidentify)}} if reidentify else {}),
                **({"encode": encode} if encode else {}),
                **({"detect": {"use": "detect", "batch": batch}} if batch > 1 else {}),
            },
            "load": _load(model, proc),
            "device": {
                "use": device.lower(), "hint": "throughput",
                **({"precision": precision} if precision != "auto" else {}),
            },
            "input": {key: value for key, value in given.items() if value not in (None, [])},
        }  # fmt: skip
    if print_config:
        print_json(config)
        return
    with contextlib.ExitStack() as made:
        if demo:
            from ovforge_video.demo import write_clip

            folder = Path(made.enter_context(tempfile.TemporaryDirectory()))
            config["input"]["video"] = str(write_clip(folder / "demo.mp4"))
        _run(config, outputs, audio=audio, port=port if show else None, numbers=numbers, cache=cache, quiet=quiet)


def _run(
    config: dict[str, Any],
    outputs: Sequence[str],
    *,
    audio: bool,
    port: int | None,
    numbers: bool,
    cache: Path | None,
    quiet: bool,
) -> None:
    import ovforge
    from ovforge import Cache
    from ovforge.cli import check_writable, print_json, print_line, print_note, print_warning, progress_bar
    from ovforge_video.result import VideoResult
    from ovforge_video.show import LivePage

    files = [Path(each) for each in outputs if each != "-"]
    for file in files:
        check_writable(file, VideoResult)
    store: Any = Cache(cache) if cache else "default"
    lines = "-" in outputs
    with progress_bar(quiet or lines) as show:
        pipe = ovforge.load(config, cache=store, progress=show)
        result: VideoResult = pipe(progress=show)  # type: ignore[assignment]
        with contextlib.ExitStack() as opened:
            page = None
            if port is not None:
                page = opened.enter_context(LivePage(result.streams, port))
                print_note(f"the live picture: {page.address}")
            written = result.write(files, _print_frame if lines else None, audio=audio, page=page)
    for warning in result.warnings:
        print_warning(warning)
    if numbers:
        print_json(result.counts, indent=None)
    elif not (quiet or lines):
        for line in result.lines():
            print_line(line)
        for file in written:
            print_line((str(file), "bold"))


def _print_frame(frame: Frame) -> None:
    from ovforge.cli import print_json

    print_json(frame.as_json(), indent=None)


def _path(text: str) -> str:
    """Return a path made whole, since a config's paths begin at its folder; addresses as they are."""
    return text if text == "-" or "://" in text else str(Path(text).expanduser().absolute())


def _load(model: str, proc: Path | None) -> dict[str, Any]:
    ready = Path(model).suffix in MODELS and not model.startswith(PACKAGE)
    if proc is None and not ready:
        return {"source": model}
    return {"source": model, "use": "model-proc", **({"proc": str(proc.resolve())} if proc else {})}


def _size(text: str) -> list[int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise InputError(f"{text!r} is not a WIDTHxHEIGHT", where="--size", hint="For example 1280x720.")
    return [int(width), int(height)]


def _region(text: str) -> list[list[float]]:
    try:
        corners = [[float(value) for value in corner.split(",")] for corner in text.split()]
    except ValueError:
        corners = []
    if len(corners) < 3 or any(len(corner) != 2 for corner in corners):
        raise InputError(
            f"{text!r} is not a polygon", where="--region", hint='For example "0,0.5 1,0.5 1,1 0,1": the lower half.'
        )
    return corners
