"""A compiled model that is run again and again: its inputs by name, in tensors that stay in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovforge.errors import InputError, ModelError

__all__ = ["Network", "not_finite"]


def not_finite(where: str, what: str = "gave numbers that are not finite") -> ModelError:
    """Return the error for a role whose results are not all numbers."""
    return ModelError(
        what, where=where, hint="Set device.precision = 'f32'; if it stays, the model's weights are damaged."
    )


class Network:
    """A request, and its input tensors by name, in memory that OpenVINO owns. `advice` ends what errors say."""

    def __init__(self, model: ov.CompiledModel, role: str, advice: str = "") -> None:
        self.role = role
        self.request = model.create_infer_request()
        self.ports = {name: port for port in model.inputs for name in port.names}
        self.outputs = {name: port for port in model.outputs for name in port.names}
        self._advice = f" {advice}" if advice else ""

    def allocate(self, name: str, shape: Sequence[int]) -> ov.Tensor:
        """Give an input a tensor of its own. Raises where the model has no such input, or takes another shape."""
        if name not in self.ports:
            raise ModelError(
                f"the model has no input {name!r}",
                where=self.role,
                hint=f"It has: {', '.join(sorted(self.ports))}. Convert it as optimum-intel or ovforge does.",
            )
        port = self.ports[name]
        if not port.get_partial_shape().compatible(ov.PartialShape(list(shape))):
            raise InputError(
                f"the model takes {name} of shape {port.get_partial_shape()}, not {list(shape)}",
                where=self.role,
                hint="It was converted for a fixed size: use that size, or convert it with dynamic shapes. If the "
                "size is not what is wrong, a part of the pipeline is another model's." + self._advice,
            )
        tensor = ov.Tensor(port.get_element_type(), list(shape))
        self.request.set_tensor(port, tensor)
        return tensor

    def share(self, name: str, tensor: ov.Tensor) -> None:
        """Let an input be another network's tensor."""
        self.request.set_tensor(self.ports[name], tensor)

    def hold(self, name: str, value: NDArray[np.generic], rows: int) -> ov.Tensor:
        """Give an input that all rows share a tensor of its own; a model that takes it for each row gets it for each.

        One number may be a list of one, too, which a model that takes no list gets without it.
        """
        rank = self.ports[name].get_partial_shape().rank if name in self.ports else None
        if rank is not None and rank.is_static and rank.get_length() == 0 and value.shape == (1,):
            value = value.reshape(())
        each = rank is not None and rank.is_static and rank.get_length() == value.ndim + 1
        tensor = self.allocate(name, (rows, *value.shape) if each else value.shape)
        tensor.data[...] = value
        return tensor

    def accepts(self, name: str, tensor: ov.Tensor) -> bool:
        """Say whether an input takes a tensor as it is."""
        port = self.ports[name]
        shape = ov.PartialShape(list(tensor.shape))
        return bool(port.get_element_type() == tensor.element_type and port.get_partial_shape().compatible(shape))

    def run(self) -> None:
        """Run once, with the global interpreter lock free."""
        self.request.start_async()
        self.request.wait()

    def allocate_timestep(self, rows: int = 1, columns: int = 1) -> ov.Tensor:
        """Give the timestep a tensor of `rows`; a model that was fixed to some number of them gets that.

        One that takes several for each row gets so many `columns`.
        """
        dimensions = self.ports["timestep"].get_partial_shape() if "timestep" in self.ports else [None]
        return self.allocate(
            "timestep",
            [
                d.get_length() if d is not None and d.is_static else wanted
                for d, wanted in zip(dimensions, (rows, columns), strict=False)
            ],
        )
