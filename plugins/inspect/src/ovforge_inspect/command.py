"""`ovforge inspect`: what is in a model, in any form that a loader here opens, and what protects its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovforge.cli import print_json, print_line, print_table
from ovforge.errors import ConfigError, InputError, ModelError

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.model import ModelBundle

__all__ = ["ModelFacts", "Port", "Weights", "inspect", "model_facts"]

_INTEGERS = {"i32", "i64", "u32", "u64", "boolean", "string", "i16", "u16"}
"""Types of indices, shapes and text: constants of these are not parameters."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Constants of one type: how many, their elements, and their bytes."""

    type: str
    constants: int
    elements: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output: its names, type and shape, "?" for an open dimension."""

    names: tuple[str, ...]
    type: str
    shape: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is in one ov.Model. `parameters` counts weights, not the scales and zero points of quantized ones."""

    parameters: int
    weights: tuple[Weights, ...]
    operations: dict[str, int]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    variables: tuple[str, ...]


def inspect(
    source: Annotated[str, typer.Argument(help="A folder or file of any format that a loader here opens.")],
    key: Annotated[
        str | None,
        typer.Option("--key", "-k", metavar="KIND:PLACE", help="Where the key of an encrypted model is: env:NAME"),
    ] = None,
    role: Annotated[list[str] | None, typer.Option("--role", help="Only this role of a folder.")] = None,
    use: Annotated[
        str | None, typer.Option("--use", help="The loader; by default, the one that knows the source.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a model's weights by precision, operations, parameters, inputs and outputs; and what encrypts it.

    Example: ovforge inspect package:ovforge_lcm/model
    """
    from ovforge import describe_protection, open_model

    place = _key(key)
    protection = list(describe_protection(source, Path.cwd()))
    report: dict[str, Any] = {
        "source": source,
        "protection": protection,
        "loader": None,
        "models": None,
        "closed": None,
    }
    try:
        bundle = open_model(source, use=use, key=place)
        report["loader"] = bundle.loader
        report["models"] = {name: asdict(model_facts(bundle.models[name])) for name in _chosen(bundle, role)}
    except (ConfigError, ModelError) as error:
        # What protects a file is shown without a key; what is in it is not.
        if not protection or key is not None:
            raise
        report["closed"] = str(error)
    if as_json:
        print_json(report)
    else:
        _print(report)


def _key(text: str | None) -> dict[str, str] | None:
    """Return `load.key` from KIND:PLACE. Errors do not repeat the text: it may be a key."""
    if text is None:
        return None
    kind, colon, place = text.partition(":")
    if not colon or not kind.isalpha() or not place:
        raise ConfigError("it does not say where the key is", where="--key", hint="Write env:NAME or file:PATH.")
    return {kind: place}


def _chosen(bundle: ModelBundle, roles: Sequence[str] | None) -> Iterator[str]:
    """Yield the roles to show, one model in memory at a time."""
    for role in roles or ():
        if role not in bundle.models:
            raise InputError(
                f"there is no role {role!r}", where="--role", hint=f"Roles here: {', '.join(bundle.models)}."
            )
    for role in roles or list(bundle.models):
        yield role
        bundle.models.release(role)


def model_facts(model: ov.Model) -> ModelFacts:
    """Count what is in a model. Reads no weights."""
    operations = model.get_ops()
    constants = [op for op in operations if op.get_type_name() == "Constant"]
    types: dict[str, list[Any]] = {}
    for constant in constants:
        types.setdefault(constant.get_element_type().get_type_name(), []).append(constant)
    weights = [
        Weights(kind, len(group), sum(map(_elements, group)), sum(op.get_byte_size() for op in group))
        for kind, group in types.items()
    ]
    helpers = _decompression(operations)
    parameters = [op for op in constants if op.get_friendly_name() not in helpers and _is_parameter(op)]
    return ModelFacts(
        parameters=sum(map(_elements, parameters)),
        weights=tuple(sorted(weights, key=lambda one: -one.bytes)),
        operations=dict(Counter(op.get_type_name() for op in operations).most_common()),
        inputs=tuple(map(_port, model.inputs)),
        outputs=tuple(map(_port, model.outputs)),
        variables=tuple(variable.info.variable_id for variable in model.get_variables()),
    )


def _is_parameter(constant: Any) -> bool:
    """Say whether a constant is a weight, rather than a number of the architecture, an index or text."""
    kind = constant.get_element_type()
    if kind.get_type_name() in _INTEGERS or _elements(constant) < 2:
        return False
    readers = {reader.get_node().get_type_name() for reader in constant.output(0).get_target_inputs()}
    return bool(kind.is_real() or "Convert" in readers)


def _elements(constant: Any) -> int:
    count = 1
    for side in constant.get_output_shape(0):
        count *= int(side)
    return count


def _decompression(operations: Sequence[Any]) -> set[str]:
    """Return the names of constants that scale or shift others: low-bit weights, and ranges of FakeQuantize.

    Compressed weights are Multiply(Subtract(Convert(weights), zero point), scale), with Converts in between.
    """
    found = set()
    for op in operations:
        kind = op.get_type_name()
        if kind == "FakeQuantize":
            found |= {name for port in range(1, 5) if (name := _constant(op, port))}
        elif kind in ("Multiply", "Subtract"):
            for port in (0, 1):
                if _low_bits(op.input_value(port).get_node()) and (name := _constant(op, 1 - port)):
                    found.add(name)
                    break  # zero points and some scales have few bits, too; weights come first
    return found


def _constant(op: Any, port: int) -> str | None:
    """Return the name of the constant at an input, behind Converts and Reshapes; None if there is none."""
    node = op.input_value(port).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return node.get_friendly_name() if node.get_type_name() == "Constant" else None


def _low_bits(node: Any) -> bool:
    """Say whether a node gives converted weights of less than 16 bits, shifted by a zero point or not."""
    if node.get_type_name() == "Subtract":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Convert":
        return False
    inner = node.input_value(0).get_node()
    return bool(inner.get_type_name() == "Constant" and inner.get_element_type().bitwidth < 16)


def _port(port: Any) -> Port:
    shape = str(port.get_partial_shape())
    return Port(tuple(sorted(port.names)), port.get_element_type().get_type_name(), shape)


# -- printing ---------------------------------------------------------------------------------------------------------


def _print(report: Mapping[str, Any]) -> None:
    if report["protection"]:
        _print_rows(report["protection"])
    for role, facts in (report["models"] or {}).items():
        total = sum(one["bytes"] for one in facts["weights"]) or 1
        print_line()
        print_line((role, "bold"), f"  {facts['parameters']:,} parameters, {total / 1e6:.1f} MB of weights")
        _print_rows([{**one, "share": f"{one['bytes'] / total:.1%}"} for one in facts["weights"]])
        ports = [{"": "input", **port} for port in facts["inputs"]] + [{"": "output", **p} for p in facts["outputs"]]
        _print_rows([{**port, "names": ", ".join(port["names"])} for port in ports])
        if facts["variables"]:
            print_line(f"variables: {', '.join(facts['variables'])}")
        print_line(f"operations: {', '.join(f'{name} {count}' for name, count in facts['operations'].items())}")
    if report["closed"]:
        print_line()
        print_line(f"What is inside needs the key: {report['closed']}")


def _print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of rows that share keys; numbers to the right."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    numbers = [title for title in titles if any(isinstance(row.get(title), int) for row in rows)]
    print_table(titles, [[_cell(row.get(title)) for title in titles] for row in rows], right=numbers, fold=titles)


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return " ".join(f"{name}={part}" for name, part in value.items())
    return "" if value is None else str(value)
