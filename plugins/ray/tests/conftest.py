"""A real Ray on this machine, with a head that takes no work and two other nodes; and a task that somebody else wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ovforge import testing

_LOOPBACK = "127.0.0.2"
"""Ray takes 127.0.0.1 for the machine's outer address."""

TOY = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from ovforge import hookimpl
from ovforge.contracts import TaskExtension
from ovforge.model import Result
from pydantic import BaseModel, ConfigDict


class Inputs(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: int
    seed: int | None = None
    log: Path
    die: bool = False


@dataclass
class Answer(Result):
    text: str = ""


class Toy:
    def __init__(self, options, context): ...

    def __call__(self, inputs, progress):
        if inputs.die:
            os.kill(os.getpid(), 9)
        time.sleep(0.02)
        with inputs.log.open("ab", buffering=0) as file:
            file.write(f"{inputs.number} {os.getpid()}\\n".encode())
        return Answer(text=f"{inputs.number}:{inputs.seed}", provenance={"inputs": {"number": inputs.number}})


@hookimpl
def ovforge_tasks():
    yield TaskExtension(name="toy", summary="A toy", factory=Toy, inputs=Inputs, roles=("model",), result=Answer)
"""


@dataclass
class Nodes:
    """A cluster: its address, its folder of files, the processes' environment, and the caches of its two nodes."""

    address: str
    folder: Path
    environment: dict[str, str]
    cluster: Any
    workers: list[Any]

    def cache(self, number: int) -> Path:
        return self.folder / f"cache-{number}"

    def add(self, number: int) -> None:
        """Start a node with a cache of its own."""
        self.workers[number] = self.cluster.add_node(
            num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False, node_ip_address=_LOOPBACK,
            env_vars={"OVFORGE_CACHE_DIR": str(self.cache(number))},
        )  # fmt: skip

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen[str]:
        """Start `ovforge` with these arguments."""
        command = [sys.executable, "-m", "ovforge", *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment, cwd=self.folder,
            **options,
        )  # fmt: skip


@pytest.fixture(scope="session")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Return a cluster that listens to this machine alone and reports to nobody."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("cluster")
    site = folder / "site"
    info = site / "ovforge_toy-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "ovforge_toy.py").write_text(TOY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ovforge-toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ovforge]\ntoy = ovforge_toy\n")
    testing.small_bundle().save(folder / "model")
    (folder / "toy.toml").write_text('task = "toy"\nload = "model"\n')
    (folder / "tiny.toml").write_text(
        'task = "text-to-image"\nload = "package:ovforge_lcm/model"\n[scheduler]\nuse = "lcm"\n'
        '[device]\nprecision = "f32"\nthreads = 1\n[input]\nsteps = 1\nwidth = 64\nheight = 64\n'
    )
    changes = {
        "PYTHONPATH": str(site), "OVFORGE_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1",
        "OVFORGE_REGISTRY": str(folder / "none"), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000", "RAY_health_check_initial_delay_ms": "1000",
    }  # fmt: skip
    local = {"node_ip_address": _LOOPBACK, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as changed:
        for name, value in changes.items():
            changed.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **local})
        try:
            running = Nodes(cluster.address, folder, dict(os.environ), cluster, [None, None])
            for number in range(2):
                running.add(number)
            yield running
        finally:
            cluster.shutdown()


@pytest.fixture
def toys(nodes: Nodes, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes so many items, which note in `tmp_path`/log that they were done."""

    def write(count: int, *more: dict[str, Any]) -> Path:
        path = tmp_path / "items.jsonl"
        items = [{"id": f"n{n}", "number": n, "log": str(tmp_path / "log")} for n in range(count)]
        items += [{"log": str(tmp_path / "log"), **each} for each in more]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        return path

    return write
