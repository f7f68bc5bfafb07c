"""Conversion against torch, the layout on disk, and every way a folder can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ovforge.contracts.stages import Match
from ovforge.errors import ConfigError, ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.sources import FileSource

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
ov = pytest.importorskip("openvino")

from ovforge_diffusers.loader import DiffusersLoader  # noqa: E402
from ovforge_diffusers.options import LoaderOptions  # noqa: E402

TEXTS = [
    "", " ", "a", "A", "a photo of a cat", "A PINK UNICORN", "unicorn,8k", "beautiful pink unicorn, 8k!!!",
    "the cat's hat", "don't won't I'd we'll they've I'm you're", "multiple   spaces\tand\nlines", "  leading", "trailing  ",
    "...", "?!?!", "(a:1.2) [b] {c}", "1234567890", "12 34", "3.14 + 2 = 5.14", "C++ & C#", "http://example.org/?q=1&b=2",
    "e-mail@example.org", "under_score", "hy-phen-ated", "café", "CAFÉ", "naïve façade", "ÀÉÎÕÜ", "straße", "Ελληνικά",
    "русский текст", "日本語のテキスト", "한국어", "עברית", "العربية", "हिन्दी", "ไทย", "🦄", "🦄🌈 pink", "👩‍👩‍👧‍👦 family",
    "🇩🇪 flag", "½ ² ①", "“quotes” ‘single’ – dash — em", "ﬁ ligature", "zero\u200bwidth", "non\u00a0breaking",
    "<html> &amp; </html>", "back\\slash", "tilde~^`|", "a" * 200, "unicorn " * 100, "the and " * 30,
]  # fmt: skip


def torch_part(folder: Path, part: str) -> Any:
    """Load a part with its own library, in eval mode."""
    cls = {
        "text_encoder": transformers.CLIPTextModel,
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
    }[part]
    return cls.from_pretrained(folder / part, local_files_only=True).eval()


def run(folder: Path, role: str, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Run a saved role by plain OpenVINO, in f32."""
    compiled = ov.Core().compile_model(folder / role / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled({name: value.numpy() for name, value in inputs.items()})
    return {port.any_name: result[port] for port in compiled.outputs}


def close(ours: np.ndarray, theirs: Any, bound: float = 1e-4) -> None:
    """Compare relative to the largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


def test_text_encoder_gives_what_torch_gives(pipeline: Path, converted: Path) -> None:
    model = torch_part(pipeline, "text_encoder")
    end = model.config.eos_token_id
    for rows, tokens in ((1, 77), (3, 12)):
        ids = torch.randint(0, end - 1, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        ids[:, tokens // 2 :] = end
        ours = run(converted, "text_encoder", {"input_ids": ids})
        assert list(ours) == ["last_hidden_state", "pooler_output"]
        theirs = model(ids)
        close(ours["last_hidden_state"], theirs.last_hidden_state)
        close(ours["pooler_output"], theirs.pooler_output)


def unet_inputs(rows: int, height: int, width: int) -> dict[str, Any]:
    """Return random inputs."""
    random = torch.Generator().manual_seed(height)
    return {
        "sample": torch.randn(rows, 4, height, width, generator=random),
        "timestep": torch.tensor([601]),
        "encoder_hidden_states": torch.randn(rows, 77, 32, generator=random),
        "timestep_cond": torch.randn(rows, 24, generator=random),
    }


def test_unet_gives_what_torch_gives_at_every_size(pipeline: Path, converted: Path) -> None:
    model = torch_part(pipeline, "unet")
    for rows, height, width in ((1, 8, 8), (3, 6, 12), (2, 7, 9), (1, 2, 3)):
        inputs = unet_inputs(rows, height, width)
        ours = run(converted, "unet", inputs)
        close(ours["out_sample"], model(**inputs).sample)


def test_vae_gives_what_torch_gives(pipeline: Path, converted: Path) -> None:
    model = torch_part(pipeline, "vae")
    for rows, height, width in ((1, 8, 8), (2, 5, 12)):
        latents = torch.randn(rows, 4, height, width)
        close(run(converted, "vae_decoder", {"latent_sample": latents})["sample"], model.decode(latents).sample)
        picture = torch.randn(rows, 3, 2 * height, 2 * width)
        ours = run(converted, "vae_encoder", {"sample": picture})["latent_parameters"]
        close(ours, model.encode(picture).latent_dist.parameters)


def test_inputs_have_the_types_and_layout_of_optimum(converted: Path) -> None:
    read = ov.Core().read_model
    seen = {
        role: [(p.any_name, str(p.partial_shape), p.element_type.get_type_name()) for p in read(path).inputs]
        for role in ("text_encoder", "unet", "vae_encoder", "vae_decoder")
        for path in [converted / role / "openvino_model.xml"]
    }
    assert seen == {
        "text_encoder": [("input_ids", "[?,?]", "i64")],
        "unet": [
            ("sample", "[?,4,?,?]", "f32"),
            ("timestep", "[?]", "i64"),
            ("encoder_hidden_states", "[?,?,32]", "f32"),
            ("timestep_cond", "[?,24]", "f32"),
        ],
        "vae_encoder": [("sample", "[?,3,?,?]", "f32")],
        "vae_decoder": [("latent_sample", "[?,4,?,?]", "f32")],
    }
    names = {node.get_friendly_name() for node in read(converted / "unet/openvino_model.xml").get_ops()}
    assert any(name.startswith("__module.down_blocks.1.attentions.0") for name in names)


def test_tokenizer_gives_the_ids_of_transformers(pipeline: Path, converted: Path) -> None:
    bundle = ModelBundle.open(FileSource(converted))
    from ovforge.model.runtime import core

    tokenize = core().compile_model(bundle.models["tokenizer"], "CPU")
    theirs = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer", local_files_only=True)
    ids = tokenize(TEXTS)["input_ids"]
    wanted = theirs(TEXTS, padding="max_length", truncation=True)["input_ids"]
    assert [text for text, one, other in zip(TEXTS, ids.tolist(), wanted, strict=True) if one != other] == []
    assert tokenize(["a"])["input_ids"].shape == (1, 77)
    back = core().compile_model(bundle.models["detokenizer"], "CPU")
    ids = np.array([theirs("a pink unicorn")["input_ids"]])
    assert back(ids)["string_output"][0].strip() == "a pink unicorn"


def test_added_tokens_are_read_whole(copy: Path) -> None:
    """Also special ones, and words with blanks; the runtime's encoder would read the mark of their end as four more."""
    from ovforge.model.runtime import core

    tokenizer = transformers.CLIPTokenizer.from_pretrained(copy / "tokenizer", local_files_only=True)
    tokenizer.add_tokens(["<zork>", "my cat", transformers.AddedToken("<sp>", special=True)])
    tokenizer.save_pretrained(copy / "tokenizer")
    bundle = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(copy))
    tokenize = core().compile_model(bundle.models["tokenizer"], "CPU")
    for prompt in ("a <zork> cat", "x<zork>y<zork>", "a my cat, 8k", "<sp> unicorn", "a <|endoftext|> cat", "pink my"):
        wanted = tokenizer(prompt, padding="max_length", max_length=77).input_ids
        assert tokenize([prompt])["input_ids"][0].tolist() == wanted, prompt


