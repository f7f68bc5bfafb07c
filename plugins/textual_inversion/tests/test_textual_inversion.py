"""Whole pipelines with learned words against diffusers' own, what results tell, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import ovforge
import ovforge_textual_inversion
from families import agree, said_of_call
from ovforge import Use, testing
from ovforge.cli import app
from ovforge.config.options import checked, input_files
from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource
from ovforge.store.cache import Cache
from ovforge_textual_inversion.options import TextualInversionOptions
from ovforge_textual_inversion.transform import TextualInversion, unload

torch = pytest.importorskip("torch")

F32 = Use("cpu", precision="f32")
FULL = {"weights": "f32"}
SMALL: dict[str, Any] = {"steps": 2, "width": 16, "height": 16, "guidance_scale": 2.0}
SHIPPED = "package:ovforge_textual_inversion/teal.safetensors"
Folder = Callable[[str], Path]


def rows(vectors: int, width: int = 32, seed: int = 0) -> np.ndarray[Any, Any]:
    """Return vectors as large as those of a text encoder with random weights."""
    return (np.random.default_rng(seed).normal(size=(vectors, width)) * 0.05).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Return files of three forms: one vector, three, and two for SDXL."""
    save_file({"<cat-toy>": rows(1)}, tmp_path / "learned_embeds.safetensors")
    web = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.from_numpy(rows(3, seed=1))}, "name": "zork"}
    torch.save(web, tmp_path / "zork.pt")
    save_file({"clip_l": rows(2, seed=2), "clip_g": rows(2, 24, seed=3)}, tmp_path / "style.safetensors")
    return {path.stem: path for path in tmp_path.iterdir()}


def taught(*paths: Path, **options: Any) -> Use:
    return Use("textual-inversion", path=[str(path) for path in paths], **options)


def pipeline(source: Path, cache: Cache, *transforms: Any, task: Any = "text-to-image", **options: Any) -> Any:
    scheduler = Use("diffusers", class_name="DDIMScheduler")
    return ovforge.Pipeline(
        task, source=source, load=FULL, device=F32, cache=cache, scheduler=scheduler, transforms=transforms, **options
    )


def reference(source: Path, xl: bool = False) -> Any:
    diffusers = pytest.importorskip("diffusers")
    name = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    pipe = getattr(diffusers, name).from_pretrained(source)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def apply(bundle: ModelBundle, *paths: Path, **options: Any) -> Any:
    given = {"path": [str(path) for path in paths], **options}
    return TextualInversion(checked(TextualInversionOptions, given, where="test")).apply(bundle)


PROMPTS = ["a <cat-toy> on a zork, 8k", "zork<cat-toy>zork, unicorn", "a photo"]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_pictures_are_those_of_diffusers(
    family: str, ti_torch: Folder, ti_cache: Cache, files: dict[str, Path]
) -> None:
    theirs = reference(ti_torch(family))
    theirs.load_textual_inversion(str(files["learned_embeds"]))
    theirs.load_textual_inversion(str(files["zork"].parent), weight_name="zork.pt")
    ours = pipeline(ti_torch(family), ti_cache, taught(files["learned_embeds"], files["zork"]))
    tokenizer = ours.compiled["tokenizer"]
    table = theirs.text_encoder.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table[559:], np.concatenate([rows(1), rows(3, seed=1)]))
    for prompt in PROMPTS:
        wanted = theirs.tokenizer(theirs.maybe_convert_prompt(prompt, theirs.tokenizer), padding="max_length")
        np.testing.assert_array_equal(tokenizer([prompt])["input_ids"][0], wanted.input_ids)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    images = theirs(
        PROMPTS, negative_prompt=["", "zork", "<cat-toy>"], num_inference_steps=2, guidance_scale=2.0, width=16,
        height=16, generator=generators,
    ).images  # fmt: skip
    result = ours(PROMPTS, negative_prompt=["", "zork", "<cat-toy>"], seed=[5, 6, 7], **SMALL)
    agree(result, images)
    assert result.provenance["learned_tokens"] == ["<cat-toy>", "zork"]
    assert not said_of_call(ours, result), "a negative prompt may be the one that uses a word"
    without = pipeline(ti_torch(family), ti_cache)(PROMPTS[0], seed=5, **SMALL)
    assert (without.latents != result.latents[:1]).any(), "the words must change the picture"


