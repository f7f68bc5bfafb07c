"""`ovforge ui`: a page in the browser for any pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovforge.cli import Trust
from ovforge.errors import ConfigError, InputError

if TYPE_CHECKING:
    from ovforge import Cache, Progress
    from ovforge_ui.hosts import Host

__all__ = ["ui"]


def ui(
    configs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]CONFIG...]",
            help="Configs of pipelines (.toml, .json), each a tab; without any, the models that ship with plugins.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0: one that is free.")] = 7860,
    set_: Annotated[
        list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key of every pipeline.")
    ] = None,
    password: Annotated[
        Path | None, typer.Option("--password", help="A file with the password that the user `ovforge` logs in with.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Listen on other addresses although there is no password.")
    ] = False,
    upload: Annotated[float, typer.Option("--max-upload", metavar="MB", help="Size of a file that is sent.")] = 256,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep nothing on disk.")] = False,
    trust: Trust = False,
) -> None:
    """Open a page in the browser for any pipeline: pictures, masks, detections, video, configs side by side.

    It loads all pipelines, and prints its address when it listens. Ctrl-C ends it, and removes what it made.

    Example: ovforge ui original=examples/compare-f32.toml int8=examples/compare-int8.toml
    """
    from ovforge.cli import check_trust, is_loopback, print_line, progress_bar
    from ovforge.store import scratch_folder

    secret = _read_password(password)
    local = is_loopback(host)
    if not local and secret is None and not open_:
        raise ConfigError(
            "everybody who reaches it could use the page, since there is no password",
            where=f"--host {host}",
            hint="Add --password FILE, or --open if that is right.",
        )
    places = _places(configs) if configs else list(_shipped())
    for _, place in places if configs else ():
        check_trust(place, set_ or [], trust)
    with progress_bar(False) as progress:
        hosts = _load(places, set_ or [], None if no_cache else "default", progress)
    with scratch_folder() as folder:
        from ovforge_ui.guard import Guard
        from ovforge_ui.listening import listen
        from ovforge_ui.page import make_app

        app = make_app(hosts, folder, password=secret, upload=int(upload * 2**20), paths_shown=local)
        listen(Guard(app, local=local), host, port, print_line)


def _load(
    places: Sequence[tuple[str, Path]],
    overrides: Sequence[str],
    cache: Cache | str | None,
    progress: Callable[[Progress], None],
) -> list[Host]:
    """Return loaded pipelines, in the order of their configs."""
    import ovforge
    from ovforge_ui.hosts import Host

    plugins, hosts = ovforge.Plugins(), list[Host]()
    for name, path in places:
        pipeline = ovforge.load(path, overrides=overrides, plugins=plugins, cache=cache, progress=progress, trust=True)
        pipeline.start_timings()  # waits for the compilations
        hosts.append(Host(name, pipeline, plugins))
    return hosts


def _places(configs: Sequence[str]) -> list[tuple[str, Path]]:
    """Return name and path of each config. Raises ConfigError for two of one name."""
    from ovforge.cli import split_name

    places: dict[str, Path] = {}
    for name, place in map(split_name, configs):
        if name in places:
            raise ConfigError(f"two are called {name!r}", where=place, hint="Write NAME=CONFIG for one of them.")
        places[name] = Path(place)
    return list(places.items())


def _shipped() -> Iterator[tuple[str, Path]]:
    """Yield configs of the models that ship with plugins, as far as those are here. Raises ConfigError for none."""
    import ovforge

    found, plugins = 0, ovforge.Plugins()
    tasks = {offer.extension.name for offer in plugins.all("task")}
    for path in sorted((Path(__file__).parent / "demo").glob("*.toml")):
        config = ovforge.PipelineConfig.read(path)
        if config.task is not None and config.task.use in tasks and not _missing(path.read_text(encoding="utf-8")):
            found += 1
            yield path.stem.partition("-")[2], path
    if not found:
        raise ConfigError(
            "no plugin with a model is installed", where="ui", hint="Name a config, or install ovforge-lcm."
        )


def _missing(config: str) -> bool:
    """Say whether a config names a package that is not here."""
    import importlib.util
    import re

    return any(importlib.util.find_spec(name) is None for name in re.findall(r"package:(\w+)", config))


def _read_password(file: Path | None) -> str | None:
    """Return the first line of a file. Raises InputError if there is none."""
    if file is None:
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from error
    if not lines or not lines[0].strip():
        raise InputError("holds no password", where=str(file), hint="Write it into the first line.")
    return lines[0].strip()
