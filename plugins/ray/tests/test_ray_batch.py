"""Batches on a real cluster whose processes and machines are killed: nothing is lost, and nothing is done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COUNT = 200


def records(output: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a manifest, without its head."""
    path = output / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines[1:] if line.endswith(b"\n")]


def wait_for(output: Path, count: int) -> None:
    """Return when a manifest has so many records."""
    until = time.monotonic() + 120
    while len(records(output)) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def runs(log: Path) -> list[tuple[str, int]]:
    """Return (item, process) of each run that came to its end."""
    return [(line.split()[0], int(line.split()[1])) for line in log.read_text().splitlines()]


def test_workers_machines_and_the_batch_itself_may_be_killed(
    nodes: Any, toys: Callable[..., Path], tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    items = toys(COUNT, {"id": "bad", "number": "x"}, {"id": "poison", "number": 1, "die": True})
    asked = ("batch", "toy.toml", items, "-o", output, "--seed", 5, "--json", "--engine", "ray")
    asked += ("-e", f"address={nodes.address}")
    first = nodes.start(*asked)
    wait_for(output, 20)
    os.kill(runs(log)[-1][1], signal.SIGKILL)
    wait_for(output, 60)
    nodes.cluster.remove_node(nodes.workers[1], allow_graceful=False)
    wait_for(output, 80)  # by the other machine alone
    nodes.add(1)
    wait_for(output, 110)
    first.kill()
    first.communicate()
    before = records(output)
    assert len(before) < COUNT

    second = nodes.start(*asked)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 3, err
    told = json.loads(out)
    assert (told["total"], told["before"]) == (COUNT + 2, len(before))
    assert {each["id"]: each["error"].splitlines()[0] for each in told["failed"]}.keys() == {"bad", "poison"}
    by_id = {each["id"]: each for each in told["failed"]}
    assert by_id["poison"]["error"] == "the process that ran it died"
    assert (by_id["poison"]["attempts"], by_id["bad"]["attempts"]) == (3, 1)

    # Each item has one record. What was in work at a kill, and that alone, ran again; by its seed it gave the same.
    counted = Counter(record["id"] for record in records(output) if record["status"] == "done")
    assert counted == {f"n{n}": 1 for n in range(COUNT)}
    ran = Counter(number for number, _ in runs(log))
    assert set(ran) == {str(n) for n in range(COUNT)}
    assert sum(ran.values()) - COUNT <= 2 + 2 + 4
    assert len({process for _, process in runs(log)}) >= 4
    made = {path.stem: path.read_bytes() for path in output.glob("*.json")}
    assert made.keys() == {f"n{n}" for n in range(COUNT)}

    here = tmp_path / "here"
    embedded = nodes.start("batch", "toy.toml", items, "-o", here, "--seed", 5, "-q", "--retries", 0)
    embedded.communicate(timeout=120)
    assert {path.stem: path.read_bytes() for path in here.glob("*.json")} == made


def test_options_are_checked_before_anything_is_done(nodes: Any, toys: Callable[..., Path], tmp_path: Path) -> None:
    from ovforge.cli import find_engine
    from ovforge.errors import ConfigError

    for engine, options, words in (
        ("rya", [], r"there is no engine 'rya'\. Did you mean 'ray'\?"),
        ("embedded", ["cpus=2"], "the embedded engine has no option 'cpus'"),
        ("ray", ["cpu=2"], "unknown key `cpu`. Did you mean 'cpus'?"),
        ("ray", ["cpus=none"], "cpus"),
        ("ray", ["address=127.0.0.1:1"], "the cluster does not take us"),
    ):
        with pytest.raises(ConfigError, match=words), find_engine(engine, options, "batch").batch():
            pass


def test_pictures_are_those_of_this_machine_and_no_second_machine_compiles(nodes: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"a cat {n}"}) + "\n" for n in range(4)))
    shared = tmp_path / "shared"
    on_ray = ("--engine", "ray", "-e", f"address={nodes.address}", "-e", f"cache=file://{shared}")

    def batch(output: object, *more: object) -> dict[str, Any]:
        process = nodes.start("batch", "tiny.toml", prompts, "-o", output, "--json", *more)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return dict(json.loads(out))

    assert batch(tmp_path / "here")["done"] == 4
    assert batch(f"file://{tmp_path}/ray", *on_ray, "-w", 1)["done"] == 4  # one machine makes all there is to make
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "here").glob("*.png")}
    assert len(pictures) == 4
    assert {path.name: path.read_bytes() for path in (tmp_path / "ray").glob("*.png")} == pictures

    made = sorted(path.name for path in shared.glob("*.json"))
    assert made
    for number in range(2):
        shutil.rmtree(nodes.cache(number), ignore_errors=True)
    assert batch(tmp_path / "again", *on_ray, "-w", 2)["done"] == 4
    assert sorted(path.name for path in shared.glob("*.json")) == made  # nobody has made anything
    assert any(list(nodes.cache(number).glob("entries/*/*")) for number in range(2))
