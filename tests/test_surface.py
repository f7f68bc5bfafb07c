"""The public surface: every package says once what is public, and nothing else is used by plugins."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PUBLIC = ("", ".errors", ".contracts", ".model", ".store", ".config", ".cli", ".testing")
PACKAGES = ("", ".cli", ".contracts", ".model", ".store", ".config", ".plugins", ".testing")


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_exported_is_what_is_there(package: str) -> None:
    module = importlib.import_module(f"ovforge{package}")
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    typed = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    eager = {"API_VERSION", "__version__"} if package == "" else set()
    assert set(dir(module)) == typed == set(module.__all__) - eager
    for name in module.__all__:
        assert getattr(module, name) is not None


def _imports(file: Path) -> set[str]:
    """Return the modules of ovforge that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name == "ovforge" or name.startswith("ovforge.")}


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("plugins/*/src")))
def test_plugins_import_public_modules_only(folder: str) -> None:
    public = {f"ovforge{name}" for name in PUBLIC}
    private = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in (ROOT / "plugins" / folder / "src").rglob("*.py")
        for name in _imports(file) - public
    }
    assert not private


def test_the_reference_shows_all_that_is_public() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8").splitlines()
    assert {f"::: ovforge{name}" for name in PUBLIC} <= set(page)
