"""Forms: which field each input of any task has, and what a filled-in form asks for."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from drawing import DrawInputs, PaintInputs
from ovforge import Plugins
from ovforge.config import InputFile, checked
from ovforge.errors import ConfigError, InputError
from ovforge.model import Picture
from ovforge_ui.fields import fields_of, mask_of
from ovforge_ui.values import inputs_of, shown


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Deep(BaseModel):
    image: Picture
    scale: float = 1.0


class AnyInputs(BaseModel):
    """What other people's tasks may take."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    enum: Colour = Colour.RED
    literal: Literal[1, 2, "x"] = 1
    pictures: list[Picture] | None = None
    either: Picture | list[Picture] | None = None
    file: InputFile | None = None
    files: list[Path] = Field(default_factory=list)
    deep: Deep | None = None
    many: list[Deep] = Field(default_factory=list)
    table: dict[str, float] = Field(default_factory=dict)
    numbers: list[float] = Field(default_factory=list)
    lines: list[str] = Field(default_factory=list)
    seed: int | list[int] | None = None
    share: float = Field(0.5, gt=0, lt=1)
    size: int = Field(8, ge=8, le=16384)
    anything: Any = None
    text: str | None = None
    flag: bool = False
    maybe: bool | None = None


def test_each_input_has_a_field() -> None:
    fields = {field.name: field for field in fields_of(AnyInputs)}
    assert {name: field.kind for name, field in fields.items()} == {
        "enum": "choice", "literal": "choice", "pictures": "pictures", "either": "picture", "file": "file",
        "files": "files", "deep": "object", "many": "objects", "table": "json", "numbers": "json", "lines": "lines",
        "seed": "integer", "share": "number", "size": "integer", "anything": "json", "text": "text", "flag": "switch",
        "maybe": "choice",
    }  # fmt: skip
    assert fields["enum"].choices == ("red", "blue") and fields["literal"].choices == (1, 2, "x")
    assert fields["maybe"].choices == (True, False, None)
    assert (fields["share"].minimum, fields["share"].maximum) == (0.01, 0.99)
    assert (fields["size"].minimum, fields["size"].maximum) == (8, 16384)


def test_objects_that_hold_files_have_fields_of_their_own() -> None:
    fields = {field.name: field for field in fields_of(AnyInputs)}
    assert [part.name for part in fields["many"].parts] == ["image", "scale"]
    assert (fields["deep"].most, fields["many"].most) == (1, 4)
    empty, first, second = (
        {"image": None, "scale": 1.0},
        {"image": "a.png", "scale": 1.0},
        {"image": "b.png", "scale": 2.0},
    )
    asked = inputs_of(list(fields.values()), {"many": [first, empty, second], "deep": [second]}, {})
    assert asked == {
        "many": [{"image": "a.png"}, {"image": "b.png", "scale": 2.0}],
        "deep": {"image": "b.png", "scale": 2.0},
    }
    assert inputs_of(list(fields.values()), {"many": [empty], "deep": [empty]}, {"many": ["as the config says"]}) == {}
    with pytest.raises(InputError, match="is missing") as caught:
        inputs_of(list(fields.values()), {"many": [empty, {"image": None, "scale": 2.0}]}, {})
    assert caught.value.where == "Many 2: Image"


def test_every_task_that_is_installed_has_a_form() -> None:
    for offer in Plugins().all("task"):
        model = offer.extension.inputs_model()
        fields = fields_of(model)
        assert {field.name for field in fields} == set(model.model_fields), offer.extension.name
        asked = inputs_of([f for f in fields if not f.required], {f.name: shown(f, f.default) for f in fields}, {})
        assert asked == {}, "a form that nobody touched asks for nothing"


def test_what_is_changed_often_comes_first() -> None:
    fields = fields_of(DrawInputs, {"pair": [3, 4]})
    assert fields[0].name == "prompt" and fields[0].required
    assert {field.name for field in fields if not field.folded} == {"prompt", "steps", "strength", "seed", "pair"}
    assert not fields_of(DrawInputs, {"prompt": "x"})[0].required
    pair = mask_of(fields_of(PaintInputs))
    assert pair is not None and [field.name for field in pair] == ["image", "mask"]


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(), "steps": st.integers(1, 1000), "colour": st.sampled_from(["red", "blue", None]),
    "strength": st.floats(0.01, 1), "seed": st.none() | st.integers(-(2**70), 2**70), "whole": st.booleans(),
    "decode": st.sampled_from([True, False, None]),
    "names": st.lists(st.text(st.characters(codec="ascii", exclude_categories=["C", "Z"]), min_size=1), max_size=3),
    "pair": st.tuples(st.integers(), st.integers()),
}  # fmt: skip


@settings(max_examples=60)
@given(st.fixed_dictionaries(VALUES), st.fixed_dictionaries({}, optional=VALUES))
def test_what_a_form_shows_is_what_it_asks_for(values: dict[str, Any], config: dict[str, Any]) -> None:
    fields = fields_of(DrawInputs, config)
    filled = {field.name: shown(field, values[field.name]) for field in fields}
    # Numbers are typed as text, or come of sliders as they are.
    filled |= {name: str(filled[name]) for name in ("steps", "seed") if filled[name] is not None}
    asked = inputs_of(fields, filled, config)
    model = checked(DrawInputs, {**config, **asked}, where="input")
    assert model == checked(DrawInputs, values, where="input")


@pytest.mark.parametrize(
    ("name", "text"),
    [("seed", "1_0"), ("seed", "0x1"), ("seed", "nan"), ("strength", "1e999"), ("strength", "１"), ("pair", "[1,")],
)
def test_what_is_not_a_number_or_json_is_refused(name: str, text: str) -> None:
    fields = [field for field in fields_of(DrawInputs) if field.name == name]
    with pytest.raises(InputError) as refused:
        inputs_of(fields, {name: text}, {})
    assert refused.value.where == name.capitalize()


def test_a_part_of_a_step_is_not_rounded() -> None:
    asked = inputs_of(fields_of(DrawInputs, {"prompt": "x"}), {"prompt": "x", "steps": "4.5"}, {"prompt": "x"})
    with pytest.raises(ConfigError, match="steps"):
        checked(DrawInputs, asked, where="input")
