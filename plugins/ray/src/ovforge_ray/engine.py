"""The engine: its options, and the cluster that it works on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from ovforge.config import checked
from ovforge.errors import ConfigError

if TYPE_CHECKING:
    from ovforge_ray.batch import Processes

__all__ = ["BatchOptions", "ClusterOptions", "Ray", "connected"]

_WHERE = "--engine-option"

_PATIENCE = 10.0
"""Seconds in which a cluster must answer."""


class ClusterOptions(BaseModel):
    """What batches and servers have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str | None = Field(
        None,
        description="The cluster, HOST:PORT or auto. By default RAY_ADDRESS, else the one that runs on this machine, "
        "else a new one of this machine alone.",
    )
    cpus: float = Field(1, gt=0, description="CPUs that one process or replica takes of the cluster.")
    cache: str | None = Field(
        None, description="URL (fsspec) of a cache that all machines share: what one has made, no other makes again."
    )


class BatchOptions(ClusterOptions):
    """Options of the engine for `ovforge batch`."""


class Ray:
    """The engine `ray`. `options` are KEY -> value as text; each command checks those that are for it."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._options = dict(options)

    def batch(self) -> AbstractContextManager[Processes]:
        """Return what `ovforge batch` runs items in, in a `with` block."""
        return _processes(checked(BatchOptions, self._options, where=_WHERE))


@contextmanager
def _processes(options: BatchOptions) -> Iterator[Processes]:
    with connected(options.address):
        from ovforge_ray.batch import Processes

        yield Processes(options)


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Give ray, connected to a cluster in the block. Raises ConfigError if none answers there.

    A cluster that is started here has no dashboard, and reports nothing to Ray's makers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints what befalls workers on standard output, which is the command's, and has no other switch for it.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    if ray.is_initialized():
        yield ray
        return
    try:
        _check_answers(address or os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            address=address, namespace="ovforge", include_dashboard=False, log_to_driver=False, logging_level="ERROR"
        )
    except (RuntimeError, ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"the cluster does not take us: {lines[0]}", where=f"{_WHERE} address={address or 'auto'}",
            hint="Check the address, and that Ray and Python have the same versions everywhere; `ray status` looks.",
        ) from error  # fmt: skip
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise OSError if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    import ray.util

    host, _, port = address.rpartition(":")
    if not host or "://" in address or not port.isdecimal():
        return
    if host in ("localhost", "127.0.0.1"):
        host = ray.util.get_node_ip_address()  # which Ray takes these for
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
        pass
