"""The protocols that an implementation of each stage follows, and the records they exchange.

An extension's `factory` is called with its validated options and returns an object that follows one of these.
Nothing here imports openvino: the names of its types are for readers and type checkers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import openvino as ov
    from numpy.typing import NDArray
    from PIL.Image import Image

    from ovforge.model.bundle import ModelBundle
    from ovforge.model.results import Result
    from ovforge.model.sources import Source
    from ovforge.model.video import Boxes, Tracks

__all__ = [
    "Adapter",
    "Adapters",
    "Batching",
    "Calibration",
    "Choice",
    "CompiledModels",
    "Device",
    "DevicePlan",
    "Embedder",
    "FlowRun",
    "FlowScheduler",
    "FrameDetector",
    "GivenScheduler",
    "GraphTransform",
    "Inference",
    "Loader",
    "Match",
    "Notes",
    "Phase",
    "Progress",
    "Quantizer",
    "RandomStream",
    "Report",
    "Sampling",
    "Scheduler",
    "Skipped",
    "Task",
    "TaskContext",
    "Tracker",
    "ignore_progress",
]


class Match(IntEnum):
    """How sure a loader is that a source is its own."""

    NO = 0
    MAYBE = 1
    YES = 2


class Phase(IntEnum):
    """When a transform runs; inside a phase the config's order holds."""

    FUSE = 10
    STRUCTURE = 20
    PRECISION = 30
    ATTACH = 40
    LAYOUT = 50


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was asked for and not applied, and why."""

    item: str
    reason: str


@dataclass(slots=True)
class Report:
    """What a transform or a quantizer did.

    `roles` names every model that was changed: what is not named here is taken to be untouched. `layers` names, by
    role, the operations that a quantizer lowered, so that some of them can be kept the next time. The core fills in
    what it can measure itself: `sizes`, bytes of each role's constants before and after a quantizer, and `seconds`.
    """

    roles: tuple[str, ...] = ()
    layers: dict[str, list[str]] = field(default_factory=dict)
    applied: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    bytes_before: int | None = None
    bytes_after: int | None = None
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float | None = None

    def __post_init__(self) -> None:
        items = {"roles": str, "applied": str, "skipped": Skipped, "notes": str}
        for name, kind in items.items():
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
                raise TypeError(f"Report.{name} holds {kind.__name__}, and was given {value!r:.80}")
        self.roles = tuple(self.roles)


class Loader(Protocol):
    """Turns files, or a framework's model, into ov.Models by role."""

    def can_load(self, source: Source) -> Match:
        """Say from names and first bytes whether `source` is ours; reads no whole model, imports nothing heavy.

        The loader was made with its default options, whatever the config says: the search for a loader does not know
        yet whose options those are. If some option has no default, or the defaults do not go together, this is never
        called, and the loader opens only what `load.use` gives it.
        """
        ...

    def load(self, source: Source) -> ModelBundle:
        """Read or convert `source`. Raises ModelError if it does not hold what it seems to."""
        ...


class GraphTransform(Protocol):
    """Changes ov.Models: adapters, embeddings, folding, pre- and post-processing."""

    def apply(self, bundle: ModelBundle) -> Report:
        """Change `bundle` in place and report. Must depend on the bundle and the options alone."""
        ...


class Adapter(Protocol):
    """Something that can be switched, weighted and exchanged while a pipeline runs; made by a transform's `adapter`."""

    name: str

    weight: float
    """Its weight at the start."""

    skipped: Sequence[Skipped]
    """What of it found no place in the models."""

    notes: Sequence[str]
    """What people should know of it."""

    def values(self, weight: float) -> Mapping[str, Mapping[str, NDArray[np.float32]]]:
        """Return role -> variable -> what it puts there at a weight other than 0.

        Arrays that do not depend on the weight should be the same ones each time: they are then not copied again.
        """
        ...


class Embedder(Protocol):
    """Computes what a model's input takes of a number that a call gives; made by a transform's `embedders`."""

    def __call__(self, value: float) -> NDArray[np.float32]:
        """Return the row for one sample of a batch, float32 (width,)."""
        ...


