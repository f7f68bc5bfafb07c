"""`ovforge plugins new`: a project of each kind passes its own tests, and is found and used like any plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ovforge.cli import app
from ovforge.errors import InputError
from ovforge.plugins.template import TEMPLATES, write_project


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python as if the project were installed, which its metadata beside it make it look like."""
    facts = project / "src" / "facts-0.1.0.dist-info"
    if not facts.exists():
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project.name}\nVersion: 0.1.0\n")
        entry = (project / "pyproject.toml").read_text().partition("entry-points.ovforge]\n")[2].splitlines()[0]
        (facts / "entry_points.txt").write_text(f"[ovforge]\n{entry.replace(chr(34), '')}\n")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    environment = {**clean, "PYTHONPATH": str(project / "src"), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=project, env=environment
    )


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_new_project_of_each_kind_passes_its_tests(kind: str, tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["plugins", "new", f"a-{kind}", "--kind", kind, "--folder", str(tmp_path)])
    assert made.exit_code == 0, made.output
    project = tmp_path / f"ovforge-a-{kind}"
    left = [file for file in project.rglob("*") if file.is_file() and "my" + "_plugin" in file.name + file.read_text()]
    assert not left, "a name of the template is left"
    assert "OVFORGE_API = 1" in (project / f"src/ovforge_a_{kind}/__init__.py").read_text()
    done = run(project, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = run(project, "-m", "ovforge", "plugins", "show", f"a-{kind}")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"\n{kind} a-{kind}: " in shown.stdout
    checked = run(project, "-m", "ruff", "check", "--isolated", "--line-length", "120", "--no-cache", ".")
    assert checked.returncode == 0, checked.stdout


def test_the_scheduler_that_is_written_gives_the_numbers_of_diffusers(tmp_path: Path) -> None:
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    sys.path.insert(0, str(write_project("sampler", tmp_path, "scheduler") / "src"))
    try:
        from ovforge_sampler.scheduler import Options, Scheduler
    finally:
        del sys.path[0]
    config = {"beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    theirs = diffusers.DDIMScheduler(
        **config, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    rng = np.random.default_rng(0)
    for steps in (1, 7, 50):
        theirs.set_timesteps(steps)
        run = Scheduler(Options(), config).start(steps)
        np.testing.assert_array_equal(run.timesteps, theirs.timesteps.numpy())
        ours = latents = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
        latents = torch.from_numpy(latents)
        for index, timestep in enumerate(theirs.timesteps):
            output = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
            ours = run.step(output, index, ours, rng)
            latents = theirs.step(torch.from_numpy(output), timestep, latents).prev_sample
            scale = np.abs(latents.numpy()).max()
            np.testing.assert_allclose(ours / scale, latents.numpy() / scale, atol=1e-5)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'loader'"):
        write_project("new", tmp_path, "loadr")
    with pytest.raises(InputError, match="not a valid plugin name"):
        write_project("../new", tmp_path)
    write_project("new", tmp_path)
    with pytest.raises(InputError, match="there already"):
        write_project("new", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["ovforge-new"]
