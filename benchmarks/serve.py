"""What a server costs: 1,000 requests of 32 clients, and the same runs without a server, in turns.

    python benchmarks/serve.py [--requests 1000] [--clients 32] [--config examples/unicorn.toml]

Starts `ovforge serve` with a config of text-to-image in a process of its own, and loads the same config here. Says how
many requests were answered and how many refused with 429, the latency's percentiles, memory before and after, the
throughput of the server over that of the pipeline called directly (each picture encoded as PNG), and how long one
request alone takes beyond the run that it holds and the encoding of its PNG: connection, checks, threads, JSON. Direct
and served runs take turns, so that other work on the machine meets both.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from pydantic import BaseModel, ConfigDict

import ovforge
from ovforge import testing
from ovforge.contracts import TaskExtension
from ovforge.store import scratch_folder

ROUNDS, RUNS = 5, 10
INSTANT = 400
"""Requests to the task that computes nothing."""


class Nothing(BaseModel):
    """What the task that computes nothing takes."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    seed: int = 0


class Instant:
    """Gives the same picture each time."""

    def __init__(self, options: object, context: object) -> None:
        with Image.open(Path(__file__).parents[1] / "docs" / "images" / "unicorn.png") as picture:
            self._picture = picture.convert("RGB")

    def __call__(self, inputs: Nothing, progress: object) -> ovforge.ImagesResult:
        """Return it."""
        return ovforge.ImagesResult(images=[self._picture], seeds=[inputs.seed])


@ovforge.hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    """Yield the task that computes nothing."""
    yield TaskExtension(
        name="instant", summary="Nothing", inputs=Nothing, roles=(), factory=Instant, result=ovforge.ImagesResult
    )


def with_instant() -> ovforge.Plugins:
    """Return plugins with that task among them."""
    plugins = ovforge.Plugins()
    plugins.register(sys.modules[__name__], "instant")
    return plugins


def serve_instant(config: Path) -> None:
    """Serve a config of that task."""
    from ovforge_serve.keys import Keys
    from ovforge_serve.log import Log
    from ovforge_serve.pipelines import Pipelines
    from ovforge_serve.run import Address, listen
    from ovforge_serve.server import Server
    from ovforge_serve.settings import Settings

    pipelines = Pipelines([str(config)], cache=None, plugins=with_instant())
    listen(Server(pipelines, Settings(), Keys(), Log()), Address("127.0.0.1", 0), preload=True)


