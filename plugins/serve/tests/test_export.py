"""What OpenVINO Model Server gets: graphs that protobuf reads by the server's own messages, models that are the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, text_format

import ovforge
from ovforge import testing
from ovforge.errors import InputError, ModelError
from ovforge_serve.export import graph, ovms, write_servables

_FIELD = descriptor_pb2.FieldDescriptorProto


@pytest.fixture(scope="module")
def pool() -> descriptor_pool.DescriptorPool:
    """Return the messages of MediaPipe's graphs and of the server's options, with the fields that we write."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="graph.proto", package="mediapipe", syntax="proto2", dependency=["google/protobuf/any.proto"]
    )
    text, number, many = _FIELD.TYPE_STRING, _FIELD.TYPE_UINT64, _FIELD.LABEL_REPEATED
    fields = {
        "ImageGenCalculatorOptions": [
            ("models_path", 1, text), ("device", 2, text), ("plugin_config", 3, text), ("max_resolution", 4, text),
            ("default_resolution", 5, text), ("default_num_inference_steps", 7, number),
            ("max_num_inference_steps", 8, number), ("resolution", 9, text),
        ],
        "Node": [
            ("name", 1, text), ("calculator", 2, text), ("input_stream", 3, text, many), ("output_stream", 4, text, many),
            ("input_side_packet", 5, text, many), ("node_options", 8, ".google.protobuf.Any", many),
        ],
        "CalculatorGraphConfig": [
            ("node", 1, ".mediapipe.Node", many), ("input_stream", 10, text, many), ("output_stream", 15, text, many),
        ],
    }  # fmt: skip
    for name, entries in fields.items():
        message = file.message_type.add(name=name)
        for field, place, kind, *label in entries:
            added = message.field.add(name=field, number=place, label=(label or [_FIELD.LABEL_OPTIONAL])[0])
            if isinstance(kind, str):
                added.type, added.type_name = _FIELD.TYPE_MESSAGE, kind
            else:
                added.type = kind
    pool.Add(file)
    return pool


def options_of(text: str, pool: descriptor_pool.DescriptorPool) -> object:
    """Return the calculator's options in a graph; protobuf refuses one that is not well formed."""
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("mediapipe.CalculatorGraphConfig"))()
    text_format.Parse(text, config, descriptor_pool=pool)
    assert config.node[0].calculator == "ImageGenCalculator"
    options = message_factory.GetMessageClass(pool.FindMessageTypeByName("mediapipe.ImageGenCalculatorOptions"))()
    options.ParseFromString(config.node[0].node_options[0].value)
    return options


