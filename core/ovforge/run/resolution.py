"""From a config to a resolved pipeline: every name found, every option checked, nothing read or converted yet."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ovforge._version import __version__
from ovforge.config.files import apply_overrides
from ovforge.config.options import check_present, checked, input_files, validate_options
from ovforge.config.pipeline import PipelineConfig, Use
from ovforge.contracts.extensions import (
    DriverExtension,
    GraphTransformExtension,
    LoaderExtension,
    QuantizerExtension,
    TaskExtension,
)
from ovforge.contracts.quantization import Driver, DriverContext
from ovforge.contracts.stages import Match, Phase
from ovforge.errors import ConfigError, ModelError, PluginError, as_path, did_you_mean
from ovforge.model.results import PICTURE_SUFFIXES, read_provenance
from ovforge.model.sources import FileSource, Protection, Source
from ovforge.plugins.manager import Offer
from ovforge.run.calls import blaming, expect
from ovforge.run.session import ClosedError, Session

__all__ = [
    "Chosen",
    "ResolvedPipeline",
    "ResolvedSource",
    "Step",
    "choose",
    "find_loader",
    "load_table",
    "make_step",
    "read_pipeline",
    "resolve",
    "resolve_source",
]


@dataclass(frozen=True)
class Chosen:
    """An extension that a config chose, with its checked options."""

    offer: Offer
    options: BaseModel | None
    session: Session

    @property
    def name(self) -> str:
        """What configs call it."""
        return str(self.offer.extension.name)

    @property
    def extension(self) -> Any:
        """Its description."""
        return self.offer.extension

    def create(self, *arguments: Any) -> Any:
        """Return what its factory makes of the options and `arguments`."""
        with self.calling():
            return self.extension.create(self.options, *arguments)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Call its code in this block: files open by the session, and errors name the plugin."""
        with self.session.active(), blaming(self.offer.worker or self.offer):
            yield


@dataclass(frozen=True)
class Step:
    """A transform or quantizer; `implicit` if the task asks for it, and not the config."""

    chosen: Chosen
    phase: Phase
    implicit: bool = False

    @property
    def kind(self) -> str:
        """The kind of its extension: transform or quantizer."""
        return self.chosen.offer.extension.kind

    @property
    def is_quantizer(self) -> bool:
        """Whether it lowers precision."""
        return isinstance(self.chosen.extension, QuantizerExtension)

    @property
    def approximates(self) -> bool:
        """Whether it changes results by design."""
        extension = self.chosen.extension
        return isinstance(extension, GraphTransformExtension) and extension.approximates

    @property
    def recomputes(self) -> bool:
        """Whether its changes are made again rather than stored."""
        extension = self.chosen.extension
        return isinstance(extension, GraphTransformExtension) and extension.recompute


@dataclass(frozen=True)
class ResolvedSource:
    """A source with the loader that opens it; `closed` says why a plan could not open it."""

    source: Source
    loader: Chosen | None
    closed: str | None = None


@dataclass(frozen=True)
class ResolvedPipeline:
    """A config with every name found and every option checked; nothing has been read or converted yet."""

    config: PipelineConfig
    base: Path
    session: Session
    source: ResolvedSource
    parts: Mapping[str, ResolvedSource]
    protection: Protection | None
    """Of the first encrypted source or file; it covers all that is stored, since steps mix what they are given."""
    steps: tuple[Step, ...]
    driver: Driver | None
    driven_by: Offer | None
    task: Chosen | None
    scheduler: Chosen | None
    device: Chosen

    @property
    def approximations(self) -> tuple[Step, ...]:
        """The steps that change results by design, to save work; they come after the quantizers."""
        return tuple(step for step in self.steps if step.approximates)

    @property
    def gated(self) -> bool:
        """Whether a driver holds approximations to the config's quality."""
        return bool(self.approximations) and self.driver is not None and self.driver.judges

    @property
    def quantizers(self) -> tuple[Step, ...]:
        """The quantizers' steps; no other step lies between them."""
        return tuple(step for step in self.steps if step.is_quantizer)

    @property
    def before(self) -> tuple[Step, ...]:
        """The steps before the first quantizer or approximation; all if there is none."""
        return tuple(itertools.takewhile(lambda step: not (step.is_quantizer or step.approximates), self.steps))

    @property
    def after(self) -> tuple[Step, ...]:
        """The steps after those and the quantizers; none if there is no quantizer and no approximation."""
        return self.steps[len(self.before) + len(self.quantizers) :]


