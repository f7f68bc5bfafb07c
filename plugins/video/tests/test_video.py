"""Streams from file to file: every frame, each thing with one number, the same alone and beside others."""

from __future__ import annotations

import csv
import errno
import json
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clips import HEIGHT, RATE, SIDE, WIDTH, corner, picture, write_clip
from ovforge.errors import ConfigError, InputError
from ovforge_video.encoding import Encoder
from ovforge_video.options import EncodeOptions
from ovforge_video.reading import Reader


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_frame_comes_in_order_and_the_thing_keeps_its_number(pipe: Any, folder: Path) -> None:
    result = pipe(video=str(folder / "a.mp4"))
    frames = list(result)
    assert [frame.number for frame in frames] == list(range(24))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(24) / RATE, atol=1e-3)
    assert all(frame.size == (WIDTH, HEIGHT) and frame.picture.shape == (HEIGHT, WIDTH, 3) for frame in frames)
    counted = frames[2:]  # the third box in a row makes a thing
    assert [frame.ids.tolist() for frame in counted] == [[1]] * 22
    assert {label for frame in counted for label in frame.labels} == {"square"}
    for frame in counted:
        left, top = corner(frame.number)
        np.testing.assert_allclose(frame.boxes[0], (left, top, left + SIDE, top + SIDE), atol=2.5)
    assert result.counts["things"] == {"square": 1}
    assert result.counts["streams"]["a"]["frames"] == 24
    supervised = counted[0].to_supervision()
    assert supervised.tracker_id.tolist() == [1]
    with pytest.raises(InputError, match="read before"):
        next(iter(result))


def test_all_files_of_a_run_hold_the_same(pipe: Any, folder: Path, tmp_path: Path) -> None:
    names = ["o.jsonl", "o.txt", "o.csv", "o.json", "o.mp4", "o.mkv"]
    written = pipe(video="a.mp4").write([tmp_path / name for name in names])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names) == sorted(path.name for path in written)
    objects = [(frame["frame"], thing) for frame in lines(tmp_path / "o.jsonl") for thing in frame["objects"]]
    assert len(objects) == 22
    mot = np.loadtxt(tmp_path / "o.txt", delimiter=",")
    table = list(csv.DictReader((tmp_path / "o.csv").open()))
    coco = json.loads((tmp_path / "o.json").read_text())
    assert [image["frame_id"] for image in coco["images"]] == list(range(24))
    assert coco["categories"] == [{"id": 1, "name": "square"}]
    for (number, thing), row, cells, annotation in zip(objects, mot, table, coco["annotations"], strict=True):
        left, top, right, bottom = thing["box"]
        np.testing.assert_allclose(row[:6], [number + 1, thing["id"], left, top, right - left, bottom - top], atol=0.02)
        assert (int(cells["frame"]), int(cells["id"]), cells["label"]) == (number, thing["id"], "square")
        assert (annotation["image_id"], annotation["instance_id"]) == (number + 1, thing["id"])
        np.testing.assert_allclose(annotation["bbox"], row[2:6], atol=0.02)
    for name in ("o.mp4", "o.mkv"):
        with av.open(str(tmp_path / name)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.width, stream.height) == ("hevc", WIDTH, HEIGHT)
            times = [frame.time for frame in container.decode(stream)]
        np.testing.assert_allclose(np.array(times) - times[0], np.arange(24) / RATE, atol=2e-3)


@pytest.mark.parametrize("track", ["steady", "byte-track", "zero-term"])
def test_four_streams_at_once_give_what_each_gives_alone(make: Any, folder: Path, tmp_path: Path, track: str) -> None:
    pipe = make(track=track)
    paths = [str(folder / f"{name}.mp4") for name in "abcd"]
    pipe(video=paths).save(tmp_path / "all.jsonl")
    for path in paths:
        alone = tmp_path / "alone.jsonl"
        pipe(video=path).save(alone)
        together = tmp_path / f"all-{Path(path).stem}.jsonl"
        assert together.read_bytes() == alone.read_bytes()
        assert lines(alone)[-1]["objects"]


def test_a_tracker_bridges_frames_that_the_detector_does_not_look_at(make: Any) -> None:
    frames = list(make(interval=3)(video="a.mp4"))
    assert len(frames) == 24
    counted = frames[6:]
    assert [frame.ids.tolist() for frame in counted] == [[1]] * 18
    assert [bool(frame.found[0]) for frame in counted] == [frame.number % 3 == 0 for frame in counted]
    for frame in counted:
        assert abs(frame.boxes[0, 0] - corner(frame.number)[0]) < 4
    with pytest.raises(ConfigError, match="each picture"):
        make(interval=3, track="sort")


def test_regions_tiles_and_no_tracker(make: Any) -> None:
    assert not any(len(frame) for frame in make()(video="a.mp4", region=[(0, 0.8), (1, 0.8), (1, 1), (0, 1)]))
    whole = list(make(track="none", tiles=2)(video="a.mp4"))
    assert all(frame.ids.tolist() == [0] for frame in whole)


