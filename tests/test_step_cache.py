"""Step caching of transformers against the same done to diffusers' by hooks, on torch in float32, with the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

import ovforge
import ovforge_diffusion
from families import agree, maker, pipeline, seeded
from ovforge import Use, testing
from ovforge.errors import ConfigError, ModelError
from ovforge.store.cache import Cache

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["a beautiful pink unicorn, 8k", "the blue cat!!"]
PIPELINES = {
    "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "flux2": "Flux2KleinPipeline", "zimage": "ZImagePipeline",
    "sana": "SanaPipeline", "pixart": "PixArtSigmaPipeline", "lumina2": "Lumina2Pipeline",
}  # fmt: skip
CALLS = {"flux": 2, "flux2": 2, "lumina2": 2}
"""How often diffusers' pipelines call the transformer in a guided step, if not once."""
CALL: dict[str, Any] = {"width": 24, "height": 16, "guidance_scale": 2.0}
STEPS = 8

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function that gives the folder of a family with three blocks or more, made once."""
    made: dict[str, Path] = {}

    def give(family: str) -> Path:
        if family not in made:
            target = tmp_path_factory.mktemp(family) / "pipeline"
            if family in ("sd3", "flux"):
                small = maker("test_transformers")
                changes = {"num_layers": 4} if family == "sd3" else {}
                made[family] = small.make_transformer_pipeline(target, torch_lcm, family, **changes)
            else:
                small = maker(f"test_{family}")
                small.SMALL |= {"zimage": {"n_layers": 4}, "sana": {"num_layers": 4}}.get(family, {})
                made[family] = getattr(small, f"make_{family}_pipeline")(target)
        return made[family]

    return give


def ours(
    source: Path, cache: Cache, task: str | Use = "text-to-image", call: dict[str, Any] | None = None, **options: Any
) -> Any:
    transforms = [Use("step-cache", **options)] if options else []
    return pipeline(source, cache, task, transforms=transforms, input=call or {})


def theirs(folder: Path, family: str, prompts: list[str], seeds: list[int], prepare: Any = None, **call: Any) -> Any:
    """Return pictures of diffusers; `prepare` changes its transformer."""
    pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if family == "sana":  # its autoencoder makes 2 pixels of a latent here, and diffusers takes multiples of 32
        pipe.check_inputs = lambda *given, **named: None
    if family in ("sana", "pixart"):
        call["use_resolution_binning"] = False
    if family == "pixart":
        call["clean_caption"] = False
    if family == "lumina2":
        pipe.vae_scale_factor = 2  # which the pipeline takes for 8, as of the published model
    if prepare is not None:
        prepare(pipe.transformer)
    given = {"num_inference_steps": STEPS, **CALL, **call}
    texts = list(prompts) if len(prompts) > 1 else prompts[0]  # Z-Image's pipeline writes into the list
    return pipe(prompt=texts, generator=seeded(seeds), **given).images


class Rule:
    """The arithmetic of the method on rows of numpy arrays, written as plainly as can be."""

    def __init__(self, interval: int | None, warmup: int = 1, order: int = 0, threshold: float | None = None) -> None:
        self.interval, self.warmup, self.order, self.threshold = interval, warmup, order, threshold
        self.known: list[tuple[int, Any]] = []  # (step, what the later blocks added) in full
        self.first: Any = None
        self.step = -1
        self.whole = 0

    def due(self, first: Any) -> bool:
        """Say whether a row runs in full at the next step, from what its first block adds."""
        self.step += 1
        if self.step < self.warmup or (self.interval is not None and self.step - self.known[-1][0] >= self.interval):
            return True
        change = (first - self.first).abs().mean() / self.first.abs().mean()
        return self.threshold is not None and bool(change > self.threshold)

    def learn(self, first: Any, added: Any) -> None:
        self.first, self.whole = first, self.whole + 1
        self.known.append((self.step, added))

    def predict(self) -> Any:
        """Return the value of the expansion of TaylorSeer, by diffusers' own code."""
        from diffusers.hooks.taylorseer_cache import TaylorSeerState

        state = TaylorSeerState(torch.float32, self.order)
        for step, added in self.known:
            state.current_step = step
            state.update((added,))
        state.current_step = self.step
        return state.predict()[0]


def blocks_of(module: Any) -> list[Any]:
    names = ("transformer_blocks", "single_transformer_blocks", "layers")
    return [block for name in names for block in getattr(module, name, ())]


