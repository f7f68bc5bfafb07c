"""`ovforge batch`: one pipeline, many inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovforge.cli import EMBEDDED, Engine, EngineOptions, Trust
from ovforge.errors import InputError

if TYPE_CHECKING:
    from ovforge import Progress
    from ovforge_batch.crew import Crew, Outcome
    from ovforge_batch.items import Item
    from ovforge_batch.manifest import Manifest
    from ovforge_batch.outputs import Remote

__all__ = ["FAILED", "batch"]

FAILED = 3
"""Exit code if items failed; the others are done."""

_SHOWN = 20


def batch(
    config: Annotated[Path, typer.Argument(help="The pipeline's config, .toml or .json.")],
    inputs: Annotated[Path, typer.Argument(help="JSON lines: each the task's inputs, and an `id` if you like.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The folder for results and manifest.jsonl, or a URL of fsspec.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of the config.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", min=1, help="Processes that work side by side; by default 1, or the engine's."),
    ] = None,
    engine: Engine = EMBEDDED,
    engine_option: EngineOptions = None,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Further tries of an item, if its inputs are not at fault.")
    ] = 2,
    seed: Annotated[int, typer.Option("--seed", help="Of the batch: each item's own seed comes of it and its id.")] = 0,
    kind: Annotated[
        str | None, typer.Option("--as", metavar=".ENDING", help="Kind of the results' files; by default their own.")
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing of models on disk.")] = False,
    trust: Trust = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only what failed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and what failed as JSON.")] = False,
) -> None:
    """Run a pipeline on many inputs. Run it again after a crash: it goes on with what is not done.

    Items that fail are reported at the end, and tried again when the batch is run again. Exit code 3: some failed.

    Example: ovforge batch examples/unicorn.toml cats.jsonl -o cats --workers 2
    """
    from ovforge import Plugins
    from ovforge.cli import check_folder, check_trust, find_engine, progress_bar
    from ovforge.config import PipelineConfig
    from ovforge.store import fingerprint
    from ovforge_batch.crew import Crew
    from ovforge_batch.engine import Embedded, Order
    from ovforge_batch.items import count_items, seed_of
    from ovforge_batch.manifest import Manifest
    from ovforge_batch.outputs import open_output

    overrides = set_ or []
    check_trust(config, overrides, trust)
    pipeline = PipelineConfig.read(config, overrides)
    if pipeline.task is None:
        raise InputError("`task` is missing", where=str(config), hint="Say what the pipeline is for: task = ...")
    suffix = _suffix(Plugins().find("task", pipeline.task.use).extension, kind)
    total = count_items(inputs)
    place = open_output(str(output))
    if isinstance(place, Path):
        check_folder(place)
    chosen = find_engine(engine, engine_option, "batch")
    head = {"batch": 1, "config": fingerprint(pipeline.as_dict()), "seed": seed, "ending": suffix}
    order = Order(pipeline, str(config), config.parent, place, None if no_cache else "default")

    def told(item: Item) -> dict[str, Any]:
        return {"inputs": item.inputs, "seed": seed_of(seed, item.id), "file": f"{item.id}{suffix}"}

    with (
        Manifest(place, head) as manifest,
        progress_bar(quiet or as_json) as progress,
        chosen.batch() if chosen else nullcontext(Embedded()) as places,
        Crew(places, order, min(workers or places.workers, total), retries, told) as crew,
    ):
        counts = _work(crew, manifest, inputs, total, progress)
    _report(counts, place, quiet=quiet, as_json=as_json)


def _work(
    crew: Crew, manifest: Manifest, inputs: Path, total: int, progress: Callable[[Progress], None]
) -> dict[str, Any]:
    """Run what is not done; return counts, and what failed."""
    from ovforge import Progress
    from ovforge_batch.items import read_items

    before = 0
    failed: list[dict[str, Any]] = []

    def left() -> Iterator[Item]:
        nonlocal before
        for item in read_items(inputs):
            status, digest = manifest.records.get(item.id, ("", ""))
            if status == "done" and digest != item.digest:
                raise InputError(
                    f"the item {item.id!r} was done with other inputs", where=f"{inputs}: line {item.line}",
                    hint="Give it another id, or name another --output.",
                )  # fmt: skip
            if status == "done":
                before += 1
            else:
                yield item

    began, done = time.monotonic(), 0
    progress(Progress("batch", 0, total))
    for outcomes in crew.run(left()):
        records = [_record(outcome) for outcome in outcomes]
        manifest.add(*records)
        done += len(records)
        failed += [record for record in records if record["status"] == "failed"]
        seconds = (time.monotonic() - began) / done * (total - before - done)
        progress(Progress("batch", before + done, total, f"{max(0, seconds):.0f} s left"))
    return {"total": total, "before": before, "done": done - len(failed), "failed": failed}


def _record(outcome: Outcome) -> dict[str, Any]:
    item, answer = outcome.item, outcome.answer
    common = {"id": item.id, "line": item.line, "digest": item.digest, "attempts": outcome.attempts}
    if "error" in answer:
        return {**common, "status": "failed", "error": answer["error"]}
    return {**common, "status": "done", **answer}


def _suffix(task: Any, kind: str | None) -> str:
    """Return the ending of results' files. Raises InputError for one that the task's result is not saved as."""
    from ovforge import Result

    result = task.result_type() or Result
    if kind is None:
        return str(next(suffix for suffix in result.suffixes if suffix))
    suffix = f".{kind.lower().removeprefix('.')}"
    result.check_path(Path(f"x{suffix}"))
    return suffix


def _report(counts: dict[str, Any], output: Path | Remote, *, quiet: bool, as_json: bool) -> None:
    from ovforge.cli import print_json, print_line, print_warning

    failed = counts["failed"]
    if as_json:
        print_json(counts)
    elif not quiet:
        print_line(f"{output}: {counts['done']} done, {counts['before']} done before, {len(failed)} failed")
    if not as_json:
        for record in failed[:_SHOWN]:
            print_warning(f"{record['id']} (line {record['line']}): {record['error'].splitlines()[0]}")
        if len(failed) > _SHOWN:
            print_warning(f"and {len(failed) - _SHOWN} more: see manifest.jsonl")
    if failed:
        raise typer.Exit(FAILED)
