"""A compiled model that is run again and again: its inputs by name, in tensors that stay in place."""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov

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
                hint="It was converted for a fixed size: use that size, or convert it with dynamic shapes."
                + self._advice,
            )
        tensor = ov.Tensor(port.get_element_type(), list(shape))
        self.request.set_tensor(port, tensor)
        return tensor

    def share(self, name: str, tensor: ov.Tensor) -> None:
        """Let an input be another network's tensor."""
        self.request.set_tensor(self.ports[name], tensor)

    def accepts(self, name: str, tensor: ov.Tensor) -> bool:
        """Say whether an input takes a tensor as it is."""
        port = self.ports[name]
        shape = ov.PartialShape(list(tensor.shape))
        return bool(port.get_element_type() == tensor.element_type and port.get_partial_shape().compatible(shape))

    def run(self) -> None:
        """Run once, with the global interpreter lock free."""
        self.request.start_async()
        self.request.wait()

    def allocate_timestep(self, rows: int = 1) -> ov.Tensor:
        """Give the timestep a tensor of `rows`; a model that was fixed to some number of them gets that."""
        dimensions = self.ports["timestep"].get_partial_shape() if "timestep" in self.ports else [None]
        return self.allocate(
            "timestep", [d.get_length() if d is not None and d.is_static else rows for d in dimensions]
        )
