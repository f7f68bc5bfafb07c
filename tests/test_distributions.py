"""What each distribution says of itself: its README against registry.toml, its classifiers, its files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CATALOGUE: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "registry.toml").read_text(encoding="utf-8"))["plugin"]
PROJECTS = {
    tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"]: path.parent
    for path in [ROOT / "pyproject.toml", *ROOT.glob("core/*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
}
COMMANDS = {name for record in CATALOGUE.values() for name in record["provides"].get("command", {})} | {
    "run", "plan", "convert", "schema", "plugins", "cache", "clean",
}  # fmt: skip


def problems(readme: str, distribution: str, provides: dict[str, dict[str, str]]) -> list[str]:
    """Return what is missing in a README, and what it says that is not so."""
    offered = {name for names in provides.values() for name in names}
    commands = provides.get("command", {})
    code = re.findall(r"`([^`\n]+)`", readme)
    named = {*code, *(word for text in code for word in text.removeprefix("ovforge ").split()[:1])}
    called = set(
        re.findall(r"\bovforge ([a-z][a-z-]+)", "\n".join([*code, *re.findall(r"```sh\n(.*?)```", readme, re.S)]))
    )
    mentioned = set(re.findall(r"\bovforge-[a-z-]+[a-z]", readme))
    prose = [line for line in readme.splitlines()[1:] if len(line.split()) > 5]
    return [
        *([] if readme.startswith(f"# {distribution}\n") else [f"the title is not {distribution}"]),
        *([] if prose else ["it says nothing"]),
        *(f"it does not name {name}" for name in sorted(offered - named)),
        *(f"there is no command {name}" for name in sorted(called - COMMANDS - commands.keys())),
        *(f"there is no distribution {name}" for name in sorted(mentioned - PROJECTS.keys())),
    ]


@pytest.mark.parametrize("distribution", sorted(PROJECTS))
def test_a_readme_is_true_and_its_links_lead_somewhere(distribution: str) -> None:
    path = PROJECTS[distribution] / "README.md"
    text = path.read_text(encoding="utf-8")
    provides = {
        kind: names
        for record in CATALOGUE.values()
        if record["distribution"] == distribution
        for kind, names in record["provides"].items()
    }
    assert not problems(text, distribution, provides)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize(
    ("readme", "problem"),
    [
        ("# ovforge-x\n", "it says nothing"),
        ("# Another\n\nOffers the loader `dds` and the command `ovforge cut`.\n", "the title is not ovforge-x"),
        ("# ovforge-x\n\nOffers the loader of a kind, and `ovforge cut`.\n", "it does not name dds"),
        ("# ovforge-x\n\nOffers the loader `dds`, `ovforge cut`, `ovforge glue`.\n", "there is no command glue"),
        ("# ovforge-x\n\nOffers `dds`, `ovforge cut`, needs `ovforge-none`.\n", "there is no distribution ovforge-none"),
    ],
)  # fmt: skip
def test_an_empty_or_untrue_readme_is_found(readme: str, problem: str) -> None:
    assert problem in problems(readme, "ovforge-x", {"loader": {"dds": "DDS"}, "command": {"cut": "Cut"}})


def test_every_plugin_of_the_catalogue_is_in_the_table_of_the_readme_and_is_installed_for_tests() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # What is heavy, and needed by few, is installed for tests alone.
    files = ("requirements.txt", "requirements-test.txt")
    requirements = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    for name, record in CATALOGUE.items():
        assert re.search(rf"^\| \[{name}\]\(docs/", readme, re.MULTILINE), name
        folder = PROJECTS[record["distribution"]].relative_to(ROOT).as_posix()
        assert re.search(rf"^-e {folder}$", requirements, re.MULTILINE), folder


def test_all_distributions_name_the_same_interpreters() -> None:
    interpreters = {
        distribution: (
            project["requires-python"],
            tuple(item for item in project.get("classifiers", ()) if item.startswith("Programming Language")),
        )
        for distribution, folder in PROJECTS.items()
        if (project := tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"])
    }
    assert len(set(interpreters.values())) == 1, interpreters
    assert "Programming Language :: Python :: 3.14" in interpreters["ovforge"][1]


def test_changelog_fragments_have_a_kind_that_towncrier_knows_and_say_something() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]
    kinds = "|".join(kind["directory"] for kind in tool["type"])
    for path in (ROOT / tool["directory"]).glob("*.md"):
        assert re.fullmatch(rf"(\d+|\+[a-z0-9-]+)\.({kinds})\.md", path.name), path.name
        assert path.read_text(encoding="utf-8").strip(), path.name
    assert "<!-- towncrier release notes start -->" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
