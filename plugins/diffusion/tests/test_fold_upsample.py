"""fold-upsample: equal to what it replaces, and only where it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset13
from openvino.utils.node_factory import NodeFactory

import ovforge_diffusion
from ovforge import testing
from ovforge.contracts.stages import Report
from ovforge.model.bundle import ModelBundle
from ovforge_diffusion.graph.fold_upsample import FoldUpsample

AXES = np.array([2, 3])


def decoder(
    inside: int = 3,
    outside: int = 2,
    *,
    shape: tuple[int, ...] = (-1, -1, -1),
    version: int = 11,
    mode: str = "scales",
    coordinates: str = "asymmetric",
    factor: int = 2,
    pad: int = 1,
    stride: int = 1,
    weights: str = "f32",
    seed: int = 0,
) -> Any:
    """Return up-sampling and a convolution with bias; "x" is (batch, inside, height, width), `shape` all but the channels."""
    ops = opset13
    x = ops.parameter([shape[0], inside, *shape[1:]], np.float32, name="x")
    sides = ops.gather(ops.shape_of(x), ops.constant(AXES), ops.constant(0))
    sizes = ops.multiply(sides, ops.constant(factor))
    scales = ops.constant(np.array([factor, factor], np.float32))
    if version == 4:
        attributes = {
            "mode": "nearest", "shape_calculation_mode": mode, "coordinate_transformation_mode": coordinates,
            "nearest_mode": "floor", "pads_begin": [0] * 4, "pads_end": [0] * 4,
        }  # fmt: skip
        picture = NodeFactory("opset4").create("Interpolate", [x, sizes, scales, ops.constant(AXES)], attributes)
    else:
        given_ = scales if mode == "scales" else sizes
        picture = ops.interpolate(
            x, given_, "nearest", mode, [0, 0], [0, 0], coordinates, "floor", axes=ops.constant(AXES)
        )
    values = np.random.default_rng(seed).standard_normal((outside, inside, 3, 3)).astype(np.float32)
    if weights == "i8":
        kernel = ops.multiply(
            ops.convert(ops.constant(np.clip(values * 40, -127, 127).astype(np.int8)), "f32"), np.float32(1 / 40)
        )
    elif weights == "f16":
        kernel = ops.convert(ops.constant(values.astype(np.float16)), "f32")
    else:
        kernel = ops.constant(values)
    convolved = ops.convolution(picture, kernel, [stride, stride], [pad, pad], [pad, pad], [1, 1])
    model = ov.Model([ops.add(convolved, ops.constant(np.ones((1, outside, 1, 1), np.float32)))], [x])
    model.inputs[0].get_tensor().set_names({"x"})
    model.outputs[0].get_tensor().set_names({"y"})
    return model


def fold(model: Any, role: str = "vae_decoder") -> tuple[Any, Report]:
    bundle = ModelBundle()
    bundle.models[role] = model.clone()
    report = FoldUpsample().apply(bundle)
    return bundle.models[role], report


def types(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ordered_ops()]


@settings(max_examples=25)
@given(
    inside=st.integers(1, 20),
    outside=st.integers(1, 20),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    batch=st.integers(1, 2),
    weights=st.sampled_from(["f32", "f16"]),
    version=st.sampled_from([4, 11]),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_folding_changes_no_value(
    inside: int, outside: int, height: int, width: int, batch: int, weights: str, version: int, static: bool, seed: int
) -> None:
    shape = (batch, height, width) if static else (-1, -1, -1)
    mode = "sizes" if static else "scales"
    plain = decoder(inside, outside, shape=shape, mode=mode, weights=weights, version=version, seed=seed)
    changed, report = fold(plain)
    assert report.applied == ["vae_decoder: 1 up-sampling convolutions folded"]
    assert "Interpolate" not in types(changed)
    x = {"x": np.random.default_rng(seed).standard_normal((batch, inside, height, width)).astype(np.float32)}
    np.testing.assert_allclose(testing.run(changed, x)["y"], testing.run(plain, x)["y"], atol=3e-5)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"weights": "i8"}, "compressed"),
        ({"mode": "sizes"}, "for some sizes"),
        ({"factor": 3}, "for some sizes"),
        ({"coordinates": "half_pixel"}, "nothing to do"),
        ({"pad": 0}, "nothing to do"),
        ({"stride": 2}, "nothing to do"),
    ],
)
def test_what_would_not_be_equal_stays(options: dict[str, Any], note: str) -> None:
    plain = decoder(**options)
    changed, report = fold(plain)
    assert types(changed) == types(plain)
    assert not report.roles
    assert not report.skipped
    assert note in report.notes[0]


def test_other_roles_stay() -> None:
    assert "Interpolate" in types(fold(decoder(), "vae_encoder")[0])


def test_the_contract_is_kept() -> None:
    def bundle() -> ModelBundle:
        made = ModelBundle()
        made.models["vae_decoder"], made.models["unet"] = decoder(), decoder(mode="sizes")
        return made

    report = testing.check_transform(ovforge_diffusion, "fold-upsample", {}, bundle)
    assert report.roles == ("vae_decoder",)
