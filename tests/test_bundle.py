"""Folders: ours, optimum-intel's, and every format that OpenVINO reads."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from ovforge import testing
from ovforge.builtin.loader import NativeLoader, NativeOptions
from ovforge.contracts.stages import Match
from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle, path_of, role_of
from ovforge.model.sources import FileSource
from ovforge.run.session import Session

LOADER = NativeLoader(NativeOptions())


def bundle() -> ModelBundle:
    made = ModelBundle(index={"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    for role in ("unet", "vae_decoder", "text_encoder"):
        made.models[role] = testing.small_model()
        made.configs[role] = {"width": len(role)}
    made.assets = {"scheduler/scheduler_config.json": b'{"a": 1}', "tokenizer/merges.txt": "é\n".encode()}
    return made


def run(model: ov.Model) -> np.ndarray:
    return ov.compile_model(model, "CPU")({"x": np.ones((2, 4), np.float32)})["y"]


def test_a_folder_is_what_was_saved_and_plain_openvino_opens_it(tmp_path: Path) -> None:
    bundle().save(tmp_path / "model")
    again = ModelBundle.open(FileSource(tmp_path / "model"))
    assert (again.index, again.configs, again.assets) == (bundle().index, bundle().configs, bundle().assets)
    for role in bundle().models:
        np.testing.assert_array_equal(run(again.models[role]), run(testing.small_model()))
        np.testing.assert_array_equal(
            run(ov.Core().read_model(tmp_path / "model" / role / "openvino_model.xml")), run(testing.small_model())
        )
    again.save(tmp_path / "again")
    files = sorted(path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for file in files:
        assert (tmp_path / "model" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_identity_is_content(tmp_path: Path) -> None:
    made = bundle()
    made.models["vae_decoder"] = made.models["unet"]
    made.save(tmp_path / "one")
    made.save(tmp_path / "two")
    one, two = (ModelBundle.open(FileSource(tmp_path / name)) for name in ("one", "two"))
    assert one.digest() == two.digest()
    assert one.identity["unet"] == one.identity["vae_decoder"], "the same model under two roles"
    (tmp_path / "two" / "tokenizer" / "merges.txt").write_text("other")
    assert ModelBundle.open(FileSource(tmp_path / "two")).digest() != one.digest()


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("unet/openvino_model.xml", "unet"),
        ("tokenizer_2/openvino_tokenizer.xml", "tokenizer_2"),
        ("tokenizer/openvino_detokenizer.xml", "detokenizer"),
        ("openvino_model.xml", "model"),
        ("openvino_encoder_model.xml", "encoder"),
        ("openvino_tokenizer.xml", "tokenizer"),
    ],
)
def test_roles_of_optimums_folders(path: str, role: str) -> None:
    from pathlib import PurePosixPath

    assert role_of(PurePosixPath(path)) == role
    if "/" in path:
        assert path_of(role).as_posix() == path


def test_saving_over_a_folder_keeps_the_old_one_until_the_new_is_whole(tmp_path: Path) -> None:
    bundle().save(tmp_path / "model")
    with pytest.raises(FileExistsError):
        bundle().save(tmp_path / "model")
    broken = bundle()

    def fail() -> ov.Model:
        raise RuntimeError("conversion")

    broken.models.lazy("vae_encoder", fail)
    with pytest.raises(RuntimeError, match="conversion"):
        broken.save(tmp_path / "model", replace=True)
    assert ModelBundle.open(FileSource(tmp_path / "model")).configs == bundle().configs
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-made is left"


def test_a_process_killed_while_saving_leaves_no_folder(tmp_path: Path) -> None:
    code = """
import sys, time, pathlib
from ovforge import testing
bundle = testing.small_bundle()
def slow():
    pathlib.Path(sys.argv[2]).touch(); time.sleep(60)
