"""What results say of themselves, files that keep their permissions, links that lead elsewhere, tables."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

import ovforge
from ovforge.errors import ConfigError, InputError, ModelError, PluginError
from ovforge.model import (
    METRICS,
    PICTURE_SUFFIXES,
    FileSource,
    ImagesResult,
    ModelBundle,
    Result,
    Timings,
    read_provenance,
    values_as_json,
)
from ovforge.run.resolution import read_pipeline
from ovforge.store import atomic_file, atomic_folder, atomic_write, csv_table


@dataclass
class Labels(Result):
    """A result as a third-party task would write it."""

    label: str = ""
    scores: dict[str, Any] = field(default_factory=dict)


class Settings(BaseModel):
    size: tuple[int, int] = (3, 4)


def picture(seed: int = 0, size: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8))


# -- what a result says -----------------------------------------------------------------------------------------------


def test_a_result_with_fields_of_its_own_needs_no_more(tmp_path: Path) -> None:
    one = Labels(label="cat", scores={"cat": np.float32(0.5), "all": np.array([1, 2])}, provenance={"x": Path("y")})
    assert one.as_json() == {"label": "cat", "scores": {"cat": 0.5, "all": [1, 2]}}
    assert one.lines() == ["label: cat", 'scores: {"cat": 0.5, "all": [1, 2]}']
    [file] = one.save(tmp_path / "x.json")
    assert json.loads(file.read_text()) == {"result": one.as_json(), "provenance": {"x": "y"}}
    assert one.preview() is None and not one.is_empty() and Labels().is_empty() and not Result().is_empty()
    same, other = Labels(label="cat", scores=dict(one.scores)), Labels(label="dog")
    assert (one.compare(same), one.compare(other)) == (1.0, 0.0)
    with pytest.raises(InputError, match="'ssim' is not a metric"):
        one.compare(same, "ssim")
    with pytest.raises(InputError, match=r"cannot write \.png"):
        one.save(tmp_path / "x.png")
    assert Labels(scores={"x": Timings}).lines()[1].startswith("scores: {'x': <class")
    assert Labels(label="two\nlines").lines() == ["label: two\nlines", "scores: {}"]


def test_values_as_json() -> None:
    value = {"a": {3, 1}, "b": Settings(), "c": (np.int64(2), None, True), "d": picture(), "e": Timings}
    with pytest.raises(PluginError, match="has no form in JSON") as raised:
        values_as_json(value, "input")
    assert raised.value.where == "input.e"
    del value["e"]
    found = values_as_json(value)
    assert found["a"] == [1, 3] and found["b"] == {"size": [3, 4]} and found["c"] == [2, None, True]
    assert found["d"].startswith("sha256:")


def test_pictures_are_compared_by_every_metric() -> None:
    one, other = ImagesResult(images=[picture(), picture(1)]), ImagesResult(images=[picture(), picture(2)])
    assert one.metrics == tuple(METRICS) and ImagesResult().metrics == () and ImagesResult().is_empty()
    for name, metric in METRICS.items():
        assert one.compare(one, name) == metric.perfect
        arrays = [[np.asarray(image) for image in result.images] for result in (one, other)]
        assert one.compare(other, name) == np.mean([metric.measure(*pair) for pair in zip(*arrays, strict=True)])
    with pytest.raises(InputError, match="pictures of 24x24, 24x24 pixels cannot be compared with pictures of 24x24"):
        one.compare(ImagesResult(images=[picture()]))
    held = ImagesResult(images=[picture()], latents=np.zeros((1, 4, 3, 3), np.float32))
    assert held.compact().latents is None and held.latents is not None


PROVENANCE = {"config": {"task": "x"}, "inputs": {"prompt": "é \u202e \0 \x1b[31m 猫", "seed": 3}}


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_pictures_carry_what_they_were_made_with(suffix: str, tmp_path: Path) -> None:
    result = ImagesResult(images=[picture(), picture(1)], seeds=[3, 4], provenance=PROVENANCE)
    files = result.save(tmp_path / f"x{suffix}")
    assert [file.name for file in files] == [f"x-1{suffix}", f"x-2{suffix}"]
    with Image.open(files[1]) as image:
        assert image.size == (24, 24)
    if suffix == ".bmp":
        assert [warning.partition(" does not carry")[0] for warning in result.warnings] == [str(file) for file in files]
        with pytest.raises(InputError, match="carries no ovforge provenance"):
            read_provenance(files[0])
        return
    assert result.warnings == []
    for number, file in enumerate(files):
        inputs = {**PROVENANCE["inputs"], "seed": 3 + number, "count": 1}
        assert read_provenance(file) == {**PROVENANCE, "inputs": inputs}


def test_provenance_that_a_jpeg_cannot_hold_is_named(tmp_path: Path) -> None:
    long = {**PROVENANCE, "inputs": {"prompt": "x" * 70_000}}
    result = ImagesResult(images=[picture().convert("RGBA")], provenance=long)
    result.save(tmp_path / "x.jpg")
    assert "no room" in result.warnings[0]
    result.save(tmp_path / "x.webp")
    assert read_provenance(tmp_path / "x.webp") == long


@given(st.binary(max_size=200))
def test_other_programs_comments_are_not_ours(comment: bytes) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + comment
    for kind, options in (("JPEG", {"exif": exif}), ("GIF", {"comment": comment})):
        buffer = io.BytesIO()
        picture().convert("RGB").save(buffer, kind, **options)
        with pytest.raises(InputError):
            read_provenance(buffer)  # type: ignore[arg-type]


def test_wholes_stand_before_their_parts() -> None:
    timings = Timings()
    for name, seconds in [("text.tokenizer", 1.0), ("text", 3.0), ("b.unet", 4.0), ("b.vae", 4.0), ("a.b.c", 1.0), ("b", 5.0)]:  # fmt: skip
        timings.add(name, seconds)
    rows = [(row.name, row.depth, row.side_by_side) for row in timings.rows()]
    assert rows == [("text", 0, False), ("text.tokenizer", 1, False), ("b", 0, False), ("b.unet", 1, True),
                    ("b.vae", 1, True), ("a.b.c", 0, False)]  # fmt: skip
    assert timings.whole() == 9.0
    assert str(timings).splitlines()[-1].split() == ["total", "9.000", "s"]
    timings.elapsed = 10.0
    assert timings.whole() == 10.0


# -- files ------------------------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_do_not_widen(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "new", b"1")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "a").write_bytes(b"1")
            (folder / "b").write_bytes(b"1")
        assert (mode(tmp_path / "new"), mode(tmp_path / "folder"), mode(tmp_path / "folder" / "a")) == (
            0o640,
            0o750,
            0o640,
        )
        os.umask(0o002)
        (tmp_path / "new").chmod(0o600)
        (tmp_path / "folder").chmod(0o700)
        (tmp_path / "folder" / "a").chmod(0o604)
        atomic_write(tmp_path / "new", b"2")
        with atomic_folder(tmp_path / "folder", replace=True) as folder:
            (folder / "a").write_bytes(b"2")
            (folder / "b").write_bytes(b"2")
            (folder / "b").chmod(0o600)
            (folder / "c").write_bytes(b"2")
        assert (mode(tmp_path / "new"), mode(tmp_path / "folder")) == (0o600, 0o700)
        assert [mode(tmp_path / "folder" / name) for name in "abc"] == [0o604, 0o600, 0o664]
        assert (tmp_path / "new").read_bytes() == (tmp_path / "folder" / "a").read_bytes() == b"2"
    finally:
        os.umask(before)


def folder_with(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_links_that_lead_elsewhere_are_not_copied(tmp_path: Path) -> None:
    secret = folder_with(tmp_path / "home", "id_rsa", "keys.json", "deep/config.json")
    model = folder_with(tmp_path / "model", "model_index.json", "unet/config.json")
    (model / "model_index.json").write_text("{}")
    (model / "unet" / "config.json").write_text("{}")
    (model / "notes.json").symlink_to(secret / "keys.json")
    (model / "unet" / "vocab.json").symlink_to(secret / "keys.json")
    (model / "tokenizer").symlink_to(secret)
    (model / "round").symlink_to(model)
    (model / "weights.bin").symlink_to(secret / "id_rsa")
    (model / "gone.json").symlink_to(secret / "gone.json")
    (model / "circle.bin").symlink_to(model / "circle.bin")
    with pytest.warns(
        UserWarning,
        match=r"not followed: circle.bin, gone.json, notes.json, round, tokenizer, unet/vocab.json, weights",
    ):
        bundle = ModelBundle.open(FileSource(model))
    assert set(bundle.small_files()) <= {"unet/config.json", "model_index.json"}


def test_links_of_the_hub_and_of_parts_are_followed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    cache = folder_with(tmp_path / "models--a--b", "blobs/1", "blobs/2", "snapshots/rev/own.txt", "refs/main")
    snapshot = cache / "snapshots" / "rev"
    (snapshot / "unet").mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "unet" / "model.safetensors").symlink_to("../../../blobs/2")
    part = folder_with(tmp_path / "elsewhere", "tokenizer_config.json", "vocab.txt", "id_rsa", "more/x.json", ".env")
    (snapshot / "tokenizer").symlink_to(part)
    (snapshot / "unet_2").symlink_to(snapshot / "unet")
    big = folder_with(tmp_path / "big", "w.safetensors")
    (snapshot / "w.safetensors").symlink_to(big / "w.safetensors")
    (tmp_path / "link").symlink_to(snapshot)
    for root in (snapshot, tmp_path / "link"):
        assert list(FileSource(root).files()) == [
            "config.json", "own.txt", "tokenizer/tokenizer_config.json", "tokenizer/vocab.txt", "unet/model.safetensors",
            "unet_2/model.safetensors", "w.safetensors",
        ]  # fmt: skip
    assert FileSource(snapshot / "unet").read("model.safetensors") == b"blobs/2"
    assert not recwarn.list


CELLS = st.text(
    st.sampled_from(["=", "+", "-", "@", "\t", "\r", "\n", " ", "a", '"', ",", "1", ".", "＝", "\0", "\ud800"])
)


@given(st.lists(st.lists(CELLS | st.floats(allow_nan=False), min_size=2, max_size=2), max_size=5))
def test_a_table_holds_no_formula(rows: list[list[Any]]) -> None:
    text = csv_table(rows)
    text.encode()
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert len(read) == len(rows)
    for cells, written in zip(rows, read, strict=True):
        for cell, found in zip(cells, written, strict=True):
            if isinstance(cell, float):
                assert float(found) == cell
            elif found.lstrip(" ")[:1] in tuple("=+-@\t\r\n＝"):
                assert float(found) == float(cell), "a number"
            elif "\0" not in cell and "\ud800" not in cell:
                assert found.removeprefix("'") == cell.replace("\r", "\\r")


@pytest.mark.parametrize(("version", "newer"), [("99.1.0", True), ("0.0.9", False), ("odd", False)])
def test_a_picture_of_a_newer_version_says_so(tmp_path: Path, version: str, newer: bool) -> None:
    provenance = {
        "config": {"task": "text-to-image", "load": "m", "new_key": 1},
        "inputs": {"prompt": "a cat"},
        "versions": {"ovforge": version},
    }
    ImagesResult(images=[picture()], seeds=[3], provenance=provenance).save(tmp_path / "x.png")
    with pytest.raises(ConfigError, match="unknown key `new_key`") as raised:
        read_pipeline(tmp_path / "x.png")
    assert (f"ovforge {version} made the picture" in str(raised.value.hint)) == newer


def test_a_source_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('task = "detect"\nload = "models/x"\ninput = {image = "a.png"}\n')
    with pytest.raises(ModelError, match="models/x: no such file or folder") as raised:
        ovforge.load(tmp_path / "a.toml", cache=None)
    assert str(tmp_path / "models" / "x") in str(raised.value.hint)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    target, full = tmp_path / "report.md", Path("/dev/full")
    with pytest.raises(OSError, match="report.md") as raised, atomic_file(target), full.open("wb", 0) as file:
        file.write(b"1")
    assert raised.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir()), "nothing of it is left"
