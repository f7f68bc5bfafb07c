"""The Open Inference Protocol, spoken by Triton's own client, against the models themselves."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.http as triton

import ovforge
from ovforge import testing
from ovforge.model import core, package_path

A = np.array([[1.5, -2], [0.1, 3e4]], np.float32)
B = np.array([[7, 2**10], [-1, 0]], np.int64)
C = np.array([[True, False], [True, True]])


@pytest.fixture
def official(server: Any) -> triton.InferenceServerClient:
    """Return Triton's client."""
    return triton.InferenceServerClient(server.url.removeprefix("http://"))


def tensor(name: str, array: Any, *, binary: bool) -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary)
    return given


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_runs_models(official: triton.InferenceServerClient, binary: bool) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    given = [tensor("x", x, binary=binary)]
    answer = official.infer(
        "small", given, outputs=[triton.InferRequestedOutput("y", binary_data=binary)], request_id="7"
    )
    expected = core().compile_model(testing.small_model(), "CPU")({"x": x})["y"]  # in the processor's own precision
    assert np.allclose(answer.as_numpy("y"), expected, atol=1e-6)
    assert answer.get_response()["id"] == "7"
    typed = official.infer("typed", [tensor(n, v, binary=binary) for n, v in (("a", A), ("b", B), ("c", C))])
    assert np.array_equal(typed.as_numpy("x"), np.where(C, A, B.astype(np.float32)).astype(np.float16))
    assert np.array_equal(typed.as_numpy("y"), B + 1)
    assert np.array_equal(typed.as_numpy("z"), ~C)


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gives_text_and_bfloat16(official: triton.InferenceServerClient, binary: bool) -> None:
    texts = np.array([["a\u00e9\U0001f984", ""], ["a\0b", "x" * 300]], dtype=object)
    given = [triton.InferInput("text", [2, 2], "BYTES"), triton.InferInput("half", [3], "BF16")]
    given[0].set_data_from_numpy(texts, binary_data=binary)
    given[1].set_data_from_numpy(np.array([1.0, -2.5, 1e30], np.float32))
    answer = official.infer("echo", given, outputs=[triton.InferRequestedOutput("text", binary_data=binary), triton.InferRequestedOutput("twice")])  # fmt: skip
    same = answer.as_numpy("text")
    assert [text.decode() if binary else text for text in same.ravel()] == list(texts.ravel())
    assert same.shape == (2, 2)
    np.testing.assert_allclose(answer.as_numpy("twice"), [2, -5, 2e30], rtol=2**-7)
    # What JSON cannot hold is given as bytes.
    raw = np.array([[b"\xff\xfe"]], dtype=object)
    given[0] = triton.InferInput("text", [1, 1], "BYTES")
    given[0].set_data_from_numpy(raw)
    told = official.infer("echo", given, outputs=[triton.InferRequestedOutput("text", binary_data=False)])
    assert told.as_numpy("text")[0, 0] == b"\xff\xfe"


def test_a_tokenizer_is_a_model(official: triton.InferenceServerClient) -> None:
    told = official.get_model_metadata("folder.tokenizer")
    given = triton.InferInput(told["inputs"][0]["name"], [1], told["inputs"][0]["datatype"])
    given.set_data_from_numpy(np.array(["a pink unicorn"], dtype=object))
    ids = official.infer("folder.tokenizer", [given]).as_numpy("input_ids")
    pipeline: Any = ovforge.open_model("package:ovforge_lcm/model")
    expected = core().compile_model(pipeline.models["tokenizer"], "CPU")(["a pink unicorn"])["input_ids"]
    assert np.array_equal(ids, expected)
    assert len(ids[0]) > 3


def test_models_are_loaded_and_released_when_asked(official: triton.InferenceServerClient) -> None:
    def states() -> dict[str, str]:
        return {entry["name"]: entry["state"] for entry in official.get_model_repository_index()}

    official.load_model("small")
    assert states()["small"] == "READY"
    official.unload_model("small")
    assert states()["small"] == "UNAVAILABLE"
    assert official.is_model_ready("small")  # it is loaded when it is used
    official.load_model("folder")
    assert states()["folder.unet"] == "READY"
    with pytest.raises(triton.InferenceServerException, match="no model 'none'"):
        official.load_model("none")


def test_a_role_of_a_folder_is_a_model(official: triton.InferenceServerClient) -> None:
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    told = official.get_model_metadata("folder.vae_decoder")
    assert told["inputs"][0]["datatype"] == "FP32"
    name = told["inputs"][0]["name"]
    answer = official.infer("folder.vae_decoder", [tensor(name, latents, binary=True)])
    model = core().read_model(package_path("package:ovforge_lcm/model") / "vae_decoder" / "openvino_model.xml")
    expected = core().compile_model(model, "CPU")([latents])[0]
    assert np.array_equal(answer.as_numpy(told["outputs"][0]["name"]), expected)
    with pytest.raises(triton.InferenceServerException, match=r"(?s)no model 'folder'.*folder\.unet"):
        official.get_model_metadata("folder")


