"""What stays in its precision: NNCF's ignored scope, and what the quality gate asks to keep."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ovforge.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["IgnoredScope", "Subgraph"]


class Subgraph(BaseModel):
    """All operations on the paths from some operations to others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[str, ...] = Field(min_length=1, description="Names of the operations that paths start at.")
    outputs: tuple[str, ...] = Field(min_length=1, description="Names of the operations that they end at.")


class IgnoredScope(BaseModel):
    """Operations that stay as they are; their names are those of the OpenVINO model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = Field((), description="Names of operations.")
    patterns: tuple[str, ...] = Field((), description="Regular expressions that the beginning of a name matches.")
    types: tuple[str, ...] = Field((), description='Types of operations, as "MatMul" or "Convolution".')
    subgraphs: tuple[Subgraph, ...] = Field((), description="Parts of the graph: {inputs = [...], outputs = [...]}.")
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
        """Raise ConfigError for what is found in none of `models`, which are all that are quantized."""
        if not self.check or self == IgnoredScope():
            return
        ops = [op for model in models.values() for op in model.get_ops()]
        names, types = {op.get_friendly_name() for op in ops}, {op.get_type_name() for op in ops}
        ends = [name for part in self.subgraphs for name in (*part.inputs, *part.outputs)]
        for key, wanted, known in (
            ("names", self.names, names),
            ("types", self.types, types),
            ("subgraphs", ends, names),
        ):
            for item in wanted:
                if item not in known:
                    raise ConfigError(
                        f"no operation with {key.removesuffix('s')} {item!r} in {', '.join(models)}."
                        f"{did_you_mean(item, known)}",
                        where=f"{where}.ignored_scope.{key}",
                        hint="`ovforge inspect` lists operations; check = false lets it pass.",
                    )
        for pattern in self.patterns:
            if not any(re.match(pattern, name) for name in names):
                raise ConfigError(
                    f"no name of an operation in {', '.join(models)} begins with what {pattern!r} describes",
                    where=f"{where}.ignored_scope.patterns",
                    hint="A pattern starts at the beginning of a name: write '.*conv' for one anywhere.",
                )

    def to_nncf(self, model: ov.Model, keep: Collection[str] = (), types: Collection[str] = ()) -> Any:
        """Return nncf.IgnoredScope for one model, with the names in `keep` and `types` on top.

        Subgraphs are given where all their ends are in the model: NNCF fails at others.
        """
        import nncf

        names = {op.get_friendly_name() for op in model.get_ops()}
        parts = [part for part in self.subgraphs if names >= {*part.inputs, *part.outputs}]
        return nncf.IgnoredScope(
            names=sorted({*self.names, *keep}),
            patterns=list(self.patterns),
            types=sorted({*self.types, *types}),
            subgraphs=[nncf.Subgraph(inputs=list(part.inputs), outputs=list(part.outputs)) for part in parts],
            validate=False,
        )

    def matches(self, name: str, kind: str) -> bool:
        """Say whether an operation is named here, but for subgraphs."""
        return name in self.names or kind in self.types or any(re.match(pattern, name) for pattern in self.patterns)
