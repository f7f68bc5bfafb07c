"""Token merging against the same done to a UNet of diffusers, by a plain reference of the method, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from openvino import opset13

import ovforge
import ovforge_diffusion
from ovforge import Use, testing
from ovforge.contracts.stages import Report
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.store.cache import Cache

Folder = Callable[[str], Path]


def groups(states: Any, height: int, width: int, ratio: float) -> list[list[int]]:
    """Return the groups of tokens of one picture, each from its destination on: the method, written as loops."""
    tokens = states / np.linalg.norm(states, axis=-1, keepdims=True)
    stays = [y * width + x for y in range(0, height - 1, 2) for x in range(0, width - 1, 2)]
    sources = [number for number in range(height * width) if number not in stays]
    closest = {one: max(stays, key=lambda other: float(tokens[one] @ tokens[other])) for one in sources}
    ranked = sorted(sources, key=lambda one: -float(tokens[one] @ tokens[closest[one]]))
    merged = ranked[: int(ratio * height * width)]
    alone = [[one] for one in sources if one not in merged]
    return alone + [[stay, *(one for one in merged if closest[one] == stay)] for stay in stays]


def patched(unet: Any, ratio: float, depth: int, branches: tuple[str, ...]) -> list[Any]:
    """Make a diffusers UNet merge tokens in the blocks of its outer levels. Returns the hooks."""
    torch = pytest.importorskip("torch")
    state: dict[str, Any] = {}
    hooks = [unet.register_forward_pre_hook(lambda _, given: state.update(size=given[0].shape[2:]))]

    def patch(block: Any, level: int) -> None:
        def before(_: Any, given: tuple[Any, ...]) -> None:
            height, width = (-(-int(side) // 2**level) for side in state["size"])
            state["groups"] = [groups(row, height, width, ratio) for row in given[0].numpy()]

        def merge(_: Any, __: Any, states: Any) -> Any:
            rows = zip(states, state["groups"], strict=True)
            return torch.stack([torch.stack([row[one].mean(0) for one in each]) for row, each in rows])

        def unmerge(_: Any, __: Any, states: Any) -> Any:
            whole = torch.empty(len(states), sum(map(len, state["groups"][0])), states.shape[-1])
            for row, (values, each) in enumerate(zip(states, state["groups"], strict=True)):
                for value, group in zip(values, each, strict=True):
                    whole[row, group] = value
            return whole

        hooks.append(block.register_forward_pre_hook(before))
        for norm, name in (("norm1", "attn1"), ("norm2", "attn2"), ("norm3", "ff")):
            if name in branches:
                hooks.append(getattr(block, norm).register_forward_hook(merge))
                hooks.append(getattr(block, name).register_forward_hook(unmerge))

    for level in range(depth):
        for part in (unet.down_blocks[level], unet.up_blocks[-1 - level]):
            for attention in getattr(part, "attentions", ()):
                for block in attention.transformer_blocks:
                    patch(block, level)
    return hooks


@pytest.fixture(scope="module")
def models(torch_family: Folder, session_cache: Cache) -> Callable[[str], Any]:
    """Return a function that gives a family's UNet as an ov.Model, and that of diffusers."""
    diffusers = pytest.importorskip("diffusers")

    def both(family: str) -> tuple[Any, Any]:
        folder = torch_family(family)
        bundle = ovforge.open_model(folder, options={"weights": "f32"}, cache=session_cache)
        return bundle.models["unet"], diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()

    return both


def merged(model: Any, **options: Any) -> tuple[Any, Report]:
    bundle = ModelBundle()
    bundle.models["unet"] = model
    transform = testing.extension(ovforge_diffusion, "transform", "token-merging")
    report = transform.create(transform.options_model()(**options)).apply(bundle)
    return bundle.models["unet"], report


def inputs(family: str, batch: int, height: int, width: int) -> dict[str, Any]:
    rng = np.random.default_rng(height)
    shapes: dict[str, tuple[int, ...]] = {
        "sample": (batch, 4, height, width), "encoder_hidden_states": (batch, 7, 56 if family == "xl" else 32)
    }  # fmt: skip
    if family == "xl":
        shapes |= {"text_embeds": (batch, 16), "time_ids": (batch, 6)}
    made: dict[str, Any] = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"timestep": np.array([500])}


ALL = ("attn1", "attn2", "ff")


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "options", "branches", "depth", "count"),
    [
        ("sd1", {}, ("attn1",), 1, "5 x self-attention, in 5 of 16"),
        ("sd1", {"ratio": 0.75, "max_downsample": 2, "merge_crossattn": True, "merge_mlp": True}, ALL, 2, "10 x MLP"),
        ("sd1", {"ratio": 0.3, "merge_attn": False, "merge_mlp": True}, ("ff",), 1, "5 x MLP"),
        ("xl", {"ratio": 0.3, "max_downsample": 2}, ("attn1",), 2, "6 x self-attention, in 6 of 18"),
    ],
)
def test_merged_tokens_are_those_of_the_method(
    models: Any, family: str, options: dict[str, Any], branches: tuple[str, ...], depth: int, count: str
) -> None:
    torch = pytest.importorskip("torch")
    plain, unet = models(family)
    changed, report = merged(plain, **options)
    assert count in report.applied[0]
    hooks = patched(unet, options.get("ratio", 0.5), depth, branches)
    try:
        for batch, height, width in ((2, 7, 10), (1, 8, 6)):
            given = inputs(family, batch, height, width)
            states, more = (
                {name: torch.from_numpy(given[name]) for name in names if name in given}
                for names in (("sample", "encoder_hidden_states"), ("text_embeds", "time_ids"))
            )
            with torch.no_grad():
                wanted = unet(
                    states["sample"], 500, states["encoder_hidden_states"], added_cond_kwargs=more
                ).sample.numpy()
            ours = next(iter(testing.run(changed, given).values()))
            np.testing.assert_allclose(ours, wanted, atol=1e-5)
            assert np.abs(ours - next(iter(testing.run(plain, given).values()))).max() > 1e-3, "and not the whole"
    finally:
        for hook in hooks:
            hook.remove()


