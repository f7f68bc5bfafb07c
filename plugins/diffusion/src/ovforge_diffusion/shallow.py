"""Steps that run the outer part of a UNet alone, with what its inner part gave at an earlier step.

DeepCache (Ma et al. 2023): from one step to the next, what comes from the deep levels changes little. The transform
`step-cache` makes the outer part a model of its own; this runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov

from ovforge_diffusion.network import Network

__all__ = ["CACHED", "SHALLOW", "ShallowSteps"]

SHALLOW = "unet_shallow"
"""Role of the outer part."""

CACHED = "ovforge_cached_features"
"""Name of the whole UNet's output, and the outer part's input, for what the inner part gives."""


class ShallowSteps:
    """The outer part beside the whole network: one request for each of its calls, all on the same tensors.

    Each call has features of its own. In a run, a call runs whole at first, and again `interval` steps later.
    """

    def __init__(self, model: ov.CompiledModel, networks: Sequence[Network], interval: int) -> None:
        self._whole, self._interval = networks, interval
        self._outer = [Network(model, SHALLOW) for _ in networks]
        self._last: dict[int, int] = {}
        known = networks[0].ports
        # What the outer part takes is an input of the whole network, but for the features.
        self._inputs = [(port, next(n for n in port.names if n == CACHED or n in known)) for port in model.inputs]

    def begin(self) -> None:
        """Forget what the calls gave in another run."""
        self._last.clear()

    def is_due(self, call: int, number: int) -> bool:
        """Say whether a call runs whole at step `number` of a run, and count on it."""
        if call in self._last and number - self._last[call] < self._interval:
            return False
        self._last[call] = number
        return True

    def run(self, call: int) -> None:
        """Run the outer part, which writes where the whole network writes."""
        whole, outer = self._whole[call], self._outer[call]
        for port, name in self._inputs:
            source = whole.outputs[CACHED] if name == CACHED else whole.ports[name]
            outer.request.set_tensor(port, whole.request.get_tensor(source))
        outer.request.set_output_tensor(0, whole.request.get_output_tensor(0))
        outer.run()
