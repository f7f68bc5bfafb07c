"""Videos, streams, cameras and folders of pictures into RGB frames, by PyAV (FFmpeg)."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.error
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ovforge.errors import InputError, OvforgeError
from ovforge.model import PICTURE_SUFFIXES, open_picture

__all__ = ["ReadOptions", "Reader", "Shot", "av_errors", "open_alone", "readers"]

TIMEOUT = 10.0
"""Seconds that a socket may be silent."""
_LIVE = ("rtsp://", "rtsps://", "rtmp://", "udp://", "srt://")
_REMOTE = (*_LIVE, "http://", "https://")
_HINTS = {
    "read": "Is it a whole video in a format that FFmpeg knows?",
    "written": "Choose another ending or codec, and see whether the disk is full.",
}
_NESTED = frozenset({"hls", "concat", "dash", "sdp", "imf", "applehttp"})
"""Formats whose files name other files or hosts."""
_ALONE = {
    "protocol_whitelist": "file,crypto,data",
    "format_whitelist": ",".join(sorted(av.formats_available - _NESTED)),
}
"""What keeps FFmpeg from opening what a file names."""


@dataclass(frozen=True)
class ReadOptions:
    """Which part of a stream is read, and how. `size` is (width, height); `again` seconds to wait for a lost stream."""

    start: float = 0.0
    end: float | None = None
    fps: float | None = None
    size: tuple[int, int] | None = None
    again: float = 60.0
    loop: int = 1
    pixels: int = 2**26
    """Most of a frame: 8192x8192."""


@dataclass(frozen=True)
class Shot:
    """A frame as it was read: RGB (height, width, 3), and the `seconds` since the stream began, which rise."""

    number: int
    seconds: float
    picture: NDArray[np.uint8]
    session: int = 0


@dataclass
class Reader:
    """Reads one input. `notes` say what was odd about it; `rate` and `total` are known once it is open."""

    name: str
    source: str | Sequence[Path]
    options: ReadOptions = ReadOptions()
    notes: list[str] = field(default_factory=list)
    rate: Fraction = Fraction(25)
    total: int | None = None
    """About how many frames there will be."""
    has_sound: bool = False
    damaged: int = 0
    session: int = 0
    passes: list[float] = field(default_factory=lambda: [0.0])
    """Seconds by which each reading of a file comes after the first, as they begin."""

    @property
    def live(self) -> bool:
        """Whether frames come by themselves, and do not wait."""
        return isinstance(self.source, str) and (self.source.startswith(_LIVE) or self.source.startswith("/dev/video"))

    @property
    def is_file(self) -> bool:
        """Whether it is one file, of video."""
        return isinstance(self.source, str) and self.source != "-" and not (self.live or self.remote)

    @property
    def remote(self) -> bool:
        """Whether it is read from the network."""
        return isinstance(self.source, str) and self.source.startswith(_REMOTE)

    def shots(self, stopped: Callable[[], bool] = lambda: False) -> Generator[Shot, None, None]:
        """Yield the frames. Raises InputError for what cannot be read; damaged parts are passed over, and counted."""
        number, last, due = 0, -1.0, self.options.start
        size: tuple[int, int] | None = self.options.size
        for seconds, picture in self._pictures(stopped):
            if self.options.fps:
                if seconds + 1e-6 < due:
                    continue
                due = max(due + 1 / self.options.fps, seconds + 1e-6)
            if seconds <= last:
                self.say("its timestamps jump back: frames go on evenly from there")
                seconds = last + float(1 / self.rate)
            size = size or (picture.width, picture.height)
            if (picture.width, picture.height) != size:
                if self.options.size is None:
                    self.say(f"its frames change their size: all are scaled to {size[0]}x{size[1]}")
                picture = picture.reformat(width=size[0], height=size[1])
            array = picture.to_ndarray(format="rgb24")
            last = seconds
            yield Shot(number, seconds, array, self.session)
            number += 1
        if self.damaged:
            self.say(f"{self.damaged} damaged parts were passed over")
        if number == 0 and not stopped():
            raise InputError("not a frame of it can be read", where=self.name, hint="Is it a whole video, and is "
                             "--start before its end?")  # fmt: skip

    def say(self, note: str) -> None:
        """Note what is odd, once."""
        if note not in self.notes:
            self.notes.append(note)

    def _pictures(self, stopped: Callable[[], bool]) -> Iterator[tuple[float, Any]]:
        for _ in range(self.options.loop):
            late, seconds = self.passes[-1], self.options.start
            read = self._sessions(self.source, stopped) if isinstance(self.source, str) else self._files(self.source)
            with contextlib.closing(read):
                for at, frame in read:
                    if self.options.end is not None and at >= self.options.end:
                        break
                    seconds = at
                    yield late + seconds, frame
            self.passes.append(late + seconds + float(1 / self.rate) - self.options.start)

    def _files(self, paths: Sequence[Path]) -> Generator[tuple[float, Any], None, None]:
        first = math.ceil(self.options.start * self.rate - 1e-6)
        self.total = max(1, len(paths) - first) * self.options.loop
        for number, path in enumerate(paths[first:], start=first):
            image = open_picture(path, self.name, "RGB")
            yield number / float(self.rate), av.VideoFrame.from_image(image)

    def _sessions(self, source: str, stopped: Callable[[], bool]) -> Generator[tuple[float, Any], None, None]:
        """Yield frames; of a stream that is lost, from where it is found again, of a file, from where it broke off."""
        began, lost, last, opened = time.monotonic(), 0.0, -1.0, False
        while not stopped():
            offset: float | None = None if self.live and opened else 0.0
            caught_up = self.live or not opened
            try:
                for seconds, frame in self._opened(source, stopped):
                    if offset is None:
                        offset = time.monotonic() - began - seconds
                    if not caught_up and seconds <= last + 1e-6:
                        continue
                    if lost:
                        self.session += 1
                        self.say("it was lost and found again: its tracks are new ones")
                    opened, caught_up, lost, last = True, True, 0.0, seconds
                    yield seconds + offset, frame
                if not self.live:
                    return
            except InputError:
                if not (opened and (self.live or self.remote)):
                    raise
            now = time.monotonic()
            lost = lost or now
            if now - lost > self.options.again:
                raise InputError(f"it is lost for {self.options.again:g} s", where=self.name, hint="Is its server up?")
            end = now + min(8.0, 0.25 * 2 ** min(5, int(now - lost)))
            while time.monotonic() < end and not stopped():
                time.sleep(0.05)

    def _opened(self, source: str, stopped: Callable[[], bool]) -> Iterator[tuple[float, Any]]:
        with av_errors(self.name), contextlib.closing(_container(source, self.name)) as container:
            if not container.streams.video:
                raise InputError("it has no video", where=self.name, hint="It holds sound alone, or is damaged.")
            stream = container.streams.video[0]
            self.has_sound = bool(container.streams.audio)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > self.options.pixels:
                raise InputError(
                    f"its frames are {width}x{height}", where=self.name,
                    hint=f"{self.options.pixels} pixels are the most here.",
                )  # fmt: skip
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            self.rate = Fraction(rate) if 0 < rate <= 1000 else Fraction(25)
            duration = float(stream.duration * stream.time_base) if stream.duration else 0.0
            duration = duration or (container.duration or 0) / av.time_base
            until = 0.0
            if 0 < duration < 1e7:
                until = min(self.options.end or duration, duration)
                rate = min(float(self.rate), self.options.fps or float(self.rate))
                self.total = max(1, round((until - self.options.start) * rate)) * self.options.loop
            if self.options.start and not self.live:
                with contextlib.suppress(av.error.FFmpegError):
                    container.seek(round(self.options.start * av.time_base), backward=True)
            at = self.options.start
            for at, frame in self._decoded(container, stream, stopped):
                yield at, frame
            if until - at > 1 + duration / 20 and not stopped():
                self.say(f"its pictures end at {at:.1f} s, and it says that it lasts {duration:.1f} s: is it whole?")

    def _decoded(self, container: Any, stream: Any, stopped: Callable[[], bool]) -> Iterator[tuple[float, Any]]:
        first = float(stream.start_time * stream.time_base) if stream.start_time is not None else None
        for count, whole in enumerate(_deinterlaced(self._packets(container, stream, stopped))):
            frame = _upright(whole)
            if first is None and frame.time is not None:
                first = frame.time
            at = frame.time - (first or 0.0) if frame.time is not None else count / float(self.rate)
            if at + 1e-6 >= self.options.start:
                yield at, frame

    def _packets(self, container: Any, stream: Any, stopped: Callable[[], bool]) -> Iterator[Any]:
        for packet in container.demux(stream):
            if stopped():
                return
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                self.damaged += 1
                continue
            yield from frames


def _container(source: str, name: str) -> Any:
    """Open a file, an address, a camera, or "-"."""
    if source == "-":
        return open_alone(_Unseekable(sys.stdin.buffer), name)
    if source.startswith("/dev/video"):
        return av.open(source, format="v4l2", timeout=TIMEOUT)
    if source.startswith(_REMOTE):
        options = {"protocol_whitelist": "http,https,tls,tcp,udp,rtp,srtp,rtsp,rtsps,rtmp,srt,crypto,httpproxy"}
        if source.startswith("rtsp"):
            options["rtsp_transport"] = "tcp"
        return av.open(source, options=options, timeout=TIMEOUT)
    return open_alone(f"file:{source}", name)


def open_alone(source: Any, name: str) -> Any:
    """Open a file that reaches no other file and no host. Raises InputError for a list of others, by `name`."""
    try:
        return av.open(source, "r", options=_ALONE)
    except av.error.ArgumentError as error:  # for a format that is not on the list
        hint = "Name the videos themselves."
        raise InputError("it is a list of other files, which is not read", where=name, hint=hint) from error


class _Unseekable:
    """Standard input for PyAV, which would try to seek in it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int) -> bytes:
        return self._file.read(size)