def test_a_model_of_one_size_gives_the_same(models: Any) -> None:
    changed, _ = merged(models("sd1")[0])
    given = inputs("sd1", 1, 8, 6)
    fixed = changed.clone()
    fixed.reshape({name: value.shape for name, value in given.items()})
    ours, wanted = (next(iter(testing.run(model, given).values())) for model in (fixed, changed))
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize("ratio", [0.01, 0.75])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (2, 3), (8, 8)])
def test_pictures_of_a_few_tokens_work(models: Any, height: int, width: int, ratio: float) -> None:
    plain, _ = models("sd1")
    changed, _ = merged(plain, ratio=ratio, max_downsample=8)
    given = inputs("sd1", 2, height, width)
    fixed = changed.clone()
    fixed.reshape({name: value.shape for name, value in given.items()})
    ours, same, theirs = (next(iter(testing.run(model, given).values())) for model in (changed, fixed, plain))
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, same, atol=1e-5)
    if height * width * ratio < 1 or height * width == 1:
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg="there is no token to merge")


def test_weights_in_int8_change_nothing_of_it(models: Any) -> None:
    nncf = pytest.importorskip("nncf")
    plain, _ = models("sd1")
    options = {"ratio": 0.5, "merge_mlp": True}
    first, report = merged(nncf.compress_weights(plain.clone()), **options)
    assert "5 x self-attention, 5 x MLP" in report.applied[0]
    last = nncf.compress_weights(merged(plain, **options)[0])
    given = inputs("sd1", 1, 8, 6)
    ours, theirs, whole = (next(iter(testing.run(model, given).values())) for model in (first, last, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(ours - whole).max() > 1e-3


@pytest.mark.filterwarnings("error:.*did not report")
def test_in_a_pipeline_with_cached_steps(torch_family: Folder, session_cache: Cache) -> None:
    def images(*transforms: Use) -> tuple[Any, Any]:
        pipe = ovforge.Pipeline(
            "text-to-image", source=torch_family("sd1"), load={"weights": "f32"}, device=Use("cpu", precision="f32"),
            cache=session_cache, transforms=transforms,
        )  # fmt: skip
        return pipe, pipe("a cat", steps=3, width=32, height=24, seed=1)

    steps, tokens = Use("step-cache", interval=2), Use("token-merging")
    (pipe, first), (_, other) = images(steps, tokens), images(tokens, steps)
    said = [line for report in pipe.reports for line in report.applied if "transformer blocks" in line]
    assert [line.split(":")[0] for line in said] == ["unet", "unet_shallow"]
    assert "token-merging" in str(first.provenance["config"])
    np.testing.assert_allclose(first.images[0], other.images[0], atol=1)


def test_what_does_not_fit_is_skipped_with_the_reason(models: Any, torch_family: Folder, session_cache: Cache) -> None:
    with pytest.raises(ModelError, match="max_downsample = 2"):
        ovforge.Pipeline(
            "text-to-image", source=torch_family("xl"), cache=session_cache, transforms=[Use("token-merging")]
        )
    with pytest.raises(ConfigError, match="nothing is merged"):
        ovforge.Pipeline(
            "text-to-image", source=torch_family("sd1"), cache=session_cache,
            transforms=[Use("token-merging", merge_attn=False)],
        )  # fmt: skip
    fixed = models("sd1")[0].clone()
    fixed.reshape({"sample": [1, 4, 8, 8], "encoder_hidden_states": [1, 7, 32], "timestep": [1]})
    for node in fixed.get_ordered_ops():
        if node.get_type_name() == "Reshape":
            node.input(1).replace_source_output(opset13.constant(list(node.get_output_shape(0))).output(0))
    before = testing.run(fixed, inputs("sd1", 1, 8, 8))
    changed, report = merged(fixed)
    assert "do not take fewer tokens" in report.skipped[0].reason
    assert not report.applied
    after = testing.run(changed, inputs("sd1", 1, 8, 8))
    np.testing.assert_array_equal(next(iter(after.values())), next(iter(before.values())))
    assert "no transformer blocks" in merged(_without_blocks())[1].skipped[0].reason
    transform = testing.extension(ovforge_diffusion, "transform", "token-merging")
    assert "no UNet" in transform.create(transform.options_model()()).apply(ModelBundle()).skipped[0].reason


def _without_blocks() -> Any:
    sample = opset13.parameter([-1, 4, -1, -1], np.float32, name="sample")
    model = ov.Model([opset13.relu(sample)], [sample])
    model.inputs[0].get_tensor().set_names({"sample"})
    return model
