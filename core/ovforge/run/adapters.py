"""What stays adjustable while a pipeline runs: `pipe.controls` and `pipe.adapters`, without compiling anything again.

Both give values to variables (states) of the models. OpenVINO keeps a variable's value in each request, and tasks make
requests as they need them; so values are kept here, and every request is given them before it runs, whenever it was
made. A value set while a task runs holds from its next inference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from ovforge.config.pipeline import Use
from ovforge.errors import InputError, ModelError, did_you_mean, require_type
from ovforge.run.notices import skipped_lines

if TYPE_CHECKING:
    import openvino as ov
    from numpy.typing import NDArray

    from ovforge.contracts.stages import Adapter
    from ovforge.model.bundle import Control, Places

__all__ = ["Adapters", "Controls", "Variables"]


class Variables:
    """Values of variables by role and id. What is not set here has the value that the model starts with."""

    def __init__(self) -> None:
        self.version = 0
        self._values: dict[str, dict[str, NDArray[Any]]] = {}

    def set(self, role: str, variable: str, value: NDArray[Any] | None) -> None:
        """Set a variable of a role's model; None gives it back the value that the model starts with."""
        values = self._values.setdefault(role, {})
        if value is not values.get(variable):
            values.pop(variable, None)
            if value is not None:
                values[variable] = value
            self.version += 1

    def of(self, role: str) -> Mapping[str, NDArray[Any]]:
        """Return the values that are set of a role."""
        return self._values.get(role, {})

    def for_request(self, role: str) -> Callable[[ov.InferRequest], None]:
        """Return a function that gives one request, before each inference, the values that have changed."""
        version, values_before = 0, dict[str, "NDArray[Any]"]()

        def give(request: ov.InferRequest) -> None:
            nonlocal version, values_before
            if version == self.version:
                return
            import openvino as ov

            version, values = self.version, dict(self.of(role))
            for state in request.query_state():
                value, before = values.get(state.name), values_before.get(state.name)
                if value is before:
                    continue
                if value is None:
                    state.reset()
                else:
                    state.state = ov.Tensor(value)
            values_before = values

        return give


