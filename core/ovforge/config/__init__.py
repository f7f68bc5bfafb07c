"""Configs and options: what a pipeline is, checked, with errors that name the key.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.config.files import apply_overrides, read_config
    from ovforge.config.inputs import input_content, paths_in
    from ovforge.config.options import InputFile, checked, input_files, validate_options
    from ovforge.config.pipeline import PipelineConfig, Use

__all__ = [
    "InputFile",
    "PipelineConfig",
    "Use",
    "apply_overrides",
    "checked",
    "input_content",
    "input_files",
    "paths_in",
    "read_config",
    "validate_options",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "files": ["apply_overrides", "read_config"],
        "inputs": ["input_content", "paths_in"],
        "options": ["InputFile", "checked", "input_files", "validate_options"],
        "pipeline": ["PipelineConfig", "Use"],
    },
)
