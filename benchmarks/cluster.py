"""What a cluster of 10, 100, 1,000 machines does and costs, and where it saturates: one node measured, many simulated.

    python benchmarks/cluster.py [--nodes 10 100 1000] [--cores 16] [--price 0.68] [--items 1000000] [--ray]

Measured here, in seconds of processor time, so that other work on this machine does not count: one item of the embedded
model on one core; what the batch's own process does for an item (reading it, handing it out, writing the result's file
and its record), and with --ray the call of an actor. From the wall clock: a process's start, until it has loaded a
pipeline that is compiled in the cache. Then the queue is simulated, event by event.

Assumptions. A node has `--cores` cores and one process for each (`cpus=1`, `device.threads=1`); cores do not slow each
other down. Service times vary as measured. The process that runs the batch does its part for one item at a time, and
its network carries `--network` bits a second; with results behind a URL the object store takes whatever comes. It
gives each process an item ahead. Nodes fail once in `--failure` hours, and lose what they had in work. Requests to a
server come at random (Poisson), wait at one proxy, which works `--proxy` seconds for each, and go to the first replica
that is free. Nothing else is shared.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ovforge
from ovforge.config import PipelineConfig
from ovforge.store import run_python, scratch_folder
from ovforge_batch.crew import Crew
from ovforge_batch.engine import Order
from ovforge_batch.items import read_items
from ovforge_batch.manifest import Manifest

CONFIG = """task = "text-to-image"
load = "package:ovforge_lcm/model"
[scheduler]
use = "lcm"
[device]
threads = 1
precision = "f32"
[input]
steps = 4
"""
CALLS, BOOKED = 20, 2000
PER_PROCESS = 12
"""Items of a simulated batch for each process: enough to fill the queue."""


@dataclass(frozen=True)
class Node:
    """What was measured: seconds of one item (one for each call), of the batch's process for one, of a start; bytes."""

    seconds: list[float]
    booking: float
    start: float
    size: int


class Instant:
    """An engine whose processes answer at once with `content`: what is left is the batch's own work."""

    workers, here = 32, False

    def __init__(self, content: bytes) -> None:
        self.content, self.dead = content, False

    def start(self, order: Mapping[str, Any], stopped: Callable[[], bool]) -> Instant:
        return Instant(self.content)

    def ask(self, item: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"files": [item["file"]], "seconds": 0.0, "warnings": [], "content": {item["file"]: self.content}}

    def end(self) -> None: ...


def measure(folder: Path, with_ray: bool) -> Node:
    """Measure one process of the embedded model, and the batch's own."""
    config = folder / "config.toml"
    config.write_text(CONFIG)
    pipeline: Any = ovforge.load(config)
    pipeline("a cat", seed=0)
    seconds = []
    for seed in range(CALLS):
        before = time.process_time()
        result = pipeline("a cat", seed=seed)
        (file,) = result.save(folder / "cat.png")
        seconds.append(time.process_time() - before)
    load = f"import ovforge; ovforge.load({str(config)!r}).start_timings()"
    before = time.perf_counter()
    run_python(["-c", load])
    start = time.perf_counter() - before
    booking = book(folder, PipelineConfig.read(config), file.read_bytes()) + (call_of_actor() if with_ray else 0)
    return Node(seconds, booking, start, file.stat().st_size)


def book(folder: Path, config: PipelineConfig, content: bytes) -> float:
    """Return the processor time that a batch's own process takes for one item."""
    items, output = folder / "items.jsonl", folder / "out"
    items.write_text("".join(json.dumps({"id": f"n{n}", "prompt": "a cat"}) + "\n" for n in range(BOOKED)))
    engine, order = Instant(content), Order(config, "config.toml", folder, output)

    def told(item: Any) -> dict[str, Any]:
        return {"inputs": item.inputs, "seed": 0, "file": f"{item.id}.png"}

    before = time.process_time()
    with Manifest(output, {"batch": 1}) as manifest, Crew(engine, order, engine.workers, 0, told) as crew:
        for outcomes in crew.run(read_items(items)):
            manifest.add(*({"id": one.item.id, "status": "done", "digest": one.item.digest} for one in outcomes))
    return (time.process_time() - before) / BOOKED


def call_of_actor() -> float:
    """Return the processor time that this process takes for one call of a Ray actor."""
    from ovforge_ray.engine import connected

    with connected("local") as ray:
        actor = ray.remote(Instant).remote(b"")
        ray.get(actor.ask.remote({"file": "x"}))
        before = time.process_time()
        for _ in range(BOOKED):
            ray.get(actor.ask.remote({"file": "x"}))
        return (time.process_time() - before) / BOOKED


