"""ControlNets beside a denoiser (Zhang et al. 2023): they see what it sees, and what they give is added inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import ModelError
from ovforge_diffusion.architectures.base import Architecture
from ovforge_diffusion.network import Network
from ovforge_diffusion.residuals import BLOCK, MIDDLE_RESIDUAL, RESIDUAL, SCALE

__all__ = ["ControlNets"]

Tensors = Mapping[str, list[ov.Tensor]]
"""The denoiser's inputs that have rows, by name: a tensor for each of its calls."""

Arrays = Mapping[str, NDArray[Any]]
Copy = tuple[NDArray[np.generic], NDArray[np.generic]]

_CONDITION = "controlnet_cond"


class ControlNets:
    """A ControlNet for each condition, beside the networks of a denoiser: one of them for each of its calls.

    In families where ControlNets see the prompt alone there is one of each, and all calls take what it gives. `roles`
    are those of the ControlNets, one for each condition. Raises ModelError if a model does not belong to the denoiser.
    """

    def __init__(
        self,
        models: Mapping[str, ov.CompiledModel],
        roles: Sequence[str],
        denoisers: Sequence[Network],
        architecture: Architecture,
        pictures: int,
        halves: int,
    ) -> None:
        self.roles = tuple(roles)
        self._denoisers, self._architecture, self._pictures = denoisers, architecture, pictures
        self._per_call = halves // len(denoisers)
        self._half = min(1, halves - 1) if architecture.controls_prompt else None
        """The half that they see; None if each call has its own."""
        known = "1.5 fits no 2.1 or XL" if architecture.denoiser == "unet" else "3 medium fits no 3.5"
        self._advice = (
            f"A ControlNet must be made for the {architecture.denoiser_name}'s own architecture: "
            f"one of Stable Diffusion {known}."
        )
        calls = len(denoisers) if self._half is None else 1
        self._networks = [[Network(models[role], role, self._advice) for role in roles] for _ in range(calls)]
        self._taken = self._fitting(self._networks[0])
        """For each condition, the denoiser's input -> the ControlNet's output."""
        self._totals: list[dict[tuple[str | None, ...], ov.Tensor]] = [{} for _ in range(calls)]
        self._followers: list[Copy] = []
        self._copies: list[Copy] = []
        """Inputs, and what of the denoiser's is copied there: at each step, or when the text changes."""
        self._ran = False

    def each(self) -> list[Network]:
        """Return the networks of every condition and call."""
        return [network for networks in self._networks for network in networks]

    def begin(
        self,
        sample: ov.Tensor,
        timestep: ov.Tensor,
        channels: int,
        shared: Tensors,
        held: Arrays,
        own: Sequence[Arrays],
    ) -> None:
        """Set what holds for a run.

        They see the first `channels` of the denoiser's sample. `shared` and `held` are inputs of the denoiser, with
        rows and without; `own` those of each condition, with a row for each picture.
        """
        self._followers, self._copies = [], []
        self._totals = [{} for _ in self._networks]  # what Z-Image's give is as long as the text
        for call, networks in enumerate(self._networks):
            for network, inputs in zip(networks, own, strict=True):
                self._check_inputs(network, {*shared, *held, *inputs})
                self._see(network, sample, timestep, channels)
                for name, tensors in shared.items():
                    if name in network.ports and name not in inputs:
                        self._share(network, name, tensors, call)
                for name, value in held.items():
                    if name in network.ports and name not in inputs:
                        network.hold(name, value, self._rows)
                for name, value in inputs.items():
                    self._give(network, name, value)
                if SCALE in network.ports:
                    network.allocate(SCALE, ())

    def changed(self) -> None:
        """Copy what they cannot share of the denoiser's inputs, which have other values now."""
        for own, source in self._copies:
            own[...] = source

    def follow(self) -> None:
        """Copy what of the denoiser's sample and timestep they cannot share: a step begins."""
        for own, source in self._followers:
            own[...] = source
        self._ran = False

    def run(self, call: int, scales: Sequence[float]) -> None:
        """Run those of one of the denoiser's calls, and hand it the sum of what they give, each by its scale."""
        number = call if self._half is None else 0
        if self._half is not None and self._ran:
            return
        networks, totals = self._networks[number], self._totals[number]
        for network, scale in zip(networks, scales, strict=True):
            if SCALE in network.ports:
                network.request.get_tensor(network.ports[SCALE]).data[...] = scale
            if scale or not totals:
                network.run()
        if not totals:
            self._allocate(number)
        for names, total in totals.items():
            view = total.data.reshape(-1, *self._output(networks, names).shape)
            view[0] = 0
            for network, name, scale in zip(networks, names, scales, strict=True):
                if name is not None and scale:
                    view[0] += np.float32(scale) * network.request.get_tensor(network.outputs[name]).data
            view[1:] = view[0]
        self._ran = True

    # -- small parts ----------------------------------------------------------------------------------------------

    @property
    def _rows(self) -> int:
        """Rows of their inputs."""
        return self._pictures * (self._per_call if self._half is None else 1)

    @property
    def _whole(self) -> bool:
        """Whether they have as many rows as the denoiser's calls have."""
        return self._half is None or self._per_call == 1

    def _see(self, network: Network, sample: ov.Tensor, timestep: ov.Tensor, channels: int) -> None:
        """Give a ControlNet the denoiser's sample and timestep: the same tensors, or ones that are copied."""
        name, axis = self._architecture.sample, self._architecture.channel_axis
        if self._whole and network.accepts(name, sample):
            network.share(name, sample)
        else:  # an inpainting UNet sees more channels than a ControlNet does
            shape = [self._rows, *list(sample.shape)[1:]]
            shape[axis] = channels
            source = sample.data[(slice(self._rows), *[slice(None)] * (axis - 1), slice(channels))]
            self._followers.append((network.allocate(name, shape).data, source))
        if self._whole and network.accepts("timestep", timestep):
            network.share("timestep", timestep)
        else:
            own = network.allocate_timestep(self._rows if self._architecture.timestep_rows else 1)
            self._followers.append((own.data, timestep.data.reshape(-1)[:1]))

    def _share(self, network: Network, name: str, tensors: Sequence[ov.Tensor], call: int) -> None:
        """Give a ControlNet an input of the denoiser: the same tensor, or a copy of the rows that it sees."""
        within = 0
        if self._half is not None:
            call, within = divmod(self._half, self._per_call)
        tensor = tensors[call]
        if self._whole and network.accepts(name, tensor):
            network.share(name, tensor)
            return
        begin = within * self._pictures
        source = tensor.data[begin : begin + self._rows]
        own = network.allocate(name, source.shape)
        own.data[...] = source
        self._copies.append((own.data, source))

    def _give(self, network: Network, name: str, value: NDArray[Any]) -> None:
        """Give a ControlNet an input of its own, the same for each half."""
        tensor = network.allocate(name, (self._rows, *value.shape[1:]))
        tensor.data.reshape(-1, *value.shape)[...] = value

    def _allocate(self, number: int) -> None:
        """Make the tensors of sums, when it is known how large they are, and let the denoiser take them."""
        networks, totals = self._networks[number], self._totals[number]
        denoisers = [self._denoisers[number]] if self._half is None else self._denoisers
        repeats = 1 if self._half is None else self._per_call
        for name in dict.fromkeys(name for taken in self._taken for name in taken):
            names = tuple(taken.get(name) for taken in self._taken)
            if names not in totals:
                rows, *rest = self._output(networks, names).shape
                totals[names] = ov.Tensor(ov.Type.f32, [rows * repeats, *rest])
            for denoiser in denoisers:
                denoiser.share(name, totals[names])

    def _output(self, networks: Sequence[Network], names: Sequence[str | None]) -> ov.Tensor:
        """Return the first output of some that are summed."""
        return next(
            network.request.get_tensor(network.outputs[name])
            for network, name in zip(networks, names, strict=True)
            if name is not None
        )

    # -- what does not fit ----------------------------------------------------------------------------------------

    def _check_inputs(self, network: Network, given: set[str]) -> None:
        """Refuse a ControlNet with inputs that nobody gives."""
        known = {*given, self._architecture.sample, "timestep", SCALE}
        # Compiling may give an input more names, so that one of them being known is enough.
        foreign = [min(port.names) for port in network.ports.values() if not port.names & known]
        if foreign:
            kind = self._architecture.denoiser_name
            raise self._unfit(network, f"has an input that the {kind} has not: {foreign[0]!r}")

    def _unfit(self, network: Network, what: str) -> ModelError:
        return ModelError(f"it {what}", where=network.role, hint=f"Is it a converted ControlNet? {self._advice}")

    def _fitting(self, networks: Sequence[Network]) -> list[dict[str, str]]:
        """Return the denoiser's input -> output of each ControlNet.

        Raises ModelError if the denoiser does not take what they give, or waits for what none of them gives.
        """
        architecture, ports = self._architecture, self._denoisers[0].ports
        kind = architecture.denoiser_name
        takes = {name for name in ports if name.startswith((RESIDUAL, BLOCK)) or name == MIDDLE_RESIDUAL}
        if not takes:
            raise ModelError(
                f"the {kind} takes no residuals of a ControlNet",
                where=architecture.denoiser,
                hint="Leave optimize = false out, or add the transform 'controlnet-inputs'.",
            )
        for network in networks:
            for name in (architecture.sample, "timestep", _CONDITION):
                if name not in network.ports:
                    raise self._unfit(network, f"has no input {name!r}")
        found = [architecture.residuals(network.role, network.outputs) for network in networks]
        given = {name for taken in found for name in taken}
        for network, taken in zip(networks, found, strict=True):
            lacks = [output for output in taken.values() if output not in network.outputs]
            if lacks or not taken or given != takes:
                count = len(network.outputs)
                raise ModelError(
                    f"it gives {count} residuals, and the {kind} takes {len(takes)}, or their names differ",
                    where=network.role,
                    hint=f"Outputs: {', '.join(sorted(network.outputs)) or 'none'}. {self._advice}",
                )
            for name, output in taken.items():
                self._check_shape(network, network.outputs[output], name, ports[name])
        return found

    def _check_shape(self, network: Network, port: ov.Output, name: str, wanted: ov.Output) -> None:
        """Refuse a ControlNet that gives what is of another type or shape than the denoiser takes."""
        kinds = [each.get_element_type().get_type_name() for each in (port, wanted)]
        shapes = [each.get_partial_shape() for each in (port, wanted)]
        if kinds[0] != kinds[1] or not shapes[0].compatible(shapes[1]):
            kind = self._architecture.denoiser_name
            raise ModelError(
                f"{name} is {kinds[0]} {shapes[0]}, and the {kind} takes {kinds[1]} {shapes[1]}",
                where=network.role,
                hint=self._advice,
            )
