"""Configs: every way of writing one, and errors that name the key."""

from __future__ import annotations

import contextlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from ovforge.config.files import apply_overrides, read_config
from ovforge.config.options import InputFile, input_files, validate_options
from ovforge.config.pipeline import PipelineConfig, Use
from ovforge.errors import ConfigError

SHORT: dict[str, Any] = {"task": "text-to-image", "load": "models/lcm", "scheduler": "lcm"}
NAMES = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
OPTIONS = st.dictionaries(
    NAMES.filter(lambda name: name not in ("use", "source")), st.integers() | st.text() | st.booleans()
)


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: InputFile
    scale: float = 1.0


def test_short_and_long_forms_say_the_same() -> None:
    long = {
        "task": {"use": "text-to-image"},
        "load": {"source": "models/lcm"},
        "scheduler": {"use": "lcm"},
        "device": {},
    }
    assert PipelineConfig.of(SHORT) == PipelineConfig.of(long)
    program = PipelineConfig(task="text-to-image", load=Path("models/lcm"), scheduler=Use("lcm"))  # type: ignore[arg-type]
    assert program == PipelineConfig.of(SHORT)


@given(name=NAMES, options=OPTIONS, task=NAMES, inputs=OPTIONS)
def test_what_is_written_is_read(name: str, options: dict[str, Any], task: str, inputs: dict[str, Any]) -> None:
    config = PipelineConfig.of(
        {"task": task, "load": {"source": "x", **options}, "transform": [{"use": name, **options}], "input": inputs}
    )
    assert PipelineConfig.of(json.loads(json.dumps(config.as_dict()))) == config