def instant(folder: Path) -> dict[str, float]:
    """Return what requests of the task that computes nothing cost, in milliseconds."""
    testing.small_bundle().save(folder / "model")
    config = folder / "instant.toml"
    config.write_text('task = "instant"\nload = "model"\n', encoding="utf-8")
    pipeline = ovforge.load(config, plugins=with_instant(), cache=None)
    command = [sys.executable, __file__, "--serve-instant", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            client = Client(process.stdout.readline().strip(), "/v1/pipelines/instant/run")
            server = psutil.Process(process.pid)
            for seed in range(20):
                client(seed), direct(pipeline, seed)
            before, pairs = sum(server.cpu_times()[:2]), []
            for seed in range(INSTANT):
                pairs.append((client(seed)[1], direct(pipeline, seed)))
            worked = (sum(server.cpu_times()[:2]) - before) / INSTANT
        finally:
            process.terminate()
    requests, calls = zip(*pairs, strict=True)
    return {
        "request_ms": 1e3 * statistics.median(requests), "call_ms": 1e3 * statistics.median(calls),
        "overhead_ms": 1e3 * statistics.median(request - call for request, call in pairs),
        "overhead_undisturbed_ms": 1e3 * (min(requests) - min(calls)), "server_processor_ms": 1e3 * worked,
    }  # fmt: skip


class Client:
    """One connection to the server."""

    def __init__(self, url: str, path: str) -> None:
        self._host, self._path = url.removeprefix("http://"), path
        self._connection = http.client.HTTPConnection(self._host, timeout=600)

    def __call__(self, seed: int) -> tuple[int, float, float]:
        """Return the status of one request, its seconds, and those of them that the pipeline ran."""
        began = time.perf_counter()
        body = json.dumps({"prompt": "a pink unicorn", "seed": seed})
        self._connection.request("POST", self._path, body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        content = answer.read()
        seconds = time.perf_counter() - began
        return answer.status, seconds, json.loads(content)["seconds"] if answer.status == 200 else 0.0


def direct(pipeline: Any, seed: int) -> float:
    """Return the seconds of one run without a server, its picture encoded as the server does."""
    began = time.perf_counter()
    list(pipeline("a pink unicorn", seed=seed).files(Path("result.png"), quick=True))
    return time.perf_counter() - began


def measure(config: Path, requests: int, clients: int) -> dict[str, Any]:
    """Return all figures."""
    command = [sys.executable, "-m", "ovforge", "serve", str(config), "-p", "0", "--preload", "--trust"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            url, path = process.stdout.readline().strip(), f"/v1/pipelines/{config.stem}/run"
            pipeline, client = ovforge.load(config), Client(url, path)
            client(0), direct(pipeline, 0)
            server = psutil.Process(process.pid)
            report: dict[str, Any] = {"alone": alone(pipeline, client), "throughput": together(pipeline, url, path)}
            memory = [server.memory_info().rss]
            statuses: Counter[int] = Counter()
            seconds = []
            with ThreadPoolExecutor(clients) as threads:
                workers = [Client(url, path) for _ in range(clients)]
                parts = [range(n, requests, clients) for n in range(clients)]
                for part in threads.map(
                    lambda pair: [pair[0](seed) for seed in pair[1]], zip(workers, parts, strict=True)
                ):
                    for status, took, _ in part:
                        statuses[status] += 1
                        seconds.append(took)
            memory.append(server.memory_info().rss)
            cuts = statistics.quantiles(seconds, n=100)
            return report | {
                "statuses": dict(statuses),
                "latency": {"p50": cuts[49], "p99": cuts[98]},
                "memory_mb": [round(each / 1e6, 1) for each in memory],
            }
        finally:
            process.terminate()


def alone(pipeline: Any, client: Client) -> dict[str, float]:
    """Return medians of one request at a time, of the run in it, of encoding a PNG, and of the rest, in seconds."""
    made, encodings = pipeline("a pink unicorn", seed=0), []
    pairs = []
    for seed in range(ROUNDS * RUNS):
        pairs.append(client(seed)[1:])
        began = time.perf_counter()
        list(made.files(Path("result.png"), quick=True))
        encodings.append(time.perf_counter() - began)
    request, run = (statistics.median(column) for column in zip(*pairs, strict=True))
    encoding = statistics.median(encodings)
    beyond = statistics.median(request - run for request, run in pairs) - encoding
    return {"request": request, "run": run, "encoding": encoding, "overhead": beyond}


def together(pipeline: Any, url: str, path: str) -> dict[str, float]:
    """Return runs a second without a server and by four clients of one, medians of rounds in turn, and their ratio."""
    rates = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for seed in range(RUNS):
            direct(pipeline, seed)
        middle = time.perf_counter()
        with ThreadPoolExecutor(4) as threads:
            list(
                threads.map(
                    lambda client: [client(seed) for seed in range(RUNS // 2)], [Client(url, path) for _ in range(4)]
                )
            )
        rates.append((RUNS / (middle - began), 4 * (RUNS // 2) / (time.perf_counter() - middle)))
    ours = [served / called for called, served in rates]
    call, served = (statistics.median(column) for column in zip(*rates, strict=True))
    return {"direct": call, "served": served, "ratio": statistics.median(ours)}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "examples" / "unicorn.toml")
    parser.add_argument("--serve-instant", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve_instant:
        serve_instant(asked.serve_instant)
        return
    with scratch_folder() as folder:
        report: dict[str, Any] = {"load": os.getloadavg()[0], "instant": instant(folder)}
    print(json.dumps(report | measure(asked.config, asked.requests, asked.clients), indent=2))


if __name__ == "__main__":
    main()
