"""A cache that these tests share, and that no other run has filled."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("OVFORGE_CACHE_DIR")
    os.environ["OVFORGE_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["OVFORGE_CACHE_DIR"]
    else:
        os.environ["OVFORGE_CACHE_DIR"] = before
