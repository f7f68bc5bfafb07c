"""Any diffusers scheduler as an ovforge Scheduler.

Steps are computed by diffusers. Its noise is not: while a step runs, `torch.randn` in this thread draws from the
pipeline's own stream, so that one seed decides everything, whatever the scheduler.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ovforge.errors import ConfigError, InputError, PluginError, did_you_mean
from ovforge_diffusers.convert import quiet
from ovforge_diffusers.options import SchedulerOptions
from ovforge_diffusers.requirements import EXTRA, need

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ovforge.contracts import FlowRun, RandomStream

__all__ = ["DiffusersSampling", "DiffusersScheduler", "scheduler_class"]

PURPOSE = "the scheduler 'diffusers'"
WHERE = "scheduler.class_name"


class DiffusersScheduler:
    """A scheduler class of diffusers with its config; immutable, each run has its own instance."""

    def __init__(self, options: SchedulerOptions, model_config: Mapping[str, Any]) -> None:
        need("torch", PURPOSE)
        name = options.class_name or model_config.get("_class_name")
        if not isinstance(name, str):
            raise ConfigError(
                "which scheduler? The model names none", where=WHERE, hint="Set it, as in 'EulerDiscreteScheduler'."
            )
        self._class = scheduler_class(name)
        self.spreads_steps = self._class.__name__ == "LCMScheduler"
        self._check(options.options)
        self._config = {**model_config, **options.options}
        if "_use_default_values" in self._config:
            # diffusers resets the values listed there to the class's defaults, even those just chosen.
            listed = self._config["_use_default_values"]
            self._config["_use_default_values"] = [key for key in listed if key not in options.options]
        self._make()

    def _check(self, chosen: dict[str, Any]) -> None:
        known = set(inspect.signature(self._class.__init__).parameters) - {"self", "kwargs"}
        for option in chosen:
            if option not in known:
                raise ConfigError(
                    f"{self._class.__name__} has no option {option!r}.{did_you_mean(option, known)}",
                    where=f"scheduler.options.{option}",
                    hint=f"It has: {', '.join(sorted(known))}.",
                )

    def _make(self) -> Any:
        try:
            with quiet():
                return self._class.from_config(dict(self._config))
        except ImportError as error:
            raise PluginError(f"{self._class.__name__}: {' '.join(str(error).split())}", where=WHERE) from error
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise ConfigError(
                f"{self._class.__name__} refuses its config: {error}", where="scheduler.options"
            ) from error

    @property
    def own_sigmas(self) -> bool:
        """Whether the options spread a flow's sigmas: see `ovforge.contracts.FlowScheduler`."""
        return bool(self._make().config.get("use_flow_sigmas", False))

    def start(self, steps: int, strength: float = 1.0) -> DiffusersSampling:
        """Begin a run; the number of timesteps may be larger than `steps` (Heun, PNDM).

        With `strength` the run begins later, as in diffusers' image-to-image pipelines; LCM spreads its steps.
        """
        scheduler = self._make()
        spread = {"strength": strength} if self.spreads_steps and strength < 1 else {}
        first = 0 if spread else (steps - min(int(steps * strength), steps)) * scheduler.order
        return self._begun(scheduler, steps, {"num_inference_steps": steps, **spread}, first, strength)

    @property
    def order(self) -> int:
        """How often the network is called for one step."""
        return int(getattr(self._class, "order", 1))

    def start_given(
        self, strength: float = 1.0, *, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> DiffusersSampling:
        """Begin a run over the timesteps or noise levels of a call. Raises InputError if the class takes none."""
        scheduler = self._make()
        said = self._said(scheduler, timesteps, sigmas)
        run = self._begun(scheduler, sum(map(len, said.values())), said, 0, strength)
        steps = len(run.timesteps)  # diffusers' pipelines count calls of the network here, of two calls a step, too
        first = (steps - min(int(steps * strength), steps)) * self.order
        return self._begun(scheduler, steps, said, first, strength)

    def _said(
        self, scheduler: Any, timesteps: Sequence[float] | None, sigmas: Sequence[float] | None
    ) -> dict[str, Any]:
        """Return levels of a call, or of a model's pipeline. Raises InputError if the class has no place for them."""
        import numpy as np

        said: dict[str, Any] = {} if timesteps is None else {"timesteps": list(timesteps)}
        said |= {} if sigmas is None else {"sigmas": np.array(sigmas)}
        taken = inspect.signature(scheduler.set_timesteps).parameters
        if unknown := [name for name in said if name not in taken]:
            raise InputError(
                f"{self._class.__name__} takes no {unknown[0]}, and the call, or the model's pipeline, gives some",
                where=unknown[0],
                hint="Leave them out of the call, or choose a class that takes them: 'EulerDiscreteScheduler', and "
                "'FlowMatchEulerDiscreteScheduler' for flows.",
            )
        return said

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> DiffusersSampling:
        """Begin a run as diffusers' pipelines of flow models do, with what they give to `set_timesteps`."""
        scheduler = self._make()
        said = self._said(scheduler, flow.timesteps, flow.sigmas)
        given: dict[str, Any] = dict(said) or {"num_inference_steps": steps}
        mu = _shift(scheduler, flow) if flow.mu is None else flow.mu
        if scheduler.config.get("use_dynamic_shifting") and mu is not None:
            given["mu"] = mu
        first = int(max(steps - min(steps * strength, steps), 0)) * scheduler.order
        return self._begun(scheduler, steps, given, first, strength)

    def _begun(
        self, scheduler: Any, steps: int, given: Mapping[str, Any], first: int, strength: float
    ) -> DiffusersSampling:
        try:
            scheduler.set_timesteps(**given)
        except (ValueError, TypeError, IndexError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            raise InputError(f"{self._class.__name__} cannot take {steps} steps: {error}", where="steps") from error
        if first >= len(scheduler.timesteps):
            raise InputError(
                f"{strength} of {steps} steps is less than one", where="strength", hint="Give more of either."
            )
        return DiffusersSampling(scheduler, first)


def _shift(scheduler: Any, flow: FlowRun) -> float | None:
    """Return the shift that diffusers' pipelines compute from the picture's size."""
    if flow.image_seq_len is None:
        return None
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    line = [scheduler.config.get(name, default) for name, default in defaults.items()]
    return float(calculate_shift(flow.image_seq_len, *line))


class DiffusersSampling:
    """One run. Its steps must be taken in order, from any first one: diffusers keeps their history."""

    def __init__(self, scheduler: Any, first: int = 0) -> None:
        torch = need("torch", PURPOSE)
        self._scheduler = scheduler
        self.first = first
        self._times = scheduler.timesteps
        times = self._times if self._times.dtype == torch.int64 else self._times.to(torch.float32)
        self.timesteps: NDArray[Any] = times.numpy()
        self.init_noise_sigma = float(getattr(scheduler, "init_noise_sigma", 1))
        self._next: int | None = None
        takes = inspect.signature(scheduler.step).parameters
        self._extra: dict[str, Any] = {"generator": torch.Generator("cpu")} if "generator" in takes else {}
        if "eta" in takes:
            self._extra["eta"] = 0.0  # as diffusers' pipelines give it, whatever the step's own default is

    def scale_input(self, latents: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        """Return what the network sees at step `index`; `latents` itself where the method does not scale."""
        import torch

        self._begin(index)
        if not hasattr(self._scheduler, "scale_model_input"):
            return latents
        sample = torch.from_numpy(latents)
        scaled = self._scheduler.scale_model_input(sample, self._times[index])
        return latents if scaled is sample else _array(scaled)

    def add_noise(self, original: NDArray[np.float32], noise: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        """Return clean latents noised to the level of step `index`."""
        import torch

        # diffusers noises for the step that its run stands at; a copy stands where we want.
        there = copy.copy(self._scheduler)
        if hasattr(there, "set_begin_index"):
            there._step_index = None
            there.set_begin_index(index)
        picture, fresh, time = torch.from_numpy(original), torch.from_numpy(noise), self._times[index][None]
        if hasattr(there, "scale_noise"):
            return _array(there.scale_noise(picture, time, fresh))
        return _array(there.add_noise(picture, fresh, time))

    def step(
        self, output: NDArray[np.float32], index: int, latents: NDArray[np.float32], rng: RandomStream
    ) -> NDArray[np.float32]:
        """Return the latents after step `index`."""
        import torch

        self._begin(index)
        # Copies: multistep methods keep these for later steps, and callers reuse their buffers.
        noise, sample = torch.from_numpy(output.copy()), torch.from_numpy(latents.copy())
        with torch.no_grad(), _drawing_from(rng):
            result = self._scheduler.step(noise, self._times[index], sample, return_dict=False, **self._extra)[0]
        self._next = index + 1
        return _array(result)

    def _begin(self, index: int) -> None:
        if self._next is None:
            if hasattr(self._scheduler, "set_begin_index"):
                self._scheduler.set_begin_index(index)
            self._next = index
        elif index != self._next:
            raise ValueError(f"step {index} where {self._next} is due: a run goes in order; start another")


def _array(tensor: Any) -> NDArray[np.float32]:
    import torch

    result: NDArray[np.float32] = tensor.to(torch.float32).contiguous().numpy()
    return result


def _drawing_from(rng: RandomStream) -> Any:
    """Return a context in which torch.randn, in this thread, takes its numbers from `rng`.

    Every other source of random numbers is refused: a draw that the seed does not decide must not pass in silence.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    others = {torch.rand, torch.randint, torch.normal, torch.bernoulli, torch.rand_like, torch.randperm}
    others |= {torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.exponential_}

    class Drawing(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            if function is torch.randn:
                return draw(args[0] if isinstance(args[0], Sequence) else args, kwargs.get("dtype"))
            if function is torch.randn_like:
                return draw(args[0].shape, kwargs.get("dtype") or args[0].dtype)
            if function in others:
                raise PluginError(
                    f"this scheduler draws by torch's {function.__name__}, which the seed cannot decide", where=WHERE
                )
            return function(*args, **kwargs)

    def draw(shape: Sequence[int], dtype: Any) -> Any:
        numbers = torch.from_numpy(rng.randn(tuple(shape)))
        return numbers if dtype is None else numbers.to(dtype)

    return Drawing()


def scheduler_class(name: str) -> Any:
    """Return a scheduler class of diffusers that steps from (output, timestep, sample) alone.

    Raises ConfigError for a name that there is not, PluginError where it lacks a package of its own.
    """
    diffusers = need("diffusers", PURPOSE)
    names = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    if name not in names:
        raise ConfigError(f"diffusers has no scheduler {name!r}.{did_you_mean(name, names)}", where=WHERE)
    try:
        cls = getattr(diffusers, name)
    except (ImportError, RuntimeError) as error:
        raise PluginError(f"{name} cannot be imported: {error}", where=WHERE, hint=f"Run: {EXTRA}") from error
    if not hasattr(cls, "step"):
        raise PluginError(f"{name} needs a package that is not installed", where=WHERE)
    parameters = list(inspect.signature(cls.step).parameters.values())[1:]
    needed = [p.name for p in parameters[3:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    fitting = [p.name for p in parameters[:3]] == ["model_output", "timestep", "sample"]
    if not fitting or needed or not (hasattr(cls, "scale_model_input") or hasattr(cls, "scale_noise")):
        raise ConfigError(
            f"{name} samples in another way than from the network's output, the timestep and the latents",
            where=WHERE,
            hint="Choose one for latent diffusion, such as 'EulerDiscreteScheduler'.",
        )
    return cls
