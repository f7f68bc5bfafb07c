"""A process of a batch: reads items as JSON lines, runs the pipeline, and writes what came of each.

The first line that it reads says which pipeline; it ends when there is nothing more to read, so also when its parent
has died.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from ovforge import Pipeline, load
from ovforge.errors import ConfigError, InputError, OvforgeError

__all__ = ["main"]


def main() -> None:
    """Work until standard input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    order = json.loads(sys.stdin.readline())
    try:
        pipeline = load(Path(order["config"]), overrides=order["overrides"], cache=order["cache"])
    except OvforgeError as error:
        _say(answers, {"refused": str(error)})
        return
    _say(answers, {"ready": True})
    for line in sys.stdin:
        _say(answers, _run(pipeline, json.loads(line)))


def _run(pipeline: Pipeline, item: dict[str, Any]) -> dict[str, Any]:
    """Return what came of an item. `again` says that another try may help: its inputs are not at fault."""
    try:
        inputs = item["inputs"]
        if "seed" in pipeline.inputs_model.model_fields and {**pipeline.config.input, **inputs}.get("seed") is None:
            inputs = {**inputs, "seed": item["seed"]}
        result = pipeline(**inputs)
        files = result.save(Path(item["file"]))
    except OvforgeError as error:
        return {"error": str(error), "again": not isinstance(error, InputError | ConfigError)}
    except (OSError, MemoryError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {error}", "again": True}
    return {
        "files": [str(file.relative_to(item["folder"])) for file in files],
        "seconds": round(result.timings.whole(), 4),
        "warnings": result.warnings,
    }


def _say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
