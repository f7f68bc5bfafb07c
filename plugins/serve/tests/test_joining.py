"""Requests that run as one: each gets what it gets alone, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ovforge
from ovforge import Result, Stop
from ovforge.errors import InputError
from ovforge.model import package_path
from ovforge_serve.joining import Joinable
from ovforge_serve.metrics import Metrics
from ovforge_serve.pipelines import Pipelines, Served
from ovforge_serve.queue import Queue
from ovforge_serve.settings import HttpError, Settings


def told(result: Result) -> dict[str, Any]:
    """Return what a result says of how it was made."""
    return {**result.provenance, "warnings": result.warnings}


def test_pictures_of_one_batch_are_those_that_each_call_gives_alone(configs: dict[str, Path]) -> None:
    pipeline = ovforge.load(configs["lcm"])
    calls: list[dict[str, Any]] = [
        {"prompt": "a pink unicorn", "seed": 5},
        {"prompt": ["a red car", "a fish"], "seed": [7, 9], "count": 1},
        {"prompt": "a house", "count": 2, "seed": 3},
    ]
    assert len({pipeline.batch_key(call) for call in calls}) == 1
    assert pipeline.batch_key({**calls[0], "steps": 3}) != pipeline.batch_key(calls[0])
    assert pipeline.batch_key({**calls[0], "latents": np.zeros(1)}) is None
    joined: list[Any] = pipeline.together(calls)
    for call, mine in zip(calls, joined, strict=True):
        alone: Any = pipeline(**call)
        assert told(mine) == told(alone)
        assert list(mine.seeds) == list(alone.seeds)
        assert mine.latents.shape == alone.latents.shape
        for ours, theirs in zip(mine.images, alone.images, strict=True):
            assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2  # a batch rounds otherwise
    # A warning names words of a prompt: it is not for the others.
    long = {"prompt": "horse " * 100, "seed": 1}
    warned, other = pipeline.together([long, calls[0]])
    assert warned.warnings == pipeline(**long).warnings != []
    assert other.warnings == []


def test_boxes_of_one_batch_are_those_that_each_call_gives_alone() -> None:
    task = ovforge.Use("detect", batch=4)
    pipeline = ovforge.Pipeline(
        task, source="package:ovforge_grounding_dino/model", device=ovforge.Use("cpu", precision="f32")
    )
    scene = package_path("package:ovforge_grounding_dino/demo/scene.jpg")
    with Image.open(scene) as opened:
        turned = opened.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    calls = [{"image": each, "text": "horse. car."} for each in (scene, [turned, scene], turned)]
    assert len({pipeline.batch_key(call) for call in calls}) == 1
    assert pipeline.batch_key({**calls[0], "text": "tree."}) != pipeline.batch_key(calls[0])
    assert pipeline.batch_key({"image": scene.parent, "text": "horse."}) is None
    for call, mine in zip(calls, pipeline.together(calls), strict=True):
        alone: Any = pipeline(**call)
        ours: Any = mine
        assert told(ours) == told(alone)
        assert [each.labels for each in ours.detections] == [each.labels for each in alone.detections]
        for one, other in zip(ours.detections, alone.detections, strict=True):
            np.testing.assert_allclose(one.boxes, other.boxes, atol=0.05)
            np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)


class Doubler:
    """A pipeline that doubles numbers, joins those of one sign, and fails at 13."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.go = threading.Event()

    def batch_key(self, inputs: Mapping[str, Any]) -> Any:
        return None if inputs["x"] == 0 else inputs["x"] > 0

    def together(self, calls: Sequence[Mapping[str, Any]], progress: Any) -> list[Any]:
        self.runs.append([call["x"] for call in calls])
        if 13 in self.runs[-1]:
            raise InputError("13")
        return [2 * call["x"] for call in calls]

    def __call__(self, x: int, progress: Any) -> Any:
        self.runs.append([x])
        assert self.go.wait(20)
        if x == 13:
            raise InputError("13")
        return 2 * x


