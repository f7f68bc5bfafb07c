"""BOFT of several factors against peft, whose block diagonals are a kernel for NVIDIA GPUs that is stood in for here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ovforge_sd_lora.kinds import Misshapen
from ovforge_sd_lora.orthogonal import check_boft, delta_boft


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_factors_equal_pefts(factors: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from peft.tuners.boft import layer as boft

    def diagonal(blocks: Any) -> list[Any]:
        return [torch.stack([torch.block_diag(*each) for each in blocks])]

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: SimpleNamespace(forward=diagonal))
    torch.manual_seed(0)
    base = torch.nn.Linear(48, 10, bias=False) if kind == "linear" else torch.nn.Conv2d(16, 10, 3, bias=False)
    weight = base.weight.detach().numpy().copy()
    config = peft.BOFTConfig(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=factors)
    model = peft.get_peft_model(torch.nn.Sequential(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    tensors = {
        name.split(".")[-2]: value.detach().numpy() for name, value in model.named_parameters() if ".boft_" in name
    }
    assert tensors["boft_R"].shape[0] == factors
    check_boft({name: value.shape for name, value in tensors.items()}, weight.shape, {})
    merged = model.merge_and_unload()[0].weight.detach().numpy()
    np.testing.assert_allclose(weight + delta_boft(weight, tensors, {}), merged, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (4, 4, 4, 4), (2, 4, 3, 3), (0, 4, 4, 4), (4, 4, 4)])
def test_factors_that_do_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(Misshapen, match="do not fit"):
        check_boft({"boft_R": shape, "boft_s": (10, 1)}, (10, 12 if shape[1:2] == (3,) or 3 in shape else 16), {})
