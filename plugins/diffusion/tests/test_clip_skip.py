"""clip-skip against diffusers: one text encoder and SDXL's two, with outputs for each layer and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ovforge_diffusion
from families import make_family
from ovforge import testing
from ovforge.config.options import checked
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource
from ovforge_diffusion.graph.clip_skip import ClipSkip, ClipSkipOptions

LAYERS = 4
PIPELINES = {"sd1": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}


def deepen(folder: Path) -> None:
    """Give each text encoder more layers, and norms that do something."""
    import torch
    import transformers

    for part in folder.glob("text_encoder*"):
        config = transformers.CLIPTextConfig.from_pretrained(part)
        config.num_hidden_layers = LAYERS
        torch.manual_seed(len(part.name))
        kind = transformers.CLIPTextModelWithProjection if part.name.endswith("_2") else transformers.CLIPTextModel
        model = kind(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(part)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("torch")
    made = {family: make_family(tmp_path_factory.mktemp(family) / "pipeline", family) for family in PIPELINES}
    for folder in made.values():
        deepen(folder)
    return made


@pytest.fixture
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let diffusers 0.42 find the parts of transformers 5's text encoder, which has no inner `text_model` any more."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.CLIPTextModel, "text_model"):
        monkeypatch.setattr(transformers.CLIPTextModel, "text_model", property(lambda self: self), raising=False)


def theirs(folder: Path, family: str, layers: int | None) -> tuple[Any, ...]:
    """Return token ids, text states of the prompt and of an equal negative one, and pooled ones, of diffusers."""
    import diffusers
    import torch

    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(folder)
    with torch.no_grad():
        made = pipe.encode_prompt(
            prompt="a pink cat", negative_prompt="a pink cat", device="cpu", num_images_per_prompt=1,
            do_classifier_free_guidance=True, clip_skip=layers,
        )  # fmt: skip
    ids = pipe.tokenizer("a pink cat", padding="max_length", max_length=77, return_tensors="np").input_ids
    return ids, made[0].numpy(), made[1].numpy(), made[2].numpy() if family == "xl" else None


def states(bundle: ModelBundle, ids: np.ndarray, *, negative: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what the task takes of the text encoders: see `TextEncoder`."""
    each, pooled = [], None
    for role in sorted(bundle.models):
        made = testing.run(bundle.models[role], {"input_ids": ids})
        numbers = sorted(int(name.rpartition(".")[2]) for name in made if name.startswith("hidden_states."))
        plain = f"hidden_states.{numbers[-1] - 1}" if "text_encoder_2" in bundle.models else "last_hidden_state"
        each.append(made[plain if negative else "skipped_states"])
        pooled = made.get("text_embeds")
    return np.concatenate(each, axis=-1), pooled


@pytest.mark.parametrize(("family", "hidden"), [("sd1", False), ("sd1", True), ("xl", True)])
def test_states_are_diffusers(folders: dict[str, Path], one_model: None, family: str, hidden: bool) -> None:
    from ovforge_diffusers.loader import DiffusersLoader
    from ovforge_diffusers.options import LoaderOptions

    folder = folders[family]
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "output_hidden_states": hidden}))
    loaded = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(folder))
    encoders = {role: loaded.models[role] for role in loaded.models if role.startswith("text_encoder")}
    for layers in (1, 2):
        bundle, other = ModelBundle(), ModelBundle()
        for role, model in encoders.items():
            bundle.models[role], other.models[role] = model.clone(), model.clone()
        bundle.configs = other.configs = loaded.configs
        report = ClipSkip(ClipSkipOptions(layers=layers)).apply(bundle)
        assert report.applied[0] == f"text_encoder: the last {layers} layers left out"
        ids, positive, negative, pooled = theirs(folder, family, layers)
        mine, mine_pooled = states(bundle, ids, negative=False)
        np.testing.assert_allclose(mine, positive, atol=1e-4)
        np.testing.assert_allclose(states(bundle, ids, negative=True)[0], negative, atol=1e-4)
        assert np.abs(positive - negative).max() > 1e-2
        ClipSkip(ClipSkipOptions(layers=layers, negative=True)).apply(other)
        np.testing.assert_allclose(states(other, ids, negative=True)[0], positive, atol=1e-4)
        if pooled is not None:
            np.testing.assert_allclose(mine_pooled, pooled, atol=1e-4)


