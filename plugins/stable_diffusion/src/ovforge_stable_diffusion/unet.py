"""The denoiser: one request whose tensors stay in place from step to step."""

from __future__ import annotations

import math

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError

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


class Denoiser:
    """A UNet for one batch and size. `conditions` is set once a run; a step writes latents and a timestep, no more.

    With classifier-free guidance (Ho and Salimans 2021) both halves run as one batch: `states` holds the
    unconditional ones first.
    """

    def __init__(self, model: ov.CompiledModel, batch: int, channels: int, height: int, width: int) -> None:
        self._request = model.create_infer_request()
        self._ports = {name: port for port in model.inputs for name in port.names}
        self._missing("sample", "timestep", "encoder_hidden_states")
        self.latents = self._input("sample", (batch, channels, height, width))
        shape = self._ports["timestep"].get_partial_shape()
        # One timestep serves the whole batch, unless the model was fixed to one for each sample.
        self._timestep = self._input("timestep", tuple(d.get_length() if d.is_static else 1 for d in shape))
        output = ov.Tensor(ov.Type.f32, [batch, channels, height, width])
        self._request.set_output_tensor(0, output)
        self._output: Array = output.data

    def condition(self, states: Array, embedding: Array | None) -> None:
        """Set what holds for a whole run: text states (batch, tokens, width), guidance embedding (width,)."""
        self._input("encoder_hidden_states", states.shape)[...] = states
        if embedding is not None:
            self._missing("timestep_cond")
            self._input("timestep_cond", (len(states), len(embedding)))[...] = embedding

    def check(self, timesteps: NDArray[np.generic]) -> None:
        """Refuse timesteps that the model's input would round."""
        kind = self._ports["timestep"].get_element_type()
        if kind.is_integral() and (np.asarray(timesteps, np.float64) % 1).any():
            raise InputError(
                f"this scheduler's timesteps have fractions, and the UNet takes {kind.get_type_name()}",
                where="scheduler",
                hint='Convert the model with timestep = "f32", or choose another scheduler.',
            )

    def predict(self, timestep: float) -> Array:
        """Run one step on `self.latents`; the array returned is overwritten by the next step."""
        self._timestep[...] = timestep
        self._request.start_async()
        self._request.wait()
        return self._output

    def _input(self, name: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
        """Return an array that is the input's memory."""
        port = self._ports[name]
        if not port.get_partial_shape().compatible(ov.PartialShape(list(shape))):
            raise InputError(
                f"the model takes {name} of shape {port.get_partial_shape()}, not {list(shape)}",
                hint="It was converted for a fixed size: use that size, or convert it with dynamic shapes.",
            )
        tensor = ov.Tensor(port.get_element_type(), list(shape))
        self._request.set_tensor(port, tensor)
        return tensor.data

    def _missing(self, *names: str) -> None:
        for name in names:
            if name not in self._ports:
                raise ModelError(
                    f"the UNet has no input {name!r}",
                    where="unet",
                    hint=f"It has: {', '.join(sorted(self._ports))}. Convert it as optimum-intel or ovforge does.",
                )
