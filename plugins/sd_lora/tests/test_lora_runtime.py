"""Adapters that are switched while a pipeline runs, on plain and compressed weights; and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from typer.testing import CliRunner

import ovforge
from families import agree
from ovforge import Use
from ovforge.cli import app
from ovforge.errors import ConfigError, ModelError
from ovforge.model.runtime import core
from ovforge.store.cache import Cache
from ovforge_sd_lora.adapter import open_adapter
from ovforge_sd_lora.options import LoraOptions
from ovforge_sd_lora.runtime import attach
from ovforge_sd_lora.switch import running_adapter
from ovforge_sd_lora.targets import find_targets
from ovforge_sd_lora.transform import LoraTransform

from .conftest import Family, compress

Families = Callable[[str], Family]
Lora = Callable[..., Path]

F32 = Use("cpu", precision="f32")
PROMPT = "a beautiful pink unicorn, 8k"


def pictures(pipe: Any, steps: int = 2) -> Any:
    return pipe(PROMPT, steps=steps, guidance_scale=2.0, seed=3, width=16, height=24)


def ours(family: Family, *transforms: Use, cache: Cache | None = None, **more: Any) -> ovforge.Pipeline:
    scheduler = Use("diffusers", class_name="DDIMScheduler")
    return ovforge.Pipeline(
        "text-to-image", family.converted, transforms=transforms, device=F32, scheduler=scheduler, cache=cache, **more
    )


def test_switching_is_as_good_as_fusing_and_leaves_nothing(family: Families, lora: Lora, cache: Cache) -> None:
    """Two adapters on: equal to fusing both. Off or unloaded: bit-equal to the model without. A hundred times over."""
    first, second = lora("sd1", 0), lora("sd1", 1)
    fused = ours(
        family("sd1"), Use("lora", path=first, scale=0.7, name="a"), Use("lora", path=second, scale=-0.4, name="b"),
        cache=cache,
    )  # fmt: skip
    wanted = pictures(fused)
    plain = pictures(ours(family("sd1"), cache=cache))
    pipe = ours(
        family("sd1"), Use("lora", path=first, name="a", mode="runtime"),
        Use("lora", path=second, name="b", mode="runtime", scale=0), cache=cache,
    )  # fmt: skip
    assert dict(pipe.adapters) == {"a": 1.0, "b": 0.0}
    pipe.adapters.set({"a": 0.7, "b": -0.4})
    on = pictures(pipe)
    agree(on, wanted.images)
    assert np.abs(on.latents - wanted.latents).max() < 1e-3 * np.abs(wanted.latents).max()
    pipe.adapters.off()
    assert np.array_equal(pictures(pipe).latents, plain.latents)
    for weight in np.linspace(-1, 1, 100):
        pipe.adapters.set({"a": weight, "b": weight})
        pipe.adapters.off()
    assert np.array_equal(pictures(pipe).latents, plain.latents)
    pipe.adapters.set({"b": -0.4, "a": 0.7})
    assert np.array_equal(pictures(pipe).latents, on.latents)
    pipe.adapters.unload("a")
    pipe.adapters.load("lora", path=str(first), name="again", scale=0.5)
    pipe.adapters.unload()
    assert np.array_equal(pictures(pipe).latents, plain.latents)


def test_the_weights_are_left_alone(family: Families, lora: Lora) -> None:
    bundle, before = family("sd1").bundle(), family("sd1").bundle()
    LoraTransform(LoraOptions(path=lora("sd1", 1), mode="runtime", places="all")).apply(bundle)
    ours_, theirs = (find_targets("unet", each.models["unet"]) for each in (bundle, before))
    assert all(np.array_equal(ours_[path].weight(), theirs[path].weight()) for path in theirs)
    places = bundle.adapters[lora("sd1", 1).stem]["unet"]
    layers = [path for path, target in theirs.items() if target.kind != "norm"]
    assert {f"lora/{path}.A" for path in layers} == {name for name in places if name.endswith(".A")}


def test_an_adapter_for_other_layers_needs_places(family: Families, lora: Lora, cache: Cache) -> None:
    few, more = lora("sd1", 0, text=False), lora("sd1", 1, text=False)
    pipe = ours(family("sd1"), Use("lora", path=few, name="few", mode="runtime"), cache=cache)
    with pytest.raises(ModelError, match=r'no place was made there .*places = "all"'):
        pipe.adapters.load("lora", path=str(more), name="more")
    assert dict(pipe.adapters) == {"few": 1.0}
    ready = ours(family("sd1"), Use("lora", path=few, name="few", mode="runtime", places="all"), cache=cache)
    ready.adapters.load("lora", path=str(more), name="more", scale=0.6)
    wanted = ours(
        family("sd1"), Use("lora", path=few, name="few"), Use("lora", path=more, name="more", scale=0.6), cache=cache
    )
    agree(pictures(ready), pictures(wanted).images)


def test_branches_on_an_input_of_the_model_stay_finite(family: Families, tmp_path: Path) -> None:
    """Keys and values of cross-attention: where the CPU plugin fuses their branches, most of these runs give NaN."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    targets = find_targets("unet", family("small").bundle().models["unet"])

    def write(rank: int, scale: float, *ends: str) -> str:
        tensors = {}
        for path, target in targets.items():
            if path.endswith(ends):
                name = f"lora_unet_{path.replace('.', '_')}"
                down, up = (rank, target.shape[1]), (target.shape[0], rank)
                tensors[f"{name}.lora_down.weight"] = scale * rng.standard_normal(down, np.float32)
                tensors[f"{name}.lora_up.weight"] = scale * rng.standard_normal(up, np.float32)
        save_file(tensors, tmp_path / f"{rank}.safetensors")
        return str(tmp_path / f"{rank}.safetensors")

    first = write(2, 0.05, "to_q", "to_v", "attn2.to_k")
    files = [write(rank, 0.3, "to_q", "to_v") for rank in (9, 24)]
    pipe = ours(family("small"), Use("lora", path=first, name="first", mode="runtime"))
    pipe.adapters.off()
    plain = pictures(pipe, steps=3).latents
    for number in range(6):
        pipe.adapters.load("lora", path=files[number % 2], name="other")
        assert np.isfinite(pictures(pipe, steps=3).latents).all()
        pipe.adapters.unload("other")
        assert np.array_equal(pictures(pipe, steps=3).latents, plain)