class Adapters(Protocol):
    """The adapters of a running pipeline: name -> weight, 0 where one is off."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> float: ...
    def keys(self) -> Iterable[str]: ...

    def set(self, weights: Mapping[str, float]) -> None:
        """Make these adapters active, each at its weight, and no others. Raises InputError for an unknown one."""
        ...


class Calibration(Protocol):
    """Recorded inputs of roles, for quantizers."""

    def inputs(self, role: str, count: int) -> Sequence[Mapping[str, NDArray[Any]]]:
        """Return up to `count` recorded input sets of `role`, by input name.

        An even draw from all that the pipeline's runs gave that role; it may read records from disk one at a time.
        """
        ...

    def score(self, models: Mapping[str, ov.Model]) -> float:
        """Return how close the pipeline's results come to what they are now, with `models` instead of its own.

        Higher is better; by the config's [quality] metric, on inputs that calibration does not use.
        """
        ...


class Quantizer(Protocol):
    """Lowers the precision of named roles."""

    def quantize(
        self, bundle: ModelBundle, calibration: Calibration, keep: Mapping[str, Collection[str]] = {}
    ) -> Report:
        """Change `bundle` in place and report.

        `keep` names operations, by role, that stay in the precision that they have.
        """
        ...


class RandomStream(Protocol):
    """Draws standard normal numbers; `ovforge.model.random` has torch-compatible ones."""

    def randn(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """Return the next draw, float32, of the given shape."""
        ...


class Sampling(Protocol):
    """One run of a sampling method over `steps` steps; made by `Scheduler.start`, used by one thread.

    There is no hidden step index: the caller says which step it is at.
    """

    timesteps: NDArray[Any]
    """Shape (steps,), int64 or float32, in the order of use."""

    init_noise_sigma: float
    """Standard deviation of the first latents."""

    first: int
    """Index of the step that a run begins with: 0, or later where it starts from a picture."""

    def scale_input(self, latents: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        """Return what the network sees at step `index`; may be `latents` itself."""
        ...

    def add_noise(self, original: NDArray[np.float32], noise: NDArray[np.float32], index: int) -> NDArray[np.float32]:
        """Return clean latents noised to the level of step `index`."""
        ...

    def step(
        self, output: NDArray[np.float32], index: int, latents: NDArray[np.float32], rng: RandomStream
    ) -> NDArray[np.float32]:
        """Return the latents after step `index`, from the network's output and the latents before it.

        All arrays are float32 of one shape (batch, channels, height, width). The last step returns what
        the decoder takes.
        """
        ...


class Scheduler(Protocol):
    """A sampling method with its noise schedule: immutable, shared between threads.

    The factory takes (options, model_config): the options of the config and the model's scheduler_config.json.
    One for flow models is a `FlowScheduler`, too.
    """

    def start(self, steps: int, strength: float = 1.0) -> Sampling:
        """Begin a run of `steps` steps. Raises InputError if the schedule cannot have that many.

        With `strength` below 1 the run starts from a noised picture and goes only that part of the way.
        """
        ...


@runtime_checkable
class GivenScheduler(Scheduler, Protocol):
    """A sampling method that goes over levels of noise which a call gives, where its class can."""

    order: int
    """How often the network is called for one step; the last step may take one call."""

    def start_given(
        self, strength: float = 1.0, *, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> Sampling:
        """Begin a run over the timesteps, or noise levels, of a call, as diffusers' class reads them.

        One of them is given. Raises InputError, which names it, if the method takes none, or not such ones.
        """
        ...


@dataclass(frozen=True, slots=True)
class FlowRun:
    """What the pipeline of a flow model says of a run, and its scheduler cannot know."""

    image_seq_len: int | None = None
    """Tokens of the picture in the transformer: dynamic shifting computes its shift from this number."""

    mu: float | None = None
    """That shift itself, for families with a formula of their own; counts before `image_seq_len`."""

    sigmas: Sequence[float] | None = None
    """Shares of noise before the shift, one a step, above 0 and at most 1; None: those of the scheduler."""

    timesteps: Sequence[float] | None = None
    """What the network is told, one a step, and for consistency in angles (SCM) the end; None: from the sigmas."""


@runtime_checkable
class FlowScheduler(Scheduler, Protocol):
    """A sampling method for flow models: latents are (1 - sigma) * picture + sigma * noise, sigma from 1 to 0.

    Tasks begin with `start_flow` if a scheduler has it, else with `start`.
    """

    own_sigmas: bool
    """Whether it spreads a flow's sigmas by options of its own, for pipelines that then give none (FLUX)."""

    def start_flow(self, steps: int, flow: FlowRun, strength: float = 1.0) -> Sampling:
        """Begin a run of `steps` steps.

        With `strength` below 1 the first int(steps - steps * strength) of them are left out. Raises InputError for what
        the schedule cannot have, ConfigError if the scheduler, or its options, are not for flow models.
        """
        ...


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """Where models run: OpenVINO's device string, its properties, and what it is known as."""

    device: str
    properties: Mapping[str, Any]
    full_name: str
    precision: str
    """What the device was asked to compute in: "f32", "bf16", "f16", or "auto" where the device decides."""
    can_export: bool
    """Whether compiled models can be stored and read back."""


