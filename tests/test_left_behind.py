"""What a killed process leaves, what --force replaces, and which programs child processes run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ovforge import testing
from ovforge.cli import app
from ovforge.errors import ConfigError, InputError
from ovforge.store import atomic_folder, check_apart, files, run_program, run_python
from ovforge.store.temporary import remove_abandoned

HOLD = """
import sys, time
from pathlib import Path
from ovforge.store import atomic_file, atomic_folder, scratch_folder
with {what}:
    print("go", flush=True)
    time.sleep(60)
"""


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".ovforge-files"
    }


@pytest.fixture
def held(tmp_path: Path, request: pytest.FixtureRequest) -> subprocess.Popen[bytes]:
    """A process that holds a temporary name in tmp_path, in the middle of its work."""
    code = HOLD.format(what=request.param.format(path=f"Path({str(tmp_path / 'it')!r})"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"go\n"
    return process


@pytest.mark.parametrize(
    "held",
    ["atomic_folder({path})", "atomic_file({path})", "scratch_folder({path}.parent)"],
    indirect=True,
)
def test_only_what_no_living_process_holds_is_removed(held: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / ".other.12345678.tmp").write_text("of another program")
    try:
        [temporary] = [path for path in tmp_path.iterdir() if ".tmp" in path.name and "ovforge" in path.name]
        assert remove_abandoned(tmp_path) == [] and temporary.exists()
    finally:
        held.kill()
        held.wait()
    assert temporary.exists(), "a killed process cannot clean up"
    assert CliRunner().invoke(app, ["clean", str(tmp_path)]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [".other.12345678.tmp"]


@pytest.mark.parametrize("held", ["atomic_folder({path})"], indirect=True)
def test_the_next_run_beside_it_removes_it(held: subprocess.Popen[bytes], tmp_path: Path) -> None:
    held.kill()
    held.wait()
    run_python(
        ["-c", f"import pathlib, ovforge.store as s; s.atomic_write(pathlib.Path({str(tmp_path / 'x')!r}), b'1')"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("swaps", [True, False])
def test_force_replaces_what_ovforge_wrote_and_nothing_else(
    swaps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(files, "_swap", lambda *_: False)
    target = tmp_path / "it"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("old")
        (folder / "b").write_text("old")
    (target / "notes").mkdir()
    (target / "notes" / "mine").write_text("mine")
    (target / "link").symlink_to("notes")
    with atomic_folder(target, replace=True) as folder:
        (folder / "a").write_text("new")
        (target / "late").write_text("while it was made")
    assert tree(target) == {"a": "new", "late": "while it was made", "notes/mine": "mine"}
    assert (target / "link").readlink() == Path("notes")
    with pytest.raises(InputError, match="mine is there"), atomic_folder(target, replace=True) as folder:
        (folder / "notes").mkdir()
        (folder / "notes" / "mine").write_text("ovforge's")
    assert tree(target)["notes/mine"] == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "thesis").write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        testing.small_bundle().save(tmp_path / "it", replace=True)
    assert tree(tmp_path) == {"it/thesis": "mine"}


@pytest.mark.parametrize(
    ("target", "what"),
    [("m", "is what"), ("m/out", "lies inside"), (".", "contains"), ("link", "is what"), ("M/../m", "is what")],
)
def test_a_target_is_not_what_is_read(target: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "M").mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to("m")
    with pytest.raises(InputError, match=what):
        check_apart(tmp_path / target, tmp_path / "m")
    check_apart(tmp_path / "m2", tmp_path / "m")


KILLED = """
import sys
from pathlib import Path
from ovforge.store import atomic_folder
print("go", flush=True)
for n in range(10**9):
    with atomic_folder(Path(sys.argv[1]), replace=True) as folder:
        for name in "abcdefgh":
            (folder / name).write_text(str(n))
"""


@pytest.mark.parametrize("swaps", [True, False])
def test_nothing_is_lost_at_any_kill(swaps: bool, tmp_path: Path) -> None:
    target = tmp_path / "it"
    with atomic_folder(target) as folder:
        for name in "abcdefgh":
            (folder / name).write_text("0")
    (target / "mine").write_text("mine")
    patch = "" if swaps else "import ovforge.store.files as f; f._swap = lambda *_: False\n"
    for n in range(6):
        process = subprocess.Popen([sys.executable, "-c", patch + KILLED, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        time.sleep(0.02 + 0.015 * n)
        process.kill()
        process.wait()
        remove_abandoned(tmp_path)
        found = tree(target)
        assert found.pop("mine") == "mine"
        assert sorted(found) == list("abcdefgh") and len(set(found.values())) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["it"]


def test_no_program_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a module that shadows Python's own, nor a program, by a relative or an empty entry of a path."""
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    program = tmp_path / "ovforge-nowhere-else"
    program.write_text("#!/bin/sh\necho hijacked\n")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":.:{tmp_path.name}")
    monkeypatch.setenv("PATH", f".::{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    done = run_python(
        ["-c", "import json, subprocess, sys; print(json.dumps(sys.path))"], capture_output=True, text=True
    )
    assert done.returncode == 0 and str(tmp_path) not in done.stdout, done.stderr
    worker = run_python(["-m", "ovforge_benchmark.worker", "x"], input="", capture_output=True, text=True)
    assert "JSONDecodeError" in worker.stderr and "hijacked" not in worker.stderr
    with pytest.raises(ConfigError, match="no program"):
        run_program([program.name])
    assert run_program(["true"]).returncode == 0 or shutil.which("true") is None


@pytest.mark.skipif(os.name != "posix", reason="Windows hands no pipes on")
@pytest.mark.parametrize("module", ["ovforge_benchmark.worker", "ovforge_batch.worker"])
def test_a_worker_ends_with_its_parent(module: str) -> None:
    """It waits for more to read, and whoever started it is killed: nothing else tells it."""
    runs = f"import runpy; print('up', flush=True); runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    code = f"from ovforge.store import run_python; run_python(['-c', {runs!r}, 'answer.json'])"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None and parent.stdout is not None
    assert parent.stdout.readline() == b"up\n"
    parent.kill()
    parent.wait()
    end = threading.Thread(target=parent.stdout.read, daemon=True)  # which the worker holds, too
    end.start()
    end.join(60)
    ended = not end.is_alive()
    parent.stdin.close()
    assert ended