bundle.models.lazy("unet", slow)
bundle.save(pathlib.Path(sys.argv[1]))
"""
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "model", tmp_path / "mark"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "mark").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "model").exists()


def test_lazy_models_are_made_when_needed_and_released() -> None:
    made = []
    lazy = ModelBundle()
    lazy.models.lazy("unet", lambda: made.append(1) or testing.small_model())
    assert list(lazy.models) == ["unet"]
    assert "unet" in lazy.models
    lazy.require("unet")
    assert made == []
    assert lazy.models["unet"] is lazy.models["unet"]
    lazy.models.release("unet")
    assert lazy.models["unet"]
    assert len(made) == 2


@pytest.mark.parametrize("keep", [0, 10, -10])
def test_truncated_weights_are_said(tmp_path: Path, keep: int) -> None:
    bundle().save(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match="unet/openvino_model.xml: layer .* the .bin has") as raised:
        run(ModelBundle.open(FileSource(tmp_path / "model")).models["unet"])
    assert "missing or cut off" in str(raised.value)


def test_damaged_files_are_said(tmp_path: Path) -> None:
    bundle().save(tmp_path / "model")
    (tmp_path / "model" / "unet" / "openvino_model.xml").write_text("<net")
    with pytest.raises(ModelError, match="not valid XML"):
        ModelBundle.open(FileSource(tmp_path / "model")).models["unet"]
    (tmp_path / "model" / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="unet/config.json: not valid JSON"):
        ModelBundle.open(FileSource(tmp_path / "model"))


def test_a_source_in_memory_loads_as_files_do(tmp_path: Path) -> None:
    bundle().save(tmp_path / "model")

    class Memory(FileSource):
        """Stands for an encrypted store: there are no plain files."""

        def local(self, path: str) -> None:
            return None

    opened = ModelBundle.open(Memory(tmp_path / "model"))
    np.testing.assert_array_equal(run(opened.models["unet"]), run(testing.small_model()))
    assert opened.location == {}


def test_sources_inside_packages() -> None:
    source = Session().open_source("package:ovforge/builtin", Path())
    assert "loader.py" in source.files()
    with pytest.raises(ModelError, match="'no_such_package' is not installed"):
        Session().open_source("package:no_such_package/x", Path())


# -- other formats --------------------------------------------------------------------------------------------------


def check(path: Path) -> None:
    source = FileSource(path)
    assert LOADER.can_load(source) is Match.YES
    loaded = LOADER.load(source)
    model = loaded.models["model"]
    result = ov.compile_model(model, "CPU")(np.full((1, 3), 2, np.float32))[0]
    np.testing.assert_array_equal(result, np.full((1, 3), 4, np.float32))
    loaded.save(path.parent / "saved")
    assert ModelBundle.open(FileSource(path.parent / "saved")).models["model"]


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    check(tmp_path / "m.onnx")


def field(number: int, value: bytes | int | str) -> bytes:
    """Encode a protobuf field: a varint, or something with a length."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def tensorflow_graph() -> bytes:
    """Return a GraphDef of y = x + x (tensorflow/core/framework/graph.proto)."""
    of_type = lambda name: field(5, field(1, name) + field(2, field(6, 1)))  # noqa: E731  DT_FLOAT
    shape = field(5, field(1, "shape") + field(2, field(7, field(2, field(1, 1)) + field(2, field(1, 3)))))
    x = field(1, "x") + field(2, "Placeholder") + of_type("dtype") + shape
    y = field(1, "y") + field(2, "AddV2") + field(3, "x") + field(3, "x") + of_type("T")
    return field(1, x) + field(1, y)


def test_tensorflow_frozen_graph(tmp_path: Path) -> None:
    (tmp_path / "m.pb").write_bytes(tensorflow_graph())
    check(tmp_path / "m.pb")


