"""Sources that a plugin opens, what is made from them, and files in memory. The plugin here is the smallest there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import openvino as ov
import pytest
from pydantic import BaseModel, ConfigDict

import ovforge
import ovforge_quality
import test_bundle
from ovforge import testing
from ovforge.builtin.loader import NativeLoader, NativeOptions
from ovforge.contracts.extensions import (
    GraphTransformExtension,
    LoaderExtension,
    QuantizerExtension,
    SourceExtension,
    TaskExtension,
)
from ovforge.contracts.stages import Match, Phase, Report
from ovforge.errors import ConfigError, ModelError, PluginError
from ovforge.model import memory
from ovforge.model.bundle import ModelBundle
from ovforge.model.results import Result
from ovforge.model.sources import FileSource, Source, source_digest
from ovforge.plugins.catalogue import Registry
from ovforge.plugins.manager import Plugins
from ovforge.run.pipeline import Pipeline
from ovforge.run.planning import plan
from ovforge.run.resolution import read_pipeline
from ovforge.run.session import Session
from ovforge.store.cache import Cache


def flipped(data: bytes) -> bytes:
    """Stand for a cipher: what is plain is not to be seen."""
    return bytes(np.frombuffer(data, np.uint8) ^ 0x5A)


class Protection:
    identity = "of the test"

    def write(self, folder: Path, path: str, data: bytes | memoryview, purpose: str) -> None:
        target = folder / f"{path}.flipped"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(flipped(purpose.encode().ljust(100) + bytes(data)))

    def open(self, folder: Path, purpose: str) -> Source:
        return Flipped(FileSource(folder), purpose.encode().ljust(100))


class Flipped:
    """The plain side of a folder of .flipped files, each behind `head`."""

    def __init__(self, inner: FileSource, head: bytes = b"") -> None:
        self.name, self.protection = inner.name, Protection()
        self.inner, self.head = inner, head

    def files(self) -> Mapping[str, int]:
        sizes = {p.removesuffix(".flipped"): size for p, size in self.inner.files().items() if p.endswith(".flipped")}
        return {path: size - len(self.head) for path, size in sizes.items()}

    def read(self, path: str, limit: int | None = None) -> bytes:
        data = flipped(self.inner.read(f"{path}.flipped"))
        if not data.startswith(self.head):
            raise ModelError("stored for something else", where=self.name)
        return data[len(self.head) :][:limit]

    def read_into(self, path: str, buffer: memoryview) -> None:
        buffer[:] = self.read(path)

    def local(self, path: str) -> None:
        return None

    def digest(self, path: str) -> str:
        return self.inner.digest(f"{path}.flipped")


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    word: Literal["open"] | None = None


class Opener:
    def __init__(self, options: Options) -> None:
        self.options = options

    def can_open(self, source: Source) -> bool:
        return any(path.endswith(".flipped") for path in source.files())

    def open(self, source: Source) -> Source:
        assert isinstance(source, FileSource)
        if self.options.word is None:
            raise ConfigError("the word is missing", where="load.key")
        return Flipped(source)


class Changes:
    """A transform and a quantizer; it makes the weights of the model larger."""

    made = 0

    def __init__(self, options: None) -> None: ...

    def apply(self, bundle: ModelBundle) -> Report:
        Changes.made += 1
        model = bundle.models["model"]
        constant = next(op for op in model.get_ops() if op.get_type_name() == "Constant")
        changed = ov.op.Constant(constant.data * np.float32(3))
        constant.output(0).replace(changed.output(0))
        return Report(roles=("model",), applied=["tripled"])

    def quantize(self, bundle: ModelBundle, calibration: object) -> Report:
        return self.apply(bundle)


class Inputs(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Task:
    def __init__(self, options: None, context: Any) -> None:
        self.bundle = context.bundle

    def __call__(self, inputs: Inputs, progress: object) -> Result:
        result = Result()
        result.provenance = {"y": self.bundle["model"](X)[0].tolist()}
        return result

    def examples(self, count: int) -> list[Any]:
        return []


class Converter:
    def __init__(self, options: None) -> None: ...

    def can_load(self, source: Source) -> Match:
        return Match.YES if "other.format" in source.files() else Match.NO


X = {"x": np.full((1, 4), 2, np.float32)}


def plugins(*, encryption: bool = True) -> Plugins:
    module = ModuleType("flips")

    @ovforge.hookimpl
    def ovforge_sources() -> Iterator[SourceExtension]:
        if encryption:
            yield SourceExtension(name="flip", summary="Flipped files", config=Options, factory=Opener)

    @ovforge.hookimpl
    def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
        yield GraphTransformExtension(name="triple", summary="Larger", factory=Changes, phase=Phase.FUSE)
        yield GraphTransformExtension(name="light", summary="Larger", factory=Changes, phase=Phase.FUSE, recompute=True)

    @ovforge.hookimpl
    def ovforge_quantizers() -> Iterator[QuantizerExtension]:
        yield QuantizerExtension(name="triple", summary="Larger", factory=Changes)

    @ovforge.hookimpl
    def ovforge_loaders() -> Iterator[LoaderExtension]:
        yield LoaderExtension(name="other", summary="Converts", factory=Converter, converts=True)

    @ovforge.hookimpl
    def ovforge_tasks() -> Iterator[TaskExtension]:
        yield TaskExtension(name="multiply", summary="Multiply", factory=Task, inputs=Inputs, roles=("model",))

    for hook in (ovforge_sources, ovforge_graph_transforms, ovforge_quantizers, ovforge_loaders, ovforge_tasks):
        setattr(module, hook.__name__, hook)
    found = Plugins(Registry({}), found=())
    found.register(module, "flips")
    found.register(ovforge_quality, "quality", "1.0")
    return found


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    ov.save_model(testing.small_model(), folder / "openvino_model.xml", compress_to_fp16=False)
    return folder


@pytest.fixture
def hidden(plain: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "hidden"
    folder.mkdir()
    for path in plain.iterdir():
        (folder / f"{path.name}.flipped").write_bytes(flipped(path.read_bytes()))
    return folder


KEY = {"word": "open"}


def test_sources_are_opened_by_content(plain: Path, hidden: Path) -> None:
    source = Session(plugins(), key=KEY).open_source(str(hidden), Path())
    assert source.files() == FileSource(plain).files() and source.read("openvino_model.xml", 5) == b"<?xml"
    assert isinstance(Session(plugins(), key=KEY).open_source(str(plain), Path()), FileSource)
    with pytest.raises(ConfigError, match="the word is missing"):
        Session(plugins()).open_file(hidden)
    with pytest.raises(ConfigError, match="no plugin here opens encrypted sources"):
        Session(plugins(encryption=False), key=KEY).open_source(str(plain), Path())


def test_what_stands_in_a_key_is_not_shown(hidden: Path) -> None:
    for key in ({"word": "s3cret"}, {"word": ["s3cret"]}):
        with pytest.raises(ConfigError) as caught:
            Session(plugins(), key=key).open_source(str(hidden), Path())
        assert "s3cret" not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(ConfigError, match="says where the key is, as a table") as caught:
        Pipeline("multiply", source=hidden, load={"key": "s3cret"}, plugins=plugins(), cache=None)
    assert "s3cret" not in str(caught.value)


@pytest.mark.skipif(not memory.AVAILABLE, reason="this system has no anonymous files")
@pytest.mark.parametrize("step", ["transforms", "quantize", "light"])
def test_what_is_made_from_a_hidden_model_is_stored_hidden(step: str, plain: Path, hidden: Path, cache: Cache) -> None:
    """Changed and compiled models come back out of the cache, and no plain byte of them is there."""
    steps: dict[str, Any] = {"transforms": ["light"]} if step == "light" else {step: ["triple"]}
    Changes.made = 0
    expected = [[6 * sum(range(column, 12, 3)) / 12 for column in range(3)]]
    for start in range(3):
        pipe = Pipeline("multiply", source=hidden, load={"key": KEY}, plugins=plugins(), cache=cache, **steps)
        np.testing.assert_allclose(pipe().provenance["y"], expected, rtol=1e-6)
        assert [model.cached for _, model in pipe.compiled.all()] == [start > 0]
        made = Changes.made if start == 0 else made  # noqa: F821
        assert Changes.made == made, "work was done again"
    planned = plan(
        {"task": "multiply", "load": {"source": str(hidden), "key": KEY}}
        | ({"quantize": ["triple"]} if step == "quantize" else {"transform": steps["transforms"]}),
        plugins=plugins(),
        cache=cache,
    )
    assert [stage.state for stage in planned.stages] == ["direct", "cached", "cached", "direct"]
    weights = (np.arange(12, dtype=np.float32) / 12).tobytes()
    tripled = (np.arange(12, dtype=np.float32) / 12 * np.float32(3)).tobytes()
    stored = [path for path in cache.root.rglob("*") if path.is_file()]
    for path in stored:
        data = path.read_bytes()
        assert weights not in data and tripled not in data and b"<?xml" not in data and b"<net" not in data
    names = {path.name for path in stored}
    assert names >= {"compiled.blob.flipped", "stage.json.flipped"} and "compiled.blob" not in names
    assert ("openvino_model.bin.flipped" in names) == (step != "light")


def test_without_files_in_memory_changes_are_not_stored(
    hidden: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "AVAILABLE", False)
    pipe = Pipeline("multiply", source=hidden, load={"key": KEY}, plugins=plugins(), cache=cache, transforms=["triple"])
    pipe()
    assert list(cache.root.rglob("*.flipped")) == []


def test_a_hidden_model_is_not_written_plain(hidden: Path, tmp_path: Path) -> None:
    bundle = ModelBundle.open(Session(plugins(), key=KEY).open_source(str(hidden), Path()))
    for copy in (bundle, bundle.copy()):
        with pytest.raises(ModelError, match="would be written plain"):
            copy.save(tmp_path / "saved")
    (tmp_path / "other.format.flipped").write_bytes(b"x")
    for attempt in (Pipeline, plan):
        config = {"task": "multiply", "load": {"source": str(tmp_path), "use": "other", "key": KEY}}
        with pytest.raises(ModelError, match="'other' converts, and would leave parts of an encrypted model"):
            attempt(read_pipeline(config)[0], plugins=plugins(), cache=None)  # type: ignore[operator]


def test_a_key_is_in_no_dump_and_survives_overrides(hidden: Path) -> None:
    config = read_pipeline({"task": "multiply", "load": {"source": str(hidden), "key": KEY}})[0]
    assert config.as_dict()["load"] == str(hidden) and "word" not in repr(config)
    changed = read_pipeline(config, ["strict=false"])[0]
    assert changed.load.key == KEY and changed.strict is False
    assert Pipeline(changed, plugins=plugins(), cache=None)().provenance["config"]["load"] == str(hidden)
    with pytest.raises(ConfigError, match="nothing is encrypted"):
        Pipeline("multiply", source=hidden.parent / "plain", load={"key": KEY}, plugins=plugins(), cache=None)
    with pytest.raises(PluginError, match="unknown"):
        Plugins(Registry({}), found=()).find("source", "aes")


# -- reading from memory ----------------------------------------------------------------------------------------------


class InMemory(FileSource):
    """Says of no file that it is one."""

    def local(self, path: str) -> None:
        return None


@pytest.mark.parametrize("make", ["onnx", "tensorflow_frozen_graph", "tensorflow_saved_model", "tflite", "paddle"])
def test_every_format_is_read_from_memory(make: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(test_bundle, "check", made.append)
    getattr(test_bundle, f"test_{make}")(tmp_path)
    source = InMemory(made[0] if made[0].suffix != ".pdmodel" else tmp_path)
    model = NativeLoader(NativeOptions()).load(source).models["model"]
    result = ov.compile_model(model, "CPU")(np.full((1, 3), 2, np.float32))[0]
    np.testing.assert_array_equal(result, np.full((1, 3), 4, np.float32))


@pytest.mark.skipif(not memory.AVAILABLE, reason="this system has no anonymous files")
def test_files_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"content")
    (tmp_path / "empty").write_bytes(b"")
    before = len(list(Path("/proc/self/fd").iterdir()))
    with memory.memory_folder("a test") as folder:
        for path in ("a/x", "empty"):
            folder.put(FileSource(tmp_path), path)
        assert (folder.root / "a" / "x").read_bytes() == b"content" and (folder.root / "empty").read_bytes() == b""
        folder.place("b/y").write_bytes(b"written")
        for path, expected in (("b/y", b"written"), ("a/x", b"content"), ("empty", b"")):
            with folder.content(path) as data:
                assert bytes(data) == expected
        root = folder.root
        assert all(path.is_symlink() for path in root.rglob("*") if not path.is_dir())
    assert not root.exists() and len(list(Path("/proc/self/fd").iterdir())) == before


def test_read_into(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    source = FileSource(tmp_path)
    buffer = bytearray(5)
    source.read_into("x", memoryview(buffer))
    assert buffer == b"12345"
    source.files()
    (tmp_path / "x").write_bytes(b"123456")
    for size in (5, 7):
        with pytest.raises(ModelError, match="changed while it was read"):
            source.read_into("x", memoryview(bytearray(size)))
    with pytest.raises(ModelError, match="y is missing"):
        source.read_into("y", memoryview(buffer))


def test_a_checkpoint_takes_its_tokenizer_along(tmp_path: Path) -> None:
    """Its content is part of what a conversion is found again by."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/vocab.json").write_text("{}")
    (tmp_path / "other.json").write_text("{}")
    source = FileSource(tmp_path / "model.safetensors").with_beside(["tokenizer*/*"])
    assert list(source.files()) == ["model.safetensors", "tokenizer/vocab.json"]
    before = source_digest(source)
    (tmp_path / "tokenizer/vocab.json").write_text('{"a": 1}')
    assert source_digest(FileSource(tmp_path / "model.safetensors", beside=["tokenizer*/*"])) != before
