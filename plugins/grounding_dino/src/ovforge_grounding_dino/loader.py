"""The loader: a transformers folder, or an original checkpoint, into the roles text_encoder, detector and tokenizer."""

from __future__ import annotations

import json
import threading
from functools import cached_property, partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge import open_file
from ovforge.contracts import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model import DetectorSpec, ModelBundle, Source
from ovforge.store import parse_object
from ovforge_convert import (
    Port,
    convert_module,
    convert_tokenizer,
    need,
    pretrained,
    read_pickle,
    read_safetensors,
)
from ovforge_grounding_dino import original
from ovforge_grounding_dino.options import LoaderOptions

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["GroundingDinoLoader"]

INSTALL = 'pip install "ovforge-grounding-dino[convert]"'
KINDS = {"grounding-dino": "GroundingDinoForObjectDetection", "mm-grounding-dino": "MMGroundingDinoForObjectDetection"}
BACKBONES = ("swin", "resnet")
INCOMPLETE = "The folder may be an incomplete download: fetch it again."
DELIMITERS = (101, 102, 1012, 1029)
"""[CLS], [SEP], full stop and question mark in BERT's vocabulary; the models know no other."""

_CHECKPOINTS = (".pth", ".pt")
_PICKLE = 2**20
"""Bytes of a checkpoint's beginning in which the names of the first layers are."""
_VOCABULARY = ("tokenizer.json", "vocab.txt")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class GroundingDinoLoader:
    """Converts GroundingDINO (Liu et al. 2023) and MM-GroundingDINO (Zhao et al. 2024) straight from PyTorch."""

    def __init__(self, options: LoaderOptions) -> None:
        self.options = options

    def can_load(self, source: Source) -> Match:
        """Say yes to a transformers folder by its config.json, to a checkpoint (.pth) by a name that only ours have.

        That stands in the pickle, which torch writes before the weights.
        """
        files = source.files()
        if len(files) == 1 and PurePosixPath(path := next(iter(files))).suffix in _CHECKPOINTS:
            return Match.YES if original.FUSION.encode() in source.read(path, _PICKLE) else Match.NO
        if "config.json" not in files or not any(path.endswith(".safetensors") for path in files):
            return Match.NO
        try:
            kind = parse_object(source.read("config.json"), "config.json").get("model_type")
        except ModelError:
            return Match.NO
        return Match.YES if isinstance(kind, str) and kind in KINDS else Match.NO

    def load(self, source: Source) -> ModelBundle:
        """Return the bundle, its roles converted when they are asked for.

        Raises PluginError without torch, ModelError for what is missing, damaged or not supported, ConfigError for an
        option that the source has no use for.
        """
        for module in ("torch", "transformers", "safetensors"):
            need(module, INSTALL)
        checkpoint = next((path for path in source.files() if path.endswith(_CHECKPOINTS)), None)
        parts = _Folder(source, self.options) if checkpoint is None else _Checkpoint(source, checkpoint, self.options)
        return _Conversion(parts, self.options).bundle()


class _Folder:
    """A transformers folder: config.json, safetensors, a tokenizer."""

    def __init__(self, source: Source, options: LoaderOptions) -> None:
        for name in ("config", "tokenizer"):
            if getattr(options, name) is not None:
                raise ConfigError("is for an original checkpoint; a folder has its own", where=f"load.{name}")
        self.name = source.name
        self._source = source
        self.config = self._json("config.json")
        if self.config.get("model_type") not in KINDS:
            raise ModelError(
                f"config.json is that of a {self.config.get('model_type')!r}",
                where=source.name,
                hint=f"This loader converts {' and '.join(KINDS)}.",
            )

    def processor(self) -> dict[str, Any]:
        """Return preprocessor_config.json, {} if there is none."""
        return self._json("preprocessor_config.json") if "preprocessor_config.json" in self._source.files() else {}

    def weights(self) -> dict[str, Any]:
        """Read the weights."""
        return read_safetensors(self._source, INCOMPLETE)

    def tokenizer(self) -> dict[str, bytes]:
        """Return the tokenizer's files."""
        return _tokenizer_files(self._source, self._source.name, INCOMPLETE)

    def _json(self, path: str) -> dict[str, Any]:
        return parse_object(self._source.read(path), f"{self._source.name}: {path}")


