"""Phases of timesteps: products of up to 1000, which are to be computed in float32 whatever a device computes in.

In bfloat16 a product of 700 is off by up to 2 radians before its sine is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from ovforge.model import core

__all__ = ["MARK", "keep_phases"]

MARK = "DisablePrecisionConversion_0"
"""OpenVINO's mark of operations that keep their type, in what a model says of an operation at run time."""

_MARKED = b"""<?xml version="1.0"?>
<net name="marked" version="11"><layers>
<layer id="0" name="x" type="Parameter" version="opset1"><data shape="1" element_type="f32" />
<output><port id="0" precision="FP32"><dim>1</dim></port></output></layer>
<layer id="1" name="y" type="Relu" version="opset1"><rt_info><attribute name="precise" version="0" /></rt_info>
<input><port id="0" precision="FP32"><dim>1</dim></port></input>
<output><port id="1" precision="FP32"><dim>1</dim></port></output></layer>
<layer id="2" name="z" type="Result" version="opset1">
<input><port id="0" precision="FP32"><dim>1</dim></port></input></layer>
</layers><edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0" />
<edge from-layer="1" from-port="1" to-layer="2" to-port="0" /></edges></net>"""
"""A model with a marked operation: Python cannot make a mark, but hand one on that was read."""

_TOLD = ("timestep", "guidance", "time_ids", "video_coords")
"""Inputs that are told to a model by waves."""

_SIDEWAYS = ("Reshape", "Unsqueeze")


def keep_phases(model: ov.Model) -> bool:
    """Mark what a model computes of its timestep, guidance or sizes, up to their sines and cosines.

    Return whether there was something to mark.
    """
    told = {port.get_node().get_friendly_name() for port in model.inputs if not port.names.isdisjoint(_TOLD)}
    found = False
    for wave in [op for op in model.get_ordered_ops() if op.get_type_name() in ("Sin", "Cos")]:
        phases = wave.input(0).get_source_output()
        if MARK in phases.get_node().get_rt_info():
            continue
        inputs = {node.get_friendly_name() for node in _above(phases) if node.get_type_name() == "Parameter"}
        if set() < inputs <= told:
            _reshape_once(phases)
            for node in _above(wave.input(0).get_source_output()):
                if node.get_type_name() not in ("Constant", "Parameter"):
                    node.set_rt_info(_mark(), MARK)
            found = True
    if found:
        model.validate_nodes_and_infer_types()
    return found


def _above(output: ov.Output) -> Iterator[ov.Node]:
    """Yield each node that the values of an output are computed from; what only its shape hangs on does not count."""
    seen, waiting = set(), [output.get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_friendly_name() not in seen:
            seen.add(node.get_friendly_name())
            yield node
            if node.get_type_name() != "ShapeOf":
                waiting += [port.get_source_output().get_node() for port in node.inputs()]


def _reshape_once(output: ov.Output) -> None:
    """Put one Reshape in place of those in a row that make a column: if the runtime joins them, no mark stays."""
    node = output.get_node()
    for port in node.inputs() if node.get_type_name() != "ShapeOf" else ():
        above = source = port.get_source_output()
        while source.get_node().get_type_name() in _SIDEWAYS:
            source = source.get_node().input(0).get_source_output()
        shape = above.get_partial_shape()
        if source != above and shape.rank.is_static and len(shape) == 2 and shape[1] == 1:
            name = above.get_node().get_friendly_name()
            column = ops.constant(np.array([-1, 1]), name=f"{name}/column")
            above.replace(ops.reshape(source, column, special_zero=False, name=name).output(0))
        _reshape_once(source)


@cache
def _mark() -> Any:
    """Return OpenVINO's mark."""
    model = core().read_model(_MARKED, ov.Tensor(np.zeros(0, np.uint8)))
    return next(op for op in model.get_ops() if op.get_type_name() == "Relu").get_rt_info()[MARK]
