"""`ovforge lcm`: what the embedded model makes of a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge_lcm import EMBEDDED_MODEL

__all__ = ["lcm"]

PROMPT = "a beautiful pink unicorn, 8k"


def lcm(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")] = PROMPT,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture.")] = Path("lcm.png"),
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="Of the first picture; the next take the next numbers.")
    ] = 1234567,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps; the model's own by default.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="How closely to follow the prompt.")
    ] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; the model's own by default.")] = None,
    height: Annotated[int | None, typer.Option("--height", help="Pixels; the model's own by default.")] = None,
    count: Annotated[int, typer.Option("--count", help="How many pictures.")] = 1,
    device: Annotated[str, typer.Option("--device", "-d", help="CPU, GPU, NPU or AUTO.")] = "CPU",
    precision: Annotated[
        str, typer.Option("--precision", help="What the device computes in: auto, f32, bf16 or f16.")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Make pictures with the embedded latent consistency model.

    It knows about 150 objects in nine colours on ten backgrounds. `ovforge run` takes configs with models of your own.

    Example: ovforge lcm 'a green dragon on a yellow background'
    """
    import ovforge
    from ovforge import Plugins
    from ovforge.cli import check_writable, print_result, progress_bar

    task: Any = Plugins().find("task", "text-to-image").extension
    check_writable(output, task.result_type())
    optional = {"steps": steps, "guidance_scale": guidance, "width": width, "height": height}
    config = {
        "task": "text-to-image",
        "load": EMBEDDED_MODEL,
        "device": {"use": device.lower(), **({"precision": precision} if precision != "auto" else {})},
        "input": {
            "prompt": prompt,
            "seed": seed,
            "count": count,
            **{name: value for name, value in optional.items() if value is not None},
        },
    }
    with progress_bar(quiet) as show:
        pipe = ovforge.load(config, progress=show)
        result = pipe(progress=show)
    files = result.save(output)
    print_result(result, files, pipe, quiet=quiet)
