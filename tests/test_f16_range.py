"""Every family of transformers computes the same with its values divided, as if they had left float16's range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from families import TRANSFORMERS, make_transformer, pipeline
from ovforge import Use
from ovforge.store.cache import Cache

pytest.importorskip("torch")


@pytest.mark.parametrize("family", sorted(TRANSFORMERS))
def test_pictures_stay(family: str, torch_lcm: Path, session_cache: Cache, tmp_path: Path) -> None:
    source = make_transformer(tmp_path / "model", family, torch_lcm)
    size = {"width": 24, "height": 16, "guidance_scale": 2.0, "steps": 2, "seed": 3}
    plain = pipeline(source, session_cache)
    divided = pipeline(
        source, session_cache, quantize=[Use("f16-range", headroom=4096)],
        calibration={"runs": 1, "inputs": [{"prompt": "a fox", **size}]},
    )  # fmt: skip
    wanted, made = (np.asarray(pipe("a red car", **size).images[0], np.int16) for pipe in (plain, divided))
    assert np.abs(made - wanted).max() <= 1
    (report,) = (one for one in divided.reports if any("divided by" in line for line in one.applied))
    assert "transformer" in report.roles, report.notes
