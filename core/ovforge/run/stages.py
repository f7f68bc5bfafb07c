"""Loading, and each step, as a stage: what it depends on, how it is made, what is stored of it, how that is taken back.

Running makes what is not stored; planning looks only whether it is. Both use the same stages, so that they agree.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ovforge.config.options import input_files
from ovforge.contracts.extensions import LoaderExtension, QuantizerExtension
from ovforge.contracts.stages import Calibration, Progress, Report, Skipped
from ovforge.errors import ModelError, PluginError
from ovforge.model import memory
from ovforge.model.bundle import Control, ModelBundle
from ovforge.model.comparison import same_model
from ovforge.model.sources import FileSource
from ovforge.run.calls import expect
from ovforge.run.entries import open_entry, write_bundle, write_file, write_role
from ovforge.run.identity import load_dependencies, loaded_identity, step_dependencies
from ovforge.run.resolution import Chosen, ResolvedPipeline, ResolvedSource, Step
from ovforge.store.cache import Cache, DamagedError, Entry
from ovforge.store.digests import fingerprint

if TYPE_CHECKING:
    import openvino as ov

    from ovforge.contracts.quantization import KeptLayers

__all__ = ["LoadStage", "Stage", "StepStage", "check_strict", "perform"]

STAGE_FILE = "stage.json"


class Stage(Protocol):
    """One stage of a pipeline."""

    @property
    def label(self) -> str:
        """What the cache lists."""
        ...

    @property
    def dependencies(self) -> dict[str, Any] | None:
        """What its result depends on; None if nothing is stored of it."""
        ...

    @property
    def parents(self) -> Iterable[str]:
        """Keys of the entries that it reads."""
        ...

    def make(self) -> ModelBundle:
        """Do it, and return the bundle."""
        ...

    def write(self, folder: Path, key: str) -> set[Path]:
        """Do it, and write what is stored of it; return the files that it read and its key does not foresee."""
        ...

    def take(self, entry: Entry) -> ModelBundle:
        """Return the bundle from what was stored. Raises DamagedError if that is not what was written."""
        ...


def perform(stage: Stage, cache: Cache | None) -> ModelBundle:
    """Return a stage's bundle: from the cache if it is there, else made and stored.

    Models are read from an entry only when they are needed; one that turns out damaged then is made again.
    """
    dependencies = stage.dependencies
    if cache is None or dependencies is None:
        return stage.make()
    key, read = fingerprint(dependencies), set[Path]()

    def write(folder: Path) -> None:
        read.update(stage.write(folder, key))

    while True:
        entry, _ = cache.get_or_make(dependencies, write, label=stage.label, parents=stage.parents, inputs=lambda: read)
        try:
            bundle = stage.take(entry)
        except DamagedError as damage:
            cache.discard(entry, damage)
            continue
        _mend(bundle, entry, lambda: perform(stage, cache), cache)
        return bundle


def _mend(bundle: ModelBundle, entry: Entry, again: Callable[[], ModelBundle], cache: Cache) -> None:
    """Let the roles that are read from an entry be made again if the entry is damaged by then."""

    def wrapper(role: str, make: Callable[[], ov.Model]) -> Callable[[], ov.Model]:
        if bundle.entries.get(role) != entry.key:
            return make

        def read() -> ov.Model:
            try:
                return make()
            except DamagedError as damage:
                cache.discard(entry, damage)
                return again().models[role]

        return read

    bundle.models.wrap(wrapper)


# -- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadStage:
    """Opens one source by its loader; conversions are stored."""

    resolved: ResolvedSource
    progress: Callable[[Progress], None]

    @property
    def label(self) -> str:
        """What the cache lists."""
        return f"{self._loader.name} {self.resolved.source.name}"

    @property
    def _loader(self) -> Chosen:
        assert self.resolved.loader is not None
        return self.resolved.loader

    @property
    def parents(self) -> tuple[str, ...]:
        """None: a source is not an entry."""
        return ()

    @property
    def dependencies(self) -> dict[str, Any] | None:
        """What a conversion depends on."""
        sealed = self.resolved.source.protection
        if not self._loader.extension.converts or (sealed and not memory.AVAILABLE):
            return None
        return load_dependencies(self.resolved)

    def check(self) -> None:
        """Refuse to convert what is encrypted if the loader lays some of it out in files while it converts."""
        loader = self._loader.extension
        assert isinstance(loader, LoaderExtension)
        if self.resolved.source.protection and loader.converts and not loader.in_memory:
            raise ModelError(
                f"the loader {loader.name!r} converts, and would leave parts of an encrypted model in plain files",
                where=self.resolved.source.name,
                hint="Convert first (ovforge convert), then encrypt the result (ovforge encrypt).",
            )

    def make(self) -> ModelBundle:
        """Load or convert."""
        self.check()
        source, loader = self.resolved.source, self._loader
        self.progress(Progress("load", 0, 1, f"{loader.name}: {source.name}"))
        with loader.calling(), loader.session.recording() as read:
            bundle = expect(ModelBundle, loader.create().load(source), loader.offer)
            bundle.small_files()  # raises if they cannot be written
        if bundle.identity and loader.offer.plugin != "builtin":
            bundle.identity = loaded_identity(bundle.identity, self.resolved, read)
        bundle.protection, bundle.loader = source.protection, loader.name
        bundle.models.wrap(lambda role, make: _called(loader, make))
        return bundle

    def write(self, folder: Path, key: str) -> set[Path]:
        """Convert, and write the whole bundle."""
        with self._loader.session.recording() as read:
            write_bundle(self.make(), folder, key)
        return read - _foreseen(self.resolved.source, self._loader.options)

    def take(self, entry: Entry) -> ModelBundle:
        """Open what was stored."""
        bundle = ModelBundle.open(open_entry(entry, self.resolved.source.protection))
        bundle.entries, bundle.loader = dict.fromkeys(bundle.models, entry.key), self._loader.name
        return bundle


def _called(chosen: Any, make: Callable[[], ov.Model]) -> Callable[[], ov.Model]:
    """Return the function of a lazy role, called as the plugin's code that it is."""

    def call() -> ov.Model:
        import openvino as ov

        with chosen.calling():
            return expect(ov.Model, make(), chosen.offer)

    return call


