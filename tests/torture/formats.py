"""What is bent and how it is used: a sound file, its change, and the command that reads it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from . import mutate

__all__ = ["FORMATS", "Format"]

ROOT = Path(__file__).parents[2]
KEY = "0f" * 32
PLAN = ["plan", "{file}", "--no-cache"]
PLAN_OF_IT = ["plan", "c.json", "--no-cache"]
CONFIG = {
    "task": {"use": "text-to-image"}, "load": {"source": "package:ovforge_lcm/model"}, "scheduler": {"use": "lcm"},
    "device": {"use": "cpu", "precision": "f32", "threads": 2}, "transform": [{"use": "clip-skip", "layers": 1}],
    "input": {"prompt": "x", "steps": 1, "seed": 1, "width": 64, "height": 64}, "output": "o.png",
}  # fmt: skip
Change = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Format:
    """One kind of input.

    `make` writes sound files into a folder; `file` is the one that `change` bends; `command` reads it. `{file}` stands for
    its path, and `arguments` may add what is drawn. `same` names a file that must hold `expected` whenever the command
    succeeds: anything else is a wrong result.
    """

    name: str
    make: Callable[[Path], None]
    file: str
    change: Change
    command: list[str]
    arguments: Callable[[Random], list[str]] = lambda random: []
    environment: Mapping[str, str] = field(default_factory=dict)
    same: tuple[str, str] | None = None


@cache
def _tests(path: str) -> Any:
    """Import a file of tests, whose makers are used here."""
    name = f"torture_{Path(path).stem}"
    found = importlib.util.spec_from_file_location(name, ROOT / path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _write(name: str, content: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        data = content() if callable(content) else content
        (folder / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())

    return make


def _toml(folder: Path) -> None:
    import tomlkit

    (folder / "c.toml").write_bytes(tomlkit.dumps(CONFIG).encode())


def _picture(suffix: str, text: str = "") -> Callable[[], bytes]:
    def encode() -> bytes:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        buffer, information = io.BytesIO(), PngInfo()
        if text:
            information.add_itxt("ovforge", text)
        image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
        Image.init()
        options = {"pnginfo": information} if suffix == ".png" else {}
        image.save(buffer, Image.EXTENSION[suffix], **options)
        return buffer.getvalue()

    return encode


PROVENANCE = json.dumps(
    {"config": {key: CONFIG[key] for key in ("task", "load", "scheduler", "device")}, "inputs": CONFIG["input"], "base": ".",
     "digests": {"unet": "0" * 64}, "versions": {"ovforge": "0.1.0"}, "precision": {"unet": "f32"},
     "device": {"name": "CPU", "full_name": "x"}, "controls": {}, "adapters": {"style": {"weight": 1.0}}}
)  # fmt: skip


def _ir(folder: Path) -> None:
    import numpy as np
    import openvino as ov
    from openvino import opset6 as old
    from openvino import opset13 as ops

    x = ops.parameter([1, 3, 8, 8], np.float32, name="x")
    filters = ops.constant(np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32))
    y = ops.relu(ops.convolution(x, filters, [1, 1], [1, 1], [1, 1], [1, 1]))
    y = ops.reshape(y, ops.constant(np.array([1, -1], np.int64)), False)
    state = old.read_value(ops.constant(np.zeros((1, 256), np.float32)), "v", ov.Type.f32, [1, 256])
    total = ops.add(y, state)
    small = ops.constant(np.random.default_rng(0).integers(-8, 8, (256, 4)).astype(np.int8))
    z = ops.matmul(total, ops.multiply(ops.convert(small, "f32"), ops.constant(np.float32(0.1))), False, False)
    parts = ops.split(ops.softmax(z, 1), ops.constant(1), 2)
    model = ov.Model([ops.result(port) for port in parts.outputs()], [old.assign(total, "v")], [x])
    ov.save_model(model, folder / "m.xml", compress_to_fp16=False)


def _of_bundle(name: str) -> Callable[[Path], None]:
    return lambda folder: getattr(_tests("tests/test_bundle.py"), name)(folder)


def _onnx(folder: Path) -> None:
    """A graph of operations that take several inputs, with branches and a loop."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, node = np.random.default_rng(0), helper.make_node
    value = lambda name, kind=TensorProto.FLOAT, shape=None: helper.make_tensor_value_info(name, kind, shape)  # noqa: E731
    constants: dict[str, Any] = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "pads": np.array([0, 0, 0, 0, 0, 0, 1, 1]), "flat": np.array([1, -1]),
        "matrix": rng.standard_normal((324, 8)).astype(np.float32), "trip": np.array(3), "yes": np.array(True), "two": np.array([2]),
        "scale": np.float32(0.1), "zero": np.uint8(3),
    }  # fmt: skip
    body = helper.make_graph(
        [node("Identity", ["c"], ["go"]), node("Add", ["a", "a"], ["b"])], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("a")], [value("go", TensorProto.BOOL, []), value("b")],
    )  # fmt: skip
    then, other = (helper.make_graph([node(kind, ["p"], [kind])], kind, [], [value(kind)]) for kind in ("Relu", "Neg"))
    nodes = [
        node("Pad", ["x", "pads"], ["padded"]), node("Conv", ["padded", "w"], ["c1"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        node("Reshape", ["c1", "flat"], ["f"]), node("QuantizeLinear", ["f", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"]), node("MatMul", ["d", "matrix"], ["m"]), node("Softmax", ["m"], ["p"], axis=-1),
        node("If", ["yes"], ["branch"], then_branch=then, else_branch=other), node("Loop", ["trip", "yes", "branch"], ["l"], body=body),
        node("TopK", ["l", "two"], ["y", "places"]),
    ]  # fmt: skip
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [value("x", shape=[1, 3, 8, 8])], [value("y")], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")


def _lora(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": np.ones((4, 112), np.float32), f"{name}.lora_up.weight": np.ones((112, 4), np.float32),
               f"{name}.alpha": np.array(4, np.float32)}  # fmt: skip
    tags = json.dumps({"folder": {"cat": 3}})
    save_file(
        tensors, folder / "m.safetensors", {"ss_tag_frequency": tags, "ss_network_dim": "4", "ss_network_alpha": "4"}
    )


def _fused(folder: Path) -> None:
    _lora(folder)
    config = {**CONFIG, "transform": [{"use": "lora", "path": "m.safetensors"}]}
    (folder / "c.json").write_text(json.dumps(config))


def _calibrated(folder: Path) -> None:
    lines = [{"prompt": "a cat", "steps": 2}, {"prompt": "a dog", "seed": 3}, {"prompt": "x", "width": 64}]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {**CONFIG, "quantize": ["nncf-ptq"], "calibration": {"file": "in.jsonl", "samples": 2}}
    (folder / "c.json").write_text(json.dumps(config))


def _peft(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{name}.lora_A.weight": np.ones((4, 32), np.float32),
        f"{name}.lora_B.weight": np.ones((32, 4), np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "alpha_pattern": {"to_q": 2}}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"rank_pattern": {}, "use_rslora": False, "bias": "none"})
    )


def _embedding(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"emb_params": np.ones((2, 128), np.float32)}, folder / "word.safetensors")
    config = {**CONFIG, "transform": [{"use": "textual-inversion", "path": "word.safetensors", "token": "<w>"}]}
    (folder / "c.json").write_text(json.dumps(config))


def _model(folder: Path) -> None:
    """Copy the embedded model's small files; link the large ones."""
    import ovforge_lcm

    source = Path(str(ovforge_lcm.__file__)).parent / "model"
    for path in source.rglob("*"):
        target = folder / "model" / path.relative_to(source)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".bin", ".xml"):
                target.symlink_to(path)
            else:
                shutil.copy(path, target)


