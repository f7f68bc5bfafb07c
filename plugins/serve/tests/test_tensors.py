"""The Open Inference Protocol, spoken by Triton's own client, against the models themselves."""

from __future__ import annotations

import json
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.http as triton

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
    expected = testing.run(testing.small_model(), {"x": x})["y"]
    assert np.allclose(answer.as_numpy("y"), expected, atol=1e-6)
    assert answer.get_response()["id"] == "7"
    typed = official.infer("typed", [tensor(n, v, binary=binary) for n, v in (("a", A), ("b", B), ("c", C))])
    assert np.array_equal(typed.as_numpy("x"), np.where(C, A, B.astype(np.float32)).astype(np.float16))
    assert np.array_equal(typed.as_numpy("y"), B + 1)
    assert np.array_equal(typed.as_numpy("z"), ~C)


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
    assert official.get_server_metadata()["extensions"] == ["binary_tensor_data"]
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
