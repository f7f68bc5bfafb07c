"""What all methods do alike: role by role, layer by layer, with a report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ovforge.contracts import Calibration, Report, Skipped
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_low_bit.layers import Layer, constant_bytes, find_layers, roles_of

if TYPE_CHECKING:
    import openvino as ov

    from ovforge_low_bit.options import ScopeOptions

__all__ = ["Change", "change_weights", "each_layer", "parted", "recorded"]

Change = Callable[[str, "ov.Model", Sequence[Layer], Report], str]
"""(role, model, layers, report) -> what was done to their weights, for people: "in 4 bits"."""


def change_weights(
    bundle: ModelBundle,
    options: ScopeOptions,
    keep: Mapping[str, Collection[str]],
    quantizer: str,
    change: Change,
    unfit: Callable[[Layer], str | None] = lambda _: None,
) -> Report:
    """Let `change` change the layers of each role that is asked for, and report.

    `unfit` says why a layer cannot be changed, where it cannot.
    """
    report = Report(bytes_before=0, bytes_after=0)
    for role in roles_of(bundle, options, quantizer):
        model = bundle.models[role]
        before = constant_bytes(model)
        found = [(layer, unfit(layer)) for layer in find_layers(model, options, keep.get(role, ()), report)]
        report.skipped += [Skipped(layer.name, reason) for layer, reason in found if reason]
        layers = [layer for layer, reason in found if not reason]
        if not layers:
            report.skipped.append(Skipped(role, f"it has no weights of {' or '.join(options.types)} to change"))
            continue
        names = [layer.name for layer in layers]
        weights = sum(layer.width * layer.outputs for layer in layers)
        note = change(role, model, layers, report)
        report.roles += (role,)
        report.layers[role] = names
        report.bytes_before = (report.bytes_before or 0) + before
        report.bytes_after = (report.bytes_after or 0) + constant_bytes(model)
        report.applied.append(f"{role}: {weights} weights of {len(names)} operations {note}")
    return report


def recorded(calibration: Calibration, role: str, count: int, quantizer: str) -> Sequence[Mapping[str, NDArray[Any]]]:
    """Return recorded inputs of a role. Raises ModelError if there are none."""
    try:
        records = calibration.inputs(role, count)
    except ModelError as error:
        raise ModelError(
            error.what,
            where=f"quantize ({quantizer}), role {role}",
            hint=error.hint or "Name the roles that the task runs, with `roles`.",
        ) from error
    if not records:
        raise ModelError("no inputs were recorded, and this method needs some", where=f"quantize ({quantizer}), {role}")
    return records


def parted(layers: Sequence[Layer], max_width: int, role: str, report: Report) -> tuple[list[Layer], list[Layer]]:
    """Return the layers to learn, and those that are too wide for it, which the report's notes tell of."""
    wide = [layer for layer in layers if layer.width > max_width]
    if wide:
        report.notes.append(f"{role}: {len(wide)} operations have over {max_width} inputs, and are not learned")
    return [layer for layer in layers if layer.width <= max_width], wide


def each_layer(
    groups: Iterator[tuple[list[Layer], NDArray[Any]]],
) -> Iterator[tuple[Layer, NDArray[Any]]]:
    """Yield each layer with the statistics that it shares with others."""
    for layers, sums in groups:
        for layer in layers:
            yield layer, sums
