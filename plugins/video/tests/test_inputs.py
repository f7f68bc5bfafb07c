"""Odd inputs, as they are: turned, interlaced, cut, lost and found again; sound; a process that is killed."""

from __future__ import annotations

import http.server
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clips import RATE, SIDE, picture, write_clip
from ovforge.errors import InputError
from ovforge.model import Boxes
from ovforge_video.reading import Reader, ReadOptions, readers
from ovforge_video.tiling import Tiled

ODD = Path(os.environ.get("OVFORGE_TEST_DATA", "../shared/data")) / "video/odd"


def encode(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    turn: int = 0,
    **options: str,
) -> Path:
    """Write pictures, RGB (height, width, 3), ten a second; `turn` is the rotation that the file asks for, in degrees."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if turn:
            stream.set_display_rotation(turn)
        for each in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(each, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def noise(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8))


def copied(source: Path, target: Path, **options: str) -> Path:
    """Write a file's stream into another container, as it is."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=options) as written:
        stream = written.add_stream_from_template(read.streams.video[0])
        for packet in read.demux():
            if packet.dts is not None:
                packet.stream = stream
                written.mux(packet)
    return target


@pytest.mark.parametrize(("turn", "corners"), [(90, "GKRB"), (180, "KBGR"), (-90, "BRKG")])
def test_frames_are_turned_as_the_ffmpeg_program_turns_them(tmp_path: Path, turn: int, corners: str) -> None:
    whole = np.zeros((48, 64, 3), np.uint8)
    whole[:24, :32, 0] = whole[:24, 32:, 1] = whole[24:, :32, 2] = 255
    shots = list(Reader("turned", str(encode(tmp_path / "turned.mp4", [whole] * 2, turn=turn))).shots())
    height, width = shots[0].picture.shape[:2]
    assert (height, width) == ((48, 64) if turn == 180 else (64, 48))
    seen = [shots[0].picture[y, x] for y in (height // 4, height * 3 // 4) for x in (width // 4, width * 3 // 4)]
    assert "".join("K" if each.max() < 100 else "RGB"[each.argmax()] for each in seen) == corners


def test_interlaced_frames_come_whole_at_their_own_time(tmp_path: Path) -> None:
    def combed(number: int) -> np.ndarray:
        made = np.zeros((48, 64, 3), np.uint8)
        made[::2, 4 + 2 * number : 20 + 2 * number] = 255
        made[1::2, 12 + 2 * number : 28 + 2 * number] = 255  # the second field is 8 pixels on
        return made

    path = encode(tmp_path / "i.mkv", [combed(n) for n in range(12)], "mpeg2video", flags="+ilme+ildct")
    shots = list(Reader("interlaced", str(path)).shots())
    np.testing.assert_allclose([shot.seconds for shot in shots], np.arange(12) / RATE, atol=1e-3)
    for number, shot in enumerate(shots):
        bright = shot.picture[8:40, :, 0].astype(int)
        assert abs(bright[0::2].mean(0) - bright[1::2].mean(0)).max() < 100  # combed: 255 at the edges
        assert (
            abs(int(np.flatnonzero(bright.mean(0) > 200)[0]) - (12 + 2 * number)) <= 2
        )  # the encoder's bottom field is first


def test_sizes_from_one_pixel_to_8k(tmp_path: Path) -> None:
    for side, codec in (((1, 1), ("png", "rgb24")), ((4320, 7680), ("mjpeg", "yuvj420p"))):
        path = encode(tmp_path / f"{side[0]}.mov", [np.full((*side, 3), 200, np.uint8)], *codec)
        (shot,) = Reader("size", str(path)).shots()
        assert shot.picture.shape == (*side, 3)
        assert abs(shot.picture[:: side[0], :: side[1]].astype(int) - 200).max() < 4
    with pytest.raises(InputError, match="33177599 pixels are the most"):
        list(Reader("size", str(path), ReadOptions(pixels=4320 * 7680 - 1)).shots())


def test_a_stream_that_changes_its_size_and_one_of_no_frames(tmp_path: Path) -> None:
    small, large = (encode(tmp_path / f"{n}.h264", [np.zeros((n, 2 * n, 3), np.uint8)] * 5) for n in (32, 64))
    (tmp_path / "both.h264").write_bytes(small.read_bytes() + large.read_bytes())
    reader = Reader("both", str(tmp_path / "both.h264"))
    assert [shot.picture.shape for shot in reader.shots()] == [(32, 64, 3)] * 10
    assert "all are scaled to 64x32" in reader.notes[0]
    with av.open(str(tmp_path / "none.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(InputError, match="cannot be read|not a frame"):
        list(Reader("none", str(tmp_path / "none.mkv")).shots())


def test_a_file_that_is_cut_says_so(tmp_path: Path) -> None:
    path = copied(encode(tmp_path / "a.mp4", noise(60)), tmp_path / "first.mp4", movflags="faststart")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    reader = Reader("cut", str(path))
    assert 20 < sum(1 for _ in reader.shots()) < 40
    assert "it says that it lasts 6.0 s" in reader.notes[0]


def test_standard_input_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_clip(tmp_path / "a.mkv", 12).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert sum(1 for _ in readers(["-"], [], ReadOptions())[0].shots()) == 12
    for number in (0, 2, 10):
        Image.fromarray(picture(number)).save(tmp_path / f"p{number:02}.png")
    Image.fromarray(picture(0)[:30]).save(tmp_path / "q.png")
    (tmp_path / "notes.txt").write_text("no picture")
    pattern, folder = readers([str(tmp_path / "p*.png"), str(tmp_path)], [], ReadOptions())
    shots = list(pattern.shots())
    np.testing.assert_array_equal([shot.picture for shot in shots], [picture(n) for n in (0, 2, 10)])
    assert sum(1 for _ in folder.shots()) == 4
    assert "all are scaled" in folder.notes[0]
    with pytest.raises(InputError, match="no such file"):
        readers([str(tmp_path / "x*.png")], [], ReadOptions())


@pytest.mark.skipif(not ODD.is_dir(), reason=f"{ODD} is not there (OVFORGE_TEST_DATA)")
@pytest.mark.parametrize(
    ("name", "frames", "note"),
    [("Megamind_bugy.avi", 270, "timestamps jump back"), ("bikes.mp4", 250, ""), ("tree.avi", 68, ""), ("carphone_distorted.mp4", 120, "")],
)  # fmt: skip
def test_odd_files_give_all_their_frames(name: str, frames: int, note: str) -> None:
    reader = Reader("odd", str(ODD / name))
    seconds = [shot.seconds for shot in reader.shots()]
    assert len(seconds) == frames
    assert seconds == sorted(set(seconds))
    assert note in " ".join(reader.notes)


def test_files_are_read_by_what_they_hold_and_not_by_what_they_are_called(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 12).read_bytes()
    for name in ("video.png", "video.txt", "video"):
        (tmp_path / name).write_bytes(clip)
        (reader,) = readers([str(tmp_path / name)], [], ReadOptions())
        assert sum(1 for _ in reader.shots()) == 12
    frames = [Image.fromarray(picture(number)) for number in range(5)]
    for ending in ("gif", "png", "webp"):
        frames[0].save(tmp_path / f"moves.{ending}", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(tmp_path / "still.gif")
    for name, count in (("moves.gif", 5), ("moves.png", 5), ("still.gif", 1)):
        (reader,) = readers([str(tmp_path / name)], [], ReadOptions())
        assert sum(1 for _ in reader.shots()) == count
    with pytest.raises(InputError, match="WebP that moves"):
        readers([str(tmp_path / "moves.webp")], [], ReadOptions())
    with pytest.raises(InputError, match="neither a file nor a folder"):
        readers(["/dev/null"], [], ReadOptions())
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="not a frame of it can be read"):
        list(readers([str(tmp_path / "text.png")], [], ReadOptions())[0].shots())


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("ten.mkv", "ffv1", "yuv420p10le"), ("gray.mkv", "ffv1", "gray"), ("deep.mkv", "ffv1", "gray16le"),
     ("alpha.mov", "qtrle", "argb"), ("palette.gif", "gif", "rgb8"), ("odd.mkv", "ffv1", "yuv444p12le")],
)  # fmt: skip
def test_other_formats_of_pixels_give_the_same_pictures(tmp_path: Path, name: str, codec: str, pix_fmt: str) -> None:
    path = encode(tmp_path / name, [picture(number) for number in range(5)], codec, pix_fmt)
    shots = list(Reader("odd", str(path)).shots())
    for number, shot in enumerate(shots):
        # 8 bits a pixel are coarse, and swscale rounds them as the processor's instructions do.
        assert abs(shot.picture.astype(int) - picture(number)).mean() < (30 if pix_fmt == "rgb8" else 3)
        assert (shot.picture[:, :, 1] > 128).sum() == SIDE * SIDE
    assert len(shots) == 5


def test_frames_keep_uneven_times(tmp_path: Path) -> None:
    times = [0, 20, 320, 360, 3_600_000, 3_600_010]
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, milliseconds in enumerate(times):
            made = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            made.pts, made.time_base = milliseconds + 7_000_000, Fraction(1, 1000)
            container.mux(stream.encode(made))
        container.mux(stream.encode(None))
    seconds = [shot.seconds for shot in Reader("uneven", str(tmp_path / "uneven.mkv")).shots()]
    np.testing.assert_allclose(seconds, np.array(times) / 1000, atol=2e-3)


def with_sound(path: Path) -> Path:
    """Write a clip whose sound is a beep of 0.1 s, 1.2 s from the begin."""
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("mpeg4", rate=RATE), container.add_stream("pcm_s16le", rate=8000)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound.layout = "mono"
        for number in range(24):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(number), format="rgb24")))
            wave = np.full((1, 800), 9000 * (number == 12), np.int16)
            heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 8000, number * 800, Fraction(1, 8000)
            container.mux(sound.encode(heard))
        container.mux(video.encode(None))
    return path