def test_what_is_there_is_told(official: triton.InferenceServerClient) -> None:
    assert official.is_server_live()
    assert official.is_server_ready()
    assert official.is_model_ready("small")
    assert not official.is_model_ready("small", "2")
    assert official.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_repository"]
    assert official.get_model_metadata("typed", "1") == {
        "name": "typed", "versions": ["1"], "platform": "openvino",
        "inputs": [{"name": name, "datatype": kind, "shape": [-1, 2]} for name, kind in (("a", "FP32"), ("b", "INT64"), ("c", "BOOL"))],
        "outputs": [{"name": name, "datatype": kind, "shape": [-1, 2]} for name, kind in (("x", "FP16"), ("y", "INT64"), ("z", "BOOL"))],
    }  # fmt: skip


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4], **changes}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "missing: x"),
        ([entry(), entry()], "given once"),
        ([entry(name="z")], "no input 'z'"),
        ([entry(datatype="INT64")], "INT64 is not FP32"),
        ([entry(datatype="BYTES")], "BYTES is not FP32"),
        ([entry(datatype="BF16", data=None, parameters={"binary_data_size": 8})], "BF16 is not FP32"),
        ([entry(shape=[1, 5])], "does not fit"),
        ([entry(shape=[-1, 4])], "does not fit"),
        ([entry(shape=[2, 4])], "there are 4 of them, and the shape has 8"),
        ([entry(shape=[2**62, 4])], "there are 4"),
        ([entry(data=["1", 2, 3, 4])], "not numbers"),
        ([entry(data=[[1, 2], [3]])], "the data are wrong"),
        ([entry(data=[1e300, 2, 3, 4])], "the data are wrong"),
        ([entry(data=None)], "the data are wrong"),
        ([entry(data=None, parameters={"binary_data_size": 16})], "not all are there"),
        ([entry(data=None, parameters={"binary_data_size": 8})], "are not 8 bytes"),
    ],
)
def test_wrong_tensors_are_refused_in_the_protocols_form(client: httpx.Client, inputs: Any, words: str) -> None:
    answer = client.post("/v2/models/small/infer", json={"inputs": inputs})
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_lengths_and_numbers_are_exact(client: httpx.Client) -> None:
    body = json.dumps({"inputs": [entry()]}).encode()
    for header, content, words in (("9" * 9, body, "not a length"), ("-1", body, "not a length"), (str(len(body)), body + b"x", "1 bytes follow")):  # fmt: skip
        answer = client.post(
            "/v2/models/small/infer", content=content, headers={"inference-header-content-length": header}
        )
        assert answer.status_code == 400
        assert words in answer.json()["error"]
    ints = [{"name": n, "shape": [1, 2], "datatype": t, "data": d} for n, t, d in (("a", "FP32", [1, 2]), ("b", "INT64", [1.5, 2]), ("c", "BOOL", [True, False]))]  # fmt: skip
    assert "int64 does not hold them" in client.post("/v2/models/typed/infer", json={"inputs": ints}).json()["error"]
    assert client.get("/v2/models/none").json()["error"].startswith("there is no model 'none'")


def texts(**changes: Any) -> list[dict[str, Any]]:
    half = {"name": "half", "shape": [1], "datatype": "BF16", "parameters": {"binary_data_size": 2}}
    return [{"name": "text", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"], **changes}, half]


@pytest.mark.parametrize(
    ("inputs", "tail", "words"),
    [
        (texts(data=["a"]), b"\0\0", "there are 1 texts, and the shape has 2"),
        (texts(data=["a", 1]), b"\0\0", "not texts"),
        (texts(data=["a", "b\0"]), b"\0\0", "ends with a NUL"),
        (texts(data=["a"] * 10_000 + ["x" * 10_000], shape=[1, 10_001]), b"\0\0", "as long as the longest"),
        (texts(data=None, parameters={"binary_data_size": 99}), b"\4\0\0\0abc\0\0", "not all are there"),
        (texts(data=None, parameters={"binary_data_size": 7}), b"\4\0\0\0abc\0\0", "longer than its bytes"),
        (texts(data=None, parameters={"binary_data_size": 2}), b"\4\0\0\0", "longer than its bytes"),
        ([texts()[0], {"name": "half", "shape": [1], "datatype": "BF16", "data": [1]}], b"", "not taken in JSON"),
    ],
)
def test_wrong_texts_are_refused(client: httpx.Client, inputs: Any, tail: bytes, words: str) -> None:
    head = json.dumps({"inputs": inputs}).encode()
    answer = client.post(
        "/v2/models/echo/infer", content=head + tail, headers={"inference-header-content-length": str(len(head))}
    )
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]
