"""Compiled models that are read before anybody asks for them: the same ones, only sooner."""

from __future__ import annotations

import json
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13 as ops
from pydantic import BaseModel, ConfigDict

import ovforge
from ovforge import hookimpl
from ovforge.contracts.extensions import TaskExtension
from ovforge.model.results import Result
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.store.cache import CacheWarning


class Inputs(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    x: float = 1.0
    words: str = ""


class Product(Result):
    value: float = 0.0


class Multiply:
    def __init__(self, options: Any, context: Any) -> None:
        self.began(context)
        self._model = context.bundle["model"]

    began: Callable[[Any], None] = staticmethod(lambda context: None)

    def __call__(self, inputs: Inputs, progress: Any) -> Product:
        result = Product()
        result.value = float(self._model([np.full((1, 4), inputs.x, np.float32)])[0].sum())
        return result


@pytest.fixture
def plugins() -> Plugins:
    module = types.ModuleType("multiply")

    @hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        yield TaskExtension(name="multiply", summary="Multiply", factory=Multiply, inputs=Inputs, roles=("model",))

    module.ovforge_tasks = ovforge_tasks  # type: ignore[attr-defined]
    made = Plugins(Registry({}), found=())
    made.register(module, "multiply")
    return made


class Reads:
    """How many compiled models were read, and one release of the semaphore for each."""

    def __init__(self) -> None:
        self.count, self.done = 0, threading.Semaphore(0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found, read = Reads(), ov.Core.import_model

    def counted(*arguments: Any, **options: Any) -> Any:
        model = read(*arguments, **options)
        found.count += 1
        found.done.release()
        return model

    monkeypatch.setattr(ov.Core, "import_model", counted)
    return found


@pytest.fixture
def start(tmp_path: Path, plugins: Plugins) -> Callable[..., ovforge.Pipeline]:
    write(tmp_path / "model", 2.0)

    def load(**options: Any) -> ovforge.Pipeline:
        cache = ovforge.Cache(tmp_path / "cache")
        return ovforge.Pipeline("multiply", source=tmp_path / "model", plugins=plugins, cache=cache, **options)

    return load


def write(folder: Path, factor: float) -> None:
    x = ops.parameter([1, 4], np.float32, name="x")
    folder.mkdir(exist_ok=True)
    ov.save_model(ov.Model([ops.multiply(x, np.float32(factor))], [x], "m"), folder / "openvino_model.xml", False)


def test_the_second_start_reads_before_the_task_asks(
    start: Callable[..., ovforge.Pipeline], reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(input={"words": "a"})(3.0).value == 24.0  # type: ignore[attr-defined]
    assert reads.count == 0, "the first start compiles"

    def wait(context: Any) -> None:
        assert reads.done.acquire(timeout=60), "nothing asked for the model yet, and it is read"

    monkeypatch.setattr(Multiply, "began", staticmethod(wait))
    pipe = start(input={"words": "b"}, output="elsewhere.json")
    assert pipe(3.0).value == 24.0  # type: ignore[attr-defined]
    assert reads.count == 1, "what is read ahead is not read again"
    assert [role.cached for _, role in pipe.compiled.all()] == [True]


def test_what_changed_meanwhile_is_not_used(
    tmp_path: Path, start: Callable[..., ovforge.Pipeline], reads: Reads
) -> None:
    start()(1.0)
    write(tmp_path / "model", 5.0)
    assert start()(1.0).value == 20.0  # type: ignore[attr-defined]
    assert start(device=ovforge.Use("cpu", threads=1))(1.0).value == 20.0  # type: ignore[attr-defined]
    before = json.loads((tmp_path / "cache" / "starts.json").read_text())
    assert len(before) == 1, "a config with numbers among the device's properties is not remembered"
    reads.count = 0
    assert start()(1.0).value == 20.0  # type: ignore[attr-defined]
    assert reads.count == 1, "the start after a change remembers what it used"


def test_a_damaged_model_is_made_again(tmp_path: Path, start: Callable[..., ovforge.Pipeline]) -> None:
    start()(1.0)
    (blob,) = (tmp_path / "cache").rglob("compiled.blob")
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.warns(CacheWarning, match="has changed"):
        assert start()(1.0).value == 8.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "form", ["", "[", "[1]", '{"NAME": 5}', '{"NAME": [5]}', '{"NAME": ["../../model"]}', "[" * 9999]
)
def test_a_memory_that_says_anything_else_is_not_believed(
    tmp_path: Path, start: Callable[..., ovforge.Pipeline], form: str
) -> None:
    memory = tmp_path / "cache" / "starts.json"
    start()(1.0)
    memory.write_text(form.replace("NAME", next(iter(json.loads(memory.read_text())))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start()(1.0).value == 8.0  # type: ignore[attr-defined]
    assert [len(keys) for keys in json.loads(memory.read_text()).values()] == [1]


def test_configs_that_come_later_push_out_the_first(
    tmp_path: Path, start: Callable[..., ovforge.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovforge.run.ahead._STARTS", 3)
    for x in range(5):
        start(input={"x": float(x)})
    assert len(json.loads((tmp_path / "cache" / "starts.json").read_text())) == 3
