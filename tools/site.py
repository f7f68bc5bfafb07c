"""Pages of the site that are made when it is built: mkdocs runs this as a hook (see mkdocs.yml).

The reference comes from the program, the others from files at the top of the repository.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tools import reference  # noqa: E402 - mkdocs runs this file by its path

_BEHIND = "---\nsearch:\n  boost: 0.4\n---\n\n"
"""Pages that hold every word come after those that explain it, in what a search finds."""

PAGES = {"CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages; called by mkdocs."""
    pages = {name: _on_site((ROOT / source).read_text(encoding="utf-8")) for source, name in PAGES.items()}
    pages |= {
        "changelog.md": _BEHIND + changelog(),
        "reference/cli.md": _BEHIND + reference.cli_page(),
        "reference/config.md": _BEHIND + reference.config_page(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def changelog() -> str:
    """Return the changelog, headed by the fragments that wait for the next release."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]
    waiting = ["## Next release"]
    for kind in settings["type"]:
        fragments = sorted((ROOT / settings["directory"]).glob(f"*.{kind['directory']}.md"))
        if fragments:
            waiting.append(f"### {kind['name']}")
            items = (path.read_text(encoding="utf-8").strip().replace("\n", "\n  ") for path in fragments)
            waiting.append("\n".join(f"- {item}" for item in items))
    released = (
        (ROOT / settings["filename"]).read_text(encoding="utf-8").partition("towncrier release notes start -->")[2]
    )
    return _on_site("\n\n".join(["# Changelog", *(waiting if len(waiting) > 1 else ()), released.strip()]) + "\n")


def _on_site(text: str) -> str:
    """Return Markdown with links that lead somewhere on the site; those to other files become plain text."""
    for source, name in PAGES.items():
        text = text.replace(f"]({source})", f"]({name})")
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./|LICENSE|changelog\.d|plugins/\w+/(?:src|training))[^)]*\)", r"\1", text)
