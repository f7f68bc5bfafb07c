"""Videos that were made: the files they are written to, and what they say of themselves."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from ovforge.cli.pipelines import _output
from ovforge.errors import InputError
from ovforge.model import read_provenance
from ovforge.store import atomic_folder
from ovforge_diffusion.video import result as made
from ovforge_diffusion.video.reading import Clip, clip_name, read_footage
from ovforge_diffusion.video.result import VideosResult

PROVENANCE: dict[str, Any] = {"config": {"task": "text-to-video"}, "inputs": {"prompt": "a café", "seed": [3, 4]}}


def _video(number: int) -> np.ndarray:
    """Return a ramp of colours that moves: smooth, so that encoders lose little."""
    frames, rows, columns = np.mgrid[:17, :64, :96]
    ramp = np.stack([columns + 4 * frames, 2 * rows, columns + rows], axis=-1) + 10 * number
    return ramp.clip(0, 255).astype(np.uint8)


@pytest.fixture
def result() -> VideosResult:
    return VideosResult(
        videos=[_video(0), _video(1)], frame_rate=12.5, seeds=(3, 4), latents=np.zeros((2, 8, 3, 2, 3), np.float32),
        provenance=PROVENANCE,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_encoded_files_show_the_frames_at_their_times(result: VideosResult, tmp_path: Path, suffix: str) -> None:
    av = pytest.importorskip("av")
    files = result.save(tmp_path / f"x{suffix}")
    assert [file.name for file in files] == [f"x-1{suffix}", f"x-2{suffix}"]
    for number, file in enumerate(files):
        with av.open(str(file)) as container:
            note = {name.lower(): text for name, text in container.metadata.items()}["comment"]
            frames = list(container.decode(video=0))
        pictures = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        assert pictures.shape == _video(number).shape
        assert np.abs(pictures.astype(int) - _video(number)).mean() < 4
        times = np.array([frame.time for frame in frames])
        np.testing.assert_allclose(times, np.arange(17) / 12.5, atol=1.1e-3)
        assert json.loads(note)["ovforge"]["inputs"] == {"prompt": "a café", "seed": 3 + number, "count": 1}


@pytest.mark.parametrize(("suffix", "rate", "said"), [
    (".webp", 12.5, ""), (".webp", 30, "thousandths"), (".gif", 12.5, ""), (".gif", 24, "hundredths"),
])  # fmt: skip
def test_animations_keep_time_and_carry_their_recipe(
    result: VideosResult, tmp_path: Path, suffix: str, rate: float, said: str
) -> None:
    result.frame_rate = rate
    files = result.save(tmp_path / f"x{suffix}")
    with Image.open(files[1]) as picture:
        assert picture.n_frames == 17
        shown = []
        for frame in range(17):
            picture.seek(frame)
            assert np.abs(np.asarray(picture.convert("RGB"), int) - _video(1)[frame]).mean() < 6
            shown.append(picture.info["duration"])
    unit = 10 if suffix == ".gif" else 1
    np.testing.assert_allclose(np.cumsum(shown), 1000 * np.arange(1, 18) / rate, atol=unit / 2 if said else 0)
    assert [said in warning for warning in result.warnings] == [True] * bool(said)
    assert read_provenance(files[1])["inputs"]["seed"] == 4


def test_a_folder_has_the_frames_and_no_older_ones(result: VideosResult, tmp_path: Path) -> None:
    files = result.save(f"{tmp_path}/x/")
    assert [file.relative_to(tmp_path).as_posix() for file in files[16:18]] == ["x-1/0017.png", "x-2/0001.png"]
    for number, video in enumerate(result.videos):
        shown = np.stack([np.asarray(Image.open(file)) for file in files[17 * number : 17 * number + 17]])
        np.testing.assert_array_equal(shown, video)
    assert read_provenance(files[-1])["inputs"]["seed"] == 4
    assert result.warnings == [f"{tmp_path}/x: pictures do not say how fast they follow each other: 12.5 a second"]
    (tmp_path / "x-1/notes.txt").write_text("mine")
    shorter = VideosResult(videos=[_video(1)[:9]], seeds=[4])
    assert len(shorter.save(tmp_path / "x-1")) == 9
    clip = TypeAdapter(Clip).validate_python("x-1", context={"base": tmp_path})
    assert [path.name for path in clip] == [f"{number:04}.png" for number in range(1, 10)]
    assert (tmp_path / "x-1/notes.txt").read_text() == "mine"


def test_a_frame_stands_for_its_video(result: VideosResult, tmp_path: Path) -> None:
    """When it is run again, the output is not named as a picture, which no video is written to."""
    result.provenance = {"config": {"task": "video-to-video", "load": {"source": "x"}}, "inputs": {}}
    frame, gif = result.save(tmp_path / "x")[0], result.save(tmp_path / "x.gif")[0]
    assert _output(frame, [], None)[0] == Path(f"video-to-video{VideosResult.suffixes[0]}")
    assert _output(gif, [], None)[0] == tmp_path / "x-1-again.gif"


def test_what_is_not_a_folder_of_frames_stays(tmp_path: Path) -> None:
    """Neither a file, nor a folder of the user's, nor a model that ovforge wrote, is replaced."""
    result = VideosResult(videos=[_video(0)[:1]], seeds=[1])
    (tmp_path / "file").write_text("mine")
    (tmp_path / "own").mkdir()
    (tmp_path / "own/0001.png").write_text("mine")
    with atomic_folder(tmp_path / "model") as model:
        (model / "openvino_model.xml").write_text("a model")
    for name, message in (("file", "is a file"), ("own", "did not write"), ("model", "holds openvino_model.xml")):
        with pytest.raises(InputError, match=message):
            result.save(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "own/0001.png").read_text() == "mine"
    assert (tmp_path / "model/openvino_model.xml").read_text() == "a model"


