"""Results and manifests behind a URL: nothing lost, nothing twice, and a second writer is found out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from ovforge.errors import ConfigError, InputError, OvforgeError
from ovforge_batch.command import batch
from ovforge_batch.manifest import Manifest
from ovforge_batch.outputs import Remote, open_output

URL = "memory://batch/out"


@pytest.fixture
def files() -> MemoryFileSystem:
    """Return the file system behind the URL, empty."""
    files = MemoryFileSystem()
    if files.exists("/batch"):
        files.rm("/batch", recursive=True)
    return files


def test_a_batch_behind_a_url_goes_on_where_it_stopped(files: MemoryFileSystem, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        'task = "text-to-image"\nload = "package:ovforge_lcm/model"\n[scheduler]\nuse = "lcm"\n'
        '[device]\nprecision = "f32"\n[input]\nsteps = 1\nwidth = 64\nheight = 64\n'
    )
    items = tmp_path / "items.jsonl"
    lines = [json.dumps({"id": f"n{n}", "prompt": "a cat", "count": n}) for n in (1, 2)]
    items.write_text(lines[0])
    batch(tmp_path / "tiny.toml", items, URL, trust=True, quiet=True)
    first = files.cat_file("/batch/out/n1.png")
    items.write_text("\n".join(lines))
    batch(tmp_path / "tiny.toml", items, URL, trust=True, quiet=True)
    assert files.cat_file("/batch/out/n1.png") == first
    batch(tmp_path / "tiny.toml", items, f"file://{tmp_path}/out", trust=True, quiet=True)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["n1.png", "n2-1.png", "n2-2.png"]
    for name in names:
        assert files.cat_file(f"/batch/out/{name}") == (tmp_path / "out" / name).read_bytes()
    kept = b"".join(files.cat_file(part) for part in sorted(files.ls("/batch/out/manifest", detail=False)))
    assert [json.loads(line).get("id") for line in kept.splitlines()] == [None, "n1", "n2"]
    with pytest.raises(InputError, match="another seed"):
        batch(tmp_path / "tiny.toml", items, URL, seed=1, trust=True)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=12), st.integers(1, 4), st.data())
def test_a_manifest_of_parts_is_read_as_it_was_written_whatever_happens_while_parts_become_one(
    written: list[list[int]], gathered: int, data: st.DataObject
) -> None:
    files = MemoryFileSystem()
    if files.exists("/batch"):
        files.rm("/batch", recursive=True)
    stops_at = data.draw(st.integers(0, 20), label="removals before the process is killed")

    class Killed(Exception):
        pass

    class Dying(Remote):
        left = stops_at

        def remove(self, name: str) -> None:
            if not self.left:
                raise Killed
            self.left -= 1
            super().remove(name)

    expected: dict[str, tuple[str, str]] = {}
    try:
        with Manifest(Dying(URL), {"seed": 1}) as manifest:
            manifest._journal.gathered = gathered  # type: ignore[attr-defined]
            for number, group in enumerate(written):
                expected |= {f"i{n}": ("done", str(number)) for n in group}
                manifest.add(*({"id": f"i{n}", "status": "done", "digest": str(number)} for n in group))
    except Killed:
        pass
    for _ in range(2):
        with Manifest(Remote(URL), {"seed": 1}) as manifest:
            assert manifest.records == expected
    assert len(files.ls("/batch/out/manifest")) == 1


def test_a_second_writer_is_found_out(files: MemoryFileSystem) -> None:
    with Manifest(Remote(URL), {"seed": 1}) as one, Manifest(Remote(URL), {"seed": 1}) as other:
        other.add({"id": "a", "status": "done", "digest": "x"})
        with pytest.raises(InputError, match="another batch is writing there"):
            one.add({"id": "a", "status": "done", "digest": "x"})
    with Manifest(Remote(URL), {"seed": 1}) as manifest:
        assert manifest.records == {"a": ("done", "x")}


def test_a_url_that_cannot_be_used_is_said_without_its_password(
    files: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"^nothing://host/x: it cannot be opened") as caught:
        open_output("nothing://user:secret@host/x")
    assert "secret" not in str(caught.value)
    assert open_output("file:///tmp/x y") == Path("/tmp/x y")

    def full(*_: object, **__: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", full)
    with pytest.raises(OvforgeError, match=re.escape("a.json cannot be written: OSError: no room")):
        Remote(URL).write("a.json", b"")