def test_toml_and_json_give_one_config(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('task = "t"\n[load]\nsource = "m"\n[[transform]]\nuse = "lora"\nscale = 0.5\n')
    (tmp_path / "a.json").write_text(
        json.dumps({"task": "t", "load": {"source": "m"}, "transform": [{"use": "lora", "scale": 0.5}]})
    )
    assert read_config(tmp_path / "a.toml") == read_config(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("scheduler.use=ddim", ("scheduler", "use"), "ddim"),
        ("load.source=other", ("load", "source"), "other"),
        ("device.precision=f32", ("device", "precision"), "f32"),
        ("input.steps=4", ("input", "steps"), 4),
        ("input.prompt=a pink unicorn, 8k", ("input", "prompt"), "a pink unicorn, 8k"),
        ("input.seed=[1, 2]", ("input", "seed"), [1, 2]),
        ("strict=false", ("strict",), False),
        ("transform.0.use=lora", ("transform", 0, "use"), "lora"),
    ],
)
def test_overrides(override: str, path: tuple[Any, ...], value: Any) -> None:
    target: Any = apply_overrides(SHORT, [override])
    for key in path:
        target = target[key]
    assert target == value
    assert "device" not in SHORT, "the config given stays as it was"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedulr": "lcm"}, "unknown key `schedulr`. Did you mean 'scheduler'?"),
        ({"load": {}}, "the key `load.source` is missing"),
        ({"strict": "perhaps"}, "`strict`"),
        ({"input": 3}, "`input`"),
        ({"transform": [{"scale": 1}]}, "the key `transform.0.use` is missing"),
        ({"task": 3}, "`task`"),
    ],
)
def test_errors_name_file_key_and_what_would_be_right(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        PipelineConfig.of({**SHORT, **change}, where="my.toml")
    assert str(raised.value).startswith("my.toml: ")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", b"task = ", "not valid TOML"),
        ("a.toml", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b"[1]", "expected a JSON object"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "nothing.toml")


@pytest.mark.parametrize("override", ["scheduler", "=3", "transform.x.use=lora", "transform.5.use=lora", "strict.a=1"])
def test_bad_overrides_are_errors(override: str) -> None:
    with pytest.raises(ConfigError):
        apply_overrides({**SHORT, "transform": [], "strict": True}, [override])


def test_options_are_checked_by_their_own_model_and_paths_start_at_the_config(tmp_path: Path) -> None:
    checked = validate_options(Options, {"path": "a.safetensors"}, where="transform.0 (lora)", base=tmp_path)
    assert input_files(checked) == [tmp_path / "a.safetensors"]
    with pytest.raises(ConfigError, match=r"transform.0 \(lora\): unknown key `scal`. Did you mean 'scale'\?"):
        validate_options(Options, {"path": "a", "scal": 1}, where="transform.0 (lora)")
    with pytest.raises(ConfigError, match="takes no options"):
        validate_options(None, {"a": 1}, where="x")


def test_the_shipped_example_is_a_config() -> None:
    example = Path(__file__).parents[1] / "examples" / "unicorn.toml"
    assert PipelineConfig.of(tomllib.loads(example.read_text())).input["seed"] == 1234567


class Typed(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str | list[str] = ""
    seed: int | list[int] | None = None
    steps: int = 1
    strength: float = 1.0
    tiled: bool = False
    size: tuple[int, int] = (1, 1)
    names: tuple[str, ...] = ()
    scales: dict[str, float] = {}
    parts: list[Use] = []
    mask: Path | None = None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt", 42, "`prompt` should be text or a list of texts, not 42"),
        ("seed", "abc", "`seed` should be a whole number or a list of whole numbers, not 'abc'"),
        ("seed", [1, "a"], "`seed.1` should be a whole number, not 'a'"),
        ("steps", 1.5, "`steps` should be a whole number, not 1.5"),
        ("strength", "much", "`strength` should be a number, not 'much'"),
        ("tiled", "perhaps", "`tiled` should be true or false, not 'perhaps'"),
        ("size", 5, "`size` should be a list, not 5"),
        ("size", [5], "`size` has too few values"),
        ("size", [5, 6, 7], "`size` should have at most 2 values, not 3"),
        ("size", [5, "x"], "`size.1` should be a whole number, not 'x'"),
        ("names", "one", "`names` should be a list, not 'one'"),
        ("scales", 1, "`scales` should be a table, not 1"),
        ("scales", {"unet": "a"}, "`scales.unet` should be a number, not 'a'"),
        ("parts", [3], "`parts.0` should be a name or a table, not 3"),
        ("mask", True, "`mask` should be a path, not true"),
        ("prompts", "x", "unknown key `prompts`. Did you mean 'prompt'?"),
    ],
)
def test_wrong_types_are_told_in_plain_words(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate_options(Typed, {key: value}, where="input")
    assert raised.value.what == message


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_no_error_speaks_of_pydantic_or_python(value: Any) -> None:
    for key in Typed.model_fields:
        with contextlib.suppress(ConfigError):
            validate_options(Typed, {key: value}, where="input")
            continue
        with pytest.raises(ConfigError) as raised:
            validate_options(Typed, {key: value}, where="input")
        what = raised.value.what
        assert what.startswith(f"`{key}")
        assert not re.search(r"valid|tuple|dict|instance|\[int\]|string", what.partition(", not ")[0]), what


def test_a_number_for_a_text_is_told_how_to_quote() -> None:
    with pytest.raises(ConfigError) as raised:
        validate_options(Typed, {"prompt": 42}, where="input")
    assert "'prompt=\"42\"'" in str(raised.value.hint)
    assert apply_overrides({}, ['input.prompt="42"']) == {"input": {"prompt": "42"}}


@pytest.mark.parametrize("device", ["GPU", {"use": "GPU"}, Use("GPU")])
def test_a_device_may_be_written_as_openvino_does(device: Any) -> None:
    assert PipelineConfig.of({**SHORT, "device": device}).device == Use("gpu")
    assert PipelineConfig.of({**SHORT, "device": {"use": "CPU", "threads": 2}}).device == Use("cpu", threads=2)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf" + b'task = "t"\nload = "m"\n')
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"task": "t", "load": "m"}')
    assert read_config(tmp_path / "a.toml") == read_config(tmp_path / "a.json") == {"task": "t", "load": "m"}
