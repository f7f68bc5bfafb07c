"""The engine: its options, and the cluster that it works on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ovforge.config import checked
from ovforge.errors import ConfigError

if TYPE_CHECKING:
    from ovforge_ray.batch import Processes
    from ovforge_ray.serving import Address, Serving

__all__ = ["BatchOptions", "ClusterOptions", "Ray", "ServeOptions", "connected"]

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


class ServeOptions(ClusterOptions):
    """Options of the engine for `ovforge serve`."""

    name: str = Field(
        "ovforge", min_length=1, description="The server's name in the cluster: one of this name is replaced."
    )
    min_replicas: int = Field(1, ge=1, description="Processes that always run.")
    max_replicas: int | None = Field(None, ge=1, description="Processes at most; by default as many as min_replicas.")
    target: float = Field(2, gt=0, description="Requests for each replica, waiting ones too, above which more start.")
    upscale_delay: float = Field(10, ge=0, description="Seconds for which that must hold.")
    downscale_delay: float = Field(300, ge=0, description="Seconds of less work after which replicas end.")
    proxies: Literal["head-only", "every-node"] = Field(
        "head-only", description="Machines that listen: the head, or each one, for a load balancer before them."
    )
    surge: bool = Field(
        False,
        description="Start new replicas beside the old ones when the server is replaced, which takes as many CPUs "
        "again; otherwise some end, and new ones take their places.",
    )
    keep: bool = Field(False, description="End when the server is ready, and let it run; `serve shutdown` ends it.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            raise ValueError("max_replicas is less than min_replicas")
        return self


class Ray:
    """The engine `ray`. `options` are KEY -> value as text; each command checks those that are for it."""

    def __init__(self, options: Mapping[str, str]) -> None:
        self._options = dict(options)

    def batch(self) -> AbstractContextManager[Processes]:
        """Return what `ovforge batch` runs items in, in a `with` block."""
        return _processes(checked(BatchOptions, self._options, where=_WHERE))

    def serve(self, serving: Serving, address: Address) -> None:
        """Serve what `ovforge serve` would, on the cluster, until a signal ends it."""
        options = checked(ServeOptions, self._options, where=_WHERE)
        with connected(options.address):
            from ovforge_ray.serving import deploy

            deploy(serving, address, options)


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
    except Exception as error:  # which Ray raises as it is, if a machine is slow to start
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