@pytest.mark.parametrize("before", ["as it is", "in another shape", "in another precision"])
def test_compressed_layers_on_an_input_take_another_tensor(before: str) -> None:
    """Pooled texts, in FLUX.1 and Stable Diffusion 3: where the CPU plugin fuses such a branch, the second run is wrong."""
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)
    pooled = ops.parameter([-1, 32], np.float32, "pooled")
    pooled.output(0).get_tensor().set_names({"pooled"})
    x = pooled
    if before == "in another shape":
        x = ops.reshape(pooled, ops.constant(np.array([-1, 32])), False)
    if before == "in another precision":
        x = ops.convert(ops.convert(pooled, "f16"), "f32")
    layer = ops.matmul(x, ops.constant(rng.standard_normal((32, 32), np.float32)), False, True)
    layer.set_friendly_name("__module.time_text_embed.text_embedder.linear_1/aten::linear/MatMul")
    made = ops.gelu(ops.add(layer, ops.constant(rng.standard_normal(32, np.float32))), "erf")
    model = compress(ov.Model([made], [pooled], "model"), "INT8_ASYM")
    [target] = find_targets("transformer", model).values()
    attach(model, target, "weight")
    request = core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    factors = {".A": np.full((1, 32), 0.1, "f"), ".s": np.ones((1, 1), "f"), ".B": np.ones((32, 1), "f")}
    for state in request.query_state():
        state.state = ov.Tensor(factors[state.name[-2:]])
    values = rng.standard_normal((2, 32), np.float32)
    inputs, found = [values.copy() for _ in range(4)], []  # each where the others are not
    for each in inputs:
        request.set_tensor("pooled", ov.Tensor(each))
        request.infer()
        found.append(request.get_output_tensor(0).data.copy())
    assert all(np.array_equal(each, found[0]) for each in found)


