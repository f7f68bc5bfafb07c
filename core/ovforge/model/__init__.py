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
    from ovforge.model.detector import DetectorSpec
    from ovforge.model.memory import temporary_files
    from ovforge.model.metrics import MAX_PSNR, METRICS, Metric, gmsd, psnr, ssim
    from ovforge.model.pictures import Picture, digest_picture, open_picture, picture_name
    from ovforge.model.random import BatchGenerator, Generator, fresh_seed
    from ovforge.model.reasons import OPENVINO_ERRORS, reading_error, reason_of
    from ovforge.model.results import (
        OWN_METRIC,
        PICTURE_SUFFIXES,
        ImagesResult,
        Provenance,
        Result,
        TimingRow,
        Timings,
        provenance_options,
        read_provenance,
        values_as_json,
    )
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
    from ovforge.model.validation import check_model_file
    from ovforge.model.video import Boxes, Tracks

__all__ = [
    "MAX_PSNR",
    "METRICS",
    "OPENVINO_ERRORS",
    "OWN_METRIC",
    "PACKAGE",
    "PICTURE_SUFFIXES",
    "BatchGenerator",
    "Boxes",
    "Control",
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
    "TimingRow",
    "Timings",
    "Tracks",
    "check_model_file",
    "core",
    "digest_picture",
    "external_data",
    "fresh_seed",
    "gmsd",
    "named_path",
    "open_picture",
    "openvino_version",
    "package_path",
    "picture_name",
    "provenance_options",
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
    "values_as_json",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "arrays": ["reading_arrays"],
        "bundle": ["Control", "ModelBundle", "Places", "Roles", "read_json", "read_model"],
        "companions": ["external_data"],
        "detector": ["DetectorSpec"],
        "memory": ["temporary_files"],
        "metrics": ["MAX_PSNR", "METRICS", "Metric", "gmsd", "psnr", "ssim"],
        "pictures": ["Picture", "digest_picture", "open_picture", "picture_name"],
        "random": ["BatchGenerator", "Generator", "fresh_seed"],
        "reasons": ["OPENVINO_ERRORS", "reading_error", "reason_of"],
        "results": [
            "OWN_METRIC",
            "PICTURE_SUFFIXES",
            "ImagesResult",
            "Provenance",
            "Result",
            "TimingRow",
            "Timings",
            "provenance_options",
            "read_provenance",
            "values_as_json",
        ],
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
        "validation": ["check_model_file"],
        "video": ["Boxes", "Tracks"],
    },
)
