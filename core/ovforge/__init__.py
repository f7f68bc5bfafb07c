"""ovforge: a plugin framework that takes models to Intel hardware with OpenVINO.

Importing this package is cheap: what needs openvino, pydantic or numpy is imported when first used. What is stable is
said in docs/stability.md: these names, and those of `ovforge.errors`, `contracts`, `model`, `store`, `config`, `cli`
and `testing`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ovforge._exports import lazy
from ovforge._version import API_VERSION, __version__

if os.environ.get("OVFORGE_TELEMETRY") != "1":
    # OpenVINO's and NNCF's telemetry asks a name server and writes below ~/intel when they are imported. Both do
    # without it if the package cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

if TYPE_CHECKING:
    from ovforge.config.pipeline import PipelineConfig, Use
    from ovforge.contracts.hookspecs import hookimpl
    from ovforge.contracts.stages import Progress
    from ovforge.errors import Cancelled, OvforgeError
    from ovforge.model.results import ImagesResult, Result
    from ovforge.plugins.manager import Plugins
    from ovforge.run.opening import find_loader, open_model
    from ovforge.run.pipeline import Pipeline, load
    from ovforge.run.planning import Plan, plan
    from ovforge.run.preparation import Prepared, prepare
    from ovforge.run.session import describe_protection, open_file
    from ovforge.run.visits import Stop, adjusted
    from ovforge.store.cache import Cache

__all__ = [
    "API_VERSION",
    "Cache",
    "Cancelled",
    "ImagesResult",
    "OvforgeError",
    "Pipeline",
    "PipelineConfig",
    "Plan",
    "Plugins",
    "Prepared",
    "Progress",
    "Result",
    "Stop",
    "Use",
    "__version__",
    "adjusted",
    "describe_protection",
    "find_loader",
    "hookimpl",
    "load",
    "open_file",
    "open_model",
    "plan",
    "prepare",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "config.pipeline": ["PipelineConfig", "Use"],
        "contracts.hookspecs": ["hookimpl"],
        "contracts.stages": ["Progress"],
        "errors": ["Cancelled", "OvforgeError"],
        "model.results": ["ImagesResult", "Result"],
        "plugins.manager": ["Plugins"],
        "run.opening": ["find_loader", "open_model"],
        "run.pipeline": ["Pipeline", "load"],
        "run.planning": ["Plan", "plan"],
        "run.preparation": ["Prepared", "prepare"],
        "run.session": ["describe_protection", "open_file"],
        "run.visits": ["Stop", "adjusted"],
        "store.cache": ["Cache"],
    },
)
