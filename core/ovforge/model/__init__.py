"""What stages work on: bundles of models, the sources they come from, pictures, results, random numbers.

These names are public; the modules that they come from are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ovforge._exports import lazy

if TYPE_CHECKING:
    from ovforge.model.arrays import reading_arrays
    from ovforge.model.bundle import Control, ModelBundle, Places, Roles, read_json, read_model
    from ovforge.model.companions import external_data
    from ovforge.model.detections import DetectInputs, Detections, DetectionsResult, DetectorSpec, draw
    from ovforge.model.memory import temporary_files
    from ovforge.model.metrics import MAX_PSNR, METRICS, Metric, gmsd, psnr, ssim
    from ovforge.model.pictures import Picture, digest_picture, open_picture, picture_name
    from ovforge.model.random import BatchGenerator, Generator, fresh_seed
    from ovforge.model.reasons import OPENVINO_ERRORS, reading_error, reason_of
    from ovforge.model.results import ImagesResult, Provenance, Result, Timings, read_provenance
    from ovforge.model.runtime import core, openvino_version
    from ovforge.model.sources import (
        PACKAGE,
        FileSource,
        Opener,
        Protection,
        Source,
        named_path,
        package_path,
        source_digest,
    )

__all__ = [
    "MAX_PSNR",
    "METRICS",
    "OPENVINO_ERRORS",
    "PACKAGE",
    "BatchGenerator",
    "Control",
    "DetectInputs",
    "Detections",
    "DetectionsResult",
    "DetectorSpec",
    "FileSource",
    "Generator",
    "ImagesResult",
    "Metric",
    "ModelBundle",
    "Opener",
    "Picture",
    "Places",
    "Protection",
    "Provenance",
    "Result",
    "Roles",
    "Source",
    "Timings",
    "core",
    "digest_picture",
    "draw",
    "external_data",
    "fresh_seed",
    "gmsd",
    "named_path",
    "open_picture",
    "openvino_version",
    "package_path",
    "picture_name",
    "psnr",
    "read_json",
    "read_model",
    "read_provenance",
    "reading_arrays",
    "reading_error",
    "reason_of",
    "source_digest",
    "ssim",
    "temporary_files",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "arrays": ["reading_arrays"],
        "bundle": ["Control", "ModelBundle", "Places", "Roles", "read_json", "read_model"],
        "companions": ["external_data"],
        "detections": ["DetectInputs", "Detections", "DetectionsResult", "DetectorSpec", "draw"],
        "memory": ["temporary_files"],
        "metrics": ["MAX_PSNR", "METRICS", "Metric", "gmsd", "psnr", "ssim"],
        "pictures": ["Picture", "digest_picture", "open_picture", "picture_name"],
        "random": ["BatchGenerator", "Generator", "fresh_seed"],
        "results": ["ImagesResult", "Provenance", "Result", "Timings", "read_provenance"],
        "reasons": ["OPENVINO_ERRORS", "reading_error", "reason_of"],
        "runtime": ["core", "openvino_version"],
        "sources": [
            "PACKAGE",
            "FileSource",
            "Opener",
            "Protection",
            "Source",
            "named_path",
            "package_path",
            "source_digest",
        ],
    },
)
