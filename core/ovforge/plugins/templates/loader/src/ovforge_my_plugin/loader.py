"""The loader itself: from arrays to an ov.Model."""

from __future__ import annotations

import io
import zipfile
from typing import Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from ovforge.contracts import Match
from ovforge.errors import ModelError
from ovforge.model import ModelBundle, Source
from pydantic import BaseModel, ConfigDict, Field

Layer = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Weights, (inputs, outputs), and bias, (outputs,)."""


class Options(BaseModel):
    """What a config may say. Every option has a default, so that the loader can be asked whose a source is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    activation: Literal["relu", "tanh", "none"] = Field("relu", description="What follows every layer but the last.")


class Loader:
    """Opens `weight0`, `bias0`, `weight1`, `bias1`... as the role "model": input "x", output "y"."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say MAYBE to a single .npz file: its name and first bytes do not tell which arrays are in it."""
        files = list(source.files())
        if len(files) == 1 and files[0].endswith(".npz") and source.read(files[0], 2) == b"PK":
            return Match.MAYBE
        return Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Read the arrays and build the model. Raises ModelError if they are damaged or do not fit together."""
        bundle = ModelBundle()
        bundle.models["model"] = _build(_read(source), self.options.activation)
        return bundle


def _read(source: Source) -> list[Layer]:
    """Return the layers of the file; it is read through the source, so that encrypted ones open, too."""
    (file,) = source.files()
    try:
        with np.load(io.BytesIO(source.read(file)), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"the file cannot be read: {error}", where=source.name, hint="Save it again.") from error
    layers: list[Layer] = []
    width = None
    while (name := f"weight{len(layers)}") in found:
        weight, bias = found.pop(name), found.pop(f"bias{len(layers)}", None)
        if bias is None or weight.ndim != 2 or bias.shape != weight.shape[1:] or width not in (None, len(weight)):
            raise ModelError(
                f"{name} {weight.shape} does not fit the bias or the layer before it",
                where=source.name,
                hint="Weights are (inputs, outputs), and each layer has a bias of (outputs,).",
            )
        layers.append((weight.astype(np.float32), bias.astype(np.float32)))
        width = weight.shape[1]
    if not layers or found:
        raise ModelError(
            f"unexpected arrays: {', '.join(found) or 'none at all'}",
            where=source.name,
            hint="The arrays are named weight0, bias0, weight1, bias1...",
        )
    return layers


def _build(layers: list[Layer], activation: str) -> ov.Model:
    """Return a model of float32 (batch, inputs) -> (batch, outputs)."""
    x = ops.parameter([-1, len(layers[0][0])], np.float32, name="x")
    node = x
    for number, (weight, bias) in enumerate(layers):
        node = ops.add(ops.matmul(node, ops.constant(weight), False, False), ops.constant(bias))
        if number < len(layers) - 1 and activation != "none":
            node = {"relu": ops.relu, "tanh": ops.tanh}[activation](node)
    model = ov.Model([node], [x], "perceptron")
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    return model
