"""Finding plugins: only those asked for are imported; the unfit are set aside, and the rest goes on."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ovforge.errors import ConfigError, PluginError
from ovforge.plugins.catalogue import Registry, set_enabled
from ovforge.plugins.manager import Plugins

GOOD = """
from ovforge import hookimpl
from ovforge.contracts.extensions import SchedulerExtension
@hookimpl
def ovforge_schedulers():
    yield SchedulerExtension(name="{name}", summary="A scheduler", factory="nowhere:Nothing")
"""

UNFIT = {
    "crashing": ("raise RuntimeError('no such library')", "cannot be imported: RuntimeError: no such library"),
    "leaving": ("raise SystemExit(3)", "cannot be imported: SystemExit"),
    "future": ("OVFORGE_API = 2\n" + GOOD.format(name="future"), "version 2 of the plugin API, and this is 1"),
    "twice": (
        GOOD.format(name="twice") + "    yield SchedulerExtension(name='twice', summary='Again', factory='a:B')\n",
        "offers the scheduler 'twice' twice",
    ),
    "stranger": ("from ovforge import hookimpl\n@hookimpl\ndef ovforge_nonsense():\n    yield 1\n", "ovforge_nonsense"),
    "wrong": (
        "from ovforge import hookimpl\n@hookimpl\ndef ovforge_tasks():\n    yield 'text'\n",
        "yields str, not TaskExtension",
    ),
    "raising": (
        "from ovforge import hookimpl\n@hookimpl\ndef ovforge_tasks():\n    yield 1 / 0\n",
        "ZeroDivisionError",
    ),
    "misnamed": (GOOD.format(name="Bad Name"), "is no extension name"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """Return a function that writes plugin modules and gives Plugins that find them."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(catalogue: str = "", **sources: str) -> Plugins:
        for name, source in sources.items():
            (tmp_path / f"test_plugin_{name}.py").write_text(source)
        (tmp_path / "catalogue.toml").write_text(catalogue)
        found = [EntryPoint(name, f"test_plugin_{name}", "ovforge") for name in sources]
        return Plugins(Registry.load(tmp_path / "catalogue.toml"), found)

    return make


def imported() -> set[str]:
    return {name.removeprefix("test_plugin_") for name in sys.modules if name.startswith("test_plugin_")}


@pytest.fixture(autouse=True)
def _forget_modules() -> None:
    for name in list(sys.modules):
        if name.startswith("test_plugin_"):
            del sys.modules[name]


def test_only_what_is_asked_for_is_imported(install) -> None:
    catalogue = "[plugin.one]\nentry_point='x'\nprovides.scheduler={first='A'}\n[plugin.two]\nentry_point='x'\nprovides.scheduler={second='B'}\n"
    plugins = install(
        catalogue, one=GOOD.format(name="first"), two=GOOD.format(name="second"), other=GOOD.format(name="third")
    )
    assert plugins.find("scheduler", "second").plugin == "two"
    assert imported() == {"two"}
    assert plugins.find("scheduler", "third").plugin == "other"
    assert imported() == {"two", "other"}
    assert {offer.extension.name for offer in plugins.all("scheduler")} == {"first", "second", "third"}


@pytest.mark.parametrize("name", UNFIT)
def test_the_unfit_are_set_aside_with_their_reason(install, name: str) -> None:
    source, reason = UNFIT[name]
    plugins = install(good=GOOD.format(name="good"), **{name: source})
    assert plugins.find("scheduler", "good").plugin == "good"
    plugins.import_all()
    statuses = {status.name: status for status in plugins.statuses()}
    assert statuses[name].state == "set aside"
    assert reason in statuses[name].reason
    assert statuses["good"].state == "imported"


def test_a_name_offered_twice_stays_with_the_first(install) -> None:
    plugins = install(aaa=GOOD.format(name="same"), bbb=GOOD.format(name="same"))
    assert plugins.find("scheduler", "same").plugin == "aaa"
    statuses = {status.name: status for status in plugins.statuses()}
    assert statuses["bbb"].reason == "it offers the scheduler 'same', which 'aaa' offers already"


def test_a_stranger_cannot_take_a_catalogued_name(install) -> None:
    catalogue = "[plugin.zzz]\nentry_point='x'\nprovides.scheduler={mine='A'}\n"
    plugins = install(catalogue, aaa=GOOD.format(name="mine"), zzz=GOOD.format(name="mine"))
    with pytest.raises(PluginError):
        plugins.find("scheduler", "nothing")  # imports the strangers first
    assert plugins.find("scheduler", "mine").plugin == "zzz"


def test_unknown_names_say_what_to_do(install) -> None:
    catalogue = "[plugin.far]\ndistribution='ovforge-far'\nentry_point='x'\nprovides.scheduler={distant='A'}\n"
    plugins = install(catalogue, good=GOOD.format(name="good"), crashing=UNFIT["crashing"][0])
    with pytest.raises(PluginError, match=r"Did you mean 'good'\?") as raised:
        plugins.find("scheduler", "goood")
    assert "Set aside: crashing" in str(raised.value)
    with pytest.raises(PluginError, match="pip install ovforge-far"):
        plugins.find("scheduler", "distant")


def test_switching_off_and_on(install, tmp_path: Path) -> None:
    catalogue = "[plugin.one]\nentry_point='x'\nprovides.scheduler={first='A'}\n"
    install(catalogue, one=GOOD.format(name="first"))
    set_enabled("one", False, tmp_path / "catalogue.toml")
    found = [EntryPoint("one", "test_plugin_one", "ovforge")]
    off = Plugins(Registry.load(tmp_path / "catalogue.toml"), found)
    with pytest.raises(PluginError, match="ovforge plugins enable one"):
        off.find("scheduler", "first")
    assert imported() == set()
    set_enabled("one", True, tmp_path / "catalogue.toml")
    assert Plugins(Registry.load(tmp_path / "catalogue.toml"), found).find("scheduler", "first")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "unknown key 'x'"),
        ("[plugin.a]\nsumary = 'x'", "Did you mean 'summary'"),
        ("[plugin.a]\nsummary = 'x'", "needs `entry_point`"),
        ("[plugin.a]\nentry_point = 3", "`entry_point` must be a str"),
        ("[plugin.a]\nentry_point='x'\nprovides.tusk={a='b'}", "unknown kind 'tusk'"),
        ("[plugin", "not valid TOML"),
    ],
)
def test_a_wrong_catalogue_is_an_error_that_names_the_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        Registry.load(path)
    assert str(path) in str(raised.value)


def test_the_catalogue_says_what_the_plugins_really_offer() -> None:
    """registry.toml against what every plugin of this house registers."""
    registry = Registry.load(Path("there is no such file"))
    plugins = Plugins(registry)
    plugins.import_all()
    offered: dict[str, dict[str, set[str]]] = {}
    for (kind, name), offer in plugins._offers.items():
        offered.setdefault(offer.plugin, {}).setdefault(kind, set()).add(name)
    statuses = {status.name: status for status in plugins.statuses()}
    for name, record in registry.records.items():
        assert statuses[name].state == "imported", statuses[name].reason
        assert {kind: set(names) for kind, names in record.provides.items()} == offered[name]
        assert statuses[name].distribution == record.distribution
        assert plugins._installed[name].value == record.entry_point
        for kind, names in record.provides.items():
            for extension, summary in names.items():
                assert plugins.find(kind, extension).extension.summary == summary
