"""Build every distribution into dist/, check it, install all of them into a clean environment and try them there.

    python tools/release.py             # in an environment with requirements-release.txt: `make release`
    python tools/release.py --no-try    # build and check alone

Our distributions are installed from dist/ and nowhere else: a package of the same name in an index is never tried.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
CONSTRAINTS = ROOT / "constraints.txt"


def main() -> None:
    """Build, check, try. Ends with the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(description="Build, check and try all distributions.")
    parser.add_argument("--no-try", action="store_true", help="do not install what was built")
    parser.add_argument("--python", default=sys.executable, help="the interpreter to try them with")
    options = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    for project in projects():
        # Without isolation: hatchling is the one of requirements-release.txt, and is not installed once per project.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, project)
    wheels = sorted(DIST.glob("*.whl"))
    run(sys.executable, "-m", "twine", "check", "--strict", *wheels, *sorted(DIST.glob("*.tar.gz")))
    if not options.no_try:
        with tempfile.TemporaryDirectory(prefix="ovforge-release-") as folder:
            try_wheels(wheels, Path(folder), options.python)
    print(f"{len(wheels)} distributions are in {DIST}")


def projects() -> list[Path]:
    """Return the folders of all distributions, the core first."""
    return [
        ROOT,
        *(path.parent for kind in ("core", "plugins") for path in sorted(ROOT.glob(f"{kind}/*/pyproject.toml"))),
    ]


def try_wheels(wheels: list[Path], folder: Path, interpreter: str) -> None:
    """Install the wheels into an environment of their own and make a picture there, far from this checkout."""
    run(interpreter, "-m", "venv", folder / "venv")
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    names = {metadata(wheel)["Name"] for wheel in wheels}
    others = {
        requirement
        for wheel in wheels
        for requirement in metadata(wheel).get_all("Requires-Dist", [])
        if "extra ==" not in requirement and re.split(r"[^\w-]", requirement)[0] not in names
    }
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--constraint", CONSTRAINTS, *sorted(others), cwd=folder)
    run(*pip, "--no-index", "--find-links", DIST, *sorted(names), cwd=folder)
    run(python, "-m", "pip", "check", cwd=folder)
    ovforge = python.with_name(f"ovforge{python.suffix}")
    run(ovforge, "--help", cwd=folder)
    run(ovforge, "plugins", "doctor", cwd=folder)
    config = shutil.copy(ROOT / "examples" / "unicorn.toml", folder)
    run(ovforge, "run", config, "-o", "unicorn.png", cwd=folder)
    run(python, "-c", "import importlib.util as i; assert not i.find_spec('torch'), 'torch is not needed'", cwd=folder)
    print(f"unicorn.png: {(folder / 'unicorn.png').stat().st_size} bytes")


def metadata(wheel: Path) -> email.message.Message:
    """Return the metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def run(*command: object, cwd: Path = ROOT) -> None:
    """Run a step, which prints what it does; exit if it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    # A cache of its own: what was made before must not stand in for what is tried.
    environment = {**os.environ, "OVFORGE_CACHE_DIR": str(cwd / "ovforge-cache")} if cwd != ROOT else None
    if code := subprocess.run(words, cwd=cwd, env=environment, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
