"""The reference that the site makes of the program: whole, and each command with an example."""

from __future__ import annotations

import re
import shlex

import pytest
from tools import prose, reference

from ovforge.cli.program import make_command

COMMANDS = list(reference.commands())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_each_command_has_an_example_with_options_that_it_takes(words: tuple[str, ...]) -> None:
    text = " ".join(reference.help_of(words).split())
    name = " ".join(words)
    assert f"Example: ovforge {name}" in text
    example = re.search(rf"Example: ovforge {name}(.*?)(?: Arguments:| Options:|$)", text)
    assert example
    options = {word for word in shlex.split(example[1]) if re.fullmatch(r"--?[a-z][\w-]*", word)}
    assert options <= set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text.replace(example[0], "")))


def test_the_pages_have_all_that_the_program_has() -> None:
    plugins = reference.plugins()
    page, config = reference.cli_page(), reference.config_page()
    for words in COMMANDS:
        assert f"\n## ovforge {' '.join(words)}\n" in page
    assert {words[0] for words in COMMANDS} == set(plugins.summaries("command"))
    assert callable(make_command(plugins.find("command", "run")))
    for kind in reference.KINDS:
        for name in plugins.summaries(kind):
            assert f"\n### {kind} {name}\n" in config
            options = plugins.find(kind, name).extension.options_model()
            section = config.split(f"\n### {kind} {name}\n")[1].split("\n## ")[0].split("\n### ")[0]
            for key in options.model_fields if options else ():
                assert f"| `{key}` |" in section, (kind, name, key)
    assert "PydanticUndefined" not in config
    assert "<class" not in config


def test_the_prose_linter_finds_what_its_rules_name() -> None:
    wrong = ["x is no number", "Raises ModelError where it fails", "None where there is none", "dear"]  # prose: ok
    for line in wrong:
        assert prose.problems(f"sound\n{line}", "a.md")[0].startswith("a.md:2: '"), line
        assert not prose.problems(f"{line} <!-- prose: ok -->", "a.md")
    for line in ("there is no number", "it is no longer there", "where the models are"):
        assert not prose.problems(line, "a.md"), line
