"""A third party's tasks for pages: one draws, as slowly as it is told, and one gives a painted mask back."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from ovforge import ImagesResult, Progress, hookimpl
from ovforge.contracts import TaskExtension
from ovforge.errors import InputError
from ovforge.model import Picture, open_picture

SIDE = 48


class DrawInputs(BaseModel):
    """Each kind of field."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    prompt: str | list[str] = Field(description="What to draw: (word:1.3), <lora:name:0.8>.")
    steps: int = Field(3, ge=1, le=100_000, description="Steps.")
    colour: Literal["red", "blue"] | None = None
    strength: float = Field(0.5, gt=0, le=1)
    seed: int | None = None
    whole: bool = False
    decode: bool | None = None
    names: list[str] = Field(default_factory=list)
    pair: tuple[int, int] = (1, 2)


class Sticker(BaseModel):
    """A picture to put on another."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    image: Picture
    left: int = Field(0, ge=0, le=64)


class PaintInputs(BaseModel):
    """A picture, a mask, and what is put on it."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    image: Picture
    mask: Picture
    stickers: list[Sticker] = Field(default_factory=list, max_length=2)


class Draw:
    """Draws the colour, as slowly as the prompt says."""

    def __init__(self, options: Any, context: Any) -> None:
        self._pause = threading.Event()

    def __call__(self, inputs: DrawInputs, progress: Callable[[Progress], None]) -> ImagesResult:
        if inputs.prompt == "wrong":
            raise InputError("<b>bold</b> is *not* drawn", where="prompt", hint="Draw <i>this</i>.")
        if inputs.prompt == "broken":
            raise RuntimeError("a fault of the task")
        seed = 7 if inputs.seed is None else inputs.seed
        picture = Image.new("RGB", (SIDE, SIDE), inputs.colour or "green")
        picture.putpixel((0, 0), (seed % 256, 0, 0))
        for step in range(inputs.steps):
            progress(Progress("draw", step, inputs.steps, "<u>note</u>", preview=lambda: [picture]))
            if inputs.prompt == "slow":
                self._pause.wait(0.02)
        return ImagesResult(images=[picture], seeds=[seed])


class Paint:
    """Gives the mask back, with its stickers."""

    def __init__(self, options: Any, context: Any) -> None:
        pass

    def __call__(self, inputs: PaintInputs, progress: Callable[[Progress], None]) -> ImagesResult:
        assert open_picture(inputs.image, "image").size == open_picture(inputs.mask, "mask").size
        painted = open_picture(inputs.mask, "mask", "L", "black")
        for sticker in inputs.stickers:
            painted.paste(open_picture(sticker.image, "stickers.image", "L"), (sticker.left, 0))
        return ImagesResult(images=[painted], seeds=[0])


def third_party() -> types.ModuleType:
    """Return a plugin with the two tasks."""
    module = types.ModuleType("ovforge_drawing")

    @hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        about: dict[str, Any] = {"roles": ("model",), "result": ImagesResult}
        yield TaskExtension(name="draw", summary="Draw <b>it</b>", factory=Draw, inputs=DrawInputs, **about)
        yield TaskExtension(name="paint", summary="Paint", factory=Paint, inputs=PaintInputs, **about)

    module.ovforge_tasks = ovforge_tasks  # type: ignore[attr-defined]
    return module
