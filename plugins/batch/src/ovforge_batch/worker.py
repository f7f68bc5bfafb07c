"""A process of a batch on this machine: reads items as JSON lines, and writes what came of each.

The first line that it reads says which pipeline; it ends when there is nothing more to read, and when its parent has
died.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from typing import Any, TextIO

from ovforge.errors import OvforgeError
from ovforge.store import end_with_parent
from ovforge_batch.runner import Runner

__all__ = ["main"]


def main() -> None:
    """Work until standard input ends, or the parent."""
    end_with_parent()
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        run = Runner(json.loads(sys.stdin.readline()))
    except OvforgeError as error:
        _say(answers, {"refused": str(error)})
        return
    _say(answers, {"ready": True})
    for line in sys.stdin:
        _say(answers, run(json.loads(line)))


def _say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value, default=lambda data: base64.b64encode(data).decode()) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
