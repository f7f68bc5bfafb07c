"""Run cases: each in a worker process, which is started again if a case ends it.

python -m torture [--seconds N] [--format NAME] [--seed N] [--state FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from .formats import FORMATS, Format

__all__ = ["OUTCOMES", "Outcome", "main", "run_case"]

OUTCOMES = ("right", "refused", "wrong", "traceback", "crash", "hang", "left over")
_SECONDS = 120.0
"""After which a case counts as one that hangs."""


@dataclass(frozen=True)
class Outcome:
    """What a case came to, one of OUTCOMES, and what tells why."""

    kind: str
    detail: str = ""


def run_case(format_: Format, seed: int, folder: Path) -> Outcome:
    """Make a sound input in `folder`, bend it by `seed`, and run the command on it in this process."""
    random = Random(f"{format_.name} {seed}")
    made = _sound(format_)
    shutil.copytree(made, folder, symlinks=True, dirs_exist_ok=True)
    target = folder / format_.file
    target.write_bytes(format_.change(target.read_bytes(), random))
    command = [part.replace("{file}", format_.file) for part in format_.command] + format_.arguments(random)
    # Other variables are left alone: the case before may still be compiling a model, and whoever reads a variable in
    # C while another thread clears the environment can meet memory that is gone.
    with pytest.MonkeyPatch.context() as changed:
        changed.chdir(folder)
        for name, value in format_.environment.items():
            changed.setenv(name, value)
        outcome = _outcome(command)
    if outcome.kind == "right" and format_.same is not None:
        ours, expected = (folder / name for name in format_.same)
        if not ours.is_file() or ours.read_bytes() != expected.read_bytes():
            return Outcome("wrong", f"{ours.name} is not {expected.name}")
    if left := [path.name for path in folder.rglob("*ovforge-*") if path.suffix in (".tmp", ".old", ".lock")]:
        return Outcome("left over", ", ".join(left))
    return outcome


def _sound(format_: Format) -> Path:
    """Return a folder with the sound input, made once."""
    if format_.name not in _made:
        folder = Path(tempfile.mkdtemp(prefix="torture-sound-"))
        format_.make(folder)
        _made[format_.name] = folder
    return _made[format_.name]


_made: dict[str, Path] = {}


def _outcome(command: list[str]) -> Outcome:
    from typer.testing import CliRunner

    from ovforge.cli import app
    from ovforge.errors import OvforgeError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            done = CliRunner().invoke(app, [part.encode("utf-8", "replace").decode() for part in command])
    except BaseException as error:  # what the runner itself cannot catch
        return Outcome("traceback", f"{type(error).__name__} outside the command")
    error = done.exception
    if error is None or isinstance(error, SystemExit):
        return Outcome("right" if done.exit_code == 0 else "refused")
    if isinstance(error, OvforgeError | OSError):  # main() explains both
        str(error).encode()
        return Outcome("refused")
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "ovforge" in frame.filename][-1:]
    where = f"{Path(ours[0].filename).name}:{ours[0].lineno}" if ours else ""
    return Outcome(
        "traceback",
        f"{type(error).__name__} {str(error)[:100]!r} at {where} in {Path(last.filename).name}:{last.lineno}",
    )


def _serve() -> None:
    """Run the cases that are named on standard input, and answer each on a line of its own."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        name, seed = line.rsplit(" ", 1)
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            try:
                outcome = run_case(FORMATS[name], int(seed), Path(folder))
            except Exception as error:  # of the torture itself
                outcome = Outcome("traceback", f"torture: {type(error).__name__} {error}")
        answers.write(json.dumps([outcome.kind, outcome.detail]) + "\n")


class _Worker:
    """A process that runs cases."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "torture", "--serve"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )

    def run(self, name: str, seed: int) -> Outcome:
        """Run one case; a worker that does not answer is ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{name} {seed}\n".encode())
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_SECONDS):
                self.end()
                return Outcome("hang", f"more than {_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            return Outcome("crash", f"signal or code {self._process.wait()}")
        return Outcome(*json.loads(line))

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Run until the time is over; counts are printed, and kept so that the next run goes on with new seeds."""
    parser = argparse.ArgumentParser(description="Bend strangers' files in every way and see what comes of it.")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long (default: an hour)")
    parser.add_argument("--format", action="append", choices=sorted(FORMATS), help="only these")
    parser.add_argument("--state", type=Path, default=Path("build/torture.json"), help="where counts are kept")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        _serve()
        return
    state = json.loads(arguments.state.read_text()) if arguments.state.exists() else {"counts": {}, "faults": []}
    names = arguments.format or list(FORMATS)
    end, worker = time.monotonic() + arguments.seconds, _Worker()
    spent: Counter[str] = Counter()
    try:
        while (began := time.monotonic()) < end:
            # Each format has the same time, not the same number of cases: some compile a model for each.
            name = min(names, key=spent.__getitem__)
            counts = Counter(state["counts"].get(name, {}))
            seed = counts.total()
            if not worker.lives:
                worker = _Worker()
            outcome = worker.run(name, seed)
            counts[outcome.kind] += 1
            state["counts"][name] = counts
            spent[name] += time.monotonic() - began
            if outcome.kind not in ("right", "refused"):
                state["faults"].append([name, seed, outcome.kind, outcome.detail])
                print(f"{outcome.kind}: {name} {seed}: {outcome.detail}", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        worker.end()
        arguments.state.parent.mkdir(parents=True, exist_ok=True)
        arguments.state.write_text(json.dumps(state))
    _print(state["counts"])
    faults = sum(counts.get(kind, 0) for counts in state["counts"].values() for kind in OUTCOMES[2:])
    sys.exit(1 if faults else 0)


def _print(counts: dict[str, dict[str, int]]) -> None:
    print(f"{'format':<20}{'tried':>8}" + "".join(f"{kind:>11}" for kind in OUTCOMES))
    total: Counter[str] = Counter()
    for name, found in counts.items():
        total.update(found)
        print(f"{name:<20}{sum(found.values()):>8}" + "".join(f"{found.get(kind, 0):>11}" for kind in OUTCOMES))
    print(f"{'all':<20}{sum(total.values()):>8}" + "".join(f"{total[kind]:>11}" for kind in OUTCOMES))
