"""Whether two ov.Models are the same: operation by operation, with their attributes, edges and constants."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovforge.model import memory

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["same_model"]

_NUMBERED = re.compile(rb'<attribute name="fused_names"[^>]*/>| (name|id)="[^"]*"')
"""Names, and the list of those of operations that others were made of."""


def same_model(first: ov.Model, second: ov.Model) -> bool:
    """Say whether two models have the same operations, attributes, edges, names of tensors, and constants.

    Names of operations, and of those that one was made of, do not count: OpenVINO numbers those that have none.
    """
    ours, theirs = _constants(first), _constants(second)
    if len(ours) != len(theirs) or _structure(first) != _structure(second):
        return False
    return all(_same_constant(one, other) for one, other in zip(ours, theirs, strict=True))


def _structure(model: ov.Model) -> bytes:
    """Return a model's XML, with the bodies of loops and branches inside; its weights go nowhere."""
    import openvino as ov

    if memory.AVAILABLE:  # a model may be encrypted: not even its structure goes to a disk
        with memory.memory_folder("comparing models") as folder:
            ov.serialize(model, folder.place("model.xml"), os.devnull)
            with folder.content("model.xml") as content:
                return _NUMBERED.sub(b"", bytes(content))
    with tempfile.TemporaryDirectory(prefix="ovforge-compare-") as plain:
        path = Path(plain) / "model.xml"
        ov.serialize(model, path, os.devnull)
        return _NUMBERED.sub(b"", path.read_bytes())


def _constants(model: ov.Model) -> list[Any]:
    return [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]


def _same_constant(one: Any, other: Any) -> bool:
    import numpy as np

    if one.get_element_type() != other.get_element_type() or one.get_output_shape(0) != other.get_output_shape(0):
        return False
    if one.get_element_type().get_type_name() == "string":
        return bool(np.array_equal(one.tensor_view.str_data, other.tensor_view.str_data))
    ours, theirs = (constant.data.reshape(-1).view(np.uint8) for constant in (one, other))
    return bool(np.array_equal(ours, theirs))
