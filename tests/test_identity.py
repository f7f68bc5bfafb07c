"""What a result depends on is what was read and done: whatever changes there, the old result is not found again."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper
from openvino import opset13 as ops
from openvino._offline_transformations import apply_moc_transformations

import ovforge
from ovforge import hookimpl, testing
from ovforge.contracts import LoaderExtension, Match
from ovforge.model import FileSource, ModelBundle, source_digest
from ovforge.model.companions import companions, external_data
from ovforge.model.comparison import same_model
from ovforge.plugins import requirements
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Offer, Plugins
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


PLUGIN = """
from ovforge import hookimpl, testing
from ovforge.contracts import LoaderExtension, Match


class Load:
    def __init__(self, options): ...

    def can_load(self, source):
        return Match.YES

    def load(self, source):
        bundle = testing.small_bundle()
        bundle.configs["made"] = {"by": BY}
        return bundle


@hookimpl
def ovforge_loaders():
    yield LoaderExtension(name="all", summary="s", factory=FACTORY, converts=True)
"""


def write_plugin(folder: Path, name: str, by: int, factory: str = "Load") -> None:
    """Write a package whose loader says `by`, in another module than the hook if `factory` is an import string."""
    package = folder / name
    package.mkdir(exist_ok=True)
    text = PLUGIN.replace("BY", str(by)).replace("FACTORY", factory)
    loader, _ = text.split("@hookimpl")
    (package / "loader.py").write_text(loader)
    (package / "__init__.py").write_text(
        text if factory == "Load" else text.replace(loader, loader.partition("class")[0])
    )


@pytest.mark.parametrize("factory", ["Load", '"by_hand_named.loader:Load"'])
def test_a_plugin_without_a_version_is_known_by_its_files(
    factory: str, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "by_hand" if factory == "Load" else "by_hand_named"
    (tmp_path / "x.any").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    made = []
    for by in (1, 2, 1):
        write_plugin(tmp_path, name, by, factory)
        for module in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[module]
        importlib.invalidate_caches()
        plugins = Plugins(Registry({}), found=())
        plugins.register(importlib.import_module(name), name)
        made.append(ovforge.open_model(tmp_path / "x.any", plugins=plugins, cache=cache))
    assert [bundle.configs["made"]["by"] for bundle in made] == [1, 2, 1]
    assert len([entry for entry in cache.entries() if entry.stage == "load"]) == 2


def test_code_that_stands_in_no_file_is_known_in_its_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = LoaderExtension(name="all", summary="s", factory=lambda options: None)
    extension.factory.__module__ = "__main__"  # type: ignore[union-attr]
    monkeypatch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
    here = requirements.code_of(Offer(extension, "all", "0"))
    assert here == requirements.code_of(Offer(extension, "all", "0"))
    monkeypatch.setattr(requirements, "_THIS_PROCESS", "another")
    assert requirements.code_of(Offer(extension, "all", "0")) != here


def test_a_distribution_that_did_not_come_from_an_index_is_known_by_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    extension = LoaderExtension(name="all", summary="s", factory="local_plugin.loader:Load")
    information = tmp_path / "local_plugin-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.4\nName: local-plugin\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[ovforge]\nlocal = local_plugin\n")

    def code() -> str:
        for cached in (requirements._build, requirements._found):
            cached.cache_clear()
        importlib.invalidate_caches()
        return requirements.code_of(Offer(extension, "local", "1.0", "local-plugin"))

    write_plugin(tmp_path, "local_plugin", 1)
    assert code() == "1.0", "nothing says that it is not from an index"

    (information / "direct_url.json").write_text(json.dumps({"url": "file:///x", "dir_info": {"editable": True}}))
    first = code()
    write_plugin(tmp_path, "local_plugin", 2)
    second = code()
    write_plugin(tmp_path, "local_plugin", 1)
    assert first.startswith("1.0+")
    assert first == code() != second

    (information / "direct_url.json").write_text(json.dumps({"url": "file:///x.whl", "archive_info": {}}))
    built = set()
    for digest in ("a", "b"):
        record = f"local_plugin/__init__.py,sha256={digest},9\nlocal_plugin-1.0.dist-info/RECORD,,\n"
        (information / "RECORD").write_text(record)
        built.add(code())
    assert len(built) == 2


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


def test_models_that_differ_in_numbers_of_names_alone_are_the_same() -> None:
    """OpenVINO numbers what has no name, also where it says of which operations one was made."""

    def made(number: float) -> ov.Model:
        x = ops.parameter([1, 3], ov.Type.f32)
        x.output(0).get_tensor().set_names({"x"})
        whole = ops.add(ops.constant(np.ones((1, 3), np.float32)), ops.constant(np.full((1, 3), number, np.float32)))
        y = ops.multiply(x, whole).output(0)
        y.get_tensor().set_names({"y"})
        model = ov.Model([y], [x])
        apply_moc_transformations(model, False)
        return model

    assert same_model(made(2), made(2))
    assert not same_model(made(2), made(3))
