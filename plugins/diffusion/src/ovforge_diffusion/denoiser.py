"""The denoiser: requests whose tensors stay in place from step to step, with or without ControlNets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError
from ovforge.model import Timings
from ovforge_diffusion.architectures.base import Architecture, Arrays
from ovforge_diffusion.controlnets import ControlNets
from ovforge_diffusion.network import Network
from ovforge_diffusion.shallow import ShallowSteps, StepRule

__all__ = ["Denoiser"]

Array = NDArray[np.float32]


class Denoiser:
    """A UNet or transformer for pictures of one size. What holds for a run is set once; a step writes latents.

    `shape` is what it takes of the pictures, and `latents` what of that are the latents: (pictures, ...), in the
    architecture's layout. With classifier-free guidance (Ho and Salimans 2021) there are two halves, the unconditional
    one first, or more if a prompt has several parts. They run as one batch (`calls` = 1), or each in a call of its own
    (`calls` = `halves`); calls share the latents. Each row is told so many timesteps (`columns`), if the network has an
    axis for them.
    """

    def __init__(
        self,
        model: ov.CompiledModel,
        architecture: Architecture,
        shape: tuple[int, ...],
        latents: tuple[int, ...],
        halves: int,
        calls: int,
        columns: int = 1,
    ) -> None:
        pictures = shape[0]
        self.halves, self._calls, self._per_call = halves, calls, halves // calls
        self._architecture = architecture
        self._role, self._channels = architecture.denoiser, latents[architecture.channel_axis]
        self._networks = [Network(model, self._role) for _ in range(calls)]
        first = self._networks[0]
        batch = pictures * self._per_call
        self.sample = first.allocate(architecture.sample, (batch, *shape[1:]))
        self.timestep = first.allocate_timestep(batch if architecture.timestep_rows else 1, columns)
        self._latest: Array | None = None
        # Where the latents stand in what the network takes; the rest does not change from step to step.
        data = self.sample.data.reshape(self._per_call, *shape)
        self._latents = data[:, :, *(slice(0, side) for side in latents[1:])]
        self._extra = data[:, :, *_beyond(shape, latents)] if shape != latents else None
        given = list(shape)
        axis = architecture.channel_axis
        given[axis] = architecture.given_channels or latents[axis]
        self._halves: list[Array] = []
        for network in self._networks:
            network.share(architecture.sample, self.sample)
            network.share("timestep", self.timestep)
            output = ov.Tensor(ov.Type.f32, [batch, *given[1:]])
            network.request.set_output_tensor(0, output)
            whole = output.data.reshape(-1, *given)
            self._halves += list(whole[:, :, *(slice(0, side) for side in latents[1:])])
        self._controls: ControlNets | None = None
        self._shallow: ShallowSteps | None = None

    def cache_steps(self, model: ov.CompiledModel, rule: StepRule) -> None:
        """Run the outer part, `model`, alone if a rule allows it."""
        self._shallow = ShallowSteps(model, self._networks, rule)

    def takes(self, name: str) -> bool:
        """Say whether the network has an input of a name."""
        return name in self._networks[0].ports

    def condition(self, name: str, value: NDArray[np.generic]) -> list[ov.Tensor]:
        """Set an input for a whole run: `value` holds a row for each picture, of each half. Return its tensors."""
        tensors = []
        for network, part in zip(self._networks, np.split(value, self._calls), strict=True):
            tensor = network.allocate(name, part.shape)
            tensor.data[...] = part
            tensors.append(tensor)
        return tensors

    def hold(self, name: str, value: NDArray[np.generic]) -> None:
        """Set an input that all rows share; a model that takes it for each row gets it for each."""
        first = self._networks[0]
        tensor = first.hold(name, value, self.sample.shape[0])
        for network in self._networks[1:]:
            network.share(name, tensor)

    def change(self, name: str, value: NDArray[np.generic]) -> None:
        """Give an input that `condition` set, and what ControlNets see of it, other values of the same shape."""
        for network, part in zip(self._networks, np.split(value, self._calls), strict=True):
            network.request.get_tensor(network.ports[name]).data[...] = part
        if self._controls:
            self._controls.changed()

    def control(
        self,
        models: Mapping[str, ov.CompiledModel],
        roles: Sequence[str],
        shared: Mapping[str, list[ov.Tensor]],
        held: Arrays,
        own: Sequence[Arrays],
    ) -> None:
        """Let ControlNets condition each step: `roles` are those of each condition, `own` their own inputs.

        `shared` are tensors of the denoiser, `held` what it holds for all rows. Raises ModelError if one of them does
        not belong to the denoiser.
        """
        if self._controls is None or self._controls.roles != tuple(roles):
            pictures = len(self._halves[0])
            self._controls = ControlNets(models, roles, self._networks, self._architecture, pictures, self.halves)
        self._controls.begin(self.sample, self.timestep, self._channels, shared, held, own)

    def check(self, timesteps: NDArray[np.generic]) -> None:
        """Refuse timesteps that a model's input would round."""
        for network in (self._networks[0], *(self._controls.each() if self._controls else ())):
            kind = network.ports["timestep"].get_element_type()
            if kind.is_integral() and (np.asarray(timesteps, np.float64) % 1).any():
                raise InputError(
                    f"this scheduler's timesteps have fractions, and the {network.role} takes {kind.get_type_name()}",
                    where="scheduler",
                    hint="Leave optimize = false out, or add the transform 'exact-timesteps'.",
                )

    def extend(self, value: Array) -> None:
        """Set what stands beside the latents, such as an inpainting UNet's mask: (pictures, ...)."""
        assert self._extra is not None
        self._extra[...] = value

    def keep_still(self, still: Array) -> None:
        """Tell tokens that are given that there is less noise: none for those with 1 in `still`, (tokens,).

        Others have at most the share of noise that 1 lacks. Raises ModelError for a network that takes one timestep for
        all tokens.
        """
        if self.timestep.shape[1:] != still.shape:
            raise ModelError(
                f"the {self._role} takes one timestep for all tokens, and frames that are given have their own",
                where=self._role,
                hint="Convert the model with ovforge, or with optimum-intel 2.2.",
            )
        self._latest = (1 - still) * np.float32(self._architecture.train_timesteps)

    def predict(
        self,
        latents: Array,
        timestep: float,
        active: Sequence[int],
        scales: Sequence[float],
        timings: Timings,
        number: int = 0,
    ) -> dict[int, Array]:
        """Return the prediction of each active half, float32 in the shape of the latents, at step `number` of a run.

        Halves that run as one batch are all active. `scales` holds a number for each ControlNet. The arrays returned
        are overwritten by the next step.
        """
        self._latents[...] = latents
        self.timestep.data[...] = timestep if self._latest is None else np.minimum(timestep, self._latest)
        if self._controls:
            self._controls.follow()
        if self._shallow is not None and number == 0:
            self._shallow.begin()
        for call, network in enumerate(self._networks):
            if self._calls > 1 and call not in active:
                continue
            if self._controls:
                with timings.span("denoise.controlnet"):
                    self._controls.run(call, scales)
            if self._shallow is not None:
                self._shallow.run(call, number, timings)
                continue
            with timings.span(f"denoise.{self._role}"):
                network.run()
        return {half: self._halves[half] for half in active}


def _beyond(shape: tuple[int, ...], latents: tuple[int, ...]) -> tuple[slice, ...]:
    """Return what of a row lies beyond the latents: along the one axis on which it is longer than they are."""
    return tuple(
        slice(inner if outer > inner else 0, outer) for outer, inner in zip(shape[1:], latents[1:], strict=True)
    )
