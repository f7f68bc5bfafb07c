"""What holds a server together when others pull: files, addresses, connections, memory. Nothing here runs a model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import http.server
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ovforge import Stop
from ovforge.config import InputFile
from ovforge.errors import ConfigError, InputError, OvforgeError
from ovforge.model import Picture
from ovforge_serve import pipelines as pipelines_module
from ovforge_serve import remote
from ovforge_serve.files import Sent
from ovforge_serve.guard import Guard
from ovforge_serve.keys import VARIABLE, Keys
from ovforge_serve.log import Log
from ovforge_serve.metrics import Metrics
from ovforge_serve.pipelines import Pipelines, Served
from ovforge_serve.protocol import bounded_protocol
from ovforge_serve.queue import Queue
from ovforge_serve.run import Address, _listening, listen
from ovforge_serve.server import Serving
from ovforge_serve.settings import HttpError, Settings

# -- files ------------------------------------------------------------------------------------------------------------


class Part(BaseModel):
    image: Picture
    note: str = ""


class Inputs(BaseModel):
    """Every way in which a task may take files, with checks that move a value to another place."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    text: str | list[str] = ""
    number: int | list[int] | None = None
    file: InputFile | None = None
    plain: Path | None = None
    pictures: list[Picture] | None = None
    parts: list[Part] | None = None
    either: str | Path = ""
    anything: Any = None
    named: dict[str, Path] = Field(default_factory=dict)

    @field_validator("pictures", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, list) else [value]

    @field_validator("parts", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        each = value if isinstance(value, list) else [value]
        return None if value is None else [one if isinstance(one, dict) else {"image": one} for one in each]


class Mover(BaseModel):
    """A third party's inputs that make a path of what they call text."""

    text: Any = Field(json_schema_extra={"type": "string"})

    @field_validator("text", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return Path(value)


class Second(BaseModel):
    steps: int = 1
    timesteps: list[float] = Field(default_factory=list)


class Twice(BaseModel):
    """Inputs of two runs, of which the second has a table of its own."""

    steps: int = 1
    second: Second | None = None


@functools.cache
def served(model: type[BaseModel]) -> Any:
    class Config:
        input: Mapping[str, Any] = {}

    fake: Any = Served(name="x", config=Config(), base=Path("/"), task=None)  # type: ignore[arg-type]
    fake.inputs, fake.schema = model, model.model_json_schema()
    return fake


def no_url(url: str) -> bytes:
    raise InputError("URLs are not fetched")


SECRET = "/etc/hostname"
TEXTS = st.sampled_from(
    [SECRET, "etc/hostname", "../x", "a", "12", "AAAA", "package:ovforge/x", "~", "file:///etc", "data:,x"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "note", "a"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(Inputs.model_fields)), VALUES, max_size=4))
def test_no_value_becomes_a_path_of_the_server(tmp_path: Path, value: dict[str, Any]) -> None:
    with Sent(tmp_path, Settings(), no_url) as sent:
        try:
            inputs = Inputs.model_validate(sent.inputs(served(Inputs), value))
        except (InputError, ConfigError):
            return
        paths = [
            inputs.file,
            inputs.plain,
            inputs.either,
            inputs.anything,
            *(inputs.pictures or []),
            *inputs.named.values(),
        ]
        paths += [part.image for part in inputs.parts or []]
        assert all(path.is_relative_to(tmp_path) for path in paths if isinstance(path, Path))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_a_task_makes_of_text_is_refused(tmp_path: Path) -> None:
    with Sent(tmp_path, Settings(), no_url) as sent, pytest.raises(InputError, match="names a file of the server"):
        sent.inputs(served(Mover), {"text": SECRET})
    with Sent(tmp_path, Settings(), no_url) as sent:
        given = sent.inputs(served(Inputs), {"plain": base64.b64encode(b"x").decode(), "text": SECRET})
        assert given["text"] == SECRET
        assert given["plain"].read_bytes() == b"x"
        assert sent.shown({"at": f"<{given['plain']}>"})["at"].startswith("<sha256:")


@pytest.mark.parametrize(
    ("value", "where", "words"),
    [
        ({"steps": 201}, "steps", "201 is more than 200"),
        ({"steps": 200, "second": {"steps": 201}}, "second.steps", "201 is more than 200"),
        ({"second": {"timesteps": [1.0] * 65}}, "second", "a list of 65 is longer than 64"),
    ],
)
def test_bounds_hold_for_tables_of_inputs(tmp_path: Path, value: dict[str, Any], where: str, words: str) -> None:
    with Sent(tmp_path, Settings(), no_url) as sent, pytest.raises(InputError, match=words) as caught:
        sent.inputs(served(Twice), value)
    assert caught.value.where == where


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254",
     "0.0.0.0", "100.64.0.1", "224.0.0.1", "::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::"],
)  # fmt: skip
def test_private_addresses_are_refused_in_every_notation(host: str) -> None:
    with pytest.raises(InputError, match="not a public one"):
        remote.public_address(host, 80)


