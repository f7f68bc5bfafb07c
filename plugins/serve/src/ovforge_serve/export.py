"""`ovforge export ovms`: a pipeline's models as OpenVINO Model Server serves them.

Source: the server's own export_model.py, its ImageGenCalculatorOptions and how it reads them (imagegen_init.cpp),
github.com/openvinotoolkit/model_server, 2026. A bundle of the diffusers layout becomes one servable of image
generation; of any other, each role becomes a model for the Open Inference Protocol.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovforge.cli import Trust
from ovforge.errors import InputError, ModelError

if TYPE_CHECKING:
    from ovforge import PipelineConfig
    from ovforge.model import ModelBundle

__all__ = ["export", "graph", "write_servables"]

export = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Write what other servers serve.")

_GRAPH = """\
input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"
node {{
  name: "ImageGenExecutor"
  calculator: "ImageGenCalculator"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "IMAGE_GEN_NODE_RESOURCES:pipes"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  node_options {{
    [type.googleapis.com/mediapipe.ImageGenCalculatorOptions] {{
{options}
    }}
  }}
}}
"""


_SIZE = {"width", "height"}
_MOST_SIDE, _MOST_STEPS = 4096, 100
"""What the server refuses more than, unless the graph says another number."""

_OF_CLIENTS = {
    *_SIZE, "prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3", "count",
    "guidance_scale", "max_sequence_length", "seed", "strength", "image", "mask",
}  # fmt: skip
"""Inputs that the server takes of a request, by their names here: docs/model_server_rest_api_image_edit.md."""

_OF_MEMORY = {"static", "low_memory", "guidance"}
"""Options of a task that change no picture."""

_ROLE = re.compile(r"(text_encoder|tokenizer)(_[23])?|unet|transformer|vae_encoder|vae_decoder")
"""Models that openvino-genai runs."""

_PROPERTIES = {
    "precision": "INFERENCE_PRECISION_HINT", "hint": "PERFORMANCE_HINT", "threads": "INFERENCE_NUM_THREADS",
    "streams": "NUM_STREAMS",
}  # fmt: skip
"""OpenVINO's properties by the options of its devices."""


@export.callback()
def _group() -> None:
    """Write what other servers serve."""