def test_both_text_encoders_of_sdxl(ti_torch: Folder, ti_cache: Cache, files: dict[str, Path]) -> None:
    theirs = reference(ti_torch("xl"), xl=True)
    for suffix, part, width in (("", "clip_l", 32), ("_2", "clip_g", 24)):
        theirs.load_textual_inversion(
            {"style": torch.from_numpy(rows(2, width, seed=2 if part == "clip_l" else 3))},
            tokenizer=getattr(theirs, f"tokenizer{suffix}"),
            text_encoder=getattr(theirs, f"text_encoder{suffix}"),
        )
    options = {"guidance_scale": 2.0, "width": 16, "height": 16, "num_inference_steps": 2}
    images = theirs("a cat, style", generator=torch.Generator().manual_seed(3), **options).images
    ours = pipeline(ti_torch("xl"), ti_cache, taught(files["style"]))
    result = ours("a cat, style", seed=3, **SMALL)
    agree(result, images)
    assert result.provenance["learned_tokens"] == ["style"]
    applied = [line for report in ours.reports for line in report.applied]
    assert f"style: 2 vectors of {files['style']} in text_encoder, text_encoder_2" in applied


def test_results_tell_what_was_used(ti_torch: Folder, ti_cache: Cache, files: dict[str, Path]) -> None:
    """Also with weights and chunks, next to signs; words that were cut off were not used."""
    pipe = pipeline(ti_torch("sd1"), ti_cache, taught(files["learned_embeds"], files["zork"]))
    result = pipe(["a zork", "a photo"], seed=1, **SMALL)
    assert result.provenance["learned_tokens"] == ["zork"]
    assert said_of_call(pipe, result) == ["the prompt 'a photo' uses none of the learned words: <cat-toy>, zork"]
    cut = pipe("the " * 75 + "<cat-toy>", seed=1, **SMALL)
    assert cut.provenance["learned_tokens"] == []
    assert ["cut off: '<cat-toy>'" in said for said in said_of_call(pipe, cut)] == [True, False]
    part = pipe("the " * 73 + "zork", seed=1, **SMALL)
    assert part.provenance["learned_tokens"] == ["zork"]
    assert "cut off: 'zork'" in part.warnings[0]
    use = Use("text-to-image", prompts="weighted", long_prompts="chunks")
    weighted = pipeline(ti_torch("sd1"), ti_cache, taught(files["learned_embeds"], files["zork"]), task=use)
    long = weighted("the " * 75 + "(<cat-toy>:1.3)zork, [zork]", seed=1, **SMALL)
    assert long.provenance["learned_tokens"] == ["<cat-toy>", "zork"]
    assert not said_of_call(weighted, long)
    other = weighted("the " * 75 + "(<cat-toy>:1.2)zork, [zork]", seed=1, **SMALL)
    assert (other.latents != long.latents).any()
    low = Use("text-to-image", low_memory=True)
    again = pipeline(ti_torch("sd1"), ti_cache, taught(files["learned_embeds"], files["zork"]), task=low)
    for _ in range(2):  # a model that was released is still one that has learned
        np.testing.assert_array_equal(again(["a zork", "a photo"], seed=1, **SMALL).latents, result.latents)
    assert "learned_tokens" not in pipeline(ti_torch("sd1"), ti_cache)("a zork", seed=1, **SMALL).provenance


