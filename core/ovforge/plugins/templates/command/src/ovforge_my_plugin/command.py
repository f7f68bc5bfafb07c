"""The command itself: a function in typer's style. What it needs is imported when it runs, so that help is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from ovforge.errors import InputError


def compare(
    first: Annotated[Path, typer.Argument(help="A picture.")],
    second: Annotated[Path, typer.Argument(help="Another picture, of the same size.")],
    metric: Annotated[str, typer.Option("--metric", help="ssim, psnr or gmsd; higher is more alike.")] = "ssim",
    minimum: Annotated[float | None, typer.Option("--min", help="Fail if they are less alike than this.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how alike two pictures are. Exit code 1 if they are less alike than --min."""
    import numpy as np
    from ovforge.model import METRICS, open_picture

    if metric not in METRICS:
        raise InputError(f"{metric!r} is not a known metric", where="--metric", hint=f"Known: {', '.join(METRICS)}.")
    pictures = [np.asarray(open_picture(path, name)) for path, name in ((first, "FIRST"), (second, "SECOND"))]
    if pictures[0].shape != pictures[1].shape:
        (height, width, _), (other_height, other_width, _) = (picture.shape for picture in pictures)
        raise InputError(
            f"the pictures are {width}x{height} and {other_width}x{other_height}",
            where=str(second),
            hint="Scale one of them.",
        )
    score = METRICS[metric].measure(*pictures)
    print(json.dumps({"metric": metric, "score": score}) if as_json else f"{metric} {score:.4f}")
    if minimum is not None and score < minimum:
        raise typer.Exit(1)