def _described(folder: Path) -> None:
    described = _tests("plugins/detection/tests/test_model_proc.py")
    described.write_model(folder / "model", *described.yolo_v8())
    (folder / "p.png").write_bytes(_picture(".png")())


def _labelled(folder: Path) -> None:
    _described(folder)
    proc = folder / "model" / "model-proc.json"
    described = json.loads(proc.read_text())
    post = described["output_postproc"]
    entry = post[0] if isinstance(post, list) else post
    entry.pop("labels", None)
    entry["labels_file"] = "labels.txt"
    proc.write_text(json.dumps(described))
    (folder / "model" / "labels.txt").write_text("cat\ndog\nbird\n")


def _detected(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _described(folder)
        (folder / f"in{suffix}").write_bytes(_picture(suffix)())

    return make


def _encrypted(folder: Path) -> None:
    from ovforge_aes_loader import files
    from ovforge_aes_loader.keys import Key
    from ovforge_aes_loader.options import KeyOptions

    os.environ["OVFORGE_KEY"] = KEY
    (folder / "plain.txt").write_bytes(bytes(range(256)) * 300)
    files.encrypt(folder / "plain.txt", folder / "x.ovenc", Key(KeyOptions(env="OVFORGE_KEY")))


def _openssl(folder: Path) -> None:
    from ovforge_aes_loader import files
    from ovforge_aes_loader.keys import Key
    from ovforge_aes_loader.options import KeyOptions

    os.environ["OVFORGE_PASSPHRASE"] = "secret"
    (folder / "plain.json").write_bytes(json.dumps({"a": list(range(500))}).encode())
    options = KeyOptions(env="OVFORGE_PASSPHRASE", form="passphrase", cipher="aes-256-cbc", iterations=1000)
    files.encrypt_openssl(folder / "plain.json", folder / "x.json.enc", Key(options))


def _npy() -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.ones((1, 3, 8, 8), np.uint8))
    return buffer.getvalue()


