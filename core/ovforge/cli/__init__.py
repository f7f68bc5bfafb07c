"""The program `ovforge`, and what its commands and those of plugins print results with.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.cli.engines import EMBEDDED, Engine, EngineOptions, find_engine
    from ovforge.cli.names import is_loopback, split_name
    from ovforge.cli.output import (
        collected_warnings,
        plain,
        print_block,
        print_error,
        print_json,
        print_line,
        print_note,
        print_table,
        print_warning,
        progress_bar,
        status_line,
    )
    from ovforge.cli.program import app, main
    from ovforge.cli.reports import check_folder, check_writable, print_reports, print_result, reports_as_json
    from ovforge.cli.trust import Trust, check_trust

__all__ = [
    "EMBEDDED",
    "Engine",
    "EngineOptions",
    "Trust",
    "app",
    "check_folder",
    "check_trust",
    "check_writable",
    "collected_warnings",
    "find_engine",
    "is_loopback",
    "main",
    "plain",
    "print_block",
    "print_error",
    "print_json",
    "print_line",
    "print_note",
    "print_reports",
    "print_result",
    "print_table",
    "print_warning",
    "progress_bar",
    "reports_as_json",
    "split_name",
    "status_line",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "engines": ["EMBEDDED", "Engine", "EngineOptions", "find_engine"],
        "names": ["is_loopback", "split_name"],
        "output": [
            "collected_warnings",
            "plain",
            "print_block",
            "print_error",
            "print_json",
            "print_line",
            "print_note",
            "print_table",
            "print_warning",
            "progress_bar",
            "status_line",
        ],
        "program": ["app", "main"],
        "reports": ["check_folder", "check_writable", "print_reports", "print_result", "reports_as_json"],
        "trust": ["Trust", "check_trust"],
    },
)
