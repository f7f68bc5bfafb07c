"""Where keys are, how they are written, and that they are never shown."""

from __future__ import annotations

import base64
import copy
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ovforge
from ovforge import testing
from ovforge.config.options import validate_options
from ovforge.config.pipeline import PipelineConfig
from ovforge.errors import ConfigError, OvforgeError, PluginError
from ovforge_aes_loader import files
from ovforge_aes_loader.keys import Key, Master, default_keys
from ovforge_aes_loader.opener import AesOpener
from ovforge_aes_loader.options import KeyOptions, place_of

RAW = bytes(range(32))
FORMS = [RAW.hex(), RAW.hex().upper() + "\n", base64.b64encode(RAW).decode(), base64.b64encode(RAW).decode() + "\r\n"]


def key(**options: Any) -> Key:
    return Key(KeyOptions(**options))


@pytest.mark.parametrize("text", FORMS)
def test_places_and_forms(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", text)
    assert key(env="PLACE").raw(32) == RAW
    file = tmp_path / "key"
    file.write_text(text)
    file.chmod(0o600)
    assert key(file=file).raw(32) == RAW
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    piped = key(fd=reading)
    assert piped.raw(32) == piped.raw(32) == RAW  # read once
    os.close(reading)
    assert key(command=("cat", str(file))).raw(32) == RAW
    assert key(function=lambda: text).raw(32) == key(function=text.encode).raw(32) == RAW


def test_raw_keys_and_sizes() -> None:
    assert key(function=lambda: RAW).raw(32) == RAW
    assert key(function=lambda: RAW + b"\n", form="auto").raw(32) == RAW
    assert key(function=lambda: b"sixteen letters!").raw(16) == b"sixteen letters!"
    for form, size in (("hex", 31), ("base64", 32), ("raw", 16)):
        with pytest.raises(ConfigError, match="expected"):
            key(function=lambda: "0f" * 32, form=form).raw(size)
    with pytest.raises(ConfigError, match="a passphrase is given where a key is wanted"):
        key(function=lambda: "x", form="passphrase").raw(32)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o620, 0o610, 0o777])
