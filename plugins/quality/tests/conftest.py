"""Small pipelines with random weights, and a cache of the test's own."""

from __future__ import annotations

from conftest import _own_cache, cache, session_cache, torch_sd

__all__ = ["_own_cache", "cache", "session_cache", "torch_sd"]
