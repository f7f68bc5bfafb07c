"""The program as a user meets it, and a plugin that somebody else wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovforge.plugins.template import write_project

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "unicorn.toml"


def ovforge(*arguments: object, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("ovforge"), *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_the_demo_makes_a_picture_that_makes_itself_again(tmp_path: Path) -> None:
    done = ovforge("run", EXAMPLE, cwd=tmp_path)
    picture = tmp_path / "unicorn.png"
    assert done.stdout.strip().endswith("unicorn.png")
    for part in ("load", "compile", "text encoder", "denoise", "unet", "scheduler", "vae decoder"):
        assert re.search(rf"^ *{part} +\d+\.\d+ s", done.stdout, re.MULTILINE), part
    with Image.open(picture) as image:
        assert image.size == (128, 128)
        pixels = np.asarray(image)
    assert pixels.std() > 20, "a picture of something"
    again = ovforge("run", picture, cwd=tmp_path)
    assert "warning" not in again.stderr
    assert (tmp_path / "unicorn-again.png").read_bytes() == picture.read_bytes()
    planned = json.loads(ovforge("plan", EXAMPLE, "--json", cwd=tmp_path).stdout)
    assert {stage["state"] for stage in planned["stages"]} == {"cached", "direct"}
    assert "compile unet" in ovforge("cache", "explain", EXAMPLE).stdout
    listed = ovforge("cache", "list").stdout
    assert "unet on CPU" in listed
    assert "0 damaged" in ovforge("cache", "verify").stdout
    stored = [stage for stage in planned["stages"] if stage["state"] == "cached"]
    assert f"removed {len(stored)} entries" in ovforge("cache", "prune", "--size", "0").stdout


def test_options_of_run(tmp_path: Path) -> None:
    output = tmp_path / "pictures" / "cat.png"
    ovforge("run", EXAMPLE, "-o", output, code=1)
    output.parent.mkdir()
    done = ovforge(
        "run", EXAMPLE, "-i", "prompt=a cute cat", "-i", "count=2", "-s", "device.precision=f32", "-o", output, "--json"
    )
    said = json.loads(done.stdout)
    assert [Path(file).name for file in said["files"]] == ["cat-1.png", "cat-2.png"]
    assert said["provenance"]["precision"]["unet"] == "f32"
    assert said["provenance"]["inputs"]["seed"] == [1234567, 1234568]
    ovforge("run", output.with_name("cat-2.png"), "-q")
    first, second = (Image.open(output.with_name(name)) for name in ("cat-2.png", "cat-2-again.png"))
    difference = np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16))
    assert difference.max() <= 2, "the second of two pictures, made alone"
    done = ovforge("run", EXAMPLE, "-i", f"prompt={'cat [/x] ' * 80}", "-q", "-o", tmp_path / "long.webp")
    assert done.stdout == "" and done.stderr.startswith("warning: the prompt")
    said = json.loads(ovforge("run", tmp_path / "long.webp", "--json").stdout)
    assert said["files"] == [str(tmp_path / "long-again.webp")] and "[/x]" in said["warnings"][0]
    assert (tmp_path / "long-again.webp").read_bytes() == (tmp_path / "long.webp").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing.toml"], "nothing.toml: no such file"),
        (["run", EXAMPLE, "-s", "schedulr.use=x"], "unknown key `schedulr`. Did you mean 'scheduler'?"),
        (["run", EXAMPLE, "-s", "scheduler.use=eulr"], "Did you mean 'euler'?"),
        (["run", EXAMPLE, "-i", "steps=many"], "`steps`"),
        (["run", EXAMPLE, "-o", "nowhere/x.png"], "nowhere: no such folder"),
        (["run", EXAMPLE, "-o", "x.tiff2"], "cannot write .tiff2"),
        (["plan", EXAMPLE, "-s", "transform.0.use=loar"], "Did you mean 'lora'?"),
        (["plugins", "show", "schedulrs"], "Did you mean 'schedulers'?"),
        (["plugins", "disable", "builtin"], "cannot be switched off"),
        (["plugins", "new", "Bad_Name"], "is not a valid plugin name"),
        (["cache", "prune", "--size", "big"], "'big' is not a size"),
        (["convert", "nowhere", "-o", "x"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_explained(arguments: list[object], message: str, tmp_path: Path) -> None:
    assert message in ovforge(*arguments, code=1, cwd=tmp_path).stderr


def test_a_full_disk_is_explained_and_loses_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the child process cannot write past it."""
    picture = tmp_path / "a.png"
    ovforge("run", EXAMPLE, "-o", picture, "-q")
    before = picture.read_bytes()
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from ovforge.cli import main\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", EXAMPLE, "-i", "seed=3", "-o", picture],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error:" in done.stderr
    assert "Traceback" not in done.stderr
    assert picture.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*.png*")] == ["a.png"], "nothing half-written is left"


