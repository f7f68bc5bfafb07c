"""Every command, config and program of the documentation, run in the order of its page on the models that ship.

A block that cannot be run has a comment before it that says why: `<!-- not run: REASON -->`. It is still checked: commands
for their names and options, configs for their keys, programs for their syntax. Blocks with a `title` below src/ or tests/
are the files of a project, which tests/test_docs.py and tests/test_third_party_task.py run.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import ovforge
import program
from ovforge.cli.program import make_command
from ovforge.config.options import check_present
from ovforge.config.pipeline import PipelineConfig
from ovforge.errors import PluginError
from ovforge.model.sources import package_path
from ovforge.plugins.manager import Plugins

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^(?P<indent> *)```(?P<kind>sh|toml|python)(?P<about>[^\n]*)\n(?P<text>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
ELSEWHERE = ('title="src/', 'title="tests/')
PLUGINS = Plugins()


@dataclass(frozen=True)
class Block:
    kind: str
    about: str
    text: str
    reason: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            match["kind"], match["about"], re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE),
            match["reason"], text[: match.start("kind")].count("\n") + 1,
        )
        for match in BLOCK.finditer(text)
        if not any(mark in match["about"] for mark in ELSEWHERE)
    ]  # fmt: skip


def commands(text: str) -> list[list[str]]:
    """Return the words of each command; a line that ends with a backslash goes on."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what pages take as given: models, pictures, prompts."""
    folder = tmp_path_factory.mktemp("documentation")
    shutil.copytree(package_path("package:ovforge_lcm/model"), folder / "models" / "lcm")
    shutil.copytree(package_path("package:ovforge_grounding_dino/model"), folder / "models" / "grounding-dino-tiny")
    shutil.copy(package_path("package:ovforge_sd_lora/examples/pencil.safetensors"), folder / "style.safetensors")
    shutil.copy(package_path("package:ovforge_textual_inversion/teal.safetensors"), folder / "teal.safetensors")
    shutil.copy(package_path("package:ovforge_grounding_dino/demo/scene.jpg"), folder / "photo.jpg")
    with Image.open(ROOT / "docs" / "images" / "image-to-image.png") as strip:
        strip.crop((0, 0, 128, 128)).save(folder / "car.png")
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).rectangle((64, 0, 127, 127), fill=255)
    mask.save(folder / "mask.png")
    (folder / "prompts.txt").write_text("a cat\na red car\n")
    for name in ("a.jpg", "b.jpg"):
        shutil.copy(folder / "photo.jpg", folder / name)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "plugins").symlink_to(ROOT / "plugins")
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder of the page's own the current one; all pages share one cache, and the models' bytes."""
    large = "models"
    shutil.copytree(models, tmp_path / "page", symlinks=True, ignore=shutil.ignore_patterns(large))
    shutil.copytree(models / large, tmp_path / "page" / large, copy_function=os.link)
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(models.with_name(f"{models.name}-cache")))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "page"


@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_what_the_page_says_can_be_done(page: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "tutorial.md":  # it begins in an empty folder
        monkeypatch.chdir(place.parent)
    names: dict[str, Any] = {"ovforge": ovforge, "Use": ovforge.Use, "__name__": "__page__"}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.kind == "sh":
            for words in commands(block.text):
                check_command(words, where)
                if block.reason is None:
                    run_command(words, where)
        elif block.kind == "toml":
            check_config(block, where)
            title = re.search(r'title="([^"]+)"', block.about)
            Path(title[1] if title else "pipeline.toml").write_text(block.text, encoding="utf-8")
            value = tomllib.loads(block.text)
            if block.reason is None and {"task", "load"} <= value.keys():
                ovforge.plan(title[1] if title else "pipeline.toml")
        else:
            code = compile(block.text, where, "exec")
            if block.reason is None:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, names)


def check_command(words: list[str], where: str) -> None:
    """Let the command's own parser read its options, without running it."""
    if words[0] in ("pip", ".venv/bin/pip"):
        wanted = [word.partition("[")[0] for word in words[2:] if word.startswith("ovforge")]
        assert {
            name for name in wanted if not (ROOT / "plugins" / name.removeprefix("ovforge-").replace("-", "_")).is_dir()
        } == set(), where
    if not words[0].endswith("ovforge") or words[1].startswith("-"):
        return
    command: Any = make_command(PLUGINS.find("command", words[1]))
    rest = words[2:]
    if hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{where}: {words}"
        command, rest = command.commands[rest[0]], rest[1:]
    if command.ignore_unknown_options:  # it has a parser of its own
        return
    command.make_context(words[1], rest, resilient_parsing=False)


def run_command(words: list[str], where: str) -> None:
    assert words[0] == "ovforge", f"{where}: {words[0]} is not a command of ours: add <!-- not run: REASON -->"
    done = program.ovforge(*words[1:])
    assert done.code == 0, f"{where}: {shlex.join(words)}: {done.code}\n{done.stdout}{done.stderr}"
    for word, following in itertools.pairwise(words):
        if word in ("-o", "--output"):
            written = Path(following)
            assert written.exists() or list(written.parent.glob(f"{written.name}*")), (
                f"{where}: {following} is not there"
            )


def check_config(block: Block, where: str) -> None:
    """Check names and options of a config, or of a part of one."""
    value = tomllib.loads(block.text)
    if "plugin" in value or "project" in value:  # a catalogue, a pyproject.toml
        return
    load = value.get("load", {})
    load = {"source": "somewhere", **load} if isinstance(load, dict) else load
    config = PipelineConfig.of({**value, "load": load}, where=where)
    for kind, use in used(config):
        try:
            extension = PLUGINS.find(kind, use.use).extension
        except PluginError:
            assert block.reason, where
            continue
        model = extension.options_model()
        if model is not None:
            check_present(model, use.options, where=where)
        else:
            assert not use.options, where
    if config.task:
        check_present(PLUGINS.find("task", config.task.use).extension.inputs_model(), config.input, where=where)


def used(config: PipelineConfig) -> Iterator[tuple[str, ovforge.Use]]:
    yield from (("transform", use) for use in config.transform)
    yield from (("quantizer", use) for use in config.quantize)
    yield from ((kind, use) for kind in ("task", "scheduler", "device") if (use := getattr(config, kind)))


def test_a_block_that_does_not_work_is_found(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = ROOT / "docs" / "x.md"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: "```sh\novforge plan nowhere.toml\n```\n")
    with pytest.raises(AssertionError, match=r"docs/x.md:1: ovforge plan nowhere.toml: 1\n +error: nowhere.toml"):
        test_what_the_page_says_can_be_done(page, place, monkeypatch)