def _foreseen(source: Any, options: Any) -> set[Path]:
    """Return the files that a stage's key knows by their content."""
    foreseen = set()
    for path in input_files(options):
        foreseen |= {file.resolve() for file in path.rglob("*")} if path.is_dir() else {path.resolve()}
    if isinstance(source, FileSource):
        foreseen |= {(source.root / path).resolve() for path in source.files()}
    return foreseen


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass
class StepStage:
    """Changes a bundle by one transform or quantizer; the changed models are stored."""

    step: Step
    bundle: ModelBundle
    pipeline: ResolvedPipeline
    calibration: Calibration
    keep: KeptLayers = field(default_factory=dict)
    trial: bool = False
    """Whether what could not be applied is only reported."""
    report: Report = field(default_factory=Report)
    """What was done, once it is done or taken."""
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the cache lists."""
        return self.step.chosen.name

    @property
    def parents(self) -> tuple[str, ...]:
        """The entries that the models are read from."""
        return tuple(self.bundle.entries.values())

    @property
    def strict(self) -> bool:
        """Whether what could not be applied is an error."""
        return self.pipeline.config.strict and not self.step.implicit and not self.trial

    @property
    def dependencies(self) -> dict[str, Any] | None:
        """What the step's result depends on; None if the content of some model is not known."""
        identity = self.bundle.digest()
        if identity is None or self.trial or (self.bundle.protection and not memory.AVAILABLE):
            return None
        return step_dependencies(self.step, identity, self.pipeline, self.keep)

    def make(self) -> ModelBundle:
        """Apply the step to the bundle itself."""
        self._apply(self.bundle)
        return self.bundle

    def write(self, folder: Path, key: str) -> set[Path]:
        """Apply the step, to a copy if its changes are recomputed; write changed models and all that is small."""
        changed = self.bundle.copy() if self.step.recomputes else self.bundle
        with self.step.chosen.session.recording() as read:
            content = self._apply(changed)
        report = self.report
        if self.step.recomputes:
            self._made = {role: changed.models[role] for role in report.roles if role in changed.models}
        for role in () if self.step.recomputes else report.roles:
            if role in changed.models:
                write_role(changed, role, folder, key)
        write_file(changed.protection, folder, STAGE_FILE, content, key)
        return read - _foreseen(None, self.step.chosen.options)

    def take(self, entry: Entry) -> ModelBundle:
        """Put the stored models and the rest into the bundle; recomputed ones are changed when they are read."""
        bundle, sealed = self.bundle, self.bundle.protection
        stored = open_entry(entry, sealed)
        delta = json.loads(stored.read(STAGE_FILE))
        report = _report_of(delta["report"])
        if self.step.recomputes:
            again = _Recomputation(self.step, bundle.copy(), report.roles, self._made)
            for role in report.roles:
                bundle.put(role, partial(again.model, role), identity=f"{entry.key} {role}")
        else:
            changed = ModelBundle.open(stored)
            for role in report.roles:
                if role in changed.models:
                    bundle.take(role, changed, role)
                    bundle.entries[role] = entry.key
                    # Identities of encrypted models tell nothing of their content.
                    bundle.identity[role] = f"{entry.key} {role}" if sealed else bundle.identity[role]
        for role in set(bundle.models) - set(delta["roles"]):
            del bundle.models[role]
        bundle.configs, bundle.index, bundle.adapters = delta["configs"], delta["index"], delta["adapters"]
        bundle.assets = {path: data.encode("latin-1") for path, data in delta["assets"].items()}
        bundle.controls = {
            name: Control(**{**control, "shape": tuple(control["shape"])})
            for name, control in delta["controls"].items()
        }
        self.report = report
        check_strict(self.step, report, self.strict)
        return bundle

    def _apply(self, bundle: ModelBundle) -> bytes:
        """Apply the step, see for ourselves which models it changed, and measure; return the content of STAGE_FILE."""
        chosen, quantizes = self.step.chosen, self.step.is_quantizer
        before, touched = _snapshot(bundle), bundle.models.watch()
        start = time.perf_counter()
        with chosen.calling():
            stage = chosen.create()
            result = self._quantize(stage, bundle) if quantizes else stage.apply(bundle)
            report = expect(Report, result, chosen.offer)
            bundle.small_files()  # raises if they cannot be written
            _complete(report, before, bundle, touched, chosen.offer)
        if quantizes:
            report.seconds = time.perf_counter() - start
            for role in report.roles:
                report.sizes[role] = (_constant_bytes(before.models[role]), _constant_bytes(bundle.models[role]))
                before.models.release(role)
        check_strict(self.step, report, self.strict)
        bundle.models.wrap(lambda role, make: _called(chosen, make) if role in report.roles else make)
        for role in report.roles:
            if bundle.models.is_made(role):
                bundle.changed(role)
            else:
                bundle.forget(role)
        self.report = report
        with chosen.calling():
            return json.dumps(_delta(bundle, report)).encode()

    def _quantize(self, stage: Any, bundle: ModelBundle) -> Any:
        extension = self.step.chosen.extension
        assert isinstance(extension, QuantizerExtension)
        limited = _Limited(self.calibration, extension.needed(self.step.chosen.options), extension.name)
        kept = {role: names for role, names in self.keep.items() if names}
        return stage.quantize(bundle, limited, kept) if kept else stage.quantize(bundle, limited)


