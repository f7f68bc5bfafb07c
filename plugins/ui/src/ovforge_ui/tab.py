"""A tab of the page: the form of a pipeline, or of several side by side, and what its runs have made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ovforge import Result, Stop
from ovforge.errors import InputError, OvforgeError
from ovforge.model import fresh_seed
from ovforge_ui import sights
from ovforge_ui.form import Form
from ovforge_ui.history import Made, Shelf, Shelves, files_of, named, things_of, without_uploads
from ovforge_ui.hosts import Asked, Host, Run
from ovforge_ui.widgets import VideoBox

__all__ = ["Folders", "Tab"]

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""How all events are listened to: the page says itself how far a run is, and it is for people alone."""


@dataclass(frozen=True)
class Folders:
    """Where files lie: those that were sent to the page, and those that it made."""

    uploads: Path
    made: Path
    paths_shown: bool
    """Whether results may name the folder of their config: the browser is on this machine."""


@dataclass(frozen=True)
class _Done:
    """What one pipeline made of a run."""

    host: Host
    result: Result
    files: Sequence[Path]
    others: Sequence[Path]


class Tab:
    """Made inside a gradio tab. With several hosts, each run is one of each, with the same inputs."""

    def __init__(self, hosts: Sequence[Host], prefix: str, shelves: Shelves, folders: Folders) -> None:
        self._hosts, self._prefix, self._shelves, self._folders = list(hosts), prefix, shelves, folders
        self._result = hosts[0].task.result_type() or Result
        gr.HTML(sights.about(hosts), elem_id=f"{prefix}-about")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=340):
                self._form = Form(hosts[0], prefix, adjusting=len(hosts) == 1)
            with gr.Column(scale=3, min_width=340):
                self._place_results()
        self._listen()

    def _place_results(self) -> None:
        prefix = self._prefix
        with gr.Row():
            self._run = gr.Button("Run", variant="primary", elem_id=f"{prefix}-run")
            self._cancel = gr.Button("Cancel", interactive=False, elem_id=f"{prefix}-cancel")
        self._status = gr.HTML(sights.READY, elem_id=f"{prefix}-status")
        self._things = self._make_things()
        self._thresholds = self._make_thresholds()
        self._details = gr.HTML("", elem_id=f"{prefix}-details")
        self._others = gr.File(label="Files", visible=False, interactive=False, elem_id=f"{prefix}-files")
        with gr.Accordion("Recipe", open=False, visible=False, elem_id=f"{prefix}-recipe-box") as self._recipe_box:
            self._recipe = gr.Code(
                label="A config that makes it again: ovforge run recipe.toml", language=None, interactive=False,
                show_line_numbers=False, wrap_lines=True, elem_id=f"{prefix}-recipe",
            )  # fmt: skip
            self._again = gr.Button("Make again", size="sm", elem_id=f"{prefix}-again")

    def _make_things(self) -> Any:
        """Return what shows pictures, or a video; None for results that have neither."""
        about: dict[str, Any] = {"show_label": False, "elem_id": f"{self._prefix}-made", "visible": False}
        suffixes = self._result.suffixes
        if ".mp4" in suffixes or ".webm" in suffixes:
            return VideoBox(interactive=False, height=420, autoplay=True, **about)
        if ".png" not in suffixes:
            return None
        several = len(self._hosts) > 1
        return gr.Gallery(
            preview=not several, columns=len(self._hosts) if several else 6, object_fit="contain", interactive=False,
            height=None if several else 520, buttons=["download", "fullscreen"], type="filepath", **about,
        )  # fmt: skip

    def _make_thresholds(self) -> dict[str, Any]:
        """Return a slider for each input that may change when a result is there, and runs no model again."""
        if self._result.adjustable is Result.adjustable:
            return {}
        with gr.Group(visible=False, elem_id=f"{self._prefix}-thresholds") as self._group:
            return {
                field.name: gr.Slider(
                    field.minimum, field.maximum, step=0.01, label=field.title, buttons=[],
                    info=f"{field.help} Acts at once.", elem_id=f"{self._prefix}-now-{field.name}",
                )
                for field in self._hosts[0].fields
                if field.kind == "number" and field.minimum is not None and field.maximum is not None
            }  # fmt: skip

    # -- events ---------------------------------------------------------------------------------------------------

    @property
    def _outputs(self) -> list[Any]:
        shown = [self._status, self._run, self._cancel, self._details, self._others, self._recipe_box, self._recipe]
        things = [self._things] if self._things else []
        return [*shown, *things, *self._thresholds.values(), *([self._group] if self._thresholds else [])]

    def _listen(self) -> None:
        form = self._form.components
        run = {"fn": self._on_run, "inputs": form, "outputs": self._outputs, "concurrency_limit": None, **_QUIET}
        self._run.click(**run)
        for name, field in ((field.name, field) for field in self._hosts[0].fields):
            if field.kind == "text" and field.required and name in self._form.inputs:
                self._form.inputs[name].submit(**run)
        self._cancel.click(self._on_cancel, None, None, queue=False, **_QUIET)
        self._again.click(self._on_again, None, form, queue=False, **_QUIET).then(**run)
        if isinstance(self._things, gr.Gallery):
            self._things.select(self._on_choice, None, [self._recipe], queue=False, **_QUIET)
        for name, slider in self._thresholds.items():
            own = self._form.inputs.get(name)
            outputs = [
                self._status,
                self._details,
                self._others,
                self._recipe,
                *([self._things] if self._things else []),
            ]
            slider.input(
                self._adjust_by(name), [slider], [*outputs, *([own] if own else [])], concurrency_limit=None,
                trigger_mode="always_last", **_QUIET,
            )  # fmt: skip

    def _on_run(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        session, busy = str(request.session_hash), {self._run: gr.update(interactive=False)}
        yield {**busy, self._cancel: gr.update(interactive=True), self._status: sights.WAITING}
        idle = {self._run: gr.update(interactive=True), self._cancel: gr.update(interactive=False)}
        try:
            asked = self._seeded(self._form.asked(values, self._folders.uploads))
        except OvforgeError as error:
            yield {**idle, self._status: sights.failed(error)}
            return
        run = Run(lambda stop: self._work(asked, stop))
        with self._shelves.running(session, self._prefix, run.stop):
            for moment in run:
                yield {self._status: sights.running(moment)}
        if run.error is not None:
            yield {**idle, self._status: named(sights.failed(run.error), self._folders.uploads)}
            return
        shelf = self._shelves.of(session, self._prefix)
        done, made = run.result
        shelf.results, shelf.asked = [each.result for each in done], asked
        shelf.add(made)
        yield {**idle, **self._showing(shelf, done), **self._now(shelf)}

    def _on_cancel(self, request: gr.Request) -> None:
        self._shelves.cancel(str(request.session_hash), self._prefix)

    def _on_again(self, request: gr.Request) -> Any:
        shelf = self._shelves.of(str(request.session_hash), self._prefix)
        if not shelf.made:
            return [gr.skip() for _ in self._form.components]
        return self._form.filled(shelf.made[min(shelf.chosen, len(shelf.made) - 1)].asked)

    def _on_choice(self, event: gr.SelectData, request: gr.Request) -> Any:
        shelf = self._shelves.of(str(request.session_hash), self._prefix)
        position = event.index if isinstance(event.index, int) else 0
        if not 0 <= position < len(shelf.made):
            return gr.skip()
        shelf.chosen = position
        return shelf.made[position].recipe

    def _adjust_by(self, name: str) -> Any:
        def adjust(value: float, request: gr.Request) -> dict[Any, Any]:
            shelf = self._shelves.of(str(request.session_hash), self._prefix)
            if shelf.asked is None or not all(name in result.adjustable for result in shelf.results):
                return {self._status: sights.failed(InputError("there is no result to change", hint="Run it again."))}
            try:
                results = [result.adjusted(**{name: value}) for result in shelf.results]
                done = [self._saved(host, result) for host, result in zip(self._hosts, results, strict=True)]
            except OvforgeError as error:
                return {self._status: sights.failed(error)}
            shelf.results = results
            shelf.asked = replace(shelf.asked, inputs={**shelf.asked.inputs, name: value})
            shelf.exchange(self._made(done, shelf.asked))
            own = self._form.inputs.get(name)
            shown = {key: part for key, part in self._showing(shelf, done).items() if key is not self._recipe_box}
            return {**shown, **({own: value} if own else {})}

        return adjust

    # -- what a run does, and what is shown of it -------------------------------------------------------------------

    def _seeded(self, asked: Asked) -> Asked:
        """Return it with a seed if pipelines stand side by side and none is given: they would draw different ones."""
        drawn = len(self._hosts) > 1 and "seed" in self._hosts[0].pipeline.inputs_model.model_fields
        if not drawn or asked.inputs.get("seed") is not None:
            return asked
        return replace(asked, inputs={**asked.inputs, "seed": fresh_seed()})

    def _work(self, asked: Asked, stop: Stop) -> tuple[list[_Done], list[Made]]:
        """Run each pipeline; return what they made, and its entries."""
        uploads = self._folders.uploads
        done = [host.call(asked, stop, uploads, partial(self._saved, host)) for host in self._hosts]
        return done, self._made(done, asked)

    def _saved(self, host: Host, result: Result) -> _Done:
        """Write a result; what it says of itself names no file that was sent, and no folder to browsers elsewhere."""
        result.provenance = without_uploads(result.provenance, self._folders.uploads)
        if not self._folders.paths_shown:
            result.provenance.pop("base", None)
        files, others = files_of(result, self._folders.made)
        return _Done(host, result, files, others)

    def _made(self, done: Sequence[_Done], asked: Asked) -> list[Made]:
        things = []
        for each in done:
            caption = each.host.name if len(done) > 1 else ""
            things += things_of(each.host.pipeline, each.result, asked, each.files or [Path()], caption)
        return things

    def _showing(self, shelf: Shelf, done: Sequence[_Done]) -> dict[Any, Any]:
        """Return what is shown of results, and of what was made before."""
        seconds = sum(each.result.timings.whole() for each in done)
        others = [str(file) for each in done for file in each.others]
        shown: dict[Any, Any] = {
            self._status: sights.ended(f"Done in {seconds:.2f} s."),
            self._details: named(
                sights.details({each.host.name: each.result for each in done}, _compared(done)), self._folders.uploads
            ),
            self._others: gr.update(value=others, visible=bool(others)),
            self._recipe_box: gr.update(visible=True),
            self._recipe: shelf.made[0].recipe,
        }
        if isinstance(self._things, gr.Gallery):
            pictures = [(str(made.file), made.caption) for made in shelf.made if made.file.name]
            chosen = {} if len(self._hosts) > 1 else {"selected_index": 0}
            shown[self._things] = gr.update(value=pictures, visible=bool(pictures), **chosen)
        elif self._things is not None:
            shown[self._things] = gr.update(value=str(shelf.made[0].file), visible=True)
        return shown

    def _now(self, shelf: Shelf) -> dict[Any, Any]:
        """Return the sliders of thresholds as they are for the last results."""
        if not self._thresholds:
            return {}
        values: Mapping[str, Any] = shelf.results[0].adjustable
        shown = {name: slider for name, slider in self._thresholds.items() if values.get(name) is not None}
        updates: dict[Any, Any] = {
            slider: gr.update(value=values[name], visible=True) if name in shown else gr.update(visible=False)
            for name, slider in self._thresholds.items()
        }
        return {**updates, self._group: gr.update(visible=bool(shown))}


def _compared(done: Sequence[_Done]) -> list[dict[str, str]]:
    """Return a row for each of several pipelines: how long it took, and how close it comes to the first."""
    first, rows = done[0].result, list[dict[str, str]]()
    if len(done) == 1:
        return rows
    for each in done:
        row = {"config": each.host.name, "seconds": f"{each.result.timings.whole():.2f}"}
        for metric in first.metrics:
            try:
                row[metric] = "" if each.result is first else f"{each.result.compare(first, metric):.4f}"
            except OvforgeError as error:
                row[metric] = error.what
        rows.append(row)
    return rows