def test_a_model_with_branches_is_compiled_at_each_start(family: Families, lora: Lora, cache: Cache) -> None:
    """The runtime writes it and does not read it: neither is a wrong entry stored, nor a warning given."""
    use = Use("lora", path=lora("small", 0, text=False), mode="runtime")
    for start in range(2):
        pipe = ours(family("small"), use, cache=cache)
        cached = {role: model.cached for role, model in pipe.compiled.all()}
        assert not cached["unet"] and (cached["text_encoder"] or start == 0)
    planned = ovforge.plan(pipe.config, cache=cache)
    assert [s.why for s in planned.stages if s.stage == "compile unet"] == [
        "models with adapters cannot be stored when compiled"
    ]


def test_two_of_one_name_are_refused(family: Families, lora: Lora) -> None:
    use = Use("lora", path=lora("sd1"), mode="runtime")
    with pytest.raises(ConfigError, match="two adapters are called"):
        ours(family("sd1"), use, use)


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT4_SYM"])
def test_on_compressed_weights_auto_acts_beside_them(family: Families, lora: Lora, mode: str) -> None:
    """INT8 and INT4 stay as they are; the result is base + adapter, as if the opened weights had been changed."""
    path = lora("small", 1)
    results = {}
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((1, 4, 8, 8), np.float32),
        "timestep": np.array([500]),
        "encoder_hidden_states": rng.standard_normal((1, 77, 32), np.float32),
    }
    for how in ("auto", "fuse"):
        bundle = family("small").compressed(mode)
        options = LoraOptions(path=path, scale=0.7, mode=how, roles=["unet"])
        report = LoraTransform(options).apply(bundle)
        assert ("stay as they are" if how == "auto" else "not quantized again") in report.notes[0]
        # Dynamic quantization of activations, which the CPU does to INT4 and INT8, would hide the adapter's rounding.
        hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        request = core().compile_model(bundle.models["unet"], "CPU", hints).create_infer_request()
        adapter = running_adapter(options, bundle)
        assert (adapter is not None) == (how == "auto")
        values = adapter.values(0.7)["unet"] if adapter else {}
        for state in request.query_state():
            state.state = ov.Tensor(values[state.name])
        results[how] = request.infer(inputs)["out_sample"].copy()
    assert np.abs(results["auto"] - results["fuse"]).max() < 2e-3 * np.abs(results["fuse"]).max()