def _with_ir(name: str, content: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _ir(folder)
        _write(name, content)(folder)

    return make


REGISTRY = b'[plugin.lcm]\nenabled = true\n[plugin.mine]\ndistribution = "x"\nentry_point = "x"\nsummary = "x"\nneeds = ["y"]\nprovides.task = { a = "b" }\n'
BENCH = ["benchmark", "-m", "m.xml", "-niter", "1", "-nireq", "1", "-nthreads", "1"]
RUN = ["run", "c.json", "-q", "-o", "out.png"]


def _run_model(folder: Path) -> None:
    _model(folder)
    (folder / "c.json").write_text(json.dumps({**CONFIG, "transform": [], "load": "model", "scheduler": None} | {}))
    config = {key: value for key, value in {**CONFIG, "load": "model"}.items() if key not in ("scheduler", "transform")}
    (folder / "c.json").write_text(json.dumps(config))


def _masked(folder: Path) -> None:
    (folder / "p.png").write_bytes(_picture(".png")())
    (folder / "mask.png").write_bytes(_picture(".png")())
    config = {
        **CONFIG,
        "task": "inpainting",
        "transform": [],
        "input": {**CONFIG["input"], "image": "p.png", "mask": "mask.png"},
    }
    (folder / "c.json").write_text(json.dumps(config))


def _flags(random: Random) -> list[str]:
    names = ["-shape", "-data_shape", "-b", "-layout", "-ip", "-op", "-iop", "-mean_values", "-scale_values", "-hint", "-infer_precision",
             "-nstreams", "-nthreads", "-niter", "-t", "-i", "-api", "-d", "-report_type", "-pin", "-latency_percentile", "-max_irate",
             "-lfile", "-pc", "-pcsort", "-inference_only", "-extensions", "--within", "--role", "--key", "--runs", "--trust", "-s"]  # fmt: skip
    values = ["[1,3,8,8]", "[?,?]", "x[1,3,8,8]", "[-1]", "NCHW", "x:f32", "u8", "[1,1,1]", "x[0,0,0]", "inf", "nan", "latency", "none", "1e9",
              "AUTO:CPU", "HETERO:CPU,CPU", "MULTI:", "CPU.9", "detailed_counters", "YES"]  # fmt: skip
    return [
        part
        for _ in range(random.choice([1, 1, 2, 3]))
        for part in (
            random.choice(names),
            random.choice(values) if random.random() < 0.6 else mutate.odd_text(random),
        )
    ]


def _overrides(random: Random) -> list[str]:
    keys = ["input.steps", "input.seed", "input.width", "input.prompt", "scheduler.use", "scheduler", "load", "load.source", "load.key", "device.threads",
            "transform.0.layers", "transform.1.use", "transform.9", "task", "quality.min_score", "calibration.samples", "output", "", ".", "a..b", "transform.-1"]  # fmt: skip
    value = mutate.odd(random)
    text = random.choice(
        [
            str(value),
            json.dumps(value) if not isinstance(value, float) else repr(value),
            "9" * 5000,
            "[" * 3000,
            '"\\ud800"',
            "{a=",
        ]
    )
    return ["--set", f"{random.choice(keys)}={text}"]


def _report(folder: Path) -> None:
    from typer.testing import CliRunner

    from ovforge.cli import app

    _ir(folder)
    arguments = ["-m", str(folder / "m.xml"), *BENCH[3:], "-o", str(folder / "r.json")]
    done = CliRunner().invoke(app, ["benchmark", *arguments])
    assert done.exit_code == 0, done.output


def _kept(data: bytes, random: Random) -> bytes:
    return data


def _places(random: Random) -> list[str]:
    places = [
        "env:",
        "env:NO",
        "file:x",
        "file:/dev/null",
        "file:/",
        "fd:-1",
        f"fd:{2**70}",
        "fd:99",
        "fd:x",
        "command:",
        "command:no-such",
        "keyring:x",
        "x:y",
        ":",
    ]
    return ["--key", random.choice([*places, str(mutate.odd(random))[:2000]])]


FORMATS: dict[str, Format] = {
    each.name: each
    for each in [
        Format("config-toml", _toml, "c.toml", mutate.bend_toml, PLAN),
        Format("config-json", _write("c.json", CONFIG), "c.json", mutate.bend_json, PLAN),
        Format("overrides", _write("c.json", CONFIG), "c.json", _kept, PLAN, _overrides),
        Format("picture-metadata", _write("p.png", _picture(".png", PROVENANCE)), "p.png", mutate.bend_png_text, PLAN),
        Format("ir", _ir, "m.xml", mutate.bend_xml, BENCH),
        Format("ir-weights", _ir, "m.bin", mutate.bend_bytes, BENCH),
        Format("onnx", _onnx, "m.onnx", mutate.bend_protobuf, ["inspect", "{file}"]),
        Format("tflite", _of_bundle("test_tflite"), "m.tflite", mutate.bend_bytes, ["inspect", "{file}"]),
        Format("tensorflow", _of_bundle("test_tensorflow_frozen_graph"), "m.pb", mutate.bend_protobuf, ["inspect", "{file}"]),
        Format("saved-model", _of_bundle("test_tensorflow_saved_model"), "exported/saved_model.pb", mutate.bend_protobuf, ["inspect", "exported"]),
        Format("paddle", _of_bundle("test_paddle"), "m.pdmodel", mutate.bend_protobuf, ["inspect", "."]),
        Format("lora", _lora, "m.safetensors", mutate.bend_safetensors, ["lora", "inspect", "{file}", "--json"]),
        Format("lora-fits", _lora, "m.safetensors", mutate.bend_safetensors, ["lora", "inspect", "{file}", "--model", "package:ovforge_lcm/model"]),
        Format("lora-fused", _fused, "m.safetensors", mutate.bend_safetensors, RUN),
        Format("calibration", _calibrated, "in.jsonl", mutate.bend_lines, PLAN_OF_IT),
        Format("peft-config", _peft, "adapter_config.json", mutate.bend_json, ["lora", "inspect", ".", "--json"]),
        Format("embedding", _embedding, "word.safetensors", mutate.bend_safetensors, RUN),
        Format("scheduler-config", _run_model, "model/scheduler/scheduler_config.json", mutate.bend_json, RUN),
        Format("model-index", _run_model, "model/model_index.json", mutate.bend_json, RUN),
        Format("model-config", _run_model, "model/unet/config.json", mutate.bend_json, RUN),
        Format("ovforge-json", _run_model, "model/ovforge.json", mutate.bend_json, RUN),
        Format("tokenizer", _run_model, "model/tokenizer/vocab.json", mutate.bend_json, RUN),
        Format("mask", _masked, "mask.png", mutate.bend_bytes, RUN),
        Format("model-proc", _described, "model/model-proc.json", mutate.bend_json, ["detect", "p.png", "--model", "model", "--model-proc", "model/model-proc.json", "-o", "out.json"]),
        Format("labels", _labelled, "model/labels.txt", mutate.bend_bytes, ["detect", "p.png", "--model", "model", "--model-proc", "model/model-proc.json", "-o", "out.json"]),
        *(
            Format(f"detect{suffix}", _detected(suffix), f"in{suffix}", mutate.bend_bytes, ["detect", "{file}", "--model", "model", "--model-proc", "model/model-proc.json", "-o", "out.json"])
            for suffix in (".png", ".jpg", ".webp", ".tif", ".gif", ".bmp")
        ),
        Format("npy", _with_ir("x.npy", _npy), "x.npy", mutate.bend_bytes, [*BENCH, "-i", "x.npy"]),
        Format("benchmark-flags", _ir, "m.xml", _kept, BENCH, _flags),
        Format("benchmark-config", _with_ir("c.json", {"CPU": {"NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}}), "c.json", mutate.bend_json, [*BENCH, "-load_config", "c.json"]),
        Format("report", _report, "r.json", mutate.bend_json, ["bench-diff", "r.json", "r.json"]),
        Format("registry", _write("r.toml", REGISTRY), "r.toml", mutate.bend_toml, ["plugins", "list"], environment={"OVFORGE_REGISTRY": "r.toml"}),
        Format("registry-edited", _write("r.toml", REGISTRY), "r.toml", mutate.bend_toml, ["plugins", "disable", "lcm"], environment={"OVFORGE_REGISTRY": "r.toml"}),
        Format("ovenc", _encrypted, "x.ovenc", mutate.bend_bytes, ["decrypt", "x.ovenc", "-o", "out"], same=("out", "plain.txt")),
        Format("openssl", _openssl, "x.json.enc", mutate.bend_bytes, ["decrypt", "x.json.enc", "-o", "out", "--key", "env:OVFORGE_PASSPHRASE", "--passphrase", "--cipher", "aes-256-cbc", "--iterations", "1000"]),
        Format("key-places", _encrypted, "x.ovenc", _kept, ["decrypt", "x.ovenc", "-o", "out"], _places, same=("out", "plain.txt")),
        Format("written", lambda folder: _marked(folder), "it/.ovforge-files", mutate.bend_json, ["encrypt", "plain.txt", "-o", "it", "--force"]),
    ]
}  # fmt: skip


def _marked(folder: Path) -> None:
    from ovforge.store import atomic_folder

    os.environ["OVFORGE_KEY"] = KEY
    (folder / "plain.txt").write_bytes(b"plain")
    with atomic_folder(folder / "it") as it:
        (it / "a").write_text("a")
