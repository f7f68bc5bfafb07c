"""What goes with every family of transformers, here with the later ones: tiles, low memory, previews, cancelling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from families import maker
from families import pipeline as ours
from ovforge import Use
from ovforge.store.cache import Cache

pytest.importorskip("torch")
pytest.importorskip("diffusers")

FAMILIES = ("pixart", "sana", "lumina2", "zimage")
PROMPT = "a beautiful pink unicorn, 8k"
CALL: dict[str, Any] = {"steps": 3, "width": 96, "height": 80, "seed": 3}
Folder = Callable[[str], Path]


def pixels(image: Image.Image) -> Any:
    return np.asarray(image, np.int16)


def held(pipe: Any) -> list[str]:
    """Return the roles that are in memory."""
    return [role for role, compiled in pipe.compiled.all() if compiled.model is not None]


class Stopped(Exception):
    """What a callback may raise to end a run."""


@pytest.mark.parametrize("family", FAMILIES)
def test_low_memory_previews_and_cancelling_change_nothing(
    transformer_folder: Folder, session_cache: Cache, family: str
) -> None:
    """The last preview is the picture; a run that was ended leaves nothing behind."""
    [wanted] = ours(transformer_folder(family), session_cache)(PROMPT, **CALL).images
    for low in (False, True):
        pipe = ours(transformer_folder(family), session_cache, Use("text-to-image", low_memory=low))
        seen: list[Image.Image] = []

        def look(moment: Any, seen: list[Image.Image] = seen) -> None:
            if moment.preview is not None:
                seen.extend(moment.preview())

        def stop(moment: Any) -> None:
            if moment.stage == "denoising" and moment.done == 2:
                raise Stopped

        [made] = pipe(PROMPT, **CALL, progress=look).images
        np.testing.assert_array_equal(pixels(made), pixels(wanted))
        assert [image.size for image in seen] == [(96, 80)] * 3
        np.testing.assert_array_equal(pixels(seen[-1]), pixels(wanted))
        assert (pixels(seen[0]) != pixels(wanted)).any()
        with pytest.raises(Stopped):
            pipe(PROMPT, **CALL, progress=stop)
        assert (not held(pipe)) == low
        [again] = pipe(PROMPT, **CALL).images
        np.testing.assert_array_equal(pixels(again), pixels(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles(transformer_folder: Folder, session_cache: Cache, family: str) -> None:
    """Previews and pictures are decoded in them, with the same latents, and look alike; larger tiles are closer."""
    whole = ours(transformer_folder(family), session_cache)(PROMPT, **CALL)
    off = []
    for tile in (64, 80):
        pipe = ours(transformer_folder(family), session_cache, Use("text-to-image", tile=tile, low_memory=tile == 64))
        made = pipe(PROMPT, **CALL)
        np.testing.assert_array_equal(made.latents, whole.latents)
        off.append(np.abs(pixels(made.images[0]) - pixels(whole.images[0])).mean())
    assert 0 < off[1] < off[0] < pixels(whole.images[0]).std() / 8
    np.testing.assert_array_equal(
        pixels(
            ours(transformer_folder(family), session_cache, Use("text-to-image", tile=96))(PROMPT, **CALL).images[0]
        ),
        pixels(whole.images[0]),
    )


@pytest.mark.parametrize("family", ["sana", "zimage"])
def test_pictures_are_encoded_in_tiles(
    transformer_folder: Folder, session_cache: Cache, tmp_path: Path, family: str
) -> None:
    """Those whose pictures may start from another one: the autoencoder that draws nothing, and one that draws."""
    source = (
        maker("test_sana").make_sana_pipeline(tmp_path / "sprint", sprint=True)
        if family == "sana"
        else transformer_folder(family)
    )
    small = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
    image = Image.fromarray(small).resize((96, 80), Image.Resampling.BICUBIC)
    call = {"image": image, "steps": 2, "strength": 0.6, "seed": 3}
    whole = ours(source, session_cache, "image-to-image")(PROMPT, **call)
    made = ours(source, session_cache, Use("image-to-image", tile=64, low_memory=True))(PROMPT, **call)
    difference = np.abs(pixels(made.images[0]) - pixels(whole.images[0]))
    assert 0 < difference.mean() < pixels(whole.images[0]).std() / 4
