"""The live picture of a run: a page on this machine alone that shows each stream as a series of JPEGs.

Source: `multipart/x-mixed-replace` (Netscape 1995), which browsers show in an `img`, as cameras send it.
"""

from __future__ import annotations

import html
import io
import socket
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovforge.errors import InputError
from ovforge_video.drawing import Overlay
from ovforge_video.frame import Frame

__all__ = ["LivePage"]

HOST = "127.0.0.1"
VIEWERS = 16
"""Most pictures that are sent at a time: each holds a thread."""
PATIENCE = 10.0
"""Seconds that a viewer may take for one picture before it is left."""
QUALITY = 80
HELD = 2**17
"""Bytes on the way to a viewer: more would be old pictures to those who are slow."""
_BOUNDARY = "frame"
_NAMES = ("127.0.0.1", "localhost")
"""Hosts that a browser may call us by; others are names of strangers' pages that lead here."""


class LivePage:
    """Serves the newest frame of each stream to those who look; viewers that are slow miss frames.

    Use it in a `with` block: it listens from its beginning to its end. Raises InputError if the port is taken.
    """

    def __init__(self, streams: Sequence[str], port: int = 0) -> None:
        self._newest = {name: _Newest() for name in streams}
        self._places = threading.BoundedSemaphore(VIEWERS)
        try:
            self._server = _Server((HOST, port), _Handler)
        except OSError as error:
            raise InputError(
                f"port {port} cannot be used: {error.strerror}", where="--port", hint="Leave it out, or choose another."
            ) from error
        self._server.page = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="show", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self._server.server_address[1]}/"

    @property
    def counts(self) -> dict[str, int]:
        """Return how many pictures were sent, and how many viewers that were too slow for them missed."""
        newest = self._newest.values()
        return {"sent": sum(each.sent for each in newest), "missed": sum(each.missed for each in newest)}

    def sink(self, stream: str, overlay: Overlay) -> Any:
        """Return what takes the frames of a stream, and draws them as `overlay` does if somebody looks."""
        return _Sink(self._newest[stream], overlay)

    def __enter__(self) -> LivePage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for newest in self._newest.values():
            newest.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _page(self) -> bytes:
        streams = "".join(
            f"<figure><img src='/{quote(name)}.mjpeg' alt='{html.escape(name, quote=True)}'>"
            f"<figcaption>{html.escape(name)}</figcaption></figure>"
            for name in self._newest
        )
        return (
            "<!doctype html><meta charset=utf-8><title>ovforge video</title>"
            "<style>body{margin:0;background:#111;color:#ddd;font:14px sans-serif;display:flex;flex-wrap:wrap}"
            f"figure{{margin:8px}}img{{max-width:100%;display:block}}</style>{streams}"
        ).encode()


class _Newest:
    """The newest frame of a stream, for those who look at it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._picture: NDArray[np.uint8] | None = None
        self._jpeg: tuple[int, bytes] = 0, b""
        self._number, self._closed = 0, False
        self.viewers = self.sent = self.missed = 0

    def put(self, picture: NDArray[np.uint8]) -> None:
        with self._changed:
            self._picture = picture
            self._number += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def look(self, entered: bool) -> None:
        """Count a viewer who comes, or goes."""
        with self._changed:
            self.viewers += 1 if entered else -1

    def next(self, after: int) -> tuple[int, bytes] | None:
        """Wait for a picture that is newer than the one `after`, and return its number and JPEG; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._number > after)
            if self._number <= after:
                return None
            number, picture, made = self._number, self._picture, self._jpeg
            self.sent += 1
            self.missed += number - after - 1 if after else 0
        if made[0] != number:
            assert picture is not None
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "JPEG", quality=QUALITY)
            made = number, buffer.getvalue()
            with self._changed:
                self._jpeg = made
        return made


class _Sink:
    def __init__(self, newest: _Newest, overlay: Overlay) -> None:
        self._newest, self._overlay = newest, overlay

    def write(self, frame: Frame) -> None:
        if self._newest.viewers:
            self._newest.put(self._overlay(frame))

    def close(self, whole: bool) -> None:
        self._newest.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    page: LivePage

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of viewers that go away."""


class _Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE
    server_version = "ovforge"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, HELD)

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        page = self.server.page
        if self.headers.get("Host", "").rpartition(":")[0] not in _NAMES:
            self.send_error(HTTPStatus.FORBIDDEN, "call it 127.0.0.1")
            return
        path = unquote(self.path.partition("?")[0])
        if path == "/":
            self._head("text/html; charset=utf-8")
            self.wfile.write(page._page())
        elif (newest := page._newest.get(path.removeprefix("/").removesuffix(".mjpeg"))) and path.endswith(".mjpeg"):
            if not page._places.acquire(blocking=False):
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, f"{VIEWERS} pictures are sent already")
                return
            newest.look(True)
            try:
                self._pictures(newest)
            finally:
                newest.look(False)
                page._places.release()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _pictures(self, newest: _Newest) -> None:
        self._head(f"multipart/x-mixed-replace; boundary={_BOUNDARY}")
        number = 0
        while made := newest.next(number):
            number, jpeg = made
            head = f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            self.wfile.write(head.encode() + jpeg + b"\r\n")
        self.wfile.write(f"--{_BOUNDARY}--\r\n".encode())

    def _head(self, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: standard error is the program's."""
