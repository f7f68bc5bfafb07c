"""The program `ovforge`, and what its commands and those of plugins print results with.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.cli.pipelines import print_result, progress_bar
    from ovforge.cli.program import app, main
    from ovforge.cli.reports import print_reports, reports_as_json
    from ovforge.cli.trust import Trust, check_trust

__all__ = [
    "Trust",
    "app",
    "check_trust",
    "main",
    "print_reports",
    "print_result",
    "progress_bar",
    "reports_as_json",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "pipelines": ["print_result", "progress_bar"],
        "program": ["app", "main"],
        "reports": ["print_reports", "reports_as_json"],
        "trust": ["Trust", "check_trust"],
    },
)
