"""The scheduler `diffusers`: any scheduler class of diffusers behind ovforge's protocol. Needs torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ovforge.errors import ConfigError, InputError, did_you_mean
from ovforge.stages import RandomStream
from pydantic import BaseModel, ConfigDict, Field

from ovforge_diffusers.needs import need

__all__ = ["AdapterOptions", "DiffusersSampling", "DiffusersScheduler"]

Array = NDArray[np.float32]


class AdapterOptions(BaseModel):
    """Which class, and its own options over the model's scheduler_config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_name: str | None = Field(None, description="A scheduler class of diffusers; by default the model's own.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of that class.")


class DiffusersScheduler:
    """Makes a fresh diffusers scheduler for each run, since those keep the run's state in themselves."""

    def __init__(self, options: AdapterOptions, model_config: Mapping[str, Any]) -> None:
        need("torch")
        need("diffusers")
        name = options.class_name or model_config.get("_class_name")
        self._class = _find_class(name)
        _let_draw_from_streams(self._class)
        known = set(inspect.signature(self._class.__init__).parameters) - {"self"}
        for key in options.options:
            if key not in known:
                raise ConfigError(
                    f"{name} has no option {key!r}.{did_you_mean(key, known)}",
                    where="scheduler.options",
                    hint=f"It has: {', '.join(sorted(known))}.",
                )
        self._config = {**model_config, **options.options}

    def start(self, steps: int) -> DiffusersSampling:
        """Begin a run; diffusers' own refusals become InputError."""
        scheduler = self._class.from_config(self._config)
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError) as error:
            raise InputError(str(error), where="steps") from error
        return DiffusersSampling(scheduler)


class DiffusersSampling:
    """One run. Steps must be asked for in order, since diffusers counts them by itself."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._draws_noise = "generator" in inspect.signature(scheduler.step).parameters
        self.timesteps: NDArray[Any] = scheduler.timesteps.numpy()
        self.init_noise_sigma = float(scheduler.init_noise_sigma)

    def scale_input(self, latents: Array, index: int) -> Array:
        """Return diffusers' scaled latents."""
        import torch

        scaled: Array = self._scheduler.scale_model_input(
            torch.from_numpy(latents), self._scheduler.timesteps[index]
        ).numpy()
        return scaled

    def step(self, output: Array, index: int, latents: Array, rng: RandomStream) -> Array:
        """Return diffusers' next latents; the noise it asks for comes from `rng`."""
        import torch

        extra = {"generator": _Noise(rng)} if self._draws_noise else {}
        result = self._scheduler.step(
            torch.from_numpy(output),
            self._scheduler.timesteps[index],
            torch.from_numpy(latents),
            return_dict=False,
            **extra,
        )[0]
        following: Array = result.float().numpy()
        return following


class _Noise:
    """Stands for a torch.Generator where diffusers passes one on to `randn_tensor`."""

    def __init__(self, rng: RandomStream) -> None:
        self.rng = rng


def _let_draw_from_streams(scheduler_class: Any) -> None:
    """Let `randn_tensor`, where the class's module looks it up, draw from a `_Noise`.

    The replacement passes every other generator on, so it changes nothing for anybody else and stays in place.
    """
    import sys

    module: Any = sys.modules[scheduler_class.__module__]
    original = getattr(module, "randn_tensor", None)
    if original is not None and not hasattr(original, "draws_from_streams"):
        module.randn_tensor = _drawing_from_streams(original)


def _drawing_from_streams(original: Any) -> Any:
    import torch

    def randn_tensor(shape: Any, generator: Any = None, **options: Any) -> Any:
        if not isinstance(generator, _Noise):
            return original(shape, generator=generator, **options)
        drawn = torch.from_numpy(generator.rng.randn(tuple(shape)))
        return drawn.to(options["dtype"]) if options.get("dtype") else drawn

    randn_tensor.draws_from_streams = True  # type: ignore[attr-defined]
    return randn_tensor


def _find_class(name: str | None) -> Any:
    """Return a scheduler class by name. Raises ConfigError with the nearest one."""
    import diffusers

    names = [known for known in dir(diffusers) if known.endswith(("Scheduler", "SchedulerMixin"))]
    if not name or name not in names:
        what = f"unknown class {name!r}.{did_you_mean(name, names)}" if name else "the model names no class"
        raise ConfigError(what, where="scheduler.class_name", hint="Name a scheduler class of diffusers.")
    return getattr(diffusers, name)
