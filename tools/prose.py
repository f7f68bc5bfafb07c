"""Find wording that readers stumble over, in Markdown, and in the comments and texts of Python and TOML files.

    python tools/prose.py [FILE ...]    # by default all files that git knows: a part of `make lint`

Each rule is a regular expression, with what to write in its place. A line that must keep such words ends with
"prose: ok" in a comment.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".md", ".py", ".toml", ".yml"}
EXEMPT = {"tools/prose.py", "LICENSE"}

RULES = {
    r"(?<!there )\b(is|are|was|were) no (?!(longer|more|less|fewer|such|better|worse|need|way|reason|different|one)\b)":
        "is not a ...",
    r"\b(Raises?|raises?) [\w.]+(?: or [\w.]+)? where\b": "Raises X if ...",
    r"\b(None|True|False|\[\]|\{\}|\(\)|\"\") where\b": "None if ...",
    r"\bwhere (there (is|are)|not|none|given|asked|needed|possible)\b": "if there is ..., if not ...",
    r"\b(is|are) (an error|refused|left out|kept|skipped|reported|used) where\b": "... if ...",
    r"\bdear\b": "expensive, or slow",
    r"\bto be had\b": "available",
    r"\bshall\b": "should, must, or is to",
    r"\bhence\b": "so, or therefore",
    r"\bwith what to do\b": "and what to do",
    r"\bin the place of\b": "instead of",
    r"\bas far as one can tell\b": "apparently",
}  # fmt: skip
_RULES = [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in RULES.items()]


def main() -> None:
    """Print what was found; exit code 1 if there is something."""
    found = [line for path in _files() for line in problems(path.read_text(encoding="utf-8"), _name(path))]
    print("\n".join(found) or "prose: nothing found")
    sys.exit(1 if found else 0)


def problems(text: str, name: str) -> list[str]:
    """Return a line for each place that a rule matches: file, line, the words, and what to write in their place."""
    return [
        f"{name}:{number}: {match[0]!r}: write {instead}"
        for number, line in enumerate(text.splitlines(), 1)
        if "prose: ok" not in line
        for rule, instead in _RULES
        if (match := rule.search(line))
    ]


def _files() -> list[Path]:
    if sys.argv[1:]:
        paths = [Path(name).resolve() for name in sys.argv[1:]]
    else:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / name for name in listed.splitlines()]
    return [path for path in paths if path.suffix in SUFFIXES and path.is_file() and _name(path) not in EXEMPT]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    main()
