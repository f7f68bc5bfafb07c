"""A page in this process: the embedded model with an adapter, the embedded detector, and tasks of a third party."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

import ovforge
from drawing import third_party
from ovforge import testing
from ovforge_ui.guard import Guard
from ovforge_ui.hosts import Host


@dataclass
class Page:
    """A running page: where it is, its pipelines by name, its folder."""

    url: str
    hosts: dict[str, Host]
    folder: Path


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Run a page in a thread."""
    from ovforge_ui.page import make_app

    folder = tmp_path_factory.mktemp("page")
    testing.small_bundle().save(folder / "model")
    plugins = ovforge.Plugins()
    plugins.register(third_party(), "drawing")
    demo = Path(ovforge.__path__[0]).parents[1] / "plugins" / "ui" / "src" / "ovforge_ui" / "demo"
    configs: dict[str, Any] = {
        "lcm": demo / "1-text-to-image.toml",
        "detect": demo / "4-detect.toml",
        "draw": {"task": "draw", "load": str(folder / "model"), "input": {"prompt": "a house"}},
        "second": {"task": "draw", "load": str(folder / "model"), "input": {"prompt": "a house"}},
        "paint": {"task": "paint", "load": str(folder / "model")},
    }
    hosts = {}
    for name, config in configs.items():
        overrides = ["device.precision=f32"]
        pipeline = ovforge.load(config, overrides=overrides, plugins=plugins, cache=ovforge.Cache(folder / "cache"))
        hosts[name] = Host(name, pipeline, plugins)
    files = folder / "files"
    files.mkdir()
    app = make_app(list(hosts.values()), files, password=None, upload=2**22, paths_shown=True)
    server = uvicorn.Server(uvicorn.Config(Guard(app, local=True), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Page(f"http://127.0.0.1:{port}", hosts, files)
    server.should_exit = server.force_exit = True
    thread.join()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return Debian's Chromium. Its driver runs an event loop, in which tests of other modules could start none."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, running: Page) -> Iterator[Any]:
    """Return a fresh tab of a browser that shows the page, and asks no other host for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    tab = context.new_page()
    tab.set_default_timeout(120_000)
    strange: list[str] = []
    faults: list[str] = []
    tab.on("request", lambda request: strange.append(request.url) if _is_strange(request.url, running.url) else None)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(running.url)
    tab.wait_for_selector("#p0-run")
    yield tab
    context.close()
    assert not strange
    assert not faults


def _is_strange(url: str, own: str) -> bool:
    return not url.startswith((own, "data:", "blob:"))


@pytest.fixture(scope="session")
def scene() -> Path:
    """Return a picture with things to find."""
    from ovforge.model import package_path

    return package_path("package:ovforge_grounding_dino/demo/scene.jpg")
