"""Finding plugins: only those asked for are imported; the unfit are set aside, and the rest goes on."""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import ovforge
from ovforge import testing
from ovforge.cli import app
from ovforge.config.schema import config_schema
from ovforge.errors import ConfigError, ModelError, PluginError
from ovforge.model import FileSource
from ovforge.plugins.catalogue import Registry, set_enabled
from ovforge.plugins.manager import Plugins
from ovforge.run.resolution import find_loader
from ovforge.run.session import Session

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
    "misnamed": (GOOD.format(name="Bad Name"), "is not a valid extension name"),
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
        ("[plugin.a]\nentry_point = 3", "`entry_point` must be text"),
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


ODD_FILES = {
    "damaged": b"[plugin",
    "latin-1": "[plugin.caf\u00e9]\nenabled = false".encode("latin-1"),
    "utf-16": "x = 1".encode("utf-16"),
    "binary": bytes(range(256)),
    "wrong-type": b"plugin = 3",
    "list": b"plugin = [1, 2]",
    "table": b"[plugin]\na = 3",
    "deep": b"x = " + b"[" * 100_000,
    "digits": b"x = " + b"1" * 5_000,
    "escape": b"[plugin.a]\nentry_point = 'x'\nsummary = \"\\u001b[2J\"",
    "name": b"[plugin.a]\nentry_point = 'x'\nprovides.command = { 'Not A Name' = 'x' }",
}


@pytest.mark.parametrize("name", [*ODD_FILES, "folder", "unreadable"])
def test_a_broken_catalogue_stops_neither_doctor_nor_help(tmp_path: Path, monkeypatch, name: str) -> None:
    path = tmp_path / "mine.toml"
    if name == "folder":
        path.mkdir()
    elif name == "unreadable":
        path.symlink_to(path)
    else:
        path.write_bytes(ODD_FILES[name])
    monkeypatch.setenv("OVFORGE_REGISTRY", str(path))
    with pytest.raises(ConfigError) as raised:
        Registry.load()
    assert str(path) in str(raised.value)
    doctor = CliRunner().invoke(app, ["plugins", "doctor"])
    assert doctor.exit_code == 1, doctor.output
    assert "ok      schedulers" in doctor.stdout
    assert str(path) in doctor.stdout.partition("your own catalogue: BROKEN")[2]
    listed = CliRunner().invoke(app, ["--help"])
    assert listed.exit_code == 0
    assert "detect" in listed.stdout
    before = None if name in ("folder", "unreadable") else path.read_bytes()
    with pytest.raises(ConfigError):
        set_enabled("schedulers", False)
    assert before is None or path.read_bytes() == before
    # A command of a plugin that the file may switch off does not run; ours do.
    assert isinstance(CliRunner().invoke(app, ["encrypt", "--help"]).exception, ConfigError)


NAMES = st.from_regex(r"[a-z0-9]+(-[a-z0-9]+)?", fullmatch=True)


@settings(max_examples=60)
@given(st.dictionaries(NAMES, st.booleans(), max_size=4), NAMES, st.booleans(), st.integers(0, 3), st.booleans())
def test_switching_keeps_every_other_byte_of_the_file(
    plugins, name: str, enabled: bool, style: int, crlf: bool
) -> None:
    lines = ["# mine, and not to be lost", ""]
    for plugin, on in plugins.items():
        value = str(on).lower()
        lines += (
            [f"[plugin.{plugin}]  # why", f"enabled   =   {value} # since spring", ""],
            [f'plugin."{plugin}".enabled = {value} # dotted'],
            [f'[plugin."{plugin}"]', 'entry_point = "x"', f"enabled={value}", "provides.command = { }"],
            [f'[plugin."{plugin}"]', "# only a comment", f"enabled = {value}"],
        )[style]
    text = ("\r\n" if crlf else "\n").join(lines)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "registry.toml"
        path.write_bytes(text.encode())
        before = tomllib.loads(text).get("plugin", {})
        set_enabled(name, enabled, path)
        after = path.read_bytes().decode()
        expected = {**before, name: {**before.get(name, {}), "enabled": enabled}}
        assert tomllib.loads(after)["plugin"] == expected
        if name not in plugins:
            assert after.startswith(text)
        for line in lines:
            if "#" in line:
                assert line[line.index("#") :] in after
        set_enabled(name, enabled, path)
        assert path.read_bytes().decode() == after, "a second time changes nothing"


