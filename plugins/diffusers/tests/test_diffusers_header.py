"""What a checkpoint's header says: models, adapters, and models that an adapter lies beside."""

from __future__ import annotations

import pytest

from ovforge_diffusers.header import find_parts

UNET = dict.fromkeys(("conv_in.weight", "time_embedding.linear_1.weight", "up_blocks.0.resnets.0.conv1.weight"), (1,))
UNET |= {f"down_blocks.{number}.weight": (1,) for number in range(97)}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ((), True),
        (("lora_te_stray.alpha",), True),
        (("some.color_balance", "explorations"), True),  # "lora" is in it, too
        (tuple(f"down_blocks.{number}.lora_A.weight" for number in range(97)), False),
        (("down_blocks.0.motion_modules.0.weight",), False),
    ],
    ids=["plain", "a stray key", "lora inside a word", "an adapter beside", "motion modules"],
)
def test_a_stray_key_makes_no_adapter(more: tuple[str, ...], found: bool) -> None:
    assert ("unet" in find_parts(UNET | dict.fromkeys(more, (1,)))) is found


def test_an_adapter_is_no_model() -> None:
    assert not find_parts({f"unet.down_blocks.{n}.lora_{half}.weight": (1, 1) for n in range(9) for half in "AB"})
