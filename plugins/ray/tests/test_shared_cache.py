"""The cache that machines share: what one has made, no other makes again, and nothing else is taken for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import ovforge
from ovforge.errors import ConfigError
from ovforge.store import Cache
from ovforge_ray.cache import SharedCache

URL = "memory://shared"


@pytest.fixture
def files() -> Iterator[MemoryFileSystem]:
    """Return the file system behind the URL, empty."""
    files = MemoryFileSystem()
    yield files
    files.rm("/shared", recursive=True)


def machine(folder: Path, name: str) -> SharedCache:
    return SharedCache(Cache(folder / name), URL)


def test_a_second_machine_converts_and_compiles_nothing(files: MemoryFileSystem, tmp_path: Path) -> None:
    config = {
        "task": "text-to-image", "load": "package:ovforge_lcm/model", "scheduler": "lcm", "device": {"precision": "f32"},
        "input": {"steps": 1, "width": 64, "height": 64},
    }  # fmt: skip
    pictures = []
    for name in ("one", "two"):
        cache = machine(tmp_path, name)
        pipeline = ovforge.load(config, cache=cache)
        pictures.append(pipeline("a cat", seed=1).images[0].tobytes())  # type: ignore[attr-defined]
        cached = {role: model.cached for role, model in pipeline.compiled.all()}
        if name == "one":
            assert cache.made >= 3
            assert cache.fetched == 0
        else:
            assert (cache.made, all(cached.values())) == (0, True), cached
            assert cache.fetched >= 3
    assert pictures[0] == pictures[1]


def test_what_is_damaged_or_forged_or_of_other_files_is_not_taken(files: MemoryFileSystem, tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("as it was")

    def get(name: str) -> tuple[str, int, int]:
        cache = machine(tmp_path, name)
        entry, _ = cache.get_or_make(
            {"stage": "test"}, lambda folder: (folder / "file").write_text("made"), label="a test",
            parents=["p"], inputs=lambda: [source],
        )  # fmt: skip
        assert entry.parents == ("p",)
        return entry.checked("file").read_text(), cache.made, cache.fetched

    assert get("one") == ("made", 1, 0)
    assert get("two") == ("made", 0, 1)
    (key,) = (path for path in files.ls("/shared", detail=False) if path.endswith(".json"))
    good = files.cat_file(key)
    told = json.loads(good)
    (stored,) = files.find(f"/shared/{told['folder']}")
    files.pipe_file(stored, b"else")
    with pytest.warns(UserWarning, match="file is not what was stored"):
        assert get("three") == ("made", 1, 0)

    escaped = {**told, "files": {"../../out": told["files"]["file"]}}
    for forged in (good[:-9], json.dumps(escaped).encode(), b"[" * 5000):
        files.pipe_file(key, forged)
        shutil.rmtree(tmp_path / "four", ignore_errors=True)
        with pytest.warns(UserWarning, match="the shared cache cannot be read"):
            assert get("four") == ("made", 1, 0)
        assert not (tmp_path / "four" / "out").exists()
    source.write_text("as it is")
    files.pipe_file(key, good)
    assert get("five") == ("made", 1, 0)


def test_a_url_that_nothing_opens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be opened"):
        SharedCache(Cache(tmp_path), "nothing://x")
