"""A pipeline as one graph: its tables against the methods themselves, its pictures against diffusers and the pipeline."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
from PIL import Image
from typer.testing import CliRunner

import ovforge
from families import TRANSFORMERS, agree, leave_out, make_transformer, maker, original, seeded
from ovforge import Use
from ovforge.cli import app
from ovforge.errors import ConfigError, OvforgeError
from ovforge.model import BatchGenerator, core
from ovforge.plugins.manager import Plugins
from ovforge.store.cache import Cache
from ovforge_diffusion.single_graph.export import SingleGraph, single_graph
from ovforge_diffusion.single_graph.sampler import linear_sampler

ROOT = Path(__file__).parents[1]
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
EMBEDDED = "package:ovforge_lcm/model"
PROMPT = "a beautiful pink unicorn, 8k"
Folder = Callable[[str], Path]

PLAIN: Any = SimpleNamespace(timestep=lambda timestep: timestep, predicted=lambda output: output)
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
METHODS = [
    ("ddim", {"clip_sample": False}), ("ddim", {"clip_sample": False, "eta": 1.0}), ("ddpm", {"clip_sample": False}),
    ("deis", {}), ("dpm-singlestep", {}), ("dpm2", {}), ("dpm2-ancestral", {}), ("dpmpp-2m", {"solver_order": 3}),
    ("dpmpp-2m", {"use_karras_sigmas": True}), ("dpmpp-2m-sde", {}), ("dpmpp-sde", {}), ("euler", {}),
    ("euler", {"prediction_type": "v_prediction"}), ("euler-ancestral", {}), ("heun", {}), ("lms", {}), ("pndm", {}),
    ("unipc", {}), ("lcm", {}), ("tcd", {}), ("flow-euler", {}), ("flow-heun", {}), ("flow-lcm", {}),
]  # fmt: skip


def method(name: str, options: dict[str, Any]) -> Any:
    extension: Any = Plugins().find("scheduler", name).extension
    model = extension.options_model()
    known = {key: value for key, value in LATENT.items() if key in model.model_fields}
    return extension.create(model(**{**known, **options}), {})


@pytest.mark.parametrize(
    ("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_a_method_is_a_table_of_numbers(name: str, options: dict[str, Any]) -> None:
    """With a network that answers by what it sees, so that each step builds on all before it."""
    scheduler = method(name, options)
    table = linear_sampler(lambda: scheduler.start(7), PLAIN)
    sampling, shape = scheduler.start(7), (1, 4, 6, 5)
    stream = BatchGenerator([3])
    first = stream.randn(shape)

    def network(seen: Any, call: int) -> Any:
        return np.tanh(0.7 * seen + 0.1 * call).astype(np.float32)

    drawn: list[Any] = []
    recording = SimpleNamespace(randn=lambda shape: drawn.append(stream.randn(shape)) or drawn[-1].copy())
    latents = first * np.float32(sampling.init_noise_sigma)
    for call in range(len(sampling.timesteps)):
        latents = sampling.step(network(sampling.scale_input(latents, call), call), call, latents, recording)

    assert table.calls == len(sampling.timesteps) and table.draws <= len(drawn)
    outputs: list[Any] = []

    def at(number: int) -> Any:
        terms = [table.start[number] * first]
        terms += [weight * output for weight, output in zip(table.outputs[number], outputs, strict=False)]
        terms += [weight * noise for weight, noise in zip(table.noise[number], drawn, strict=False)]
        return sum(terms)

    for call in range(table.calls):
        outputs.append(network(table.scales[call] * at(call), call))
    np.testing.assert_allclose(at(table.calls), latents, rtol=0, atol=2e-4 * max(1, np.abs(latents).max()))
    assert (table.timesteps == sampling.timesteps.astype(np.float32)).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddim", {"clip_sample": True}), ("lcm", {"clip_sample": True}), ("dpmpp-2m", {"thresholding": True})],
)
def test_what_is_not_linear_is_refused(name: str, options: dict[str, Any]) -> None:
    scheduler = method(name, options)
    with pytest.raises(ConfigError, match="not linear"):
        linear_sampler(lambda: scheduler.start(7), PLAIN)


def run(
    made: SingleGraph, seeds: list[int], prompts: list[str], negative: list[str] | None = None, **more: Any
) -> np.ndarray:
    """Return the pictures of a graph, with the noise that the pipeline draws of these seeds."""
    stream = BatchGenerator(seeds)
    inputs: dict[str, Any] = {"prompt": ov.Tensor(np.array(prompts)), **more}
    if negative is not None:
        inputs["negative_prompt"] = ov.Tensor(np.array(negative))
    latents = next(port for port in made.model.inputs if port.any_name == "latents").get_partial_shape()
    shape = (len(seeds), *(side.get_length() for side in list(latents)[1:]))
    inputs["latents"] = stream.randn(shape)
    if made.sampler.draws:
        inputs["noise"] = np.stack([stream.randn(shape) for _ in range(made.sampler.draws)])
    compiled = core().compile_model(made.model, "CPU", EXACT)
    assert {port.any_name for port in compiled.inputs} == inputs.keys()
    pictures: np.ndarray = compiled(inputs)["image"]
    return pictures


def equal(pictures: np.ndarray, result: Any) -> None:
    wanted = np.stack([np.asarray(image) for image in result.images])
    assert pictures.shape == wanted.shape and pictures.dtype == np.uint8
    assert np.abs(pictures.astype(int) - wanted).max() <= 1
    assert wanted.std() > 1


def loaded(source: Path | str, cache: Cache, inputs: dict[str, Any], **options: Any) -> Any:
    load = {} if source == EMBEDDED else {"weights": "f32"}
    return ovforge.Pipeline(
        Use("text-to-image", low_memory=True), source=source, load=load, device=Use("cpu", precision="f32"),
        cache=cache, input=inputs, **options,
    )  # fmt: skip


CASES = [
    # family, sampling method, options of the graph, what the config says of a call
    ("sd", "euler-ancestral", {"pictures_at_once": None}, {}),
    (
        "sd",
        "dpmpp-2m",
        {"guidance_input": True},
        {"guidance_rescale": 0.7, "guidance_start": 0.2, "guidance_stop": 0.8},
    ),
    ("sd", "heun", {"unroll": True}, {"steps": 2}),
    ("sd2", "ddim", {}, {}),
    ("xl", "unipc", {}, {"negative_prompt": ""}),
    ("xl", "ddim", {"pictures_at_once": 2}, {"crop": [4, 8]}),
]


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "scheduler", "options", "inputs"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_pictures_are_the_pipelines(
    torch_family: Folder,
    torch_sd: Path,
    session_cache: Cache,
    family: str,
    scheduler: str,
    options: dict[str, Any],
    inputs: dict[str, Any],
) -> None:
    call = {"steps": 3, "guidance_scale": 2.5, "width": 24, "height": 32, **inputs}
    pipe = loaded(torch_sd if family == "sd" else torch_family(family), session_cache, call, scheduler=scheduler)
    made = single_graph(pipe, **options)
    several = options.get("pictures_at_once", 1) != 1
    prompts, seeds = ([PROMPT, "the blue cat!!"], [7, 8]) if several else ([PROMPT], [7])
    zeros = family == "xl" and "negative_prompt" not in inputs
    negative = None if zeros else ["photo", ""][: len(prompts)]
    more = {"guidance_scale": np.array([2.5], np.float32)} if options.get("guidance_input") else {}
    pictures = run(made, seeds, prompts, negative, **more)
    equal(pictures, pipe(prompts, seed=seeds, **({} if zeros else {"negative_prompt": negative})))


def test_pictures_are_those_of_diffusers(torch_sd: Path, session_cache: Cache) -> None:
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(torch_sd, safety_checker=None)
    theirs.scheduler = diffusers.PNDMScheduler.from_config(theirs.scheduler.config, skip_prk_steps=True)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs(
        PROMPT,
        negative_prompt="photo",
        num_inference_steps=4,
        guidance_scale=3.0,
        width=24,
        height=16,
        generator=seeded([5]),
    ).images
    call = {"steps": 4, "guidance_scale": 3.0, "width": 24, "height": 16}
    pipe = loaded(torch_sd, session_cache, call, scheduler=Use("pndm", skip_prk_steps=True))
    pictures = run(single_graph(pipe), [5], [PROMPT], ["photo"])
    agree(SimpleNamespace(images=[Image.fromarray(each) for each in pictures]), wanted)  # type: ignore[arg-type]


FLOWS = [
    # family, options of the graph, what the config says of a call, what the graph's call gives beside the prompts
    ("flux", {"pictures_at_once": 2}, {"guidance_scale": 2.0}, {}),
    ("flux", {"guidance_input": True}, {"guidance_scale": 1.5}, {"guidance_scale": 2.0}),
    ("flux", {"unroll": True}, {"true_cfg_scale": 2.0, "negative_prompt": "photo", "max_sequence_length": 40}, {}),
    ("sd3", {"pictures_at_once": None}, {"guidance_scale": 3.0}, {}),
    ("flux2", {}, {"guidance_scale": 3.0}, {}),
    ("zimage", {"pictures_at_once": 2}, {"guidance_scale": 2.0, "max_sequence_length": 70}, {}),
    ("zimage", {"guidance_input": True}, {"guidance_scale": 1.5}, {"guidance_scale": 2.0}),
    ("lumina2", {"pictures_at_once": 2}, {"guidance_scale": 3.0}, {}),
    ("qwenimage", {}, {"true_cfg_scale": 3.0, "negative_prompt": "photo"}, {}),
    ("sana", {"pictures_at_once": 2}, {"guidance_scale": 3.0, "max_sequence_length": 12}, {}),
    ("sana", {"pictures_at_once": None}, {"guidance_scale": 1.0, "instruction": "", "max_sequence_length": 12}, {}),
    ("sana", {}, {"guidance_scale": 3.0, "instruction": "Say it:", "resolution_binning": True, "width": 30}, {}),
    ("sprint", {"guidance_input": True}, {"guidance_scale": 1.5, "max_sequence_length": 12}, {"guidance_scale": 2.0}),
    ("pixart", {"pictures_at_once": None}, {"guidance_scale": 3.0, "max_sequence_length": 40}, {}),
]


@pytest.fixture(scope="module")
def transformer(torch_lcm: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function that gives the diffusers folder of a family of transformers, made once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            place = tmp_path_factory.mktemp(family) / "pipeline"
            if family == "sprint":
                made[family] = maker("test_sana").make_sana_pipeline(place, sprint=True)
            else:
                made[family] = make_transformer(place, family, torch_lcm)
        return made[family]

    return folder


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("family", "options", "inputs", "more"), FLOWS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_pictures_of_transformers_are_the_pipelines(
    transformer: Folder,
    session_cache: Cache,
    family: str,
    options: dict[str, Any],
    inputs: dict[str, Any],
    more: dict[str, float],
) -> None:
    call = {"steps": 3, "width": 24, "height": 16, **inputs}
    pipe = loaded(transformer(family), session_cache, call)
    if "resolution_binning" in inputs:  # of sizes as small as the model, none of which is the one that is asked for
        pipe.task.architecture.bins = 32
    made = single_graph(pipe, **options)
    several = options.get("pictures_at_once", 1) != 1
    prompts = ["  a  <extra_id_3>\tpink unicorn,\n 8k</s> ", "the blue cat!!"][: 2 if several else 1]
    if family in ("sana", "sprint", "pixart"):
        prompts = [f" ΟΔΥΣΣΕΥΣ, {text.title()} " for text in prompts]
    seeds = [7, 8][: len(prompts)]
    guided = (family != "flux" or "true_cfg_scale" in inputs) and call.get("guidance_scale") != 1 and family != "sprint"
    negative = ["photo", ""][: len(prompts)] if guided else None
    given = {name: np.array([value], np.float32) for name, value in more.items()}
    wanted = pipe(prompts, seed=seeds, **({"negative_prompt": negative} if guided else {}), **more)
    equal(run(made, seeds, prompts, negative, **given), wanted)


def test_pictures_of_flux_are_those_of_diffusers(transformer: Folder, session_cache: Cache) -> None:
    """A prompt of blanks, of a token of T5's, and longer than T5 is to read."""
    pytest.importorskip("torch")
    theirs = original("FluxPipeline", transformer("flux"))
    size = {"width": 48, "height": 32, "guidance_scale": 2.5, "max_sequence_length": 16}
    prompt = f"{PROMPT}  and\t\ta <extra_id_1> cat that sits on a mat and looks at a bird on a wire"
    wanted = theirs(prompt, num_inference_steps=4, generator=seeded([5]), **size).images
    pictures = run(single_graph(loaded(transformer("flux"), session_cache, {"steps": 4, **size})), [5], [prompt])
    agree(SimpleNamespace(images=[Image.fromarray(each) for each in pictures]), wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["zimage", "lumina2"])
