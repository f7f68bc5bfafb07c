"""JSON Schema of a config, with the options of every extension that is here."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from ovforge.config.pipeline import PipelineConfig
from ovforge.contracts.extensions import TaskExtension

if TYPE_CHECKING:
    from ovforge.plugins.manager import Offer, Plugins

__all__ = ["config_schema"]

_KEY_OF_KIND = {
    "task": "task",
    "transform": "transform",
    "quantizer": "quantize",
    "scheduler": "scheduler",
    "device": "device",
}


def config_schema(plugins: Plugins) -> dict[str, Any]:
    """Return a JSON Schema (draft 2020-12) that editors check and complete configs with."""
    schema = PipelineConfig.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    for kind, key in _KEY_OF_KIND.items():
        choice = _choice(_describable(plugins, kind), definitions)
        old = schema["properties"][key]
        described = {name: old[name] for name in ("description", "default") if name in old}
        is_list = kind in ("transform", "quantizer")
        schema["properties"][key] = {**({"type": "array", "items": choice} if is_list else choice), **described}
    schema["properties"]["load"] = {
        "anyOf": [
            {"type": "string"},
            {
                **definitions.pop("Load"),
                "properties": _loading(_describable(plugins, "loader"), _describable(plugins, "source"), definitions),
            },
        ]
    }
    schema["properties"]["input"]["anyOf"] = [
        _inline(offer.extension.inputs_model().model_json_schema(), definitions, required=False)
        for offer in _describable(plugins, "task")
        if isinstance(offer.extension, TaskExtension)
    ]
    definitions.pop("Use", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "ovforge pipeline"}


def _describable(plugins: Plugins, kind: str) -> list[Offer]:
    """Return the offers of a kind that have a schema; a warning names each of the others, which are broken."""
    sound = []
    for offer in plugins.all(kind):
        extension = offer.extension
        models = [extension.options_model] + ([extension.inputs_model] if isinstance(extension, TaskExtension) else [])
        try:
            for model in filter(None, (get() for get in models)):
                model.model_json_schema()
        except Exception as error:  # a plugin's model may hold anything
            warnings.warn(
                f"the {kind} {extension.name!r} of the plugin {offer.plugin!r} is left out: {error}", stacklevel=2
            )
        else:
            sound.append(offer)
    return sound


def _choice(offers: list[Offer], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return: a bare name, or a table with `use` and the options of that extension."""
    names = {"enum": [offer.extension.name for offer in offers]}
    return {"anyOf": [names, *(_table(offer, definitions) for offer in offers)]} if offers else names


def _table(offer: Offer, definitions: dict[str, Any]) -> dict[str, Any]:
    model = offer.extension.options_model()
    empty = {"type": "object", "properties": {}}
    table: dict[str, Any] = _inline(model.model_json_schema(), definitions) if model else empty
    properties: dict[str, Any] = {"use": {"const": offer.extension.name, "description": offer.extension.summary}}
    return {
        **table,
        "properties": {**properties, **table.get("properties", {})},
        "required": ["use", *table.get("required", [])],
        "additionalProperties": False,
    }


def _loading(offers: list[Offer], sources: list[Offer], definitions: dict[str, Any]) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "source": {"type": "string", "description": "A folder or file, or package:NAME/PATH."},
        "use": {"enum": [offer.extension.name for offer in offers]},
    }
    for offer in offers:
        if model := offer.extension.options_model():
            properties |= _inline(model.model_json_schema(), definitions).get("properties", {})
    keys = [model for offer in sources if (model := offer.extension.options_model())]
    if keys:
        properties["key"] = {"anyOf": [_inline(model.model_json_schema(), definitions) for model in keys]}
    return properties


def _inline(schema: dict[str, Any], definitions: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """Move a model's own definitions to the top, where its references look for them."""
    definitions.update(schema.pop("$defs", {}))
    if not required:
        schema.pop("required", None)
    return schema
