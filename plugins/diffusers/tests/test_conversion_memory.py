"""Converting a large transformer: its weights are never held in float32, and come out bit for bit."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.errors import ModelError

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
ov = pytest.importorskip("openvino")

from safetensors.torch import load_file  # noqa: E402

from ovforge_convert import streaming  # noqa: E402

SHAPE: dict[str, Any] = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 8,
    "axes_dims_rope": (16, 56, 56), "joint_attention_dim": 512, "pooled_projection_dim": 64, "guidance_embeds": True,
}  # fmt: skip
"""69 million parameters, most of them in few large matrices, as a transformer of full size has them."""

CHILD = """
import re, sys
from pathlib import Path
from ovforge.model import FileSource
from ovforge_convert import streaming
from ovforge_diffusers.loader import DiffusersLoader
from ovforge_diffusers.options import LoaderOptions
streaming.LARGE = int(sys.argv[3])
bundle = DiffusersLoader(LoaderOptions()).load(FileSource(Path(sys.argv[1])))
import openvino, openvino.frontend.pytorch.ts_decoder, torch, transformers.utils.logging
print(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1], flush=True)
bundle.save(Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a transformer's folder, in bfloat16."""
    path = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    with torch.device("meta"):
        module = diffusers.FluxTransformer2DModel(**SHAPE)
    module = module.to(torch.bfloat16).to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) * 0.02)
    module.save_pretrained(path)
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what memory of a process is its own")
@pytest.mark.parametrize(("large", "bound"), [(2**40, 1.6), (0, 0.7)], ids=["in memory", "on the disk"])
def test_a_conversion_holds_no_float32(folder: Path, tmp_path: Path, large: int, bound: float) -> None:
    """Own memory grows by the float16 weights alone; float32 ones would take twice that, and the float16 ones more."""
    file = folder / "diffusion_pytorch_model.safetensors"
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder), str(tmp_path / "converted"), str(large)]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        before = int(process.stdout.readline())
        while process.poll() is None:
            found = re.search(r"^RssAnon:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.01)
    assert process.returncode == 0
    assert (peak - before) * 1024 < bound * file.stat().st_size
    model = ov.Core().read_model(tmp_path / "converted/transformer/openvino_model.xml")
    constants = {op.get_friendly_name(): op for op in model.get_ops() if op.get_type_name() == "Constant"}
    matrices = {name: tensor for name, tensor in load_file(file).items() if tensor.ndim == 2}
    assert len(matrices) > 20
    for name, tensor in matrices.items():
        constant = constants[f"self.{name}_compressed"]
        assert constant.get_element_type() == ov.Type.f16
        assert constant.data.tobytes() == tensor.to(torch.float16).numpy().tobytes(), name


def test_a_disk_without_room_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A map of a file that has no room would end the process when it is written to."""
    from ovforge_convert import Port, TensorWeight, convert_module, streamed_names

    def full(handle: int, begin: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    module = torch.nn.ModuleList([torch.nn.Linear(80, 90)])
    values = {name: TensorWeight(module.state_dict()[name]) for name in streamed_names(module)}
    assert list(values) == ["0.weight"]

    def forward(x: Any) -> Any:
        return module[0](x)

    def convert() -> Any:
        inputs = (Port("x", (None, 80), (2, 80)),)
        return convert_module("m", module, forward, inputs, ("y",), "f16", values=values, disk=True)

    monkeypatch.setattr(streaming, "LARGE", 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    x = np.ones((3, 80), np.float32)
    compiled = ov.Core().compile_model(convert(), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(x)[0], forward(torch.from_numpy(x)).detach().numpy(), rtol=1e-2, atol=1e-3)
    assert not list(tmp_path.iterdir()), "the file has no name"
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ModelError, match="GiB of room for temporary files") as error:
        convert()
    assert error.value.where == str(tmp_path)
    assert "TMPDIR" in (error.value.hint or "")