def test_an_encoder_converted_by_itself_gives_the_states_before_its_last_layer(
    transformer: Folder, session_cache: Cache, family: str
) -> None:
    """It has those of all layers, and the pipeline and the graph take the same."""
    folder = transformer(family)
    load = {"source": str(folder), "weights": "f32", "parts": {"text_encoder": str(folder / "text_encoder")}}
    config = {
        "task": "text-to-image", "load": load, "device": {"precision": "f32"},
        "input": {"prompt": PROMPT, "steps": 3, "width": 24, "height": 16, "guidance_scale": 3.0},
    }  # fmt: skip
    pipe = ovforge.load(config, cache=session_cache)
    assert "hidden_states.0" in {name for port in pipe.bundle.models["text_encoder"].outputs for name in port.names}
    wanted = pipe(PROMPT, negative_prompt="photo", seed=4)
    equal(run(single_graph(pipe), [4], [PROMPT], ["photo"]), wanted)


def test_every_family_is_written() -> None:
    assert {*TRANSFORMERS} <= {family for family, *_ in FLOWS}


def test_a_flow_model_without_t5(transformer: Folder, session_cache: Cache, tmp_path: Path) -> None:
    """Stable Diffusion 3: text states filled up with zeros, and a schedule that follows the picture's size."""
    folder = leave_out(transformer("sd3"), tmp_path / "sd3", "text_encoder_3", "tokenizer_3")
    pipe = loaded(folder, session_cache, {"steps": 3, "guidance_scale": 3.0, "width": 24, "height": 16})
    equal(run(single_graph(pipe), [4], [PROMPT], ["photo"]), pipe(PROMPT, negative_prompt="photo", seed=4))


