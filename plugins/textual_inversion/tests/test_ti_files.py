"""Files of every form, and what is not a textual inversion: damaged, lying, hostile."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_safetensors

from ovforge.errors import ModelError, OvforgeError, PluginError
from ovforge.model.sources import FileSource
from ovforge_textual_inversion.files import ANY, FILE_LIMIT, Learned, read_source

torch = pytest.importorskip("torch")


def rows(vectors: int = 2, width: int = 32, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(vectors, width)).astype(np.float32)


def read(path: Path) -> list[Learned]:
    return read_source(FileSource(path))


def saved(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        path.write_bytes(save_safetensors(content))
    else:
        torch.save(content, path)
    return path


def the_forms() -> dict[str, tuple[str, Any, str, dict[str, np.ndarray[Any, Any]]]]:
    """File name, content, the word, the parts."""
    a, b = rows(), rows(width=24, seed=1)
    t = torch.from_numpy
    web = {"string_to_token": {"*": 265}, "name": "web-ui", "step": 500, "sd_checkpoint": "4bdfc29c"}
    parameter = torch.nn.Parameter(t(a))
    return {
        "diffusers": ("x.safetensors", {"<cat-toy>": a}, "<cat-toy>", {ANY: a}),
        "diffusers one": ("x.bin", {"<cat-toy>": t(a[0])}, "<cat-toy>", {ANY: a[:1]}),
        "web ui": ("file.pt", {**web, "string_to_param": {"*": t(a)}}, "web-ui", {ANY: a}),
        "web ui parameter": ("file.pt", {**web, "string_to_param": {"*": parameter}}, "web-ui", {ANY: a}),
        "first trainers": (
            "style.pt",
            {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": parameter})},
            "style",
            {ANY: a},
        ),
        "kohya": ("style.safetensors", {"emb_params": a}, "style", {ANY: a}),
        "xl": ("style.safetensors", {"clip_l": a, "clip_g": b}, "style", {"clip_l": a, "clip_g": b}),
        "xl pickle": ("style.pt", {"clip_l": t(a), "clip_g": t(b)}, "style", {"clip_l": a, "clip_g": b}),
        "bare": ("word.bin", t(a), "word", {ANY: a}),
        "a batch of one": ("word.safetensors", {"emb_params": a[None]}, "word", {ANY: a}),
        "OneTrainer": (
            "style.safetensors",
            {"clip_l": a, "clip_g": b, "clip_l_out": a, "clip_g_out": b},
            "style",
            {"clip_l": a, "clip_g": b},
        ),
        "prefix": (
            "style.safetensors",
            {"state_dict.clip_l": a, "state_dict.clip_g": b},
            "style",
            {"clip_l": a, "clip_g": b},
        ),
        "nested": ("style.pt", {"state_dict": {"string_to_param": {"*": t(a)}, "name": "web-ui"}}, "web-ui", {ANY: a}),
        "flat": ("style.safetensors", {"string_to_param.*": a}, "style", {ANY: a}),
        "in a LoRA": (
            "lora.safetensors",
            {"lora_unet_x.lora_up.weight": b, "bundle_emb.zork.emb_params": a},
            "zork",
            {ANY: a},
        ),
        "in a LoRA, web ui": ("lora.safetensors", {"bundle_emb.my cat.string_to_param.*": a}, "my cat", {ANY: a}),
    }


@pytest.mark.parametrize("form", the_forms())
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    name, content, word, parts = the_forms()[form]
    [learned] = read(saved(tmp_path / name, content))
    assert learned.word == word
    assert set(learned.parts) == set(parts)
    for part, wanted in parts.items():
        assert learned.parts[part].dtype == np.float32
        np.testing.assert_array_equal(learned.parts[part], wanted)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_types_of_numbers(kind: str, suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    value = torch.from_numpy(rows()).to(getattr(torch, kind))
    path = tmp_path / f"a.{suffix}"
    save_file({"w": value}, path) if suffix == "safetensors" else torch.save({"w": value}, path)
    np.testing.assert_array_equal(read(path)[0].parts[ANY], value.float().numpy())


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_with_and_without_a_factor(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind))
    value = codes[torch.isfinite(codes.float())].reshape(2, -1)
    save_file({"w": value}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors")[0].parts[ANY], value.float().numpy())
    factor = {"w.scale_weight": torch.tensor(0.25), "scaled_fp8": torch.zeros(2).to(value.dtype)}
    save_file({"w": value, **factor}, tmp_path / "b.safetensors")
    [learned] = read(tmp_path / "b.safetensors")
    np.testing.assert_array_equal(learned.parts[ANY], value.float().numpy() / 4)


def test_several_words_in_one_file(tmp_path: Path) -> None:
    content = {"<s0>": rows(1), "<s1>": rows(2, seed=1), "bundle": rows(3, seed=2)}
    found = {item.word: item.parts[ANY] for item in read(saved(tmp_path / "a.safetensors", content))}
    assert {word: len(part) for word, part in found.items()} == {"<s0>": 1, "<s1>": 2, "bundle": 3}
    bundles = {f"bundle_emb.{word}.emb_params": value for word, value in content.items()}
    again = {item.word: item.parts[ANY] for item in read(saved(tmp_path / "lora.safetensors", bundles))}
    assert found.keys() == again.keys()
    assert all((found[word] == again[word]).all() for word in found)


def test_words_in_a_large_adapter(tmp_path: Path) -> None:
    """The words are read, and nothing else of the file; an adapter without words is too large to be one."""
    big = np.zeros((FILE_LIMIT // 4 + 1,), np.float32)
    content = {
        "lora_unet_x.lora_up.weight": big,
        "bundle_emb.zork.clip_l": rows(),
        "bundle_emb.zork.clip_g": rows(width=24),
    }
    [learned] = read(saved(tmp_path / "lora.safetensors", content))
    np.testing.assert_array_equal(learned.parts["clip_l"], rows())
    assert "adapter" in learned.note
    with pytest.raises(ModelError, match="more than"):
        read(saved(tmp_path / "other.safetensors", {"lora_unet_x.lora_up.weight": big}))


def test_vectors_for_what_an_encoder_gives_are_said(tmp_path: Path) -> None:
    [learned] = read(saved(tmp_path / "a.safetensors", {"clip_l": rows(), "clip_l_out": rows()}))
    assert "clip_l_out" in learned.note
    with pytest.raises(ModelError, match="clip_l_out alone"):
        read(saved(tmp_path / "b.safetensors", {"clip_l_out": rows()}))


def test_the_old_format_of_torch(tmp_path: Path) -> None:
    torch.save({"<w>": torch.from_numpy(rows())}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(read(tmp_path / "a.bin")[0].parts[ANY], rows())


def test_a_folder_of_files(tmp_path: Path) -> None:
    """As on the hub: both ways of the same word, pictures and texts beside it."""
    saved(tmp_path / "learned_embeds.bin", {"<a>": torch.ones(1, 32)})
    saved(tmp_path / "learned_embeds.safetensors", {"<a>": rows(1)})
    saved(tmp_path / "other.pt", {"<b>": torch.ones(1, 32)})
    (tmp_path / "README.md").write_text("a cat toy")
    assert [item.word for item in read(tmp_path)] == ["<a>", "<b>"]
    np.testing.assert_array_equal(read(tmp_path)[0].parts[ANY], rows(1))


def test_several_names_take_one_vector_each(tmp_path: Path) -> None:
    [learned] = read(saved(tmp_path / "a.safetensors", {"clip_l": rows(), "clip_g": rows(width=24)}))
    first, second = learned.named(["<s0>", "<s1>"])
    assert (first.word, second.word) == ("<s0>", "<s1>")
    np.testing.assert_array_equal(second.parts["clip_l"], rows()[1:])
    with pytest.raises(ModelError, match="3 tokens for a file of 2 vectors"):
        learned.named(["a", "b", "c"])


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (exec, (f"open({str(self.marker)!r}, 'w').close()",))


@pytest.mark.parametrize("how", ["torch", "old torch", "plain"])
def test_pickles_that_run_code_are_refused(how: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"name": Runs(marker), "string_to_param": {"*": torch.ones(1, 32)}}
    if how == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ModelError, match="evil.pt: is refused: .*exec") as raised:
        read(path)
    assert not marker.exists()
    assert "weights_only=False" not in str(raised.value), "no advice to load it unsafely"
    pickle.loads(pickle.dumps(Runs(marker)))
    assert marker.exists(), "the test's own pickle must be one that runs code"


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def numbers(shape: list[int], kind: str = "F32", end: int = 8) -> dict[str, Any]:
    return {"w": {"dtype": kind, "shape": shape, "data_offsets": [0, end]}}


def bomb() -> bytes:
    """Return an archive that unpacks to more than it is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(FILE_LIMIT + 1))
    return buffer.getvalue()


