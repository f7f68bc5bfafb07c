"""Configs and pictures from strangers, documents out of bounds, and what the system says."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

import ovforge
from ovforge.cli import app
from ovforge.cli.system import system_error
from ovforge.cli.trust import check_output
from ovforge.config.files import apply_overrides
from ovforge.config.trust import foreign_effects, is_own
from ovforge.errors import ConfigError, InputError, ModelError, OvforgeError
from ovforge.model.sources import package_path
from ovforge.store.cache import parse_size
from ovforge.store.documents import DEPTH, parse_json, parse_object, parse_toml

BASE = {"task": "text-to-image", "load": "package:ovforge_lcm/model", "input": {"prompt": "x", "steps": 1}}


def picture(path: Path, provenance: Any) -> Path:
    information = PngInfo()
    information.add_itxt("ovforge", provenance if isinstance(provenance, str) else json.dumps(provenance))
    Image.new("RGB", (8, 8)).save(path, pnginfo=information)
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's folder, which is the current one, and a stranger's beside it."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (theirs / "own.png").write_bytes(b"own")
    (theirs / "link.png").symlink_to(tmp_path / "secret.png")
    (theirs / "inputs.jsonl").write_text('{"image": "own.png"}\n[\n{"prompt": "/etc", "image": "../secret.png"}\n')
    monkeypatch.chdir(mine)
    return mine, theirs


@pytest.mark.parametrize(
    ("change", "effect"),
    [
        ({"input": {"image": "../secret.png"}}, "reads {root}/secret.png (input.image)"),
        ({"input": {"control": [{"image": "{root}/secret.png"}]}}, "reads {root}/secret.png (input.control.image)"),
        ({"transform": [{"use": "lora", "path": "link.png"}]}, "reads {root}/secret.png (transform.path)"),
        ({"load": "/etc"}, "reads /etc (load)"),
        ({"output": "../secret.png"}, "writes {root}/secret.png (output)"),
        ({"device": {"properties": {"CACHE_DIR": "/tmp/x"}}}, "writes /tmp/x (device.properties.CACHE_DIR)"),
        ({"quality": {"max_drop": 0.1, "save": "/tmp/x"}}, "writes /tmp/x (quality.save)"),
        ({"load": {"source": "m", "key": {"command": ["rm", "x"]}}}, "runs 'rm' for a key (load.key.command)"),
        ({"load": {"source": "m", "key": {"fd": 3}}}, "reads '3' for a key (load.key.fd)"),
        ({"calibration": {"file": "inputs.jsonl"}}, "reads {root}/secret.png (calibration.file)"),
        ({"calibration": {"file": "."}}, "reads {root}/secret.png (calibration.file)"),
        ({"input": {"image": "own.png", "prompt": "/etc and ../secret.png"}}, None),
        ({"output": "x.png", "load": "package:ovforge_lcm/model"}, None),
        ({"input": {"image": "no/such", "mask": "a\0b", "more": "~nobody-has-this-name/x"}}, None),
    ],
)
def test_what_a_config_touches_outside_its_folder(
    change: dict[str, Any], effect: str | None, places: tuple[Path, Path], tmp_path: Path
) -> None:
    value = json.loads(json.dumps({**BASE, **change}).replace("{root}", str(tmp_path)))
    found = foreign_effects(places[1] / "c.toml", value, places[1])
    assert found[:1] == ([effect.replace("{root}", str(tmp_path))] if effect else [])


def test_a_strangers_config_is_refused_without_trust(places: tuple[Path, Path], tmp_path: Path) -> None:
    mine, theirs = places
    config = {**BASE, "task": "image-to-image", "input": {**BASE["input"], "image": str(tmp_path / "secret.png")}}  # type: ignore[dict-item]
    for folder in places:
        (folder / "c.json").write_text(json.dumps(config))
    refused = CliRunner().invoke(app, ["run", str(theirs / "c.json")])
    assert isinstance(refused.exception, ConfigError)
    assert "secret.png (input.image)" in str(refused.exception) and "--trust" in str(refused.exception.hint)
    for arguments in (
        [str(theirs / "c.json"), "--trust"],
        ["c.json"],
        [str(theirs / "c.json"), "-i", f"image={theirs / 'own.png'}"],
    ):
        done = CliRunner().invoke(app, ["run", *arguments])
        assert "no readable picture" in str(done.exception) or "not a readable picture" in str(done.exception)
    assert is_own(mine / "c.json") and not is_own(theirs / "c.json")
    for name, there in (("train-1.txt", False), ("train-2", True)):
        (mine / name).mkdir()
        with pytest.raises(InputError, match="is there already") if there else contextlib.nullcontext():
            check_output(theirs / "c.json", mine / "train", force=False)
    provenance = {"config": {key: BASE[key] for key in ("task", "load")}, "inputs": config["input"]}
    done = CliRunner().invoke(app, ["run", str(picture(mine / "p.png", provenance | {"base": "/"}))])
    assert "secret.png (input.image)" in str(done.exception), "a picture is never one's own"


@pytest.mark.parametrize(
    "command",
    [
        ["run", "{config}"],
        ["quantize", "{config}", "-q", "weights-int8"],
        ["benchmark", "{config}"],
        ["benchmark", "own.json", "--against", "{config}"],
        ["compare", "own.json", "{config}"],
    ],
    ids=lambda command: " ".join(command),
)
def test_every_command_that_runs_a_config_asks(command: list[str], places: tuple[Path, Path], tmp_path: Path) -> None:
    mine, theirs = places
    config = {"task": "image-to-image", "load": "missing", "input": {"image": str(tmp_path / "secret.png")}}
    (mine / "own.json").write_text(json.dumps(config))
    (theirs / "c.json").write_text(json.dumps(config))
    arguments = [part.replace("{config}", str(theirs / "c.json")) for part in command]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, ConfigError) and "not a config of your own" in str(refused.exception)
    trusted = CliRunner().invoke(app, [*arguments, "--trust"])
    assert "no such file" in str(trusted.exception), "it went on"


def test_in_python_a_picture_alone_needs_trust(places: tuple[Path, Path], tmp_path: Path) -> None:
    given = {**BASE["input"], "image": str(tmp_path / "secret.png")}  # type: ignore[dict-item]
    made = picture(places[0] / "p.png", {"config": {"task": "image-to-image", "load": "missing"}, "inputs": given})
    for opened in (ovforge.load, ovforge.prepare):
        with pytest.raises(ConfigError, match="secret.png \\(input.image\\)") as refused:
            opened(made, cache=None)
        assert "trust=True" in str(refused.value.hint)
        with pytest.raises(ConfigError, match="trust: it is of type str, and should be bool"):
            opened(made, cache=None, trust="no")
    with pytest.raises(ModelError, match="no such file"):
        ovforge.load(made, cache=None, trust=True)


def test_outputs_are_replaced_by_a_config_of_ones_own_only(places: tuple[Path, Path]) -> None:
    mine, theirs = places
    for folder in places:
        (folder / "c.json").write_text(json.dumps({**BASE, "input": {**BASE["input"], "seed": 1}, "output": "o.png"}))  # type: ignore[dict-item]
    (mine / "o.png").write_bytes(b"mine")
    refused = CliRunner().invoke(app, ["run", str(theirs / "c.json"), "-q"])
    assert isinstance(refused.exception, InputError) and (mine / "o.png").read_bytes() == b"mine"
    assert CliRunner().invoke(app, ["run", "c.json", "-q"]).exit_code == 0, "twice, if need be"
    assert (mine / "o.png").read_bytes() != b"mine"
    assert CliRunner().invoke(app, ["run", str(theirs / "c.json"), "-q", "--force"]).exit_code == 0


@pytest.mark.parametrize("parse", [parse_json, parse_toml, parse_object])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000, '{"a":' * 100_000, "x = " + "[" * 5000 + "]" * 5000, "x = " + "9" * 5000, '{"a": ' + "9" * 5000 + "}",
        '{"a": 1e999}', '{"a": NaN}', '{"a": -Infinity}', '{"a": "\\ud800"}', 'a = "\\ud800"', "\ud800", "{", "a = [", "",
        "{a = 1" + "{" * 3000,
    ],
    ids=lambda text: repr(text[:24]),
)  # fmt: skip
def test_no_document_ends_in_a_traceback(parse: Any, text: str) -> None:
    if parse is parse_toml and text == "":
        assert parse(text, "here") == {}
        return
    with pytest.raises(ConfigError, match="here: not valid"):
        parse(text, "here", error=ConfigError)


def test_the_bounds_of_documents() -> None:
    deep = lambda levels: "[" * levels + "]" * levels  # noqa: E731
    assert parse_json(deep(DEPTH), "x") and parse_json('{"é": "\\ud83d\\ude00"}', "x") == {"é": "\N{GRINNING FACE}"}
    with pytest.raises(ModelError, match="levels"):
        parse_json(deep(DEPTH + 3), "x")
    with pytest.raises(ModelError, match="longer than 3"):
        parse_json("1234", "x", size=3)
    assert parse_json("[Infinity]", "x", finite=False) == [float("inf")]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: parse_size("9" * 300),
        lambda: parse_size("٣GB"),
        lambda: package_path("package:__main__"),
        lambda: package_path("package:ovforge/../../x"),
        lambda: package_path("package:ovforge//etc/passwd"),
        lambda: apply_overrides({}, ["a=" + "9" * 5000]),
        lambda: apply_overrides({}, ["a=" + "[" * 5000]),
        lambda: apply_overrides({}, ["a=\udcff"]),
        lambda: apply_overrides({"a": []}, ["a.²=1"]),
        lambda: ovforge.plan({**BASE, "input": {"width": 65536}}, cache=None),
    ],
)
def test_odd_values_are_errors_in_words(attempt: Any) -> None:
    with pytest.raises(OvforgeError) as caught:
        attempt()
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize(
    "provenance",
    [
        "[]", "{}", "[" * 10_000, '{"config": 1, "inputs": {}}', '{"config": {}, "inputs": []}', '{"config": {}, "inputs": {}, "base": 3}',
        '{"config": {}, "inputs": {}, "base": "a\\u0000b"}', '{"config": {"input": 3}, "inputs": {"a": 1}}',
        '{"config": {"load": {"source": [1]}}, "inputs": {}, "digests": []}',
    ],
)  # fmt: skip
def test_a_pictures_provenance_of_the_wrong_shape(provenance: str, tmp_path: Path) -> None:
    with pytest.raises(OvforgeError):
        ovforge.plan(picture(tmp_path / "p.png", provenance), cache=None)


def test_the_systems_errors_have_their_hints(tmp_path: Path) -> None:
    hints = {}
    for number in (errno.EACCES, errno.ENAMETOOLONG, errno.EROFS, errno.ENOSPC, errno.ENOENT, errno.ENODEV):
        error = system_error(OSError(number, os.strerror(number), str(tmp_path)))
        assert error.where == str(tmp_path) and error.what == os.strerror(number)
        hints[number] = error.hint
    assert len(set(hints.values())) == 6
    assert "space" in str(hints[errno.ENOSPC]) and "shorter" in str(hints[errno.ENAMETOOLONG])
