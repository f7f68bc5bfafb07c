"""The loader of what OpenVINO reads by itself."""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from ovforge.contracts.stages import Match
from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle, read_model
from ovforge.model.sources import Source, source_digest

__all__ = ["NativeLoader", "NativeOptions"]

_FOREIGN = {".onnx", ".pb", ".tflite", ".pdmodel"}
"""Single-file formats besides IR: ONNX, TensorFlow's frozen graph, TensorFlow Lite, PaddlePaddle."""

_SAVED_MODEL = "saved_model.pb"


class NativeOptions(BaseModel):
    """The loader has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NativeLoader:
    """Opens IR (a file, or a folder in the layout of `ovforge.model.bundle`), ONNX, TensorFlow, TFLite and Paddle."""

    def __init__(self, options: NativeOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say YES to a source with an .xml, a saved_model.pb, or one file of another known format."""
        return Match.YES if _models(source) else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Open `source`; IR models are read when first used, other formats likewise."""
        models = _models(source)
        if any(model.suffix == ".xml" for model in models):
            return ModelBundle.open(source)
        if len(models) != 1:
            found = ", ".join(map(str, models)) or "nothing"
            raise ModelError(
                f"expected one model, found {found}", where=source.name, hint="Name the file itself as `source`."
            )
        return _foreign(source, models[0])


def _models(source: Source) -> list[PurePosixPath]:
    paths = [PurePosixPath(path) for path in source.files()]
    if any(path.suffix == ".xml" for path in paths):
        return [path for path in paths if path.suffix == ".xml"]
    if PurePosixPath(_SAVED_MODEL) in paths:
        return [PurePosixPath(_SAVED_MODEL)]
    return [path for path in paths if path.suffix in _FOREIGN and len(path.parts) == 1]


def _foreign(source: Source, path: PurePosixPath) -> ModelBundle:
    """Open a model of another format as the role "model"; it may refer to files beside it (external weights)."""
    bundle = ModelBundle(protection=source.protection)
    name = "." if path.name == _SAVED_MODEL else path.as_posix()
    bundle.models.lazy("model", lambda: read_model(source, name))
    bundle.identity["model"] = source_digest(source)
    weights = path.with_suffix(".pdiparams").as_posix()
    if path.suffix == ".pdmodel" and weights not in source.files() and (local := source.local(path.as_posix())):
        beside = local.with_suffix(".pdiparams")
        if beside.is_file():
            digest = hashlib.sha256(beside.read_bytes()).hexdigest()
            bundle.identity["model"] = hashlib.sha256(f"{bundle.identity['model']}{digest}".encode()).hexdigest()
    return bundle
