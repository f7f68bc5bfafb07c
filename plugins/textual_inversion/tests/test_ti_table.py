"""The table of embeddings: found by structure in any form, longer after compilation, and the same again when taken out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openvino import opset15 as ops

from ovforge import testing
from ovforge.errors import ModelError
from ovforge.model.bundle import ModelBundle
from ovforge.model.runtime import core
from ovforge_textual_inversion.graph import remove_marked
from ovforge_textual_inversion.table import extend_table, width_of

TOKENS, WIDTH = 96, 32
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def vectors(count: int = 3, width: int = WIDTH) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).normal(size=(count, width)).astype(np.float32)


def encoder(consumers: int = 1, rows: int = TOKENS, dtype: Any = np.float32) -> ov.Model:
    """Return a text encoder's beginning: token and position embeddings, a matrix; `consumers` look into one table."""
    rng = np.random.default_rng(1)
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    table: Any = ops.constant(rng.normal(size=(rows, WIDTH)).astype(dtype))
    if dtype != np.float32:
        table = ops.convert(table, "f32")
    flat = ops.reshape(ids, np.array([0, -1]), True)
    found = [ops.gather(table, ops.convert(flat, "i32"), np.int64(0)) for _ in range(consumers)]
    positions = ops.constant(rng.normal(size=(TOKENS + 1, WIDTH)).astype(np.float32))
    place = ops.gather(positions, ops.constant(np.zeros((1, 1), np.int64)), np.int64(0))
    matrix = ops.constant(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32))
    summed = found[0] if consumers == 1 else ops.add(*found)
    out = ops.matmul(ops.add(summed, place), matrix, False, True)
    made = ov.Model([out, ops.matmul(found[0], table, False, True)], [ids], "encoder")
    made.inputs[0].get_tensor().set_names({"input_ids"})
    made.outputs[0].get_tensor().set_names({"states"})
    made.outputs[1].get_tensor().set_names({"scores"})
    return made


def compressed(mode: str) -> ov.Model:
    nncf = pytest.importorskip("nncf")
    kind = nncf.CompressWeightsMode[mode]
    options = {} if "INT8" in mode else {"all_layers": True, "group_size": 16, "ratio": 1.0}
    return nncf.compress_weights(encoder(), mode=kind, **options)


def data(model: ov.Model, folder: Path) -> list[bytes]:
    ov.save_model(model, folder / "m.xml", compress_to_fp16=False)
    return [(folder / f"m.{end}").read_bytes() for end in ("xml", "bin")]


def constants(model: ov.Model, types: bool = False) -> list[str]:
    """Return the shapes of the constants that are left in a compiled model, with their types before them or without."""
    nodes = core().compile_model(model, "CPU", F32).get_runtime_model().get_ordered_ops()
    left = [node for node in nodes if node.get_rt_info()["layerType"].astype(str) == "Const"]
    kinds = [f"{node.get_rt_info()['outputPrecisions'].astype(str)} " if types else "" for node in left]
    return [f"{kind}{node.get_output_partial_shape(0)}" for kind, node in zip(kinds, left, strict=True)]


FORMS: dict[str, Callable[[], ov.Model]] = {
    "f32": encoder,
    "f16": lambda: encoder(dtype=np.float16),
    "two consumers": lambda: encoder(consumers=2),
    "more rows than tokens": lambda: encoder(rows=TOKENS + 32),
    **{mode: lambda mode=mode: compressed(mode) for mode in ("INT8_ASYM", "INT8_SYM", "INT4_SYM", "NF4")},  # type: ignore[misc]
}


@pytest.mark.parametrize("form", FORMS)
def test_any_table_is_found_and_folded(form: str, tmp_path: Path) -> None:
    model, rows = FORMS[form](), vectors()
    before, ids = data(model, tmp_path), {"input_ids": np.arange(TOKENS)[None]}
    plain = testing.run(model, ids)
    assert width_of(model, TOKENS, "text_encoder") == WIDTH
    assert extend_table(model, TOKENS, rows, "text_encoder") == "f32"
    shapes = constants(model)
    if "INT" in form or form == "NF4":
        assert shapes.count(f"[{TOKENS},{WIDTH}]") == constants(FORMS[form]()).count(f"[{TOKENS},{WIDTH}]")
        assert f"[{TOKENS + 3},{WIDTH}]" not in shapes, "the old table stays compressed"
    else:
        assert any(node.get_type_name() == "Concat" for node in model.get_ops())
        assert f"[{TOKENS + 3},{WIDTH}]" in shapes, "the longer table is one constant"
        assert f"[3,{WIDTH}]" not in shapes
    for name, found in testing.run(model, ids).items():
        np.testing.assert_allclose(found, plain[name], rtol=0, atol=1e-6 * np.abs(plain[name]).max())
    found = looked_up(model, [TOKENS, TOKENS + 2, TOKENS + 1])
    np.testing.assert_array_equal(found, rows[[0, 2, 1]], "learned vectors are not rounded")
    before_more = testing.run(model, {"input_ids": np.arange(TOKENS + 3)[None]})
    extend_table(model, TOKENS + 3, vectors(2), "text_encoder")
    assert width_of(model, TOKENS + 5, "text_encoder") == WIDTH
    np.testing.assert_array_equal(looked_up(model, [TOKENS + 4, TOKENS + 1]), [vectors(2)[1], rows[1]])
    for name, found in testing.run(model, {"input_ids": np.arange(TOKENS + 3)[None]}).items():
        np.testing.assert_allclose(found, before_more[name], rtol=0, atol=1e-6 * np.abs(found).max())
    remove_marked(model)
    assert data(model, tmp_path) == before


