"""What a config says of the task `video`, and what one call takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)

from ovforge.config import InputFile

__all__ = [
    "DescribeOptions",
    "EncodeOptions",
    "OverlayOptions",
    "ReidentifyOptions",
    "SecondModelOptions",
    "VideoInputs",
    "VideoOptions",
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OverlayOptions(_Part):
    """What is drawn."""

    boxes: bool = Field(True, description="Boxes.")
    ids: bool = Field(True, description="The numbers of tracks.")
    labels: bool = Field(True, description="The names of classes.")
    scores: bool = Field(False, description="Scores.")
    details: bool = Field(True, description="What describing models say of things.")
    trails: int = Field(30, ge=0, le=1000, description="Frames that a thing's way is drawn for; 0 draws none.")
    time: bool = Field(True, description="The stream's name and time.")


class EncodeOptions(_Part):
    """How videos are written."""

    codec: Literal["h265", "h264", "av1"] | None = Field(None, description="By default h265, or what the file holds.")
    encoder: str | None = Field(None, description="FFmpeg's encoder, such as hevc_qsv; by default the codec's own.")
    rate_control: Literal["crf", "cbr"] = Field("crf", description="Constant quality, or constant bitrate.")
    crf: int | None = Field(None, ge=0, le=63, description="Quality, less is better; by default the encoder's.")
    bitrate: int | None = Field(None, ge=1, le=10_000_000, description="Kilobits a second, for cbr.")
    preset: str | None = Field(None, pattern="^[a-z0-9]+$", description="The encoder's speed, such as medium.")
    key_seconds: float = Field(2.0, gt=0, le=60, description="Seconds between key frames: what a killed run may lose.")

    @model_validator(mode="after")
    def _together(self) -> EncodeOptions:
        if (self.rate_control == "cbr") != (self.bitrate is not None):
            raise ValueError("cbr and bitrate go together")
        if self.rate_control == "cbr" and self.crf is not None:
            raise ValueError("crf is for rate_control crf")
        return self


class SecondModelOptions(_Part):
    """A model that looks at the part of a frame that a thing takes."""

    model: InputFile = Field(description="The model's file (IR, ONNX, ...), which takes one picture.")
    proc: InputFile | None = Field(None, description="Its model-proc .json; by default the one beside the model.")
    labels: list[str] = Field([], description="The classes of things that it looks at; by default all.")
    every: int = Field(10, ge=1, le=100_000, description="It looks at a thing again after so many frames.")
    device: str = Field("CPU", pattern=r"^[A-Z]+(\.\d+)?$", description="CPU, GPU, GPU.1, NPU or AUTO.")


class DescribeOptions(SecondModelOptions):
    """A model that looks at each thing: a class, a number or an embedding of it."""


class ReidentifyOptions(SecondModelOptions):
    """A model whose embedding tells things apart: those that come back get the numbers that they had."""

    likeness: float = Field(0.7, ge=-1, le=1, description="Least cosine of the embeddings of one thing.")
    memory: float = Field(30.0, gt=0, le=86_400, description="Seconds for which a thing that is gone is remembered.")


class VideoOptions(_Part):
    """How the task runs."""

    detect: dict[str, Any] | str = Field("detect", description="The task that detects, and its options.")
    track: dict[str, Any] | str = Field("steady", description='The tracker, and its options; "none": boxes alone.')
    interval: int = Field(1, ge=1, le=1000, description="The detector looks at every so many frames.")
    lowest: float = Field(0.1, ge=0, le=1, description="Score of the weakest boxes that the tracker gets.")
    tiles: int = Field(1, ge=1, le=8, description="The detector looks at so many overlapping parts a side, too.")
    describe: list[DescribeOptions] = Field([], description="Models that look at each thing that is followed.")
    reidentify: ReidentifyOptions | None = Field(None, description="A model that knows things that come back.")
    overlay: OverlayOptions = Field(OverlayOptions(), description="What is drawn.")
    encode: EncodeOptions = Field(EncodeOptions(), description="How videos are written.")


def _from_base(text: str, info: ValidationInfo) -> str:
    """Return a path that begins at the config's folder; addresses, cameras and "-" as they are."""
    base = (info.context or {}).get("base")
    if base is None or text == "-" or "://" in text:
        return text
    return str(Path(base) / Path(text).expanduser())


Input = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    AfterValidator(_from_base),
    # By which a server knows that it names a file, and a page that the file is a video.
    WithJsonSchema({"type": "string", "format": "path", "contentMediaType": "video/*"}),
]


class VideoInputs(_Part):
    """What one call of the task `video` takes."""

    video: Input | list[Input] = Field(
        description="Videos, folders or patterns of pictures, addresses (rtsp, http), /dev/video0, - for standard input"
    )
    name: list[str] = Field([], description="A name for each stream; by default from the file or address.")
    text: str | list[str] | None = Field(None, description="What to find; models with classes of their own: which.")
    threshold: float | None = Field(None, ge=0, le=1, description="Score of sure boxes; by default the model's own.")
    nms: float | None = Field(None, ge=0, le=1, description="Overlap above which the lower score of a label goes.")
    region: list[tuple[float, float]] = Field(
        [], description="Corners of a polygon, as shares of width and height: only things whose middle is inside count."
    )
    start: float = Field(0.0, ge=0, description="Seconds to skip at the beginning of each video.")
    end: float | None = Field(None, gt=0, description="Second to end at.")
    fps: float | None = Field(None, gt=0, le=1000, description="Most frames to look at in a second.")
    size: tuple[int, int] | None = Field(None, description="Width and height that frames are scaled to.")
    pixels: int = Field(2**26, ge=1, le=2**26, description="Most pixels of a frame; larger ones are refused.")
    loop: int = Field(1, ge=1, description="How often each file is read.")
    again: float = Field(60.0, ge=0, description="Seconds to wait for a lost stream to come back.")

    @model_validator(mode="after")
    def _sound(self) -> VideoInputs:
        if self.region and len(self.region) < 3:
            raise ValueError("region has three corners or more")
        if self.end is not None and self.end <= self.start:
            raise ValueError("end lies after start")
        if self.size is not None and not all(1 <= side <= 8192 for side in self.size):
            raise ValueError("size is 1x1 to 8192x8192")
        if self.size is not None and self.size[0] * self.size[1] > self.pixels:
            raise ValueError(f"size has more than {self.pixels} pixels, the most of a frame here")
        if not self.video:
            raise ValueError("video names none")
        return self
