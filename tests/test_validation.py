"""Models that OpenVINO refuses, with its reason; and those that would end the process there."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino as ov
import pytest
from onnx import TensorProto, helper
from openvino import opset6 as ops

from ovforge.errors import InputError, ModelError
from ovforge.model import FileSource, probing, read_model
from ovforge.model.reasons import reason_of
from ovforge.model.validation import check_ir
from ovforge.run.compiled import _reshaped
from ovforge.store.digests import DigestMemo
from ovforge.store.processes import run_python


@pytest.fixture
def ir(tmp_path: Path) -> Path:
    """A graph with a constant and a state."""
    x = ops.parameter([1, 4], np.float32, name="x")
    state = ops.read_value(ops.constant(np.zeros((1, 4), np.float32)), "v", ov.Type.f32, [1, 4])
    total = ops.add(x, state)
    path = tmp_path / "m.xml"
    ov.save_model(ov.Model([ops.result(total)], [ops.assign(total, "v")], [x]), path, compress_to_fp16=False)
    return path


def read(path: Path) -> ov.Model:
    return read_model(FileSource(path), path.name)


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        ('type="Const"', 'type="Constant"', '"Constant", which is "Const"'),
        ('variable_id="v"', "", "has no variable_id"),
        ('offset="0"', 'offset="1"', "end at byte 17, and the .bin has 16"),
        ('size="16"', 'size="-1"', "its size is '-1'"),
        ('shape="1,4"', f'shape="{2**31},{2**31},9"', "more elements than any memory"),
        ('shape="1,4"', 'shape="0,99999999999999999999999"', "more elements than any memory"),
        ("<layers>", "<!DOCTYPE net [<!ENTITY a 'b'>]><layers>", "declares a document type"),
        ("<net", "<set", "begins with <set>|not valid XML"),
        ("</edges>", "", "not valid XML"),
        (r'<\?xml version="1.0"\?>', '<?xml version="1.0" encoding="klingon"?>', "not valid XML"),
        ("<layers>", f"{'<a>' * 300}{'</a>' * 300}<layers>", "more than 200 levels"),
        ("<layers>", f"<layers>{'<a>' * 10**6}{'</a>' * 10**6}", "more than 200 levels|not valid XML"),
    ],
)
def test_a_graph_that_ends_the_process_is_an_error(ir: Path, pattern: str, replacement: str, message: str) -> None:
    text = ir.read_text()
    changed = re.sub(pattern, lambda _: replacement, text)
    assert changed != text
    ir.write_text(changed)
    with pytest.raises(ModelError, match=message):
        read(ir)


@pytest.mark.parametrize(("kind", "inputs"), [("Broadcast", 1), ("MaxPool", 0), ("Slice", 3)])
def test_inputs_that_openvino_does_not_count(kind: str, inputs: int) -> None:
    ports = "".join(f'<port id="{n}" precision="FP32"/>' for n in range(inputs))
    layer = f'<layer id="0" name="x" type="{kind}" version="opset8"><input>{ports}</input></layer>'
    with pytest.raises(ModelError, match=f"it has {inputs} inputs, and {kind} takes at least {inputs + 1}"):
        check_ir(f'<net name="m" version="11"><layers>{layer}</layers></net>'.encode(), 0, "here")


def test_what_openvino_writes_passes(ir: Path) -> None:
    """The state's graph, and every graph that ships with the plugins here."""
    assert read(ir).get_parameters()
    shipped = list(Path(__file__).parents[1].glob("plugins/*/src/*/model/*/*.xml"))
    assert len(shipped) > 5
    for path in shipped:
        weights = path.with_suffix(".bin")
        check_ir(path.read_bytes(), weights.stat().st_size if weights.exists() else 0, path.name)


