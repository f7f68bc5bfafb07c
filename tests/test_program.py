"""The program with plugins of strangers: found, listed, run, and named when they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = '''
from ovforge import hookimpl
from ovforge.contracts import CommandExtension, SchedulerExtension

OVFORGE_API = 1

def greet(name: str = "you", fail: bool = False):
    """Greet somebody, in a line of its own."""
    if fail:
        raise KeyError("what nobody expected")
    print(f"hello {name}")

@hookimpl
def ovforge_commands():
    yield CommandExtension(name="greet", summary="Greet somebody", factory=greet)
    yield CommandExtension(name="wave", summary="Wave", factory="stranger_plugin:wave")
'''

BROKEN = """
from ovforge import hookimpl
from ovforge.contracts import SchedulerExtension, TaskExtension, GraphTransformExtension, Phase

@hookimpl
def ovforge_schedulers():
    yield SchedulerExtension(name="odd", summary="x", factory="stranger_broken:Missing", config="nowhere.at.all:Options")

@hookimpl
def ovforge_tasks():
    yield TaskExtension(name="chore", summary="x", factory="stranger_broken:ovforge_tasks", inputs="json:dumps", roles=("m",))

@hookimpl
def ovforge_graph_transforms():
    yield GraphTransformExtension(
        name="bent", summary="x", factory="no colon", phase=Phase.FUSE, adapter="stranger_exploding:adapter"
    )
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a folder on the path with a sound plugin, one whose import strings lead nowhere, and one that crashes."""
    write(tmp_path, "stranger", PLUGIN, "Greets, and\n  waves")
    write(tmp_path, "broken", BROKEN, "Names what is not there")
    write(tmp_path, "crashing", "1 / 0", "Crashes")
    nameless = tmp_path / "ovforge_nameless.dist-info"
    nameless.mkdir()
    (nameless / "entry_points.txt").write_text("[ovforge]\nnameless = stranger_nameless\nempty =\n")
    (tmp_path / "stranger_nameless.py").write_text("")
    (tmp_path / "stranger_exploding.py").write_text("raise OSError('no such device')")
    return tmp_path


def write(folder: Path, name: str, source: str, summary: str) -> None:
    module = f"stranger_{name}".replace("stranger_stranger", "stranger_plugin")
    (folder / f"{module}.py").write_text(source)
    facts = folder / f"ovforge_{name}-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: ovforge-{name}\nVersion: 1.2\nSummary: {summary}\n")
    (facts / "entry_points.txt").write_text(f"[ovforge]\n{name} = {module}\n")


def ovforge(place: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-m", "ovforge", *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_commands_of_strangers_are_listed_and_run(place: Path) -> None:
    listed = ovforge(place, "-h").stdout
    for line in ("greet", "Greet somebody", "run", "detect", "plugins"):
        assert line in listed
    assert ovforge(place, "greet", "--name", "me").stdout == "hello me\n"
    assert "in a line of its own" in ovforge(place, "greet", "-h").stdout
    assert "Did you mean 'greet'?" in ovforge(place, "gret", code=2).stderr
    assert "Did you mean 'plugins'?" in ovforge(place, "plugin", code=2).stderr


def test_a_command_that_fails_is_explained_and_its_traceback_is_there_for_who_asks(place: Path) -> None:
    explained = ovforge(place, "greet", "--fail", code=1).stderr
    assert "command 'greet' of the plugin stranger 1.2" in explained
    assert "KeyError: 'what nobody expected'" in explained
    assert "--debug" in explained
    assert "Traceback" not in explained
    traced = ovforge(place, "--debug", "greet", "--fail", code=1).stderr
    assert "Traceback" in traced
    assert "stranger_plugin.py" in traced
    missing = ovforge(place, "wave", code=1).stderr
    assert "stranger_plugin:wave" in missing
    assert "Traceback" not in missing


def test_doctor_imports_all_that_plugins_name(place: Path) -> None:
    report = ovforge(place, "plugins", "doctor", code=1).stdout
    assert "BROKEN  stranger 1.2" in report
    assert "command wave: factory: stranger_plugin:wave" in report
    assert "command greet" not in report
    assert "scheduler odd: factory: stranger_broken:Missing" in report
    assert "scheduler odd: config: nowhere.at.all:Options: it cannot be imported: No module named 'nowhere'" in report
    assert "task chore: inputs: it is not a class derived from pydantic.BaseModel" in report
    assert "transform bent: factory: 'no colon' is not a valid import string" in report
    assert "transform bent: adapter: stranger_exploding:adapter: it cannot be imported: OSError" in report
    assert "BROKEN  crashing 1.2 - it cannot be imported: ZeroDivisionError" in report
    assert "ok      schedulers" in report


def test_show_and_list_say_what_is_known(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ovforge(place, "plugins", "list").stdout
    assert "Greets, and" in listed
    assert "Crashes" in listed
    aside = ovforge(place, "plugins", "show", "crashing", code=1).stdout
    assert "set aside" in aside
    assert "ZeroDivisionError" in aside
    broken = ovforge(place, "plugins", "show", "broken", code=1).stdout
    assert "broken: scheduler odd: factory" in broken
    (place / "catalogue.toml").write_text("[plugin.far]\ndistribution = 'ovforge-far'\nentry_point = 'far'\n")
    monkeypatch.setenv("OVFORGE_REGISTRY", str(place / "catalogue.toml"))
    away = ovforge(place, "plugins", "show", "far", code=1).stdout
    assert "not installed" in away
    assert "pip install ovforge-far" in away
    assert "Greet somebody" in ovforge(place, "plugins", "show", "stranger", code=1).stdout


def test_verbose_says_what_is_imported(place: Path) -> None:
    assert "importing the plugin stranger" in ovforge(place, "-v", "greet").stderr
    assert ovforge(place, "greet").stderr == ""


@pytest.mark.parametrize(("line", "words"), [("ovforge gre", {"greet"}), ("ovforge plugins sh", {"show"})])
def test_commands_are_completed(place: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: set[str]) -> None:
    monkeypatch.setenv("_OVFORGE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    environment = {**os.environ, "PYTHONPATH": str(place)}
    program = Path(sys.executable).with_name("ovforge")
    done = subprocess.run([program], capture_output=True, text=True, check=True, env=environment)
    assert set(done.stdout.split()) == words


def test_help_imports_no_framework(place: Path) -> None:
    code = (
        "import sys\nsys.argv = ['ovforge', '--help']\nfrom ovforge.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sorted({'openvino', 'numpy', 'pydantic', 'torch', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == []


def test_an_interruption_says_what_is_kept(tmp_path: Path) -> None:
    code = (
        "import ovforge.cli.pipelines as commands\n"
        "from ovforge.cli import main\nfrom ovforge.store import Cache\n"
        "def stop() -> None:\n"
        "    Cache.default().put({'stage': 'load'}, lambda folder: (folder / 'a').write_bytes(b'a'), label='the conversion')\n"
        "    raise KeyboardInterrupt\n"
        "commands.schema = stop\nmain()"
    )
    for stored in ("the conversion", None):
        environment = {**os.environ, "OVFORGE_CACHE_DIR": str(tmp_path), "COLUMNS": "200"}
        done = subprocess.run(
            [sys.executable, "-c", code if stored else code.replace("Cache.default().put", "(lambda *a, **b: 0)"), "schema"],
            capture_output=True, text=True, check=False, env=environment,
        )  # fmt: skip
        kept = f"kept in the cache for the next run: {stored}\n" if stored else ""
        assert (done.returncode, done.stderr) == (130, f"interrupted\n{kept}")
