"""`ovforge grounding-dino`: what the embedded detector finds, by default in a scene that ships with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.model import PACKAGE
from ovforge_grounding_dino import EMBEDDED_MODEL

__all__ = ["grounding_dino"]

SCENE, SHOWN = "package:ovforge_grounding_dino/demo/scene.jpg", "horse. tree. cloud. sun. house. car. dog. balloon."
"""What it looks at, and looks for."""


def grounding_dino(
    images: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures, or a folder of them; by default a scene that ships.", show_default=False),
    ] = None,
    text: Annotated[str, typer.Option("--text", "-t", help="What to find.")] = SHOWN,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="An annotated picture, .json (COCO), .csv, or a folder for all.")
    ] = Path("detections.png"),
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Score that boxes need; by default the model's own.")
    ] = None,
    device: Annotated[str, typer.Option("--device", "-d", help="CPU, GPU, NPU or AUTO.")] = "CPU",
    precision: Annotated[
        str, typer.Option("--precision", help="What the device computes in: auto, f32, bf16 or f16.")
    ] = "auto",
    cache: Annotated[Path | None, typer.Option("--cache", "-c", help="Folder of the cache.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Find things with the embedded detector.

    It knows 84 things drawn as emoji, and nothing of photographs. `ovforge detect` takes models of your own.

    Example: ovforge grounding-dino -t 'Horse. Tree.' -o found.png
    """
    import ovforge
    from ovforge import Cache, Plugins
    from ovforge.cli import check_writable, print_result, progress_bar

    task: Any = Plugins().find("task", "detect").extension
    check_writable(output, task.result_type())
    paths = [path if path.startswith(PACKAGE) else str(Path(path).resolve()) for path in images or [SCENE]]
    config = {
        "task": "detect",
        "load": EMBEDDED_MODEL,
        "device": {"use": device.lower(), **({"precision": precision} if precision != "auto" else {})},
        "input": {
            "image": paths[0] if len(paths) == 1 else paths,
            "text": text,
            **({"threshold": threshold} if threshold is not None else {}),
        },
    }
    store: Any = Cache(cache) if cache else "default"
    with progress_bar(quiet) as show:
        pipe = ovforge.load(config, cache=store, progress=show)
        result = pipe(progress=show)
    files = result.save(output)
    print_result(result, files, pipe, quiet=quiet)
