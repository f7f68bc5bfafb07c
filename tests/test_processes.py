"""Threads, forks, and what a process of ours does behind the user's back."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

import ovforge
from ovforge import hookimpl, testing
from ovforge.contracts.extensions import TaskExtension
from ovforge.errors import DeviceError, InputError
from ovforge.model import regions, runtime
from ovforge.model.results import Result
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins


class Inputs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    x: float = 1.0


class Sum(Result):
    value: float = 0.0


class OneRequest:
    """A task as most are written: one request for all calls, and a state between its two halves."""

    def __init__(self, options: Any, context: Any) -> None:
        self._request = context.bundle["model"].create_infer_request()
        self._last = 0.0
        self.most, self._inside = 0, 0

    def __call__(self, inputs: Inputs, progress: Any) -> Sum:
        self._inside += 1
        self.most = max(self.most, self._inside)
        self._request.start_async([np.full((1, 4), inputs.x, np.float32)])
        self._last = inputs.x
        time.sleep(0.005)
        self._request.wait()
        progress(None)
        result = Sum()
        result.value = float(self._request.results[0].sum()) + self._last
        self._inside -= 1
        return result


@pytest.fixture
def pipe(tmp_path: Path) -> ovforge.Pipeline:
    testing.small_bundle().save(tmp_path / "model")
    module = types.ModuleType("one_request")

    @hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        yield TaskExtension(name="one", summary="One request", factory=OneRequest, inputs=Inputs, roles=("model",))

    module.ovforge_tasks = ovforge_tasks  # type: ignore[attr-defined]
    plugins = Plugins(Registry({}), found=())
    plugins.register(module, "one-request")
    return ovforge.Pipeline("one", source=tmp_path / "model", plugins=plugins, cache=None)


def test_threads_are_served_one_at_a_time(pipe: ovforge.Pipeline) -> None:
    alone = [pipe(float(number)).value for number in range(12)]  # type: ignore[attr-defined]
    found: dict[int, float] = {}

    def call(number: int) -> None:
        found[number] = pipe(float(number)).value  # type: ignore[attr-defined]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(12)] == alone
    assert pipe.task.most == 1  # type: ignore[attr-defined]


def test_a_call_within_a_call_is_refused_at_once(pipe: ovforge.Pipeline) -> None:
    with pytest.raises(InputError, match="calls the same pipeline"):
        pipe(1.0, progress=lambda moment: pipe(2.0))
    assert pipe(1.0), "a failed call gives its turn back"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_fork_is_refused_at_once(pipe: ovforge.Pipeline) -> None:
    pipe(1.0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            refused = 0
            for attempt in (lambda: pipe(1.0), lambda: testing.run(testing.small_model(), {"x": np.zeros((1, 4))})):
                try:
                    attempt()
                except DeviceError as error:
                    refused += "spawn" in str(error)
            code = 0 if refused == 2 else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0), "the child hung, or was not refused"
    assert pipe(1.0), "the parent goes on"


def test_nothing_is_told_to_anybody(tmp_path: Path) -> None:
    """No socket and no file below HOME, when everything that has telemetry is imported."""
    code = """
import sys, os
home = os.environ["HOME"]
seen = []
def watch(event, arguments):
    if event.startswith("socket.") or (event == "open" and str(arguments[0]).startswith(home)) or event == "os.mkdir":
        seen.append((event, str(arguments[:1])))
sys.addaudithook(watch)
import ovforge
import openvino, openvino.tools.ovc
try:
    import nncf
except ImportError:
    pass
assert not seen, seen
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    environment.pop("OVFORGE_TELEMETRY", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not regions.are_bound(), reason="memory is not bound here, or bound to one of several nodes")
def test_memory_that_the_runtime_bound_does_not_stay_in_pieces() -> None:
    """OpenVINO binds each constant of a model that runs; after 65,530 pieces a process gets no more memory."""
    import mmap

    page, pieces = mmap.PAGESIZE, 1000
    memory = mmap.mmap(-1, 2 * pieces * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def count() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    node, bind = ctypes.byref(ctypes.c_ulong(1)), 2
    for piece in range(pieces):
        regions.mbind(address + 2 * piece * page, page, bind, node, 64)
    before = count()
    if before < 2 * pieces:
        pytest.skip("the system forbids to bind memory")
    for _ in range(runtime.USES_BETWEEN_MERGES):
        runtime.core()
    assert count() < before - 1.9 * pieces


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells which files are open")
def test_a_mapped_file_is_not_an_open_one(tmp_path: Path) -> None:
    """A server with a model for each of a thousand sizes would meet the limit of open files."""
    (tmp_path / "model").write_bytes(bytes(range(256)) * 64)
    file = regions.MappedFile(tmp_path / "model")
    assert not [link for link in Path("/proc/self/fd").iterdir() if os.path.realpath(link) == str(tmp_path / "model")]
    assert str(tmp_path / "model") in Path("/proc/self/maps").read_text()
    file.bytes[5] = 1
    assert (file.bytes[5], file.bytes[6]) == (1, 6)
    assert (tmp_path / "model").read_bytes()[5] == 5
    file.forget()
    assert bytes(file.bytes) == bytes(range(256)) * 64
    with pytest.raises(FileNotFoundError, match="missing"):
        regions.MappedFile(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells which cores a thread may use")
def test_no_thread_of_the_runtime_is_kept_on_one_core() -> None:
    """Some stayed there when others were to run: two threads shared a core while another one was idle.

    In a process of its own, because others' Cores, as a test may make them, pin the threads that stay with them.
    """
    code = """
import contextlib, os
from pathlib import Path
import numpy as np
import openvino as ov
from openvino import opset13 as ops
from ovforge.model import runtime

x = node = ops.parameter([512, 512], np.float32)
for _ in range(40):
    node = ops.matmul(node, ops.constant(np.eye(512, dtype=np.float32)), False, False)
compiled = runtime.core().compile_model(ov.Model([node], [x], "long"), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
request, seen = compiled.create_infer_request(), set()
for _ in range(3):
    request.start_async([np.ones((512, 512), np.float32)])
    while not request.wait_for(0):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                seen.add(frozenset(os.sched_getaffinity(int(thread.name))))
assert seen == {frozenset(os.sched_getaffinity(0))}, seen
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
