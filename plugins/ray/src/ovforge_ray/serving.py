"""A server as Ray Serve's replicas: each is the whole application, with its pipelines loaded before it is asked."""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ovforge.cli import print_line
from ovforge.errors import ConfigError
from ovforge_ray.cache import shared_cache

if TYPE_CHECKING:
    from pathlib import Path

    from ovforge.store import Cache
    from ovforge_ray.engine import ServeOptions

__all__ = ["Address", "Serving", "deploy"]

_WHERE = "--engine-option"
_PROXIES = {"head-only": "HeadOnly", "every-node": "EveryNode"}
_ANSWERS = 15.0
"""Seconds in which what was deployed must be reached."""


class Settings(Protocol):
    """What Ray has to know of a server's settings."""

    queue: int
    timeout: float
    threads: int
    batch: int


class Serving(Protocol):
    """What `ovforge serve` gives: a server by value."""

    settings: Settings
    cache: str | None

    def app(self, cache: Cache | None = None) -> Any:
        """Return the ASGI application, when all is loaded."""


class Address(Protocol):
    """Where to listen, and with which certificate."""

    host: str
    port: int
    certificate: Path | None
    private_key: Path | None


class Replica:
    """One process: the application, which Ray asks for when the process has started."""

    def __init__(self, serving: Serving, cache: str | None) -> None:
        self._serving, self._cache = serving, cache

    def __serve_build_asgi_app__(self) -> Any:
        cache = shared_cache(self._cache) if self._cache else None
        app = self._serving.app(cache)
        logging.getLogger("ovforge.ray").warning("ready: %s", cache.told() if cache else "no shared cache")
        return app


def deploy(serving: Serving, address: Address, options: ServeOptions) -> None:
    """Serve on the cluster, instead of the server that has that name; until a signal, unless `keep` says so.

    Old replicas finish what they do, a fifth of them at a time, and new ones are asked when they are ready.
    """
    if options.cache and serving.cache is None:
        raise ConfigError("cache=URL is given, and --no-cache", where=_WHERE, hint="Leave one out.")
    if address.port == 0:
        raise ConfigError("Ray needs to be told a port", where="--port 0", hint="Name one that is free.")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # it writes to the terminal; what counts is in Ray's logs
    stopped = threading.Event()
    if not options.keep:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
    try:
        serve.start(proxy_location=_PROXIES[options.proxies], http_options=_http(serving, address))
        serve.run(_deployment(serving, options), name=options.name, route_prefix="/")
    except (RayError, RayServeException, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the server did not start: {_reason(options.name, error)}", where=f"{_WHERE} name={options.name}",
            hint="`serve status` and Ray's logs say more.",
        ) from error  # fmt: skip
    _check_reached(address)
    print_line(f"{'https' if address.certificate else 'http'}://{address.host}:{address.port}")
    if not options.keep:
        while not stopped.wait(0.5):
            pass
        serve.delete(options.name)
        if not serve.status().applications:
            serve.shutdown()


def _http(serving: Serving, address: Address) -> dict[str, Any]:
    return {
        "host": address.host,
        "port": address.port,
        "request_timeout_s": serving.settings.timeout,
        "ssl_certfile": str(address.certificate) if address.certificate else None,
        "ssl_keyfile": str(address.private_key) if address.private_key else None,
    }


def _deployment(serving: Serving, options: ServeOptions) -> serve.Application:
    """Return the application as Ray Serve has it.

    A replica has as many requests as it can work at, and one more. All others wait at the proxy, which gives each to
    the next replica that is free, and refuses those that are too many: so few are lost with a replica.
    """
    settings = serving.settings
    most = options.max_replicas or options.min_replicas
    scale: dict[str, Any] = {"num_replicas": options.min_replicas}
    if most > options.min_replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.min_replicas,
                "max_replicas": most,
                "target_ongoing_requests": options.target,
                "upscale_delay_s": options.upscale_delay,
                "downscale_delay_s": options.downscale_delay,
            }
        }
    deployment = serve.deployment(
        name="ovforge",
        ray_actor_options={"num_cpus": options.cpus},
        max_ongoing_requests=max(settings.threads, settings.batch) + 1,
        max_queued_requests=settings.queue,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        graceful_shutdown_timeout_s=settings.timeout,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=2,
        max_surge_percent=100 if options.surge else 0,
        **scale,
    )
    return deployment(serve.ingress()(Replica)).bind(serving, options.cache)


def _check_reached(address: Address) -> None:
    """Raise ConfigError if nobody listens: Serve keeps the address that it was first started with."""
    host = ray.util.get_node_ip_address() if address.host in ("0.0.0.0", "::") else address.host
    until = time.monotonic() + _ANSWERS
    while True:
        try:
            with socket.create_connection((host, address.port), timeout=_ANSWERS):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise ConfigError(
                    f"the server runs, and is not reached from here: {error}", where=f"{address.host}:{address.port}",
                    hint="If Serve ran with another address before, end it: serve shutdown. Else name a --host that "
                    "this machine reaches, or run the command on the cluster's head.",
                ) from error  # fmt: skip
        time.sleep(0.2)


def _reason(name: str, error: Exception) -> str:
    """Return the last line of what Serve says of a server that did not start."""
    try:
        told = [each.message for each in serve.status().applications[name].deployments.values() if each.message]
    except (RayError, RayServeException, KeyError):
        told = []
    lines = [line.strip() for line in (told[0] if told else str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