def looked_up(model: ov.Model, ids: list[int]) -> np.ndarray[Any, Any]:
    """Return what the first look-up in the longer table gives."""
    copy = model.clone()
    chosen = next(
        node
        for node in copy.get_ordered_ops()
        if node.get_friendly_name().startswith("learned_tokens/chosen")
        or (
            node.get_type_name() == "Gather"
            and node.input(0).get_source_output().get_node().get_friendly_name().startswith("learned_tokens/table")
        )
    )
    compiled = core().compile_model(ov.Model([chosen], copy.get_parameters(), "lookup"), "CPU", F32)
    return compiled([np.array([ids])])[0][0]


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT4_SYM"])
def test_compressed_tables_stay_compressed(mode: str) -> None:
    model = compressed(mode)
    few = [said for said in constants(model, types=True) if said.endswith(f"[{TOKENS},{WIDTH}]")]
    assert few
    extend_table(model, TOKENS, vectors(), "text_encoder")
    assert [said for said in constants(model, types=True) if said.endswith(f"[{TOKENS},{WIDTH}]")] == few


def test_other_consumers_keep_the_table() -> None:
    """A model that also multiplies by its table, as language models do, still gives as many scores."""
    model = encoder(consumers=2)
    extend_table(model, TOKENS, vectors(), "text_encoder")
    results = testing.run(model, {"input_ids": np.array([[TOKENS + 1]])})
    assert results["scores"].shape == (1, 1, TOKENS)
    assert constants(model).count(f"[{TOKENS + 3},{WIDTH}]") == 1, "two look-ups share one longer table"


@pytest.mark.parametrize(("family", "weights"), [("sd1", "f16"), ("sd2", "f32"), ("xl", "f16")])
def test_text_encoders_after_other_changes(
    family: str, weights: str, ti_bundle: Callable[..., ModelBundle], tmp_path: Path
) -> None:
    """Converted models, with types of inputs changed, stored and read, extended twice."""
    bundle = ti_bundle(family, weights)
    for role, width in (("text_encoder", 32), *([("text_encoder_2", 24)] if family == "xl" else [])):
        model = bundle.models[role]
        steps = ov.preprocess.PrePostProcessor(model)
        steps.input(0).tensor().set_element_type(ov.Type.i32)
        model = steps.build()
        before = data(model, tmp_path)
        extend_table(model, 559, vectors(2, width), role)
        ov.save_model(model, tmp_path / "stored.xml", compress_to_fp16=False)
        model = core().read_model(tmp_path / "stored.xml")
        extend_table(model, 561, vectors(3, width), role)
        assert f"[564,{width}]" in constants(model)
        remove_marked(model)
        assert data(model, tmp_path) == before


def test_a_table_in_half_precision_throughout_rounds_and_says_so() -> None:
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    table = ops.constant(np.zeros((TOKENS, WIDTH), np.float16))
    model = ov.Model([ops.gather(table, ids, np.int64(0))], [ids], "half")
    assert extend_table(model, TOKENS, vectors(), "text_encoder") == "f16"
    assert f"[{TOKENS + 3},{WIDTH}]" in constants(model)


def test_what_has_no_table_is_said() -> None:
    with pytest.raises(ModelError, match="text_encoder: no tables of embeddings for the tokenizer's 96 tokens"):
        extend_table(testing.small_model(), TOKENS, vectors(), "text_encoder")
    with pytest.raises(ModelError, match=r"(?s)no tables.*\[96,32\]"):
        width_of(encoder(), TOKENS + 1, "text_encoder")
    ids = ops.parameter([-1, -1], np.int64, name="input_ids")
    two = [ops.gather(ops.constant(np.full((TOKENS, WIDTH), n, np.float32)), ids, np.int64(0)) for n in (1, 2)]
    with pytest.raises(ModelError, match="2 tables"):
        width_of(ov.Model([ops.add(*two)], [ids], "two"), TOKENS, "text_encoder")


@settings(max_examples=20)
@given(tokens=st.integers(1, 40), extra=st.integers(0, 3), counts=st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_any_sizes(tokens: int, extra: int, counts: list[int]) -> None:
    """Extended again and again, every row is where its number says."""
    table = np.random.default_rng(0).normal(size=(tokens + extra, 4)).astype(np.float32)
    ids = ops.parameter([-1], np.int64, name="input_ids")
    model = ov.Model([ops.gather(ops.constant(table), ids, np.int64(0))], [ids], "table")
    wanted = table[:tokens]
    for count in counts:
        rows = vectors(count, 4)
        extend_table(model, len(wanted), rows, "text_encoder")
        wanted = np.concatenate([wanted, rows])
    found = next(iter(core().compile_model(model, "CPU", F32)(np.arange(len(wanted))).values()))
    np.testing.assert_array_equal(found, wanted)
