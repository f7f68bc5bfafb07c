"""The plugin that the docs write works, block for block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ovforge.plugins.template import write_project

PAGE = Path(__file__).parents[1] / "docs" / "write-a-plugin.md"


def test_the_plugin_of_the_docs_works(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert "ovforge plugins new channel-swap" in text
    project = write_project("channel-swap", tmp_path)
    blocks = re.findall(r'```python title="([^"]+)"\n(.*?)```', text, re.DOTALL)
    assert len(blocks) == 3
    for path, code in blocks:
        assert (project / path).is_file(), "the page changes files that the template has"
        (project / path).write_text(code, encoding="utf-8")
    entry = re.search(r"```toml\n(\[project.entry-points.ovforge\]\n.*?)```", text, re.DOTALL)
    assert entry
    assert entry[1] in (project / "pyproject.toml").read_text()
    environment = {**os.environ, "PYTHONPATH": str(project / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", project, project],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
