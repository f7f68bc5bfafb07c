"""What each kind of field is filled in with, and what shows results: gradio's components, bounded and made inert."""

from __future__ import annotations

import os
from abc import ABCMeta
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import FileData
from PIL import Image

from ovforge.errors import InputError
from ovforge_ui.fields import Field, Kind
from ovforge_ui.values import shown

__all__ = ["MaskEditor", "VideoBox", "widget"]

_WIDEST = 100
"""Whole numbers that a slider spans at most; a wider range is typed."""


def _derived(base: Any, about: str, **methods: Callable[..., Any]) -> Any:
    """Return a class of components like `base` with other methods.

    A class statement would do, if gradio did not then write a stub file beside this one.
    """
    members = {"__doc__": about, "__module__": __name__, "is_template": True, **methods}
    return ABCMeta.__new__(type(base), base.__name__, (base,), members)


def _path_of(_: Any, payload: Any) -> str | None:
    """Return the file that was sent: nothing opens it before the task does."""
    return getattr(payload, "path", None) or None


def _paths_of(_: Any, payload: Any) -> list[str | None] | None:
    pictures = payload.root if payload else ()
    return [_path_of(None, getattr(each, "image", None)) for each in pictures] or None


def _as_it_is(_: Any, value: Any) -> Any:
    return FileData(path=str(value)) if value else None


def _picture_and_mask(editor: Any, payload: Any) -> Any:
    """Return files of the picture and of what is painted over it, white on black, of one size."""
    try:
        value = gr.ImageEditor.preprocess(editor, payload)
        background = value.get("background") if value else None
        if not isinstance(background, Image.Image):
            return None
        mask = Image.new("L", background.size, 0)
        for layer in value.get("layers") or ():
            mask.paste(255, mask=layer.convert("RGBA").getchannel("A").resize(background.size))
        folder = Path(editor.GRADIO_CACHE) / "masks"
        folder.mkdir(exist_ok=True)
        stem = folder / os.urandom(8).hex()
        files = {"image": f"{stem}.png", "mask": f"{stem}-mask.png"}
        background.save(files["image"])
        mask.point(lambda value: 255 if value > 127 else 0).save(files["mask"])
        return files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # It is raised where the run begins, since what is raised here the page cannot show.
        return InputError(f"the picture cannot be read: {error}", where="image", hint="Choose another one.")


def _painted(editor: Any, value: Any) -> Any:
    """Return the editor's value for files as `_picture_and_mask` gives them."""
    if not value or "mask" not in value:
        return gr.ImageEditor.postprocess(editor, value)
    with Image.open(value["image"]) as picture, Image.open(value["mask"]) as mask:
        layer = Image.new("RGBA", picture.size, "white")
        layer.putalpha(mask.convert("L"))
        whole = Image.alpha_composite(picture.convert("RGBA"), layer)
        return gr.ImageEditor.postprocess(editor, {"background": picture.copy(), "layers": [layer], "composite": whole})


PictureBox = _derived(gr.Image, "A picture that is sent.", preprocess=_path_of)
PicturesBox = _derived(gr.Gallery, "Several pictures that are sent.", preprocess=_paths_of)
VideoBox = _derived(gr.Video, "A video, sent or shown, as it is.", preprocess=_path_of, postprocess=_as_it_is)
MaskEditor = _derived(
    gr.ImageEditor, "A picture that is sent, with a mask over it.", preprocess=_picture_and_mask, postprocess=_painted
)


def widget(field: Field, prefix: str) -> Any:
    """Return the component of a field, filled in with its default; `prefix` begins its id."""
    about = {
        "label": f"{field.title}{' *' if field.required else ''}",
        "info": _help(field),  # gradio escapes HTML in it
        "elem_id": f"{prefix}-{field.name}",
    }
    value = shown(field, None if field.is_file else field.default)
    return _MAKERS[field.kind](field, value, about)


def _help(field: Field) -> str:
    """Return what a field is for, with its bounds if it is typed."""
    low, high = field.minimum, field.maximum
    if field.kind not in ("integer", "number") or _has_slider(field):
        bounds = ""
    elif low is not None and high is not None:
        bounds = f"{low:g} to {high:g}."
    else:
        bounds = f"{low:g} or more." if low is not None else f"{high:g} or less." if high is not None else ""
    lines = {"lines": "One a line.", "json": "Written as JSON."}.get(field.kind, "")
    return " ".join(part for part in (field.help, bounds, lines) if part)


def _has_slider(field: Field) -> bool:
    if field.nullable or field.minimum is None or field.maximum is None:
        return False
    return field.kind == "number" or field.maximum - field.minimum <= _WIDEST


def _text(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return gr.Textbox(value, lines=2 if field.required else 1, max_lines=8, **about)


def _lines(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return gr.Textbox(value, lines=2, max_lines=8, **about)


def _json(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return gr.Textbox(value, lines=1, max_lines=8, **about)


def _number(field: Field, value: Any, about: dict[str, Any]) -> Any:
    whole = field.kind == "integer"
    if _has_slider(field):
        span = (field.maximum or 0) - (field.minimum or 0)
        step = 1 if whole else 0.01 if span <= 2 else span / 100
        return gr.Slider(field.minimum, field.maximum, value, step=step, buttons=[], **about)
    # gradio's own field for numbers shows 0 where nothing is filled in, and rounds large seeds.
    return gr.Textbox("" if value is None else f"{value}", placeholder="by default", max_lines=1, **about)


def _choice(field: Field, value: Any, about: dict[str, Any]) -> Any:
    words = {"True": "yes", "False": "no", "None": "by default"}
    choices = [(words.get(str(each), str(each)), each) for each in field.choices]
    return gr.Dropdown(choices, value=value, **about)


def _switch(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return gr.Checkbox(bool(value), **about)


def _picture(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return PictureBox(type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260, **_untold(about))


def _pictures(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return PicturesBox(
        type="filepath",
        interactive=True,
        file_types=["image"],
        height=260,
        columns=2,
        object_fit="contain",
        **_untold(about),
    )


def _video(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return VideoBox(sources=["upload"], height=260, **_untold(about))


def _file(field: Field, value: Any, about: dict[str, Any]) -> Any:
    return gr.File(file_count="multiple" if field.kind == "files" else "single", height=120, **_untold(about))


def _untold(about: dict[str, Any]) -> dict[str, Any]:
    """Return it without a help text, for which these components have no place."""
    return {name: part for name, part in about.items() if name != "info"}


_MAKERS: dict[Kind, Callable[[Field, Any, dict[str, Any]], Any]] = {
    "text": _text, "lines": _lines, "json": _json, "integer": _number, "number": _number, "choice": _choice,
    "switch": _switch, "picture": _picture, "pictures": _pictures, "video": _video, "file": _file, "files": _file,
}  # fmt: skip
