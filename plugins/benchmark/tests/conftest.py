"""A cache that these tests share, and that no other run has filled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OVFORGE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        # Tiny tensors: torch's threads would only wait for each other, and long where others use the processors.
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