class Device(Protocol):
    """A place to run. `plan` checks and decides; compiling itself is the core's."""

    def plan(self) -> DevicePlan:
        """Check that the device is there and can do what its options ask. Raises DeviceError otherwise."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a long piece of work: `done` of `total` steps of `stage`.

    `preview` makes pictures of the work as it stands, if there is something to see; it takes time, and may be called
    in the callback only. A callback that raises ends the work: Cancelled says so in plain words.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    preview: Callable[[], Sequence[Image]] | None = None


def ignore_progress(_: Progress) -> None:
    """The progress callback that does nothing."""


class Inference(Protocol):
    """One inference of a compiled model that is done, for those who observe a pipeline."""

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Return copies of its inputs, by the names that the model had before it was compiled."""
        ...

    @property
    def profiling_info(self) -> Sequence[Any]:
        """OpenVINO's counters of each operation, if the device counts (PERF_COUNT)."""
        ...


class FrameDetector(Protocol):
    """Finds things in pictures of streams, for tasks that build on one that detects; that one makes it.

    Several threads may call it at a time, `parallel` of them to good use. What it finds in a picture does not depend on
    the pictures beside it.
    """

    names: Sequence[str]
    """Names of classes, by their number."""

    threshold: float
    """Score from which the model's boxes are meant to count."""

    notes: Sequence[str]
    """What people should know of it."""

    parallel: int
    batch: int
    """How many pictures of one size it takes at once."""

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[Boxes]:
        """Return what is in each picture, from the highest score to the lowest. Pictures are RGB (height, width, 3)."""
        ...


class Tracker(Protocol):
    """Follows things through the pictures of one stream, in their order; used by one thread at a time."""

    def update(self, found: Boxes | None, picture: NDArray[np.uint8], seconds: float) -> Tracks:
        """Return the things that are in the next picture, RGB (height, width, 3), which is shown at `seconds`.

        `found` is what the detector sees there, of any order and score; None if it was not asked. `seconds` rises from
        picture to picture. Must depend on what it was given so far alone.
        """
        ...


