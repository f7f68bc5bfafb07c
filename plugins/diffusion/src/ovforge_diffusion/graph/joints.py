"""The places where a UNet's way up joins what its way down left: concatenations of channels."""

from __future__ import annotations

from itertools import pairwise

import openvino as ov

from ovforge_diffusion.graph.nodes import ancestors, positions

__all__ = ["joints_of"]


def joints_of(model: ov.Model) -> list[ov.Node]:
    """Return the concatenations of the way up, from the lowest: each follows another, and joins an older value.

    Input 0 is what comes from below. Returns [] for a model of another structure.
    """
    found = [node for node in model.get_ordered_ops() if _joins_channels(node)]
    if not found:
        return []
    places = positions(model)
    names = {node.get_name() for node in found}
    first = places[found[0].get_name()]
    for before, node in pairwise(found):
        below, across = (node.input_value(n).get_node() for n in (0, 1))
        on = {other.get_name() for other in ancestors(below, places, first)} & names
        aside = {other.get_name() for other in ancestors(across, places, first)} & names
        if before.get_name() not in on or aside:
            return []
    return found


def _joins_channels(node: ov.Node) -> bool:
    if node.get_type_name() != "Concat" or len(node.inputs()) != 2:
        return False
    rank = node.get_output_partial_shape(0).rank
    return bool(rank == 4 and node.get_attributes()["axis"] in (1, -3))