CONFIG = f"""
task = "text-to-image"
load = "{EMBEDDED}"
device = {{ precision = "f32" }}

[input]
prompt = "a red car on a blue background"
steps = 3
width = 64
height = 96
seed = 7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that the command writes of the embedded model."""
    place = tmp_path_factory.mktemp("single-graph")
    (place / "car.toml").write_text(CONFIG)
    done = CliRunner().invoke(app, ["single-graph", str(place / "car.toml"), "-o", str(place / "out")])
    assert done.exit_code == 0, done.output
    assert "prompt, latents, noise -> image" in done.output
    assert "callers give these inputs themselves: prompt, seed" in done.output
    return place / "out"


def test_the_command_writes_what_the_pipeline_does(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        ".ovforge-files", "README.md", "model.bin", "model.xml", "ovforge.json",
    }  # fmt: skip
    facts = json.loads((folder / "ovforge.json").read_text())["single_graph"]
    assert (facts["width"], facts["height"], facts["steps"], facts["scheduler"]) == (64, 96, 3, "LCMScheduler")
    assert {port["name"]: port["shape"] for port in facts["inputs"]} == {
        "prompt": [1], "latents": [1, 4, 12, 8], "noise": [2, 1, 4, 12, 8],
    }  # fmt: skip
    assert "| input `latents` | f32 | [1, 4, 12, 8] |" in (folder / "README.md").read_text()
    assert "any number" not in (folder / "README.md").read_text()
    done = CliRunner().invoke(app, ["single-graph", str(folder.parent / "car.toml"), "-o", str(folder)])
    assert "is there already" in str(done.exception)
    # The UNet is in the file once, and its weights keep their types.
    sizes = [path.stat().st_size for path in Path(ovforge.model.package_path(EMBEDDED)).rglob("*.bin")]
    assert (folder / "model.bin").stat().st_size < sum(sizes)


