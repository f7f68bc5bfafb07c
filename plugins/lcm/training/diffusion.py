"""The noise schedule, and what the trainers and the sampler share."""

from __future__ import annotations

import copy

import torch

STEPS = 1000


class Noise:
    """Stable Diffusion's "scaled linear" schedule (Rombach et al. 2022): betas from 0.00085 to 0.012."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
        cumulative = torch.cumprod(1 - betas, dim=0)
        self.alpha, self.sigma = cumulative.sqrt(), (1 - cumulative).sqrt()

    def at(self, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha and sigma, shaped (batch, 1, 1, 1)."""
        return self.alpha[timestep].view(-1, 1, 1, 1), self.sigma[timestep].view(-1, 1, 1, 1)

    def add(self, clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return noisy latents."""
        alpha, sigma = self.at(timestep)
        return alpha * clean + sigma * noise

    def clean(self, velocity: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the prediction of the clean latents (v-prediction: Salimans and Ho 2022)."""
        alpha, sigma = self.at(timestep)
        return alpha * noisy - sigma * velocity

    def noise(self, velocity: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the prediction of the noise."""
        alpha, sigma = self.at(timestep)
        return alpha * velocity + sigma * noisy


def averaged(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy that will hold the moving average of `model`'s weights."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def follow(average: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Move the average towards the model."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def guidance_embedding(guidance: torch.Tensor, width: int) -> torch.Tensor:
    """Return sines and cosines of 1000 times (guidance scale - 1), shape (batch, width), as diffusers computes them."""
    half = width // 2
    frequency = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = guidance.view(-1, 1) * 1000.0 * frequency
    return torch.cat([angles.sin(), angles.cos()], dim=1)