def test_an_adapter_and_a_scheduler_make_few_steps(family: Families, lora: Lora, cache: Cache) -> None:
    """LCM-LoRA's way: another sampling method, one adapter, no guidance; by config alone, as diffusers does it."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    path = lora("sd1", 1, text=False)
    pipe = family("sd1").pipe()
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(path)
    theirs = pipe(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=1.0,
        width=16,
        height=24,
        generator=torch.Generator().manual_seed(5),
    ).images
    config = {
        "task": "text-to-image",
        "load": str(family("sd1").converted),
        "transform": [{"use": "lora", "path": str(path)}],
        "scheduler": "lcm",
        "device": {"precision": "f32"},
        "input": {"steps": 4, "guidance_scale": 1.0, "seed": 5, "width": 16, "height": 24, "prompt": PROMPT},
    }
    agree(ovforge.load(config, cache=cache)(), theirs)


def test_generate_takes_an_adapter(family: Families, lora: Lora, tmp_path: Path) -> None:
    """The article's command: -l FILE -a ALPHA."""
    made = tmp_path / "made.png"
    command = [
        "generate", "-p", PROMPT, "-m", str(family("sd1").converted), "-l", str(lora("sd1", 0)), "-a", "0.5", "-s", "3",
        "--precision", "f32", "--steps", "2", "-g", "2.0", "--width", "16", "--height", "24", "--scheduler", "ddim",
        "-o", str(made), "-c", str(tmp_path / "cache"), "-q",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    from ovforge.model.results import read_provenance

    adapter = read_provenance(made)["config"]["transform"][0]
    assert (adapter["use"], adapter["scale"]) == ("lora", 0.5)


def test_inspect_opens_what_a_package_ships() -> None:
    shown = CliRunner().invoke(
        app, ["lora", "inspect", "package:ovforge_sd_lora/examples/pencil.safetensors", "--json"]
    )
    assert shown.exit_code == 0, shown.output
    told = json.loads(shown.stdout)
    assert told["roles"]["unet"]["kinds"]
    assert (told["words"], told["adapters"], told["unknown"]) == ([], [], [])


def test_inspect_tells_what_fits(family: Families, lora: Lora, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(lora("sd1", 0))
    tensors["lora_unet_nowhere.lora_up.weight"] = tensors["lora_unet_nowhere.lora_down.weight"] = np.eye(2, dtype="f")
    tags = json.dumps({"10_cat": {"sks cat": 20, "sitting": 3}})
    path = tmp_path / "shown.safetensors"
    save_file(tensors, path, {"ss_tag_frequency": tags, "ss_base_model_version": "sd_v1", "ss_output_name": "Shown"})
    runner = CliRunner()
    arguments = ["lora", "inspect", str(path), "--model", str(family("sd1").converted)]
    told = json.loads(runner.invoke(app, [*arguments, "--json"]).stdout)
    assert told["trigger_words"] == ["sks cat", "sitting"]
    assert (told["title"], told["base_model"], told["cross_attention"]) == ("Shown", "sd_v1", 32)
    assert told["roles"]["unet"]["ranks"] == {"2": 23, "3": 32, "4": 121} or sum(
        told["roles"]["unet"]["ranks"].values()
    )
    assert told["model"]["unmatched"] == [{"key": "unet: nowhere", "why": "the model has no such layer"}]
    assert len(told["model"]["matched"]) == len(open_adapter(path, "x").modules) - 1
    share = told["model"]["touched"]["unet"]
    assert 0 < share["numbers"] < share["of"]
    shown = runner.invoke(app, [*arguments, "--keys"]).output
    assert "nowhere" in shown
    assert "trigger words: sks cat, sitting" in shown.lower()
    wrong = runner.invoke(app, ["lora", "inspect", str(lora("xl")), "--model", str(family("sd1").converted)])
    assert isinstance(wrong.exception, ModelError)


def test_any_order_of_writing_is_one_plan(family: Families, lora: Lora, cache: Cache) -> None:
    """What fuses comes before quantization, what is switched after it; the files' content is in the keys."""
    pytest.importorskip("ovforge_nncf")
    fused = {"use": "lora", "path": str(lora("sd1", 0, text=False)), "name": "fused", "mode": "fuse"}
    beside = {"use": "lora", "path": str(lora("sd1", 1, text=False)), "name": "beside", "mode": "runtime"}
    plans = []
    for transforms in ([fused, beside], [beside, fused]):
        config = {
            "task": "text-to-image", "load": str(family("sd1").converted), "scheduler": "ddim", "transform": transforms,
            "quantize": ["nncf-weights"],
        }  # fmt: skip
        planned = ovforge.plan(config, cache=cache).stages
        plans.append([(stage.stage, stage.use) for stage in planned])
    assert plans[0] == plans[1]
    names = [stage for stage, _ in plans[0]]
    steps = ["transform (fuse)", "quantizer (precision)", "transform (attach)"]
    assert [name for name in names if name in steps] == steps
    # Not smaller: OpenVINO 2026.4 does not compile compressed 1x1 convolutions of a single pixel.
    pipe = ovforge.load({**config, "input": {"width": 32, "height": 32}}, cache=cache)
    assert dict(pipe.adapters) == {"beside": 1.0}
    assert pipe(PROMPT, steps=1, seed=1).provenance["adapters"] == {"beside": {"weight": 1.0}}


def test_a_fixed_size_folds_around_a_branch(family: Families, lora: Lora, cache: Cache) -> None:
    """The task's own transforms replace convolutions that adapters act on; the result is that of fusing."""
    pytest.importorskip("torch")
    path = lora("small", 1, text=False)
    found = []
    for mode in ("fuse", "runtime"):
        pipe = ovforge.Pipeline(
            "text-to-image", family("small").torch, load={"weights": "f32", "width": 16, "height": 24}, cache=cache,
            transforms=[Use("lora", path=path, mode=mode, places="all")], device=F32, scheduler="ddim",
            input={"width": 16, "height": 24},
        )  # fmt: skip
        folded = next(report for report in pipe.reports if any("up-sampling" in line for line in report.applied))
        assert any(line.startswith("unet") for line in folded.applied)
        found.append(pictures(pipe))
    agree(found[1], found[0].images)
