"""The plugin keeps ovforge's contract, and does what it says."""

from __future__ import annotations

import numpy as np
from ovforge import testing

import ovforge_my_plugin


def test_contract() -> None:
    testing.check_plugin(ovforge_my_plugin)


def test_the_transform_keeps_its_contract() -> None:
    report = testing.check_transform(ovforge_my_plugin, "my-plugin", {"factor": 2.0}, testing.small_bundle)
    assert report.roles == ("model",)


def test_outputs_are_multiplied() -> None:
    bundle, plain = testing.small_bundle(), testing.small_bundle()
    transform = testing.extension(ovforge_my_plugin, "transform", "my-plugin")
    transform.create(transform.options_model()(factor=2.0)).apply(bundle)
    x = np.ones((1, 4), np.float32)
    changed, before = (testing.run(one.models["model"], {"x": x})["y"] for one in (bundle, plain))
    np.testing.assert_allclose(changed, 2 * before, rtol=1e-5)


def test_a_role_that_is_missing_is_reported() -> None:
    transform = testing.extension(ovforge_my_plugin, "transform", "my-plugin")
    report = transform.create(transform.options_model()(role="unet")).apply(testing.small_bundle())
    assert report.skipped[0].item == "unet"