@pytest.fixture
def elsewhere() -> Iterator[str]:
    """Return the origin of a server that gives "content" at /, leads /away and /file to others, and drips or ends early."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            away = {"/away": f"http://127.0.0.1:{self.server.server_port}/", "/file": "file:///etc/hostname"}
            if self.path in away:
                self.send_response(302)
                self.send_header("location", away[self.path])
            else:
                self.send_response(200)
            if self.path == "/early":
                self.send_header("content-length", "99")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(50 if self.path == "/drip" else 0):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
                self.wfile.write(b"content")

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://files.test:{server.server_port}"
        server.shutdown()


def test_files_come_from_allowed_places_alone(elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads to an address that counts as public; the numbers, where redirects lead, do not."""
    check = remote.public_address
    monkeypatch.setattr(
        remote, "public_address", lambda host, port: "127.0.0.1" if host == "files.test" else check(host, port)
    )
    inside = f"http://127.0.0.1:{elsewhere.rpartition(':')[2]}"
    assert remote.fetch(f"{elsewhere}/", [elsewhere], 100) == b"content"
    for url, origins, words in (
        (f"{elsewhere}/", [], "URLs are not fetched"),
        (f"{elsewhere}/", ["http://files.test"], "are not fetched"),
        (f"{elsewhere}/away", [elsewhere], "are not fetched"),
        (f"{elsewhere}/away", [elsewhere, inside], "not a public one"),
        (f"{elsewhere}/file", [elsewhere], "not a valid http or https URL"),
        (elsewhere.replace("//", "//user:word@"), [elsewhere], "not a valid"),
        (f"{elsewhere}/", [elsewhere], "larger than 3 bytes"),
        (f"{elsewhere}/early", [elsewhere], "92 bytes of the file are missing"),
        (f"{elsewhere}/drip", [elsewhere], "took more than 0.5 s"),
    ):
        monkeypatch.setattr(remote, "_WHOLE", 0.5 if "drip" in url else 20)
        with pytest.raises(InputError, match=words):
            remote.fetch(url, origins, 3 if "larger" in words else 100)


