"""Videos that were made, and the files that they are written to."""

from __future__ import annotations

import dataclasses
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.errors import InputError, as_path
from ovforge.model import METRICS, Provenance, Result, provenance_options, values_as_json

__all__ = ["Frames", "VideosResult"]

Frames = NDArray[np.uint8]
"""A video: (frames, height, width, 3), RGB."""

_CODECS = {
    ".mp4": ("mp4", "libx264", {"crf": "18", "preset": "medium"}),
    ".webm": ("webm", "libvpx-vp9", {"crf": "24", "b": "0", "row-mt": "1"}),
}
"""Ending -> FFmpeg's names of format and encoder, and its options, at which hardly a loss is seen."""

_ENCODED = tuple(_CODECS) if find_spec("av") else ()
_INSTALL = "Run: pip install 'ovforge-diffusion[video]', or name a .webp or .gif file, or a folder."
_NOTE = "comment"
"""Where containers keep what a video was made with."""
_UNITS = {".webp": (1000, "thousandths"), ".gif": (100, "hundredths")}
"""Ending -> parts of a second that frames change at. Containers say their rate beside the times."""
_GIF_RATE = 50
"""Frames a second up to which programs show a GIF as fast as it says."""
_RATE_PARTS = 10**5
"""Largest denominator of a rate in a file."""


