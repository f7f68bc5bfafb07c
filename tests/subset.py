"""What an installation without one distribution does, told as JSON: run by tests/test_subsets.py in a process of its own.

    python -I -S tests/subset.py SITE FOLDER PACKAGE

SITE stands in for site-packages, FOLDER holds models, PACKAGE is what must not be there.
"""

from __future__ import annotations

import hashlib
import json
import os
import site
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a config for each subject."""
    picture = {
        "task": "text-to-image",
        "load": str(folder / "sd"),
        "scheduler": "ddim",
        "device": {"precision": "f32"},
        "input": {"prompt": "a cat", "seed": 1, "steps": 1, "width": 64, "height": 64},
    }
    lora = {"use": "lora", "path": str(folder / "lora.safetensors")}
    word = {"use": "textual-inversion", "path": str(folder / "word.safetensors"), "token": "<word>"}
    sealed = {"source": str(folder / "sealed"), "key": {"env": "SUBSET_KEY"}}
    return {
        "pictures": picture,
        "latent consistency": {**picture, "load": str(folder / "lcm"), "scheduler": "lcm"},
        "latent consistency, another method": {**picture, "load": str(folder / "lcm")},
        "embedded": {**picture, "load": "package:ovforge_lcm/model"},
        "adapter": {**picture, "transform": [lora]},
        "word": {**picture, "transform": [word], "input": {**picture["input"], "prompt": "a <word>"}},
        "sealed": {**picture, "load": sealed},
        "phrases": {
            "task": "detect",
            "load": "package:ovforge_grounding_dino/model",
            "device": {"precision": "f32"},
            "input": {"image": str(folder / "scene.png"), "text": "horse. tree."},
        },
        "classes": {
            "task": "detect",
            "load": {"source": str(folder / "ssd"), "use": "model-proc"},
            "input": {"image": str(folder / "scene.png")},
        },
        "recipe": {**picture, "quantize": ["lcm-int8"]},
    }


def digest(result: Any) -> str:
    """Return a digest of what was made."""
    import numpy as np

    if hasattr(result, "images"):
        return hashlib.sha256(b"".join(np.asarray(image).tobytes() for image in result.images)).hexdigest()
    found = result.detections[0]
    return f"{found.labels} {np.round(found.boxes).tolist()}"


def outcome(name: str, config: dict[str, Any], cache: Path) -> dict[str, str]:
    """Return what a pipeline makes, or the error that it is refused with; a recipe is planned, which takes no time."""
    import ovforge
    from ovforge import Cache
    from ovforge.errors import OvforgeError

    try:
        if name == "recipe":
            stages = ovforge.plan(config, cache=Cache(cache)).stages
            return {"made": next(stage.use for stage in stages if stage.stage.startswith("quantizer"))}
        return {"made": digest(ovforge.load(config, cache=Cache(cache))())}
    except OvforgeError as error:
        return {"refused": str(error)}


def is_installed(package: str) -> bool:
    """Say whether the package's distribution is found."""
    try:
        distribution(package.replace("_", "-"))
    except PackageNotFoundError:
        return False
    return True


def main(site_packages: str, folder: str, package: str) -> None:
    site.addsitedir(site_packages)
    os.environ["OVFORGE_REGISTRY"] = str(Path(folder) / "registry.toml")
    from ovforge import Plugins

    plugins = Plugins()
    plugins.import_all()
    states = {status.name: [status.state, status.reason] for status in plugins.statuses()}
    results = {name: outcome(name, config, Path(folder) / "cache") for name, config in configs(Path(folder)).items()}
    print(
        json.dumps(
            {
                "there": find_spec(package) is not None or is_installed(package),
                "states": states,
                "results": results,
                "imported": package in sys.modules,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
