"""The plugin keeps ovforge's contract, and the command says what it should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ovforge import testing
from ovforge.errors import InputError
from PIL import Image

import ovforge_my_plugin


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[str, str]:
    """Return two pictures that differ by 16 of 255 everywhere."""
    for name, value in (("first.png", 100), ("second.png", 116)):
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / name)
    return str(tmp_path / "first.png"), str(tmp_path / "second.png")


def test_contract() -> None:
    testing.check_plugin(ovforge_my_plugin)
    testing.check_command(ovforge_my_plugin, "my-plugin")


def test_it_prints_the_score(pictures: tuple[str, str]) -> None:
    first, second = pictures
    same = testing.check_command(ovforge_my_plugin, "my-plugin", [first, first, "--json"])
    assert json.loads(same) == {"metric": "ssim", "score": pytest.approx(1)}
    printed = testing.check_command(ovforge_my_plugin, "my-plugin", [first, second, "--metric", "psnr"])
    assert printed == f"psnr {20 * np.log10(255 / 16):.4f}\n"


def test_it_fails_below_the_minimum(pictures: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="exit code 1"):
        testing.check_command(ovforge_my_plugin, "my-plugin", [*pictures, "--metric", "psnr", "--min", "90"])


def test_what_it_cannot_compare_is_refused(pictures: tuple[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(InputError, match="32x32 and 8x8"):
        testing.check_command(ovforge_my_plugin, "my-plugin", [pictures[0], str(tmp_path / "small.png")])
    with pytest.raises(InputError, match="not a known metric"):
        testing.check_command(ovforge_my_plugin, "my-plugin", [*pictures, "--metric", "taste"])
