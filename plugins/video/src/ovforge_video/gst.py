"""DL Streamer's lines (`gst-launch-1.0 filesrc ... ! gvadetect ... ! gvatrack ... ! filesink`) as a config of `video`.

Source: the documentation of DL Streamer's and GStreamer's elements; docs/tasks/dl-streamer.md says what becomes of
each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ovforge.errors import InputError, did_you_mean

__all__ = ["Line", "parse_line"]


@dataclass
class _Element:
    """An element with its properties, and its place in the line, in letters from 1 on."""

    name: str
    place: int
    properties: dict[str, str] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)


@dataclass
class Line:
    """What a line means: a config, where results go, and what of the line means nothing here."""

    config: dict[str, Any] = field(default_factory=lambda: {"task": {"use": "video"}})
    outputs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
    drawn: bool = False
    encode: dict[str, Any] = field(default_factory=dict)
    published: str | None = None


_TOKEN = re.compile(r"""\s*(?:(!)|((?:[^\s!"'\\]|\\.|"(?:[^"\\]|\\.)*"|'[^']*')+))""")


def parse_line(text: str) -> Line:
    """Return what a line means. Raises InputError that names the place of what is unknown."""
    text = re.sub(r"\\\r?\n", " ", text).strip()
    text = re.sub(r"^gst-launch-1\.0(\s+-\w+)*\s+", lambda head: " " * len(head[0]), text)
    line, model = Line(), ""
    for chain in _chains(text):
        for element in chain:
            handler = _ELEMENTS.get(element.name)
            if handler is None and "/" in element.name:
                handler = _caps
            if handler is None:
                raise _error(
                    element.place, f"the element {element.name!r} is not known here."
                    f"{did_you_mean(element.name, _ELEMENTS)}", "docs/tasks/dl-streamer.md lists those that are.",
                )  # fmt: skip
            if element.name == "gvadetect":
                model = _same_model(element, model)
            handler(element, line)
    if not line.streams:
        raise _error(1, "it reads nothing", "It begins with filesrc, urisourcebin, rtspsrc, v4l2src or multifilesrc.")
    if not model:
        raise _error(1, "it has no gvadetect with a model", "Add: gvadetect model=FILE.xml model-proc=FILE.json.")
    limits = line.config.pop("limits", {})
    line.config["input"] = {"video": line.streams if len(line.streams) > 1 else line.streams[0], **limits}
    task = line.config["task"]
    task.setdefault("track", "none")
    if line.encode:
        task["encode"] = line.encode
        if not line.drawn:
            hidden = ("boxes", "ids", "labels", "time")
            task["overlay"] = {**dict.fromkeys(hidden, False), "trails": 0}
    if line.published:
        line.outputs.append(line.published)
    return line


def _chains(text: str) -> list[list[_Element]]:
    """Return the chains of a line, which stand behind each other without a mark between them."""
    chains: list[list[_Element]] = []
    linked, at = False, 0
    while at < len(text.rstrip()):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _error(at + 1, "a quotation mark is not closed", "Close it.")
        place, at = token.start(token.lastindex or 0) + 1, token.end()
        if token[1]:
            if not chains or linked:
                raise _error(place, "nothing stands before the mark !", "Put an element there.")
            linked = True
            continue
        word = token[2]
        name, equals, value = word.partition("=")
        key = re.fullmatch(r"[A-Za-z][\w-]*", name)
        if equals and key and chains and not linked:
            element = chains[-1][-1]
            element.properties[_key(name)], element.places[_key(name)] = _unquoted(value), place
        elif linked:
            chains[-1].append(_Element(_unquoted(word), place))
        elif not equals or "/" in name:
            chains.append([_Element(_unquoted(word), place)])
        else:
            raise _error(place, f"{word!r} belongs to no element", "A line begins with an element, such as filesrc.")
        linked = False
    if linked:
        raise _error(len(text), "nothing stands behind the last mark !", "Put an element there, such as fakesink.")
    return chains


def _key(name: str) -> str:
    return name.replace("_", "-").lower()


def _unquoted(value: str) -> str:
    value = re.sub(r'"((?:[^"\\]|\\.)*)"', lambda found: re.sub(r"\\(.)", r"\1", found[1]), value)
    return re.sub(r"'([^']*)'", r"\1", value)


def _error(place: int, what: str, hint: str) -> InputError:
    return InputError(what, where=f"--gst, letter {place}", hint=hint)


class _Reader:
    """Takes an element's properties one by one; what is left over is unknown."""

    def __init__(self, element: _Element, line: Line) -> None:
        self.element, self.line, self._left = element, line, dict(element.properties)

    def take(self, *names: str, needed: bool = False) -> str | None:
        """Return the value of a property, under any of these names."""
        found = [self._left.pop(name) for name in names if name in self._left]
        if needed and not found:
            raise _error(self.element.place, f"{self.element.name} lacks {names[0]}", f"Write {names[0]}=...")
        return found[-1] if found else None

    def number(self, *names: str, least: float = 0) -> float | None:
        """Return a property as a number."""
        value = self.take(*names)
        if value is None:
            return None
        try:
            number = float(value)
        except ValueError:
            number = least - 1
        if not least <= number < 1e9:
            place = self.element.places.get(names[0], self.element.place)
            raise _error(place, f"{names[0]} is {value!r}, not a number from {least:g} on", "Correct it.")
        return number

    def ignore(self, names: Mapping[str, str]) -> None:
        """Pass over properties that mean nothing here, and say why."""
        for name, why in names.items():
            if (value := self.take(name)) is not None:
                self.line.notes.append(f"{self.element.name} {name}={value} means nothing here: {why}")

    def done(self) -> None:
        """Refuse what nobody took."""
        for name in ("name", "parent", "qos", "sync", "async", "silent"):
            self._left.pop(name, None)
        for name in self._left:
            raise _error(
                self.element.places[name], f"{self.element.name} has no property {name!r} that is known here",
                "Leave it out; docs/tasks/dl-streamer.md lists those that are known.",
            )  # fmt: skip


def _source(key: str) -> Callable[[_Element, Line], None]:
    def read(element: _Element, line: Line) -> None:
        reader = _Reader(element, line)
        value = reader.take(key, needed=key != "device") or "/dev/video0"
        if element.name == "multifilesrc":
            value = re.sub(r"%0?\d*d", "*", value)
            reader.ignore({"index": "a pattern's pictures are read in order", "caps": "pictures say their rate"})
        reader.ignore({
            "latency": "FFmpeg reads", "protocols": "TCP is used", "timeout": "10 s", "loop": "use --loop",
            "is-live": "cameras are", "num-buffers": "use --end", "blocksize": "FFmpeg reads",
            "io-mode": "FFmpeg reads",
            "do-timestamp": "timestamps are the stream's",
        })  # fmt: skip
        reader.done()
        if element.name == "filesrc" and "://" in value:
            raise _error(element.places[key], f"{value!r} is not a file", "Use urisourcebin uri=...")
        line.streams.append(value.removeprefix("file://"))

    return read


def _caps(element: _Element, line: Line) -> None:
    """A filter of formats: size and rate count, memory does not."""
    text = element.properties.get("caps", element.name if "/" in element.name else "")
    unknown = set(element.properties) - {"caps"}
    if unknown:
        raise _error(
            element.place, f"capsfilter has no property {sorted(unknown)[0]!r} that is known here", "Leave it out."
        )
    inputs = line.config.setdefault("limits", {})
    if found := re.search(r"width=(?:\(int\))?(\d+).*?height=(?:\(int\))?(\d+)", text):
        inputs["size"] = [int(found[1]), int(found[2])]
    if found := re.search(r"framerate=(?:\(fraction\))?(\d+)/(\d+)", text):
        inputs["fps"] = int(found[1]) / max(1, int(found[2]))
    if "memory:" in text:
        line.notes.append(f"{text}: where frames lie is FFmpeg's and OpenVINO's own choice")


def _same_model(element: _Element, model: str) -> str:
    given = element.properties.get("model", "")
    if model and given and given != model:
        raise _error(element.place, "two gvadetect have different models", "Write a line for each.")
    return given or model


_MEANINGLESS = {
    "pre-process-backend": "frames are scaled by OpenVINO", "model-instance-id": "streams share one model anyway",
    "scheduling-policy": "each stream keeps its order", "ie-config": "use device.properties",
    "no-block": "files never lose frames, live streams do if they must",
    "pre-process-config": "frames are scaled by OpenVINO", "reshape": "the model says its size",
    "share-va-display-ctx": "frames lie in memory", "labels": "labels are in the model-proc",
    "labels-file": "labels are in the model-proc", "cpu-throughput-streams": "the device's hint decides",
    "gpu-throughput-streams": "the device's hint decides", "batch-size": "things are looked at one by one",
    "nireq": "each stream has a request", "inference-interval": "reclassify-interval counts",
}  # fmt: skip
"""Properties of gvadetect and gvaclassify, and why they mean nothing here."""


def _detect(element: _Element, line: Line) -> None:
    reader, task = _Reader(element, line), line.config["task"]
    if (model := reader.take("model")) is not None:
        line.config["load"] = {"source": model, "use": "model-proc"}
    if (proc := reader.take("model-proc")) is not None:
        line.config["load"]["proc"] = proc
    if (device := reader.take("device")) is not None:
        name, dot, index = _device(device, element).partition(".")
        line.config["device"] = {"use": name.lower(), **({"index": int(index)} if dot else {})}
    if (interval := reader.number("inference-interval", least=1)) is not None:
        task["interval"] = int(interval)
    if (batch := reader.number("batch-size")) is not None and batch > 1:
        task["detect"] = {"use": "detect", "batch": int(batch)}
    if (threshold := reader.number("threshold")) is not None:
        line.config.setdefault("limits", {})["threshold"] = threshold
    if (streams := reader.number("nireq")) is not None and streams:
        line.notes.append(f"gvadetect nireq={streams:g} means nothing here: the device says how many requests it takes")
    reader.ignore({"inference-region": "the whole frame is looked at; use --region", **_MEANINGLESS})
    reader.done()


def _device(text: str, element: _Element) -> str:
    name, dot, index = text.upper().partition(".")
    if name not in ("CPU", "GPU", "NPU", "AUTO") or (dot and not index.isdigit()):
        raise _error(element.places["device"], f"{text!r} is not a device", "Use CPU, GPU, GPU.0, NPU or AUTO.")
    return name + dot + index


def _track(element: _Element, line: Line) -> None:
    reader = _Reader(element, line)
    kind = reader.take("tracking-type") or "zero-term"
    known = ("zero-term", "zero-term-imageless", "short-term-imageless")
    if kind not in known:
        raise _error(
            element.places["tracking-type"], f"{kind!r} is not a tracking-type.{did_you_mean(kind, known)}",
            f"Known: {', '.join(known)}.",
        )  # fmt: skip
    reader.ignore({
        "device": "trackers run on the processor", "config": "options are those of task.track",
        "deep-sort-config": "options are those of task.track", "feature-model": "colours are compared"
    })  # fmt: skip
    reader.done()
    line.config["task"]["track"] = kind


def _classify(element: _Element, line: Line) -> None:
    reader = _Reader(element, line)
    region = reader.take("inference-region") or "roi-list"
    if region not in ("roi-list", "1"):
        place = element.places["inference-region"]
        raise _error(
            place, f"inference-region={region} is not known here", "Things that gvadetect finds are looked at."
        )
    made: dict[str, Any] = {"model": reader.take("model", needed=True)}
    if (proc := reader.take("model-proc")) is not None:
        made["proc"] = proc
    if (labels := reader.take("object-class")) is not None:
        made["labels"] = [label.strip() for label in labels.split(",")]
    made["every"] = int(reader.number("reclassify-interval") or 1)
    if (device := reader.take("device")) is not None:
        made["device"] = _device(device, element)
    reader.ignore(_MEANINGLESS)
    reader.done()
    described = line.config["task"].setdefault("describe", [])
    if made not in described:
        described.append(made)


def _draw(element: _Element, line: Line) -> None:
    reader = _Reader(element, line)
    reader.ignore({
        "device": "drawing is done on the processor", "displ-cfg": "use task.overlay",
        "displ-avgfps": "use task.overlay", "obb": "boxes are upright", "text-x": "labels stand at boxes",
    })  # fmt: skip
    reader.done()
    line.drawn = True


def _encoder(codec: str) -> Callable[[_Element, Line], None]:
    def encode(element: _Element, line: Line) -> None:
        reader = _Reader(element, line)
        kind = reader.take("rate-control") or ""
        bitrate = reader.number("bitrate")
        target = reader.number("target-bitrate")
        quality = reader.number("init-qp", "qpi", "quantizer")
        line.encode = {"codec": codec}
        if kind.lower() in ("cbr", "vbr") or (bitrate or target):
            if not (bitrate or target):
                raise _error(
                    element.place, f"{element.name} has rate-control={kind} and no bitrate", "Write bitrate=..."
                )
            line.encode |= {"rate_control": "cbr", "bitrate": int(bitrate or target or 0)}
            if kind.lower() == "vbr":
                line.notes.append(f"{element.name} rate-control=vbr: the rate is kept even (cbr)")
        elif quality:
            line.encode["crf"] = int(quality)
        reader.ignore({
            "tune": "the preset decides", "speed-preset": "use task.encode.preset",
            "keyframe-period": "use key_seconds",
            "target-usage": "use task.encode.preset", "cpb-size": "it holds a second", "key-int-max": "use key_seconds",
            "quality-level": "use task.encode.preset", "max-bframes": "the preset decides",
            "bframes": "the preset decides",
        })  # fmt: skip
        reader.done()
        if element.name.startswith(("vaapi", "va", "qsv")):
            line.notes.append(f"{element.name}: {codec} is encoded on the processor; task.encode.encoder names another")

    return encode


def _filesink(element: _Element, line: Line) -> None:
    reader = _Reader(element, line)
    location = reader.take("location", needed=True)
    reader.ignore({"append": "files are written whole", "buffer-mode": "files are written whole"})
    reader.done()
    assert location is not None
    if not line.encode:
        raise _error(
            element.place, "frames are not encoded before filesink", "Put vaapih265enc or another encoder there."
        )
    if not Path(location).suffix:
        raise _error(element.place, f"{location!r} has no ending", "Name a .265, .264, .mp4 or .mkv file.")
    if location not in line.outputs:
        line.outputs.append(location)


def _publish(element: _Element, line: Line) -> None:
    reader = _Reader(element, line)
    method, path = reader.take("method") or "file", reader.take("file-path") or "stdout"
    form = reader.take("file-format") or "json"
    if method != "file":
        raise _error(element.places["method"], f"method {method!r} is not known here", "file is; it may be a pipe.")
    if form not in ("json", "json-lines"):
        raise _error(element.places["file-format"], f"{form!r} is not a file-format", "json-lines, or json.")
    reader.done()
    if path == "stdout":
        line.published = "-"
        return
    line.published = str(Path(path).with_suffix(".jsonl")) if form == "json-lines" else path
    if line.published != path:
        line.notes.append(f"gvametapublish writes {line.published}: JSON lines end in .jsonl")


def _nothing(why: str) -> Callable[[_Element, Line], None]:
    """Return the handler of elements that mean nothing here; `why` is "" for those that everybody expects to vanish."""

    def ignore(element: _Element, line: Line) -> None:
        if why:
            line.notes.append(f"{element.name} means nothing here: {why}")

    return ignore


_QUIET = (
    "decodebin", "decodebin3", "parsebin", "queue", "queue2", "videoconvert", "gvafpscounter", "fakesink", "h264parse",
    "h265parse", "av1parse", "qtdemux", "matroskademux", "avidemux", "tsdemux", "rtph264depay", "rtph265depay",
    "mp4mux", "qtmux", "matroskamux", "gvametaconvert", "identity", "avdec_h264", "avdec_h265", "multiqueue", "jpegdec",
    "pngdec", "jpegparse", "flvdemux", "vp8dec", "vp9dec", "av1dec", "dav1ddec", "rtpjpegdepay", "rtpav1depay",
    "mpegvideoparse", "mpeg4videoparse", "vp9parse", "gvametaaggregate",
)  # fmt: skip
_HARDWARE = (
    "vaapidecodebin", "vaapih264dec", "vaapih265dec", "vaapijpegdec", "vah264dec", "vah265dec", "vaav1dec", "vavp9dec",
    "vajpegdec", "qsvh264dec", "qsvh265dec",
)  # fmt: skip
_ELEMENTS: dict[str, Callable[[_Element, Line], None]] = {
    "filesrc": _source("location"), "multifilesrc": _source("location"), "urisourcebin": _source("uri"),
    "uridecodebin": _source("uri"), "rtspsrc": _source("location"), "souphttpsrc": _source("location"),
    "v4l2src": _source("device"), "capsfilter": _caps, "gvadetect": _detect, "gvatrack": _track,
    "gvaclassify": _classify,
    "gvawatermark": _draw, "meta_overlay": _draw, "gvametapublish": _publish, "filesink": _filesink,
    "vaapih265enc": _encoder("h265"), "vah265enc": _encoder("h265"), "vah265lpenc": _encoder("h265"),
    "qsvh265enc": _encoder("h265"), "x265enc": _encoder("h265"), "vaapih264enc": _encoder("h264"),
    "vah264enc": _encoder("h264"), "vah264lpenc": _encoder("h264"), "qsvh264enc": _encoder("h264"),
    "x264enc": _encoder("h264"), "vaav1enc": _encoder("av1"), "svtav1enc": _encoder("av1"), "av1enc": _encoder("av1"),
    **dict.fromkeys(_QUIET, _nothing("")),
    **dict.fromkeys(_HARDWARE, _nothing("FFmpeg decodes on the processor")),
    "vaapipostproc": _nothing("frames are scaled and converted as each stage needs them"),
    "vapostproc": _nothing("frames are scaled and converted as each stage needs them"),
    "videoscale": _nothing("frames are scaled as each stage needs them"),
    "videorate": _nothing("frames keep their time; use --fps"),
    "autovideosink": _nothing("there is no window"), "xvimagesink": _nothing("there is no window"),
}  # fmt: skip
