"""Which cases of long sweeps are run: every third, or all of them with --all-cases. No test needs a speed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ovforge",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
settings.load_profile("ovforge")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--all-cases", action="store_true", help="run every case of the tests that are marked as sweeps")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out two of three cases of each sweep. They do the same with other values, and take a fifth of the time."""
    if config.getoption("--all-cases"):
        return
    seen: Counter[str] = Counter()
    kept, left_out = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        name = item.nodeid.partition("[")[0]
        out = item.get_closest_marker("sweep") is not None and seen[name] % 3 > 0
        seen[name] += 1
        (left_out if out else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