class Controls(MutableMapping[str, float]):
    """Named numbers that transforms left adjustable: `pipe.controls["strength"] = 0.5`."""

    def __init__(self, controls: Mapping[str, Control], variables: Variables) -> None:
        self._controls, self._variables = controls, variables
        self._values = {name: control.default for name, control in controls.items()}

    def changed(self) -> dict[str, float]:
        """Return the controls that do not have their first value."""
        return {name: value for name, value in self._values.items() if value != self._controls[name].default}

    def summary(self, name: str) -> str:
        """Return what a control does, in the words of its transform."""
        return self._controls[name].summary

    def __getitem__(self, name: str) -> float:
        _known(name, self._values, "controls")
        return self._values[name]

    def __setitem__(self, name: str, value: float) -> None:
        """Set a control. Raises InputError for an unknown one, and for what is not a finite number."""
        import numpy as np

        _known(name, self._values, "controls")
        self._values[name] = _number(name, value)
        control = self._controls[name]
        same = self._values[name] == control.default
        filled = None if same else np.full(control.shape, self._values[name], np.float32)
        self._variables.set(control.role, control.variable, filled)

    def __delitem__(self, name: str) -> None:
        """Give a control its first value again."""
        self[name] = self._controls[name].default

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Adapters(Mapping[str, float]):
    """The adapters that can be switched while a pipeline runs: name -> weight, 0 where it is off.

        pipe.adapters.set({"style": 0.7, "hero": 0.4})
        pipe.adapters.off()

    What adapters have in common is the places in the models (`ModelBundle.adapters`): variables with an open dimension
    take several adapters one behind another along it, others their sum.
    """

    def __init__(self, places: Mapping[str, Places], variables: Variables, make: Callable[[Use], Adapter]) -> None:
        self._places: dict[tuple[str, str], tuple[int, ...]] = {
            (role, variable): tuple(shape)
            for place in places.values()
            for role, shapes in place.items()
            for variable, shape in shapes.items()
        }
        self._variables, self._make = variables, make
        self._adapters: dict[str, Adapter] = {}
        self._weights: dict[str, float] = {}
        self._joined: dict[tuple[str, str], tuple[list[NDArray[Any]], NDArray[Any]]] = {}
        self.loaded: dict[str, Use] = {}
        """What was loaded after the start, by name, as a config would say it."""

    def set(self, weights: Mapping[str, float]) -> None:
        """Make these adapters active, each at its weight, and no others. Raises InputError for an unknown one."""
        require_type(weights, Mapping, where="adapters.set", hint="Write: set({NAME: WEIGHT}).")
        for name, weight in weights.items():
            _known(name, self._adapters, "adapters", 'One is there with mode = "runtime", or after adapters.load(...).')
            _number(name, weight)
        wanted = {name: float(weights.get(name, 0.0)) for name in self._adapters}
        self._fill(wanted)
        self._weights = wanted

    def off(self) -> None:
        """Make none active. They stay in memory, to be set again."""
        self.set({})

    def load(self, use: str | Use, **options: Any) -> str:
        """Read another adapter into the running pipeline, make it active beside the others, and return its name.

            name = pipe.adapters.load("lora", path="hero.safetensors", scale=0.4)

        Raises ModelError if the models have no place for a part of it: places are made when a pipeline starts.
        """
        require_type(use, (str, Use), where="adapters.load", hint='Write: load("lora", path="FILE").')
        wanted = Use(use, **options) if isinstance(use, str) else Use(use.use, **{**use.options, **options})
        adapter = self._make(wanted)
        self.add(adapter)
        self.loaded[adapter.name] = wanted
        return adapter.name

    def add(self, adapter: Adapter) -> None:
        """Take an adapter in, at its own weight."""
        if adapter.name in self._adapters:
            raise InputError(f"there is an adapter {adapter.name!r}", where="adapters", hint="Give this one a name.")
        self._adapters[adapter.name] = adapter
        try:
            self.set({**self._weights, adapter.name: adapter.weight})
        except Exception:
            del self._adapters[adapter.name]
            raise

    def unload(self, *names: str) -> None:
        """Forget adapters and free their memory; all of them if none is named. The models are then as without."""
        for name in names:
            _known(name, self._adapters, "adapters")
        for name in names or tuple(self._adapters):
            del self._adapters[name]
            self.loaded.pop(name, None)
        self.set({name: weight for name, weight in self._weights.items() if name in self._adapters})

    def warnings(self) -> list[str]:
        """Return what of the adapters that were loaded later found no place, and their notes."""
        lines: list[str] = []
        for name in self.loaded:
            adapter = self._adapters[name]
            lines += [*skipped_lines(name, adapter.skipped), *(f"{name}: {note}" for note in adapter.notes)]
        return lines

    def _fill(self, weights: Mapping[str, float]) -> None:
        """Give every place what the adapters put there."""
        parts: dict[tuple[str, str], list[NDArray[Any]]] = {}
        for name, weight in weights.items():
            for role, values in (self._adapters[name].values(weight) if weight else {}).items():
                for variable, value in values.items():
                    self._check(name, (role, variable), value)
                    parts.setdefault((role, variable), []).append(value)
        self._joined = {place: self._join(place, found) for place, found in parts.items()}
        for role, variable in self._places:
            joined = self._joined.get((role, variable))
            self._variables.set(role, variable, joined[1] if joined else None)

    def _check(self, name: str, place: tuple[str, str], value: NDArray[Any]) -> None:
        shape = self._places.get(place)
        if shape is None:
            raise ModelError(f"{place[0]} has no place for {place[1]}", where=f"adapters: {name}")
        if len(shape) != value.ndim or any(n not in (-1, m) for n, m in zip(shape, value.shape, strict=True)):
            raise ModelError(f"{place[1]} takes {list(shape)}, not {list(value.shape)}", where=f"adapters: {name}")

    def _join(self, place: tuple[str, str], found: list[NDArray[Any]]) -> tuple[list[NDArray[Any]], NDArray[Any]]:
        """Return (parts, joined). The same parts give the same array, so that requests need not be given it again."""
        import numpy as np

        before = self._joined.get(place)
        if before and len(before[0]) == len(found) and all(a is b for a, b in zip(before[0], found, strict=True)):
            return before
        shape = self._places[place]
        if len(found) == 1:
            return found, found[0]
        joined = np.concatenate(found, axis=shape.index(-1)) if -1 in shape else np.sum(found, axis=0)
        return found, joined

    def __getitem__(self, name: str) -> float:
        _known(name, self._weights, "adapters")
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class _UnknownError(InputError, KeyError):
    """The mapping does not hold this name. It is a KeyError too, because `get` and `in` need one."""


def _known(name: str, names: Mapping[str, Any], what: str, more: str = "") -> None:
    if not isinstance(name, str) or name not in names:
        raise _UnknownError(
            f"there is no {name!r}.{did_you_mean(str(name), names)}",
            where=what,
            hint=f"There are: {', '.join(names) or 'none'}. {more}".strip(),
        )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{value!r} is not a finite number", where=name)
    return float(value)