def test_a_file_that_others_can_use_is_refused(mode: int, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(RAW.hex())
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"its mode is {mode:04o}") as caught:
        key(file=file).raw(32)
    assert "chmod 600" in str(caught.value)
    file.chmod(0o400)
    assert key(file=file).raw(32) == RAW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env": "NO_SUCH_VARIABLE"}, "environment variable NO_SUCH_VARIABLE: it is not set"),
        ({"file": "no/such/file"}, "cannot be read: No such file"),
        ({"file": "/dev"}, "cannot be read: Is a directory"),
        ({"file": "/dev/zero"}, "not a regular file"),
        ({"fd": 987}, "cannot be read: Bad file descriptor"),
        ({"command": ["false"]}, "the command false: it ended with exit code 1"),
        ({"command": ["no-such-command"]}, "there is no such program"),
        ({"command": ["true"]}, "nothing is there"),
        ({"command": ["head", "-c", "5000", "/dev/zero"]}, "nothing is there|more than 4096"),
        ({"function": lambda: ""}, "nothing is there"),
        ({}, "no key is given"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        key(**options).raw(32)
    assert caught.value.hint


def test_the_systems_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = pytest.importorskip("keyring")

    class Memory(keyring.backend.KeyringBackend):  # type: ignore[misc, name-defined]
        priority = 1

        def get_password(self, service: str, username: str) -> str | None:
            if service == "locked":
                raise keyring.errors.KeyringLocked(RAW.hex())
            return RAW.hex() if (service, username) == ("models", "me/too") else None

        def set_password(self, service: str, username: str, password: str) -> None:
            raise NotImplementedError

    keyring.set_keyring(Memory())
    assert key(keyring="models/me/too").raw(32) == RAW
    with pytest.raises(ConfigError, match="it is not there"):
        key(keyring="models/you").raw(32)
    with pytest.raises(ConfigError, match="the keyring failed: KeyringLocked"):
        key(keyring="locked/x").raw(32)
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(PluginError, match="needs the package keyring"):
        key(keyring="models/me").raw(32)


SECRET = "c0ffee" * 10 + "1234"
"""64 digits: a key that is planted where it could come out."""


def attempts(tmp_path: Path) -> list[Callable[[], object]]:
    """Return mistakes in which the key itself stands in all kinds of places."""
    file = tmp_path / "key"
    file.write_text(SECRET)
    file.chmod(0o600)
    options = [
        {"env": SECRET}, {"file": SECRET}, {"keyring": SECRET}, {"keyring": f"{SECRET}/{SECRET}"}, {"command": [SECRET]},
        {"iv": SECRET}, {"cipher": SECRET}, {"digest": SECRET}, {"fd": SECRET}, {"form": SECRET}, {"iterations": SECRET},
        {"env": "A", "file": SECRET},
    ]  # fmt: skip
    attempts: list[Callable[[], object]] = []
    for option in options:
        attempts.append(
            lambda said=option: Key(validate_options(KeyOptions, said, where="load.key", secret=True)).raw(32)  # type: ignore[misc, arg-type]
        )
    attempts += [
        lambda: PipelineConfig.of({"task": "x", "load": {"source": "x", "key": SECRET}}),
        lambda: PipelineConfig.of({"task": "x", "load": {"source": "x", "key": [SECRET]}}),
        lambda: place_of(SECRET),
        lambda: place_of(f"hex:{SECRET}"),
        lambda: place_of(f"fd:{SECRET}"),
        lambda: key(file=file).raw(16),
        lambda: key(file=file, form="base64").raw(32),
        lambda: key(file=file, form="passphrase").raw(32),
        lambda: key(file=file).passphrase(),
        lambda: key(command=("sh", "-c", f"echo {SECRET}; false")).raw(32),
        lambda: key(function=lambda: int(SECRET + "z")).raw(32),
        lambda: pickle.dumps(key(function=lambda: SECRET)),
        lambda: pickle.dumps(Master.of(bytes.fromhex(SECRET))),
        lambda: copy.deepcopy(Master.of(bytes.fromhex(SECRET))),
    ]
    return attempts


def test_mistakes_do_not_show_the_key(tmp_path: Path) -> None:
    tried = attempts(tmp_path)
    for attempt in tried:
        with pytest.raises((OvforgeError, TypeError, PluginError)) as caught:
            attempt()
        shown = "".join(traceback.format_exception(caught.value))
        shown = "".join(line for line in shown.splitlines(True) if "SECRET" not in line)  # the lines of this test
        assert SECRET not in shown and str(bytes.fromhex(SECRET)) not in shown, shown


def test_nothing_that_is_printed_is_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", SECRET)
    found = key(env="PLACE")
    master = found.new_master()
    for thing in (found, found.options, master, vars(found)["options"], str(found), f"{master!r}"):
        assert SECRET not in repr(thing) and str(bytes.fromhex(SECRET)) not in repr(thing)
    assert "secret=" not in repr(master)
    config = PipelineConfig.of({"task": "x", "load": {"source": "y", "key": {"env": "PLACE"}}})
    assert config.load.key == {"env": "PLACE"}
    assert "PLACE" not in repr(config) and "PLACE" not in str(config.as_dict()) and config.as_dict()["load"] == "y"


def test_keys_in_default_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(default_keys()) == []
    monkeypatch.setenv("OVFORGE_KEY", SECRET)
    monkeypatch.setenv("OVFORGE_PASSPHRASE", "words")
    monkeypatch.setenv("OVFORGE_KEY_FILE", "/nowhere")
    assert [known.is_passphrase for known in default_keys()] == [False, False, True]


@pytest.mark.parametrize(("place", "asks"), [({"env": "X"}, False), ({"command": ("pass",)}, True), ({}, False)])
def test_an_opener_says_whether_it_would_ask(place: dict[str, Any], asks: bool) -> None:
    assert AesOpener(KeyOptions(**place)).asks is asks


def test_a_plan_runs_no_command_for_a_key(tmp_path: Path) -> None:
    testing.small_bundle().save(tmp_path / "plain")
    files.encrypt(tmp_path / "plain", tmp_path / "enc", Key(KeyOptions(function=lambda: SECRET)))
    command = ["sh", "-c", f"touch {tmp_path}/ran; echo {SECRET}"]
    config = {"task": "detect", "load": {"source": str(tmp_path / "enc"), "key": {"command": command}}}
    first, *rest = ovforge.plan(config).stages
    assert (first.stage, first.state) == ("load", "to do") and "a plan asks nobody" in first.why
    assert {stage.why for stage in rest if stage.state == "to do"} == {"after the stage before it"}
    assert not (tmp_path / "ran").exists()
