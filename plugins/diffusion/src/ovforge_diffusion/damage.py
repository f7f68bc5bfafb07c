"""Configs whose values are of another kind than the models' own libraries write."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ovforge.errors import ModelError

__all__ = ["explained"]

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


def explained(read: Callable[Arguments, Value]) -> Callable[Arguments, Value]:
    """Let a function that reads configs raise ModelError if a value in them is of another kind than it expects."""

    @functools.wraps(read)
    def reading(*arguments: Arguments.args, **named: Arguments.kwargs) -> Value:
        try:
            return read(*arguments, **named)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise ModelError(
                f"a value in its configs cannot be used: {error}",
                where="config.json, model_index.json or scheduler_config.json",
                hint="Fetch or convert the model again.",
            ) from error

    return reading