class _Checkpoint:
    """A checkpoint of the original repository."""

    def __init__(self, source: Source, path: str, options: LoaderOptions) -> None:
        self.name = source.name
        self._source, self._path, self._options = source, path, options
        stored = self._stored
        if not original.is_original(stored):
            raise ModelError(
                "its tensors do not have GroundingDINO's names",
                where=source.name,
                hint=f"It begins with {', '.join(list(stored)[:3])}. Is it another model's checkpoint?",
            )
        settings = None
        if options.config is not None:
            settings = original.parse_config(options.config.read_bytes(), str(options.config))
        self.config: dict[str, Any] = {
            "model_type": "grounding-dino",
            **original.config_of(stored, settings, str(options.config or source.name)),
        }

    @cached_property
    def _stored(self) -> dict[str, Any]:
        return read_pickle(self._source, self._path)

    def processor(self) -> dict[str, Any]:
        """Return nothing: the original's pictures are prepared in one way."""
        return {}

    def weights(self) -> dict[str, Any]:
        """Return the weights under transformers' names."""
        try:
            return original.rename(self._stored)
        except ModelError as error:
            raise ModelError(error.what, where=self.name, hint=error.hint) from error

    def tokenizer(self) -> dict[str, bytes]:
        """Return the files of the tokenizer that the options name."""
        hint = "Set load.tokenizer to the folder of bert-base-uncased, or its vocab.txt."
        if self._options.tokenizer is None:
            raise ModelError("a checkpoint brings no tokenizer", where=self.name, hint=hint)
        return _tokenizer_files(open_file(self._options.tokenizer), str(self._options.tokenizer), hint)