def _deinterlaced(frames: Iterator[Any]) -> Iterator[Any]:
    """Yield whole frames for interlaced ones, and others as they are. Source: FFmpeg's filter yadif."""
    graph: Any = None
    key: Any = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if key != (key := (frame.width, frame.height, frame.format.name)):
            yield from _flushed(graph)
            graph = _yadif(frame)
        graph.push(frame)
        yield from _pulled(graph)
    yield from _flushed(graph)


def _yadif(frame: Any) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    filters = [source, graph.add("yadif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")]
    for one, other in itertools.pairwise(filters):
        one.link_to(other)
    graph.configure()
    return graph


def _flushed(graph: Any) -> Iterator[Any]:
    if graph is not None:
        graph.push(None)
        yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    with contextlib.suppress(BlockingIOError, EOFError):  # av.error's are of these kinds
        while True:
            yield graph.pull()


def _upright(frame: Any) -> Any:
    """Return a frame turned as its container says."""
    turns = round((frame.rotation or 0) / 90) % 4
    if not turns:
        return frame
    array = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    turned = av.VideoFrame.from_ndarray(array, format="rgb24")
    turned.pts, turned.time_base = frame.pts, frame.time_base
    return turned


@contextlib.contextmanager
def av_errors(where: str, done: str = "read") -> Iterator[None]:
    """Turn what FFmpeg raises into an InputError that names the input or output, which cannot be `done`."""
    try:
        yield
    except OvforgeError:
        raise
    except av.error.FileNotFoundError as error:
        raise InputError("no such file", where=where, hint="Check the path.") from error
    except (av.error.ExitError, av.error.TimeoutError) as error:
        raise InputError(f"it is silent for {TIMEOUT:g} s", where=where, hint="Is its server up?") from error
    except av.error.FFmpegError as error:
        reason = (error.strerror or str(error)).rstrip(".")
        raise InputError(f"it cannot be {done}: {reason}", where=where, hint=_HINTS[done]) from error
    except (IndexError, ValueError, OSError) as error:
        raise InputError(f"it cannot be {done}: {error}", where=where, hint=_HINTS[done]) from error


