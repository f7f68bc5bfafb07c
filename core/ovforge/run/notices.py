"""What the stages' reports have to tell people: what was asked for and not applied, and every note."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ovforge.contracts.stages import Report, Skipped
    from ovforge.run.resolution import Step

__all__ = ["skipped_lines", "warnings_of"]


def warnings_of(steps: Sequence[Step], reports: Sequence[Report]) -> list[str]:
    """Return a line for everything that the steps skipped or noted, with the step's name in front.

    Steps that a task brings itself are left out: nobody asked for them, and most note that there was nothing to do.
    """
    lines: list[str] = []
    for step, report in zip(steps, reports, strict=True):
        if step.implicit:
            continue
        name = step.chosen.name
        lines += skipped_lines(name, report.skipped)
        lines += [f"{name}: {note}" for note in report.notes]
    return list(dict.fromkeys(lines))


def skipped_lines(name: str, skipped: Iterable[Skipped]) -> list[str]:
    """Return a line for each thing that could not be applied."""
    return [f"{name}: {skip.item} was not applied: {skip.reason}" for skip in skipped]