# -- reading ----------------------------------------------------------------------------------------------------------


def read_pipeline(
    config: str | Path | Mapping[str, Any] | PipelineConfig, overrides: Sequence[str] = ()
) -> tuple[PipelineConfig, Path]:
    """Return a checked config and the folder that its relative paths start at.

    A path may name a .toml or .json config, or a picture that ovforge made.
    """
    if isinstance(config, PipelineConfig):
        if overrides:
            value = apply_overrides({**config.as_dict(), "load": load_table(config)}, overrides)
            return PipelineConfig.of(value), Path.cwd()
        return config, Path.cwd()
    if isinstance(config, Mapping):
        return PipelineConfig.of(apply_overrides(dict(config), overrides)), Path.cwd()
    path = as_path(config, where="config")
    if path.suffix.lower() in PICTURE_SUFFIXES:
        value, base, version = _recorded(path)
        try:
            return PipelineConfig.of(apply_overrides(value, overrides), where=str(path)), base
        except ConfigError as error:
            if not is_newer(version, __version__):
                raise
            hint = f"ovforge {version} made the picture, and this is {__version__}: update ovforge."
            raise ConfigError(error.what, where=error.where, hint=hint) from error
    return PipelineConfig.read(path, overrides), path.resolve().parent


def is_newer(version: Any, than: str) -> bool:
    """Say whether the first version of ovforge is newer, by its leading numbers."""
    numbers = [[int(part) for part in re.findall(r"\d{1,9}", str(text))[:3]] for text in (version, than)]
    return numbers[0] > numbers[1]


def _recorded(path: Path) -> tuple[dict[str, Any], Path, Any]:
    """Return the config that a picture was made by, its base, and the version of ovforge that made it."""
    provenance = read_provenance(path)
    inputs = provenance["config"].get("input", {})
    if not isinstance(inputs, Mapping):
        raise ConfigError("its config's input is not a table", where=str(path), hint="The picture is damaged.")
    value = {**provenance["config"], "input": {**inputs, **provenance["inputs"]}}
    if isinstance(value.get("load"), Mapping) and "key" in value["load"]:
        # ovforge writes none; and a key may be the output of a command, which a picture must not choose.
        raise ConfigError("a picture may not say where a key is", where=str(path), hint="Do not run it.")
    if isinstance(value.get("quality"), Mapping):  # nor may it choose where to write
        value["quality"] = {name: part for name, part in value["quality"].items() if name != "save"}
    base = Path(provenance.get("base", ""))
    return value, base if base.is_dir() else Path.cwd(), provenance.get("versions", {}).get("ovforge")


def load_table(config: PipelineConfig) -> dict[str, Any]:
    """Return `load` with its key, which dumps of a config leave out."""
    table = config.load.model_dump(exclude_defaults=True)
    return {**table, "key": config.load.key} if config.load.key is not None else table


# -- resolving --------------------------------------------------------------------------------------------------------


def resolve(config: PipelineConfig, base: Path, session: Session) -> ResolvedPipeline:
    """Find every name and check every option, so that a mistake is known before any work starts."""
    task = choose(session, "task", config.task, "task", base) if config.task else None
    if task is not None:
        _check_inputs(config, task, base)
    device = choose(session, "device", config.device, "device", base)
    scheduler = choose(session, "scheduler", config.scheduler, "scheduler", base) if config.scheduler else None
    steps = [
        *(make_step(session, "transform", use, f"transform.{n}", base) for n, use in enumerate(config.transform)),
        *(make_step(session, "quantizer", use, f"quantize.{n}", base) for n, use in enumerate(config.quantize)),
        *(_implicit(session, config, task, base) if task else ()),
    ]
    driven_by, driver = _driver(config, steps, task, base, session)
    if task is not None:
        _check_parts(config, task, session)
    source = resolve_source(session, config.load.source, base, config.load.use, config.load.options)
    parts = {
        role: resolve_source(session, text, base, key=f"load.parts.{role}") for role, text in config.load.parts.items()
    }
    protection = _protection(session, [source, *parts.values()], steps)
    closed = any(one.closed for one in (source, *parts.values()))
    if config.load.key is not None and protection is None and not closed:
        raise ConfigError("a key is given, and nothing is encrypted", where="load.key", hint="Take it out.")
    return ResolvedPipeline(
        config=config,
        base=base,
        session=session,
        source=source,
        parts=parts,
        protection=protection,
        steps=tuple(sorted(steps, key=lambda step: step.phase)),
        driver=driver,
        driven_by=driven_by,
        task=task,
        scheduler=scheduler,
        device=device,
    )