def test_the_graph_alone_makes_the_pipelines_picture(folder: Path, session_cache: Cache) -> None:
    """Any caller's noise; without anything of ovforge but the library of operations that the process has loaded."""
    compiled = core().compile_model(folder / "model.xml", "CPU", EXACT)
    stream = BatchGenerator([7])
    latents = stream.randn((1, 4, 12, 8))
    noise = np.stack([stream.randn((1, 4, 12, 8)) for _ in range(2)])
    pipe = loaded(EMBEDDED, session_cache, {"steps": 3, "width": 64, "height": 96})
    for prompt in ("a red car on a blue background", PROMPT):
        made = compiled({"prompt": ov.Tensor(np.array([prompt])), "latents": latents, "noise": noise})["image"]
        equal(made, pipe(prompt, seed=7))


@pytest.mark.parametrize("pictures_at_once", [2, None])
def test_prompts_of_a_batch(session_cache: Cache, pictures_at_once: int | None) -> None:
    """All of them empty is what negative prompts often are; of another number is refused, and the next call goes on."""
    pipe = loaded(EMBEDDED, session_cache, {"steps": 2, "width": 64, "height": 64})
    made = single_graph(pipe, pictures_at_once=pictures_at_once)
    for prompts in (["", ""], [PROMPT, ""], ["", "word " * 200]):
        equal(run(made, [7, 8], prompts), pipe(prompts, seed=[7, 8]))
    compiled = core().compile_model(made.model, "CPU", EXACT)
    noise = {"latents": np.ones((2, 4, 8, 8), np.float32), "noise": np.ones((1, 2, 4, 8, 8), np.float32)}
    wrong = [["a", "b", "c"], ["a"], []] if pictures_at_once else [[]]
    for number in wrong:
        with pytest.raises(RuntimeError, match="incompatible"):
            compiled({"prompt": ov.Tensor(np.array(number, dtype="<U1")), **noise})
        assert compiled({"prompt": ov.Tensor(np.array(["a", "b"])), **noise})["image"].shape == (2, 64, 64, 3)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_guidance_below_one_is_none(torch_sd: Path, session_cache: Cache, scale: float) -> None:
    pipe = loaded(torch_sd, session_cache, {"steps": 2, "guidance_scale": 3.0, "width": 24, "height": 16})
    made = single_graph(pipe, guidance_input=True)
    pictures = run(made, [7], [PROMPT], ["photo"], guidance_scale=np.array([scale], np.float32))
    equal(pictures, pipe(PROMPT, seed=7, guidance_scale=scale))


