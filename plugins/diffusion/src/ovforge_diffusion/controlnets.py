"""ControlNets beside a UNet (Zhang et al. 2023): they see what it sees, and what they give is added inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge_diffusion.network import Network

__all__ = ["CONTROLNETS", "MIDDLE_RESIDUAL", "RESIDUAL", "RESIDUALS", "ControlNets", "residual_shapes"]

Array = NDArray[np.float32]

CONTROLNETS = ("controlnet", "controlnet_1", "controlnet_2", "controlnet_3")

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


class ControlNets:
    """ControlNets, by role, for the UNet's networks: one of each for each of the UNet's calls.

    `shared` are the UNet's input tensors, one for each call. Raises ModelError if a model does not belong to the UNet.
    """

    def __init__(
        self,
        models: Mapping[str, ov.CompiledModel],
        unets: Sequence[Network],
        sample: ov.Tensor,
        timestep: ov.Tensor,
        latent_channels: int,
        shared: Mapping[str, list[ov.Tensor]],
    ) -> None:
        self._unets, self._sample, self._timestep, self._channels = unets, sample, timestep, latent_channels
        self._networks = [[Network(model, role, _FAMILIES) for _ in unets] for role, model in models.items()]
        self._followers: list[tuple[NDArray[np.generic], NDArray[np.generic]]] = []
        """Inputs of ControlNets, and what of the UNet's inputs is copied there at each step."""
        for networks in self._networks:
            self._check_fit(networks[0], {*shared, "sample", "timestep", "controlnet_cond"})
        for network in self.each():
            self._follow(network)

    def each(self) -> list[Network]:
        """Return the networks of every ControlNet and call."""
        return [network for networks in self._networks for network in networks]

    def of_call(self, call: int) -> list[Network]:
        """Return the networks that go with one of the UNet's calls."""
        return [networks[call] for networks in self._networks]

    def share(self, shared: Mapping[str, list[ov.Tensor]]) -> None:
        """Give them the UNet's inputs: the same tensors, or copies if a model takes another type."""
        for networks in self._networks:
            for call, network in enumerate(networks):
                for name, tensors in shared.items():
                    if name not in network.ports:
                        continue
                    if network.accepts(name, tensors[call]):
                        network.share(name, tensors[call])
                    else:
                        network.allocate(name, tensors[call].shape).data[...] = tensors[call].data

    def show(self, number: int, pixels: Array, per_call: int) -> None:
        """Give ControlNet `number` its picture: float32 (pictures, 3, height, width) from 0 to 1."""
        for network in self._networks[number]:
            tensor = network.allocate("controlnet_cond", (len(pixels) * per_call, *pixels.shape[1:]))
            tensor.data.reshape(per_call, *pixels.shape)[...] = pixels

    def follow(self) -> None:
        """Copy what of the UNet's sample and timestep they cannot share."""
        for own, source in self._followers:
            own[...] = source

    def run(self, call: int, scales: Sequence[float]) -> None:
        """Run those of one call, and hand the UNet the sum of what they give, each by its scale."""
        sums: dict[str, ov.Tensor] = {}
        for networks, scale in zip(self._networks, scales, strict=True):
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
            self._unets[call].share(_residual(name), tensor)

    def _check_fit(self, network: Network, known: set[str]) -> None:
        """Refuse a ControlNet whose inputs are not there, or whose outputs the UNet does not take."""
        ports = self._unets[0].ports
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
        if network.accepts("sample", self._sample):
            network.share("sample", self._sample)
        else:  # an inpainting UNet sees more channels than a ControlNet does
            shape = [self._sample.shape[0], self._channels, *list(self._sample.shape)[2:]]
            own = network.allocate("sample", shape)
            self._followers.append((own.data, self._sample.data[:, : self._channels]))
        if network.accepts("timestep", self._timestep):
            network.share("timestep", self._timestep)
        else:
            own = network.allocate_timestep()
            self._followers.append((own.data, self._timestep.data.reshape(-1)[:1]))


def _residual(output: str) -> str:
    """Return the UNet's input for an output of a ControlNet."""
    if output == "mid_block_res_sample":
        return MIDDLE_RESIDUAL
    return output.replace("down_block_res_sample_", RESIDUAL)