def test_tensorflow_saved_model(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    folder.mkdir()
    tensor = lambda name: field(1, name) + field(2, 1) + field(3, field(2, field(1, 1)) + field(2, field(1, 3)))  # noqa: E731
    entry = lambda number, name, value: field(number, field(1, name) + field(2, value))  # noqa: E731
    signature = entry(1, "x", tensor("x:0")) + entry(2, "y", tensor("y:0")) + field(3, "tensorflow/serving/predict")
    meta = field(1, field(4, "serve")) + field(2, tensorflow_graph()) + entry(5, "serving_default", signature)
    (folder / "saved_model.pb").write_bytes(field(1, 1) + field(2, meta))
    check(folder)


def test_tflite(tmp_path: Path) -> None:
    flatbuffers = pytest.importorskip("flatbuffers")
    tflite = pytest.importorskip("tflite")
    b = flatbuffers.Builder(256)

    def vector(items: list[int], start: object) -> int:
        start(b, len(items))  # type: ignore[operator]
        for item in reversed(items):
            b.PrependInt32(item)
        return b.EndVector()

    def offsets(items: list[int], start: object) -> int:
        start(b, len(items))  # type: ignore[operator]
        for item in reversed(items):
            b.PrependUOffsetTRelative(item)
        return b.EndVector()

    names = [b.CreateString("x"), b.CreateString("y")]
    tflite.BufferStart(b)
    buffers = offsets([tflite.BufferEnd(b)], tflite.ModelStartBuffersVector)
    tensors = []
    for name in names:
        shape = vector([1, 3], tflite.TensorStartShapeVector)
        tflite.TensorStart(b)
        tflite.TensorAddShape(b, shape)
        tflite.TensorAddType(b, tflite.TensorType.FLOAT32)
        tflite.TensorAddBuffer(b, 0)
        tflite.TensorAddName(b, name)
        tensors.append(tflite.TensorEnd(b))
    tensors_vector = offsets(tensors, tflite.SubGraphStartTensorsVector)
    tflite.AddOptionsStart(b)
    options = tflite.AddOptionsEnd(b)
    ins, outs = vector([0, 0], tflite.OperatorStartInputsVector), vector([1], tflite.OperatorStartOutputsVector)
    tflite.OperatorStart(b)
    tflite.OperatorAddOpcodeIndex(b, 0)
    tflite.OperatorAddInputs(b, ins)
    tflite.OperatorAddOutputs(b, outs)
    tflite.OperatorAddBuiltinOptionsType(b, tflite.BuiltinOptions.AddOptions)
    tflite.OperatorAddBuiltinOptions(b, options)
    operators = offsets([tflite.OperatorEnd(b)], tflite.SubGraphStartOperatorsVector)
    ins, outs = vector([0], tflite.SubGraphStartInputsVector), vector([1], tflite.SubGraphStartOutputsVector)
    tflite.SubGraphStart(b)
    tflite.SubGraphAddTensors(b, tensors_vector)
    tflite.SubGraphAddInputs(b, ins)
    tflite.SubGraphAddOutputs(b, outs)
    tflite.SubGraphAddOperators(b, operators)
    graphs = offsets([tflite.SubGraphEnd(b)], tflite.ModelStartSubgraphsVector)
    tflite.OperatorCodeStart(b)
    tflite.OperatorCodeAddDeprecatedBuiltinCode(b, tflite.BuiltinOperator.ADD)
    tflite.OperatorCodeAddVersion(b, 1)
    codes = offsets([tflite.OperatorCodeEnd(b)], tflite.ModelStartOperatorCodesVector)
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    tflite.ModelAddOperatorCodes(b, codes)
    tflite.ModelAddSubgraphs(b, graphs)
    tflite.ModelAddBuffers(b, buffers)
    b.Finish(tflite.ModelEnd(b), b"TFL3")
    (tmp_path / "m.tflite").write_bytes(bytes(b.Output()))
    check(tmp_path / "m.tflite")


def test_paddle(tmp_path: Path) -> None:
    """A ProgramDesc of y = scale(x, 2) (paddle/fluid/framework/framework.proto)."""
    tensor = field(1, 5) + field(2, 1) + field(2, 3)  # FP32, dimensions 1 and 3
    variable = lambda name: field(3, field(1, name) + field(2, field(1, 7) + field(3, field(1, tensor))))  # noqa: E731
    kinds = [field(3, field(1, name) + field(2, field(1, kind))) for name, kind in (("feed", 9), ("fetch", 10))]
    argument = lambda number, parameter, name: field(number, field(1, parameter) + field(2, name))  # noqa: E731
    integer = lambda name, value: field(4, field(1, name) + field(2, 0) + field(3, value))  # noqa: E731
    real = lambda name, value: field(  # noqa: E731
        4, field(1, name) + field(2, 1) + varint(4 << 3 | 5) + np.float32(value).tobytes()
    )
    flag = field(4, field(1, "bias_after_scale") + field(2, 6) + field(10, 1))
    operation = lambda kind, *parts: field(4, b"".join(parts) + field(3, kind))  # noqa: E731
    block = (
        field(1, 0) + field(2, 0) + b"".join([*kinds, variable("x"), variable("y")])
        + operation("feed", argument(1, "X", "feed"), argument(2, "Out", "x"), integer("col", 0))
        + operation("scale", argument(1, "X", "x"), argument(2, "Out", "y"), real("scale", 2.0), real("bias", 0.0), flag)
        + operation("fetch", argument(1, "X", "y"), argument(2, "Out", "fetch"), integer("col", 0))
    )  # fmt: skip
    (tmp_path / "m.pdmodel").write_bytes(field(1, block) + field(4, field(1, 0)))
    (tmp_path / "m.pdiparams").write_bytes(b"")
    check(tmp_path / "m.pdmodel")


def test_several_models_in_a_folder_must_be_chosen_from(tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=r"expected one model, found a.onnx, b.onnx"):
        LOADER.load(FileSource(tmp_path))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.json").write_text(json.dumps({}))
    assert LOADER.can_load(FileSource(tmp_path / "c")) is Match.NO
