"""Frames into H.265, H.264 or AV1, by PyAV (FFmpeg)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from ovforge.errors import ConfigError, InputError, did_you_mean
from ovforge_video.options import EncodeOptions
from ovforge_video.reading import av_errors, open_alone

__all__ = ["SOUND_SUFFIXES", "VIDEO_SUFFIXES", "Encoder", "Sound", "encoder_name"]

_FORMATS = {
    ".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".265": "hevc", ".hevc": "hevc", ".264": "h264", ".h264": "h264",
    ".obu": "obu", ".webm": "webm",
}  # fmt: skip
VIDEO_SUFFIXES = tuple(_FORMATS)
SOUND_SUFFIXES = (".mp4", ".mov", ".mkv")
"""Endings of files that can hold sound."""
_CODEC_OF = {"hevc": "h265", "h264": "h264", "obu": "av1", "webm": "av1"}
"""What files of one codec hold; all browsers play AV1 in WebM."""
_ENCODERS = {
    "h265": ("libx265", "hevc_qsv", "hevc_vaapi", "hevc_nvenc"),
    "h264": ("libx264", "h264_qsv", "h264_vaapi", "h264_nvenc"),
    "av1": ("libsvtav1", "av1_qsv", "av1_vaapi", "av1_nvenc"),
}
_CRF = {"h265": 28, "h264": 23, "av1": 35}
"""The encoders' own defaults."""
SMALLEST = 64
"""Shortest side for libx265, which writes beyond its memory for some smaller ones (35x27 in FFmpeg 8.0)."""
FEW = 2
"""Frames up to which libx265 leaves decoding times unset; they are decoded in the order that they are shown in."""
CLOCK = 90_000
"""Ticks of a second."""


def encoder_name(options: EncodeOptions, path: Path) -> str:
    """Return FFmpeg's encoder for a file. Raises ConfigError if codec, encoder and the file's ending do not agree."""
    raw = _CODEC_OF.get(_FORMATS[path.suffix.lower()])
    codec = options.codec or raw or "h265"
    if raw not in (None, codec):
        raise ConfigError(f"a {path.suffix} file holds {raw}, not {codec}", where="encode.codec", hint="Leave it out.")
    if options.encoder is None:
        return _ENCODERS[codec][0]
    if options.encoder not in av.codecs_available:
        known = sorted(set(sum(_ENCODERS.values(), ())) & av.codecs_available)
        raise ConfigError(
            f"this FFmpeg has no encoder {options.encoder!r}.{did_you_mean(options.encoder, known)}",
            where="encode.encoder", hint=f"It has: {', '.join(known)}.",
        )  # fmt: skip
    return options.encoder


@dataclass(frozen=True)
class Sound:
    """Sound that is copied from a file: `passes` are the seconds by which each reading of it is late, as they come."""

    path: str
    start: float
    passes: Sequence[float]