def test_a_name_that_leads_elsewhere_the_second_time_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the first answer of the name server is public, the next one is not."""
    answers = iter(["93.184.215.14", "127.0.0.1", "127.0.0.1"])
    reached: list[Any] = []

    def look_up(host: str, port: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    def connect(place: Any, timeout: float) -> Any:
        reached.append(place)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError, match="does not give the file"):
        remote.fetch("http://rebind.test/x", ["http://rebind.test"], 100)
    assert reached == [("93.184.215.14", 80)]


# -- connections ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(protocol: Any, **options: Any) -> Iterator[tuple[str, int]]:
    """Give the address of a server with few places and short times for bodies of 1,000 bytes."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body = str(len((await receive())["body"])).encode()
        if scope["path"] == "/large":
            body = b"x" * 2**25
        length = str(len(body)).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        await send({"type": "http.response.body", "body": body})

    limits = Settings(body=1000, body_timeout=0.5)
    none: Any = Pipelines([])
    guard = Guard(application, limits, Keys(), Metrics(none), Log(open("/dev/null", "w")))  # noqa: SIM115, PTH123
    config = uvicorn.Config(
        guard, port=0, http=protocol, lifespan="off", log_config=None, timeout_keep_alive=1, ws="none", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server._serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def bounded() -> Iterator[tuple[str, int]]:
    """Return the address of a server for 8 connections."""
    with running(bounded_protocol(8, 0.5)) as address:
        yield address


def spoken(address: tuple[str, int], *parts: bytes, pause: float = 0.2) -> bytes:
    """Send parts with pauses; return all that is answered until the connection ends."""
    answer = b""
    with socket.create_connection(address, timeout=5) as connection:
        for part in parts:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(part)
            time.sleep(pause if len(parts) > 1 else 0)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


HEAD = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"


def test_slow_and_large_requests_end(bounded: tuple[str, int]) -> None:
    assert spoken(bounded, HEAD + b"content-length: 3\r\n\r\nabc").endswith(b"\r\n\r\n3")
    began = time.monotonic()
    assert spoken(bounded, *([b"G"] + [b"E"] * 6)) == b""  # a head that never ends
    assert b" 408 " in spoken(bounded, HEAD + b"content-length: 900\r\n\r\n", *[b"x"] * 6)
    chunk = b"3e7\r\n" + b"x" * 999 + b"\r\n"
    assert b" 413 " in spoken(bounded, HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunk + chunk)
    assert b" 413 " in spoken(bounded, HEAD + b"content-length: 1001\r\n\r\n")
    assert b" 400 " in spoken(bounded, HEAD + b"content-length: 9" + b"9" * 30 + b"\r\n\r\n")
    assert b" 400 " in spoken(bounded, HEAD + b"content-length: -1\r\n\r\n")
    # A second request on an open connection has no more time for its head than the first.
    kept = HEAD.replace(b"close", b"keep-alive") + b"content-length: 0\r\n\r\n"
    assert spoken(bounded, kept, *[b"G"] * 6).count(b"200 OK") == 1
    assert time.monotonic() - began < 15


def test_who_reads_nothing_is_cut_off_and_who_reads_slowly_is_not(bounded: tuple[str, int]) -> None:
    ask = b"POST /large HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
    with socket.create_connection(bounded, timeout=10) as idle, socket.create_connection(bounded, timeout=10) as slow:
        for each in (idle, slow):
            each.sendall(ask)
        read = 0
        while read < 2**25 and (piece := slow.recv(2**20)):
            read += len(piece)
            time.sleep(0.05)  # more than three times 0.5 s, all in all
        assert read >= 2**25
        got = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := idle.recv(2**20):
                got += len(piece)
        assert got < 2**25


def test_connections_are_bounded_and_refused_politely() -> None:
    with running(bounded_protocol(8, 60)) as address:
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                stack.enter_context(socket.create_connection(address, timeout=20))
            refused = [spoken(address) for _ in range(50)]
        assert all(b" 503 " in answer and b"retry-after" in answer for answer in refused)
        answers = (spoken(address, HEAD + b"content-length: 1\r\n\r\nx") for _ in range(50))
        assert any(answer.endswith(b"\r\n\r\n1") for answer in answers)  # as soon as it has seen the others go


def test_handshakes_that_never_end_are_bounded(tmp_path: Path, self_signed: Any) -> None:
    """They come before the connection that is counted, and each takes 300 kB."""
    certificate, key = self_signed(tmp_path)
    context = ssl.create_default_context(cafile=certificate)
    with (
        running(bounded_protocol(8, 60), ssl_certfile=certificate, ssl_keyfile=key) as address,
        contextlib.ExitStack() as stack,
    ):
        first = stack.enter_context(socket.create_connection(address, timeout=10))
        first = stack.enter_context(context.wrap_socket(first, server_hostname="127.0.0.1"))
        silent = [stack.enter_context(socket.create_connection(address, timeout=10)) for _ in range(8 + 64 - 1)]
        for _ in range(5):
            with contextlib.suppress(ConnectionResetError):
                assert spoken(address) == b""  # at once, and not when a time is over
        for each in silent:
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(1)
        first.sendall(HEAD + b"content-length: 1\r\n\r\nx")
        assert b" 200 " in first.recv(1000)


# -- keys, memory, errors ---------------------------------------------------------------------------------------------


def test_keys_are_read_strictly_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    secret = "s3cret-s3cret-s3cret"
    for text in ("short", f"{secret}", f"one {secret} many", "one short-key"):
        file.write_text(f"# keys\n{text}\n")
        with pytest.raises(ConfigError, match="line 2") as caught:
            Keys.read(file)
        assert secret not in str(caught.value)
    file.write_text(f"one {secret} 1\n")
    monkeypatch.setenv(VARIABLE, f"{secret}-2, {secret}-3")
    keys = Keys.read(file)
    assert [keys.find(f"Bearer {secret}{end}") for end in ("", "-2", "-3")] == ["one", "environment-1", "environment-2"]
    for wrong in (None, "", "Bearer", f"Basic {secret}", f"Bearer {secret}-4", "Bearer \udcff"):
        with pytest.raises(HttpError, match="missing or wrong"):
            keys.find(wrong)
    with keys.hold("one"), pytest.raises(HttpError, match="1 requests at a time"), keys.hold("one"):
        pass
    with keys.hold("one"):
        pass


def test_pipelines_that_rest_are_released_by_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pipelines of 40 bytes and a limit of 100: the one that rested longest goes, never one in use."""
    loaded: list[str] = []

    class Pipeline:
        @classmethod
        def from_config(cls, config: Any, base: Path, **_: Any) -> Any:
            loaded.append(config.input["name"])
            return cls()

        def start_timings(self) -> None: ...

    monkeypatch.setattr(pipelines_module, "Pipeline", Pipeline)
    monkeypatch.setattr("ovforge.plan", lambda *_, **__: None)
    names = "abc"
    for name in names:
        (tmp_path / f"{name}.toml").write_text(f'task = "text-to-image"\nload = "x"\ninput = {{ name = "{name}" }}\n')
    said: list[str] = []
    every = Pipelines(
        [str(tmp_path / f"{name}.toml") for name in names], memory=100, say=lambda event, **facts: said.append(event)
    )

    monkeypatch.setattr(
        pipelines_module, "resident_memory", lambda: 40 * sum(each.pipeline is not None for each in every.values())
    )
    for name in "abab":
        with every.use(every[name]):
            pass
    with every.use(every["a"]), every.use(every["c"]):
        assert [name for name in names if every[name].pipeline] == ["a", "c"]
        with every.use(every["b"]):
            assert all(every[name].pipeline for name in names)
    assert loaded == ["a", "b", "c", "b"]
    assert said.count("released") == 1


def test_what_cannot_be_loaded_is_told_to_the_log_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.toml").write_text('task = "text-to-image"\nload = "gone"\n')
    monkeypatch.setattr("ovforge.plan", lambda *_, **__: None)
    said: list[dict[str, Any]] = []
    every = Pipelines([str(tmp_path / "x.toml")], say=lambda event, **facts: said.append(facts))
    with pytest.raises(HttpError, match="x cannot be loaded") as caught, every.use(every["x"]):
        pass
    assert caught.value.status == 503
    assert "gone" not in str(caught.value)
    assert "gone" in said[0]["error"]


@pytest.mark.parametrize("width", [1, 3])
def test_as_many_calls_run_at_a_time_as_the_task_allows_in_order(width: int) -> None:
    """Eight requests for one pipeline and a queue of four: who waits is served in order, one more is refused."""
    running, most, order = 0, 0, list[int]()
    lock, go = threading.Lock(), threading.Event()

    class Connected:
        async def receive(self) -> Any:
            await asyncio.sleep(60)

    async def ask_all() -> list[Any]:
        served = Served(name="x", config=None, base=Path(), task=None, width=width, content=object())  # type: ignore[arg-type]
        every: Any = Pipelines([])
        every._served["x"] = served
        queue = Queue(every, Settings(queue=4, timeout=60), Metrics(every))

        def call(number: int) -> Any:
            def work(content: Any, stop: Stop) -> int:
                nonlocal running, most
                with lock:
                    running += 1
                    most = max(most, running)
                    order.append(number)
                assert go.wait(60)
                with lock:
                    running -= 1
                return number

            return work

        asks = []
        for number in range(4 + width + 1):
            asks.append(asyncio.create_task(queue.run(Connected(), served, call(number))))  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
        while len(order) < width:
            await asyncio.sleep(0.01)
        go.set()
        return await asyncio.gather(*asks, return_exceptions=True)

    *answered, refused = asyncio.run(ask_all())
    assert answered == list(range(4 + width))
    assert most == width
    if width == 1:
        assert order == answered
    assert isinstance(refused, HttpError)
    assert refused.status == 429


def test_errors_say_no_more_than_they_should() -> None:
    """What the server itself fails at is not shown to clients, and is in the log with its traceback."""
    written = json.loads('{"lines": []}')["lines"]

    class Lines:
        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None: ...

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("/home/somebody/secret")

    async def ask() -> list[Any]:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        guard = Guard(broken, Settings(), Keys(), Metrics(Pipelines([])), Log(Lines()))  # type: ignore[arg-type]
        await guard({"type": "http", "method": "GET", "path": "/\x1b[31m\n", "headers": []}, receive, send)
        return sent

    start, body = asyncio.run(ask())
    assert start["status"] == 500
    assert b"secret" not in body["body"]
    line = "".join(written)
    assert "RuntimeError: /home/somebody/secret" in json.loads(line)["error"]
    assert line.count("\n") == 1
    assert line.isascii()
    assert "\x1b" not in line


def test_names_and_hosts_are_checked(tmp_path: Path) -> None:
    from ovforge_serve.command import serve

    for place in ("a b.toml", "../x=y.toml", "=x.toml", "a/b=c.toml"):
        with pytest.raises(OvforgeError, match="not a valid name"):
            Pipelines([place])
    with pytest.raises(ConfigError, match="no API keys"):
        serve(["x.toml"], host="0.0.0.0")
    with pytest.raises(ConfigError, match="TLS needs both"):
        serve(["x.toml"], certificate=tmp_path)
    for options in ({"cors": ["*"]}, {"allow_url": ["file:///"]}):
        with pytest.raises(InputError, match="not a valid http or https URL") as caught:
            serve(["x.xml"], **options)  # type: ignore[arg-type]
        assert caught.value.where in ("--cors", "--allow-url")


def test_where_it_cannot_listen_is_said(tmp_path: Path) -> None:
    server: Any = Serving(places=[]).server(Log(open("/dev/null", "w")))  # noqa: SIM115, PTH123
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, number, words in (("127.0.0.1", port, "in use"), ("192.0.2.1", 0, "cannot listen there: "), ("::::", 0, "cannot listen there: ")):  # fmt: skip
            with pytest.raises(ConfigError, match=words) as caught:
                listen(server, Address(host, number))
            assert caught.value.where == f"{host}:{number}"
    (tmp_path / "x.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match="certificate and its key cannot be used"):
        listen(server, Address("127.0.0.1", 0, tmp_path / "x.pem", tmp_path / "x.pem"))


def test_an_answer_does_not_wait_for_the_clients_confirmation() -> None:
    with (
        _listening(Address("127.0.0.1", 0)) as listening,
        socket.create_connection(listening.getsockname()[:2]),
        listening.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_libraries_say_is_json_too() -> None:
    program = """
import logging, warnings
from ovforge_serve.log import Log
Log().take_others()
logging.getLogger("some.library").info("nothing of interest")
warnings.warn("old\\nfile")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("asyncio").exception("never %s", "retrieved")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    warning, error = (json.loads(line) for line in done.stderr.splitlines())
    assert (warning["event"], warning["message"]) == ("warning", "old\nfile")
    assert (error["event"], error["source"], error["message"]) == ("error", "asyncio", "never retrieved")
    assert "ZeroDivisionError" in error["error"]