def test_an_interval_without_a_step_is_said(torch_sd: Path, session_cache: Cache) -> None:
    """By the pipeline and by the graph; with one more step, there is one in it."""
    size = {"guidance_scale": 3.0, "width": 24, "height": 16}
    for steps, said in ((4, True), (5, False)):
        call = {**size, "steps": steps, "guidance_start": 0.5, "guidance_stop": 0.6}
        pipe = loaded(torch_sd, session_cache, call, scheduler="euler")
        wanted = f"nothing is guided: of {steps} calls of the network, none lies between guidance_start = 0.5"
        for warnings in (pipe(PROMPT, seed=1).warnings, single_graph(pipe).request.remarks):
            assert any(warning.startswith(wanted) for warning in warnings) == said


def test_what_is_wrong_is_said_before_a_model_is_read(folder: Path, tmp_path: Path) -> None:
    """Of a config whose model is not there, what a graph cannot do, and what must not be replaced."""
    config, other = tmp_path / "c.toml", tmp_path / "other"
    config.write_text('task = "text-to-image"\nload = "nothing"\n')
    other.mkdir()
    (other / "letter.txt").write_text("hello")
    parts = 'load={source="nothing",parts={controlnet="canny"}}'
    for output, change, message in (
        (other, "input.steps=2", "is a folder that ovforge did not write"),
        (config, "input.steps=2", "is a file, and a folder is to be written"),
        (tmp_path / "out", "task=detect", "task: a single graph makes pictures from text"),
        (tmp_path / "out", 'task={use="text-to-image",prompts="weighted"}', "task.prompts: 'weighted' prompts"),
        (tmp_path / "out", 'transform=["step-cache"]', "transform: step-cache: it runs another graph"),
        (tmp_path / "out", parts, "load.parts.controlnet: ControlNets see a picture"),
        (tmp_path / "out", "input.skip_guidance_layers=[1]", "input.skip_guidance_layers: needs a third call"),
        (folder, f'load={{source="nothing",parts={{vae_decoder="{folder}"}}}}', "is what the model is read from"),
    ):
        words = ["single-graph", str(config), "-o", str(output), "--force", "--trust", "--set", change]
        done = CliRunner().invoke(app, words)
        assert message in str(done.exception)
    assert (other / "letter.txt").exists() and config.exists() and (folder / "model.xml").exists()


