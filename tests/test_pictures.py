"""Pictures of every mode as 8 bits, and masks whose transparent parts count as black."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovforge.errors import InputError
from ovforge.model import open_picture

GREY = np.linspace(0, 255, 12 * 8).round().astype(np.uint8).reshape(8, 12)


def read(path: Path, mode: str = "L", background: str = "white") -> np.ndarray:
    return np.asarray(open_picture(path, "image", mode, background))


@pytest.mark.parametrize(
    ("pixels", "file"),
    [
        (GREY.astype(np.int32), "x.tif"),
        (GREY.astype(np.int32) * 257, "x.tif"),
        (GREY.astype(np.int32) * 8421504, "x.tif"),
        (GREY.astype(np.uint32) * 16843009, "x.tif"),
        (GREY.astype(np.float32) / 255, "x.tif"),
        (GREY.astype(np.float32), "x.tif"),
        (GREY.astype(np.float32) * 257, "x.tif"),
        (GREY.astype(np.uint16) * 257, "x.tif"),
        (GREY.astype(np.uint16) * 257, "x.png"),
        (GREY.astype(np.uint16) * 257, "x.pgm"),
    ],
)
def test_wide_pixels_are_scaled_from_the_range_that_holds_them(pixels: np.ndarray, file: str, tmp_path: Path) -> None:
    write(pixels, tmp_path / file)
    found = read(tmp_path / file)
    np.testing.assert_allclose(found, GREY, atol=1)
    np.testing.assert_array_equal(read(tmp_path / file, "RGB"), np.repeat(found[..., None], 3, 2))


def write(pixels: np.ndarray, file: Path) -> None:
    """Write grey pixels. Pillow writes no unsigned ones of 32 bits, so that the tag SampleFormat is changed."""
    unsigned = pixels.dtype == np.uint32
    Image.fromarray(pixels.view(np.int32) if unsigned else pixels).save(file)
    if unsigned:
        signed = struct.pack("<HHII", 339, 3, 1, 2)
        assert file.read_bytes().count(signed) == 1
        file.write_bytes(file.read_bytes().replace(signed, struct.pack("<HHII", 339, 3, 1, 1)))


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path) -> None:
    for file in ("x.png", "x.tif", "x.pgm"):
        write(GREY.astype(np.uint16) * 10, tmp_path / file)
        np.testing.assert_allclose(read(tmp_path / file), GREY.astype(int) * 10 / 257, atol=1)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, 1e30])
def test_pixels_without_a_range_are_refused(value: float, tmp_path: Path) -> None:
    pixels = GREY.astype(np.float32)
    pixels[0, 0] = value
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="pixel"):
        read(tmp_path / "x.tif")


def test_colours_of_other_spaces(tmp_path: Path) -> None:
    Image.new("CMYK", (2, 1), (255, 0, 255, 0)).save(tmp_path / "cmyk.tif")
    assert read(tmp_path / "cmyk.tif", "RGB")[0, 0].tolist() == [0, 255, 0]
    # sRGB's red has L* = 54.29, a* = 80.80, b* = 69.89 (CIE, D50)
    Image.new("LAB", (2, 1), (round(54.29 * 2.55), 81 + 128, 70 + 128)).save(tmp_path / "lab.tif")
    np.testing.assert_allclose(read(tmp_path / "lab.tif", "RGB")[0, 0].astype(int), [255, 0, 0], atol=6)
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=1)
    assert read(tmp_path / "p.png", "RGB")[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    assert read(tmp_path / "p.png", "RGBA")[0].tolist() == [[255, 0, 0, 255], [0, 255, 0, 0], [0, 0, 255, 255]]


@settings(max_examples=30)
@given(st.integers(0, 255), st.integers(0, 255), st.sampled_from(["LA", "RGBA", "La", "RGBa", "PA"]))
def test_a_mask_is_brightness_times_opacity(bright: int, opaque: int, mode: str) -> None:
    layer: Any = Image.new("LA", (3, 2), (bright, opaque))
    image = layer.convert("RGBA").convert(mode) if mode != "La" else layer.convert("La")
    shown = np.asarray(image.convert("LA") if mode == "La" else image.convert("RGBA").convert("LA"))[0, 0]
    found = np.asarray(open_picture(image, "mask", "L", background="black"))
    np.testing.assert_allclose(found, shown[0] * (int(shown[1]) / 255), atol=1)


def test_masks_of_every_kind_are_the_same_one(tmp_path: Path) -> None:
    white = np.zeros((8, 12), bool)
    white[2:5, 3:9] = True
    plain = Image.fromarray((white * 255).astype(np.uint8))
    clear = Image.new("LA", plain.size, (255, 0))
    clear.paste((255, 255), mask=plain)
    palette = Image.fromarray(white.astype(np.uint8), "P")
    palette.putpalette([255, 255, 255] * 2)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "la.png": (clear, {}),
        "rgba.png": (clear.convert("RGBA"), {}),
        "palette.png": (palette, {"transparency": 0}),
        "grey.png": (Image.fromarray((white * 255).astype(np.uint8) + np.uint8(0)), {"transparency": 7}),
        "bits.png": (plain.convert("1"), {}),
        "wide.png": (Image.fromarray((white * 65535).astype(np.uint16)), {}),
        "clear.png": (Image.fromarray((white + 65534).astype(np.uint16)), {"transparency": 65534}),
        "float.tif": (Image.fromarray(white.astype(np.float32)), {}),
        "colour.png": (plain.convert("RGB"), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
        found = read(tmp_path / name, background="black")
        np.testing.assert_array_equal(found, white * 255, err_msg=name)
