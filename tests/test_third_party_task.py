"""A task that somebody else wrote, as the docs have it: in `run`, under [quality], in `compare`; and on the terminal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from PIL import Image
from safetensors.numpy import save_file

import ovforge
from ovforge import testing
from ovforge.cli import main
from ovforge.errors import QualityError

PAGE = Path(__file__).parents[1] / "docs" / "write-a-task.md"

QUANTIZER = '''
from ovforge.contracts import QuantizerExtension, Report


class Shift:
    """Adds to the first score."""

    def __init__(self, options):
        self.by = options.by

    def quantize(self, bundle, calibration, keep={}):
        from openvino import opset13 as ops

        result = bundle.models["model"].get_results()[0]
        source = result.input_value(0)
        moved = ops.add(source, np.array([[self.by, 0, 0]], np.float32))
        source.get_tensor().set_names(set())
        moved.output(0).get_tensor().set_names({"y"})
        result.input(0).replace_source_output(moved.output(0))
        return Report(roles=("model",), applied=["moved"])


class ShiftOptions(BaseModel):
    by: float = 0.0
'''
OFFER = """

@hookimpl
def ovforge_quantizers():
    from ovforge.contracts import QuantizerExtension

    yield QuantizerExtension(name="shift", summary="Moves", config="ovforge_colours.task:ShiftOptions",
                             factory="ovforge_colours.task:Shift", needs="nothing")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the docs' plugin, with a quantizer for the gate; return a folder with a config and a picture."""
    site = tmp_path / "site"
    blocks = re.findall(r'```python title="src/([^"]+)"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for path, code in blocks:
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(code + (OFFER if path.endswith("__init__.py") else QUANTIZER))
    info = site / "ovforge_colours-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ovforge-colours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ovforge]\ncolours = ovforge_colours\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))  # for the processes of compare
    for name in [name for name in sys.modules if name.partition(".")[0] == "ovforge_colours"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "project"
    testing.small_bundle().save(folder / "model")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(folder / "red.png")
    (folder / "colour.toml").write_text(
        'task = "colour"\nload = "model"\n[device]\nprecision = "f32"\n[input]\nimage = "red.png"\n'
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def program(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """Run the program in this process; return what it printed."""
    with pytest.raises(SystemExit) as ended, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ovforge", *map(str, arguments)])
        main()
    out, error = capsys.readouterr()
    assert ended.value.code == code, out + error
    return out, error


def expected(colour: tuple[int, int, int]) -> list[float]:
    mean = np.array([*(np.array(colour) / 255), 1.0])
    return list(mean @ (np.arange(12).reshape(4, 3) / 12))


def test_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = program(capsys, "run", project / "colour.toml", "--no-cache")
    assert "\nblue (1.08)\ncolour.json\n" in out and re.search(r"^  picture +\d", out, re.MULTILINE)
    saved = json.loads(Path("colour.json").read_text())
    assert list(saved["result"]["scores"].values()) == pytest.approx(expected((255, 0, 0)), abs=1e-5)
    assert saved["provenance"]["inputs"] == {"image": str(project / "red.png")}, "paths start at the config's folder"
    Image.new("RGB", (4, 4), (0, 255, 0)).save(project / "green.png")
    arguments = ("run", project / "colour.toml", "--no-cache", "-i", "image=green.png", "--json", "-o", "x.json")
    said = json.loads(program(capsys, *arguments)[0])
    assert said["result"] == json.loads(Path("x.json").read_text())["result"]
    assert list(said["result"]["scores"].values()) == pytest.approx(expected((0, 255, 0)), abs=1e-5)
    assert set(said["timings"]) == {"picture", "model"} and {"load", "compile"} <= set(said["start"])
    assert said["seconds"]["total"] >= said["seconds"]["run"] > 0
    _, error = program(capsys, "run", project / "colour.toml", "-o", "x.png", code=1)
    assert "x.png: cannot write .png" in error and "load..." not in error, "refused before anything is read"


def test_a_result_that_its_plugin_does_not_describe(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the result knows its ending then; it is found when it is there."""
    plugin = project.parent / "site" / "ovforge_colours" / "__init__.py"
    plugin.write_text(plugin.read_text().replace('        result="ovforge_colours.task:ColourResult",\n', ""))
    assert program(capsys, "run", project / "colour.toml", "--no-cache")[0].endswith("colour.json\n")


def test_the_gate(project: Path) -> None:
    config: dict[str, Any] = {
        "task": "colour", "load": str(project / "model"), "device": {"precision": "f32"},
        "quality": {"min_score": 0.9, "samples": 4},
    }  # fmt: skip
    pipe = ovforge.load({**config, "quantize": [{"use": "shift", "by": 0.05}]}, cache=None)
    assert pipe.outcome is not None and pipe.outcome.metric == "task"
    assert pipe.outcome.scores == pytest.approx([0.95] * 4, abs=1e-3)
    with pytest.raises(QualityError, match=r"task 0\.5"):
        ovforge.load({**config, "quantize": [{"use": "shift", "by": 0.5}]}, cache=None)


def test_compare(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (project / "colour.toml").read_text()
    (project / "shifted.toml").write_text(f'{text}\n[[quantize]]\nuse = "shift"\nby = 0.25\n')
    program(
        capsys, "compare", project / "colour.toml", project / "shifted.toml", "--rounds", 1, "--runs", 1, "--no-cache",
        "-q", "-o", "report",
    )  # fmt: skip
    report = json.loads(Path("report.json").read_text())
    first, second = report["candidates"]
    assert first["likeness"] == {} and second["likeness"]["task"] == pytest.approx([0.75], abs=1e-3)
    assert first["outputs"] == [["blue (1.08)"]]
    shown = Path("report.md").read_text()
    assert "| likeness |  | 0.7500 |" in shown and "| call 1 | blue (1.08) | blue (1.08) |" in shown
    assert not Path("report.png").exists(), "there is nothing to see"


def test_the_contract(project: Path) -> None:
    import ovforge_colours  # type: ignore[import-not-found]

    pipe = ovforge.load(project / "colour.toml", cache=None)
    testing.check_task(ovforge_colours, "colour", pipe.task)


STEERING = "\x1b[31mred\x1b]0;title\x07 [red]x[/] [/x] \u202eevil \x9b1A \udcff"
SHOWN = "\\x1b[31mred\\x1b]0;title\\x07 [red]x[/] [/x] \\u202eevil \\x9b1A \\udcff"


def test_labels_and_paths_cannot_steer_the_terminal(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steering, shown = STEERING[:-1], SHOWN[:-6]  # no surrogate: it has no place in TOML
    names = json.dumps(["red", "green", steering])
    (project / "colour.toml").write_text(
        f'load = "model"\n[task]\nuse = "colour"\nnames = {names}\n[input]\nimage = "red.png"\n'.replace(
            "\\u009b", "\x9b"
        )
    )
    output = Path(f"{steering.replace('/', '')}.json")
    out, error = program(capsys, "run", project / "colour.toml", "--no-cache", "-o", output)
    assert f"{shown} (1.08)\n" in out and shown.replace("/", "") in out
    for arguments, code in (
        (("run", project / "colour.toml", "-i", f"image={STEERING}"), 1),
        (("run", STEERING), 1),
        (("plan", project / "colour.toml", "-s", f"task.names={STEERING}"), 1),
        (("inspect", STEERING), 1),
        (("plugins", "show", STEERING), 1),
        ((STEERING,), 2),
        (("cache", "prune", STEERING), 2),
        (("detect", STEERING, "-m", STEERING), 1),
        (("lora", "inspect", STEERING), 1),
        (("benchmark", STEERING), 1),
        (("encrypt", STEERING, "-o", "x", "-k", "file:key", "--make-key"), 1),
    ):
        some = program(capsys, *arguments, code=code)
        out, error = out + some[0], error + some[1]
        assert "\\x1b" in some[1] or "'\\u" in some[1], some
    assert not set(out + error) & set("\x1b\x07\x9b\u202e\udcff")


def test_what_files_say_cannot_steer_the_terminal(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A catalogue's summary, a model's names, an adapter's title."""
    steering, shown = STEERING[:-2], SHOWN[:-7]

    def catalogue(summary: str) -> None:
        (project / "registry.toml").write_text(
            f'[plugin.far]\ndistribution = "far"\nentry_point = "far"\nsummary = {json.dumps(summary)}\n'
            f"provides.command = {{ colours = {json.dumps(summary)} }}\n"
        )

    monkeypatch.setenv("OVFORGE_REGISTRY", str(project / "registry.toml"))
    monkeypatch.setenv("COLUMNS", "400")
    model = testing.small_model()
    model.inputs[0].get_tensor().set_names({"[/x] \u202e \x9b1A"})  # as far as XML has a place for it
    for name in (steering.replace("/", ""), "other"):
        ov.save_model(model, project / "steering" / f"{name}.xml")
    tensors = {f"lora_unet_a_to_q.lora_{side}.weight": np.eye(2, dtype=np.float32) for side in ("up", "down")}
    save_file(tensors, project / "a.safetensors", {"ss_output_name": steering, "modelspec.trigger_phrase": steering})
    catalogue(steering)
    refused = program(capsys, "plugins", "list", code=1)[1]
    catalogue("[red]x[/] [/x]")
    for arguments, code in ((("plugins", "list"), 0), (("plugins", "show", "far"), 1)):
        assert "[red]x[/] [/x]" in program(capsys, *arguments, code=code)[0]
    outputs = [
        program(capsys, *arguments)[0]
        for arguments in (("inspect", project / "steering"), ("lora", "inspect", project / "a.safetensors"))
    ]
    for out in (refused, *outputs):
        assert "\\x1b[31mred" in out and not set(out) & set("\x1b\x07\x9b\u202e"), out
    assert shown in outputs[1] and shown.replace("/", "") in outputs[0]