def test_a_stream_that_cannot_be_read_ends_alone(pipe: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    result = pipe(video=[str(tmp_path / "text.mp4"), str(folder / "b.mp4")])
    assert {frame.stream for frame in result} == {"b"}
    assert any("text ended early: it cannot be read" in warning for warning in result.warnings)


def wav(path: Path) -> Path:
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    return path


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("none.mp4", None, "no such file"), ("empty.mp4", b"", "cannot be read"),
        ("list.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nlong.ts\n", "list of other files"),
        ("list.mp4", b"ffconcat version 1.0\nfile long.ts\n", "list of other files"),
        ("list.sdp", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 26\n", "list of other files"),
    ],
)  # fmt: skip
def test_what_is_no_video_is_refused(pipe: Any, tmp_path: Path, name: str, data: bytes | None, said: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
        list(pipe(video=str(tmp_path / name)))


def test_sound_alone_is_refused_and_other_addresses_are(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no video"):
        list(pipe(video=str(wav(tmp_path / "a.wav"))))
    with pytest.raises(InputError, match="not a supported kind of address"):
        pipe(video="concat://a|b")
    with pytest.raises(InputError, match="silent|cannot be read"):
        list(pipe(video="http://127.0.0.1:9/none.mp4"))


def test_truncated_and_damaged_files_give_what_is_whole(pipe: Any, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mkv", 40)
    data = path.read_bytes()
    (tmp_path / "half.mkv").write_bytes(data[: len(data) // 2])
    assert 5 < sum(1 for _ in pipe(video=str(tmp_path / "half.mkv"))) < 40
    bent = bytearray(data)
    bent[len(data) // 2 : len(data) // 2 + 300] = bytes(300)
    (tmp_path / "bent.mkv").write_bytes(bent)
    assert 5 < sum(1 for _ in pipe(video=str(tmp_path / "bent.mkv"))) <= 40


def test_a_run_that_is_left_leaves_a_video_that_plays(make: Any, folder: Path, tmp_path: Path) -> None:
    pipe = make(encode={"codec": "h264", "key_seconds": 0.2})
    frames = pipe(video="a.mp4", loop=20).run([tmp_path / "o.mp4", tmp_path / "o.jsonl"])
    for _ in range(60):
        next(frames)
    frames.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.part.jsonl", "o.part.mp4"]
    with av.open(str(tmp_path / "o.part.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) > 20
    assert [line["frame"] for line in lines(tmp_path / "o.part.jsonl")][:3] == [0, 1, 2]


def test_a_full_disk_is_said_and_the_lines_so_far_are_whole(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ovforge_video.writers as writers

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 2000

        def write(self, data: Any) -> int:
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = min(self.left, len(data))
            self.left -= taken
            return self.file.write(data[:taken])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    made = writers.Lines.__init__

    def limited(self: Any, path: Path) -> None:
        made(self, path)
        self._file = Full(self._file)

    monkeypatch.setattr(writers.Lines, "__init__", limited)
    with pytest.raises(InputError, match="No space left"):
        pipe(video="a.mp4").save(tmp_path / "o.jsonl")
    found = lines(tmp_path / "o.part.jsonl")
    assert [line["frame"] for line in found] == list(range(len(found)))
    assert found


def test_parts_sizes_rates_and_pictures(pipe: Any, folder: Path, tmp_path: Path) -> None:
    part = list(pipe(video="a.mp4", start=0.5, end=1.5))
    assert [round(frame.seconds, 2) for frame in part] == [n / 10 for n in range(5, 15)]
    assert len(list(pipe(video="a.mp4", fps=5))) == 12
    assert {frame.size for frame in pipe(video="a.mp4", size=(48, 32))} == {(48, 32)}
    for number in range(4):
        Image.fromarray(picture(number)).save(tmp_path / f"{number}.png")
    assert [len(frame) for frame in pipe(video=str(tmp_path))] == [0, 0, 1, 1]
    assert len(list(pipe(video="a.mp4", loop=3))) == 72


def test_frames_that_change_their_size_are_scaled_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(64, 48), (32, 24), (100, 10)]
    frames = [(n / 10, av.VideoFrame(*size, format="rgb24")) for n, size in enumerate(sizes)]
    reader = Reader("odd", "odd.mp4")
    monkeypatch.setattr(Reader, "_pictures", lambda self, stopped: iter(frames))
    assert {shot.picture.shape for shot in reader.shots()} == {(48, 64, 3)}
    assert "all are scaled to 64x48" in reader.notes[0]


def test_timestamps_that_jump_back_go_on_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [(seconds, av.VideoFrame(8, 8, format="rgb24")) for seconds in (0.0, 0.04, -5.0, 0.01, 0.2)]
    monkeypatch.setattr(Reader, "_pictures", lambda self, stopped: iter(frames))
    seconds = [shot.seconds for shot in Reader("odd", "odd.mp4").shots()]
    np.testing.assert_allclose(seconds, [0, 0.04, 0.08, 0.12, 0.2])


@pytest.mark.parametrize("ending", ["mp4", "mkv", "265"])
def test_what_is_encoded_is_on_the_disk_soon_however_little_it_is(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"o.{ending}"
    encoder = Encoder(path, EncodeOptions(), Fraction(RATE))
    for number in range(100):
        encoder.write(picture(number % 24), number / RATE)
    assert path.stat().st_size < 50_000
    assert sum(1 for _ in Reader("o", str(path)).shots()) >= 55  # without two seconds, and what the encoder looks ahead
    encoder.close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_frame_or_two_are_a_video(count: int, tmp_path: Path) -> None:
    for attempt in range(10):  # what libx265 leaves unset is often right by chance
        path = tmp_path / f"{attempt}.mp4"
        encoder = Encoder(path, EncodeOptions(), Fraction(RATE))
        for number in range(count):
            encoder.write(picture(number), number / RATE)
        encoder.close()
        with av.open(str(path)) as container:
            assert [frame.time for frame in container.decode(video=0)] == pytest.approx([0, 0.1][:count])


def test_odd_sides_are_encoded_as_they_are(pipe: Any, tmp_path: Path) -> None:
    pipe(video="a.mp4", end=0.5, size=(97, 65)).save(tmp_path / "o.mp4")
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert {(frame.width, frame.height) for frame in container.decode(video=0)} == {(97, 65)}
    with pytest.raises(InputError, match="does not write frames of 35x27"):
        pipe(video="a.mp4", size=(35, 27)).save(tmp_path / "small.mp4")
