"""`ovforge generate`: a diffusion pipeline in one command, with the flags of the article it comes from.

Source: "C++ Pipeline for Stable Diffusion v1.5 with Pybind for Lora Enabling" (blog.openvino.ai, 2023).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.errors import InputError
from ovforge_diffusion.generate_controls import controls_of
from ovforge_diffusion.generate_videos import video_of

__all__ = ["generate"]

_TYPES = ("FP32", "FP16", "INT8")


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the picture shows.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A folder, file or package:NAME/PATH.")],
    negative: Annotated[
        str | None, typer.Option("--negative", "-n", help="What it should not show; may be empty.")
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", "-t", metavar="FP32|FP16|INT8[_static|_dyn]", help="Precision of weights, and shapes."),
    ] = None,
    device: Annotated[str, typer.Option("--device", "-d", help="CPU, GPU, NPU or AUTO.")] = "CPU",
    precision: Annotated[
        str, typer.Option("--precision", help="What the device computes in: auto, f32, bf16 or f16.")
    ] = "auto",
    seed: Annotated[
        int, typer.Option("--seed", "-s", help="Of the first picture; the next take the next numbers.")
    ] = 42,
    height: Annotated[int | None, typer.Option("--height", help="Pixels; the model's own by default.")] = None,
    width: Annotated[int | None, typer.Option("--width", help="Pixels; the model's own by default.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", "-g", help="How closely to follow the prompt.")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="The sampling method; by default the model's own.")
    ] = None,
    count: Annotated[int, typer.Option("--count", help="How many pictures.")] = 1,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="A picture to start from.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="What of it to paint anew: the white part.")] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="How far to go from it, 0 to 1.")] = None,
    controlnet: Annotated[
        list[str] | None,
        typer.Option(
            "--controlnet",
            metavar="FOLDER=PICTURE[,KEY=VALUE]...",
            help="A ControlNet and its condition; keys: scale, start, end, mode, mask, around, preprocess, low, high.",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            metavar="PICTURE[,KEY=VALUE]...",
            help="A condition for a model that takes one itself, or one more for the ControlNet; keys likewise.",
        ),
    ] = None,
    canny: Annotated[bool, typer.Option("--canny", help="Make conditions of the pictures' edges.")] = False,
    lora: Annotated[
        list[Path] | None, typer.Option("--lora", "-l", help="An adapter file; several one after another.")
    ] = None,
    alpha: Annotated[list[float] | None, typer.Option("--alpha", "-a", help="Strength of each adapter.")] = None,
    clip_skip: Annotated[int, typer.Option("--clip-skip", help="Layers of the text encoder to leave out.")] = 0,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Read prompts as the web UI does: (word:1.3), [a:b:0.5], AND.")
    ] = False,
    chunks: Annotated[bool, typer.Option("--chunks", help="Read prompts beyond 77 tokens in chunks.")] = False,
    latents: Annotated[
        Path | None, typer.Option("--latents", "-r", help="The first noise: .npy, or numpy's text.")
    ] = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Hold one model in memory at a time.")] = False,
    frames: Annotated[
        int | None, typer.Option("--frames", help="Make a video of so many frames, one more than a multiple of 8.")
    ] = None,
    frame_rate: Annotated[float | None, typer.Option("--frame-rate", help="Frames a second; 25 by default.")] = None,
    upscaler: Annotated[
        Path | None,
        typer.Option(
            "--upscaler", help="The latent upsampler of a video's model: make it small, enlarge and refine it."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The picture, or video; .npy writes latents. By default result.png or .mp4."
        ),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="A picture that is written anew after each step.")
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", "-c", help="Folder of the cache.")] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Write shapes, statistics and time of each step there.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")] = False,
) -> None:
    """Make pictures, or videos, with a diffusion model in one command.

    Example: ovforge generate -m package:ovforge_lcm/model -p 'a red car' --steps 4
    """
    import ovforge
    from ovforge import Cache
    from ovforge.cli import check_writable, print_result, progress_bar
    from ovforge.model import ImagesResult
    from ovforge_diffusion.video.result import VideosResult

    video = video_of(
        frames, frame_rate, upscaler, image, mask=mask, strength=strength is not None, controlnet=controlnet,
        control=control, canny=canny,
    )  # fmt: skip
    kind = ImagesResult if video is None else VideosResult
    output = output or Path(f"result{kind.suffixes[0]}")
    check_writable(output, kind)
    if preview is not None:
        check_writable(preview, ImagesResult)
    if image is None and (mask or strength is not None):
        raise InputError("there is no picture to change", where="--mask, --strength", hint="Name it with --image.")
    weights, static = _type(type_)
    inputs: dict[str, Any] = {"prompt": prompt, "seed": seed, "count": count}
    optional: dict[str, Any] = {
        "negative_prompt": negative, "height": height, "width": width, "steps": steps, "guidance_scale": guidance,
        "latents": latents and str(latents.resolve()), "mask": mask and str(mask.resolve()),
        "image": image and str(image.resolve()), "strength": strength,
    }  # fmt: skip
    parts, conditions = controls_of(controlnet or [], control or [], canny=canny)
    if conditions:
        optional["control"] = conditions
    use = "inpainting" if mask else "image-to-image" if image else "text-to-image"
    if video is not None:
        use, own, parts = video
        optional |= {"image": None, **own}
    config: dict[str, Any] = {
        "task": {
            "use": use,
            **({"static": False} if not static else {}),
            **({"prompts": "weighted"} if weighted else {}),
            **({"long_prompts": "chunks"} if chunks else {}),
            **({"low_memory": True} if low_memory else {}),
        },
        "load": {
            "source": model,
            **({"parts": parts} if parts else {}),
        },
        "transform": [*_adapters(lora or [], alpha or []), *([_clip_skip(clip_skip)] if clip_skip else [])],
        "quantize": [{"use": "nncf-weights", "mode": "int8_sym"}] if weights == "INT8" else [],
        **({"scheduler": scheduler} if scheduler else {}),
        "device": {"use": device.lower(), **({"precision": precision} if precision != "auto" else {})},
        "input": {**inputs, **{name: value for name, value in optional.items() if value is not None}},
    }
    if weights in ("FP32", "FP16"):
        config["load"] |= _weights(model, weights)
    store: Any = Cache(cache) if cache else "default"
    with _logged(log), progress_bar(quiet) as show:
        pipe = ovforge.load(config, cache=store, progress=show)
        result = pipe(progress=_previewing(show, preview))
    files = result.save(output)
    print_result(result, files, pipe, quiet=quiet)


def _type(text: str | None) -> tuple[str | None, bool]:
    """Return the weights' type and whether shapes are fixed, from "FP16_static" and the like."""
    if text is None:
        return None, True
    weights, _, shapes = text.partition("_")
    if weights.upper() not in _TYPES or shapes not in ("", "static", "dyn"):
        raise InputError(
            f"{text!r} is not a type of model",
            where="--type",
            hint=f"Give {', '.join(_TYPES)}, with _static or _dyn or without.",
        )
    return weights.upper(), shapes != "dyn"


