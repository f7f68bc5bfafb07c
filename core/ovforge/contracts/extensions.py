"""The typed, frozen descriptions that hooks yield.

A description is cheap. `factory`, `config` and `inputs` may be import strings ("package.module:Name"), resolved
when first used, so that listing forty plugins imports none of their dependencies.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from ovforge.contracts.stages import Phase
from ovforge.errors import PluginError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from ovforge.model.results import Result

__all__ = [
    "KINDS",
    "CommandExtension",
    "DeviceExtension",
    "DriverExtension",
    "Extension",
    "GraphTransformExtension",
    "LoaderExtension",
    "Need",
    "QuantizerExtension",
    "RecipeExtension",
    "SchedulerExtension",
    "SourceExtension",
    "TaskExtension",
    "TrackerExtension",
    "TunableExtension",
    "is_extension_name",
    "resolve",
]

Need = Literal["nothing", "inputs", "score"]
"""What a quantizer asks its calibration for."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def is_extension_name(text: str) -> bool:
    """Say whether `text` is lower-case words and digits joined by hyphens."""
    return _NAME.fullmatch(text) is not None


def resolve(reference: Any) -> Any:
    """Return what an import string "package.module:Name" names; anything else is returned as it is.

    Raises PluginError if there is no such module or name, or if the module fails while it is imported.
    """
    if not isinstance(reference, str):
        return reference
    module, colon, name = reference.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), name)):
        raise PluginError(f"{reference!r} is not a valid import string", hint='Write "package.module:Name".')
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # a module may raise anything while it is imported
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise PluginError(
            f"it cannot be imported: {kind}{error}",
            where=reference,
            hint="See `ovforge plugins doctor`; `ovforge --debug` shows the traceback.",
        ) from error


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What all descriptions have.

    `name` is what a config says after `use =`: lower case, digits, hyphens. `config` is a pydantic model with
    extra="forbid" whose fields are the options; None if there are no options.
    """

    kind: ClassVar[str]

    name: str
    summary: str
    factory: str | Callable[..., Any]
    config: str | type[BaseModel] | None = None

    def __post_init__(self) -> None:
        if not is_extension_name(self.name):
            raise PluginError(
                f"{self.name!r} is not a valid extension name", hint="Use lower-case words joined by hyphens."
            )
        if not self.summary.strip() or not self.summary.isprintable():
            raise PluginError("the summary must be one line of printable text", where=self.name)

    def options_model(self) -> type[BaseModel] | None:
        """Return the pydantic model of the options, imported if need be."""
        model: type[BaseModel] | None = resolve(self.config)
        return model

    def create(self, *arguments: Any) -> Any:
        """Call the factory."""
        return resolve(self.factory)(*arguments)

    def problems(self) -> Iterator[PluginError]:
        """Import all that the description names; yield an error for each name that is missing or of a wrong kind.

        `where` of an error is the field. Costs the import of whatever the factories' modules import.
        """
        for field, reference in self.references():
            try:
                value = resolve(reference)
            except PluginError as error:
                found = PluginError(f"{error.where}: {error.what}" if error.where else error.what, where=field)
                found.__cause__ = error.__cause__
                yield found
                continue
            if value is None:
                continue
            if field in ("factory", "adapter", "embedders", "tunings"):
                if not callable(value):
                    yield PluginError("it cannot be called", where=field)
            elif not _is_options_model(value):
                yield PluginError("it is not a class derived from pydantic.BaseModel", where=field)

    def references(self) -> Iterator[tuple[str, Any]]:
        """Yield each field that may be an import string, with what it holds."""
        yield "factory", self.factory
        yield "config", self.config


def _is_options_model(value: Any) -> bool:
    from pydantic import BaseModel

    return isinstance(value, type) and issubclass(value, BaseModel)


@dataclass(frozen=True, kw_only=True)
class TunableExtension(Extension):
    """What may make a pipeline faster or smaller, and is tried by `ovforge tune`.

    `tunings` are tables of options that are worth a try, as a config says them; `({},)` is the extension without
    options. For what depends on the machine, it is a function that returns them, or its import string.
    """

    tunings: Sequence[Mapping[str, Any]] | str | Callable[[], Iterable[Mapping[str, Any]]] = ()

    def tables(self) -> list[Mapping[str, Any]]:
        """Return the tables of options. Raises PluginError for what holds none."""
        found = resolve(self.tunings)
        tables = list(found() if callable(found) else found)
        if not all(isinstance(table, Mapping) for table in tables):
            raise PluginError("tunings are tables of options", where=self.name)
        return tables

    def references(self) -> Iterator[tuple[str, Any]]:
        yield from super().references()
        if isinstance(self.tunings, str):
            yield "tunings", self.tunings


@dataclass(frozen=True, kw_only=True)
class LoaderExtension(Extension):
    """Opens a kind of source. `factory(options) -> Loader`.

    If some of its options have no default, it takes part in no search by content: it opens what `load.use` gives it.
    `converts` says that loading is a conversion, whose result goes into the cache. `in_memory` promises that a
    conversion leaves no part of the source in a file, so that encrypted sources may be converted. `beside` holds glob
    patterns of files that a single file's loader reads from the file's folder, too, such as "tokenizer*/*".
    """

    kind: ClassVar[str] = "loader"
    converts: bool = False
    in_memory: bool = False
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SourceExtension(Extension):
    """Opens sources that are not plain, encrypted ones above all. `factory(options) -> sources.Opener`.

    Options are what a config says as `load.key`. All should have defaults: an opener without them looks only at sources
    that come with a key.
    """

    kind: ClassVar[str] = "source"


@dataclass(frozen=True, kw_only=True)
class GraphTransformExtension(TunableExtension):
    """Changes models. `factory(options) -> GraphTransform`. `phase` may be a function of the options.

    `adapter` is for what is switched while a pipeline runs: `adapter(options, bundle) -> stages.Adapter`, or None if
    these options leave nothing to switch. It is called when all transforms are done, and for adapters that are loaded
    later; `bundle.adapters` tells the places that transforms made.
    `recompute` says that it is quicker to make the change again than to store whole models: the cache then keeps the
    report alone, and the change is made whenever a changed model is read.
    With `approximates`, it changes results by design, to save work, and runs after the quantizers (Phase.ATTACH or
    LAYOUT): the driver's gate compares the pipeline with the one without it.
    `embedders(options, bundle)` returns stages.Embedder by the name of a model's input, for inputs that take an
    embedding of a number which a call gives; {} if these models have none. The task computes those inputs with them.
    """

    kind: ClassVar[str] = "transform"
    phase: Phase | Callable[[Any], Phase]
    recompute: bool = False
    approximates: bool = False
    adapter: str | Callable[..., Any] | None = None
    embedders: str | Callable[..., Any] | None = None

    def references(self) -> Iterator[tuple[str, Any]]:
        yield from super().references()
        yield "adapter", self.adapter
        yield "embedders", self.embedders


@dataclass(frozen=True, kw_only=True)
class QuantizerExtension(TunableExtension):
    """Lowers precision. `factory(options) -> Quantizer`; runs in Phase.PRECISION.

    `needs` says what it asks its calibration for: "nothing", "inputs", or "score" (and inputs); it may be a function
    of the options. What it says it does not need it does not get, and its results are not made again when that changes.
    """

    kind: ClassVar[str] = "quantizer"
    needs: Need | Callable[[Any], Need] = "score"

    def needed(self, options: Any) -> Need:
        """Return what it asks its calibration for, with these options."""
        return self.needs(options) if callable(self.needs) else self.needs


@dataclass(frozen=True, kw_only=True)
class DriverExtension(Extension):
    """Calibrates quantizers and judges them. `factory(context: DriverContext) -> Driver`.

    `sections` maps the name of each top-level table of a config that is the driver's own to its pydantic model
    (extra="forbid"). A pipeline has one driver: the one whose sections its config has, or the only one that is here.
    """

    kind: ClassVar[str] = "driver"
    sections: Mapping[str, str | type[BaseModel]]

    def section_model(self, name: str) -> type[BaseModel]:
        """Return the pydantic model of one of its sections, imported if need be."""
        model: type[BaseModel] = resolve(self.sections[name])
        return model

    def references(self) -> Iterator[tuple[str, Any]]:
        yield from super().references()
        for name, section in self.sections.items():
            yield f"sections.{name}", section


@dataclass(frozen=True, kw_only=True)
class RecipeExtension(TunableExtension):
    """A quantizer of any plugin with options of its own, under a name of its own; yielded by `ovforge_quantizers`.

    `quantizer` is the name of that quantizer, and `options` are the ones that differ from its defaults, as a config
    says them: plain tables, lists, numbers and text. A user can set each of the quantizer's options over them.
    """

    kind: ClassVar[str] = "quantizer"
    factory: str | Callable[..., Any] = ""
    quantizer: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            json.dumps(dict(self.options))
        except (TypeError, ValueError) as error:
            raise PluginError(f"the options of a recipe are plain data: {error}", where=self.name) from error

    def references(self) -> Iterator[tuple[str, Any]]:
        return iter(())  # it names a quantizer, and imports nothing

    def of(self, quantizer: QuantizerExtension) -> QuantizerExtension:
        """Return `quantizer` with this name, this summary, and these options for defaults."""
        parts = {part.name: getattr(quantizer, part.name) for part in fields(quantizer)}
        own = {"name": self.name, "summary": self.summary, "tunings": self.tunings}
        return _WithDefaults(**{**parts, **own}, defaults=self.options)


@dataclass(frozen=True, kw_only=True)
class _WithDefaults(QuantizerExtension):
    """What a recipe makes of a quantizer."""

    defaults: Mapping[str, Any]

    def options_model(self) -> type[BaseModel] | None:
        """Return the quantizer's model with these defaults. Raises PluginError for one that it does not have."""
        from pydantic import Field, create_model

        model = super().options_model()
        known = model.model_fields if model else {}
        if unknown := sorted(set(self.defaults) - set(known)):
            raise PluginError(f"its quantizer has no option {unknown[0]!r}", where=f"recipe {self.name}")
        if model is None:
            return None
        changed: dict[str, Any] = {}
        for name, value in self.defaults.items():
            # A field is told its default as it was told before, by value or by function: pydantic refuses both.
            way = "default_factory" if known[name].default_factory else "default"
            default: Any = {way: (lambda value=value: value) if way == "default_factory" else value}
            changed[name] = (Annotated[known[name].annotation, known[name]], Field(**default, validate_default=True))
        return create_model(model.__name__, __base__=model, __doc__=self.summary, **changed)


