"""The server on a real cluster: a replica is killed, and the server is replaced, while clients ask."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import psutil
from PIL import Image

import ovforge

CLIENTS = 4


def replicas() -> list[psutil.Process]:
    """Return the replicas' processes."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::ServeReplica:ovforge"):
            found.append(process)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_loses_nothing_when_a_replica_dies_or_all_are_replaced(nodes: Any, tmp_path: Path) -> None:
    for number in range(2):  # where another test may have left the models, so that none would be shared
        shutil.rmtree(nodes.cache(number), ignore_errors=True)
    port, shared = free_port(), tmp_path / "shared"
    asked = ("serve", "tiny.toml", "-p", port, "--engine", "ray", "-e", f"address={nodes.address}")
    asked += ("-e", f"cache=file://{shared}", "-e", "min_replicas=2")
    running = nodes.start(*asked)
    url = running.stdout.readline().strip()
    assert url == f"http://127.0.0.1:{port}", running.communicate()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5, timeout=60)
    answered: Counter[str] = Counter()
    over = threading.Event()

    def ask(first: int) -> int:
        """Ask for pictures, each with a seed of its own, until told to stop; return how many."""
        count = 0
        while not over.is_set():
            seed = first + CLIENTS * count
            made = client.images.generate(model="tiny", prompt="a cat", extra_body={"rng_seed": seed})
            assert made.data
            picture = base64.b64decode(made.data[0].b64_json or "")
            answered[f"{seed} {hashlib.sha256(picture).hexdigest()}"] += 1
            count += 1
        return count

    def wait_for_more(count: int) -> None:
        wanted, until = sum(answered.values()) + count, time.monotonic() + 90
        while sum(answered.values()) < wanted:
            assert time.monotonic() < until
            time.sleep(0.05)

    with ThreadPoolExecutor(CLIENTS) as pool:
        work = [pool.submit(ask, first) for first in range(CLIENTS)]
        try:
            wait_for_more(8)
            made = sorted(path.name for path in shared.glob("*.json"))
            before = {process.pid for process in replicas()}
            assert len(before) == 2
            replicas()[0].kill()
            wait_for_more(12)
            # Another server of that name takes its place: old replicas finish what they do. It compiles nothing.
            update = nodes.start(*asked, "-s", "input.seed=3", "-e", "keep=true")
            out, err = update.communicate(timeout=120)
            assert (update.returncode, out.strip()) == (0, url), err
            wait_for_more(8)
        finally:
            over.set()
        counts = [each.result() for each in work]
    assert sorted(path.name for path in shared.glob("*.json")) == made
    assert made
    assert not before & {process.pid for process in replicas()}

    # Each request had one answer, and the one of its seed.
    assert sum(answered.values()) == sum(counts)
    assert set(answered.values()) == {1}
    seeds = {int(name.split()[0]) for name in answered}
    assert seeds == {first + CLIENTS * n for first, count in enumerate(counts) for n in range(count)}
    told = httpx.post(f"{url}/v1/pipelines/tiny/run", json={"prompt": "a cat"}, timeout=60).json()
    direct: Any = ovforge.load(nodes.folder / "tiny.toml")("a cat", seed=3)
    (file,) = told["files"]
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(file["base64"]))), direct.images[0])

    refused = httpx.post(f"{url}/v1/images/generations", json={"prompt": "x", "response_format": "url"}, timeout=60)
    assert refused.status_code == 400
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 0
    until = time.monotonic() + 20
    while replicas():
        assert time.monotonic() < until
        time.sleep(0.1)
