"""Small torch modules around diffusers' models, with the inputs and outputs that the converted models have."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Decoder", "Encoder", "Outputs", "UNet"]


class Outputs(torch.nn.Module):
    """A text encoder that returns named fields of its result, in order."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result: Any = self.model(input_ids=input_ids)
        return tuple(getattr(result, name) for name in self.names)


class UNet(torch.nn.Module):
    """A UNet with or without the guidance embedding."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.guided = "timestep_cond" in inputs

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        extra = {"timestep_cond": timestep_cond} if self.guided else {}
        result: torch.Tensor = self.model(sample, timestep, encoder_hidden_states, return_dict=False, **extra)[0]
        return result


class Decoder(torch.nn.Module):
    """The decoder of an AutoencoderKL."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latent_sample: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.model.decode(latent_sample, return_dict=False)[0]
        return result


class Encoder(torch.nn.Module):
    """The encoder of an AutoencoderKL: mean and log-variance of the latents, one after the other."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        parameters: torch.Tensor = self.model.encode(sample).latent_dist.parameters
        return parameters