def _tokenizer_files(source: Source, where: str, hint: str) -> dict[str, bytes]:
    names = (*_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    files = {name: source.read(name) for name in names if name in source.files()}
    if not any(name in files for name in _VOCABULARY):
        raise ModelError(f"a tokenizer is missing: {' or '.join(_VOCABULARY)}", where=where, hint=hint)
    return files


class _Conversion:
    """One model being converted."""

    def __init__(self, parts: _Folder | _Checkpoint, options: LoaderOptions) -> None:
        self.parts, self.options = parts, options
        self.kind = KINDS[parts.config["model_type"]]
        self._lock = threading.Lock()  # roles are asked for side by side, and are parts of one module

    def bundle(self) -> ModelBundle:
        """Return the bundle, its roles to be converted when they are asked for."""
        bundle = ModelBundle()
        files = self.parts.tokenizer()
        settings = self._settings()
        self._check(settings)
        bundle.configs["detector"] = self._spec(settings).put(settings)
        bundle.models.lazy("text_encoder", partial(self._convert, "text_encoder"))
        bundle.models.lazy("detector", partial(self._convert, "detector"))
        bundle.models.lazy("tokenizer", partial(self._tokenizer, files))
        bundle.assets.update({f"tokenizer/{name}": data for name, data in files.items()})
        return bundle

    def _settings(self) -> dict[str, Any]:
        """Return the config with the class's defaults spelled out."""
        transformers = need("transformers", INSTALL)
        try:
            config = getattr(transformers, self.kind).config_class.from_dict(self.parts.config)
            found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
        except Exception as error:  # whatever a class raises on a config, the config is what is wrong
            raise ModelError(f"no {self.kind} can be made of its config: {error}", where=self.parts.name) from error
        return {key: value for key, value in found.items() if key != "_name_or_path"}

    def _check(self, settings: dict[str, Any]) -> None:
        """Refuse what the graph does not do."""
        backbone, text = settings["backbone_config"], settings["text_config"]
        if (kind := backbone.get("model_type")) not in BACKBONES:
            raise ModelError(
                f"backbone_config.model_type = {kind!r} cannot be converted, only {' and '.join(BACKBONES)}",
                where=self.parts.name,
            )
        wanted = [
            ("backbone_config.use_absolute_embeddings", backbone.get("use_absolute_embeddings", False), False),
            ("text_config.model_type", text.get("model_type"), "bert"),
            ("position_embedding_type", settings["position_embedding_type"], "sine"),
            ("two_stage", settings["two_stage"], True),
            ("query_dim", settings["query_dim"], 4),
        ]
        for key, value, only in wanted:
            if value != only:
                raise ModelError(f"{key} = {value!r} cannot be converted, only {only!r}", where=self.parts.name)
        if text["vocab_size"] <= max(DELIMITERS):
            raise ModelError(
                f"its vocabulary has {text['vocab_size']} tokens, and ids up to {max(DELIMITERS)} end phrases",
                where=self.parts.name,
                hint="GroundingDINO needs the vocabulary of bert-base-uncased.",
            )

    def _spec(self, settings: dict[str, Any]) -> DetectorSpec:
        """Say how pictures go in. The defaults are the original repository's."""
        processor = self.parts.processor()
        size = processor.get("size") or {}
        if not isinstance(size, dict):
            size = {"shortest_edge": size, "longest_edge": 1333}
        fixed = {"height": size["height"], "width": size["width"]} if "height" in size else {}
        scaled = {"shortest": size.get("shortest_edge", 800), "longest": size.get("longest_edge", 1333)}
        normal = processor.get("do_normalize", True)
        backbone = settings["backbone_config"]
        first = int(backbone["out_features"][0].removeprefix("stage")) + 1
        try:
            return DetectorSpec(
                kind="text",
                **(fixed or scaled),
                scale=processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0,
                mean=processor.get("image_mean", _MEAN) if normal else (0, 0, 0),
                std=processor.get("image_std", _STD) if normal else (1, 1, 1),
                threshold=0.35,
                queries=settings["num_queries"],
                strides=tuple(2 ** (first + level) for level in range(settings["num_feature_levels"])),
                max_tokens=settings["max_text_len"],
                delimiters=DELIMITERS,
            )
        except ValueError as error:
            raise ModelError(f"says nothing usable of pictures: {error}", where="preprocessor_config.json") from error

    @cached_property
    def _module(self) -> Any:
        return pretrained(self.kind, self.parts.config, self.parts.weights(), self.parts.name)

    def _convert(self, role: str) -> ov.Model:
        with self._lock:
            return self._traced(role)

    def _traced(self, role: str) -> ov.Model:
        from ovforge_grounding_dino import graph

        module, width = self._module, self._module.config.d_model
        text = [
            Port("text_self_mask", (None, None, None), (1, 6, 6), "boolean"),
            Port("text_position_ids", (None, None), (1, 6), "i64"),
        ]
        if role == "text_encoder":
            forward: Any = partial(graph.encode_text, module)
            inputs, outputs = [Port("input_ids", (None, None), (1, 6), "i64"), *text], ["text_features"]
        else:
            forward = partial(graph.detect, module)
            # Sides that are multiples of nothing: whatever a trace may leave out must be in it.
            inputs = [
                Port("pixel_values", (None, 3, None, None), (1, 3, 301, 333)),
                Port("pixel_mask", (None, None, None), (1, 301, 333)),
                Port("text_features", (None, None, width), (1, 6, width)),
                Port("text_mask", (None, None), (1, 6), "boolean"),
                *text,
            ]
            outputs = ["logits", "boxes"]
        return convert_module(role, module, forward, inputs, outputs, self.options.weights)

    def _tokenizer(self, files: dict[str, bytes]) -> ov.Model:
        return convert_tokenizer(files, "BertTokenizerFast", "tokenizer", self.parts.name, INSTALL)
