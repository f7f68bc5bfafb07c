"""The denoiser: requests whose tensors stay in place from step to step, with or without ControlNets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError
from ovforge.results import Timings

__all__ = ["Denoiser", "guidance_embedding"]

Array = NDArray[np.float32]


def guidance_embedding(guidance_scale: float, width: int) -> Array:
    """Return the embedding of a guidance scale that consistency models take, float32 (width,).

    Source: `get_guidance_scale_embedding` of diffusers' LatentConsistencyModelPipeline; sines, then cosines, of
    1000 * (scale - 1) at frequencies from 1 to 1/10000.
    """
    half = width // 2
    frequency = np.exp(np.arange(half, dtype=np.float32) * np.float32(-math.log(10000.0) / (half - 1)))
    angle = np.float32((guidance_scale - 1) * 1000.0) * frequency
    embedding = np.concatenate([np.sin(angle), np.cos(angle)])
    return np.pad(embedding, (0, width % 2))


class Network:
    """A request, and its input tensors by name, in memory that OpenVINO owns."""

    def __init__(self, model: ov.CompiledModel, role: str) -> None:
        self.role = role
        self.request = model.create_infer_request()
        self.ports = {name: port for port in model.inputs for name in port.names}
        self.outputs = {name: port for port in model.outputs for name in port.names}

    def allocate(self, name: str, shape: Sequence[int]) -> ov.Tensor:
        """Give an input a tensor of its own. Raises where the model has no such input, or takes another shape."""
        if name not in self.ports:
            raise ModelError(
                f"the model has no input {name!r}",
                where=self.role,
                hint=f"It has: {', '.join(sorted(self.ports))}. Convert it as optimum-intel or ovforge does.",
            )
        port = self.ports[name]
        if not port.get_partial_shape().compatible(ov.PartialShape(list(shape))):
            raise InputError(
                f"the model takes {name} of shape {port.get_partial_shape()}, not {list(shape)}",
                where=self.role,
                hint="It was converted for a fixed size: use that size, or convert it with dynamic shapes.",
            )
        tensor = ov.Tensor(port.get_element_type(), list(shape))
        self.request.set_tensor(port, tensor)
        return tensor

    def share(self, name: str, tensor: ov.Tensor) -> None:
        """Let an input be another network's tensor."""
        self.request.set_tensor(self.ports[name], tensor)

    def accepts(self, name: str, tensor: ov.Tensor) -> bool:
        """Say whether an input takes a tensor as it is."""
        port = self.ports[name]
        shape = ov.PartialShape(list(tensor.shape))
        return bool(port.get_element_type() == tensor.element_type and port.get_partial_shape().compatible(shape))

    def run(self) -> None:
        """Run once, with the global interpreter lock free."""
        self.request.start_async()
        self.request.wait()


