"""What a detector's model says of itself: how pictures go in, and how its outputs are decoded.

A loader puts a `DetectorSpec` into the config of its role `detector`, and the task `detect` reads it there: this is all
that a plugin with a detector needs to know of the plugin that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ovforge.errors import ModelError

__all__ = ["DetectorSpec"]

KEY = "detection"
"""Key of the spec in the role's config.json."""


class DetectorSpec(BaseModel):
    """How a role `detector` is used; kept in its config.json under "detection".

    kind "text": inputs pixel_values, pixel_mask, text_features, text_mask, text_self_mask, text_position_ids; outputs
    logits (pictures, queries, tokens) and boxes (pictures, queries, 4), relative centre and size. Beside it there are
    the roles text_encoder (input_ids, text_self_mask, text_position_ids -> text_features) and tokenizer. One picture
    may come with several texts, and is then read with each.

    kind "classes": input pixel_values; outputs logits (pictures, queries, classes) and boxes as above.

    kind "described": any input and outputs; `inputs` and `outputs` are what a model-proc of DL Streamer says of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["text", "classes", "described"]
    shortest: int | None = Field(None, gt=0, description="Shortest side that pictures are scaled to, in pixels.")
    longest: int | None = Field(None, gt=0, description="Longest side that it may lead to.")
    height: int | None = Field(None, gt=0, description="Height of the input, in pixels; without it any.")
    width: int | None = Field(None, gt=0, description="Width of the input, in pixels.")
    resize: Literal["stretch", "fit", "none", "multiple"] = Field(
        "stretch",
        description="Without `shortest`: to the input's size, into it with the picture's shape, or not at all; for an "
        "input of any size to about the picture's shape, by that side of `bounds` which changes less.",
    )
    bounds: tuple[int, int] | None = Field(
        None, description="Height and width that pictures are scaled to or into, if they are not the input's."
    )
    resample: Literal["linear", "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = Field(
        "bilinear", description="Filter that scales. All average what they shrink, but linear, which is OpenCV's."
    )
    crop: Literal["none", "central", "central-resize", "top_left", "top_right", "bottom_left", "bottom_right"] = Field(
        "none", description="Part that is kept of a scaled picture that is larger than the input."
    )
    margin: tuple[int, int] = Field((0, 0), description="Pixels left and right, above and below, that stay empty.")
    centred: bool = Field(False, description="Whether a picture smaller than the input lies in its middle.")
    multiple: int = Field(1, gt=0, description="The sides of the input are multiples of it.")
    fill: tuple[float, ...] = Field((0.0,), description="Pixel around the picture, before it is normalized.")
    colours: Literal["RGB", "BGR"] = "RGB"
    channels: Literal[1, 3, 4] = Field(3, description="Of the input: grey, colours, or colours and opacity.")
    scale: float = Field(1 / 255, description="Pixels are multiplied by it, ...")
    mean: tuple[float, ...] = Field((0.0, 0.0, 0.0), description="... the mean is taken off, ...")
    std: tuple[float, ...] = Field((1.0, 1.0, 1.0), description="... and the rest divided by the deviation.")
    threshold: float = Field(0.5, ge=0, le=1, description="Score that boxes need if the user names none.")
    nms: float | None = Field(None, ge=0, le=1, description="Overlap (IoU) above which the lower score goes.")
    labels: tuple[str, ...] = Field((), description="Names of classes, by their number.")
    queries: int = Field(0, ge=0, description="Fewest places that the picture may have.")
    strides: tuple[int, ...] = Field((), description="Strides of the feature maps.")
    max_tokens: int = Field(256, gt=2)
    delimiters: tuple[int, ...] = Field((), description="Ids of the tokens that end phrases; the first begins a text.")
    outputs: tuple[dict[str, Any], ...] = ()
    input: str = Field("pixel_values", description="Name of the input that takes pictures.")
    inputs: tuple[dict[str, Any], ...] = Field((), description="Further inputs, and what they are filled with.")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    notes: tuple[str, ...] = Field((), description="What results say of how the model was described.")

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str = "detector/config.json") -> DetectorSpec:
        """Return the spec in a role's config. Raises ModelError if there is none."""
        try:
            return cls.model_validate(config[KEY])
        except KeyError:
            raise ModelError(
                f'it does not say how it is used: the key "{KEY}" is missing',
                where=where,
                hint="Describe a model of another origin by a model-proc file: `ovforge detect --model-proc FILE`, or "
                'load.use = "model-proc" with load.proc.',
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{KEY}.{'.'.join(map(str, first['loc']))}: {first['msg']}", where=where) from error

    def put(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a role's config with this spec in it."""
        return {**config, KEY: self.model_dump(mode="json", exclude_defaults=True)}