def test_what_of_a_config_is_not_in_the_graph_is_said(folder: Path, tmp_path: Path) -> None:
    words = ["single-graph", str(folder.parent / "car.toml"), "-o", str(tmp_path / "out"), "-i", "count=3"]
    done = CliRunner().invoke(app, words)
    assert "callers give these inputs themselves: prompt, seed\n" in done.output
    assert "input.count has no effect: --batch says" in done.output
    assert "the config's `device` has no effect on it" in done.output


def normal_like_libstdcxx(seed: int, count: int) -> np.ndarray:
    """Return what std::normal_distribution<float> of libstdc++ draws from std::mt19937 (Marsaglia's polar method)."""
    words, drawn = np.random.RandomState(seed), list[float]()
    while len(drawn) < count:
        x, y = (2 * float(words.randint(0, 2**32, dtype=np.uint32)) / 2**32 - 1 for _ in range(2))
        square = x * x + y * y
        if 0 < square <= 1:
            factor = math.sqrt(-2 * math.log(square) / square)
            drawn += [y * factor, x * factor]
    return np.array(drawn[:count], np.float32)


def test_the_example_in_cpp(folder: Path, tmp_path: Path) -> None:
    """It is built with the headers of OpenVINO's package, and gives the picture that the graph gives in Python."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    import openvino.utils

    tokenizers = next((Path(ov.__file__).parents[1] / "openvino_tokenizers" / "lib").iterdir())
    source = ROOT / "examples" / "single_graph"
    configure = ["cmake", "-S", source, "-B", tmp_path, f"-DOpenVINO_DIR={openvino.utils.get_cmake_path()}"]
    for command in (configure, ["cmake", "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    picture, prompt = tmp_path / "picture.ppm", "a red car on a blue background"
    words = [tmp_path / "picture", folder / "model.xml", tokenizers, prompt, "7", picture]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    noise = normal_like_libstdcxx(7, 3 * 4 * 12 * 8).reshape(3, 1, 4, 12, 8)
    compiled = core().compile_model(folder / "model.xml", "CPU")
    inputs = {"prompt": ov.Tensor(np.array([prompt])), "latents": noise[0], "noise": noise[1:]}
    with Image.open(picture) as image:
        made = np.asarray(image.convert("RGB"), int)
    assert np.abs(made - compiled(inputs)["image"][0]).max() <= 1


PENCIL = "package:ovforge_sd_lora/examples/pencil.safetensors"


def test_what_was_done_to_the_models_is_in_the_graph(session_cache: Cache) -> None:
    """A fused adapter, text states of an earlier layer, merged tokens, weights in INT8."""
    pytest.importorskip("ovforge_nncf")
    size = {"steps": 2, "width": 64, "height": 64}
    steps = [Use("lora", path=PENCIL), Use("clip-skip", layers=1), Use("token-merging", max_downsample=2)]
    weights = [Use("nncf-weights", mode="int8_sym")]
    pipe = loaded(EMBEDDED, session_cache, size, transforms=steps, quantize=weights)
    pictures = run(single_graph(pipe), [7], [PROMPT])
    equal(pictures, pipe(PROMPT, seed=7))
    with pytest.raises(AssertionError):
        equal(pictures, loaded(EMBEDDED, session_cache, size)(PROMPT, seed=7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "image-to-image"}, "makes pictures from text"),
        ({"task": Use("text-to-image", prompts="weighted")}, "task.prompts: 'weighted' prompts"),
        ({"task": Use("text-to-image", long_prompts="chunks")}, "task.long_prompts: 'chunks' prompts"),
        ({"task": Use("text-to-image", tile=64)}, "task.tile: the pipeline decodes 128x128 pixels in tiles of 64"),
        ({"transforms": ["step-cache"]}, "transform: step-cache: it runs another graph in most steps"),
        ({"transforms": [Use("lora", path=PENCIL, mode="runtime")]}, "pencil can be set while the pipeline runs"),
        ({"scheduler": Use("lcm", clip_sample=True)}, "scheduler: its steps are not linear"),
        ({"input": {"decode": False}}, "input.decode: the graph makes pictures"),
        ({"input": {"denoising_end": 0.5}}, "input.denoising_end: is not an input of the graph"),
        ({"guidance_input": True}, "--guidance-input: no input guides this model"),
    ],
)  # fmt: skip
def test_what_a_graph_cannot_do_is_refused_by_name(session_cache: Cache, changes: dict[str, Any], message: str) -> None:
    option = {"guidance_input": True} if changes.pop("guidance_input", False) else {}
    task = changes.pop("task", "text-to-image")
    use = task if isinstance(task, Use) else Use(task)
    pipe = ovforge.Pipeline(
        use.model_copy(update={"low_memory": True}), source=EMBEDDED, cache=session_cache, **changes
    )
    with pytest.raises(OvforgeError) as raised:
        single_graph(pipe, **option)
    assert message in str(raised.value)


def test_an_encrypted_model_is_not_written_plain(session_cache: Cache) -> None:
    pipe = loaded(EMBEDDED, session_cache, {})
    pipe.bundle.protection = SimpleNamespace()
    with pytest.raises(OvforgeError, match="encrypted, and would be written plain"):
        single_graph(pipe)


def test_a_tokenizer_that_reads_otherwise_is_refused(session_cache: Cache) -> None:
    """The graph's tokenizer against the pipeline's files, of which one lost a merge."""
    pipe = loaded(EMBEDDED, session_cache, {})
    lines = pipe.bundle.assets["tokenizer/merges.txt"].decode().splitlines()
    pipe.bundle.assets["tokenizer/merges.txt"] = "\n".join([lines[0], *lines[40:]]).encode()
    pipe.bundle.assets.pop("tokenizer/tokenizer.json")
    with pytest.raises(OvforgeError, match="reads 'a beautiful pink unicorn, 8k' as other tokens"):
        single_graph(pipe)