class Client:
    """A connection that lasts until `left`."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}


def queue_of(pipeline: Doubler) -> tuple[Queue, Served, Metrics]:
    served = Served(name="x", config=None, base=Path(), task=None, content=pipeline)  # type: ignore[arg-type]
    every: Any = Pipelines([])
    every._served["x"] = served
    metrics = Metrics(every)
    return Queue(every, Settings(batch=3, timeout=20), metrics), served, metrics


def test_what_waits_runs_together_and_fails_alone() -> None:
    pipeline = Doubler()

    async def ask_all() -> list[Any]:
        queue, served, metrics = queue_of(pipeline)
        asks, clients = [], []
        for x in (0, 1, 2, -1, 3, 4, 5, 13, 0):
            clients.append(Client())
            ask: Any = queue.join(clients[-1], served, {"x": x}, lambda result: result)  # type: ignore[arg-type]
            asks.append(asyncio.create_task(ask))
            await asyncio.sleep(0.01)
        clients[4].left.set()  # the one that asked for 3
        await asyncio.sleep(0.05)
        pipeline.go.set()
        answers = await asyncio.gather(*asks, return_exceptions=True)
        assert not any(waiting._calls for waiting in queue._joinable.values())
        assert (metrics.joined._value.get(), queue._waiting) == (3, 0)
        await asyncio.sleep(0.05)  # turns that others took are given back
        assert not queue._turns["x"].locked()
        return answers

    answers = asyncio.run(ask_all())
    assert [answer for answer in answers if isinstance(answer, int)] == [0, 2, 4, -2, 8, 10, 0]
    assert getattr(answers[4], "status", None) == 499
    assert isinstance(answers[7], InputError)
    # 0 was running; then three of one sign, then what waited longest; 13 spoils a batch, and only itself.
    assert pipeline.runs == [[0], [1, 2, 4], [-1], [5, 13], [5], [13], [0]]


def test_nobody_complains_of_a_call_that_failed_when_its_client_had_left() -> None:
    """asyncio writes of exceptions that nobody looked at when it forgets them."""
    pipeline, complaints = Doubler(), []

    async def leave() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        queue, served, _ = queue_of(pipeline)
        client = Client()
        ask: Any = queue.join(client, served, {"x": 13}, lambda result: result)  # type: ignore[arg-type]
        call = asyncio.create_task(ask)
        while not pipeline.runs:
            await asyncio.sleep(0.01)
        client.left.set()
        with pytest.raises(HttpError):
            await call
        pipeline.go.set()
        while queue._turns["x"].locked():
            await asyncio.sleep(0.01)

    asyncio.run(leave())
    gc.collect()
    assert complaints == []


def test_nobody_can_cancel_what_others_wait_for() -> None:
    call = Joinable({}, Stop(), lambda result: result)
    assert not call.done.cancel()
    call.finish(lambda: Result())
    assert isinstance(call.done.result(), Result)


def test_a_server_runs_what_waits_together(start: Callable[..., Any], configs: dict[str, Path]) -> None:
    server = start(configs["lcm"], "--batch", "4", "--preload")

    def ask(seed: int) -> Any:
        with server.client() as client:
            return (
                client.post("/v1/pipelines/lcm/run", json={"prompt": "a fish", "seed": seed}).raise_for_status().json()
            )

    with ThreadPoolExecutor(6) as threads, server.client() as client:
        answers = list(threads.map(ask, range(6)))
        alone = [ask(seed) for seed in range(6)]
        joined = [line for line in client.get("/metrics").text.splitlines() if line.startswith("ovforge_joined_total")]
    assert float(joined[0].split()[1]) >= 2
    for mine, own in zip(answers, alone, strict=True):
        ours, theirs = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(each["files"][0]["base64"]))), int)
            for each in (mine, own)
        )
        assert np.abs(ours - theirs).max() <= 2
        assert mine["provenance"]["inputs"] == own["provenance"]["inputs"]
