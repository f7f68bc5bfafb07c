"""What the page refuses: other hosts' pages, files that it did not get, bodies that are too large; and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from PIL import Image

import ovforge
from ovforge import Stop
from ovforge.errors import Cancelled, InputError, OvforgeError
from ovforge_ui.hosts import Asked, Run


@pytest.fixture
def client(running: Any) -> Any:
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as client:
        yield client


def test_pages_and_names_of_others_are_refused(client: Any) -> None:
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/config", headers={"origin": "http://evil.example"}).status_code == 403
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "http" not in policy.replace("https:", ""), "nothing is loaded from another host"


@pytest.mark.parametrize("path", ["/etc/hostname", "constraints.txt", __file__, "../../../../etc/hostname"])
def test_no_other_file_is_given(client: Any, path: str) -> None:
    for route in (f"/gradio_api/file={path}", f"/file={path}", f"/gradio_api/file/{path}"):
        answer = client.get(route)
        assert answer.status_code >= 400 and b"root" not in answer.content[:100]


def test_uploads_are_bounded(client: Any) -> None:
    small = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 1000)})
    assert small.status_code == 200 and Path(small.json()[0]).read_bytes() == b"x" * 1000
    assert client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 5 * 2**20)}).status_code == 413


def test_a_forged_request_reads_no_file(client: Any, running: Any, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "secret.png")
    config = client.get("/config").json()
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    event = next(
        each for each in config["dependencies"] if [ids["p1-run"], "click"] in [list(t) for t in each["targets"]]
    )
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    data = [values.get(number) for number in event["inputs"]]
    data[event["inputs"].index(ids["p1-image"])] = {
        "path": str(tmp_path / "secret.png"), "meta": {"_type": "gradio.FileData"},
    }  # fmt: skip
    body = {"data": data, "fn_index": event["id"], "session_hash": "forged", "trigger_id": ids["p1-run"]}
    joined = client.post("/gradio_api/queue/join", json=body)
    answer = joined.text
    if joined.status_code == 200:
        with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": "forged"}) as stream:
            for line in stream.iter_lines():
                answer += line
                if "process_completed" in line:
                    break
    assert "Done in" not in answer
    assert not list((running.folder / "made").glob("*")) or "secret" not in answer


def test_a_host_takes_uploads_only(running: Any, tmp_path: Path) -> None:
    host = running.hosts["paint"]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    inputs = {"image": str(tmp_path / "a.png"), "mask": str(tmp_path / "a.png")}
    with pytest.raises(InputError, match="names a file of this machine"):
        host.call(Asked(inputs), Stop(), running.folder, lambda result: result)
    assert host.call(Asked(inputs), Stop(), tmp_path, lambda result: result).images


def test_one_page_waits_for_another_and_may_leave(running: Any) -> None:
    host = running.hosts["draw"]
    slow = Run(lambda stop: host.call(Asked({"prompt": "slow", "steps": 100_000}), stop, running.folder, id))
    moments = iter(slow)
    next(moments)
    waiting = Run(lambda stop: host.call(Asked({"prompt": "x"}), stop, running.folder, id))
    waiting.stop.ask()
    list(waiting)
    assert isinstance(waiting.error, Cancelled), "it left the queue"
    slow.stop.ask()
    list(moments)
    assert isinstance(slow.error, Cancelled)
    after = Run(lambda stop: host.call(Asked({"prompt": "x"}), stop, running.folder, lambda result: len(result.images)))
    list(after)
    assert after.result == 1 and after.error is None


def test_a_fault_of_ours_is_no_traceback_in_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    def work(stop: Stop) -> None:
        raise ZeroDivisionError("secret of the machine")

    run = Run(work)
    list(run)
    assert isinstance(run.error, OvforgeError) and "secret" not in str(run.error)
    assert "secret of the machine" in capsys.readouterr().err


def test_the_command_listens_and_leaves_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OVFORGE_CACHE_DIR": str(tmp_path / "cache")}
    demo = Path(ovforge.__path__[0]).parents[1] / "plugins" / "ui" / "src" / "ovforge_ui" / "demo"
    command = [sys.executable, "-m", "ovforge", "ui", f"boxes={demo / '4-detect.toml'}", "-p", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        page = httpx.get(f"{url}/config", trust_env=False, timeout=60).json()
        assert "boxes" in json.dumps(page)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
    finally:
        watchdog.cancel()
        process.kill()
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "everybody who reaches it"),
        (["a=x.toml", "a=y.toml"], "two are called 'a'"),
        (["missing.toml"], "no such file"),
        (["--password", "missing.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_opened_is_said(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ovforge.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ovforge", "ui", *arguments])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