def test_a_picture_without_provenance_is_explained(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert "carries no ovforge provenance" in ovforge("run", tmp_path / "plain.png", code=1).stderr
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    assert "not a readable picture" in ovforge("run", tmp_path / "broken.png", code=1).stderr


def test_plugins_are_listed_shown_and_switched(tmp_path: Path) -> None:
    assert re.search(r"diffusion\s+0\.1\.0\s+installed", ovforge("plugins", "list").stdout)
    assert "prediction_type" in ovforge("plugins", "show", "schedulers").stdout
    assert "ok      schedulers" in ovforge("plugins", "doctor").stdout
    ovforge("plugins", "disable", "lcm")
    refused = ovforge("plan", EXAMPLE, code=1).stderr
    assert "ovforge plugins enable lcm" in refused
    ovforge("plugins", "enable", "lcm")
    ovforge("plan", EXAMPLE)


def test_the_schema_knows_every_option() -> None:
    schema = json.loads(ovforge("schema").stdout)
    choices = schema["properties"]["scheduler"]["anyOf"]
    lcm = next(choice for choice in choices if choice.get("properties", {}).get("use", {}).get("const") == "lcm")
    assert lcm["additionalProperties"] is False
    assert "original_inference_steps" in lcm["properties"]
    assert "negative_prompt" in schema["properties"]["input"]["anyOf"][0]["properties"]


def test_converting_what_is_converted_copies_it(tmp_path: Path) -> None:
    source = "package:ovforge_lcm/model"
    ovforge("convert", source, "-o", tmp_path / "model")
    assert "is there already" in ovforge("convert", source, "-o", tmp_path / "model", code=1).stderr
    (tmp_path / "here.toml").write_text(EXAMPLE.read_text().replace(source, "model"))
    done = ovforge("run", tmp_path / "here.toml", "-o", tmp_path / "a.png", "-q")
    assert done.stdout == ""
    ovforge("run", tmp_path / "a.png", "-q")
    assert (tmp_path / "a-again.png").read_bytes() == (tmp_path / "a.png").read_bytes(), "from another folder, too"
    ovforge("run", EXAMPLE, "-o", tmp_path / "b.png", "-q")
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_new_plugin_passes_its_tests_and_works_as_a_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    project = write_project("my-scale", tmp_path)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "COV"))}
    wheels = tmp_path / "wheels"
    for folder in (project, ROOT):
        subprocess.run(
            [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, folder],
            check=True,
        )
    environment = tmp_path / "fresh"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", *wheels.glob("*.whl")],
        check=True,
    )
    # What ovforge itself needs is lent by this environment; the two wheels are the fresh one's own.
    packages = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    (Path(packages.stdout.strip()) / "zz_lent.pth").write_text(f"import site; site.addsitedir({lent!r})\n")
    where = subprocess.run(
        [python, "-c", "import ovforge, ovforge_my_scale; print(ovforge.__file__, ovforge_my_scale.__file__)"],
        capture_output=True, text=True, check=True, env=clean,
    )  # fmt: skip
    assert where.stdout.count(str(environment)) == 2
    another = [environment / "bin" / "ovforge", "plugins", "new", "from-wheel", "--kind", "task", "--folder", tmp_path]
    subprocess.run(another, check=True, capture_output=True, env=clean)
    assert (tmp_path / "ovforge-from-wheel/src/ovforge_from_wheel/task.py").is_file(), "the wheel brings the templates"
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", project],
        capture_output=True,
        text=True,
        check=False,
        env=clean,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    (tmp_path / "scaled.toml").write_text(
        EXAMPLE.read_text() + '\n[[transform]]\nuse = "my-scale"\nrole = "vae_decoder"\nfactor = 0.5\n'
    )
    run = subprocess.run(
        [environment / "bin" / "ovforge", "run", tmp_path / "scaled.toml", "-o", tmp_path / "grey.png"],
        capture_output=True, text=True, check=False, env=clean,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    ovforge("run", EXAMPLE, "-o", tmp_path / "full.png", "-q")
    with Image.open(tmp_path / "grey.png") as grey, Image.open(tmp_path / "full.png") as full:
        assert np.asarray(grey).std() < 0.7 * np.asarray(full).std()