def test_sound_is_copied_in_time_with_the_picture(pipe: Any, tmp_path: Path) -> None:
    path = with_sound(tmp_path / "sound.mkv")
    pipe(video=str(path), start=0.5).write([tmp_path / "o.mp4"], audio=True)
    with av.open(str(tmp_path / "o.mp4")) as container:
        pictures = [frame.time for frame in container.decode(video=0)]
        container.seek(0)
        heard = [frame.time for frame in container.decode(audio=0) if frame.to_ndarray().any()]
    np.testing.assert_allclose([pictures[0], pictures[-1], heard[0]], [0.5, 2.3, 1.2], atol=0.02)
    with pytest.raises(InputError, match="can hold sound"):
        pipe(video=str(path)).write([tmp_path / "o.265"], audio=True)
    pipe(video=str(path), loop=3, start=0.5, end=2.0).write([tmp_path / "o.mkv"], audio=True)
    with av.open(str(tmp_path / "o.mkv")) as container:
        pictures = [frame.time for frame in container.decode(video=0)]
        container.seek(0)
        heard = [frame.time for frame in container.decode(audio=0) if frame.to_ndarray().any()]
    assert len(pictures) == 45
    np.testing.assert_allclose(np.diff(pictures), 0.1, atol=0.01)
    beeps = [heard[0], *(late for early, late in itertools.pairwise(heard) if late - early > 0.5)]
    np.testing.assert_allclose(beeps, [1.2, 2.7, 4.2], atol=0.03)
    result = pipe(video="a.mp4")
    result.write([tmp_path / "o.mp4"], audio=True)
    assert any("sound is not copied" in warning for warning in result.warnings)


