"""A pipeline's models, its sampling method and its tokenizers joined into one graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovforge import Pipeline, PipelineConfig
from ovforge.config import checked
from ovforge.errors import ConfigError, InputError, ModelError
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.guidance import never_acts
from ovforge_diffusion.inputs import DiffusionOptions, TextToImageInputs
from ovforge_diffusion.request import Request, make_request
from ovforge_diffusion.residuals import CONTROLNETS
from ovforge_diffusion.shallow import shallow_role
from ovforge_diffusion.single_graph.conditions import conditions, constants
from ovforge_diffusion.single_graph.decoding import packed, pictures
from ovforge_diffusion.single_graph.denoising import Guided, Network, in_a_loop, one_after_another
from ovforge_diffusion.single_graph.joining import constant, converted, reshaped, rows_of, shape_of, zeros
from ovforge_diffusion.single_graph.sampler import LinearSampler, linear_sampler
from ovforge_diffusion.single_graph.texts import Texts, opened
from ovforge_diffusion.tasks import TextToImage
from ovforge_diffusion.text import learned_tokens

__all__ = ["SingleGraph", "check_config", "single_graph"]

_OF_A_CALL = ("prompt", "negative_prompt", "seed", "latents")
"""Inputs of a call that the graph's own inputs stand for."""

_GUIDANCE = "guidance"
"""The guidance scale as an input of the denoiser: FLUX.1 and Sana-Sprint have it."""


@dataclass(frozen=True)
class SingleGraph:
    """A graph, and what was decided when it was made."""

    model: ov.Model
    """Inputs: `prompt`, and as the pipeline wants them `negative_prompt`, `latents`, `noise`, `guidance_scale`.

    The output `image` is uint8 (pictures, height, width, 3)."""

    request: Request
    sampler: LinearSampler
    scheduler: str
    """The sampling method: as the config names it, or the class that the model names."""

    unrolled: bool
    unused: tuple[str, ...]
    """What of the config's [input] is not in the graph, because each call says it."""