def encoder(states: bool = False, norm: str = "MVN", layers: int = 3) -> Any:
    """Return CLIP's residual structure without its names: embeddings, two additions a layer, a last norm."""
    import openvino as ov
    from openvino import opset13 as ops

    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return ops.constant(rng.standard_normal(shape).astype(np.float32))

    def normalized(x: Any) -> Any:
        axes = ops.constant(np.array([-1]))
        if norm == "MVN":
            x = ops.mvn(x, axes, True, 1e-5, "inside_sqrt")
        else:
            x = ops.subtract(x, ops.reduce_mean(x, axes, True))
            spread = ops.reduce_mean(ops.multiply(x, x), axes, True)
            x = ops.divide(x, ops.sqrt(ops.add(spread, ops.constant(np.float32(1e-5)))))
        return ops.add(ops.multiply(x, weights(8)), weights(8))

    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    zero = ops.constant(np.int64(0))
    x = ops.add(ops.gather(weights(20, 8), ids, zero), ops.unsqueeze(weights(8), zero))
    stream = [x]
    for _ in range(layers):
        for _ in range(2):
            branch = ops.matmul(normalized(x), weights(8, 8), False, True)
            x = ops.add(x, ops.add(branch, weights(8)))
        stream.append(x)
    outputs = {"last_hidden_state": normalized(x)}
    if states:
        outputs |= {f"hidden_states.{number}": state for number, state in enumerate(stream)}
    results = [ops.result(node) for node in outputs.values()]
    model = ov.Model(results, [ids], "encoder")
    model.inputs[0].get_tensor().set_names({"input_ids"})
    for port, name in zip(model.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    return model


def bundle(**options: Any) -> ModelBundle:
    made = ModelBundle()
    made.models["text_encoder"] = encoder(**options)
    return made


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("norm", ["MVN", "parts"])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_layers_are_found_by_structure(states: bool, norm: str, skip: int) -> None:
    """The last norm of earlier states, as computed from an output for each layer."""
    whole = encoder(states=True, norm=norm)
    ids = {"input_ids": np.array([[3, 1, 4, 1, 5]])}
    each = testing.run(whole, ids)
    wanted = _last_norm(each[f"hidden_states.{3 - skip}"], norm)
    made = bundle(states=states, norm=norm)
    ClipSkip(ClipSkipOptions(layers=skip)).apply(made)
    found = testing.run(made.models["text_encoder"], ids)
    np.testing.assert_allclose(found.pop("skipped_states"), wanted, atol=1e-5)
    for name, value in found.items():
        np.testing.assert_allclose(value, each[name], atol=1e-5)
    made = bundle(states=states, norm=norm)
    ClipSkip(ClipSkipOptions(layers=skip, negative=True)).apply(made)
    found = testing.run(made.models["text_encoder"], ids)
    np.testing.assert_allclose(found["last_hidden_state"], wanted, atol=1e-5)
    assert sum(name.startswith("hidden_states.") for name in found) == (4 - skip if states else 0)


def _last_norm(states: np.ndarray, norm: str) -> np.ndarray:
    """Apply the last norm of `encoder`, whose weights are the last that it draws."""
    whole = encoder(states=True, norm=norm)
    weights = [node for node in whole.get_ordered_ops() if node.get_type_name() == "Constant"]
    rows = [node.data for node in weights if list(node.shape) == [8]]
    scale, shift = rows[-2:]
    centred = states - states.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift)


def test_the_contract_is_kept() -> None:
    testing.check_transform(ovforge_diffusion, "clip-skip", {"layers": 1}, bundle)
    testing.check_transform(ovforge_diffusion, "clip-skip", {"layers": 1, "negative": True}, bundle)


def test_what_cannot_be_left_out_is_said() -> None:
    with pytest.raises(ModelError, match="no more than 3 layers"):
        ClipSkip(ClipSkipOptions(layers=4)).apply(bundle())
    with pytest.raises(ModelError, match="no text encoder"):
        ClipSkip(ClipSkipOptions(layers=1)).apply(ModelBundle())
    other = ModelBundle()
    other.models["text_encoder"] = testing.small_model()
    with pytest.raises(ModelError, match="no 'last_hidden_state'"):
        ClipSkip(ClipSkipOptions(layers=1)).apply(other)
    other.models["text_encoder"] = encoder(layers=0)
    with pytest.raises(ModelError, match="cannot be told apart"):
        ClipSkip(ClipSkipOptions(layers=1)).apply(other)
    for kind in ("FluxTransformer2DModel", "Lumina2Transformer2DModel", "SanaTransformer2DModel"):
        beside = bundle()
        beside.configs["transformer"] = {"_class_name": kind}
        with pytest.raises(ModelError, match=f"a {kind} takes no states of CLIP's layers"):
            ClipSkip(ClipSkipOptions(layers=1)).apply(beside)
    xl = bundle()
    xl.configs["unet"] = {"addition_embed_type": "text_time"}
    with pytest.raises(ModelError, match=r"hidden_states\.N"):
        ClipSkip(ClipSkipOptions(layers=1)).apply(xl)
    xl.models["text_encoder"] = encoder(states=True)
    with pytest.raises(ModelError, match="no more than 2 layers"):
        ClipSkip(ClipSkipOptions(layers=3)).apply(xl)
    with pytest.raises(ConfigError, match="layers"):
        checked(ClipSkipOptions, {"layers": 0}, where="transform.0")