def test_av1_is_written_without_a_word(make: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make(encode={"codec": "av1"})(video="a.mp4").save(tmp_path / "o.mp4")
    assert "Svt" not in "".join(capfd.readouterr())
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert "av1" in container.streams.video[0].codec_context.codec.canonical_name
        assert sum(1 for _ in container.decode(video=0)) == 24


def test_a_process_that_is_killed_leaves_what_plays(folder: Path, tmp_path: Path) -> None:
    source = [
        str(encode(tmp_path / "noise.mp4", noise(60))),
        "-m",
        "square.xml",
        "--model-proc",
        "square.json",
        "--codec",
        "h264",
        "--loop",
        "100000",
    ]
    output = ["-o", str(tmp_path / "o.mp4"), "-o", str(tmp_path / "o.jsonl"), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen([sys.executable, "-m", "ovforge", "video", *source, *output, "-q"], cwd=folder)
    video, lines = tmp_path / "o.part.mp4", tmp_path / "o.part.jsonl"
    try:
        for _ in range(600):
            if video.exists() and video.stat().st_size > 200_000:
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    reader = Reader("killed", str(video))
    count = sum(1 for _ in reader.shots())
    assert reader.damaged <= 1  # the packet that was being written
    numbers = [json.loads(line)["frame"] for line in lines.read_text().splitlines()]
    assert numbers == list(range(len(numbers)))
    assert 20 < count <= len(numbers) + 10  # writers have queues of their own
    assert lines.read_text().endswith("\n")


@contextmanager
def server(folder: Path, port: int = 0) -> Iterator[tuple[int, Callable[[], None]]]:
    """Serve a folder slowly on loopback; yield the port, and what breaks all connections and ends the server."""
    ended = threading.Event()

    class Slow(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def copyfile(self, source: Any, outputfile: Any) -> None:
            while (data := source.read(4000)) and not ended.is_set():
                outputfile.write(data)
                time.sleep(0.01)

        def log_message(self, *args: Any) -> None:
            pass

    http.server.ThreadingHTTPServer.allow_reuse_address = True
    made = http.server.ThreadingHTTPServer(("127.0.0.1", port), Slow)
    threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()

    def end() -> None:
        ended.set()
        made.shutdown()
        made.server_close()

    try:
        yield made.server_address[1], end
    finally:
        end()


def test_a_file_of_a_server_that_is_lost_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    copied(encode(tmp_path / "a.mp4", noise(60)), tmp_path / "a.mkv")
    shots = []
    with server(tmp_path) as (port, end):
        reader = Reader("far", f"http://127.0.0.1:{port}/a.mkv", ReadOptions(again=10))
        reading = reader.shots()
        shots += [next(reading) for _ in range(10)]
        end()
    with server(tmp_path, port):
        shots += list(reading)
    assert [shot.number for shot in shots] == list(range(60))
    np.testing.assert_allclose([shot.seconds for shot in shots], np.arange(60) / RATE, atol=2e-3)
    assert {shot.session for shot in shots} == {0, 1}
    assert reader.notes == ["it was lost and found again: its tracks are new ones"]
    reader = Reader("far", f"http://127.0.0.1:{port}/a.mkv", ReadOptions(again=0.1))
    with pytest.raises(InputError, match="cannot be read"):
        list(reader.shots())


class Near:
    """Finds the one bright square of a picture if it takes a sixth of its width."""

    names, threshold, notes, parallel, batch = ("square",), 0.5, (), 1, 2

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Boxes]:
        found = []
        for each in pictures:
            rows, columns = np.nonzero(each[..., 0] > 128)
            if not len(rows) or np.ptp(columns) + 1 < each.shape[1] / 6:
                found.append(Boxes.none())
                continue
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            score = min(len(rows) / 256, 1.0)  # less if a part of it is cut off
            found.append(Boxes(np.array([box], np.float32), np.array([score], np.float32), np.zeros(1, np.int64)))
        return found


@pytest.mark.parametrize("place", [(0, 0), (48, 30), (60, 50), (104, 80), (37, 30)])
def test_tiles_find_small_things_once_in_the_frames_own_pixels(place: tuple[int, int]) -> None:
    left, top = place
    whole = np.zeros((96, 120, 3), np.uint8)
    whole[top : top + 16, left : left + 16] = 255
    assert not len(Near()([whole])[0])
    (found,) = Tiled(Near(), 2)([whole])
    np.testing.assert_array_equal(found.boxes, [[left, top, left + 16, top + 16]])


RTSP = """
import sys, gi
gi.require_version("Gst", "1.0"); gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
server.set_address("127.0.0.1"); server.set_service(sys.argv[1])
factory.set_launch("( videotestsrc is-live=true pattern=ball ! video/x-raw,format=I420,width=96,height=64,framerate=15/1 "
                   "! jpegenc ! rtpjpegpay name=pay0 pt=26 )")
server.get_mount_points().add_factory("/ball", factory)
assert server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


@contextmanager
def rtsp_server(port: int) -> Iterator[subprocess.Popen[str]]:
    """Run GStreamer's RTSP server on loopback, with a ball that moves; skip if it is not installed."""
    python = "/usr/bin/python3"  # Debian's, whose gi is: gir1.2-gst-rtsp-server-1.0, gstreamer1.0-plugins-good
    if not Path(python).exists():
        pytest.skip("Debian's python3 is not there")
    process = subprocess.Popen(
        [python, "-c", RTSP, str(port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("gir1.2-gst-rtsp-server-1.0 is not installed")
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_rtsp_stream_that_is_lost_goes_on_with_new_numbers(make: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    frames = iter(make()(video=f"rtsp://127.0.0.1:{port}/ball", again=30))
    with rtsp_server(port):
        before = [next(frames) for _ in range(15)]
    with rtsp_server(port):
        after = [frame for frame in itertools.islice(frames, 60) if frame.session == 1][:15]
    frames.close()
    assert {number for frame in before for number in frame.ids.tolist()} == {1}
    assert {number for frame in after for number in frame.ids.tolist()} == {2}
    times = [frame.seconds for frame in before + after]
    assert times == sorted(times)
    assert after[0].seconds - before[-1].seconds > 0.2