def batch(node: Node, processes: int, network: float | None, failure: float, seed: int = 0) -> float:
    """Simulate a batch; return items a second once all processes work.

    `network` is bytes a second of the batch's own machine, None if results go to a URL; `failure` is the chance that an
    item is lost with its node.
    """
    rng = random.Random(seed)
    busy = node.booking + (node.size / network if network else 0)  # of the batch's process, for one item
    total = processes * PER_PROCESS
    ends = [(rng.choice(node.seconds) * rng.random(), process) for process in range(processes)]  # already at work
    heapq.heapify(ends)
    given, done, free, times = processes, 0, 0.0, []
    ahead: list[float] = [0.0] * processes
    while done < total:
        now, process = heapq.heappop(ends)
        lost = rng.random() < failure
        if not lost:
            free = max(free, now) + busy  # the batch's process takes one result after another
            done += 1
            times.append(free)
        # The next item lies ready since the one before it was booked, unless the batch's process is behind.
        begin = max(now + (node.start if lost else 0), ahead[process])
        ahead[process] = free
        given += 1
        heapq.heappush(ends, (begin + rng.choice(node.seconds), process))
    # The middle half: neither filling nor emptying.
    first, last = len(times) // 4, 3 * len(times) // 4
    return (last - first) / (times[last] - times[first])


def serve(node: Node, replicas: int, load: float, proxy: float, count: int, seed: int = 0) -> list[float]:
    """Simulate a server at a share of its replicas' capacity; return the latency of each request, sorted."""
    rng = random.Random(seed)
    rate = load * replicas / statistics.fmean(node.seconds)
    free = [0.0] * replicas
    now, door, latencies = 0.0, 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        door = max(door, now) + proxy
        begin = max(door, heapq.heappop(free))
        end = begin + rng.choice(node.seconds)
        heapq.heappush(free, end)
        latencies.append(end - now)
    return sorted(latencies)


def rows(node: Node, options: argparse.Namespace) -> Iterator[str]:
    """Yield the tables, as Markdown."""
    mean = statistics.fmean(node.seconds)
    deviation = statistics.stdev(node.seconds)
    yield (
        f"One item {mean * 1000:.0f} ms of one core (standard deviation {deviation * 1000:.0f} ms), "
        f"the batch's own process {node.booking * 1000:.2f} ms for each, start {node.start:.1f} s, "
        f"result {node.size} bytes."
    )
    yield ""
    yield "| nodes | processes | results to | items/s | of the ideal | hours | price |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for nodes in options.nodes:
        processes = nodes * options.cores
        failure = mean / (options.failure * 3600)
        for place, network in (("a folder", options.network / 8), ("a URL", None)):
            speed = batch(node, processes, network, failure)
            hours = (options.items / speed + node.start) / 3600
            yield (
                f"| {nodes} | {processes} | {place} | {speed:.0f} | {speed * mean / processes:.0%} | {hours:.2f} "
                f"| ${hours * nodes * options.price:.2f} |"
            )
    yield ""
    yield "| nodes | load | requests/s | p50 | p99 | proxies |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for nodes in options.nodes:
        replicas = nodes * options.cores
        for load in (0.5, 0.8, 0.95):
            rate = load * replicas / mean
            proxies = max(1, -(-int(rate * options.proxy * 100) // 60))  # each at most 60 % busy
            count = max(20_000, 10 * replicas)
            times = serve(node, replicas, load, options.proxy / proxies, count)
            yield (
                f"| {nodes} | {load:.0%} | {rate:.0f} | {times[count // 2] * 1000:.0f} ms "
                f"| {times[99 * count // 100] * 1000:.0f} ms | {proxies} |"
            )


def main() -> None:
    """Measure, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--cores", type=int, default=16, help="of a node")
    parser.add_argument("--price", type=float, default=0.68, help="of a node and hour, in dollars")
    parser.add_argument("--items", type=int, default=1_000_000, help="of the batch")
    parser.add_argument("--network", type=float, default=10e9, help="bits a second of the batch's own machine")
    parser.add_argument("--failure", type=float, default=1000, help="hours between failures of a node")
    parser.add_argument("--proxy", type=float, default=0.003, help="seconds of a proxy for one request")
    parser.add_argument("--scale", type=float, default=1, help="an item of your model, over one of the embedded one")
    parser.add_argument("--size", type=int, help="bytes of your model's result")
    parser.add_argument("--ray", action="store_true", help="measure the call of an actor, too")
    options = parser.parse_args()
    with ExitStack() as stack:
        node = measure(stack.enter_context(scratch_folder()), options.ray)
    seconds = [each * options.scale for each in node.seconds]
    node = Node(seconds, node.booking, node.start, options.size or node.size)
    for row in rows(node, options):
        print(row)


if __name__ == "__main__":
    main()
