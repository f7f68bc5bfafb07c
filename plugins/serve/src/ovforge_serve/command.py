"""`ovforge serve`: pipelines over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovforge.cli import EMBEDDED, Engine, EngineOptions, Trust
from ovforge.errors import ConfigError, InputError

__all__ = ["serve"]

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
_CONNECTIONS = 1000


def serve(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]CONFIG|MODEL...",
            help="Configs of pipelines (.toml, .json), and models; a name is the file's.",
        ),
    ],
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0: one that is free.")] = 8000,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of every pipeline.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Where models that are not configs run: CPU, GPU.1, NPU, AUTO:GPU,CPU.")
    ] = "CPU",
    keys: Annotated[
        Path | None, typer.Option("--keys", help="A file of API keys, one a line: NAME KEY [REQUESTS AT A TIME].")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Listen on other addresses although there are no keys.")
    ] = False,
    certificate: Annotated[Path | None, typer.Option("--tls-cert", help="TLS: the certificate, .pem.")] = None,
    private_key: Annotated[Path | None, typer.Option("--tls-key", help="TLS: its private key, .pem.")] = None,
    preload: Annotated[bool, typer.Option("--preload", help="Load all pipelines before the first request.")] = False,
    memory: Annotated[
        float | None,
        typer.Option("--memory", min=0, metavar="GB", help="Release what rests above so much memory."),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait.")] = 64,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds of one request, with waiting.")] = 300,
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Waiting requests that run as one, if their task can do that.")
    ] = 1,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="Calls at a time of tasks that may be called from several threads.")
    ] = 4,
    connections: Annotated[
        int | None, typer.Option("--connections", min=1, help="Most connections that may be open (1000).")
    ] = None,
    max_body: Annotated[float, typer.Option("--max-body", min=0.001, metavar="MB", help="Size of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=1, help="Pixels of a picture that is sent.")] = 2**24,
    bound: Annotated[
        list[str] | None,
        typer.Option("--bound", metavar="NAME=NUMBER", help="Largest value of an input: steps=50. items: of lists."),
    ] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option("--allow-url", metavar="ORIGIN", help="Fetch files from there: https://example.com"),
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", metavar="ORIGIN", help="Let web pages of this origin send requests.")
    ] = None,
    log_inputs: Annotated[
        bool, typer.Option("--log-inputs", help="Write prompts and other inputs to the log.")
    ] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing on disk.")] = False,
    engine: Engine = EMBEDDED,
    engine_option: EngineOptions = None,
    trust: Trust = False,
) -> None:
    """Serve pipelines over HTTP: any task, OpenAI's images API, detection; and models, by the Open Inference Protocol.

    It prints its address when it listens; /openapi.json there says all. Ctrl-C or SIGTERM: running requests finish, new
    ones are refused.

    Example: ovforge serve lcm=examples/unicorn.toml --port 8080
    """
    from ovforge.cli import check_trust, find_engine, is_loopback, split_name
    from ovforge_serve.keys import Keys
    from ovforge_serve.log import Log
    from ovforge_serve.pipelines import absolute, is_config
    from ovforge_serve.remote import origin_of
    from ovforge_serve.run import Address, listen
    from ovforge_serve.server import Serving
    from ovforge_serve.settings import DEFAULT_BOUNDS, Settings

    elsewhere = find_engine(engine, engine_option, "serve")
    known = Keys.read(keys)
    if not is_loopback(host) and not known and not open_:
        raise ConfigError(
            "everybody who reaches it could use the server, since there are no API keys",
            where=f"--host {host}",
            hint="Add --keys FILE, or --open if that is right.",
        )
    if (certificate is None) != (private_key is None):
        raise ConfigError("TLS needs both --tls-cert and --tls-key", where="--tls-cert")
    for _, place in map(split_name, configs):
        if is_config(place):
            check_trust(Path(place), set_ or [], trust)
    settings = Settings(
        queue=queue,
        timeout=timeout,
        body=int(max_body * 2**20),
        pixels=max_pixels,
        bounds={**DEFAULT_BOUNDS, **dict(map(_bound, bound or []))},
        memory=None if memory is None else int(memory * 1e9),
        batch=batch,
        threads=threads,
        urls=tuple(origin_of(url, "--allow-url") for url in allow_url or []),
        origins=tuple(origin_of(url, "--cors") for url in cors or []),
        hosts=_LOOPBACK if is_loopback(host) else (),
        log_inputs=log_inputs,
        alone=elsewhere is None,
    )
    serving = Serving(
        places=configs if elsewhere is None else list(map(absolute, configs)),
        overrides=set_ or [],
        settings=settings,
        keys=known,
        cache=None if no_cache else "default",
        device=device,
    )
    address = Address(host, port, certificate, private_key)
    if elsewhere is not None:
        if connections is not None:
            raise ConfigError(
                "the engine has its own bounds of connections", where="--connections", hint="Leave it out."
            )
        serving.server()  # which refuses what cannot be served, before other machines are asked
        elsewhere.serve(serving, address)
        return
    log = Log()
    log.take_others()
    listen(serving.server(log), address, connections=connections or _CONNECTIONS, preload=preload)


def _bound(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not (number.isascii() and number.isdigit()):
        raise InputError(f"{text!r} is not NAME=NUMBER", where="--bound")
    return name, int(number)