@dataclass(frozen=True, kw_only=True)
class SchedulerExtension(Extension):
    """Samples. `factory(options, model_config) -> Scheduler`.

    `implements` names the diffusers classes that it stands for: a model whose scheduler_config.json
    names one of them gets this scheduler if the config names none.
    """

    kind: ClassVar[str] = "scheduler"
    implements: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceExtension(TunableExtension):
    """A place to run. `factory(options) -> Device`."""

    kind: ClassVar[str] = "device"


@dataclass(frozen=True, kw_only=True)
class TaskExtension(TunableExtension):
    """What a pipeline is for. `factory(options, context) -> Task`.

    `inputs` is the pydantic model (extra="forbid") of what one call takes; `roles` names the models that the
    task cannot do without, and `one_of` some of which it needs one, if there are any; `optional_roles` those it uses if
    they are there. Other roles are not compiled.
    `transforms` names graph transforms that its pipelines get without asking, with their default options, unless
    the config names them itself or says optimize = false: exact ones, of its own distribution or one it requires.
    `result` is the class of what a call returns: with it, `ovforge run` refuses an output that the result cannot be
    written to before anything is computed; without it, afterwards.
    `optional_transforms` are some that a kind of model cannot do without, and that other plugins offer: pipelines get
    those that are here, whatever `optimize` says.
    `advice` is what an error says if a model lacks one of the roles: how such a model is opened instead.
    With `threads`, one running task may be called from several threads at a time; without, a pipeline serves such calls
    one after the other. Its `tunings` are tables of inputs.
    """

    kind: ClassVar[str] = "task"
    inputs: str | type[BaseModel]
    roles: tuple[str, ...]
    one_of: tuple[str, ...] = ()
    optional_roles: tuple[str, ...] = ()
    transforms: tuple[str, ...] = ()
    result: str | type[Result] | None = None
    optional_transforms: tuple[str, ...] = ()
    advice: str = ""
    threads: bool = False

    def fits(self, roles: Collection[str]) -> bool:
        """Say whether a model of these roles has all that the task cannot do without."""
        return all(role in roles for role in self.roles) and (
            not self.one_of or any(role in roles for role in self.one_of)
        )

    def inputs_model(self) -> type[BaseModel]:
        """Return the pydantic model of the inputs, imported if need be."""
        model: type[BaseModel] = resolve(self.inputs)
        return model

    def result_type(self) -> type[Result] | None:
        """Return the class of what a call returns, imported if need be; None if the plugin does not say."""
        kind: type[Result] | None = resolve(self.result)
        return kind

    def references(self) -> Iterator[tuple[str, Any]]:
        yield from super().references()
        yield "inputs", self.inputs


@dataclass(frozen=True, kw_only=True)
class CommandExtension(Extension):
    """A command of the `ovforge` program. `factory` is the typer-style function, or a typer.Typer app."""

    kind: ClassVar[str] = "command"


@dataclass(frozen=True, kw_only=True)
class TrackerExtension(Extension):
    """Follows things through a stream of pictures. `factory(options, threshold) -> Tracker`, once for each stream.

    `threshold` is the score from which a box is a find for the detector; a tracker gets weaker ones, too.
    With `every_picture`, it needs what a detector finds in each picture, and works out no place of its own between.
    """

    kind: ClassVar[str] = "tracker"
    every_picture: bool = False


KINDS: tuple[type[Extension], ...] = (
    SourceExtension,
    LoaderExtension,
    GraphTransformExtension,
    QuantizerExtension,
    DriverExtension,
    SchedulerExtension,
    DeviceExtension,
    TaskExtension,
    TrackerExtension,
    CommandExtension,
)
