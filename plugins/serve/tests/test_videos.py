"""Videos over HTTP: the lines that the pipeline gives, as they come, and an end when nobody reads them."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

import ovforge
from ovforge.model import package_path

TEXT = "horse. car."


def clip(path: Path, frames: int) -> bytes:
    """Return a video in which a drawn scene moves."""
    with Image.open(package_path("package:ovforge_grounding_dino/demo/scene.jpg")) as opened:
        scene = np.asarray(opened.convert("RGB").resize((160, 120)))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for n in range(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.roll(scene, 2 * n, axis=1)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    clip(path, 6)
    return path


def test_lines_are_those_of_the_pipeline(client: httpx.Client, configs: dict[str, Path], short: Path) -> None:
    result: Any = ovforge.load(configs["video"])(video=str(short), text=TEXT)
    expected = [frame.as_json() for frame in result]
    assert any(frame["objects"] for frame in expected)
    data = short.read_bytes()
    form = client.post("/v1/videos", files={"video": data}, data={"text": TEXT, "model": "video"}).raise_for_status()
    assert form.headers["content-type"] == "application/x-ndjson"
    as_json = client.post("/v1/videos", json={"video": base64.b64encode(data).decode(), "text": TEXT})
    for answer in (form, as_json):
        *frames, end = [json.loads(line) for line in answer.text.splitlines()]
        for frame in (*frames, *expected):
            frame.pop("stream", None)
        assert frames == expected
        assert end["end"]["result"]["counts"]["frames"] == 6
    drawn = client.post("/v1/videos?as=.mp4", files={"video": data}, data={"text": TEXT}).raise_for_status()
    assert drawn.headers["content-type"] == "video/mp4"
    (short.parent / "drawn.mp4").write_bytes(drawn.content)
    with av.open(str(short.parent / "drawn.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_a_video_is_a_file_that_was_sent_and_nothing_else(client: httpx.Client, short: Path, server: Any) -> None:
    """Neither a file of the server, nor a stream or a list that leads to others, nor what is not a video."""
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    for name in (str(short), short.as_uri(), "rtsp://127.0.0.1/x", "/dev/video0", "-", "concat:/etc/hostname"):
        for path, field in (("/v1/videos", "video"), ("/v1/pipelines/video/run", "video")):
            for value in (name, [name]):
                answer = client.post(path, json={field: value, "text": TEXT})
                assert answer.status_code == 400, answer.text
    for data in (playlist, b"ffconcat version 1.0\nfile /etc/hostname\n", b"x" * 99, short.read_bytes()[:200]):
        answer = client.post("/v1/videos", files={"video": data}, data={"text": TEXT})
        assert answer.status_code == 400, answer.text
        assert "/scratch/" not in answer.text
    for path, words in (("/v1/videos?as=.exe", "cannot write"), ("/v1/videos?as=mp4", "say what to look for")):
        answer = client.post(path, files={"video": short.read_bytes()})
        assert (answer.status_code, words in answer.text) == (400, True), answer.text
    assert client.post("/v1/videos", json={"model": "lcm", "video": "AAAA"}).status_code == 404
    assert server.uploads() == []


def test_frames_are_bounded_as_pictures_are(start: Callable[..., Any], configs: dict[str, Path], short: Path) -> None:
    """The server sees no frame, and tells the task what it allows: 160x120 is more than 10,000."""
    server = start(configs["video"], "--max-pixels", "10000")
    with server.client() as client:
        for path, more, words in (
            ("/v1/videos", {}, "its frames are 160x120"),
            ("/v1/pipelines/video/run", {}, "its frames are 160x120"),
            ("/v1/videos", {"pixels": 2**24}, "is more than 10000"),
            ("/v1/videos", {"inputs": '{"size": [200, 100]}'}, "more than 10000 pixels"),
            ("/v1/videos", {"loop": 1000}, "is more than 8"),
        ):
            answer = client.post(path, files={"video": short.read_bytes()}, data={"text": TEXT, **more})
            assert (answer.status_code, words in answer.text) == (400, True), answer.text


def test_lines_come_while_the_run_goes_on_and_it_ends_with_its_client(
    client: httpx.Client, server: Any, tmp_path: Path
) -> None:
    long = clip(tmp_path / "long.mp4", 600)
    with client.stream(
        "POST", "/v1/videos", files={"video": long}, data={"text": TEXT}, headers={"x-request-id": "left"}
    ) as answer:
        first = next(answer.iter_lines())
    assert json.loads(first)["frame"] == 0
    began = time.monotonic()
    short = client.post("/v1/videos", files={"video": clip(tmp_path / "short.mp4", 2)}, data={"text": TEXT})
    assert short.raise_for_status().text.count("\n") == 3
    assert time.monotonic() - began < 30  # 600 frames take minutes
    assert server.status("left") in (200, 499)
