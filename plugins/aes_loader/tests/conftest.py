"""Keys, a cache of the test's own, and small models."""

from __future__ import annotations

from pathlib import Path

import openvino as ov
import pytest

from ovforge import testing
from ovforge_aes_loader.keys import Key, Scrypt
from ovforge_aes_loader.options import KeyOptions

CHEAP = Scrypt(log_n=14)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's cache, catalogue and keys."""
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path / "default-cache"))
    monkeypatch.setenv("OVFORGE_REGISTRY", str(tmp_path / "registry.toml"))
    for name in ("OVFORGE_KEY", "OVFORGE_KEY_FILE", "OVFORGE_PASSPHRASE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def key() -> Key:
    """Return a key."""
    return Key(KeyOptions(function=lambda: "a1" * 32))


@pytest.fixture
def other_key() -> Key:
    """Return another one."""
    return Key(KeyOptions(function=lambda: "b2" * 32))


@pytest.fixture
def passphrase() -> Key:
    """Return a passphrase."""
    return Key(KeyOptions(function=lambda: "correct horse battery staple", form="passphrase"))


@pytest.fixture
def ir(tmp_path: Path) -> Path:
    """Return an .xml with its .bin."""
    folder = tmp_path / "plain"
    folder.mkdir()
    ov.save_model(testing.small_model(), folder / "openvino_model.xml", compress_to_fp16=False)
    return folder / "openvino_model.xml"
