"""Copy what `ovforge convert` made to where the plugin ships it, as small as it can be without changing a number."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

LIMIT = 25_000_000
"""Bytes that the shipped folder may have."""


def main() -> None:
    """Write the folder; keep a README.md and a NOTICE that are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    kept = {path.name: path.read_bytes() for path in arguments.target.glob("*") if path.name in ("README.md", "NOTICE")}
    shutil.rmtree(arguments.target, ignore_errors=True)
    # Pictures never become text again, so the detokenizer stays behind.
    shutil.copytree(arguments.source, arguments.target, ignore=shutil.ignore_patterns("openvino_detokenizer*"))
    for path in arguments.target.rglob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    for path in arguments.target.rglob("*.xml"):
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.strip() for line in lines) + "\n", encoding="utf-8")
    for name, data in kept.items():
        (arguments.target / name).write_bytes(data)
    size = sum(path.stat().st_size for path in arguments.target.rglob("*") if path.is_file())
    print(f"{size} bytes")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT}")


if __name__ == "__main__":
    main()