def readers(inputs: Sequence[str], names: Sequence[str], options: ReadOptions, base: Path = Path()) -> list[Reader]:
    """Return a reader for each input: a path, pattern, address, camera or "-". Raises InputError for a wrong one."""
    if names and len(names) != len(inputs):
        raise InputError(f"{len(names)} names for {len(inputs)} inputs", where="name", hint="Give one for each.")
    made: list[Reader] = []
    for place, text in enumerate(inputs):
        source = _source(text, base)
        name = names[place] if names else _name(text)
        if any(reader.name == name for reader in made):
            if names:
                raise InputError(f"two streams are called {name!r}", where="name", hint="Choose another name.")
            name = f"{name}-{place + 1}"
        if not re.fullmatch(r"[\w. @+-]{1,100}", name) or name.startswith("."):
            raise InputError(
                f"{name!r} is not a valid name of a stream", where="name", hint="Use letters, digits, . - and _."
            )
        made.append(Reader(name, source, options))
    if sum(reader.source == "-" for reader in made) > 1:
        raise InputError("standard input is named twice", where="input", hint="Name it once.")
    return made


def _source(text: str, base: Path) -> str | list[Path]:
    if text == "-" or "://" in text or text.startswith("/dev/video"):
        if "://" in text and not text.startswith(_REMOTE):
            raise InputError(
                f"{text.partition('://')[0]}:// is not a supported kind of address", where="input",
                hint=f"Supported: {', '.join(_REMOTE)}, or a path.",
            )  # fmt: skip
        return text
    path = base / Path(text).expanduser()
    if path.is_file() and path.suffix.lower() in PICTURE_SUFFIXES and _is_still(path):
        return [path]
    if path.is_file() or path.is_fifo():
        return str(path)
    found = (
        sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.glob(path.name)) if path.parent.is_dir() else []
    )
    pictures = [each for each in found if each.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        what = "no picture is in the folder" if path.is_dir() else "no such file"
        what = "it is neither a file nor a folder" if path.exists() and not path.is_dir() else what
        raise InputError(what, where=text, hint="Name a video, a folder or pattern of pictures, or an address.")
    return pictures


def _is_still(path: Path) -> bool:
    """Say whether a file that is called a picture is one; FFmpeg reads what is not, or moves."""
    try:
        with Image.open(path) as picture:
            moves = getattr(picture, "is_animated", False) and picture.format in ("GIF", "PNG", "WEBP")
            if moves and picture.format == "WEBP":
                raise InputError(
                    "FFmpeg does not read a WebP that moves", where=str(path), hint="Save it as a GIF or a video."
                )
            return not moves
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return False


def _name(text: str) -> str:
    if text == "-":
        return "stdin"
    if "://" in text:  # without a password, and without what follows the path
        text = re.sub(r"[?#].*$", "", text.partition("://")[2].rpartition("@")[2]).rstrip("/")
        return re.sub(r"[^\w.-]+", "-", text)[:100].strip("-.") or "stream"
    return (
        re.sub(r"[^\w. @+-]+", "-", Path(text.replace("*", "all").replace("?", "-")).stem)[:100].strip("-.") or "stream"
    )