def _snapshot(bundle: ModelBundle) -> ModelBundle:
    """Return a copy that stays as the bundle is: roles that cannot be made again are cloned now, not when needed."""
    copy = bundle.copy()
    for role in bundle.models:
        if not bundle.models.is_lazy(role):
            copy.models[role] = bundle.models[role].clone()
    return copy


def _complete(report: Report, before: ModelBundle, bundle: ModelBundle, touched: set[str], offer: Any) -> None:
    """Add to a report the models that were changed and are not named in it: identities rely on it.

    Only what was read, set or removed can have been changed; each such model is compared with what it was.
    """
    for role in sorted(touched - set(report.roles)):
        if role in before.models and role in bundle.models:
            comparable = bundle.protection is None or memory.AVAILABLE
            if comparable and same_model(before.models[role], bundle.models[role]):
                continue
            before.models.release(role)
        note = (
            f"{role} was changed, and the {offer.extension.kind} did not report it: tell the authors of {offer.plugin}"
        )
        warnings.warn(f"{offer.extension.name}: {note}", stacklevel=2)
        report.roles = (*report.roles, role)
        report.notes.append(note)


class _Recomputation:
    """What a recomputing step makes of models whenever they are asked for; one application serves each role once."""

    def __init__(self, step: Step, original: ModelBundle, roles: Sequence[str], made: Mapping[str, Any]) -> None:
        self._step, self._original, self._roles = step, original, set(roles)
        self._made = dict(made)
        self._lock = threading.Lock()

    def model(self, role: str) -> Any:
        """Return the changed ov.Model of a role, for the caller alone."""
        with self._lock:
            if role not in self._made:
                self._made = self._apply()
            return self._made.pop(role)

    def _apply(self) -> dict[str, Any]:
        chosen, bundle = self._step.chosen, self._original.copy()
        touched = bundle.models.watch()
        with chosen.calling():
            report = expect(Report, chosen.create().apply(bundle), chosen.offer)
        if not set(report.roles) <= self._roles <= touched:
            raise PluginError(
                f"it changed {', '.join(sorted(report.roles)) or 'nothing'} now, and "
                f"{', '.join(sorted(self._roles)) or 'nothing'} the first time",
                where=f"transform {chosen.name!r} of the plugin {chosen.offer.plugin} {chosen.offer.version}",
                hint="A transform must depend on the bundle and its options alone: tell its authors.",
            )
        return {role: bundle.models[role] for role in self._roles if role in bundle.models}