def write_onnx(path: Path, operation: str, weights: str | None = None, **attributes: int) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy")
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1, 3], [1, 2, 3])
    if weights is not None:
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", weights
    node = helper.make_node(operation, ["x", "w"] if weights else ["x"], ["y"], **attributes)
    onnx.save_model(helper.make_model(helper.make_graph([node], "g", [x], [y], [tensor] if weights else [])), path)
    return path


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def test_openvinos_reason_and_the_right_hint(tmp_path: Path, ir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "probe", lambda source, path: None)  # it says nothing of reasons, and takes time
    short = write(tmp_path / "w.data", b"1234")
    unknown = ir.with_name("unknown.xml")
    unknown.write_text(ir.read_text().replace('type="Add"', 'type="Nonsense"'))
    (tmp_path / "unknown.bin").write_bytes(ir.with_suffix(".bin").read_bytes())
    cases = [
        (write_onnx(tmp_path / "a.onnx", "NoSuchOp"), "No conversion rule found for operations: NoSuchOp", "operation"),
        (write_onnx(tmp_path / "b.onnx", "Softmax", axis=7), r"Axis 7 out of the tensor rank range \[-2, 1\]", "export|update"),
        (write_onnx(tmp_path / "c.onnx", "Add", "no.data"), "external data.*no.data", "in the model's own folder"),
        (write_onnx(tmp_path / "d.onnx", "Add", "../../x"), "outside the base directory", "in the model's own folder"),
        (write_onnx(tmp_path / "e.onnx", "Add", short.name), "does not match the byte size", "in the model's own folder"),
        (unknown, "doesn't contain the operation with type: Nonsense", "does not know this operation"),
        (write(tmp_path / "f.onnx", b""), "Unable to read the model", "not a file of this format"),
        (write(tmp_path / "g.pb", b"junk" * 10), "Unable to read the model", "not a file of this format"),
        (write(tmp_path / "h.pdmodel", b"junk" * 10), "Model can't be parsed", "not a file of this format"),
        (write(tmp_path / "i.tflite", b"\x1c\0\0\0TFL3" + b"\0" * 30), "has no subgraphs", "not a file of this format"),
    ]  # fmt: skip
    for path, reason, hint in cases:
        with pytest.raises(ModelError, match=reason) as caught:
            read(path)
        assert re.search(hint, str(caught.value.hint)), (path.name, caught.value.hint)
        assert not re.search("Exception from|FrontEnd API|Summary", str(caught.value)), str(caught.value)


def test_a_message_that_is_not_text_is_shown(ir: Path) -> None:
    error = UnicodeDecodeError("utf-8", b"Exception from x.cpp:1:\nbad \xff name", 27, 28, "invalid")
    assert reason_of(error) == "bad \N{REPLACEMENT CHARACTER} name"
    ir.write_bytes(ir.read_bytes().replace(b'type="Add"', b'type="Nons\xff"'))
    with pytest.raises(ModelError, match="not valid XML"):
        read(ir)


def test_elements_of_any_graph_survive_a_round_trip(ir: Path) -> None:
    """What ElementTree writes of a graph is read like what OpenVINO writes: the check does not depend on layout."""
    tree = ET.parse(ir)
    tree.write(ir)
    assert read(ir).get_parameters()


# -- other formats ----------------------------------------------------------------------------------------------------


def onnx_file(path: Path, inputs: int, opset: int = 17) -> Path:
    """Write a Pad, which takes two inputs or more."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])
    pads = helper.make_tensor("pads", TensorProto.INT64, [4], [0, 1, 0, 1])
    node = helper.make_node("Pad", ["x", "pads"][:inputs], ["y"])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [value], [result], [pads])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_model_that_ends_openvino_ends_another_process(tmp_path: Path) -> None:
    path = onnx_file(tmp_path / "m.onnx", inputs=1)
    with pytest.raises(ModelError, match="m.onnx: OpenVINO crashes on it"):
        read(path)


def test_a_model_that_openvino_never_ends_with_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_SECONDS", 2.0)
    with pytest.raises(ModelError, match="m.onnx: OpenVINO did not come to an end with it in 2 s"):
        read(onnx_file(tmp_path / "m.onnx", inputs=2, opset=2**31))


def test_a_model_is_probed_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def run(arguments: list[str], **options: Any) -> Any:
        started.append(arguments[-1])
        return run_python(arguments, **options)

    monkeypatch.setattr(probing, "run_python", run)
    memo = DigestMemo(tmp_path / "cache" / "digests.json")
    path = onnx_file(tmp_path / "m.onnx", inputs=2)
    for _ in range(2):
        assert read_model(FileSource(path, memo=memo), path.name)
    assert len(started) == 1
    onnx_file(path, inputs=2, opset=18)
    assert read_model(FileSource(path, memo=memo), path.name)
    assert len(started) == 2
    trusted = FileSource(path)
    trusted.trusted = True
    assert read_model(trusted, path.name)
    assert len(started) == 2


def test_shapes_that_a_model_cannot_work_with_are_named() -> None:
    one, other = (ops.parameter([1, -1], ov.Type.f32, name) for name in ("one", "other"))
    model = ov.Model([ops.result(ops.add(one, other))], [one, other])
    for port, name in zip(model.inputs, ("one", "other"), strict=True):
        port.get_tensor().set_names({name})
    with pytest.raises(InputError, match=r"(?s)unet: .*one \[1, 2\], other \[1, 3\].*Take another size"):
        _reshaped(model, "unet", {"one": (1, 2), "other": (1, 3)})
    assert _reshaped(model, "unet", {"one": (1, 3), "other": (1, 3)}).outputs[0].get_shape() == ov.Shape([1, 3])
