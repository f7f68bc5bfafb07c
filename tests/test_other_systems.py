"""What Linux alone has, switched off: the other branch does the same, or says what is missing."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovforge
from ovforge import testing
from ovforge.errors import ModelError
from ovforge.model import memory
from ovforge.model.comparison import same_model
from ovforge.store import Cache, atomic_folder, files
from ovforge_aes_loader import files as encryption
from ovforge_aes_loader.keys import Key
from ovforge_aes_loader.options import KeyOptions


class WithoutRenameat2:
    """A C library that has no renameat2, as those of Windows and macOS."""


@pytest.fixture
def in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: WithoutRenameat2())


@pytest.fixture
def without_memory_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "AVAILABLE", False)
    monkeypatch.setattr(memory, "_SHARED_MEMORY", tmp_path / "no such folder")


def write(folder: Path, content: str) -> None:
    with atomic_folder(folder, replace=True) as new:
        (new / "a.txt").write_text(content)


@pytest.mark.usefixtures("in_two_steps")
def test_a_folder_is_replaced_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not files._swap(tmp_path, tmp_path)
    write(tmp_path / "model", "old")
    (tmp_path / "model" / "notes.txt").write_text("the user's")
    write(tmp_path / "model", "new")
    assert (tmp_path / "model" / "a.txt").read_text() == "new"
    assert (tmp_path / "model" / "notes.txt").read_text() == "the user's"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    rename = Path.rename

    def fails_at_the_second(self: Path, target: Path) -> Path:
        if target.name == "model" and self.suffix == ".tmp":
            raise OSError("the disk fails")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_second)
    with pytest.raises(OSError, match="the disk fails"):
        write(tmp_path / "model", "newer")
    assert (tmp_path / "model" / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("without_memory_files")
def test_an_encrypted_model_opens_without_files_in_memory_and_leaves_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_text("0f" * 32)
    secret.chmod(0o600)
    testing.small_bundle().save(tmp_path / "plain")
    encryption.encrypt(tmp_path / "plain", tmp_path / "sealed", Key(KeyOptions(file=secret)))
    cache = Cache(tmp_path / "cache")
    bundle = ovforge.open_model(tmp_path / "sealed", key={"file": str(secret)}, cache=cache)
    x = np.ones((1, 4), np.float32)
    results: list[Any] = [
        testing.run(model, {"x": x})["y"] for model in (bundle.models["model"], testing.small_model())
    ]
    np.testing.assert_array_equal(*results)
    assert not cache.entries()
    with (
        pytest.raises(ModelError, match=r"reading a\.pb takes plain files") as raised,
        memory.memory_folder("reading a.pb"),
    ):
        pass
    assert "Linux" in str(raised.value.hint)
    with pytest.raises(ModelError, match="writes temporary files"), memory.temporary_files("a tokenizer"):
        pass


@pytest.mark.usefixtures("without_memory_files")
def test_models_are_compared_without_files_in_memory() -> None:
    assert same_model(testing.small_model(), testing.small_model())
    other = testing.small_model()
    other.inputs[0].get_tensor().set_names({"z"})
    assert not same_model(testing.small_model(), other)


@pytest.mark.skipif(not memory.AVAILABLE, reason="needs memfd")
def test_links_lie_where_temporary_files_go_if_there_is_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_SHARED_MEMORY", tmp_path / "no such folder")
    with memory.memory_folder("a test") as folder:
        folder.place("a.bin").write_bytes(b"12")
        root = folder.root
        with folder.content("a.bin") as content:
            assert bytes(content) == b"12"
    assert not root.exists()
    assert root.parent != Path("/dev/shm")