def test_the_saved_folder_opens_and_holds_what_was_there(pipeline: Path, converted: Path) -> None:
    bundle = ModelBundle.open(FileSource(converted))
    assert set(bundle.models) == {"text_encoder", "unet", "vae_encoder", "vae_decoder", "tokenizer", "detokenizer"}
    assert bundle.index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert "private" not in json.dumps([bundle.index, bundle.configs])
    assert bundle.scheduler_config()["_class_name"] == "LCMScheduler"
    assert bundle.configs["vae_decoder"]["scaling_factor"] == 0.18215
    assert bundle.configs["unet"]["time_cond_proj_dim"] == 24
    assert bundle.configs["text_encoder"]["max_position_embeddings"] == 77
    assert bundle.assets["tokenizer/merges.txt"] == (pipeline / "tokenizer/merges.txt").read_bytes()
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(converted)) is Match.NO
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(pipeline)) is Match.YES
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(pipeline / "unet")) is Match.YES
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(pipeline / "tokenizer")) is Match.YES
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(pipeline / "text_encoder")) is Match.YES
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(pipeline / "scheduler")) is Match.NO
    assert DiffusersLoader(LoaderOptions()).can_load(FileSource(converted / "tokenizer")) is Match.NO


def files_of(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_converting_again_gives_the_same_bytes_from_memory_too(pipeline: Path, converted: Path, tmp_path: Path) -> None:
    class Memory(FileSource):
        def local(self, path: str) -> Path | None:
            return None

    DiffusersLoader(LoaderOptions(weights="f32")).load(Memory(pipeline)).save(tmp_path / "again")
    first, second = files_of(converted), files_of(tmp_path / "again")
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []


def test_half_precision_weights_in_and_out(
    copy: Path, converted: Path, tmp_path: Path, write_index: Callable[..., None]
) -> None:
    """Sharded float16 files; stored as float16 again, nothing is lost, the timestep's embedding included."""
    shutil.rmtree(copy / "text_encoder")
    model = torch_part(copy, "unet")
    shutil.rmtree(copy / "vae")
    write_index(copy, text_encoder=[None, None], vae=[None, None])
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    model.half().save_pretrained(copy / "unet", variant="fp16", max_shard_size="100KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    DiffusersLoader(LoaderOptions()).load(FileSource(copy)).save(tmp_path / "half")
    size = (tmp_path / "half/unet/openvino_model.bin").stat().st_size
    assert size < 0.55 * (converted / "unet/openvino_model.bin").stat().st_size
    inputs = unet_inputs(2, 8, 8)
    close(run(tmp_path / "half", "unet", inputs)["out_sample"], model.float()(**inputs).sample)


def test_fixed_sizes(copy: Path) -> None:
    options = LoaderOptions(height=16, width=24, batch=2, timestep="f32")
    bundle = DiffusersLoader(options).load(FileSource(copy))
    unet = bundle.models["unet"]
    shapes = {port.any_name: list(port.shape) for port in unet.inputs}
    assert shapes == {
        "sample": [2, 4, 8, 12], "timestep": [1], "encoder_hidden_states": [2, 77, 32], "timestep_cond": [2, 24],
    }  # fmt: skip
    assert unet.input("timestep").element_type == ov.Type.f32
    assert list(unet.output("out_sample").shape) == [2, 4, 8, 12]
    assert list(bundle.models["vae_decoder"].output(0).shape) == [2, 3, 16, 24]
    with pytest.raises(ConfigError, match="not a multiple"):
        _ = DiffusersLoader(LoaderOptions(height=17, width=16)).load(FileSource(copy)).models["unet"]
    with pytest.raises(ValueError, match="both"):
        LoaderOptions(height=16)


def test_two_text_encoders_and_added_conditions(copy: Path, tmp_path: Path, write_index: Callable[..., None]) -> None:
    """The SDXL kind: hidden states, a projection, text_embeds and time_ids; guidance without embedding."""
    text = torch_part(copy, "text_encoder")
    second = transformers.CLIPTextModelWithProjection(text.config).eval()
    second.save_pretrained(copy / "text_encoder_2")
    shutil.copytree(copy / "tokenizer", copy / "tokenizer_2")
    config = dict(torch_part(copy, "unet").config)
    config.update(addition_embed_type="text_time", addition_time_embed_dim=4, time_cond_proj_dim=None)
    config["projection_class_embeddings_input_dim"] = 16 + 6 * 4
    unet = diffusers.UNet2DConditionModel.from_config(config).eval()
    unet.save_pretrained(copy / "unet")
    write_index(
        copy,
        text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer_2=["transformers", "CLIPTokenizer"],
        vae=[None, None],
    )
    bundle = DiffusersLoader(LoaderOptions(weights="f32")).load(FileSource(copy))
    bundle.save(tmp_path / "xl")
    ids = torch.tensor([[5, 9, 40, text.config.eos_token_id]])
    ours, theirs = run(tmp_path / "xl", "text_encoder_2", {"input_ids": ids}), second(ids, output_hidden_states=True)
    assert list(ours) == ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(3))]
    close(ours["text_embeds"], theirs.text_embeds)
    close(ours["hidden_states.1"], theirs.hidden_states[1])
    inputs = unet_inputs(2, 8, 8)
    del inputs["timestep_cond"]
    added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.randn(2, 6)}
    ours = run(tmp_path / "xl", "unet", {**inputs, **added})
    close(ours["out_sample"], unet(**inputs, added_cond_kwargs=added).sample)
    fixed = DiffusersLoader(LoaderOptions(batch=1)).load(FileSource(copy))
    assert (tmp_path / "xl/tokenizer_2/openvino_detokenizer.xml").is_file()
    assert list(fixed.models["text_encoder"].inputs[0].partial_shape.to_string()) == list("[?,?]")