@pytest.mark.parametrize("long_prompts", ["cut", "chunks"])
def test_a_word_that_fills_every_place(long_prompts: str, ti_torch: Folder, ti_cache: Cache, tmp_path: Path) -> None:
    save_file({"full": rows(75)}, tmp_path / "full.safetensors")
    save_file({"more": rows(76)}, tmp_path / "more.safetensors")
    use = Use("text-to-image", long_prompts=long_prompts)
    words = taught(tmp_path / "full.safetensors", tmp_path / "more.safetensors")
    pipe = pipeline(ti_torch("sd1"), ti_cache, words, task=use)
    assert not said_of_call(pipe, pipe("full", seed=1, **SMALL))
    if long_prompts == "chunks":
        assert not said_of_call(pipe, pipe("a full x", seed=1, **SMALL)), "each word has a chunk of its own"
        assert "'more' has more vectors than a chunk" in pipe("more", seed=1, **SMALL).warnings[0]
        return
    assert "cut off: 'more'" in pipe("more", seed=1, **SMALL).warnings[0]
    assert "cut off: 'fullx'" in pipe("fullx", seed=1, **SMALL).warnings[0]


def test_the_shipped_word(tmp_path: Path) -> None:
    """`ovforge run examples/textual_inversion.toml`: something teal."""
    from PIL import Image

    example = Path(__file__).parents[3] / "examples" / "textual_inversion.toml"
    done = CliRunner().invoke(app, ["run", str(example), "-o", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"), np.int16)
        provenance = json.loads(image.info["ovforge"])
    assert provenance["learned_tokens"] == ["<teal>"]
    object_ = pixels[(pixels.max(axis=2) < 160)]
    red, green, blue = np.median(object_, axis=0)
    assert green - red > 40
    assert blue - red > 40


def test_contract(ti_bundle: Callable[..., ModelBundle], files: dict[str, Path]) -> None:
    testing.check_plugin(ovforge_textual_inversion)
    options = {"path": str(files["zork"])}
    report = testing.check_transform(
        ovforge_textual_inversion, "textual-inversion", options, lambda: without_detokenizer(ti_bundle("sd1"))
    )
    assert report.roles == ("text_encoder", "tokenizer")


def without_detokenizer(bundle: ModelBundle) -> ModelBundle:
    """Return a bundle with models that the contract can compile: detokenizers have inputs of another kind."""
    for role in [role for role in bundle.models if role.startswith("detokenizer")]:
        del bundle.models[role]
    return bundle


def saved(bundle: ModelBundle, folder: Path) -> dict[str, bytes]:
    bundle.save(folder, replace=True)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_unloaded_nothing_is_left(
    family: str, ti_bundle: Callable[..., ModelBundle], files: dict[str, Path], tmp_path: Path
) -> None:
    """Taught in two steps, written, read: the models have their bytes back, the files what they said."""
    before = saved(ti_bundle(family), tmp_path / "before")
    bundle = ti_bundle(family)
    apply(bundle, files["style"], **({} if family == "xl" else {"roles": "text_encoder"}))
    apply(bundle, files["zork"], roles="text_encoder")
    after = saved(bundle, tmp_path / "after")
    assert json.loads(after["learned_tokens.json"])["tokenizer"] == {"style": [559, 560], "zork": [561, 562, 563]}
    assert json.loads(after["text_encoder/config.json"])["vocab_size"] == 564
    again = ModelBundle.open(FileSource(tmp_path / "after"))
    unload(again)
    restored = saved(again, tmp_path / "restored")
    assert restored.keys() == before.keys()
    for path, data in before.items():
        if path.endswith(".json"):
            assert json.loads(restored[path]) == json.loads(data), path
        else:
            assert restored[path] == data, path


def test_words_learned_one_after_another_are_words_learned_at_once(
    ti_bundle: Callable[..., ModelBundle], files: dict[str, Path]
) -> None:
    one, other = ti_bundle("sd1"), ti_bundle("sd1")
    apply(one, files["learned_embeds"], files["zork"])
    apply(other, files["learned_embeds"])
    apply(other, files["zork"])
    assert json.loads(one.assets["learned_tokens.json"]) == json.loads(other.assets["learned_tokens.json"])
    ids = {"input_ids": np.array([[557, 559, 560, 561, 562, 64, 558]])}
    for name, states in testing.run(one.models["text_encoder"], ids).items():
        np.testing.assert_array_equal(states, testing.run(other.models["text_encoder"], ids)[name])


def test_a_quantized_model_learns_words(ti_torch: Folder, ti_cache: Cache, files: dict[str, Path]) -> None:
    """Words come last, whatever is written first: one plan, and other prompts stay as they were."""
    pytest.importorskip("nncf")
    eight = {"quantize": [Use("nncf-weights", roles=["text_encoder"])]}
    words, skip = taught(files["zork"]), Use("clip-skip", layers=1)
    plans = [
        [stage.use for stage in ovforge.plan(config(ti_torch("sd1"), order, eight), cache=ti_cache).stages]
        for order in ([words, skip], [skip, words])
    ]
    assert plans[0] == plans[1]
    assert plans[0].index("clip-skip") < plans[0].index("nncf-weights") < plans[0].index("textual-inversion")
    alone = pipeline(ti_torch("sd1"), ti_cache, **eight)
    both = pipeline(ti_torch("sd1"), ti_cache, words, **eight)
    ours, theirs = both("a pink cat", seed=1, **SMALL), alone("a pink cat", seed=1, **SMALL)
    np.testing.assert_allclose(ours.latents, theirs.latents, atol=2e-3)
    assert "uses none" in ours.warnings[0]
    assert (both("a zork", seed=1, **SMALL).latents != alone("a zork", seed=1, **SMALL).latents).any()


def config(source: Path, transforms: list[Use], more: dict[str, Any]) -> dict[str, Any]:
    uses = {key: [{"use": use.use, **use.options} for use in value] for key, value in more.items()}
    return {
        "task": "text-to-image",
        "load": {"source": str(source), **FULL},
        "transform": [{"use": use.use, **use.options} for use in transforms],
        **uses,
    }


def test_the_content_of_files_counts(ti_torch: Folder, ti_cache: Cache, tmp_path: Path) -> None:
    """The cache knows files by what is in them, and keeps no text encoder twice."""
    path = tmp_path / "a.safetensors"
    made = []
    for seed in (1, 2, 1):
        save_file({"word": rows(1, seed=seed)}, path)
        made.append(pipeline(ti_torch("sd1"), ti_cache, taught(path))("a word", seed=1, **SMALL).latents)
    assert (made[0] != made[1]).any()
    np.testing.assert_array_equal(made[0], made[2])
    entries = [entry for entry in ti_cache.entries() if entry.label == "textual-inversion"]
    assert entries
    assert sum(entry.size for entry in entries) < 100_000 * len(entries)
    options = checked(TextualInversionOptions, {"path": ["a.pt", SHIPPED]}, where="test", base=tmp_path)
    assert [file.name for file in input_files(options)] == ["a.pt", "teal.safetensors"]


def test_names_come_from_the_user_too(ti_bundle: Callable[..., ModelBundle], files: dict[str, Path]) -> None:
    bundle = ti_bundle("sd1")
    apply(bundle, files["learned_embeds"], files["zork"], token=["<a>", "<b>"])
    apply(bundle, files["style"], token=["<s0>", "<s1>"], roles=["text_encoder"])
    learned = json.loads(bundle.assets["learned_tokens.json"])["tokenizer"]
    assert learned == {"<a>": [559], "<b>": [560, 561, 562], "<s0>": [563], "<s1>": [564]}


def test_what_does_not_fit_is_said(
    ti_torch: Folder, ti_cache: Cache, ti_bundle: Callable[..., ModelBundle], files: dict[str, Path], tmp_path: Path
) -> None:
    save_file({"<mj>": rows(1, 1024)}, tmp_path / "sd2.safetensors")
    with pytest.raises(ModelError, match="1024 numbers, as for Stable Diffusion 2, and text_encoder takes 32"):
        pipeline(ti_torch("sd1"), ti_cache, taught(tmp_path / "sd2.safetensors"))
    loose = pipeline(ti_torch("sd1"), ti_cache, taught(tmp_path / "sd2.safetensors", files["zork"]), strict=False)
    assert loose("a zork", seed=1, **SMALL).provenance["learned_tokens"] == ["zork"]
    assert [skip.item for report in loose.reports for skip in report.skipped] == ["<mj> in text_encoder"]

    def skipped(family: str, *paths: Path, **options: Any) -> str:
        return " / ".join(f"{skip.item}: {skip.reason}" for skip in apply(ti_bundle(family), *paths, **options).skipped)

    assert "clip_g of style: the model has no text_encoder_2" in skipped("sd1", files["style"])
    assert "32 numbers, and text_encoder_2 takes 24; to teach one text encoder alone" in skipped("xl", files["zork"])
    assert not skipped("xl", files["zork"], roles="text_encoder")
    save_file({"clip_l": rows(1)}, tmp_path / "half.safetensors")
    assert "half.safetensors has no clip_g" in skipped("xl", tmp_path / "half.safetensors")
    assert "has a token 'Unicorn' already" in skipped("sd1", files["zork"], token="Unicorn")
    bundle = ti_bundle("sd1")
    apply(bundle, files["zork"])
    learned = saved(bundle, tmp_path / "learned")
    again = apply(bundle, files["zork"])
    assert "'zork' was learned before" in again.skipped[0].reason
    assert again.roles == ()
    assert saved(bundle, tmp_path / "again") == learned
    assert "'ZORK_2' was learned before" in apply(bundle, files["learned_embeds"], token="ZORK_2").skipped[0].reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": ["zork", "zork"]}, "'zork' and 'zork' would be taken for each other"),
        ({"path": ["zork", "learned_embeds"], "token": ["zork", "Zork_1"]}, "'Zork_1' and 'zork' would be taken"),
        ({"path": ["zork", "learned_embeds"], "token": "one"}, "1 tokens for 2 files"),
        ({"path": ["zork"], "token": "cat "}, "'cat ' begins or ends with a blank"),
        ({"path": ["zork"], "token": "c\x07at"}, "has the control character '\\x07' in it"),
        ({"path": ["zork", "style"], "token": ["my cat", "My\tcat"]}, "would be taken for each other"),
        ({"path": ["zork"], "token": ""}, "the word '' has 0 characters"),
        ({"path": ["zork"], "token": ["a", "b"]}, "2 tokens for a file of 3 vectors"),
        ({"path": []}, "`path`"),
        ({"path": ["zork"], "roles": ["unet"]}, "`roles.0`"),
        ({"path": ["zork"], "roles": ["text_encoder_2"]}, "the model has no text_encoder_2"),
        ({"path": ["zork"], "scale": 2}, "unknown key `scale`"),
        ({"path": ["nowhere"]}, "no such file"),
        ({"path": ["package:not_installed_at_all/x.pt"]}, "not installed"),
    ],
)
def test_options_are_checked(
    options: dict[str, Any], message: str, ti_bundle: Callable[..., ModelBundle], files: dict[str, Path]
) -> None:
    paths = [str(files.get(name, name)) for name in options["path"]]
    with pytest.raises(OvforgeError) as raised:
        apply(ti_bundle("sd1"), **{**options, "path": paths})
    assert message in str(raised.value)


def test_a_damaged_list_of_words_is_said(ti_bundle: Callable[..., ModelBundle], files: dict[str, Path]) -> None:
    bundle = ti_bundle("sd1")
    bundle.assets["learned_tokens.json"] = b"[1, 2"
    with pytest.raises((ConfigError, ModelError), match=r"learned_tokens.json: not valid JSON"):
        apply(bundle, files["zork"])