def test_what_a_result_says_of_itself(result: VideosResult, tmp_path: Path) -> None:
    assert result.lines() == ["96x64, 17 frames, 1.4 s"] * 2
    assert result.as_json()[1] == {"width": 96, "height": 64, "frames": 17, "frame_rate": 12.5, "seed": 4}
    preview = result.preview()
    assert preview is not None
    np.testing.assert_array_equal(np.asarray(preview), _video(0)[8])
    assert result.compare(result, "psnr") == 100
    other = VideosResult(videos=[_video(0), _video(0)], seeds=(3, 4))
    assert 20 < result.compare(other, "psnr") < 100
    with pytest.raises(InputError, match="cannot be compared"):
        result.compare(VideosResult(videos=[_video(0)[:9]], seeds=(3,)), "psnr")
    np.testing.assert_array_equal(np.load(result.save(tmp_path / "x.npy")[0]), result.latents)
    assert result.compact().latents is None
    without = VideosResult(latents=result.latents, seeds=(3, 4))
    assert without.as_json() == []
    assert not without.metrics
    assert not without.is_empty()
    assert VideosResult().is_empty()
    with pytest.raises(InputError, match="latents and no video"):
        without.save(tmp_path / "x.webp")


def test_without_pyav_a_file_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(made.VideosResult, "suffixes", (".webp", ".npy"))
    with pytest.raises(InputError, match=r"needs PyAV.*\n.*ovforge-diffusion\[video\]"):
        VideosResult.check_path(tmp_path / "x.mp4")
    with pytest.raises(InputError, match=r"cannot write \.avi"):
        VideosResult.check_path(tmp_path / "x.avi")


def test_an_encoder_that_pyav_was_built_without_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    monkeypatch.setitem(made._CODECS, ".mp4", ("mp4", "no-such-encoder", {}))
    with pytest.raises(InputError, match="built without the encoder no-such-encoder"):
        VideosResult.check_path(tmp_path / "x.mp4")
    assert av.Codec(made._CODECS[".webm"][1], "w").is_encoder


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction("12.3456")])
def test_odd_rates_are_kept(tmp_path: Path, rate: Fraction) -> None:
    av = pytest.importorskip("av")
    file = VideosResult(videos=[_video(0)], frame_rate=float(rate), seeds=(1,)).save(tmp_path / "x.mp4")[0]
    with av.open(str(file)) as container:
        assert container.streams.video[0].average_rate == rate


def test_a_rate_that_no_gif_shows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 50 frames a second, and there are 60"):
        VideosResult(videos=[_video(0)], frame_rate=60, seeds=(1,)).save(tmp_path / "x.gif")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".webp", ".gif"])
def test_videos_are_read(tmp_path: Path, suffix: str) -> None:
    """As they were written, but for what compression loses; a part that there is no room for is left out, and said."""
    if suffix in (".mp4", ".webm"):
        pytest.importorskip("av")
    slope = np.linspace(0, 200, 96)[None, None, :, None] + 5 * np.arange(12)[:, None, None, None]
    video = np.broadcast_to(slope, (12, 64, 96, 3)).astype(np.uint8)
    path = tmp_path / f"x{suffix}"
    VideosResult(videos=[video], seeds=[1], frame_rate=30).save(path)
    clip = TypeAdapter(Clip).validate_python(path.name, context={"base": tmp_path})
    assert clip_name(clip) == str(path)
    notes: list[str] = []
    footage = read_footage(clip, "video", None, 8, notes)
    pixels = footage.pixels
    assert footage.rate == pytest.approx(30)
    assert pixels.shape == (3, 9, 64, 96)
    difference = np.abs((pixels.transpose(1, 2, 3, 0) + 1) * 127.5 - video[:9])
    assert difference.mean() < 3
    assert notes == ["video: its first 9 frames are taken, and the others left out"]
    assert read_footage(clip, "video", (32, 64), 8, [], room=8).pixels.shape == (3, 1, 64, 32)
    assert read_footage(video, "video", None, 8, []).rate is None


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    adapter = TypeAdapter(Clip)
    for value in (3, np.zeros((2, 4, 4, 4), np.uint8), [], "sha256:abc"):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)
    for name, content in (("x.webp", b"RIFF\0\0\0\0WEBPVP8 "), ("x.mp4", b""), ("x.txt", b"concat:/etc/passwd")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="not a readable video"):
            read_footage(tmp_path / name, "video", None, 8, [])


def test_a_playlist_reaches_no_other_file(tmp_path: Path) -> None:
    """FFmpeg would follow it, and show a stranger what lies elsewhere."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.ts"), "w", format="mpegts") as file:
        stream = file.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        file.mux(stream.encode(av.VideoFrame.from_ndarray(_video(0)[0], format="rgb24")))
        file.mux(stream.encode(None))
    assert read_footage(tmp_path / "x.ts", "video", None, 8, []).pixels.shape == (3, 1, 64, 96)
    playlist = tmp_path / "x.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path / 'x.ts'}\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError, match="not a readable video"):
        read_footage(playlist, "video", None, 8, [])


def test_a_video_that_does_not_fit_into_memory_is_refused() -> None:
    """A small file may hold very many pixels."""
    black = Image.new("RGB", (16, 16))
    with pytest.raises(InputError, match="5 frames of 8192x8192 are more than"):
        read_footage([black] * 9, "video", (8192, 8192), 8, [])
