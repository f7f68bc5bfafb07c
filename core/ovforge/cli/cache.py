"""ovforge cache: list, prune, verify, explain."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ovforge.cli.output import print_line, print_table

__all__ = ["app"]

app = typer.Typer(help="What is kept so that nothing is done twice.", no_args_is_help=True, rich_markup_mode=None)


@app.command(name="list")
def list_() -> None:
    """List what is stored, the last used first.

    Example: ovforge cache list
    """
    from ovforge.store.cache import Cache

    cache = Cache.default()
    entries = cache.entries()
    rows = [
        [
            entry.key[:12],
            entry.stage,
            entry.label,
            f"{entry.size / 1e6:.1f} MB",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used)),
        ]
        for entry in reversed(entries)
    ]
    print_table(["key", "stage", "what", "size", "last used"], rows, right=["size"], fold=["what"])
    total = sum(entry.size for entry in entries)
    print_line(f"{len(entries)} entries, {total / 1e6:.1f} MB of {cache.max_bytes / 1e9:.1f} GB in {cache.root}")


@app.command()
def prune(
    size: Annotated[str, typer.Option("--size", help="Keep at most this much: 500MB, 0 for nothing.")] = "",
) -> None:
    """Remove what was not used for longest, until the rest fits.

    Example: ovforge cache prune --size 5GB
    """
    from ovforge.cli.clean import remove_left
    from ovforge.store.cache import Cache, parse_size

    cache = Cache.default()
    removed = cache.prune(parse_size(size) if size else None)
    remove_left(cache.root)
    print_line(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e6:.1f} MB")


@app.command()
def verify(
    repair: Annotated[bool, typer.Option("--repair", help="Remove damaged entries; they are made again.")] = False,
) -> None:
    """Read everything again and name what is damaged. Exit code 1 if something is.

    Example: ovforge cache verify --repair
    """
    from ovforge.store.cache import Cache

    cache = Cache.default()
    damaged = cache.verify(repair=repair)
    for key, reason in damaged:
        print_line(f"{key[:12]}  {reason}{'  removed' if repair else ''}")
    print_line(f"{len(damaged)} damaged, {len(cache.entries())} sound")
    raise typer.Exit(1 if damaged and not repair else 0)


@app.command()
def explain(
    config: Annotated[Path, typer.Argument(help="A config, as for `ovforge plan`.")],
    set_: Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key.")] = None,
) -> None:
    """Say for each stage of a pipeline whether it is stored, and if not, what differs.

    Example: ovforge cache explain pipeline.toml
    """
    import ovforge

    for stage in ovforge.plan(config, overrides=set_ or []).stages:
        if stage.state != "direct":
            print_line(f"{stage.stage} ({stage.use}): {stage.state}{f', {stage.why}' if stage.why else ''}")