def _check_parts(config: PipelineConfig, task: Chosen, session: Session) -> None:
    """Refuse a part for a role that no task has: it would be read, and used by nothing. Raises ConfigError."""
    own = _all_roles(task.extension)
    for role in config.load.parts.keys() - {*own}:
        # What another task uses may stay: one config serves several.
        if not any(role in _all_roles(offer.extension) for offer in session.plugins.all("task")):
            raise ConfigError(
                f"the task {task.extension.name!r} has no role {role!r}.{did_you_mean(role, own)}",
                where="load.parts",
                hint=f"Its roles: {', '.join(own)}." if own else "Take it out.",
            )


def _all_roles(task: Any) -> tuple[str, ...]:
    """Return every role that a task may use."""
    return (*task.one_of, *task.roles, *task.optional_roles)


def resolve_source(
    session: Session,
    text: str,
    base: Path,
    use: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    key: str = "load",
) -> ResolvedSource:
    """Open a source, and find its loader by name or by content. A plan leaves it closed if it must ask for the key."""
    try:
        source = session.open_source(text, base)
    except ClosedError as error:
        return ResolvedSource(_Closed(text), None, error.what)
    offer = find_loader(source, use, session)
    extension = offer.extension
    assert isinstance(extension, LoaderExtension)
    if extension.beside and isinstance(source, FileSource) and source.path.is_file():
        source = source.with_beside(extension.beside)
    chosen = Chosen(offer, _options(offer, options or {}, key, base), session)
    return ResolvedSource(source, chosen)


class _Closed(FileSource):
    """A source of which only the name is known."""

    def __init__(self, name: str) -> None:
        self.name = name

    def files(self) -> Mapping[str, int]:
        return {}


def choose(session: Session, kind: str, use: Use, key: str, base: Path) -> Chosen:
    """Return the extension that `use` names, with its options checked."""
    offer = session.plugins.find(kind, use.use)
    return Chosen(offer, _options(offer, use.options, key, base), session)


def _options(offer: Offer, options: Mapping[str, Any], key: str, base: Path) -> BaseModel | None:
    where = f"{key} ({offer.extension.name})"
    with blaming(offer):
        return validate_options(offer.extension.options_model(), options, where=where, base=base)


def make_step(session: Session, kind: str, use: Use, key: str, base: Path) -> Step:
    """Return a transform's or quantizer's step, with its options checked."""
    chosen = choose(session, kind, use, key, base)
    phase: Any = Phase.PRECISION
    if isinstance(chosen.extension, GraphTransformExtension):
        phase = chosen.extension.phase
    if callable(phase):
        with chosen.calling():
            phase = expect(Phase, phase(chosen.options), chosen.offer)
    if (step := Step(chosen, phase)).approximates and phase < Phase.ATTACH:
        with chosen.calling():
            raise PluginError("approximations run in the phases ATTACH or LAYOUT, so that a gate can leave them out")
    return step


def _implicit(session: Session, config: PipelineConfig, task: Chosen, base: Path) -> Iterator[Step]:
    """Yield the task's own transforms, and those of others that it asks for, but for those that the config names."""
    own = task.extension.transforms if config.optimize else ()
    others = [name for name in task.extension.optional_transforms if session.plugins.get("transform", name)]
    named = {use.use for use in config.transform}
    for name in (*own, *others):
        if name not in named:
            step = make_step(session, "transform", Use(name), f"task ({task.name})", base)
            yield replace(step, implicit=True)


def _check_inputs(config: PipelineConfig, task: Chosen, base: Path) -> None:
    """Refuse an unknown or wrong input before any work; the call may bring those that are missing."""
    extension = task.extension
    assert isinstance(extension, TaskExtension)
    with task.calling():
        model = extension.inputs_model()
    check_present(model, config.input, where="input", base=base)  # it may know what others call its inputs
    known = model.model_fields
    for name in config.input:
        if name not in known:
            raise ConfigError(
                f"unknown input `{name}`.{did_you_mean(name, known)}",
                where="input",
                hint=f"{task.name} takes: {', '.join(known)}.",
            )