def test_names_of_older_checkpoints_are_understood(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "text_encoder/model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(path).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(old, path)
    path = copy / "vae/diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(path).items():
        for new, was in renamed.items():
            if f".{new}." in name:
                name = name.replace(f".{new}.", f".{was}.")
                tensor = tensor[:, :, None, None].contiguous() if tensor.ndim == 2 else tensor
        old[name] = tensor
    assert any(".query." in name for name in old)
    save_file(old, path)
    bundle = DiffusersLoader(LoaderOptions()).load(FileSource(copy))
    assert bundle.models["text_encoder"].inputs[0].any_name == "input_ids"
    assert bundle.models["vae_decoder"].inputs[0].any_name == "latent_sample"


def damage(folder: Path, how: str, write_index: Callable[..., None]) -> str:
    """Damage a folder; return a word of the message that must follow."""
    from safetensors.torch import load_file, save_file

    unet = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    if how == "cut off":
        unet.write_bytes(unet.read_bytes()[:-1000])
        return "cut off"
    if how == "no header":
        unet.write_bytes(b"\xff" * 100)
        return "damaged"
    if how == "missing tensor":
        del tensors["conv_in.bias"]
        save_file(tensors, unet)
        return "conv_in.bias is missing"
    if how == "extra tensor":
        tensors["stranger"] = torch.zeros(1)
        save_file(tensors, unet)
        return "stranger belongs nowhere"
    if how == "other shape":
        tensors["conv_in.bias"] = torch.zeros(3)
        save_file(tensors, unet)
        return r"conv_in.bias is \[3\], not \[16\]"
    if how == "other type":
        tensors["conv_in.bias"] = torch.zeros(16, dtype=torch.int8)
        save_file(tensors, unet)
        return "not a float type"
    if how == "no weights":
        unet.unlink()
        return "is missing"
    if how == "pickle only":
        unet.rename(unet.with_suffix(".bin"))
        return "pickle"
    if how == "no config":
        (folder / "unet/config.json").unlink()
        return "unet/config.json is missing"
    if how == "bad config":
        (folder / "unet/config.json").write_text("{")
        return "not valid JSON"
    if how == "impossible config":
        config = json.loads((folder / "unet/config.json").read_text())
        (folder / "unet/config.json").write_text(
            json.dumps({**config, "down_block_types": ["Nonsense", "DownBlock2D"]})
        )
        return "no UNet2DConditionModel"
    if how == "no folder":
        shutil.rmtree(folder / "scheduler")
        return "scheduler/ is missing"
    if how == "no merges":
        (folder / "tokenizer/merges.txt").unlink()
        return "merges.txt"
    if how == "controlnet":
        write_index(folder, controlnet=["diffusers", "ControlNetModel"])
        return "controlnet has no weights|controlnet/config.json is missing"
    if how == "adapter":
        write_index(folder, adapter=["diffusers", "T2IAdapter"])
        return "adapter is a T2IAdapter"
    write_index(folder, unet=["diffusers", "UNet2DConditionModel"], text_encoder_2=["transformers", "BertModel"])
    return "text_encoder_2 is a BertModel"


@pytest.mark.parametrize(
    "how",
    [
        "cut off", "no header", "missing tensor", "extra tensor", "other shape", "other type", "no weights", "pickle only",
        "no config", "bad config", "impossible config", "no folder", "no merges", "controlnet", "adapter", "bert",
    ],
)  # fmt: skip
def test_a_damaged_folder_is_an_error_that_says_where(copy: Path, how: str, write_index: Callable[..., None]) -> None:
    message = damage(copy, how, write_index)
    with pytest.raises(ModelError, match=message) as caught:
        bundle = DiffusersLoader(LoaderOptions()).load(FileSource(copy))
        _ = bundle.models["unet"]
    assert str(copy) in str(caught.value)


def test_leaving_out_the_safety_checker_is_said(copy: Path, write_index: Callable[..., None]) -> None:
    write_index(copy, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.warns(UserWarning, match="safety_checker .* is left out"):
        bundle = DiffusersLoader(LoaderOptions()).load(FileSource(copy))
    assert bundle.index["safety_checker"] == [None, None]
    assert bundle.index["requires_safety_checker"] is False
    with pytest.raises(ModelError, match="safety_checker"):
        DiffusersLoader(LoaderOptions(skip=())).load(FileSource(copy))


def test_without_torch_the_error_names_the_extra(copy: Path) -> None:
    program = f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "diffusers"):
                    raise ImportError(f"No module named {{name!r}}", name=name)

        sys.meta_path.insert(0, Blocker())
        from pathlib import Path
        import ovforge_diffusers
        from ovforge.errors import PluginError
        from ovforge.model.sources import FileSource
        (loader,) = ovforge_diffusers.ovforge_loaders()
        (scheduler,) = ovforge_diffusers.ovforge_schedulers()
        assert not {{"numpy", "openvino", "transformers"}} & set(sys.modules), "listing must be cheap"
        source = FileSource(Path({str(copy)!r}))
        opened = loader.create(loader.options_model()())
        assert opened.can_load(source) == 2
        for use in (lambda: opened.load(source),
                    lambda: scheduler.create(scheduler.options_model()(), {{"_class_name": "LCMScheduler"}})):
            try:
                use()
            except PluginError as error:
                assert 'pip install "ovforge-diffusers[convert]"' in str(error), error
            else:
                raise AssertionError("no error")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
