"""Options of extensions and inputs of tasks: pydantic models, checked with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ValidationError, ValidationInfo

from ovforge.config.explanation import explained
from ovforge.errors import ConfigError
from ovforge.model.sources import PACKAGE, package_path

__all__ = ["InputFile", "checked", "input_files", "validate_options"]

Model = TypeVar("Model", bound=BaseModel)


class _FileMarker:
    """Marks an option that names a file whose content matters: the cache's keys hold its digest."""


def _from_base(path: Path, info: ValidationInfo) -> Path:
    if path.as_posix().startswith(PACKAGE):
        return package_path(path.as_posix())
    base = (info.context or {}).get("base")
    return Path(base) / path.expanduser() if base else path.expanduser()


InputFile = Annotated[Path, AfterValidator(_from_base), _FileMarker()]
"""Type of an option that names a file or folder to read; relative paths start at the config's folder.

"package:NAME/PATH" names one inside an installed Python package.
"""


def validate_options(
    model: type[BaseModel] | None,
    options: Mapping[str, Any],
    *,
    where: str,
    base: Path | None = None,
    secret: bool = False,
) -> BaseModel | None:
    """Check an extension's options with its own model. `base` is the folder that InputFile options start at.

    Errors of `secret` options do not show what was given.
    """
    if model is None:
        if options:
            raise ConfigError(f"takes no options, and {', '.join(map(repr, options))} is given", where=where)
        return None
    return checked(model, options, where=where, base=base, secret=secret)


def checked(model: type[Model], value: Any, *, where: str, base: Path | None = None, secret: bool = False) -> Model:
    """Validate `value`; a pydantic error becomes a ConfigError in plain words."""
    try:
        return model.model_validate(value, context={"base": base})
    except ValidationError as error:
        # pydantic's own error holds all that was given.
        problems = error.errors(include_url=False, include_input=not secret)
        raise explained(problems, model, where) from None if secret else error


def check_present(model: type[BaseModel], value: Mapping[str, Any], *, where: str, base: Path | None = None) -> None:
    """Raise ConfigError for wrong values, of which some may come later: what is missing is not a mistake yet."""
    try:
        model.model_validate(value, context={"base": base})
    except ValidationError as error:
        problems = [problem for problem in error.errors(include_url=False) if problem["type"] != "missing"]
        if problems:
            raise explained(problems, model, where) from error


def input_files(options: BaseModel | None) -> list[Path]:
    """Return the files that InputFile options name, alone, optional or in lists."""
    if options is None:
        return []
    files = []
    for name, info in type(options).model_fields.items():
        if _names_files(info.annotation) or any(isinstance(item, _FileMarker) for item in info.metadata):
            value = getattr(options, name)
            files += [
                item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, Path)
            ]
    return files


def _names_files(annotation: Any) -> bool:
    """Say whether InputFile stands anywhere in a type, such as list[InputFile] | None."""
    return isinstance(annotation, _FileMarker) or any(map(_names_files, get_args(annotation)))