def test_comments_of_the_users_file_survive_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text("# kept\n[plugin.one]\nentry_point = 'x'  # too\n")
    (tmp_path / "link.toml").symlink_to("real.toml")
    set_enabled("one", False, tmp_path / "link.toml")
    assert (tmp_path / "link.toml").is_symlink()
    assert (tmp_path / "real.toml").read_text() == "# kept\n[plugin.one]\nentry_point = 'x'  # too\nenabled = false\n"


NEEDY = """
from ovforge import hookimpl
from ovforge.contracts import LoaderExtension, Match
from pydantic import BaseModel, ConfigDict

class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    token: str

class Loader:
    def __init__(self, options):
        self.token = options.token
    def can_load(self, source):
        raise AssertionError("it must not be asked")
    def load(self, source):
        raise AssertionError

@hookimpl
def ovforge_loaders():
    yield LoaderExtension(name="{name}", summary="Needs a token", config={config}, factory={factory})
"""


@pytest.mark.parametrize(
    ("config", "factory", "reason"),
    [
        ("Options", "Loader", "needy has options without a default: load.use names it"),
        ("'nowhere:Options'", "Loader", "nowhere:Options: it cannot be imported: No module named 'nowhere'"),
        ("None", "'json:NoSuchLoader'", "NoSuchLoader"),
        ("None", "'not an import string'", "is not a valid import string"),
    ],
)
def test_a_loader_that_cannot_look_does_not_stop_the_search(
    install, tmp_path: Path, config: str, factory: str, reason: str
) -> None:
    plugins = install(needy=NEEDY.format(name="needy", config=config, factory=factory))
    testing.small_bundle().save(tmp_path / "model")
    session = Session(plugins)
    assert find_loader(FileSource(tmp_path / "model"), None, session).extension.name == "openvino"
    assert find_loader(FileSource(tmp_path / "model"), "needy", session).extension.name == "needy"
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ModelError, match="no loader knows") as raised:
        find_loader(FileSource(tmp_path / "x.txt"), None, session)
    assert reason in str(raised.value)


KEYED = NEEDY.replace("LoaderExtension", "SourceExtension").replace("ovforge_loaders", "ovforge_sources")


def test_a_source_that_needs_a_key_does_not_stop_others(install, tmp_path: Path) -> None:
    plugins = install(keyed=KEYED.format(name="keyed", config="Options", factory="Loader"))
    testing.small_bundle().save(tmp_path / "model")
    assert ovforge.open_model(tmp_path / "model", cache=None, plugins=plugins).models
    assert ovforge.describe_protection(str(tmp_path / "model"), tmp_path, plugins) == ()
    with pytest.raises(ConfigError, match="unknown key `tokn`. Did you mean 'token'"):
        ovforge.open_model(tmp_path / "model", key={"tokn": "x"}, cache=None, plugins=plugins)


def test_the_schema_leaves_out_what_is_broken_and_says_so(install) -> None:
    plugins = install(needy=NEEDY.format(name="needy", config="'nowhere:Options'", factory="Loader"))
    with pytest.warns(UserWarning, match="the loader 'needy' of the plugin 'needy' is left out"):
        schema = config_schema(plugins)
    names = schema["properties"]["load"]["anyOf"][1]["properties"]["use"]["enum"]
    assert "openvino" in names
    assert "needy" not in names


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
        assert {kind: set(names) for kind, names in record.provides.items()} == offered.get(name, {})
        assert statuses[name].distribution == record.distribution
        assert plugins._installed[name].value == record.entry_point
        for kind, names in record.provides.items():
            for extension, summary in names.items():
                assert plugins.find(kind, extension).extension.summary == summary