class CompiledModels(Protocol):
    """Compiled models by role, with the bundle's configs and assets. Compilation goes on in the background."""

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Role -> its config.json."""
        ...

    @property
    def index(self) -> Mapping[str, Any]:
        """The model_index.json."""
        ...

    @property
    def assets(self) -> Mapping[str, bytes]:
        """Every other small file by relative path, such as tokenizer/vocab.json."""
        ...

    def start(self, role: str, shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Begin to compile a role, for fixed `shapes` of its inputs by name, or for any. Returns at once.

        Raises ModelError if the pipeline has no such role.
        """
        ...

    def get(self, role: str, shapes: Mapping[str, Sequence[int]] | None = None) -> ov.CompiledModel:
        """Return a role's compiled model, for fixed shapes or any; waits for it alone."""
        ...

    def on_demand(self) -> None:
        """Compile nothing before it is asked for: for tasks that hold one role at a time in memory."""
        ...

    def release(self, role: str) -> None:
        """Forget a role's compiled models and its graph, to free their memory; asking for it compiles it again."""
        ...

    def scheduler_config(self) -> dict[str, Any]:
        """Return the model's scheduler_config.json, or {}."""
        ...

    def __getitem__(self, role: str) -> ov.CompiledModel: ...

    def __contains__(self, role: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


class Choice(Protocol):
    """Another plugin's extension, with its checked options; see `TaskContext.choose`."""

    @property
    def extension(self) -> Any:
        """Its description."""
        ...

    def create(self, *arguments: Any) -> Any:
        """Return what its factory makes of the options and `arguments`. Errors name the plugin."""
        ...


@dataclass(frozen=True, slots=True)
class TaskContext:
    """All that a task is built from."""

    bundle: CompiledModels
    """Compiled models by role, configs, assets."""

    scheduler: Callable[..., Scheduler]
    """Makes the scheduler of the config, or the one that the model names.

    An argument `adjust(config, *, own)`, if there is one, returns what the scheduler is to see of the model's
    scheduler_config.json; `own` says whether it is the model's own class.
    """

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """What the config says of inputs, unchecked: a hint at the sizes that calls will have."""

    embedders: Mapping[str, Embedder] = field(default_factory=dict)
    """By the name of a model's input, which takes an embedding of a number: what transforms of the pipeline offer."""

    adapters: Adapters | None = None
    """The adapters that can be switched, for prompts that name some; None if there are none to switch."""

    choose: Callable[[str, Any, str], Choice] | None = None
    """Finds another plugin's extension: `choose(kind, use, where)`.

    `use` is what a config says: a name, or a table with `use` and options, which are checked; `where` is the option's
    key. A task that builds on another one makes that so: `choose("task", "detect", "task.detect").create(context)`.
    """


@runtime_checkable
class Notes(Protocol):
    """What a Task may also be able to do: say in a plan what its runs will do beyond what the config says."""

    def notes(self) -> Sequence[str]:
        """Return one line for each."""
        ...


@runtime_checkable
class Batching(Protocol):
    """What a Task may also be able to do: run several calls as one, which a device may do in less time.

    What a call gives must not depend on the others, but for rounding.
    """

    def batch_key(self, inputs: Any) -> Hashable | None:
        """Return what calls that can run as one have in common; None for a call that runs alone."""
        ...

    def join(self, calls: Sequence[Any]) -> Any:
        """Return the inputs of one call for calls of the same key."""
        ...

    def split(self, result: Any, calls: Sequence[Any]) -> Sequence[Result] | None:
        """Return the result of each call; None if it cannot be told what of it is whose: each then runs alone.

        Each has `provenance["inputs"]` of its own, and its warnings say nothing of what others asked for.
        """
        ...


class Task(Protocol):
    """Text-to-image, detect, ...: runs compiled models. The factory takes (options, context).

    The factory is quick: it may `start` compilations, and waits for none. Roles that it starts none of
    are started for any shape.
    """

    def __call__(self, inputs: Any, progress: Callable[[Progress], None]) -> Result:
        """Run once. `inputs` is an instance of the extension's inputs model.

        The result's `timings` are of this call; the core adds its whole duration, provenance, and, if the task does
        not say better itself, `provenance["inputs"]`.
        """
        ...

    def examples(self, count: int) -> Sequence[Any]:
        """Return representative inputs, instances of the inputs model, for calibration, quality and benchmarks.

        They are the first `count` of one sequence that is always the same, all different and in no order, since the
        core takes every second one to calibrate with and the others to judge by. Fewer if there are no more.

        A task may also offer `compare(result, reference) -> float`: how close a result comes to another of the same
        inputs, 1 if they are equal, less if they differ. [quality] takes it instead of `Result.compare`, for
        measures that need more than the two results.
        """
        ...
