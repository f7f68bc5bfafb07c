"""The folder of a single graph: the model, and what people and programs need to know of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openvino as ov

from ovforge import __version__
from ovforge.model import ModelBundle, openvino_version
from ovforge.store import atomic_folder
from ovforge_diffusion.single_graph.export import SingleGraph

__all__ = ["facts_of", "write_folder"]

FORMAT = 1
"""Of ovforge.json: it rises if a later version writes other keys in place of these."""

_MEANINGS = {
    "prompt": "what each picture shows",
    "negative_prompt": "what each picture should not show; may be empty",
    "latents": "standard normal noise that a picture begins as",
    "noise": "standard normal noise for the steps that add some, in their order",
    "guidance_scale": "how closely to follow the prompts, as the pipeline takes it",
    "image": "RGB pictures, 0 to 255",
}

_README = """\
# {title}

One OpenVINO graph that makes pictures from text: {calls} calls of the network, {width}x{height} pixels, the sampling
method `{scheduler}`.
It needs OpenVINO {openvino} or newer and the operations of openvino_tokenizers. Whoever compiles it chooses the device
and its precision.

| | type | shape | |
| --- | --- | --- | --- |
{rows}

{open_sizes}`ovforge.json` says the same for programs.

Written by ovforge {version} (`ovforge single-graph`).
"""


def write_folder(graph: SingleGraph, folder: Path, *, replace: bool) -> None:
    """Write model.xml, model.bin, ovforge.json and README.md as a folder that appears whole or not at all."""
    facts = facts_of(graph)
    with atomic_folder(folder, replace=replace) as temporary:
        bundle = ModelBundle()
        bundle.put("model", graph.model)
        written = bundle.write_model("model", temporary)
        for suffix in (".xml", ".bin"):
            written.with_suffix(suffix).rename(temporary / f"model{suffix}")
        written.parent.rmdir()
        (temporary / "ovforge.json").write_text(json.dumps({"single_graph": facts}, indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_readme(facts, folder.name), encoding="utf-8")


def facts_of(graph: SingleGraph) -> dict[str, Any]:
    """Return what ovforge.json says of a graph, JSON-able."""
    request, sampler = graph.request, graph.sampler
    width, height = request.asked or (request.width, request.height)
    return {
        "format": FORMAT,
        "width": width,
        "height": height,
        "steps": request.steps,
        "calls": sampler.calls,
        "timesteps": [float(timestep) for timestep in sampler.timesteps],
        "scheduler": graph.scheduler,
        "guidance_scale": request.guidance_scale,
        "unrolled": graph.unrolled,
        "inputs": [_port(port) for port in graph.model.inputs],
        "outputs": [_port(port) for port in graph.model.outputs],
        "versions": {"ovforge": __version__, "openvino": openvino_version()},
    }


def _port(port: ov.Output) -> dict[str, Any]:
    shape = [side.get_length() if side.is_static else -1 for side in port.get_partial_shape()]
    name = port.any_name
    return {"name": name, "type": port.get_element_type().get_type_name(), "shape": shape, "what": _MEANINGS[name]}


def _readme(facts: dict[str, Any], title: str) -> str:
    ports = [*((port, "input") for port in facts["inputs"]), *((port, "output") for port in facts["outputs"])]
    rows = "\n".join(
        f"| {kind} `{port['name']}` | {port['type']} | {port['shape']} | {port['what']} |" for port, kind in ports
    )
    open_sizes = "-1 is any number, the same for all. " if "-1" in rows else ""
    return _README.format(
        open_sizes=open_sizes,
        title=title, rows=rows, openvino=facts["versions"]["openvino"], version=facts["versions"]["ovforge"],
        **{name: facts[name] for name in ("calls", "width", "height", "scheduler")},
    )  # fmt: skip
