"""The denoiser: requests whose tensors stay in place from step to step, with or without ControlNets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError
from ovforge.model import Timings

__all__ = ["GUIDANCE", "MIDDLE_RESIDUAL", "RESIDUAL", "RESIDUALS", "Denoiser", "residual_shapes"]

Array = NDArray[np.float32]

GUIDANCE = "timestep_cond"
"""The UNet's input for an embedded guidance scale: diffusers' name."""

RESIDUAL = "down_block_additional_residual_"
"""The UNet's inputs for what ControlNets give, before their number: names of diffusers and OpenVINO's notebooks."""

MIDDLE_RESIDUAL = "mid_block_additional_residual"

RESIDUALS = "ovforge_residuals"
"""Key of the UNet's config.json for the number of such inputs, where the transform controlnet-inputs made them."""

_FAMILIES = "A ControlNet must be made for the UNet's own architecture: one of Stable Diffusion 1.5 fits no 2.1 or XL."


def residual_shapes(config: Mapping[str, Any], sample: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return shapes of the inputs for residuals by name, as a UNet's config tells them for a sample of a shape.

    They are those of what its way down leaves: the first convolution, then each layer of each level, and what halves
    the sides after each level but the last.
    """
    rows, _, height, width = sample
    widths, layers = config.get("block_out_channels"), config.get("layers_per_block", 2)
    if not widths:
        return {}
    each = layers if isinstance(layers, list | tuple) else [layers] * len(widths)
    shapes = [(rows, widths[0], height, width)]
    for level, (channels, count) in enumerate(zip(widths, each, strict=False)):
        shapes += [(rows, channels, height, width)] * count
        if level + 1 < len(widths):
            height, width = (height + 1) // 2, (width + 1) // 2
            shapes.append((rows, channels, height, width))
    return {**{f"{RESIDUAL}{number}": shape for number, shape in enumerate(shapes)}, MIDDLE_RESIDUAL: shapes[-1]}


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
            fixed = "It was converted for a fixed size: use that size, or convert it with dynamic shapes."
            raise InputError(
                f"the model takes {name} of shape {port.get_partial_shape()}, not {list(shape)}",
                where=self.role,
                hint=f"{fixed} {_FAMILIES}" if self.role.startswith("controlnet") else fixed,
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

    With classifier-free guidance (Ho and Salimans 2021) there are two halves, the unconditional one first, or more if a
    prompt has several parts. They run as one batch (`calls` = 1) or in as many calls, which share the latents.
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
        self.timestep = _allocate_timestep(first)
        self._halves: list[Array] = []
        for network in self._networks:
            network.share("sample", self.sample)
            network.share("timestep", self.timestep)
            output = ov.Tensor(ov.Type.f32, [batch, latent_channels, *size])
            network.request.set_output_tensor(0, output)
            self._halves += list(output.data.reshape(-1, pictures, latent_channels, *size))
        self._controls: list[list[Network]] = []
        self._followers: list[tuple[NDArray[np.generic], NDArray[np.generic]]] = []
        """Inputs of ControlNets, and what of the UNet's inputs is copied there at each step."""

    def condition(self, name: str, value: Array) -> list[ov.Tensor]:
        """Set an input for a whole run: `value` holds a row for each picture, of each half. Return its tensors."""
        tensors = []
        for network, part in zip(self._networks, np.split(value, self._calls), strict=True):
            tensor = network.allocate(name, part.shape)
            tensor.data[...] = part
            tensors.append(tensor)
        return tensors

    def change(self, name: str, value: Array) -> None:
        """Give an input that `condition` set, and what ControlNets see of it, other values of the same shape."""
        for call, part in enumerate(np.split(value, self._calls)):
            for network in (self._networks[call], *(networks[call] for networks in self._controls)):
                if name in network.ports:
                    network.request.get_tensor(network.ports[name]).data[...] = part

    def control(self, models: Mapping[str, ov.CompiledModel], shared: Mapping[str, list[ov.Tensor]]) -> None:
        """Let ControlNets (Zhang et al. 2023), by role, condition each step; `shared` are tensors of the UNet.

        Raises ModelError if one of them does not belong to the UNet.
        """
        if not self._controls:
            controls = [[Network(model, role) for _ in range(self._calls)] for role, model in models.items()]
            for networks in controls:
                self._check_fit(networks[0], {*shared, "sample", "timestep", "controlnet_cond"})
            for network in (network for networks in controls for network in networks):
                self._follow(network)
            self._controls = controls
        for networks in self._controls:
            for call, network in enumerate(networks):
                for name, tensors in shared.items():
                    if name not in network.ports:
                        continue
                    if network.accepts(name, tensors[call]):
                        network.share(name, tensors[call])
                    else:
                        network.allocate(name, tensors[call].shape).data[...] = tensors[call].data

    def _check_fit(self, network: Network, known: set[str]) -> None:
        """Refuse a ControlNet whose inputs are not there, or whose outputs the UNet does not take."""
        ports = self._networks[0].ports
        takes = {name for name in ports if name.startswith(RESIDUAL) or name == MIDDLE_RESIDUAL}
        if not takes:
            raise ModelError(
                "the UNet takes no residuals of a ControlNet",
                where="unet",
                hint="Leave optimize = false out, or add the transform 'controlnet-inputs'.",
            )
        missing = [name for name in ("sample", "timestep", "controlnet_cond") if name not in network.ports]
        # Compiling may give an input more names, so that one of them being known is enough.
        foreign = [min(port.names) for port in network.ports.values() if not port.names & known]
        if missing or foreign:
            wrong = f"has no input {missing[0]!r}" if missing else f"has an input that the UNet has not: {foreign[0]!r}"
            raise ModelError(f"it {wrong}", where=network.role, hint=f"Is it a converted ControlNet? {_FAMILIES}")
        gives = {_residual(name): port for name, port in network.outputs.items()}
        if set(gives) != takes:
            raise ModelError(
                f"it gives {len(gives)} residuals, and the UNet takes {len(takes)}, or their names differ",
                where=network.role,
                hint=f"Outputs: {', '.join(sorted(network.outputs)) or 'none'}. {_FAMILIES}",
            )
        for name, port in gives.items():
            wanted = ports[name]
            kinds = [each.get_element_type().get_type_name() for each in (port, wanted)]
            shapes = [each.get_partial_shape() for each in (port, wanted)]
            if kinds[0] != kinds[1] or not shapes[0].compatible(shapes[1]):
                raise ModelError(
                    f"{name} is {kinds[0]} {shapes[0]}, and the UNet takes {kinds[1]} {shapes[1]}",
                    where=network.role,
                    hint=_FAMILIES,
                )

    def _follow(self, network: Network) -> None:
        """Give a ControlNet the UNet's sample and timestep: the same tensors, or ones that are copied at each step."""
        if network.accepts("sample", self.sample):
            network.share("sample", self.sample)
        else:  # an inpainting UNet sees more channels than a ControlNet does
            shape = [self.sample.shape[0], self._latent_channels, *list(self.sample.shape)[2:]]
            own = network.allocate("sample", shape)
            self._followers.append((own.data, self.sample.data[:, : self._latent_channels]))
        if network.accepts("timestep", self.timestep):
            network.share("timestep", self.timestep)
        else:
            self._followers.append((_allocate_timestep(network).data, self.timestep.data.reshape(-1)[:1]))

    def conditions_of(self, number: int, pixels: Array) -> None:
        """Give ControlNet `number` its picture: float32 (pictures, 3, height, width) from 0 to 1."""
        for network in self._controls[number]:
            tensor = network.allocate("controlnet_cond", (len(pixels) * self._per_call, *pixels.shape[1:]))
            tensor.data.reshape(self._per_call, *pixels.shape)[...] = pixels

    def check(self, timesteps: NDArray[np.generic]) -> None:
        """Refuse timesteps that a model's input would round."""
        for network in (self._networks[0], *(networks[0] for networks in self._controls)):
            kind = network.ports["timestep"].get_element_type()
            if kind.is_integral() and (np.asarray(timesteps, np.float64) % 1).any():
                raise InputError(
                    f"this scheduler's timesteps have fractions, and the {network.role} takes {kind.get_type_name()}",
                    where="scheduler",
                    hint="Leave optimize = false out, or add the transform 'fractional-timesteps'.",
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
        for own, source in self._followers:
            own[...] = source
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


def _allocate_timestep(network: Network) -> ov.Tensor:
    """Give a network its timestep: one serves the whole batch, unless the model was fixed to one for each sample."""
    dimensions = network.ports["timestep"].get_partial_shape()
    return network.allocate("timestep", [d.get_length() if d.is_static else 1 for d in dimensions])


def _residual(output: str) -> str:
    """Return the UNet's input for an output of a ControlNet."""
    if output == "mid_block_res_sample":
        return MIDDLE_RESIDUAL
    return output.replace("down_block_res_sample_", RESIDUAL)
