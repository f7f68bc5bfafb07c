"""Contract tests of sources, loaders, schedulers, devices and tasks."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ovforge.config.inputs import input_content
from ovforge.config.options import checked, validate_options
from ovforge.contracts.extensions import DriverExtension, Need, TaskExtension, TrackerExtension
from ovforge.contracts.quantization import DriverContext
from ovforge.contracts.stages import Match, ignore_progress
from ovforge.errors import ConfigError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.model.results import Result
from ovforge.model.sources import FileSource, Source
from ovforge.model.video import Boxes
from ovforge.run.opening import open_model
from ovforge.store import digest_file
from ovforge.testing.models import small_model
from ovforge.testing.plugin import create, extension, plugins_of

__all__ = [
    "check_device",
    "check_driver",
    "check_loader",
    "check_scheduler",
    "check_source",
    "check_task",
    "check_tracker",
]


def check_loader(
    module: types.ModuleType, name: str, ours: Path, foreign: Path, options: Mapping[str, Any] = {}
) -> ModelBundle:
    """Check a loader: it knows `ours`, not `foreign`, and what it loads survives being written and read.

    It is asked whose a source is as the core asks, with its default options; with `options` if some have no default.
    Returns what it loaded with `options`.
    """
    loader = create(module, "loader", name, options)
    described = extension(module, "loader", name)
    try:
        looking = described.create(validate_options(described.options_model(), {}, where=name))
    except ConfigError:
        looking = loader
    assert looking.can_load(FileSource(ours)) > Match.NO, f"{name} does not know {ours}"
    assert looking.can_load(FileSource(foreign)) is Match.NO, f"{name} claims {foreign}, which is not its own"
    bundle = open_model(ours, use=name, options=options, plugins=plugins_of(module), cache=None)
    assert bundle.models, f"{name} found no model in {ours}"
    with TemporaryDirectory() as folder:
        saved = Path(folder) / "bundle"
        bundle.save(saved)
        again = ModelBundle.open(FileSource(saved))
        assert sorted(again.models) == sorted(bundle.models), "roles are lost when the bundle is written"
        assert again.configs == bundle.configs, "configs are lost when the bundle is written"
        assert again.assets == bundle.assets, "assets are lost when the bundle is written"
    return bundle


def check_source(
    module: types.ModuleType,
    name: str,
    ours: Path,
    plain: Path,
    options: Mapping[str, Any] = {},
    encrypted: bool = True,
) -> Source:
    """Check what opens sources that are not plain: it knows `ours`, not `plain`, which is the same made plain.

    Its files are the plain ones by every way of reading. If it is `encrypted`, no path leads to them, and what it
    protects is unreadable on disk, and to any other purpose. `encrypted=False` is for sources that are merely packed.
    """
    opener = create(module, "source", name, options)
    expected = FileSource(plain)
    assert opener.can_open(FileSource(ours)), f"{name} does not know {ours}"
    assert not opener.can_open(expected), f"{name} claims {plain}, which is plain"
    source: Source = opener.open(FileSource(ours))
    assert source.files() == expected.files(), "names or sizes differ from the plain ones"
    for path, size in expected.files().items():
        data, buffer = expected.read(path), bytearray(size)
        source.read_into(path, memoryview(buffer))
        assert source.read(path) == data == buffer, f"{path} is another file than the plain one"
        assert source.read(path, 5) == data[:5], f"{path}: a part of it differs"
        assert source.digest(path) == source.digest(path), f"{path}: its digest changes from call to call"
        local = source.local(path)
        assert local is None or (not encrypted and local.read_bytes() == data), f"{path}: `local` is not its plain file"
        assert not encrypted or source.digest(path) != expected.digest(path), (
            "a digest of plain content tells what it is"
        )
    if not encrypted:
        return source
    assert source.protection is not None, "nothing protects what is made from it"
    with TemporaryDirectory() as folder:
        data = b"made from an encrypted model " * 1000
        source.protection.write(Path(folder), "a/b.bin", data, "this")
        for file in FileSource(Path(folder)).files():
            assert data[:29] not in (Path(folder) / file).read_bytes(), "what it protects is plain on disk"
        assert source.protection.open(Path(folder), "this").read("a/b.bin") == data, "what it protects is lost"
        try:
            source.protection.open(Path(folder), "that").read("a/b.bin")
        except OvforgeError:
            return source
        raise AssertionError("what was stored for one purpose opens for another")


def check_scheduler(
    module: types.ModuleType,
    name: str,
    options: Mapping[str, Any] = {},
    model_config: Mapping[str, Any] = {},
    steps: Sequence[int] = (1, 2, 4),
) -> None:
    """Check a scheduler: shapes and types hold, runs repeat and do not disturb each other."""
    import numpy as np

    from ovforge.model.random import Generator

    scheduler = create(module, "scheduler", name, options, model_config)
    for count in steps:
        finals = []
        for _ in range(2):
            run, rng, network = scheduler.start(count), Generator(1), Generator(2)
            latents = rng.randn((1, 4, 8, 8)) * np.float32(run.init_noise_sigma)
            for index in range(len(run.timesteps)):
                seen = run.scale_input(latents, index)
                before = latents.copy()
                latents = run.step(network.randn(seen.shape), index, latents, rng)
                assert latents.dtype == np.float32, f"{name} gives {latents.dtype}, not float32"
                assert latents.shape == before.shape, f"{name} changes the shape of latents"
            finals.append(latents)
        assert np.array_equal(finals[0], finals[1]), (
            f"{name}: the same seed gives other latents; a run must keep no hidden state"
        )
    late, clean, noise = (
        scheduler.start(max(steps), 0.5),
        Generator(1).randn((1, 4, 8, 8)),
        Generator(2).randn((1, 4, 8, 8)),
    )
    assert 0 <= late.first < len(late.timesteps), f"{name}: strength 0.5 begins at step {late.first}"
    noised = late.add_noise(clean, noise, late.first)
    assert (noised.dtype, noised.shape) == (clean.dtype, clean.shape), f"{name}: add_noise changes type or shape"
    assert not np.array_equal(noised, clean), f"{name}: add_noise adds nothing"


def check_device(module: types.ModuleType, name: str, options: Mapping[str, Any] = {}) -> None:
    """Check a device: its plan compiles a small model, or it says why it is not here."""
    from ovforge.model.runtime import core

    try:
        plan, again = (create(module, "device", name, options).plan() for _ in range(2))
    except OvforgeError as error:
        assert error.hint, f"{name} refuses without saying what to do"
        return
    assert plan == again, f"{name} plans differently from call to call: what is compiled would never be found again"
    core().compile_model(small_model(), plan.device, dict(plan.properties))


def check_driver(
    module: types.ModuleType, name: str, sections: Mapping[str, Mapping[str, Any]] = {}, base: Path | None = None
) -> Any:
    """Check a driver's description and what plans ask of it: the same content at each call, JSON-able, for every need.

    `sections` are the driver's tables of a config. Returns the driver, made without a task.
    """
    described = extension(module, "driver", name)
    assert isinstance(described, DriverExtension)
    assert described.sections, f"{name} has no section: a config could not ask for it"
    known = {key: checked(described.section_model(key), table, where=key, base=base) for key, table in sections.items()}
    context = DriverContext(sections=known, task=None, base=base or Path())
    first, second = (described.create(context) for _ in range(2))
    assert isinstance(first.judges, bool), f"{name}: `judges` is not a bool"
    needs: tuple[Need, ...] = ("nothing", "inputs", "score")
    for need in needs:
        contents = [json.dumps(driver.content(need, digest_file), sort_keys=True) for driver in (first, second)]
        assert contents[0] == contents[1], f"{name}: what a quantizer gets changes from call to call: nothing is cached"
    return first


def check_task(module: types.ModuleType, name: str, task: Any = None) -> None:
    """Check a task's description: its inputs are a strict pydantic model, and it names roles.

    With `task`, what the factory made for a pipeline (`pipeline.task`), also check its examples: they are inputs of the
    task, the same ones at each call, and all different; and four threads that call it as a pipeline does get what one
    thread gets.
    """
    described = extension(module, "task", name)
    assert isinstance(described, TaskExtension)
    assert described.inputs_model().model_config.get("extra") == "forbid", (
        f'the inputs of {name} must have extra="forbid"'
    )
    assert described.roles, f"{name} names no role"
    kind = described.result_type()
    assert kind is None or (isinstance(kind, type) and issubclass(kind, Result) and kind.suffixes), (
        f"the result of {name} must be a class derived from ovforge.Result that names the files it is saved as"
    )
    if task is None:
        return
    model = described.inputs_model()
    examples = list(task.examples(8))
    assert all(isinstance(inputs, model) for inputs in examples), f"examples of {name} are not all {model.__name__}"
    written = [input_content(inputs) for inputs in examples]
    assert len({json.dumps(one) for one in written}) == len(written), (
        f"{name} gives the same example twice: it would be calibrated and judged by"
    )
    fewer = [input_content(inputs) for inputs in task.examples(4)]
    same = fewer == written[:4]
    assert same, f"examples of {name} change from call to call: calibration would use what quality judges by"
    _check_threads(described, task, examples[:2])


def check_tracker(module: types.ModuleType, name: str, options: Mapping[str, Any] = {}) -> None:
    """Check a tracker: things that move evenly keep their numbers, and two streams do not know of each other.

    Two squares move through forty pictures, one of them comes late; some pictures are empty, and, unless the tracker
    needs every picture, every second one is not looked at.
    """
    import numpy as np

    described = extension(module, "tracker", name)
    assert isinstance(described, TrackerExtension)
    every = described.every_picture
    first, second, again = (create(module, "tracker", name, options, 0.5) for _ in range(3))
    seen: list[tuple[str, ...]] = []
    ids: list[set[int]] = [set(), set()]
    for number in range(40):
        picture, found = _squares(number)
        given = found if every or number % 2 == 0 else None
        tracks = first.update(given, picture, number / 25)
        count = len(tracks)
        assert tracks.boxes.shape == (count, 4), f"{name}: the boxes are {tracks.boxes.shape}, not ({count}, 4)"
        assert tracks.boxes.dtype == np.float32, f"{name}: the boxes are {tracks.boxes.dtype}, not float32"
        assert len(tracks.scores) == len(tracks.classes) == len(tracks.rows) == count, f"{name}: lengths differ"
        assert len(set(tracks.ids.tolist())) == count, f"{name} gives one number to two things of a picture"
        assert (tracks.ids > 0).all(), f"{name} gives numbers below 1"
        assert np.isfinite(tracks.boxes).all(), f"{name} gives places that are not finite"
        limit = len(given) if given is not None else 0
        assert ((tracks.rows >= -1) & (tracks.rows < limit)).all(), f"{name}: `rows` names boxes that it was not given"
        for of, box in zip(ids, found.boxes, strict=False):
            near = np.abs(tracks.boxes - box).max(axis=1) < 15
            of.update(tracks.ids[near].tolist())
        seen.append(tuple(part.tobytes() for part in (tracks.boxes, tracks.ids, tracks.rows)))
        second.update(_squares(number + 7)[1], picture, number / 25)
    assert all(len(each) == 1 for each in ids), f"{name}: squares that move evenly have the numbers {ids}, not one each"
    for number in range(40):
        picture, found = _squares(number)
        tracks = again.update(found if every or number % 2 == 0 else None, picture, number / 25)
        same = seen[number] == tuple(part.tobytes() for part in (tracks.boxes, tracks.ids, tracks.rows))
        assert same, f"{name}: another stream, or a second run, changes what it says of picture {number}"
    nothing = create(module, "tracker", name, options, 0.5)
    for number in range(3):
        empty = nothing.update(Boxes.none(), _squares(0)[0], float(number))
        assert len(empty) == 0, f"{name} sees things in an empty picture"


def _squares(number: int) -> tuple[Any, Boxes]:
    """Return a picture (120, 240, 3) of one or two squares on their way, and their boxes."""
    import numpy as np

    places = [(10 + 3 * number, 20), (200 - 3 * number, 80)][: 1 + (number >= 6)]
    picture = np.full((120, 240, 3), 90, np.uint8)
    for shade, (left, top) in zip((250, 20), places, strict=False):
        picture[top : top + 30, max(0, left) : left + 30] = shade
    boxes = np.array([(left, top, left + 30, top + 30) for left, top in places], np.float32)
    return picture, Boxes(boxes, np.full(len(boxes), 0.9, np.float32), np.arange(len(boxes), dtype=np.int64))


def _check_threads(described: TaskExtension, task: Any, examples: Sequence[Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from ovforge.run.turns import Turns

    turns = Turns(described)

    def call(inputs: Any) -> bytes:
        with turns:
            return _outputs(task(inputs, ignore_progress))

    expected = [call(inputs) for inputs in examples]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, [*examples, *examples]))
    assert found == expected * 2, f"{described.name} gives other results if several threads call it"


def _outputs(result: Any) -> bytes:
    """Return what a result holds but for how long it took and what it came from."""
    import copy
    import pickle
    from dataclasses import fields

    names = [field.name for field in fields(result) if field.name not in ("timings", "provenance")]
    sent = copy.copy(result)  # without what a result leaves out when it is handed to another process
    return pickle.dumps([getattr(sent, name) for name in names])