def _weights(model: str, weights: str) -> dict[str, str]:
    """Return the loader's option for a source that is converted; a ready one keeps its weights as they are."""
    import ovforge

    options = ovforge.find_loader(model).options_model()
    if options is None or "weights" not in options.model_fields:
        return {}
    return {"weights": {"FP32": "f32", "FP16": "f16"}[weights]}


def _adapters(files: list[Path], strengths: list[float]) -> list[dict[str, Any]]:
    """Return a `lora` transform for each file; the article's strength is 0.75."""
    if len(strengths) not in (0, 1, len(files)) or (strengths and not files):
        raise InputError(f"{len(strengths)} given for {len(files)} --lora", where="--alpha", hint="Give one for each.")
    each = strengths if len(strengths) == len(files) else (strengths or [0.75]) * len(files)
    return [{"use": "lora", "path": str(f.resolve()), "scale": scale} for f, scale in zip(files, each, strict=True)]


def _clip_skip(layers: int) -> dict[str, Any]:
    return {"use": "clip-skip", "layers": layers}


def _previewing(show: Any, target: Path | None) -> Any:
    """Return a progress callback that also writes a preview after each step."""
    from ovforge.model import ImagesResult

    if target is None:
        return show

    def both(moment: Any) -> None:
        show(moment)
        if moment.preview is not None:
            images = moment.preview()
            ImagesResult(images=images[:1]).save(target)

    return both


@contextmanager
def _logged(path: Path | None) -> Iterator[None]:
    """Write the debug log of the tasks to a file while a block runs."""
    if path is None:
        yield
        return
    logger = logging.getLogger("ovforge")
    try:
        handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