class Denoiser:
    """A UNet for `pictures` of one size. What holds for a run is set once; a step writes latents and a timestep.

    With classifier-free guidance (Ho and Salimans 2021) there are two halves, the unconditional one first. They run
    as one batch (`calls` = 1) or in two calls that share the latents.
    """

    def __init__(
        self, model: ov.CompiledModel, shape: tuple[int, ...], latent_channels: int, halves: int, calls: int
    ) -> None:
        pictures, channels, *size = shape
        self.halves, self._calls = halves, calls
        self._per_call = halves // calls
        self._latent_channels = latent_channels
        self._networks = [Network(model, "unet") for _ in range(calls)]
        first = self._networks[0]
        batch = pictures * self._per_call
        self.sample = first.allocate("sample", (batch, channels, *size))
        # One timestep serves the whole batch, unless the model was fixed to one for each sample.
        dimensions = first.ports["timestep"].get_partial_shape()
        self.timestep = first.allocate("timestep", [d.get_length() if d.is_static else 1 for d in dimensions])
        self._halves: list[Array] = []
        for network in self._networks:
            network.share("sample", self.sample)
            network.share("timestep", self.timestep)
            output = ov.Tensor(ov.Type.f32, [batch, latent_channels, *size])
            network.request.set_output_tensor(0, output)
            self._halves += list(output.data.reshape(-1, pictures, latent_channels, *size))
        self._controls: list[list[Network]] = []
        self._scratch: ov.Tensor | None = None

    def condition(self, name: str, value: Array) -> list[ov.Tensor]:
        """Set an input for a whole run: `value` holds a row for each picture, of each half. Return its tensors."""
        tensors = []
        for network, part in zip(self._networks, np.split(value, self._calls), strict=True):
            tensor = network.allocate(name, part.shape)
            tensor.data[...] = part
            tensors.append(tensor)
        return tensors

    def control(self, models: Sequence[ov.CompiledModel], shared: Mapping[str, list[ov.Tensor]]) -> None:
        """Let ControlNets (Zhang et al. 2023) condition each step; `shared` are the tensors they have with the UNet."""
        if not self._controls:
            roles = ["controlnet", *(f"controlnet_{number}" for number in range(1, len(models)))]
            self._controls = [
                [Network(model, role) for _ in range(self._calls)] for model, role in zip(models, roles, strict=True)
            ]
        for networks in self._controls:
            for call, network in enumerate(networks):
                for name, tensors in {**shared, "timestep": [self.timestep] * self._calls}.items():
                    if name not in network.ports:
                        continue
                    if network.accepts(name, tensors[call]):
                        network.share(name, tensors[call])
                    else:
                        network.allocate(name, tensors[call].shape).data[...] = tensors[call].data
                if self.sample.shape[1] == self._latent_channels:
                    network.share("sample", self.sample)
                else:  # an inpainting UNet sees more channels than a ControlNet does
                    shape = (self.sample.shape[0], self._latent_channels, *list(self.sample.shape)[2:])
                    self._scratch = self._scratch or network.allocate("sample", shape)
                    network.share("sample", self._scratch)
        missing = {name for name in self._controls[0][0].outputs if _residual(name) not in self._networks[0].ports}
        if missing:
            raise ModelError(
                "the UNet takes no residuals of a ControlNet",
                where="unet",
                hint="Add the transform 'controlnet-inputs' (pip install ovforge-sd-graph), or convert the model with"
                " load.controlnet = true.",
            )

    def conditions_of(self, number: int, pixels: Array) -> None:
        """Give ControlNet `number` its picture: float32 (pictures, 3, height, width) from 0 to 1."""
        for network in self._controls[number]:
            tensor = network.allocate("controlnet_cond", (len(pixels) * self._per_call, *pixels.shape[1:]))
            tensor.data.reshape(self._per_call, *pixels.shape)[...] = pixels

    def check(self, timesteps: NDArray[np.generic]) -> None:
        """Refuse timesteps that the model's input would round."""
        kind = self._networks[0].ports["timestep"].get_element_type()
        if kind.is_integral() and (np.asarray(timesteps, np.float64) % 1).any():
            raise InputError(
                f"this scheduler's timesteps have fractions, and the UNet takes {kind.get_type_name()}",
                where="scheduler",
                hint='Convert the model with timestep = "f32", or choose another scheduler.',
            )

    def extra_channels(self, value: Array) -> None:
        """Set the channels after the latents, (pictures, more, height, width), of an inpainting UNet."""
        self._sample()[:, :, self._latent_channels :] = value

    def predict(self, latents: Array, timestep: float, scales: Sequence[float], timings: Timings) -> list[Array]:
        """Return the prediction of each half, float32 (pictures, channels, height, width).

        `scales` holds a number for each ControlNet. The arrays returned are overwritten by the next step.
        """
        self._sample()[:, :, : self._latent_channels] = latents
        self.timestep.data[...] = timestep
        if self._scratch is not None:
            self._scratch.data[...] = self.sample.data[:, : self._latent_channels]
        for call, network in enumerate(self._networks):
            if self._controls:
                with timings.span("denoise.controlnet"):
                    self._residuals(call, scales)
            with timings.span("denoise.unet"):
                network.run()
        return self._halves

    def _sample(self) -> Array:
        """Return the sample with the halves of one call apart."""
        data: Array = self.sample.data
        return data.reshape(self._per_call, -1, *data.shape[1:])

    def _residuals(self, call: int, scales: Sequence[float]) -> None:
        """Run the ControlNets, and hand the UNet the sum of what they give, each by its scale."""
        sums: dict[str, ov.Tensor] = {}
        for networks, scale in zip(self._controls, scales, strict=True):
            network = networks[call]
            if scale or not sums:
                network.run()
            for name, port in network.outputs.items():
                tensor = network.request.get_tensor(port)
                if name not in sums:
                    tensor.data[...] *= np.float32(scale)
                    sums[name] = tensor
                elif scale:
                    sums[name].data[...] += np.float32(scale) * tensor.data
        for name, tensor in sums.items():
            self._networks[call].share(_residual(name), tensor)


def _residual(output: str) -> str:
    """Return the UNet's input for an output of a ControlNet."""
    if output == "mid_block_res_sample":
        return "mid_block_additional_residual"
    return output.replace("down_block_res_sample", "down_block_additional_residual")