def hooked(make: Callable[[], Rule], depth: int, rules: dict[Any, Rule], calls: int) -> Callable[[Any], None]:
    """Let a transformer of diffusers keep what its blocks after the first `depth` add, for each row by itself.

    The whole runs always; rows that are not due get what was predicted in place of what it gave. `rules` are those of
    each row of each of the `calls` that a step has.
    """

    def prepare(module: Any) -> None:
        own: dict[str, Any] = {"call": -1}
        blocks = blocks_of(module)

        def picture(made: Any) -> Any:
            """Return the stream of what a block gives: the picture's comes last, or beside the text's first."""
            return made[1] if isinstance(made, tuple) else made

        def before(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            own["begin"] = named["hidden_states"] if "hidden_states" in named else args[0]
            own["call"] = (own["call"] + 1) % calls

        def first(_: Any, __: Any, made: Any) -> None:
            own["first"] = picture(made) - own["begin"]
            if hasattr(module, "all_final_layer"):  # Z-Image's text stands behind the picture's 6 x 4 tokens
                own["first"] = own["first"][:, :24]

        def cut(_: Any, __: Any, made: Any) -> None:
            own["cut"] = picture(made)

        def last(_: Any, args: tuple[Any, ...]) -> Any:
            end, rest = args[0], args[1:]
            tokens = own["cut"].shape[1]
            rows = []
            for row in range(len(end)):
                key = (own["call"], row)
                rule = rules.setdefault(key, make())
                if rule.due(own["first"][row]):
                    rule.learn(own["first"][row], end[row, :tokens] - own["cut"][row])
                    rows.append(end[row])
                else:
                    rows.append(own["cut"][row] + rule.predict())
            return (torch.stack(rows), *rest)

        blocks[0].register_forward_pre_hook(before, with_kwargs=True)
        blocks[0].register_forward_hook(first)
        blocks[depth - 1].register_forward_hook(cut)
        final = module.all_final_layer["2-1"] if hasattr(module, "all_final_layer") else module.norm_out
        final.register_forward_pre_hook(last)

    return prepare


THRESHOLDS = {"flux": 0.66, "flux2": 1.2, "sana": 0.2, "sd3": 0.8, "zimage": 1.45, "pixart": 0.5}
"""Between what the first blocks of these random weights change by from step to step, which is much."""

CASES = [
    *((family, 1, {"threshold": threshold, "order": 1}) for family, threshold in THRESHOLDS.items()),
    ("flux", 3, {"interval": 3, "order": 2, "warmup": 2}),
    ("sd3", 2, {"interval": 3}),
    ("lumina2", 1, {"interval": 3, "order": 1}),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "depth", "rule"), CASES, ids=str)
def test_cached_steps_are_those_of_torch(
    folder: Folder, session_cache: Cache, family: str, depth: int, rule: dict[str, Any]
) -> None:
    """A guided batch of two, whose rows keep what is theirs, in the picture's tokens or in the text's as well."""
    rules: dict[Any, Rule] = {}
    guided = {**CALL, **({"true_cfg_scale": 2.0, "negative_prompt": "blue"} if family == "flux" else {})}
    given = {"interval": None, **rule}
    wanted = theirs(
        folder(family),
        family,
        PROMPTS,
        [7, 8],
        hooked(lambda: Rule(**given), depth, rules, CALLS.get(family, 1)),
        **guided,
    )
    foreseen = {"prompt": PROMPTS, **guided} if family == "sd3" else {}  # whose parts then have fixed shapes
    pipe = ours(folder(family), session_cache, Use("text-to-image"), foreseen, depth=depth, **rule)
    first = pipe(PROMPTS, steps=STEPS, seed=[7, 8], **guided)
    agree(first, wanted)
    assert len(rules) == 4, "two pictures, with the prompt and without"
    spans = first.timings.spans
    whole, outer = (len(spans.get(f"denoise.{role}", ())) for role in ("transformer", "transformer_shallow"))
    assert max(each.whole for each in rules.values()) <= whole < STEPS, "some steps are not run in full"
    assert outer == STEPS - (1 if "threshold" in rule else whole)
    assert pipe(PROMPTS[::-1], steps=STEPS, seed=[7, 8], **guided).images[0].tobytes() != first.images[0].tobytes()
    again = pipe(PROMPTS, steps=STEPS, seed=[7, 8], **guided)
    assert [one.tobytes() for one in again.images] == [one.tobytes() for one in first.images], "each run begins anew"
    alone = pipe(PROMPTS[1], steps=STEPS, seed=8, **guided)
    np.testing.assert_allclose(alone.latents[0], first.latents[1], atol=1e-3)
    split = ours(folder(family), session_cache, Use("text-to-image", guidance="split"), depth=depth, **rule)
    if family == "sana":
        agree(split(PROMPTS, steps=STEPS, seed=[7, 8], **guided), wanted)
    assert "step-cache" in str(first.provenance["config"])
    assert any("first" in line and "of the weights" in line for report in pipe.reports for line in report.applied)


def test_a_threshold_is_the_first_block_cache_of_diffusers(folder: Folder, session_cache: Cache) -> None:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    def prepare(transformer: Any) -> None:
        apply_first_block_cache(transformer, FirstBlockCacheConfig(threshold=0.7))

    wanted = theirs(folder("flux"), "flux", PROMPTS[:1], [7], prepare)
    made = ours(folder("flux"), session_cache, threshold=0.7)(PROMPTS[0], steps=STEPS, seed=7, **CALL)
    agree(made, wanted)
    assert 1 < len(made.timings.spans["denoise.transformer"]) < STEPS


