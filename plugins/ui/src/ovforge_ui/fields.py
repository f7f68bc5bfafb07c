"""Fields of a form, made from the JSON Schema of any task's inputs model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

__all__ = ["Field", "Kind", "fields_of", "mask_of"]

Kind = Literal[
    "text", "lines", "integer", "number", "choice", "switch", "picture", "pictures", "video", "file", "files", "object",
    "objects", "json",
]  # fmt: skip
"""What a field is filled in with. `lines` is a list of texts, one a line; `object` and `objects` hold files, and have
fields of their own; `json` is anything else, written as JSON."""

_PATHS = {"path", "file-path", "directory-path"}
_USUAL = {
    "negative_prompt", "seed", "steps", "width", "height", "guidance_scale", "strength", "text", "threshold", "count",
}  # fmt: skip
"""Inputs that people change often: they are not folded away, whatever task has them."""

_FEW = 6
"""Fields up to which none is folded away."""

_MEDIA: Mapping[str, tuple[Kind, Kind]] = {"image": ("picture", "pictures"), "video": ("video", "files")}
"""What a file with such a media type is filled in with: one, and a list of them."""

_OBJECTS = 4
"""Objects of a list that a form has fields for, if the task does not say how many it takes."""


@dataclass(frozen=True)
class Field:
    """One input of a task.

    `minimum` and `maximum` are inclusive; None if a value has no such bound. `choices` are the values of a `choice`.
    `folded` says whether it stands among those that are seldom changed. `parts` are the fields of an object, and `most`
    says how many objects there may be.
    """

    name: str
    kind: Kind
    help: str
    required: bool
    nullable: bool
    default: Any
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[Any, ...] = ()
    folded: bool = False
    parts: tuple[Field, ...] = ()
    most: int = 0

    @property
    def title(self) -> str:
        """What stands above it."""
        return self.name.replace("_", " ").capitalize()

    @property
    def is_file(self) -> bool:
        """Whether it is filled in with files."""
        return self.kind in ("picture", "pictures", "video", "file", "files")


def fields_of(inputs: type[BaseModel], given: Mapping[str, Any] = {}) -> list[Field]:
    """Return a field for each input: pictures and other files first, then those without a default, then the others.

    `given` is what a config says of inputs: as good as a default.
    """
    schema = inputs.model_json_schema()
    found = [
        _field(name, part, schema.get("$defs", {}), inputs, given)
        for name, part in schema.get("properties", {}).items()
    ]
    found.sort(key=lambda each: (each.folded or not each.is_file, not each.required))
    if len(found) <= _FEW:
        found = [replace(each, folded=False) for each in found]
    return found


def mask_of(fields: Sequence[Field]) -> tuple[Field, Field] | None:
    """Return the fields of a picture and its mask, which one editor fills in; None if there is no such pair."""
    pictures = {field.name: field for field in fields if field.kind == "picture"}
    mask, image = pictures.get("mask"), pictures.get("image")
    return (image, mask) if image and mask else None


def _field(
    name: str,
    part: Mapping[str, Any],
    definitions: Mapping[str, Any],
    inputs: type[BaseModel],
    given: Mapping[str, Any],
) -> Field:
    """Return the field of one input of a task."""
    info = inputs.model_fields[name]
    default = given.get(name, None if info.is_required() else info.get_default(call_default_factory=True))
    field = _shaped(name, part, definitions, info.is_required() and name not in given, default)
    if field.kind == "json":
        field = _with_parts(field, part, definitions)
    shown = info.is_required() or name in given or name in _USUAL or field.kind in ("picture", "pictures", "video")
    return replace(field, folded=not shown)


def _shaped(name: str, part: Mapping[str, Any], definitions: Mapping[str, Any], required: bool, default: Any) -> Field:
    """Return the field of what a schema describes."""
    nodes = list(_alternatives(part, definitions))
    nullable = any(node.get("type") == "null" for node in nodes)
    nodes = [node for node in nodes if node.get("type") != "null"]
    kind, choices = _kind(nodes, nullable)
    numbers = [node for node in nodes if node.get("type") in ("integer", "number")]
    return Field(
        name=name,
        kind=kind,
        help=str(part.get("description", "")),
        required=required,
        nullable=nullable,
        default=default,
        minimum=_bound(numbers, "minimum", "exclusiveMinimum", kind, 1),
        maximum=_bound(numbers, "maximum", "exclusiveMaximum", kind, -1),
        choices=choices,
    )


def _with_parts(field: Field, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Field:
    """Return an object, or a list of objects, with their fields if one is a file, which JSON could not name."""
    nodes = list(_alternatives(schema, definitions))
    for node in nodes:
        if parts := _parts(node, definitions):
            return replace(field, kind="object", parts=parts, most=1)
    for node in [node for node in nodes if node.get("type") == "array"]:
        for item in _items(node):
            for each in _alternatives(item, definitions):
                if parts := _parts(each, definitions):
                    most = min(_OBJECTS, int(node.get("maxItems", _OBJECTS)))
                    return replace(field, kind="objects", parts=parts, most=most)
    return field


def _parts(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> tuple[Field, ...]:
    """Return the fields of an object; none if it holds no file."""
    required = node.get("required", ())
    parts = [
        _shaped(name, part, definitions, name in required, part.get("default"))
        for name, part in node.get("properties", {}).items()
    ]
    return tuple(parts) if any(part.is_file for part in parts) else ()


def _kind(nodes: Sequence[Mapping[str, Any]], nullable: bool) -> tuple[Kind, tuple[Any, ...]]:
    """Return how a value is filled in: in the first of these ways that one of the alternatives allows."""
    single = {node.get("type") for node in nodes}
    items = [item for node in nodes if node.get("type") == "array" for item in _items(node)]
    fixed = [node for node in nodes if "enum" in node or "const" in node]
    if nodes and len(fixed) == len(nodes):
        values = tuple(value for node in fixed for value in (node["enum"] if "enum" in node else [node["const"]]))
        return "choice", (*values, None) if nullable else values
    for several, part in enumerate((nodes, items)):
        if files := [node for node in part if node.get("format") in _PATHS]:
            media = str(files[0].get("contentMediaType", "")).partition("/")[0]
            return _MEDIA.get(media, ("file", "files"))[several], ()
    if single == {"boolean"}:
        return ("choice", (True, False, None)) if nullable else ("switch", ())
    if "string" in single:
        return "text", ()
    if "number" in single:
        return "number", ()
    if "integer" in single:
        return "integer", ()
    if single == {"array"} and items and all(item.get("type") == "string" for item in items):
        return "lines", ()
    return "json", ()


def _items(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what a list may hold; nothing for one of a fixed length, whose parts differ."""
    item = node.get("items")
    if isinstance(item, Mapping) and "prefixItems" not in node:
        yield item


def _alternatives(schema: Any, definitions: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the schemas that a value may follow, references resolved one level deep at a time."""
    if not isinstance(schema, Mapping):
        return
    if "$ref" in schema:
        yield from _alternatives(definitions[schema["$ref"].rpartition("/")[2]], definitions)
        return
    parts = [part for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ())]
    if not parts:
        yield schema
    for part in parts:
        yield from _alternatives(part, definitions)


def _bound(
    numbers: Sequence[Mapping[str, Any]], inclusive: str, exclusive: str, kind: Kind, direction: int
) -> float | None:
    """Return the bound of all alternatives; one that is itself left out is moved by a hundredth, or by 1."""
    if len(numbers) != 1:
        return None
    if inclusive in numbers[0]:
        return float(numbers[0][inclusive])
    if exclusive in numbers[0]:
        return float(numbers[0][exclusive]) + direction * (1 if kind == "integer" else 0.01)
    return None
