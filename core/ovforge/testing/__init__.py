"""Contract tests that any plugin, ours or yours, can run on itself.

    from ovforge import testing
    import my_plugin

    def test_contract():
        testing.check_plugin(my_plugin)

    def test_my_transform():
        testing.check_transform(my_plugin, "my-transform", {"scale": 0.5}, testing.small_bundle)

Each check raises AssertionError that says which rule is broken, and why it matters. These names are public; the modules
that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.testing.changes import FixedCalibration, check_quantizer, check_transform
    from ovforge.testing.models import run, small_bundle, small_model
    from ovforge.testing.plugin import check_command, check_plugin, extension
    from ovforge.testing.stages import (
        check_device,
        check_driver,
        check_loader,
        check_scheduler,
        check_source,
        check_task,
        check_tracker,
    )

__all__ = [
    "FixedCalibration",
    "check_command",
    "check_device",
    "check_driver",
    "check_loader",
    "check_plugin",
    "check_quantizer",
    "check_scheduler",
    "check_source",
    "check_task",
    "check_tracker",
    "check_transform",
    "extension",
    "run",
    "small_bundle",
    "small_model",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "changes": ["FixedCalibration", "check_quantizer", "check_transform"],
        "models": ["run", "small_bundle", "small_model"],
        "plugin": ["check_command", "check_plugin", "extension"],
        "stages": [
            "check_device",
            "check_driver",
            "check_loader",
            "check_scheduler",
            "check_source",
            "check_task",
            "check_tracker",
        ],
    },
)
