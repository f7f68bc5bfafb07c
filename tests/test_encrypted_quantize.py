"""An encrypted model is refused by `ovforge quantize` before any work, since the result would be plain."""

from __future__ import annotations

from pathlib import Path

import openvino as ov
import pytest
from typer.testing import CliRunner

from ovforge import testing
from ovforge.cli import app
from ovforge.errors import ModelError

command = pytest.importorskip("ovforge_quality.command")
files = pytest.importorskip("ovforge_aes_loader.files")


@pytest.mark.parametrize("named", ["folder", "key in a config"])
def test_it_is_refused_before_it_is_quantized(named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovforge_aes_loader.keys import Key
    from ovforge_aes_loader.options import KeyOptions

    plain, sealed, config = tmp_path / "plain", tmp_path / "enc", tmp_path / "pipeline.toml"
    plain.mkdir()
    ov.save_model(testing.small_model(), plain / "openvino_model.xml")
    files.encrypt(plain, sealed, Key(KeyOptions(function=lambda: "a1" * 32)))
    monkeypatch.setenv("OVFORGE_KEY", "a1" * 32)
    config.write_text('task = "detect"\n[load]\nsource = "enc"\nkey = {env = "OVFORGE_KEY"}\n')
    begun: list[str] = []
    for name in ("_prepare", "_prepare_model"):
        monkeypatch.setattr(command, name, lambda *_, name=name: begun.append(name))
    source = sealed if named == "folder" else config
    trust = ["--trust"] if source == config else []
    arguments = ["quantize", str(source), "-q", "nncf-weights", "-o", str(tmp_path / "q"), *trust]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, ModelError) and "would be plain" in str(done.exception), done.exception
    assert not begun and not (tmp_path / "q").exists()
