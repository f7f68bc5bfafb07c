"""The cache under properties, damage, crashes, full disks and crowds."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovforge import testing
from ovforge.contracts.stages import DevicePlan
from ovforge.errors import CacheError, ConfigError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource
from ovforge.run.compiled import compile_model
from ovforge.store.cache import Cache, CacheWarning, DamagedError, parse_size
from ovforge.store.digests import DigestMemo, digest_file, fingerprint

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(), inner), max_leaves=8
)


def writing(data: bytes, name: str = "result.bin") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / name).write_bytes(data)

    return write


def never(folder: Path) -> None:
    raise AssertionError("made again")


@given(st.dictionaries(st.text(), JSON, min_size=1), st.data())
def test_keys_depend_on_every_value_and_on_no_order(dependencies: dict[str, Any], data: st.DataObject) -> None:
    assert fingerprint(dependencies) == fingerprint(dict(reversed(dependencies.items())))
    changed = data.draw(st.sampled_from(sorted(dependencies)))
    assert fingerprint(dependencies) != fingerprint({**dependencies, changed: [dependencies[changed]]})


def test_what_is_put_is_got(cache: Cache) -> None:
    assert cache.get({"a": 1}) is None
    entry = cache.put({"a": 1, "stage": "load"}, writing(b"x" * 100), label="one")
    assert (entry.path / "inner" / "result.bin").read_bytes() == b"x" * 100
    again, hit = cache.get_or_make({"stage": "load", "a": 1}, never, label="one")
    assert hit
    assert (again.key, again.size, again.stage, again.label) == (entry.key, 100, "load", "one")
    assert cache.verify() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry.path / "inner" / "result.bin").write_bytes(b"short"),
        lambda entry: (entry.path / "inner" / "result.bin").unlink(),
        lambda entry: (entry.path / "entry.json").write_bytes(b"{"),
        lambda entry: (entry.path / "entry.json").write_bytes(b"[1, 2]"),
        lambda entry: (entry.path / "entry.json").unlink(),
    ],
)
def test_a_damaged_entry_is_a_miss_and_is_made_again(cache: Cache, damage: Callable[[Any], None]) -> None:
    damage(cache.put({"a": 1}, writing(b"x" * 100), label="one"))
    with pytest.warns(CacheWarning, match="damaged"):
        entry, hit = cache.get_or_make({"a": 1}, writing(b"x" * 100), label="one")
    assert not hit
    assert (entry.path / "inner" / "result.bin").stat().st_size == 100
    assert cache.verify() == []


def test_verify_finds_a_flipped_bit_and_repairs(cache: Cache) -> None:
    cache.put({"a": 1}, writing(b"fine"), label="sound")
    entry = cache.put({"a": 2}, writing(b"x" * 100), label="flipped")
    file = entry.path / "inner" / "result.bin"
    file.write_bytes(b"x" * 99 + b"y")
    assert cache.verify() == [(entry.key, "inner/result.bin has changed")]
    assert cache.verify(repair=True)
    assert cache.verify() == []
    assert [left.label for left in cache.entries()] == ["sound"]


def test_pruning_removes_what_was_used_longest_ago(cache: Cache) -> None:
    for number in range(4):
        entry = cache.put({"a": number}, writing(b"x" * 100), label=str(number))
        os.utime(entry.path / "entry.json", (1000 + number, 1000 + number))
    assert cache.get({"a": 0})  # now the last used
    assert [entry.label for entry in cache.prune(250)] == ["1", "2"]
    assert [entry.label for entry in cache.entries()] == ["3", "0"]
    small = Cache(cache.root, max_bytes=150)
    small.put({"a": 9}, writing(b"x" * 100), label="9")
    assert [entry.label for entry in small.entries()] == ["0", "9"], "what was used a moment ago is spared"
    assert {entry.label for entry in small.prune(0)} == {"0", "9"}


def test_explain_names_what_changed(cache: Cache) -> None:
    dependencies = {"stage": "load", "options": {"weights": "f16"}, "version": "1"}
    assert "nothing of the stage 'load'" in cache.explain(dependencies).reason
    cache.put(dependencies, writing(b"x"), label="one")
    assert cache.explain(dependencies).hit
    explained = cache.explain({**dependencies, "options": {"weights": "f32"}})
    assert explained.differences == (("options.weights", "f16", "f32"),)


@pytest.mark.parametrize(
    ("then", "now"), [({}, {"o": {}}), ({"o": None}, {}), ({"o": 1}, {"o": True}), ({"o": 1}, {"o": 1.0})]
)
def test_whatever_changes_the_key_is_explained(cache: Cache, then: dict[str, Any], now: dict[str, Any]) -> None:
    cache.put({"stage": "load", **then}, writing(b"x"), label="one")
    explained = cache.explain({"stage": "load", **now})
    assert not explained.hit
    assert [name for name, _, _ in explained.differences] == ["o"]


def test_what_a_stage_cannot_read_is_not_the_caches_fault(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError, match="model"):
        cache.put(
            {"a": 1}, lambda folder: (folder / "out").write_bytes((tmp_path / "file/model").read_bytes()), label="x"
        )


@pytest.mark.parametrize("wrote", [lambda folder: None, lambda folder: (folder / "entry.json").write_text("mine")])
def test_a_stage_that_writes_no_result_is_refused(cache: Cache, wrote: Callable[[Path], None]) -> None:
    with pytest.raises(CacheError, match="wrote"):
        cache.put({"a": 1}, wrote, label="one")
    assert cache.get({"a": 1}) is None


def test_damage_that_cannot_be_cleared_away_is_a_miss_all_the_same(cache: Cache) -> None:
    entry = cache.put({"a": 1}, writing(b"x" * 100), label="one")
    (entry.path / "inner" / "result.bin").unlink()
    (cache.root / "work").rmdir()
    (cache.root / "work").write_text("in the way")
    with pytest.warns(CacheWarning, match="damaged"):
        assert cache.get({"a": 1}) is None


def test_pruning_drops_what_is_damaged_and_leaves_what_it_may_not_remove(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = cache.put({"a": 1}, writing(b"x" * 100), label="damaged")
    foreign = cache.put({"a": 2}, writing(b"x" * 100), label="another user's")
    (damaged.path / "entry.json").write_text("{")
    os.utime(foreign.path / "entry.json", (1000, 1000))
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == foreign.path:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    Cache(cache.root, max_bytes=150).put({"a": 3}, writing(b"x" * 100), label="mine")
    assert not damaged.path.exists()
    assert [entry.label for entry in cache.entries()] == ["another user's", "mine"]


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memo = tmp_path / "data", DigestMemo(tmp_path / "memo.json")
    file.write_bytes(b"one")
    digest_file(file, memo)
    assert memo.get(file, file.stat()) is None, "a file that has just changed may change again unseen"
    monkeypatch.setattr(DigestMemo, "_RACY", 0.0)
    os.utime(file, (1000, 1000))
    first = digest_file(file, memo)
    assert json.loads((tmp_path / "memo.json").read_text())[str(file.resolve())][-1] == first
    assert memo.get(file, file.stat()) == first
    with file.open("r+b") as same:  # of the same size and inode, and then of the same time
        same.write(b"two")
    os.utime(file, (1000, 1000))
    assert digest_file(file, memo) != first
    # The last name is one that the file system refuses to look for, as it does one in a forbidden folder.
    for damage in (
        "garbage",
        "[]",
        json.dumps({str(file.resolve()): None}),
        json.dumps({"/" + "x" * 300: [1, 1, 1, "d"]}),
    ):
        (tmp_path / "memo.json").write_text(damage)
        assert digest_file(file, DigestMemo(tmp_path / "memo.json")) == digest_file(file)


def test_a_change_of_any_byte_is_found_before_a_file_is_used(cache: Cache) -> None:
    entry = cache.put({"stage": "s"}, writing(bytes(range(200))), label="s")
    (name,) = entry.files
    assert entry.checked(name) == entry.path / name
    data = bytearray((entry.path / name).read_bytes())
    data[77] ^= 1
    (entry.path / name).write_bytes(data)
    again = cache.get({"stage": "s"})
    assert again, "its size is the same, and nothing has been read yet"
    with pytest.raises(DamagedError, match="has changed"):
        again.checked(name)
    manifest = (entry.path / "entry.json").read_bytes()
    for position in range(0, len(manifest), 7):
        changed = bytearray(manifest)
        changed[position] ^= 4
        (entry.path / "entry.json").write_bytes(changed)
        found = cache.peek({"stage": "s"})
        assert found is None or found == entry, f"byte {position} of the manifest"


def test_what_was_made_from_a_damaged_entry_goes_with_it(cache: Cache) -> None:
    first = cache.put({"n": 1}, writing(b"one"), label="1")
    second = cache.put({"n": 2}, writing(b"two"), label="2", parents=[first.key])
    third = cache.put({"n": 3}, writing(b"three"), label="3", parents=[second.key])
    cache.put({"n": 4}, writing(b"four"), label="4")
    (name,) = first.files
    (first.path / name).write_bytes(b"eno")
    assert dict(cache.verify()) == {
        first.key: f"{name} has changed",
        second.key: f"it was made from {first.key[:12]}",
        third.key: f"it was made from {second.key[:12]}",
    }
    cache.verify(repair=True)
    assert [entry.label for entry in cache.entries()] == ["4"]


def test_an_entry_counts_while_the_files_that_it_was_made_from_are_the_same(cache: Cache, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("cat")

    def make() -> bool:
        return cache.get_or_make({"n": 1}, writing(b"one"), label="1", inputs=lambda: [labels])[1]

    assert [make(), make()] == [False, True]
    labels.write_text("dog")
    assert cache.peek({"n": 1}) is None
    assert cache.explain({"n": 1}).reason == f"{labels} has changed"
    assert [make(), make()] == [False, True]
    labels.unlink()
    assert cache.get({"n": 1}) is None


@pytest.mark.parametrize(("text", "size"), [("500MB", 500 * 10**6), ("2 GiB", 2**31), ("0", 0), ("1.5kb", 1500)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1GB", "5 parsecs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


# -- processes ------------------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
from ovforge.store.cache import Cache
from ovforge.errors import OvforgeError
root, marks, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def write(folder):
    (folder / "big.bin").write_bytes(b"x" * 1000)
    (marks / f"inside-{time.monotonic_ns()}").touch()
    time.sleep(60 if how == "hang" else 0.3)
try:
    Cache(root).get_or_make({"a": 1}, write, label="slow")
except OvforgeError as error:
    print(error); sys.exit(3)
"""