def _protection(session: Session, sources: list[ResolvedSource], steps: list[Step]) -> Protection | None:
    """Return the protection of the first source, or file of an option, that is encrypted."""

    def opened() -> Iterator[Source]:
        yield from (one.source for one in sources)
        for path in itertools.chain.from_iterable(input_files(step.chosen.options) for step in steps):
            if path.exists():
                try:
                    yield session.open_file(path)
                except ClosedError:
                    continue

    return next((source.protection for source in opened() if source.protection), None)


def _driver(
    config: PipelineConfig, steps: Sequence[Step], task: Chosen | None, base: Path, session: Session
) -> tuple[Offer, Driver] | tuple[None, None]:
    """Return what drives the quantizers, its sections read and checked; nothing if there is nothing to drive."""
    offers = session.plugins.all("driver") if config.sections or config.quantize else []
    owners: dict[str, Offer] = {}
    for offer in offers:
        assert isinstance(offer.extension, DriverExtension)
        owners |= dict.fromkeys(offer.extension.sections, offer)
    for name in config.sections:
        if name not in owners:
            raise _unknown_section(name, owners, session)
        if not config.quantize and not any(step.approximates for step in steps):
            raise ConfigError(
                "it is for quantizers and approximations, and there is none",
                where=name,
                hint="Add [[quantize]], or a transform that approximates.",
            )
    chosen = {owners[name].extension.name: owners[name] for name in config.sections} or {
        offer.extension.name: offer for offer in offers
    }
    if len(chosen) > 1:
        raise ConfigError(f"several plugins would drive the quantizers: {', '.join(chosen)}", where="quantize")
    for offer in chosen.values():
        extension = offer.extension
        assert isinstance(extension, DriverExtension)
        with blaming(offer), session.active():
            sections = {
                name: checked(extension.section_model(name), value, where=name, base=base)
                for name, value in config.sections.items()
            }
            described = task.extension if task else None
            return offer, extension.create(DriverContext(sections, described, base))
    return None, None


def _unknown_section(name: str, owners: Mapping[str, Offer], session: Session) -> ConfigError:
    known = [*PipelineConfig.model_fields, *owners]
    owner = session.plugins.registry.section_owner(name)
    if owner is not None:
        return ConfigError("no plugin here reads this section", where=name, hint=f"Run: {owner.install}")
    return ConfigError(
        f"unknown key `{name}`.{did_you_mean(name, known)}", where="config", hint=f"Known keys: {', '.join(known)}."
    )


# -- loaders ----------------------------------------------------------------------------------------------------------


def find_loader(source: Source, name: str | None, session: Session) -> Offer:
    """Return the loader named, or the one that is surest of the source; what is built in is asked first."""
    plugins = session.plugins
    if name is not None:
        return plugins.find("loader", name)
    native = plugins.find("loader", "openvino")
    if _match(native, source, session, []) is Match.YES:
        return native
    offers, failures = plugins.all("loader"), list[str]()
    matches = [(_match(offer, source, session, failures), offer) for offer in offers]
    surest = max(match for match, _ in matches)
    best = [offer for match, offer in matches if match is surest]
    if surest is Match.NO:
        looks = ", ".join(list(source.files())[:5]) or "nothing"
        names = ", ".join(offer.extension.name for offer in offers)
        failures += [f"{fault.where}: {fault.what}." for fault in session.broken.values()]
        more = "".join(f" Not installed: {one.name}, {one.install}." for one in plugins.missing("loader", "source"))
        raise ModelError(
            "no loader knows what this is",
            where=source.name,
            hint=" ".join([f"It holds: {looks}. Loaders here: {names}.{more}", *failures]),
        )
    if len(best) > 1:
        names = ", ".join(offer.extension.name for offer in best)
        raise ConfigError(f"several loaders take this source: {names}", where=source.name, hint="Set load.use to one.")
    return best[0]


def _match(offer: Offer, source: Source, session: Session, failures: list[str]) -> Match:
    """Ask a loader with its default options whether a source is its own; one with required options is asked by name.

    A loader that fails at this does not stop the others; `failures` collects what it said.
    """
    try:
        with blaming(offer), session.active():
            model = offer.extension.options_model()
            if model is not None and any(field.is_required() for field in model.model_fields.values()):
                failures.append(f"{offer.extension.name} has options without a default: load.use names it.")
                return Match.NO
            loader = offer.extension.create(model() if model else None)
            return Match(loader.can_load(source))
    except PluginError as error:
        failures.append(f"{error.where}: {error.what}.")
        return Match.NO