@export.command()
def ovms(
    config: Annotated[Path, typer.Argument(help="The pipeline's config, .toml or .json.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write: ovms --config_path FOLDER/config.json")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is there.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing of models elsewhere on disk.")] = False,
    trust: Trust = False,
) -> None:
    """Write a pipeline's models, after the config's steps, as a folder for OpenVINO Model Server.

    Example: ovforge export ovms examples/unicorn.toml -o servables
    """
    from ovforge import PipelineConfig, prepare
    from ovforge.cli import check_folder, check_trust, print_line, print_warning, progress_bar, split_name
    from ovforge.model import named_path
    from ovforge.store import atomic_folder, check_apart, check_replaceable

    overrides = set_ or []
    name, _ = split_name(str(config))
    check_trust(config, overrides, trust)
    if output.exists() and not force:
        raise InputError("is there already", where=str(output), hint="Name another folder, or add --force.")
    if output.exists():
        check_replaceable(output)
    checked = PipelineConfig.read(config, overrides)
    # What the task changes to run faster is for the task: the server gives the UNet integer timesteps, for example.
    checked = checked.model_copy(update={"optimize": False})
    check_apart(
        output, *(named_path(source, config.parent) for source in (checked.load.source, *checked.load.parts.values()))
    )
    check_folder(output.parent)
    with progress_bar(False) as progress:
        bundle = prepare(checked, base=config.parent, cache=None if no_cache else "default", progress=progress).bundle
        if bundle.adapters:
            raise InputError(
                "its adapters are switched while it runs, which the server cannot do", where=str(config),
                hint="Fuse them: the transform's mode = \"fuse\".",
            )  # fmt: skip
        with atomic_folder(output, replace=force) as folder:
            served = write_servables(bundle, checked, name, folder)
    for warning in _lost(bundle, checked):
        print_warning(warning)
    print_line(f"{output}: {', '.join(served)}")


def write_servables(bundle: ModelBundle, config: PipelineConfig, name: str, folder: Path) -> list[str]:
    """Write models and config.json into a folder; return the servables' names. Raises ModelError for encrypted ones."""
    import openvino as ov

    if bundle.protection is not None:
        raise ModelError(
            "the model, or something that was put into it, is encrypted, and would be written plain",
            where=config.load.source,
            hint="Run `ovforge decrypt` first if that is what you want.",
        )
    device, properties = _device(config)
    servers: dict[str, list[dict[str, Any]]] = {"model_config_list": [], "mediapipe_config_list": []}
    if _draws(bundle):
        bundle.save(folder / name)
        (folder / name / "graph.pbtxt").write_text(graph(config.input, device, properties), encoding="utf-8")
        names = [name]
        servers["mediapipe_config_list"] = [{"name": name, "base_path": name}]
    else:
        roles = {role: name if len(bundle.models) == 1 else f"{name}.{role}" for role in bundle.models}
        for role, model in roles.items():
            (folder / model / "1").mkdir(parents=True)
            ov.save_model(bundle.models[role], folder / model / "1" / "model.xml", compress_to_fp16=False)
            bundle.models.release(role)
            entry = {"name": model, "base_path": model, "target_device": device, "plugin_config": properties}
            servers["model_config_list"].append({"config": entry})
        names = list(roles.values())
    (folder / "config.json").write_text(json.dumps(servers, indent=2) + "\n", encoding="utf-8")
    return names


def graph(inputs: Mapping[str, Any], device: str, properties: Mapping[str, Any]) -> str:
    """Return the server's graph of image generation, with what a config's [input] says as its defaults.

    Raises InputError for an NPU without a size, since the server then compiles for that one alone.
    """
    options = ['models_path: "./"', f'device: "{device}"']
    if properties:
        options.append(f"plugin_config: {json.dumps(json.dumps(properties))}")
    size = (int(inputs["width"]), int(inputs["height"])) if inputs.keys() >= _SIZE else None
    if device.startswith("NPU"):
        if size is None:
            raise InputError(
                "the server needs to know the size of pictures for an NPU", where="input",
                hint="Say width and height under [input].",
            )  # fmt: skip
        options.append(f'resolution: "{size[0]}x{size[1]}"')
    elif size is not None:
        options.append(f'default_resolution: "{size[0]}x{size[1]}"')
        if max(size) > _MOST_SIDE:
            options.append(f'max_resolution: "{max(_MOST_SIDE, size[0])}x{max(_MOST_SIDE, size[1])}"')
    if "steps" in inputs:
        options.append(f"default_num_inference_steps: {int(inputs['steps'])}")
        if int(inputs["steps"]) > _MOST_STEPS:
            options.append(f"max_num_inference_steps: {int(inputs['steps'])}")
    return _GRAPH.format(options="\n".join(f"      {option}" for option in options))


def _draws(bundle: ModelBundle) -> bool:
    """Say whether openvino-genai, which the server runs, makes pictures with a bundle."""
    return "_class_name" in bundle.index and "vae_decoder" in bundle.models


def _device(config: PipelineConfig) -> tuple[str, dict[str, Any]]:
    """Return OpenVINO's name of the device, and the properties that the config says."""
    options = dict(config.device.options)
    name, index = config.device.use.upper(), options.pop("index", None)
    own = dict(options.pop("properties", {}))
    if options.get("precision") == "auto":
        del options["precision"]
    if "hint" in options:
        options["hint"] = str(options["hint"]).upper()
    properties = {_PROPERTIES[key]: value for key, value in options.items() if key in _PROPERTIES}
    if options.get("precision") == "f32":
        properties["EXECUTION_MODE_HINT"] = "ACCURACY"  # or activations of compressed weights are rounded to 8 bits
    return name if index is None else f"{name}.{index}", {**properties, **own}


def _lost(bundle: ModelBundle, config: PipelineConfig) -> Iterator[str]:
    """Yield what of a pipeline the server does not do."""
    if bundle.controls:
        yield f"controls keep their first values: {', '.join(bundle.controls)}"
    if other := sorted(config.device.options.keys() - _PROPERTIES.keys() - {"index", "properties"}):
        yield f"the server does not know these options of the device: {', '.join(other)}"
    if _draws(bundle):
        yield from _lost_of_pictures(bundle, config)
    elif config.input:
        yield f"clients give these inputs themselves: {', '.join(sorted(config.input))}"


def _lost_of_pictures(bundle: ModelBundle, config: PipelineConfig) -> Iterator[str]:
    """Yield what of a pipeline the server's image generation does not do."""
    if config.scheduler is not None:
        yield f"the server takes the model's own scheduler, not the config's ({config.scheduler.use})"
    if other := sorted(role for role in bundle.models if not _ROLE.fullmatch(role)):
        yield f"the server does not run these models, and what they are for is not done: {', '.join(other)}"
    if config.task is not None and (other := sorted(config.task.options.keys() - _OF_MEMORY)):
        yield f"the server does not know these options of the task: {', '.join(other)}"
    if "steps" not in config.input:
        yield "requests that name no steps take 50: say steps under [input]"
    rest = config.input.keys() - {"steps", *(_SIZE if config.input.keys() >= _SIZE else ())}
    if given := sorted(rest & _OF_CLIENTS):
        yield f"clients give these inputs themselves: {', '.join(given)}"
    if other := sorted(rest - _OF_CLIENTS):
        yield f"the server does not know these inputs, and does without them: {', '.join(other)}"
