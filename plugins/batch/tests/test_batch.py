"""Batches as a user runs them: killed in the middle, with bad items, and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import ovforge
from ovforge.errors import InputError, PluginError
from ovforge_batch.command import batch
from ovforge_batch.items import count_items, read_items, seed_of
from ovforge_batch.manifest import Manifest

COUNT = 18


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config and many items, every third of which has its own seed."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "tiny.toml").write_text(
        'task = "text-to-image"\nload = "package:ovforge_lcm/model"\n[scheduler]\nuse = "lcm"\n'
        '[device]\nprecision = "f32"\n[input]\nsteps = 2\nwidth = 64\nheight = 64\n'
    )
    items = [{"id": f"n{n}", "prompt": f"a cat {n}", **({"seed": n} if n % 3 == 0 else {})} for n in range(COUNT)]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture(scope="module")
def start(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts a batch in a process of its own."""

    def begin(*arguments: object) -> subprocess.Popen[str]:
        variables = {
            **os.environ, "OVFORGE_CACHE_DIR": str(folder / "cache"), "OVFORGE_REGISTRY": str(folder / "none"),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "ovforge", "batch", *map(str, arguments), "--trust"]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, cwd=folder
        )

    return begin


def records(output: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a manifest, without its head."""
    path = output / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines[1:] if line.endswith(b"\n")]


def wait_for(output: Path, count: int) -> None:
    """Return when a manifest has so many records."""
    until = time.monotonic() + 60
    while len(records(output)) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_nothing_is_lost_or_done_twice_whoever_is_killed(
    folder: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    asked = ("tiny.toml", "items.jsonl", "-o", output, "--seed", "5", "--json")
    first = start(*asked, "--workers", "2")
    wait_for(output, 4)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    psutil.wait_procs(children, timeout=20)  # they end when nobody gives them items any more
    before = records(output)
    assert len(before) < COUNT - 4
    with (output / "manifest.jsonl").open("ab") as file:
        file.write(b'{"id": "n17", "stat')  # what a process leaves that is killed while it writes

    second = start(*asked)
    wait_for(output, len(before) + 2)
    for child in psutil.Process(second.pid).children():
        child.kill()
    told = json.loads(second.communicate(timeout=120)[0])
    assert second.returncode == 0
    assert (told["total"], told["before"], told["failed"]) == (COUNT, len(before), [])
    after = records(output)
    assert sorted(record["id"] for record in after) == sorted(f"n{n}" for n in range(COUNT))
    assert {record["status"] for record in after} == {"done"}
    assert sorted(path.name for path in output.glob("*.png")) == sorted(f"n{n}.png" for n in range(COUNT))
    assert max(record["attempts"] for record in after) == 2

    batch(folder / "tiny.toml", folder / "items.jsonl", output, seed=5, trust=True)  # nothing is left to do
    assert records(output) == after

    pipeline: Any = ovforge.load(folder / "tiny.toml")
    for n, seed in ((3, 3), (7, seed_of(5, "n7"))):
        expected = pipeline(f"a cat {n}", seed=seed).images[0]
        assert np.array_equal(np.asarray(Image.open(output / f"n{n}.png")), np.asarray(expected))
    assert all(path.suffix == ".png" or path.name in ("manifest.jsonl", ".batch.lock") for path in output.iterdir())


def test_bad_items_are_told_at_the_end_and_tried_again(folder: Path, start: Callable[..., Any], tmp_path: Path) -> None:
    items, output = tmp_path / "items.jsonl", tmp_path / "out"
    lines = [
        '{"id": "good", "prompt": "a cat"}',
        '{"id": "bad", "prompt": "a cat", "stops": 3}',
        "{",
        "",
        '{"id": "../x", "prompt": ""}',
    ]
    items.write_text("\n".join(lines))
    ran = start("tiny.toml", items, "-o", output, "--as", "jpg")
    out, err = ran.communicate(timeout=60)
    assert ran.returncode == 3
    assert "1 done, 0 done before, 3 failed" in out
    assert "bad (line 2): input: unknown key `stops`. Did you mean 'steps'?" in err
    assert "000003 (line 3): not valid JSON" in err
    assert '000005 (line 5): its id, "../x", is not a valid name of a file' in err
    assert [record["attempts"] for record in records(output) if record["id"] == "bad"] == [1]
    assert (output / "good.jpg").is_file()
    items.write_text("\n".join([lines[0], lines[1].replace("stops", "steps")]))
    again = start("tiny.toml", items, "-o", output, "--as", "jpg")
    assert "1 done, 1 done before, 0 failed" in again.communicate(timeout=60)[0]
    items.write_text(lines[0].replace("cat", "dog"))
    for options, words in (
        ({"kind": "jpg"}, "'good' was done with other inputs"),
        ({"kind": "jpg", "seed": 1}, "another seed"),
        ({"kind": "jpg", "set_": ["input.steps=1"]}, "another config"),
        ({"kind": "exe"}, "cannot write .exe"),
    ):
        with pytest.raises(InputError, match=words):
            batch(folder / "tiny.toml", items, output, trust=True, **options)
    with pytest.raises(PluginError, match="nowhere"):
        batch(folder / "tiny.toml", items, tmp_path / "new", set_=["load=nowhere"], trust=True)


def test_ids_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    for lines, words in (
        (['{"id": "a"}', "", '{"id": "a"}'], "lines 1 and 3 have the same id, 'a'"),
        (['{"id": "000002"}', "{}"], "lines 1 and 2 have the same id"),
        (['{"id": "a-2"}', '{"id": "a"}'], "'a-2' may also be a file of 'a'"),
    ):
        file.write_text("\n".join(lines))
        with pytest.raises(InputError, match=words):
            count_items(file)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12), st.data())
def test_a_manifest_that_is_cut_anywhere_loses_its_last_record_at_most(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[int, bool]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    wanted = [{"id": f"i{n}", "status": "done" if done else "failed", "digest": "d"} for n, done in written]
    with Manifest(folder, {"seed": 1}) as manifest:
        for record in wanted:
            manifest.add(record)
        with pytest.raises(InputError, match="another batch is writing"), Manifest(folder, {"seed": 1}):
            pass
    path = folder / "manifest.jsonl"
    content = path.read_bytes()
    end = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:end])
    whole = max(0, content[:end].count(b"\n") - 1)
    with Manifest(folder, {"seed": 1}) as manifest:
        assert manifest.records == {r["id"]: (r["status"], r["digest"]) for r in wanted[:whole]}
        manifest.add({"id": "new", "status": "done", "digest": "x"})
    assert [json.loads(line) for line in path.read_bytes().splitlines()][-1]["id"] == "new"
    with pytest.raises(InputError, match="another seed"), Manifest(folder, {"seed": 2}):
        pass


def test_items_are_read_one_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    file.write_bytes(b'{"id": 7, "x": 1}\n[1]\n' + b"[" * 1000 + b"\n{\xff}\n")
    items = list(read_items(file))
    assert [item.id for item in items] == ["7", "000002", "000003", "000004"]
    assert [item.problem is None for item in items] == [True, False, False, False]