DAMAGED: dict[str, tuple[str, Any, str]] = {
    "empty": ("a.safetensors", b"", "not a whole safetensors file"),
    "cut off": ("a.safetensors", save_safetensors({"w": rows()})[:-4], "not a whole safetensors file"),
    "header lies": ("a.safetensors", header(numbers([10**6, 10**6]), bytes(8)), "not a whole safetensors file"),
    "huge header": ("a.safetensors", struct.pack("<Q", 2**62) + b"{}", "not a whole safetensors file"),
    "integers": ("a.safetensors", header(numbers([1, 2], "I32"), bytes(8)), "is I32, not floating-point"),
    "no numbers": ("a.safetensors", header(numbers([0, 4], end=0)), r"has the shape \[0, 4\]"),
    "a single number": ("a.safetensors", header(numbers([], end=4), bytes(4)), "and not .vectors, width."),
    "three dimensions": ("a.safetensors", header(numbers([2, 1, 2], end=16), bytes(16)), r"has the shape \[2, 1, 2\]"),
    "not finite": ("a.safetensors", save_safetensors({"w": rows() * np.float32(np.inf)}), "64 of 64 numbers are not finite"),
    "nothing in it": ("a.safetensors", save_safetensors({}), "is empty"),
    "a LoRA": ("a.safetensors", save_safetensors({f"unet.lora_{n}": rows() for n in range(3)}), 'use = "lora"'),
    "xl and more": ("a.safetensors", save_safetensors({"clip_l": rows(), "t5": rows()}), "unknown part 't5'"),
    "xl that disagrees": (
        "a.safetensors", save_safetensors({"clip_l": rows(), "clip_g": rows(3)}), "different numbers of vectors"
    ),
    "too many": ("a.safetensors", save_safetensors({"w": rows(600, 4)}), "600 vectors of 4 numbers, more than 512"),
    "not a pickle": ("a.bin", b"<html>Not found</html>", "is refused"),
    "cut archive": ("a.pt", bomb()[:-30], "refused|damaged"),
    "unpacks to more": ("a.pt", bomb(), "unpacks to"),
    "one number, many times": ("a.pt", {"w": torch.ones(1).expand(10**5, 10**5)}, "100000 vectors of 100000 numbers"),
    "sparse": ("a.pt", {"w": torch.ones(2, 32).to_sparse()}, "is a Tensor of torch.float32"),
    "meta": ("a.pt", {"w": torch.ones(2, 32, device="meta")}, "refused|is a Tensor"),
    "integers in a pickle": ("a.pt", {"w": torch.ones(2, 32, dtype=torch.int64)}, "is a Tensor of torch.int64"),
    "words for numbers": ("a.pt", {"w": "a cat"}, "is a str, and not .vectors, width."),
    "two parameters": ("a.pt", {"string_to_param": {"*": torch.ones(2, 2), "+": torch.ones(2, 2)}}, "one entry"),
    "no parameters": ("a.pt", {"string_to_param": 3}, "one entry"),
    "a checkpoint": ("a.pt", {"state_dict": 1, "epoch": 2, 3: 4}, "is not a textual inversion: it holds 3 entries"),
    "a picture": ("a.png", b"\x89PNG", "no textual inversion is there, only a.png"),
    "too large": ("a.bin", bytes(FILE_LIMIT + 1), "more than the"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_wrong_is_said(case: str, tmp_path: Path) -> None:
    name, content, message = DAMAGED[case]
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ModelError, match=message) as raised:
        read(path)
    assert str(path) in str(raised.value)


def test_pickles_need_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.bin", {"<w>": torch.ones(1, 32)})
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(PluginError, match=r"ovforge-textual-inversion\[torch\]"):
        read(path)


def test_an_archive_that_says_it_has_more_disks_is_damaged(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"<w>": torch.from_numpy(rows())})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 2
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged archive"):
        read(path)


@settings(max_examples=60)
@given(data=st.data())
def test_damage_anywhere_is_an_error_or_harmless(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes changed, cut or added: a clear error, or finite numbers of a sane shape."""
    name = data.draw(st.sampled_from(["a.safetensors", "a.pt"]))
    path = tmp_path_factory.mktemp("damage") / name
    saved(path, {"<w>": rows() if name.endswith("s") else torch.from_numpy(rows())})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    try:
        words = read(path)
    except OvforgeError:
        return
    assert all(np.isfinite(part).all() and part.ndim == 2 for word in words for part in word.parts.values())


@settings(max_examples=40)
@given(
    vectors=st.integers(1, 20),
    width=st.integers(1, 200),
    word=st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20),
    pickled=st.booleans(),
)
def test_any_shape_and_name(
    vectors: int, width: int, word: str, pickled: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = rows(vectors, width)
    path = tmp_path_factory.mktemp("any") / ("a.pt" if pickled else "a.safetensors")
    [learned] = read(saved(path, {word: torch.from_numpy(values) if pickled else values}))
    if word not in ("clip_l", "clip_g", "emb_params"):
        assert learned.word == word
    np.testing.assert_array_equal(learned.parts.get(ANY, values), values)