def single_graph(
    pipe: Pipeline, *, pictures_at_once: int | None = 1, unroll: bool = False, guidance_input: bool = False
) -> SingleGraph:
    """Join a text-to-image pipeline into one graph, with what its config's [input] says of size, steps and guidance.

    `pictures_at_once` None takes any number. With `unroll`, steps stand one after another instead of in a loop; with
    `guidance_input`, each call gives its guidance_scale. Raises ConfigError, InputError or ModelError for what a graph
    cannot do.
    """
    check_config(pipe.config, pipe.base)
    task: Any = pipe.task
    architecture = task.architecture
    request = make_request(_inputs(pipe.config, pipe.base), architecture, None)
    _check(pipe, architecture)
    size = (request.height // architecture.factor, request.width // architecture.factor)
    if side := task.autoencoder.tile(request.height, request.width):
        raise InputError(
            f"the pipeline decodes {request.width}x{request.height} pixels in tiles of {side}, and a graph decodes "
            "them whole", where="task.tile", hint=f"Set task.tile = {max(request.width, request.height)}.",
        )  # fmt: skip
    _, request = task.scheduling.start(request, 1.0, size)
    sampler = linear_sampler(lambda: task.scheduling.start(request, 1.0, size)[0], architecture)
    given, end = request.given, architecture.guidance_end(request.given.guidance_stop, sampler.calls)
    idle = never_acts(given.guidance_start, given.guidance_stop, end, sampler.calls)
    request = replace(request, remarks=(*request.remarks, *idle))
    graph = _Graph(pipe, architecture, request, sampler, size, pictures_at_once)
    model = graph.joined(unroll=unroll, guidance_input=guidance_input)
    unused = tuple(name for name in _OF_A_CALL if pipe.config.input.get(name) is not None)
    own = pipe.config.scheduler
    scheduler = own.use if own else str(pipe.bundle.scheduler_config().get("_class_name"))
    return SingleGraph(model, request, sampler, scheduler, unroll, unused)


def check_config(config: PipelineConfig, base: Path) -> None:
    """Raise for what of a config a graph cannot do, before a model is read. Raises ConfigError or InputError."""
    if config.task is None or config.task.use != TextToImage.name:
        raise ConfigError("a single graph makes pictures from text", where="task", hint='Set task = "text-to-image".')
    options = checked(DiffusionOptions, config.task.options, where="task")
    for name, plain in (("prompts", "plain"), ("long_prompts", "cut")):
        if (value := getattr(options, name)) != plain:
            raise ConfigError(
                f"{value!r} prompts are split in Python, before they are tokens", where=f"task.{name}",
                hint=f'Set {name} = "{plain}", or leave it out.',
            )  # fmt: skip
    if any(transform.use == "step-cache" for transform in config.transform):
        raise _step_cache()
    inputs = _inputs(config, base)
    if config.load.parts.keys() & {*CONTROLNETS} or inputs.control:
        raise _controlnets()
    for name in (
        "prompt_2", "negative_prompt_2", "prompt_3", "negative_prompt_3", "denoising_end", "cfg_normalization",
        "cfg_truncation",
    ):  # fmt: skip
        if getattr(inputs, name) is not None:
            raise InputError("is not an input of the graph", where=f"input.{name}", hint="Leave it out.")
    if inputs.skip_guidance_layers is not None:
        raise InputError(
            "needs a third call of the network in some steps, which the graph does not make",
            where="input.skip_guidance_layers", hint="Leave it out.",
        )  # fmt: skip
    if inputs.decode is False:
        raise InputError("the graph makes pictures, not latents", where="input.decode", hint="Leave it out.")


def _inputs(config: PipelineConfig, base: Path) -> TextToImageInputs:
    """Return what a config says of every call, of one picture, with a prompt that stands for those of the calls."""
    given = {name: value for name, value in config.input.items() if name not in (*_OF_A_CALL, "count")}
    if config.input.get("negative_prompt") is not None:
        given["negative_prompt"] = ""
    return checked(TextToImageInputs, {**given, "prompt": "", "seed": 0}, where="input", base=base)


def _step_cache() -> ConfigError:
    return ConfigError(
        "it runs another graph in most steps, and a single graph holds one network", where="transform: step-cache",
        hint="Take the transform from the config.",
    )  # fmt: skip


def _controlnets() -> ConfigError:
    return ConfigError(
        "ControlNets see a picture, and the graph takes none", where="load.parts.controlnet",
        hint="Take them, and `control`, from the config.",
    )  # fmt: skip


def _check(pipe: Pipeline, architecture: Architecture) -> None:
    """Raise for what a graph cannot do with a model, before anything is made."""
    bundle = pipe.bundle
    if bundle.protection is not None:
        raise ModelError(
            "the model, or something that was put into it, is encrypted, and would be written plain",
            where=pipe.config.load.source,
            hint="Run `ovforge decrypt` first if that is what you want; then encrypt the graph's folder.",
        )
    if bundle.adapters or bundle.controls:
        raise ConfigError(
            f"{', '.join([*bundle.adapters, *bundle.controls])} can be set while the pipeline runs, and a graph "
            "stays as it is", where="transform", hint='Fuse adapters: the transform\'s mode = "fuse".',
        )  # fmt: skip
    if shallow_role(architecture.denoiser) in bundle.models:
        raise _step_cache()
    if architecture.masked:
        raise ModelError("was made for inpainting", where=architecture.denoiser, hint="Take a model made for text.")
    if architecture.controlnets:
        raise _controlnets()
    if architecture.stacks_condition:
        raise ModelError(
            "it sees a condition, and the graph takes no picture", where=architecture.denoiser,
            hint="Take a model made for text.",
        )  # fmt: skip


class _Graph:
    """The parts of one graph, and its inputs in their order."""

    def __init__(
        self,
        pipe: Pipeline,
        architecture: Architecture,
        request: Request,
        sampler: LinearSampler,
        size: tuple[int, int],
        count: int | None,
    ) -> None:
        self._bundle, self._examples = pipe.bundle, _texts_in(pipe.config.input)
        self._architecture, self._request, self._sampler, self._size = architecture, request, sampler, size
        self._count = count
        self._parameters: list[ov.Node] = []
        self._halves = 2 if request.guided else 1

    def joined(self, *, unroll: bool, guidance_input: bool) -> ov.Model:
        """Return the whole graph."""
        architecture, bundle = self._architecture, self._bundle
        rows = -1 if self._count is None else self._count
        denoiser = Network(bundle.models[architecture.denoiser], architecture, self._halves)
        denoiser.check(self._sampler.timesteps)
        texts = self._texts()
        values = self._conditions(texts)
        latents = self._input("latents", [rows, architecture.latent_channels, *self._size])
        noise = None
        if self._sampler.draws:
            noise = self._input("noise", [self._sampler.draws, rows, *architecture.packed_shape(1, *self._size)[1:]])
        ranks = {name: _rank(port) for port in denoiser.model.inputs for name in port.names}
        values |= constants(architecture, self._request, self._halves, texts, ranks)
        scale = self._input("guidance_scale", [1]) if guidance_input else None
        if scale is not None and (beyond := (self._request.guidance or 0) - self._request.guidance_scale) > 0:
            scale = ops.add(scale, constant(np.array([beyond], np.float32))).output(0)  # of Z-Image, counted from 0
        if scale is not None and _GUIDANCE in values:
            measured = ops.multiply(scale, constant(np.array([architecture.guidance_measure], np.float32)))
            values[_GUIDANCE] = ops.broadcast(measured, rows_of(values[_GUIDANCE])).output(0)
        elif scale is not None and self._halves == 2 and architecture.guided_by == "guidance_scale":
            scale = ops.maximum(scale, constant(np.ones(1, np.float32))).output(0)  # below 1, pipelines do not guide
        elif scale is not None:
            raise ConfigError(
                "no input guides this model: its guidance is built in, switched off, an embedding or by true_cfg_scale",
                where="--guidance-input",
                hint="Leave the option out: guidance is then what [input] says.",
            )
        guided = self._guided(scale if _GUIDANCE not in values else None)
        run = one_after_another if unroll else in_a_loop
        last = run(denoiser, self._sampler, packed(architecture, latents, self._size), noise, values, guided)
        request = self._request
        asked = request.asked or (request.width, request.height)
        image = pictures(architecture, bundle.models["vae_decoder"], last, self._size, asked)
        image = reshaped(image, (rows, *asked[::-1], 3))  # as its size is known
        image.get_tensor().set_names({"image"})
        result = ops.result(image)
        result.set_friendly_name("image")
        return ov.Model([result], self._parameters, "ovforge_single_graph")

    def _texts(self) -> Texts:
        """Return the prompts, which are inputs."""
        rows = ov.Dimension(1, -1) if self._count is None else self._count  # of none, tokenizers make anything
        prompt = opened(self._input("prompt", [rows], ov.Type.string))
        strings = [prompt]
        if self._request.guided and self._request.negatives is not None:
            strings = [opened(self._input("negative_prompt", [rows], ov.Type.string)), prompt]
        learned = learned_tokens(self._bundle.assets)
        return Texts(self._bundle, strings, self._count, learned, self._examples)

    def _conditions(self, texts: Texts) -> dict[str, ov.Output]:
        """Return what the denoiser takes of the prompts."""
        values = conditions(self._architecture, texts, self._request)
        if self._request.guided and self._request.negatives is None:  # zeros stand for the prompt to avoid
            values = {
                name: ops.concat([zeros(shape_of(value)), converted(value, ov.Type.f32)], 0).output(0)
                for name, value in values.items()
            }
        return values

    def _guided(self, scale: ov.Output | None) -> Guided | None:
        request, calls = self._request, self._sampler.calls
        if request.guidance is None:
            return None
        acts, given = np.zeros(calls, np.float32), request.given
        end = self._architecture.guidance_end(given.guidance_stop, calls)
        acts[int(given.guidance_start * calls) : end] = 1
        return Guided(
            constant(np.array([request.guidance], np.float32)) if scale is None else scale,
            acts,
            given.guidance_rescale,
        )

    def _input(self, name: str, shape: Sequence[int | ov.Dimension], kind: ov.Type = ov.Type.f32) -> ov.Output:
        parameter = ops.parameter(ov.PartialShape(list(shape)), kind, name)
        parameter.output(0).get_tensor().set_names({name})
        self._parameters.append(parameter)
        return parameter.output(0)


def _rank(port: ov.Output) -> int | None:
    rank = port.get_partial_shape().rank
    return int(rank.get_length()) if rank.is_static else None


def _texts_in(inputs: Mapping[str, Any]) -> list[str]:
    """Return the prompts that a config names."""
    given = [inputs.get(name) for name in ("prompt", "negative_prompt")]
    return [
        text for value in given for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)
    ]
