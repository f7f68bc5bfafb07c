"""The live picture: each stream as JPEGs, as they are encoded, to those who keep up and those who do not."""

from __future__ import annotations

import http.client
import io
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ovforge.cli import app
from ovforge.errors import InputError
from ovforge_video.show import LivePage


def connected(page: LivePage, path: str, host: str = "127.0.0.1") -> http.client.HTTPResponse:
    port = int(page.address.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    return connection.getresponse()


def pictures(answer: http.client.HTTPResponse, most: int = 1000) -> list[np.ndarray]:
    """Read JPEGs until the stream ends, or there are so many."""
    found = []
    while len(found) < most and answer.readline().startswith(b"--frame\r\n"):
        assert answer.readline() == b"Content-Type: image/jpeg\r\n"
        length = int(answer.readline().split(b":")[1])
        answer.readline()
        found.append(np.asarray(Image.open(io.BytesIO(answer.read(length)))))
        answer.readline()
    return found


def test_a_viewer_sees_the_drawn_frames_until_the_run_ends(pipe: Any, folder: Path) -> None:
    result = pipe(video=[str(folder / "a.mp4"), str(folder / "b.mp4")], loop=3)
    with LivePage(result.streams) as page:
        assert connected(page, "/").read().count(b"<img") == 2
        answer = connected(page, "/a.mjpeg")
        seen: list[np.ndarray] = []
        reader = threading.Thread(target=lambda: seen.extend(pictures(answer)))
        reader.start()
        result.write([], lambda frame: time.sleep(0.01), page=page)
        reader.join(timeout=20)
        assert not reader.is_alive()
        assert {each.shape for each in seen} == {(64, 96, 3)}
        counts = page.counts
        assert 5 < len(seen) == counts["sent"] <= 72
        assert any(
            (each[:, :, 0].astype(int) - each[:, :, 2] > 60).any() for each in seen
        )  # a drawn box; the clip is gray
        assert result.counts["page"] == counts
    with pytest.raises(ConnectionError):
        connected(page, "/")


def test_slow_viewers_miss_frames_and_hold_nothing_up(pipe: Any) -> None:
    with LivePage(["a"]) as page:
        slow = socket.create_connection(("127.0.0.1", int(page.address.rstrip("/").rpartition(":")[2])))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(b"GET /a.mjpeg HTTP/1.1\r\nHost: localhost:1\r\n\r\n")
        newest = page._newest["a"]
        while not newest.viewers:
            time.sleep(0.01)
        noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
        begin = time.monotonic()
        for _ in range(300):
            newest.put(noise)
            time.sleep(0.001)
        assert time.monotonic() - begin < 5
        assert page.counts["sent"] < 100
        slow.settimeout(20)
        while page.counts["missed"] < 150:  # it reads on, and goes on with the newest
            assert slow.recv(2**20)
        assert page.counts["sent"] < 150
        slow.close()


def test_other_hosts_paths_and_ports_are_refused() -> None:
    with LivePage(["a"]) as page:
        assert connected(page, "/", host="evil.example").status == 403
        assert connected(page, "/b.mjpeg").status == 404
        with pytest.raises(InputError, match="cannot be used"):
            LivePage(["a"], int(page.address.rstrip("/").rpartition(":")[2]))


def test_the_command_says_where_the_page_is(folder: Path, tmp_path: Path) -> None:
    said = [
        "video",
        str(folder / "a.mp4"),
        "-m",
        str(folder / "square.xml"),
        "--model-proc",
        str(folder / "square.json"),
        "--show",
        "--cache",
        str(tmp_path / "c"),
    ]
    done = CliRunner().invoke(app, said)
    assert done.exit_code == 0, done.output
    assert "the live picture: http://127.0.0.1:" in done.output
