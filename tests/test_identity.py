"""What a result depends on is what was read and done: whatever changes there, the old result is not found again."""

from __future__ import annotations

import os
import shutil
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import ovforge
from ovforge import hookimpl, testing
from ovforge.contracts import LoaderExtension, Match
from ovforge.model import FileSource, ModelBundle, source_digest
from ovforge.model.companions import companions, external_data
from ovforge.plugins import requirements
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.run.compiled import compile_dependencies
from ovforge.run.identity import load_dependencies
from ovforge.run.resolution import resolve_source
from ovforge.run.session import Session
from ovforge.store import Cache


def external_onnx(folder: Path, scale: float, location: str = "weights/e.data") -> Path:
    """Write y = scale * x, with the scale in another file."""
    tensor = numpy_helper.from_array(np.full(4, scale, np.float32), "w")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="16")
    tensor.ClearField("raw_data")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "scaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [tensor],
    )
    path = folder / "model.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    )
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    (folder / location).write_bytes(np.full(4, scale, np.float32).tobytes())
    return path


def test_weights_in_other_files_count(tmp_path: Path, cache: Cache) -> None:
    path = external_onnx(tmp_path, 2.0)
    assert external_data(path) == ["weights/e.data"]
    before = ovforge.open_model(path, cache=cache)
    y = testing.run(before.models["model"], {"x": np.ones((1, 4), np.float32)})["y"]
    assert np.all(y == 2)
    (tmp_path / "weights/e.data").write_bytes(np.full(4, 3, np.float32).tobytes())
    after = ovforge.open_model(path, cache=cache)
    assert after.identity != before.identity
    assert np.all(testing.run(after.models["model"], {"x": np.ones((1, 4), np.float32)})["y"] == 3)


def test_paths_that_leave_the_folder_are_no_companions(tmp_path: Path) -> None:
    for location in ("../secret", "/etc/passwd", "a/../../secret"):
        folder = tmp_path / "m"
        folder.mkdir(exist_ok=True)
        path = external_onnx(folder, 1.0, "e.data")
        path.write_bytes(path.read_bytes().replace(b"\x06e.data", bytes([len(location)]) + location.encode()))
        assert external_data(path) == []
    assert onnx.__version__


def test_a_saved_model_takes_its_variables_along(tmp_path: Path) -> None:
    for name in ("saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001", "other.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    path = tmp_path / "saved_model.pb"
    assert [file.name for file in companions(path)] == ["variables.data-00000-of-00001", "variables.index"]
    before = source_digest(FileSource(path))
    (tmp_path / "variables/variables.index").write_bytes(b"2")
    assert source_digest(FileSource(path)) != before


def test_a_file_of_the_same_size_and_time_is_another(tmp_path: Path, cache: Cache, monkeypatch: Any) -> None:
    monkeypatch.setattr("ovforge.store.digests.DigestMemo._RACY", 0.0)
    file, other = tmp_path / "a.bin", tmp_path / "b.bin"
    file.write_bytes(b"one")
    other.write_bytes(b"two")
    for path in (file, other):
        os.utime(path, (1000, 1000))
    before = FileSource(file, memo=cache.memo).digest("a.bin")
    shutil.copy2(other, file)  # as cp -p: the same size, times and inode
    assert FileSource(file, memo=cache.memo).digest("a.bin") != before


class Load:
    def __init__(self, options: Any) -> None: ...

    def can_load(self, source: Any) -> Match:
        return Match.YES

    def load(self, source: Any) -> ModelBundle:
        return testing.small_bundle()


@hookimpl
def ovforge_loaders() -> Any:
    yield LoaderExtension(name="all", summary="s", factory=Load, converts=True)


def test_the_versions_of_what_a_plugin_requires_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.any").write_text("")
    module = types.ModuleType("loads")
    module.ovforge_loaders = ovforge_loaders  # type: ignore[attr-defined]
    plugins = Plugins(Registry({}), found=())
    plugins._add(module, "loads", "1.0", "ovforge-nncf")

    def key() -> Any:
        return load_dependencies(resolve_source(Session(plugins), str(tmp_path / "x.any"), tmp_path))["requires"]

    assert "nncf" in key(), "though only its distribution says so"
    real = requirements._metadata
    requirements._requirements.cache_clear()
    monkeypatch.setattr(
        requirements,
        "_metadata",
        lambda name: real(name).replace("Version: 3", "Version: 99") if name == "nncf" else real(name),
    )
    assert key()["nncf"].startswith("99")
    requirements._requirements.cache_clear()


def test_the_processors_instructions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    from ovforge.contracts import DevicePlan
    from ovforge.model import runtime

    plan = DevicePlan("CPU", {}, "a processor", "f32", True)
    runtime.instruction_set.cache_clear()
    before = compile_dependencies("unet", "x", plan, None)
    runtime.instruction_set.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert compile_dependencies("unet", "x", plan, None) != before
    runtime.instruction_set.cache_clear()