def child(cache: Cache, marks: Path, how: str, before: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", before + CHILD, cache.root, marks, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def await_mark(marks: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(marks.glob("inside-*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_killed_in_the_middle_leaves_nothing(cache: Cache, tmp_path: Path) -> None:
    process = child(cache, tmp_path, "hang")
    await_mark(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert cache.get({"a": 1}) is None
    assert cache.entries() == []
    cache.put({"a": 1}, writing(b"again"), label="again")  # the dead process's lock is free
    assert list((cache.root / "work").iterdir()) == [], "what it left is cleared"


def test_a_lock_in_use_and_the_work_under_it_survive_pruning_from_elsewhere(cache: Cache, tmp_path: Path) -> None:
    made = cache.put({"a": 1}, writing(b"x"), label="earlier")
    cache.remove(made.key)
    os.utime(cache.root / "locks" / f"{made.key}.lock", (1000, 1000))  # the lock's file is old, its holder is not
    # In another container a process has an id that means nothing here.
    first = child(cache, tmp_path, "work", before="import os; os.getpid = lambda: 2**22 + 1")
    await_mark(tmp_path)
    cache.prune()
    second = child(cache, tmp_path, "work")
    assert [first.wait(timeout=60), second.wait(timeout=60)] == [0, 0]
    assert len(list(tmp_path.glob("inside-*"))) == 1
    assert [list(entry.files) for entry in cache.entries()] == [["big.bin"]]


CROWD = """
import random, sys, time, warnings
from pathlib import Path
from ovforge import testing
from ovforge.model.bundle import ModelBundle
from ovforge.store.cache import Cache, CacheWarning
warnings.simplefilter("error", CacheWarning)
cache, draw, end = Cache(Path(sys.argv[1]), max_bytes=300), random.Random(int(sys.argv[2])), time.monotonic() + 1.5
while time.monotonic() < end:
    number, what = draw.randrange(5), draw.random()
    dependencies = {"stage": "crowd", "number": number}
    if what < 0.6:
        data = bytes([number]) * 100
        cache.get_or_make(dependencies, lambda folder: (folder / "data").write_bytes(data), label="crowd")
    elif what < 0.8:
        cache.prune(200)
    else:
        cache.get(dependencies), cache.explain({**dependencies, "more": 1})
"""


def test_a_crowd_that_stores_and_prunes_leaves_only_sound_entries(cache: Cache) -> None:
    crowd = [
        subprocess.Popen([sys.executable, "-c", CROWD, cache.root, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(4)
    ]
    assert [process.communicate(timeout=60)[1] for process in crowd] == [""] * 4, "no error, and no false alarm"
    assert cache.verify() == []
    for entry in cache.entries():
        assert (entry.path / "data").read_bytes() == bytes([entry.dependencies["number"]]) * 100
    cache.prune(0)
    assert list((cache.root / "work").iterdir()) == []


def test_processes_that_ask_at_once_do_the_work_once(cache: Cache, tmp_path: Path) -> None:
    processes = [child(cache, tmp_path, "work") for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert len(list(tmp_path.glob("inside-*"))) == 1
    assert cache.verify() == []


def test_a_full_disk_is_said_and_loses_nothing(cache: Cache) -> None:
    cache.put({"a": 0}, writing(b"kept"), label="kept")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(CacheError, match=r"disk is full while storing large.*\n.*ovforge cache prune"):
            cache.put({"a": 1}, writing(b"x" * 200_000), label="large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [entry.label for entry in cache.entries()] == ["kept"]
    assert list((cache.root / "work").iterdir()) == []
    cache.put({"a": 1}, writing(b"x" * 200_000), label="large")


def test_a_full_disk_stores_no_compiled_model(cache: Cache, tmp_path: Path) -> None:
    """The runtime writes on where the disk is full, and says nothing."""
    plan = DevicePlan("CPU", {}, "CPU", "f32", True)
    testing.small_bundle().save(tmp_path / "model")
    bundle = ModelBundle.open(FileSource(tmp_path / "model"))
    role = next(iter(bundle.models))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.warns(UserWarning, match=f"compiled {role} was not stored: .*disk is full"):
            made = compile_model(bundle, role, plan, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert made.model is not None and list(cache.entries()) == []
    assert [compile_model(bundle, role, plan, cache).cached for _ in range(2)] == [False, True]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="OVFORGE_CACHE_DIR"):
        Cache(tmp_path / "file").put({"a": 1}, writing(b"x"), label="one")


def test_a_failing_stage_leaves_nothing(cache: Cache) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("stage")

    with pytest.raises(RuntimeError, match="stage"):
        cache.put({"a": 1}, fail, label="one")
    assert cache.entries() == []
    assert list((cache.root / "work").iterdir()) == []
