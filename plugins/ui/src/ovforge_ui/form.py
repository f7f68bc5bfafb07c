"""The form of a tab: a component for each input, what may be adjusted, and what a filled-in form asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ovforge.errors import InputError
from ovforge_ui.fields import Field, mask_of
from ovforge_ui.hosts import Asked, Host
from ovforge_ui.values import inputs_of, shown
from ovforge_ui.widgets import MaskEditor, widget

__all__ = ["Form"]

_OWN = "as the config says"

_SMALL = {"integer", "number", "choice", "switch"}
"""Kinds of fields that stand side by side."""


class Form:
    """Made inside a gradio column. `components` are in the order in which handlers get their values."""

    def __init__(self, host: Host, prefix: str, *, adjusting: bool = True) -> None:
        self._host, self._prefix = host, prefix
        self._fields: Mapping[str, Field] = {field.name: field for field in host.fields}
        self.inputs: dict[str, Any] = {}
        self._inside: dict[str, tuple[Field, int, Field]] = {}
        self._adapters: dict[str, Any] = {}
        self._controls: dict[str, Any] = {}
        self._scheduler: Any = None
        self._pair = mask_of(host.fields)
        self._lay([field for field in host.fields if not field.folded])
        if adjusting:
            self._adjusting()
        folded = [field for field in host.fields if field.folded]
        if folded:
            with gr.Accordion("More", open=False, elem_id=f"{prefix}-more"):
                self._lay(folded)

    @property
    def components(self) -> list[Any]:
        """All of them."""
        rest = [*self._adapters.values(), *self._controls.values(), *([self._scheduler] if self._scheduler else [])]
        return [*self.inputs.values(), *rest]

    def asked(self, values: Sequence[Any], uploads: Path) -> Asked:
        """Return what the values of `components` ask for. Raises InputError for what cannot be asked."""
        left = iter(values)
        given = self._gathered({name: next(left) for name in self.inputs})
        if self._pair:
            image, mask = self._pair
            both = given.pop(image.name)
            if isinstance(both, Exception):
                raise both
            given |= {image.name: both["image"], mask.name: both["mask"]} if both else {}
        for name, field in self._fields.items():
            _check_uploaded(given.get(name), uploads, field)
        asked = Asked(
            inputs_of(list(self._fields.values()), given, self._host.given),
            {name: next(left) for name in self._adapters},
            {name: next(left) for name in self._controls},
            next(left) or "" if self._scheduler else "",
        )
        for name, number in [*asked.adapters.items(), *asked.controls.items()]:
            if number is None:
                raise InputError("is missing", where=name)
        return asked

    def filled(self, asked: Asked) -> list[Any]:
        """Return what `components` show of something that was asked before."""
        values: list[Any] = []
        for name in self.inputs:
            field, value = self._asked_of(name, asked)
            if self._pair and name == self._pair[0].name:
                mask = asked.inputs.get(self._pair[1].name)
                values.append({"image": str(value), "mask": str(mask)} if value and mask else None)
            elif field.is_file:
                values.append([str(each) for each in value] if isinstance(value, list) else value and str(value))
            else:
                values.append(shown(field, value))
        values += [asked.adapters.get(name, 0.0) for name in self._adapters]
        values += [asked.controls.get(name, 0.0) for name in self._controls]
        return [*values, *([asked.scheduler] if self._scheduler else [])]

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of the components with those of objects put together."""
        given = {name: value for name, value in values.items() if name not in self._inside}
        for name, (group, number, part) in self._inside.items():
            objects = given.setdefault(group.name, [{} for _ in range(group.most)])
            objects[number][part.name] = values[name]
        return given

    def _asked_of(self, name: str, asked: Asked) -> tuple[Field, Any]:
        """Return the field of a component, and what was asked for there."""
        if name not in self._inside:
            field = self._fields[name]
            return field, asked.inputs.get(name, None if field.is_file else field.default)
        group, number, part = self._inside[name]
        objects = asked.inputs.get(group.name) or []
        objects = objects if isinstance(objects, list) else [objects]
        default = None if part.is_file else part.default
        return part, objects[number].get(part.name, default) if number < len(objects) else default

    def _lay(self, fields: Sequence[Field]) -> None:
        """Place fields one below the other, small ones side by side."""
        row: list[Field] = []
        for field in fields:
            if field.kind in _SMALL:
                row.append(field)
                continue
            self._lay_row(row)
            row = []
            self._place(field)
        self._lay_row(row)

    def _lay_row(self, row: Sequence[Field]) -> None:
        for start in range(0, len(row), 2):
            with gr.Row():
                for field in row[start : start + 2]:
                    self._place(field)

    def _place(self, field: Field) -> None:
        if self._pair and field == self._pair[1]:
            return
        if self._pair and field == self._pair[0]:
            self.inputs[field.name] = MaskEditor(
                label="Picture, and what to paint anew *", type="pil", image_mode="RGBA",
                sources=["upload", "clipboard"],
                brush=gr.Brush(default_size="auto", colors=["#e11d48"], color_mode="fixed"), transforms=(),
                layers=gr.LayerOptions(allow_additional_layers=False), elem_id=f"{self._prefix}-{field.name}",
                height=420, format="png",
            )  # fmt: skip
            return
        if field.parts:
            self._place_objects(field)
            return
        self.inputs[field.name] = widget(field, self._prefix)

    def _place_objects(self, field: Field) -> None:
        """Place the fields of each object that there may be, folded away."""
        for number in range(field.most):
            title = f"{field.title} {number + 1}" if field.most > 1 else field.title
            place = f"{self._prefix}-{field.name}-{number}"
            with gr.Accordion(title, open=False, elem_id=place):
                for part in field.parts:
                    name = f"{field.name}.{number}.{part.name}"
                    self._inside[name] = field, number, part
                    self.inputs[name] = widget(part, place)

    def _adjusting(self) -> None:
        """Place what is switched while the pipeline runs: adapters, controls, the scheduler."""
        pipeline, schedulers = self._host.pipeline, self._host.schedulers()
        if not (pipeline.adapters or pipeline.controls or schedulers):
            return
        with gr.Accordion("Adapters and sampling", open=True, elem_id=f"{self._prefix}-adjust"):
            for name, weight in pipeline.adapters.items():
                self._adapters[name] = gr.Slider(
                    min(-1.0, weight), max(2.0, weight), weight, step=0.05, label=f"Adapter {name}",
                    info="0 is without it. Nothing is compiled again.", buttons=[],
                    elem_id=f"{self._prefix}-adapter-{len(self._adapters)}",
                )  # fmt: skip
            for name, number in pipeline.controls.items():
                self._controls[name] = gr.Number(
                    number, label=name, info=pipeline.controls.summary(name), step=0.1,
                    elem_id=f"{self._prefix}-control-{len(self._controls)}",
                )  # fmt: skip
            if schedulers:
                own = self._host.scheduler()
                choices = [(f"{_OWN} ({own})" if own else "the model's own", "")]
                choices += [(name, name) for name in schedulers if name != own]
                self._scheduler = gr.Dropdown(
                    choices, value="", label="Scheduler", elem_id=f"{self._prefix}-scheduler",
                    info="How it samples. Nothing is compiled again.",
                )  # fmt: skip


def _check_uploaded(value: Any, uploads: Path, field: Field) -> None:
    """Raise InputError for files that were not sent to the page: a forged request can name others."""
    for one in value or () if field.parts else ():
        for part in field.parts:
            _check_uploaded(one.get(part.name), uploads, part)
    if not field.is_file:
        return
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str | Path) and not Path(each).resolve().is_relative_to(uploads.resolve()):
            raise InputError("it names a file of this machine", where=field.title, hint="Choose the file in the page.")