def test_a_diffusion_pipeline_becomes_one_servable(
    tmp_path: Path, pool: descriptor_pool.DescriptorPool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "lcm.toml"
    config.write_text(
        'task = "text-to-image"\nload = "package:ovforge_lcm/model"\n[scheduler]\nuse = "lcm"\n[device]\nprecision = "f32"\n'
        '[input]\nsteps = 4\nwidth = 64\nheight = 96\nseed = 1\n'
    )  # fmt: skip
    ovms(config, tmp_path / "out")
    servers = json.loads((tmp_path / "out" / "config.json").read_text())
    assert servers == {"model_config_list": [], "mediapipe_config_list": [{"name": "lcm", "base_path": "lcm"}]}
    options = options_of((tmp_path / "out" / "lcm" / "graph.pbtxt").read_text(), pool)
    assert json.loads(options.plugin_config) == {
        "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY",
    }  # fmt: skip
    assert (options.device, options.models_path, options.default_resolution) == ("CPU", "./", "64x96")
    assert options.default_num_inference_steps == 4
    said = capsys.readouterr().err
    assert "the model's own scheduler, not the config's (lcm)" in said
    assert "clients give these inputs themselves: seed" in said
    bundle = ovforge.open_model(tmp_path / "out" / "lcm", cache=None)
    assert set(bundle.models) >= {"unet", "vae_decoder", "tokenizer"}
    # The server's library gives integer timesteps, which our own task changes for schedulers with fractional ones.
    assert bundle.models["unet"].input("timestep").get_element_type() == ov.Type.i64
    with pytest.raises(InputError, match="is there already"):
        ovms(config, tmp_path / "out")
    ovms(config, tmp_path / "out", force=True)


def test_a_graph_says_no_default_that_the_server_refuses(pool: descriptor_pool.DescriptorPool) -> None:
    """The server has largest sizes and steps of its own, and compiles for an NPU for one size alone."""
    options = options_of(graph({"width": 8192, "height": 64, "steps": 150}, "CPU", {}), pool)
    assert (options.default_resolution, options.max_resolution) == ("8192x64", "8192x4096")
    assert (options.default_num_inference_steps, options.max_num_inference_steps) == (150, 150)
    npu = options_of(graph({"width": 512, "height": 512}, "NPU", {}), pool)
    assert (npu.resolution, npu.default_resolution, npu.max_resolution) == ("512x512", "", "")
    with pytest.raises(InputError, match="size of pictures for an NPU"):
        graph({"width": 512}, "NPU", {})


def test_options_of_the_device_are_written_or_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    testing.small_bundle().save(tmp_path / "model")
    config = tmp_path / "small.toml"
    config.write_text(
        'task = "text-to-image"\nload = "model"\n[device]\nhint = "throughput"\nthreads = 1\nstreams = 2\n'
        'properties = { ENABLE_CPU_PINNING = false }\n[input]\nwidth = 64\n'
    )  # fmt: skip
    ovms(config, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["model_config_list"][0]["config"]
    assert entry["plugin_config"] == {
        "ENABLE_CPU_PINNING": False, "PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 2,
    }  # fmt: skip
    model = ov.Core().read_model(tmp_path / "out" / "small" / "1" / "model.xml")
    ov.Core().compile_model(model, entry["target_device"], entry["plugin_config"])
    assert "clients give these inputs themselves: width" in capsys.readouterr().err


def test_other_models_become_one_servable_each(tmp_path: Path) -> None:
    testing.small_bundle().save(tmp_path / "model")
    config = tmp_path / "small.toml"
    config.write_text('task = "text-to-image"\nload = "model"\n')
    ovms(config, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["model_config_list"][0]["config"]
    assert entry == {"name": "small", "base_path": "small", "target_device": "CPU", "plugin_config": {}}
    x = np.ones((2, 4), np.float32)
    model = ov.Core().read_model(tmp_path / "out" / "small" / "1" / "model.xml")
    assert np.array_equal(testing.run(model, {"x": x})["y"], testing.run(testing.small_model(), {"x": x})["y"])


def test_adapters_that_are_switched_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "pencil.toml"
    config.write_text(
        'task = "text-to-image"\nload = "package:ovforge_lcm/model"\n[[transform]]\nuse = "lora"\nmode = "runtime"\n'
        'path = "package:ovforge_sd_lora/examples/pencil.safetensors"\n'
    )
    with pytest.raises(InputError, match="adapters are switched"):
        ovms(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model_index.json", "nothing"], ids=["images", "models"])
def test_encrypted_models_are_refused_by_their_name(tmp_path: Path, name: str) -> None:
    """And before anything is written."""
    config = ovforge.PipelineConfig.of({"load": "secret", "input": {}})
    bundle = testing.small_bundle()
    bundle.protection = object()
    bundle.index = {"_class_name": name}
    with pytest.raises(ModelError, match="^secret: the model, or something that was put into it, is encrypted"):
        write_servables(bundle, config, "mine", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_server_does_not_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps that leave a part of the network out, weighted prompts, guidance in a part of the steps."""
    config = tmp_path / "lcm.toml"
    config.write_text(
        'load = "package:ovforge_lcm/model"\ntask = { use = "text-to-image", prompts = "weighted", low_memory = true }\n'
        'transform = ["step-cache"]\n[input]\nsteps = 4\nseed = 1\nguidance_rescale = 0.5\nwidth = 64\n'
    )
    ovms(config, tmp_path / "out")
    said = capsys.readouterr().err.splitlines()
    for line in (
        "the server does not run these models, and what they are for is not done: unet_shallow",
        "the server does not know these options of the task: prompts",
        "clients give these inputs themselves: seed, width",
        "the server does not know these inputs, and does without them: guidance_rescale",
    ):
        assert f"warning: {line}" in said


def test_graphs_quote_what_they_hold(pool: descriptor_pool.DescriptorPool) -> None:
    options = options_of(graph({}, "CPU", {"A": "'\"\\\n"}), pool)
    assert json.loads(options.plugin_config) == {"A": "'\"\\\n"}
