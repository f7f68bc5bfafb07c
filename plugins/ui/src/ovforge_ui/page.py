"""The page: a tab for each pipeline, one more for each task that several pipelines have, and nothing from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# gradio reads these when it is imported; none of its reports is to leave this machine.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import gradio as gr
from fastapi import FastAPI

from ovforge_ui.history import Shelves
from ovforge_ui.hosts import Host
from ovforge_ui.tab import Folders, Tab

__all__ = ["make_app"]

_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

_QUEUE = 64
"""Runs of all browsers that may wait."""

_OLD = (600, 24 * 3600)
"""Files are looked at so often, and removed when they are so old: both in seconds."""


def make_app(hosts: Sequence[Host], folder: Path, *, password: str | None, upload: int, paths_shown: bool) -> FastAPI:
    """Return the ASGI application. All its files lie in `folder`; `upload` bounds what is sent, in bytes."""
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    folders = Folders(folder, folder / "made", paths_shown)
    shelves = Shelves()
    groups: dict[str, list[Host]] = {}
    for host in hosts:
        groups.setdefault(host.task.name, []).append(host)
    with gr.Blocks(analytics_enabled=False, title="ovforge", delete_cache=_OLD, fill_width=True) as blocks:
        with gr.Tabs():
            for place, host in enumerate(hosts):
                with gr.Tab(host.name, elem_id=f"tab-{place}"):
                    Tab([host], f"p{place}", shelves, folders)
            for place, (task, group) in enumerate(groups.items()):
                if len(group) > 1:
                    with gr.Tab(f"Compare {task}", elem_id=f"tab-compare-{place}"):
                        Tab(group, f"compare{place}", shelves, folders)

        def leave(request: gr.Request) -> None:
            shelves.forget(str(request.session_hash))

        blocks.unload(leave)
    blocks.queue(max_size=_QUEUE, api_open=False, default_concurrency_limit=None)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mounted: FastAPI = gr.mount_gradio_app(
        app, blocks, path="/", footer_links=[], run_history=False, show_error=False, allowed_paths=[],
        max_file_size=upload, ssr_mode=False, enable_monitoring=False, pwa=False, mcp_server=False,
        auth=None if password is None else ("ovforge", password), theme=_theme(), css=_STYLE,
    )  # fmt: skip
    blocks.has_launched = True  # which makes gradio refuse files that it did not get or make
    return mounted


def _theme() -> Any:
    """Return a theme with the system's own fonts."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
