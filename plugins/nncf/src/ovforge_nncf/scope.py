"""What stays in its precision: NNCF's ignored scope, and what the quality gate asks to keep."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ovforge.errors import ConfigError, did_you_mean
from ovforge_nncf.parts import PARTS, Part, parts_of, positions_of

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["IgnoredScope", "Scope", "Subgraph"]


class Subgraph(BaseModel):
    """All operations on the paths from some operations to others."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    inputs: tuple[str, ...] = Field(min_length=1, description="Names of the operations that paths start at.")
    outputs: tuple[str, ...] = Field(min_length=1, description="Names of the operations that they end at.")


class Scope(BaseModel):
    """Operations of an OpenVINO model: by name, by type, or by the part of a diffusion transformer that they are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    names: tuple[str, ...] = Field((), description="Names of operations.")
    patterns: tuple[str, ...] = Field((), description="Regular expressions that the beginning of a name matches.")
    types: tuple[str, ...] = Field((), description='Types of operations, as "MatMul" or "Convolution".')
    parts: tuple[Part, ...] = Field((), description="Parts of a diffusion transformer, found by its structure.")
    check: bool = Field(True, description="Refuse what is found in none of the models.")

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns

    def check_in(self, models: Mapping[str, ov.Model], where: str) -> None:
        """Raise ConfigError for what is found in none of `models`, which are all that are quantized.

        `where` is the option's own place.
        """
        if not self.check or self == type(self)():
            return
        ops = [op for model in models.values() for op in model.get_ops()]
        names, types = {op.get_friendly_name() for op in ops}, {op.get_type_name() for op in ops}
        for key, wanted, known in (*self._named(names), ("types", self.types, types)):
            for item in wanted:
                if item not in known:
                    raise ConfigError(
                        f"no operation with {key.removesuffix('s')} {item!r} in {', '.join(models)}."
                        f"{did_you_mean(item, known)}",
                        where=f"{where}.{key}",
                        hint="`ovforge inspect` lists operations; check = false lets it pass.",
                    )
        for pattern in self.patterns:
            if not any(re.match(pattern, name) for name in names):
                raise ConfigError(
                    f"no name of an operation in {', '.join(models)} begins with what {pattern!r} describes",
                    where=f"{where}.patterns",
                    hint="A pattern starts at the beginning of a name: write '.*conv' for one anywhere.",
                )
        if self.parts:
            found = [parts_of(model) for model in models.values()]
            for part in self.parts:
                if not any(parts[part] for parts in found):
                    raise ConfigError(
                        f"{', '.join(models)}: no operation is in the part {part!r}, {PARTS[part]}",
                        where=f"{where}.parts",
                        hint="Parts are those of denoisers: name the roles, as roles = ['transformer'], or set check ="
                        " false to let it pass.",
                    )

    def _named(self, known: Collection[str]) -> list[tuple[str, Sequence[str], Collection[str]]]:
        """Return (option, names that it has, names that there are)."""
        return [("names", self.names, known)]

    def found_in(self, model: ov.Model) -> frozenset[str]:
        """Return the names of a model's operations that are in it, but for subgraphs."""
        named = {
            name
            for op in model.get_ops()
            if (name := op.get_friendly_name()) in self.names
            or op.get_type_name() in self.types
            or any(re.match(pattern, name) for pattern in self.patterns)
        }
        return frozenset(named | self.parts_in(model))

    def parts_in(self, model: ov.Model) -> frozenset[str]:
        """Return the names of the operations in its parts alone."""
        if not self.parts:
            return frozenset()
        found = parts_of(model)
        return frozenset().union(*(found[part] for part in self.parts))


class IgnoredScope(Scope):
    """Operations that stay as they are."""

    subgraphs: tuple[Subgraph, ...] = Field((), description="Parts of the graph: {inputs = [...], outputs = [...]}.")

    def _named(self, known: Collection[str]) -> list[tuple[str, Sequence[str], Collection[str]]]:
        ends = [name for part in self.subgraphs for name in (*part.inputs, *part.outputs)]
        return [*super()._named(known), ("subgraphs", ends, known)]

    def to_nncf(self, model: ov.Model, keep: Collection[str] = (), types: Collection[str] = ()) -> Any:
        """Return nncf.IgnoredScope for one model, with the names in `keep` and `types` on top.

        What computes places and steps is always in it: 8 bits are too few for them, and NNCF would take frequencies for
        weights. Subgraphs are given where all their ends are in the model: NNCF fails at others.
        """
        import nncf

        names = {op.get_friendly_name() for op in model.get_ops()}
        parts = [part for part in self.subgraphs if names >= {*part.inputs, *part.outputs}]
        return nncf.IgnoredScope(
            names=sorted({*self.names, *keep, *self.parts_in(model), *positions_of(model)}),
            patterns=list(self.patterns),
            types=sorted({*self.types, *types}),
            subgraphs=[nncf.Subgraph(inputs=list(part.inputs), outputs=list(part.outputs)) for part in parts],
            validate=False,
        )