def test_adapters_that_were_fused_are_in_both_parts(folder: Folder, session_cache: Cache, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    source = diffusers.FluxPipeline.from_pretrained(folder("flux"))
    torch.manual_seed(1)
    source.transformer.add_adapter(config)
    with torch.no_grad():
        for name, parameter in source.transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    layers = peft.get_peft_model_state_dict(source.transformer)
    diffusers.FluxPipeline.save_lora_weights(tmp_path, layers, weight_name="adapter.safetensors")

    def prepare(transformer: Any) -> None:
        transformer.load_lora_adapter(tmp_path, weight_name="adapter.safetensors", prefix="transformer")
        hooked(lambda: Rule(3), 1, {}, 1)(transformer)

    wanted = theirs(folder("flux"), "flux", PROMPTS[:1], [7], prepare)
    path, cut = str(tmp_path / "adapter.safetensors"), Use("step-cache", interval=3)
    made = pipeline(folder("flux"), session_cache, transforms=[Use("lora", path=path), cut])(
        PROMPTS[0], steps=STEPS, seed=7, **CALL
    )
    agree(made, wanted)
    assert len(made.timings.spans["denoise.transformer_shallow"]) == 5
    with pytest.raises(ModelError, match="switched while running"):
        pipeline(folder("flux"), session_cache, transforms=[Use("lora", path=path, mode="runtime"), cut])


def test_what_changes_nothing_is_exact(folder: Folder, session_cache: Cache) -> None:
    """Each step in full, by either option."""
    plain = ours(folder("sana"), session_cache)(PROMPTS[0], steps=4, seed=7, **CALL)
    for options in ({"interval": 1}, {"threshold": 0.0, "order": 2}):
        made = ours(folder("sana"), session_cache, **options)(PROMPTS[0], steps=4, seed=7, **CALL)
        np.testing.assert_array_equal(made.latents, plain.latents)


def test_what_cannot_be_cut_is_told(folder: Folder, session_cache: Cache, torch_family: Folder) -> None:
    with pytest.raises(ModelError, match="it has 4 blocks"):
        ours(folder("sana"), session_cache, depth=4)
    with pytest.raises(ModelError, match="first block of a transformer"):
        ours(torch_family("sd1"), session_cache, threshold=0.1)
    with pytest.raises(ConfigError, match="order"):
        ours(folder("sana"), session_cache, order=3)


def test_both_graphs_share_their_weights(folder: Folder, session_cache: Cache) -> None:
    bundle = ovforge.open_model(folder("flux"), options={"weights": "f32"}, cache=session_cache)
    transform = testing.extension(ovforge_diffusion, "transform", "step-cache")
    before = sum(
        op.get_byte_size() for op in bundle.models["transformer"].get_ops() if op.get_type_name() == "Constant"
    )
    transform.create(transform.options_model()()).apply(bundle)

    def constants(model: ov.Model) -> dict[str, int]:
        return {
            op.get_friendly_name(): op.data.__array_interface__["data"][0]
            for op in model.get_ops()
            if op.get_type_name() == "Constant" and op.data.size > 16
        }

    whole, outer = (constants(bundle.models[role]) for role in ("transformer", "transformer_shallow"))
    assert 0 < len(outer) < len(whole)
    assert all(whole[name] == place for name, place in outer.items()), "the same memory"
    after = sum(op.get_byte_size() for op in bundle.models["transformer"].get_ops() if op.get_type_name() == "Constant")
    assert after == before


def test_a_quantized_transformer_is_cut_at_the_same_place(folder: Folder, session_cache: Cache) -> None:
    """Fake quantization stands on the stream of tokens: with what the whole kept, the outer part gives the same."""
    nncf = pytest.importorskip("nncf")
    bundle = ovforge.open_model(folder("sana"), options={"weights": "f32"}, cache=session_cache)
    rng = np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((2, 4, 4, 6), np.float32),
        "timestep": np.array([500, 500], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, 7, 24), np.float32),
        "encoder_attention_mask": np.ones((2, 7), np.float32),
    }
    data, kind = nncf.Dataset([inputs]), nncf.ModelType.TRANSFORMER
    bundle.put("transformer", nncf.quantize(bundle.models["transformer"], data, subset_size=1, model_type=kind))
    assert any(op.get_type_name() == "FakeQuantize" for op in bundle.models["transformer"].get_ops())
    transform = testing.extension(ovforge_diffusion, "transform", "step-cache")
    report = transform.create(transform.options_model()(depth=2)).apply(bundle)
    assert "its first 2 of 4 blocks" in report.applied[0]
    whole, outer = (
        ov.Core().compile_model(bundle.models[role], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for role in ("transformer", "transformer_shallow")
    )
    made = whole(inputs)
    kept = {"ovforge_cached_features": made["ovforge_cached_features"]}
    np.testing.assert_allclose(outer({**inputs, **kept})[0], made[0], atol=1e-5)
    assert (
        np.abs(outer({**inputs, "ovforge_cached_features": 0 * made["ovforge_cached_features"]})[0] - made[0]).max()
        > 0.1
    )
