"""DL Streamer's lines: the article's own run, and what is unknown is refused with its place."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ovforge.cli import app
from ovforge.errors import InputError
from ovforge_video.gst import parse_line

DETECT = (
    'gst-launch-1.0 filesrc location={video} ! decodebin !  capsfilter caps="video/x-raw(memory:VASurface)" ! '
    "gvadetect model={model} model_proc={proc} inference-interval=1 device=GPU.0 batch-size=32 "
    "pre-process-backend=vaapi-surface-sharing ! queue ! gvatrack tracking-type=short-term-imageless ! "
)
FIRST = DETECT + "gvafpscounter ! fakesink sync=false"
SECOND = DETECT + (
    "meta_overlay device=GPU ! gvafpscounter ! vaapipostproc ! vaapih265enc rate-control=cbr bitrate=6144  ! "
    "filesink location={output} sync=false"
)


def test_the_lines_of_the_article_are_understood() -> None:
    names = {"video": "/p/people.mp4", "model": "/p/yolov5s.xml", "proc": "/p/yolo-v5.json", "output": "./encoded.265"}
    first, second = parse_line(FIRST.format(**names)), parse_line(SECOND.format(**names))
    assert first.config == {
        "task": {
            "use": "video",
            "interval": 1,
            "detect": {"use": "detect", "batch": 32},
            "track": "short-term-imageless",
        },
        "load": {"source": "/p/yolov5s.xml", "use": "model-proc", "proc": "/p/yolo-v5.json"},
        "device": {"use": "gpu", "index": 0},
        "input": {"video": "/p/people.mp4"},
    }
    assert first.outputs == []
    assert second.config["task"]["encode"] == {"codec": "h265", "rate_control": "cbr", "bitrate": 6144}
    assert second.outputs == ["./encoded.265"]
    assert any("pre-process-backend=vaapi-surface-sharing means nothing here" in note for note in first.notes)
    assert any("memory:VASurface" in note for note in first.notes)


def test_the_second_line_runs(folder: Path, tmp_path: Path) -> None:
    text = SECOND.format(
        video=folder / "a.mp4", model=folder / "square.xml", proc=folder / "square.json", output=tmp_path / "o.265"
    ).replace("GPU.0", "CPU")
    done = CliRunner().invoke(app, ["video", "--gst", text, "--numbers", "--cache", str(tmp_path / "cache")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["streams"]["a"]["frames"] == 24
    assert (tmp_path / "o.265").stat().st_size > 1000
    shown = CliRunner().invoke(app, ["video", "--gst", text, "--print-config"])
    assert json.loads(shown.stdout)["task"]["track"] == "short-term-imageless"


@pytest.mark.parametrize(
    ("line", "place", "said"),
    [
        ("filesrc location=a.mp4 ! gvadetectt model=m.xml ! fakesink", 26, "Did you mean 'gvadetect'"),
        ("filesrc location=a.mp4 ! gvadetect model=m.xml colour=red ! fakesink", 48, "no property 'colour'"),
        (
            "filesrc location=a.mp4 ! gvadetect model=m.xml ! gvatrack tracking-type=short-term",
            59,
            "not a tracking-type",
        ),
        ("filesrc location=a.mp4 ! gvadetect model=m.xml ! filesink location=o.265", 50, "not encoded"),
        ("filesrc location=a.mp4 ! gvadetect model=m.xml inference-interval=x", 48, "not a number"),
        ("filesrc location=a.mp4 ! fakesink", 1, "no gvadetect"),
        ("filesrc ! fakesink", 1, "lacks location"),
        ("! fakesink", 1, "nothing stands before"),
        ("filesrc location=a.mp4 !", 24, "nothing stands behind"),
    ],
)
def test_what_is_unknown_is_refused_with_its_place(line: str, place: int, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        parse_line(line)
    assert error.value.where == f"--gst, letter {place}"


def test_several_streams_and_results_in_one_line() -> None:
    chain = "gvadetect model=m.xml threshold=0.4 ! gvatrack ! gvametaconvert ! gvametapublish file-format=json-lines file-path=r.txt"
    line = parse_line(
        f"filesrc location=a.mp4 ! decodebin ! {chain} ! fakesink rtspsrc location=rtsp://h/b ! {chain} ! fakesink"
    )
    assert line.config["input"] == {"video": ["a.mp4", "rtsp://h/b"], "threshold": 0.4}
    assert line.config["task"]["track"] == "zero-term"
    assert line.outputs == ["r.jsonl"]


def test_decoders_of_every_kind_are_what_ffmpeg_does_here() -> None:
    line = parse_line(
        "rtspsrc location=rtsp://h/1 latency=100 ! rtph264depay ! h264parse ! vaapih264dec ! gvadetect model=m.xml ! fakesink "
        "v4l2src device=/dev/video1 ! image/jpeg,framerate=30/1 ! jpegdec ! gvadetect model=m.xml ! gvametaaggregate ! fakesink"
    )
    assert line.config["input"]["video"] == ["rtsp://h/1", "/dev/video1"]
    assert [note for note in line.notes if "dec" in note] == [
        "vaapih264dec means nothing here: FFmpeg decodes on the processor"
    ]


@given(
    st.lists(
        st.sampled_from(
            ["filesrc", "!", "gvadetect", "model=m.xml", "location=a", '"', "queue", "x=", "=", "a/b", "\\"]
        )
    )
)
def test_any_line_is_read_or_refused(words: list[str]) -> None:
    with contextlib.suppress(InputError):
        assert parse_line(" ".join(words)).streams