class _Limited:
    """A calibration that gives what a quantizer said that it needs: its results are cached by that."""

    def __init__(self, calibration: Calibration, need: str, name: str) -> None:
        self._calibration, self._need, self._name = calibration, need, name

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, Any]]:
        self._check(self._need != "nothing", "inputs")
        return self._calibration.inputs(role, count)

    def score(self, models: Mapping[str, Any]) -> float:
        self._check(self._need == "score", "score")
        return self._calibration.score(models)

    def _check(self, allowed: bool, what: str) -> None:
        if not allowed:
            raise PluginError(
                f"it asks for {what}, and its description says that it needs {self._need}",
                where=self._name,
                hint=f'Its author sets needs="{what}" in the QuantizerExtension.',
            )


def check_strict(step: Step, report: Report, strict: bool) -> None:
    """Raise ModelError if something could not be applied and the config is strict."""
    if strict and report.skipped:
        first = report.skipped[0]
        more = f" and {len(report.skipped) - 1} more" if len(report.skipped) > 1 else ""
        raise ModelError(
            f"{first.item} could not be applied: {first.reason}{more}",
            where=step.chosen.name,
            hint="Set strict = false to go on without.",
        )


def _constant_bytes(model: ov.Model) -> int:
    return sum(op.get_byte_size() for op in model.get_ops() if op.get_type_name() == "Constant")


def _delta(bundle: ModelBundle, report: Report) -> dict[str, Any]:
    return {
        "report": asdict(report),
        "roles": list(bundle.models),
        "configs": bundle.configs,
        "index": bundle.index,
        "assets": {path: data.decode("latin-1") for path, data in bundle.assets.items()},
        "controls": {name: asdict(control) for name, control in bundle.controls.items()},
        "adapters": bundle.adapters,
    }


def _report_of(value: Mapping[str, Any]) -> Report:
    """Return a report from its JSON."""
    typed = {
        "roles": tuple(value["roles"]),
        "skipped": [Skipped(**skip) for skip in value["skipped"]],
        "sizes": {role: tuple(sizes) for role, sizes in value["sizes"].items()},
    }
    return Report(**{**value, **typed})
