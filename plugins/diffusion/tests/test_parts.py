"""The parts of the tasks: prompts with weights, tiles, latents, conditions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovforge.config.options import checked
from ovforge.errors import ConfigError, InputError
from ovforge_diffusion.controls import canny
from ovforge_diffusion.inputs import ImageToImageInputs, InpaintingInputs
from ovforge_diffusion.latents import read_latents
from ovforge_diffusion.prompts import parse
from ovforge_diffusion.resizing import resized_mask
from ovforge_diffusion.vae import _fade, _starts, _tiled

TEXT = st.text(st.characters(blacklist_characters="\\()[]:"), max_size=12).filter(lambda text: "BREAK" not in text)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a (red:1.5) cat", [("a ", 1), ("red", 1.5), (" cat", 1)]),
        ("((a)) [b]", [("a", 1.21), (" ", 1), ("b", 1 / 1.1)]),
        ("(a (big:2) cat:0.5)", [("a ", 0.5), ("big", 1.0), (" cat", 0.5)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        ("a) b] (c", [("a) b] ", 1), ("c", 1.1)]),
        ("at 8:30, ratio 3:2", [("at 8:30, ratio 3:2", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:1.5)", [("a:1.5)", 1 / 1.1)]),
        ("", []),
    ],
)
def test_weights_are_read_as_the_web_ui_does(prompt: str, wanted: list[tuple[str, float]]) -> None:
    spans = parse(prompt)
    assert [span.text for span in spans] == [text for text, _ in wanted]
    assert [span.weight for span in spans] == pytest.approx([weight for _, weight in wanted])


@given(st.lists(st.tuples(TEXT.filter(bool), st.floats(0.1, 3).map(lambda value: round(value, 2))), max_size=6))
def test_written_weights_are_read_again(parts: list[tuple[str, float]]) -> None:
    spans = parse("".join(f"({text}:{weight})" for text, weight in parts))
    assert "".join(span.text for span in spans) == "".join(text for text, _ in parts)
    flat = [(letter, span.weight) for span in spans for letter in span.text]
    assert flat == [(letter, pytest.approx(weight)) for text, weight in parts for letter in text]


def test_break_ends_a_chunk() -> None:
    assert [(span.text, span.ends_chunk) for span in parse("a BREAK b")] == [("a ", False), ("", True), (" b", False)]
    assert [span.text for span in parse("BREAKFAST")] == ["BREAKFAST"]


@given(length=st.integers(1, 400), side=st.integers(4, 130), unit=st.sampled_from([1, 8]))
def test_tiles_cover_everything_and_overlap(length: int, side: int, unit: int) -> None:
    length, side = length * unit, side * unit
    starts = list(_starts(length, side, unit))
    assert starts[0] == 0
    assert starts[-1] == max(length - side, 0)
    assert all(start % unit == 0 for start in starts)
    assert all(0 < b - a <= side - side // 4 + unit for a, b in itertools.pairwise(starts))


def test_fades_are_never_zero() -> None:
    for length in (1, 2, 3, 8, 33):
        assert (_fade(length, True, True) > 0).all()


@settings(max_examples=40)
@given(height=st.integers(5, 60), width=st.integers(5, 60), side=st.integers(4, 40), seed=st.integers(0, 99))
def test_tiles_of_a_local_function_make_the_whole(height: int, width: int, side: int, seed: int) -> None:
    """What looks at one place alone is the same in tiles, to rounding: nothing is lost, doubled or moved."""

    def run(sample: Any) -> Any:
        return np.repeat(np.repeat(np.tanh(sample * 2), 2, 1), 2, 2)

    sample = np.random.default_rng(seed).standard_normal((3, height, width)).astype(np.float32)
    tiled = _tiled(sample, run, side if max(height, width) > side else None, 2)
    np.testing.assert_allclose(tiled, run(sample), atol=1e-6)


def test_latents_from_npy_text_and_arrays(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1, 4, 2, 3)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    np.savetxt(tmp_path / "a.txt", values.ravel())
    for given_ in (values, values[0], tmp_path / "a.npy", tmp_path / "a.txt"):
        read = read_latents(given_, (2, 4, 2, 3))
        np.testing.assert_allclose(read, np.concatenate([values, values]), atol=1e-7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1 2 x", "no latents can be read"),
        (b"1 2 3", "shape"),
        (b"nan " * 24, "not finite"),
        (None, "no such file"),
    ],
)
def test_bad_latents_are_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "latents.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_latents(file, (1, 4, 2, 3))
    assert "latents.txt" in str(raised.value)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read as an array"):
        read_latents(tmp_path / "evil.npy", (1, 4, 2, 3))


def test_edges_are_opencvs_own() -> None:
    cv2 = pytest.importorskip("cv2")
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[4:12, 6:18] = (200, 30, 90)
    made = np.asarray(canny(Image.fromarray(pixels), 50, 150))
    np.testing.assert_array_equal(made, np.repeat(cv2.Canny(pixels, 50, 150)[:, :, None], 3, 2))
    assert 0 < made.mean() < 128


def test_pictures_are_checked() -> None:
    with pytest.raises(ConfigError, match="mask"):
        checked(InpaintingInputs, {"prompt": "x", "image": "m.png"}, where="input")
    with pytest.raises(ConfigError, match="only its digest is known"):
        checked(ImageToImageInputs, {"prompt": "x", "image": "sha256:00"}, where="input")
    with pytest.raises(ConfigError, match="must be uint8"):
        checked(ImageToImageInputs, {"prompt": "x", "image": [np.zeros((4, 4, 3))]}, where="input")


def test_transparent_parts_of_a_mask_stay() -> None:
    strokes = np.zeros((24, 16), bool)
    strokes[4:12, 3:9] = True
    clear = np.where(strokes[..., None], np.uint8(255), np.array([255, 255, 255, 0], np.uint8))
    for size in ((16, 24), (8, 16)):
        one, other = (
            np.asarray(resized_mask(Image.fromarray(mask), "mask", *size))
            for mask in (strokes.astype(np.uint8) * 255, clear)
        )
        np.testing.assert_array_equal(one, other)
        assert 0 < (one > 127).mean() < 0.5
