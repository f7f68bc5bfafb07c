"""What quantizers did, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovforge.contracts.quantization import Outcome
    from ovforge.contracts.stages import Report
    from ovforge.run.resolution import Step

__all__ = ["print_reports", "reports_as_json"]


def print_reports(
    steps: Sequence[Step], reports: Sequence[Report], outcome: Outcome | None, *, warnings: bool = True
) -> None:
    """Print a table of each quantizer's roles, what was left alone and why, and what the gate said.

    Without `warnings`, notes and what was left alone are printed elsewhere.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    for step, report in _quantized(steps, reports):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in (step.chosen.name, "layers", "before", "after", ""):
            table.add_column(title, justify="left" if title == step.chosen.name else "right", no_wrap=True)
        for role in report.roles:
            before, after = report.sizes.get(role, (0, 0))
            layers = str(len(report.layers[role])) if role in report.layers else "?"
            part = f"{after / before:.0%}" if before else ""
            table.add_row(role, layers, f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", part)
        if report.roles:
            console.print(table)
        else:
            console.print(f"[bold]{step.chosen.name}[/]: nothing was changed")
        for line in (*report.applied, *(report.notes if warnings else ())):
            console.print(f"  {escape(line)}")
        for skip in report.skipped if warnings else ():
            console.print(f"  [yellow]ignored[/] {escape(skip.item)}: {escape(skip.reason)}")
        if report.seconds is not None:
            console.print(f"  took {report.seconds:.1f} s")
    if outcome is not None:
        colour = "green" if outcome.passed else "red"
        console.print(f"quality: [{colour}]{outcome}[/]")
        for role, names in outcome.kept.items():
            console.print(f"  kept in {role}: {escape(', '.join(names))}")


def reports_as_json(steps: Sequence[Step], reports: Sequence[Report], outcome: Outcome | None) -> dict[str, Any]:
    """Return the same for programs."""
    return {
        "quantize": [{"use": step.chosen.name, **asdict(report)} for step, report in _quantized(steps, reports)],
        "quality": outcome.as_json() if outcome else None,
    }


def _quantized(steps: Sequence[Step], reports: Sequence[Report]) -> list[tuple[Step, Report]]:
    pairs = zip(steps, reports, strict=True)
    return [(step, report) for step, report in pairs if step.is_quantizer]