@dataclass
class VideosResult(Result):
    """Videos, with the seed of each, and the latents they were decoded from.

    `videos` are uint8 (frames, height, width, 3), `latents` float32 (videos, channels, frames, height, width).
    """

    suffixes: ClassVar[tuple[str, ...]] = (*_ENCODED, ".webp", ".gif", "", ".npy")

    videos: Sequence[Frames] = ()
    frame_rate: float = 25.0
    seeds: Sequence[int] = ()
    latents: NDArray[np.float32] | None = None

    @classmethod
    def check_path(cls, path: Path | str) -> None:
        """Raise InputError for another ending, or one that PyAV or its encoder is missing for."""
        suffix = as_path(path, where="save").suffix.lower()
        if suffix in _CODECS and suffix not in cls.suffixes:
            raise InputError(f"a {suffix} file needs PyAV, which is not installed", where=str(path), hint=_INSTALL)
        super().check_path(path)
        if suffix in _CODECS:
            _check_encoder(_CODECS[suffix][1], str(path))

    def files(self, path: Path, *, quick: bool = False) -> Iterator[tuple[Path, bytes]]:
        """Yield videos; `x.mp4` becomes `x-1.mp4`, `x-2.mp4`... if there are several. `x.npy` gets the latents.

        A path without an ending is a folder, which gets the frames: 0001.png, 0002.png, ... A video, and each of its
        frames there, carries its own provenance (one seed) in its metadata; `warnings` say if a kind of file does not
        hold the frames a second. `quick` compresses WebP and PNG less.
        """
        if path.suffix.lower() == ".npy":
            if self.latents is None:
                raise InputError("there are no latents", where=str(path), hint="Name a video: .mp4, .webm, .webp.")
            buffer = io.BytesIO()
            np.save(buffer, self.latents)
            yield path, buffer.getvalue()
            return
        if not self.videos:
            raise InputError("there are latents and no video", where=str(path), hint="Name a .npy file instead.")
        suffix = path.suffix.lower()
        self._say_rate(path, suffix)
        for number, video in enumerate(self.videos, start=1):
            file = path.with_stem(f"{path.stem}-{number}") if len(self.videos) > 1 else path
            provenance = self.provenance_of(number - 1)
            if not suffix:
                yield from _pictures(video, provenance, file, quick=quick)
            elif suffix in _CODECS:
                yield file, _encoded(video, self.frame_rate, provenance, suffix)
            else:
                yield file, _animation(video, self.frame_rate, provenance, suffix, quick=quick)

    def _say_rate(self, path: Path, suffix: str) -> None:
        """Refuse frames that a kind of file has no time for, and say how it rounds their times."""
        rate = self.frame_rate
        if suffix == ".gif" and rate > _GIF_RATE:
            raise InputError(
                f"a GIF shows at most {_GIF_RATE} frames a second, and there are {rate:g}",
                where=str(path),
                hint="Name a .webp, .mp4 or .webm file.",
            )
        if not suffix:
            said = f"{path}: pictures do not say how fast they follow each other: {rate:g} a second"
        elif suffix in _UNITS and not (_UNITS[suffix][0] / rate).is_integer():
            parts = _UNITS[suffix][1]
            said = f"{path}: frames begin at the nearest {parts} of a second; on average {rate:g} a second are shown"
        else:
            return
        if said not in self.warnings:
            self.warnings.append(said)

    def lines(self) -> list[str]:
        """Return size, frames and seconds of each video."""
        return [
            f"{width}x{height}, {frames} frame{'s' if frames > 1 else ''}, {frames / self.frame_rate:.1f} s"
            for frames, height, width, _ in (video.shape for video in self.videos)
        ]

    def preview(self) -> Image.Image | None:
        """Return the middle frame of the first video."""
        return Image.fromarray(self.videos[0][len(self.videos[0]) // 2]) if self.videos else None

    def is_empty(self) -> bool:
        """Say whether there are neither videos nor latents."""
        return not self.videos and self.latents is None

    def as_json(self) -> Any:
        """Return width and height in pixels, frames, frames a second, and seed, of each video."""
        return [
            {
                "width": video.shape[2],
                "height": video.shape[1],
                "frames": len(video),
                "frame_rate": self.frame_rate,
                "seed": seed,
            }
            for video, seed in zip(self.videos, self.seeds, strict=False)
        ]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those of `ovforge.model.METRICS`, if there are videos."""
        return tuple(METRICS) if self.videos else ()

    def compare(self, reference: Self, metric: str = "ssim") -> float:
        """Return a metric's mean over all frames. Raises InputError if videos differ in number, frames or size."""
        self._check_metric(metric)
        ours, theirs = ([video.shape for video in result.videos] for result in (self, reference))
        if ours != theirs:
            raise InputError(
                f"videos of (frames, height, width, channels) {ours} cannot be compared with {theirs}",
                hint="Compare videos of one size.",
            )
        measure = METRICS[metric].measure
        pairs = zip(self.videos, reference.videos, strict=True)
        return statistics.fmean(measure(one, other) for pair in pairs for one, other in zip(*pair, strict=True))

    def compact(self) -> Self:
        """Return it without latents, if there are videos."""
        return dataclasses.replace(self, latents=None) if self.videos else self

    def provenance_of(self, position: int) -> Provenance:
        """Return the provenance of one video, from which it alone is made again."""
        if len(self.videos) == 1:
            return self.provenance
        inputs = {**self.provenance.get("inputs", {}), "seed": self.seeds[position], "count": 1}
        return {**self.provenance, "inputs": inputs}


def _note(provenance: Provenance) -> str:
    return json.dumps({"ovforge": values_as_json(provenance, "provenance")}, sort_keys=True)


def _check_encoder(name: str, where: str) -> None:
    """Raise InputError if the FFmpeg in PyAV was built without an encoder."""
    import av

    try:
        av.Codec(name, "w")
    except (av.error.FFmpegError, ValueError) as error:  # UnknownCodecError is a ValueError
        raise InputError(
            f"PyAV was built without the encoder {name}", where=where, hint="Name a .webp or .gif file, or a folder."
        ) from error


def _pictures(video: Frames, provenance: Provenance, folder: Path, *, quick: bool) -> Iterator[tuple[Path, bytes]]:
    """Yield frames as files of a folder, which carry the video's provenance as ImagesResult writes it."""
    options = {**provenance_options(provenance, "PNG"), **({"compress_level": 1} if quick else {})}
    for number, frame in enumerate(video, start=1):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", **options)
        yield folder / f"{number:04}.png", buffer.getvalue()


def _animation(video: Frames, rate: float, provenance: Provenance, suffix: str, *, quick: bool) -> bytes:
    """Return a moving picture's file, which carries its provenance likewise."""
    kind, parts = suffix.removeprefix(".").upper(), _UNITS[suffix][0]
    first, *others = map(Image.fromarray, video)
    ends = [round(parts * (number + 1) / rate) for number in range(len(video))]  # so that no rounding adds up
    durations = [(end - begin) * 1000 // parts for begin, end in zip([0, *ends], ends, strict=False)]
    options: dict[str, Any] = {"quality": 90, "method": 0 if quick else 4} if kind == "WEBP" else {}
    buffer = io.BytesIO()
    first.save(
        buffer, kind, save_all=True, append_images=others, duration=durations, loop=0, **options,
        **provenance_options(provenance, kind),
    )  # fmt: skip
    return buffer.getvalue()


def _encoded(video: Frames, rate: float, provenance: Provenance, suffix: str) -> bytes:
    """Return a file in the colours of ITU-R BT.709. It is marked so, because players otherwise guess by the size."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    kind, codec, options = _CODECS[suffix]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as file:
        file.metadata[_NOTE] = _note(provenance)
        stream = file.add_stream(codec, rate=Fraction(rate).limit_denominator(_RATE_PARTS), options=options)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        for picture in video:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            file.mux(stream.encode(frame.reformat(None, None, "yuv420p", None, Colorspace.ITU709)))
        file.mux(stream.encode(None))
    return buffer.getvalue()