class Encoder:
    """Writes one video. MP4 is written in fragments, so that what is there of a broken run can be played."""

    def __init__(self, path: Path, options: EncodeOptions, rate: Fraction, audio: Sound | None = None) -> None:
        self._path, self._options, self._rate = path, options, rate
        self._container: Any = None
        self._stream: Any = None
        self._audio: _Audio | None = None
        self._source, self._last, self._begin, self._count = audio, -1, 0.0, 0

    def write(self, picture: NDArray[np.uint8], seconds: float) -> None:
        """Encode a frame, RGB (height, width, 3), to be shown at `seconds`."""
        with av_errors(str(self._path), "written"):
            if self._stream is None:
                self._begin = seconds
                self._open(picture.shape[1], picture.shape[0])
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            self._last = frame.pts = max(self._last + 1, round(seconds * CLOCK))
            frame.time_base = Fraction(1, CLOCK)
            self._count += 1
            self._mux(self._stream.encode(frame))
            if self._audio is not None:
                self._audio.copy(self._container, seconds)

    def close(self) -> None:
        """Write what the encoder still holds."""
        if self._container is None:
            return
        with av_errors(str(self._path), "written"):
            try:
                packets = self._stream.encode(None)
                if self._count <= FEW:
                    for packet in packets:
                        packet.dts = packet.pts
                self._mux(packets)
                if self._audio is not None:
                    self._audio.copy(self._container, self._last / CLOCK + float(1 / self._rate))
                    self._audio.close()
            finally:
                self._container.close()

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            self._container.mux(packet)

    def _open(self, width: int, height: int) -> None:
        kind = _FORMATS[self._path.suffix.lower().removesuffix(".part")]
        name, options = encoder_name(self._options, self._path), self._options
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 otherwise prints thirty lines about itself
        flags = {"flush_packets": "1"}  # FFmpeg otherwise keeps 256 KiB, which may be minutes
        if kind in ("mp4", "mov"):
            flags["movflags"] = "frag_keyframe+delay_moov+default_base_moof"
        elif kind == "matroska":
            flags["cluster_time_limit"] = str(round(options.key_seconds * 1000))
        self._container = av.open(str(self._path), "w", format=kind, options=flags)
        try:
            stream = self._container.add_stream(name, rate=self._rate)
            stream.width, stream.height = width, height
            odd = width % 2 or height % 2
            if name == "libx265" and min(width, height) < SMALLEST:
                raise InputError(
                    f"libx265 does not write frames of {width}x{height}", where=str(self._path),
                    hint="Write H.264 (--codec h264), or scale them: --size.",
                )  # fmt: skip
            if odd and not name.startswith("libx26"):
                raise InputError(
                    f"{name} does not write frames of {width}x{height}", where=str(self._path),
                    hint="Scale them to even sides: --size.",
                )  # fmt: skip
            stream.pix_fmt = "yuv444p" if odd else "nv12" if name.endswith(("_qsv", "_nvenc")) else "yuv420p"
            stream.codec_context.time_base = Fraction(1, CLOCK)
            stream.codec_context.gop_size = max(1, round(float(self._rate) * options.key_seconds))
            stream.options = self._encoder_options(name, stream.codec_context)
            if name == "libx265" and kind in ("mp4", "mov"):
                stream.codec_context.codec_tag = "hvc1"
            if self._source is not None:
                self._audio = _Audio(self._source, self._container, self._begin)
            self._stream = stream
            stream.codec_context.open()
        except BaseException:
            with contextlib.suppress(Exception):
                self._container.close()
            raise

    def _encoder_options(self, name: str, context: Any) -> dict[str, str]:
        options = self._options
        said: dict[str, str] = {}
        if options.preset is not None:
            said["preset"] = options.preset
        elif name.startswith("libx26"):
            said["preset"] = "veryfast"
        elif name == "libsvtav1":
            said["preset"] = "10"
        if options.rate_control == "cbr":
            assert options.bitrate is not None
            context.bit_rate = options.bitrate * 1000
            rate = str(options.bitrate * 1000)
            if name != "libsvtav1":
                said |= {"maxrate": rate, "minrate": rate, "bufsize": rate}
        else:
            codec = next((codec for codec, names in _ENCODERS.items() if name in names), "h265")
            said["crf" if name.startswith("lib") else "global_quality"] = str(options.crf or _CRF[codec])
        if name == "libx265":
            said["x265-params"] = "log-level=error"
        return said


class _Audio:
    """Copies the input's sound unchanged, from the first picture up to the current one, once for each reading."""

    def __init__(self, source: Sound, target: Any, begin: float) -> None:
        self._source, self._pass, self._last = source, 0, -math.inf
        self._input = open_alone(f"file:{source.path}", str(source.path))
        self._next: Any = None
        self._packets: Iterator[Any] = iter(())
        if self._input.streams.audio:
            self._stream = self._input.streams.audio[0]
            self._output = target.add_stream_from_template(self._stream)
            video = self._input.streams.video[0]
            zero = video.start_time * video.time_base if video.start_time is not None else Fraction(0)
            self._zero = round(zero / self._stream.time_base)
            self._begin(begin)

    def copy(self, target: Any, seconds: float) -> None:
        """Copy what is heard up to `seconds`, as frames count them."""
        passes = self._source.passes
        while self._next is not None:
            ends = passes[self._pass + 1] + self._source.start if self._pass + 1 < len(passes) else math.inf
            shift = passes[self._pass]
            while self._next is not None and shift + self._seconds(self._next) < min(seconds + 1e-6, ends):
                self._put(target, self._next, round(shift / self._stream.time_base) - self._zero)
                self._next = next(self._packets, None)
            if seconds < ends:
                return
            self._pass += 1
            self._begin(self._source.start)

    def close(self) -> None:
        self._input.close()

    def _begin(self, seconds: float) -> None:
        """Go to the first packet from `seconds` of the file on."""
        if self._pass:
            self._input.seek(self._zero, stream=self._stream, backward=True)
        whole = (
            packet for packet in self._input.demux(self._stream) if packet.dts is not None and packet.pts is not None
        )
        self._packets = (packet for packet in whole if self._seconds(packet) >= seconds)
        self._next = next(self._packets, None)

    def _seconds(self, packet: Any) -> float:
        """Return when a packet is heard, from the picture's begin."""
        return float((packet.pts - self._zero) * packet.time_base)

    def _put(self, target: Any, packet: Any, shift: int) -> None:
        packet.pts += shift
        packet.dts += shift
        if packet.dts > self._last:  # the end of one reading may reach into the next
            self._last = packet.dts
            packet.stream = self._output
            target.mux(packet)
