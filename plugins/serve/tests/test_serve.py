"""The server as clients meet it: any task, OpenAI's client unchanged, detection; what it refuses, and how it ends."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

import ovforge

PROMPT = "a pink unicorn"


def picture(data: str | bytes) -> Image.Image:
    """Return a picture of base64 or bytes."""
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def pixels(data: str | bytes | None) -> NDArray[np.int64]:
    return np.asarray(picture(data or b""), np.int64)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def direct(configs: dict[str, Path]) -> Image.Image:
    """Return what the pipeline makes without a server."""
    result: Any = ovforge.load(configs["lcm"])(PROMPT, seed=5)
    return result.images[0]


@pytest.fixture(scope="module")
def photo(direct: Image.Image) -> bytes:
    """Return a picture to change."""
    return encoded(direct)


@pytest.fixture
def official(server: Any) -> openai.OpenAI:
    """Return OpenAI's own client."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def run(client: httpx.Client, name: str, **inputs: Any) -> httpx.Response:
    return client.post(f"/v1/pipelines/{name}/run", json=inputs)


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


# -- what it gives ----------------------------------------------------------------------------------------------------


def test_a_run_gives_what_the_pipeline_gives(client: httpx.Client, direct: Image.Image, tmp_path: Path) -> None:
    answer = run(client, "lcm", prompt=PROMPT, seed=5).raise_for_status().json()
    assert answer["result"] == [{"width": 128, "height": 128, "seed": 5}]
    assert answer["provenance"]["inputs"]["prompt"] == PROMPT
    assert {"denoise", "vae_decoder"} <= answer["timings"].keys()
    assert np.array_equal(picture(answer["files"][0]["base64"]), direct)
    # The picture can be made again by the program, and carries no folder of the server.
    (tmp_path / "x.png").write_bytes(base64.b64decode(answer["files"][0]["base64"]))
    assert "base" not in ovforge.model.read_provenance(tmp_path / "x.png")
    jpeg = client.post("/v1/pipelines/lcm/run?as=jpg", json={"prompt": PROMPT, "steps": 1}).json()["files"][0]
    assert (jpeg["name"], jpeg["type"], picture(jpeg["base64"]).format) == ("result.jpg", "image/jpeg", "JPEG")


def test_files_come_in_base64_and_as_forms(client: httpx.Client, photo: bytes) -> None:
    text = base64.b64encode(photo).decode()
    asked = {"prompt": PROMPT, "seed": 1, "strength": 0.5}
    as_json = run(client, "edit", image=text, **asked).raise_for_status().json()
    as_url = run(client, "edit", image=[f"data:image/png;base64,{text}"], **asked).raise_for_status().json()
    form = client.post("/v1/pipelines/edit/run", files={"image": photo}, data={**asked, "inputs": '{"count": 1}'})
    pictures = [each["files"][0]["base64"] for each in (as_json, as_url, form.raise_for_status().json())]
    assert pictures[0] == pictures[1]
    assert np.array_equal(picture(pictures[0]), picture(pictures[2]))
    assert as_json["provenance"]["inputs"]["image"][0].startswith("sha256:")


def test_detection_gives_cocos_form(client: httpx.Client) -> None:
    from ovforge.model import package_path

    scene = package_path("package:ovforge_grounding_dino/demo/scene.jpg")
    form = client.post("/v1/detections", files={"image": scene.read_bytes()}, data={"text": "Horse. Car."})
    found = form.raise_for_status().json()
    exact = ovforge.Use("cpu", precision="f32")
    pipe = ovforge.Pipeline("detect", source="package:ovforge_grounding_dino/model", device=exact)
    expected: Any = pipe(scene, text="Horse. Car.")
    assert found["annotations"] == expected.as_json()["annotations"]
    assert found["annotations"]
    assert found["images"][0]["file_name"].startswith("sha256:")
    folder = client.post("/v1/pipelines/detect/run?as=/", files={"image": scene.read_bytes()}, data={"text": "Horse."})
    *drawn, boxes = [each["name"] for each in folder.raise_for_status().json()["files"]]
    assert (len(drawn), boxes) == (1, "result/detections.json")
    as_json = client.post("/v1/detections", json={"model": "lcm", "image": "AAAA"})
    assert (as_json.status_code, message(as_json)) == (404, "there is no pipeline 'lcm' that can find boxes")


def test_what_runs_and_what_it_takes_is_told(client: httpx.Client, server: Any, configs: dict[str, Path]) -> None:
    run(client, "lcm", prompt=PROMPT, steps=1).raise_for_status()
    told = client.get("/v1/pipelines/lcm").json()
    assert told["task"] == "text-to-image"
    assert told["precision"]["unet"] == "f32"
    assert len(told["digests"]["unet"]) >= 64
    assert {one["name"] for one in client.get("/v1/pipelines").json()["pipelines"]} == configs.keys()
    document = client.get("/openapi.json").json()
    inputs = document["components"]["schemas"]["edit.inputs"]["properties"]
    assert inputs["strength"]["description"].startswith("How far to go from it; 1 keeps next to nothing.")
    assert inputs["image"]["anyOf"][0]["items"]["contentEncoding"] == "base64"
    assert "/v1/pipelines/edit/run" in document["paths"]
    metrics = client.get("/metrics").text
    assert 'ovforge_stage_seconds_count{pipeline="lcm",stage="denoise"}' in metrics
    assert str(configs["lcm"].parent) not in json.dumps([told, document])
    assert client.get("/ready").json() == {"status": "ready"}
    request = client.get("/health", headers={"x-request-id": "mine-1"})
    assert request.headers["x-request-id"] == "mine-1"
    assert server.status("mine-1") == 200
    assert PROMPT not in server.log.read_text()


# -- OpenAI's client, unchanged ---------------------------------------------------------------------------------------


def test_openais_client_makes_pictures(official: openai.OpenAI, direct: Image.Image, client: httpx.Client) -> None:
    assert [model.id for model in official.models.list()] == [
        one["name"] for one in client.get("/v1/pipelines").json()["pipelines"]
    ]
    assert official.models.retrieve("lcm").id == "lcm"
    own = {"num_inference_steps": 2, "rng_seed": 5}
    made = official.images.generate(prompt=PROMPT, model="lcm", n=2, size="128x128", extra_body=own)
    assert made.data is not None
    assert len(made.data) == 2
    assert np.abs(pixels(made.data[0].b64_json) - np.asarray(direct, int)).max() <= 2  # a batch rounds otherwise
    linked = official.images.generate(
        prompt=PROMPT, response_format="url", output_format="webp", quality="high", extra_body=own
    )
    assert linked.data is not None
    assert linked.model_extra == {"warnings": ["quality has no effect"]}
    fetched = httpx.get(linked.data[0].url or "", trust_env=False)
    assert (fetched.headers["content-type"], picture(fetched.content).size) == ("image/webp", (128, 128))
    with pytest.raises(openai.NotFoundError, match="no pipeline 'none' that can make pictures"):
        official.images.generate(prompt=PROMPT, model="none")
    with pytest.raises(openai.BadRequestError, match="is not WIDTHxHEIGHT"):
        official.images.generate(prompt=PROMPT, size="large")
    with pytest.raises(openai.BadRequestError, match="no 'style'"):
        official.images.generate(prompt=PROMPT, extra_body={"lora_weights": {"style": 1}})


def test_openais_client_streams_partial_pictures(official: openai.OpenAI, direct: Image.Image) -> None:
    own = {"num_inference_steps": 2, "rng_seed": 5}
    events = list(official.images.generate(prompt=PROMPT, model="lcm", stream=True, partial_images=1, extra_body=own))
    assert [event.type for event in events] == ["image_generation.partial_image", "image_generation.completed"]
    assert np.array_equal(picture(events[1].b64_json), direct)
    assert not np.array_equal(picture(events[0].b64_json), direct)
    with pytest.raises(openai.BadRequestError, match="should be greater"):
        official.images.generate(prompt=PROMPT, stream=True, partial_images=1, size="7x7")


def test_openais_client_edits_where_the_mask_is_transparent(
    official: openai.OpenAI, photo: bytes, direct: Image.Image, configs: dict[str, Path]
) -> None:
    mask = Image.new("RGBA", (128, 128), (9, 9, 9, 255))
    mask.paste((9, 9, 9, 0), (0, 0, 64, 128))
    own = {"rng_seed": 1, "num_inference_steps": 2}
    painted = official.images.edit(
        image=("x.png", photo), mask=("m.png", encoded(mask)), prompt=PROMPT, model="paint", extra_body=own
    )
    white = Image.new("L", (128, 128), 0)
    white.paste(255, (0, 0, 64, 128))
    expected: Any = ovforge.load(configs["paint"])(PROMPT, image=direct, mask=white, seed=1)
    assert painted.data is not None
    assert np.array_equal(pixels(painted.data[0].b64_json), np.asarray(expected.images[0]))
    changed = official.images.edit(image=("x.png", photo), prompt=PROMPT, model="edit", size="64x64", extra_body=own)
    assert picture(changed.data[0].b64_json).size == (64, 64)
    with pytest.raises(openai.NotFoundError, match="no pipeline 'lcm' that can change a picture"):
        official.images.edit(image=("x.png", photo), prompt=PROMPT, model="lcm")


def test_openais_client_edits_in_streams_and_with_one_of_several(official: openai.OpenAI, photo: bytes) -> None:
    own = {"rng_seed": 1, "num_inference_steps": 3}
    asked: Any = {"image": [("x.png", photo)], "prompt": PROMPT, "model": "edit", "extra_body": own}
    whole = official.images.edit(**asked, n=1, size="auto", quality="high", input_fidelity="high")
    assert whole.model_extra == {"warnings": ["quality has no effect", "input_fidelity has no effect"]}
    events = list(official.images.edit(**asked, stream=True, partial_images=1))
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert np.array_equal(pixels(events[1].b64_json), pixels(whole.data[0].b64_json))
    for broken, words in (({"image": []}, "one picture"), ({"image": [("x", photo)] * 2}, "one picture")):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            official.images.edit(**{**asked, **broken})
        assert (caught.value.param, caught.value.type) == ("image", "invalid_request_error")


def test_weights_of_adapters_hold_for_one_request(official: openai.OpenAI, configs: dict[str, Path]) -> None:
    pipeline: Any = ovforge.load(configs["pencil"])
    (name,) = pipeline.adapters

    def made(**weights: float) -> NDArray[np.int64]:
        body = {"rng_seed": 5, **({"lora_weights": weights} if weights else {})}
        answer = official.images.generate(prompt=PROMPT, model="pencil", extra_body=body)
        return pixels(answer.data[0].b64_json if answer.data else None)

    plain = np.asarray(pipeline(PROMPT, seed=5).images[0], int)
    pipeline.adapters.set({name: 0.25})
    weaker = np.asarray(pipeline(PROMPT, seed=5).images[0], int)
    assert not np.array_equal(plain, weaker)
    for expected, weights in ((plain, {}), (weaker, {name: 0.25}), (plain, {})):
        assert np.array_equal(made(**weights), expected)


# -- what it refuses --------------------------------------------------------------------------------------------------


def test_no_client_reads_a_file_of_the_server(client: httpx.Client, server: Any, photo: bytes) -> None:
    """A path never becomes a file, wherever a task's own checks would take one."""
    secret = server.scratch.parent / "secret.png"
    secret.write_bytes(photo)
    for text in (str(secret), secret.as_uri(), "package:ovforge_grounding_dino/demo/scene.jpg", f"data:,{secret}"):
        for name, inputs in (
            ("edit", {"image": text}),
            ("edit", {"image": [text]}),
            ("paint", {"image": text, "mask": text}),
            ("lcm", {"control": text}),
            ("lcm", {"control": [{"image": text}]}),
            ("lcm", {"latents": text}),
            ("detect", {"image": [text], "text": "horse"}),
        ):
            answer = run(client, name, **{"prompt": PROMPT} if name != "detect" else {}, **inputs)
            assert answer.status_code == 400, answer.text
            assert "file" in message(answer) or "base64" in message(answer)
    assert message(run(client, "edit", prompt=PROMPT, image="http://127.0.0.1/x.png")) == "URLs are not fetched"


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (b"{", "application/json", 400, "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "application/json", 400, "more than 64 levels"),
        (b'{"prompt": "x", "steps": 1e999}', "application/json", 400, "larger than any number"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "lone surrogate"),
        (b"[]", "application/json", 400, "expected a JSON object"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "is not taken"),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400, "does not end with its boundary"),
        (b"x", "multipart/form-data", 400, ""),
        (b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx', "multipart/form-data; boundary=x", 400,
         "does not end with its boundary"),
        (b"--x\r\n" + b"a: b\r\n" * 100_000 + b"\r\nx\r\n--x--\r\n", "multipart/form-data; boundary=x", 400, ""),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 300 + b"--x--\r\n",
         "multipart/form-data; boundary=x", 400, "Too many fields"),
        (b'{"prompx": "x"}', "application/json", 400, "Did you mean 'prompt'?"),
        (b'{"prompt": "x", "width": 4096}', "application/json", 400, "more than 2048"),
        (b'{"prompt": ["x", "x", "x"], "count": 3}', "application/json", 400, "9 results are more than 8"),
        (b'{"prompt": "x", "latents": "AAAA"}', "application/json", 400, "latents"),
        (b"x" * (16 * 2**20 + 1), "application/json", 413, "more than"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value),
)  # fmt: skip
def test_bad_bodies_are_refused_in_words(client: httpx.Client, body: bytes, kind: str, status: int, words: str) -> None:
    answer = client.post("/v1/pipelines/lcm/run", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    assert words in answer.text


@pytest.mark.parametrize("ending", ["../../x.png", "..%2fx.png", "/x.png", "%00png", ".", "", "exe", "x.png"])
def test_the_ending_of_a_file_is_not_a_path(client: httpx.Client, server: Any, ending: str) -> None:
    before = set(server.scratch.parent.rglob("*"))
    for name in ("lcm", "video"):
        answer = client.post(f"/v1/pipelines/{name}/run?as={ending}", json={"prompt": PROMPT})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "as")
    assert client.post(f"/v1/videos?as={ending}", files={"video": b"x"}).status_code == 400
    assert set(server.scratch.parent.rglob("*")) == before


def test_pictures_that_are_bombs_or_programs_are_refused(client: httpx.Client, server: Any, photo: bytes) -> None:
    bomb = bytearray(encoded(Image.new("1", (8, 8))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR: width, height, and the checksum of the whole
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for data, words in (
        (bytes(bomb), "cannot be read"),
        (encoded(Image.new("1", (5000, 5000))), "has more than 16777216 pixels"),
        (program, "it is a EPS file"),
        (photo[:200], "not a readable picture"),
        (b"", "not a readable picture"),
    ):
        answer = client.post("/v1/pipelines/edit/run", files={"image": data}, data={"prompt": PROMPT})
        assert answer.status_code == 400, answer.text
        assert words in answer.text
        assert "/scratch/" not in answer.text
    assert server.uploads() == []


def test_pages_and_hosts_of_others_are_refused(client: httpx.Client) -> None:
    for headers in ({"origin": "https://example.com"}, {"origin": "null"}, {"host": "example.com"}):
        assert client.get("/v1/pipelines", headers=headers).status_code == 403
    for path in ("/v1/pipelines/../../etc/passwd/run", "/v1/pipelines/%2e%2e%2fx/run", "/v1/files/..%2f..%2fx"):
        assert client.get(path).status_code in (404, 405)


def test_a_run_ends_when_its_client_goes_away(client: httpx.Client, server: Any) -> None:
    run(client, "lcm", prompt=PROMPT, steps=1).raise_for_status()
    with pytest.raises(httpx.ReadTimeout):
        client.post(
            "/v1/pipelines/lcm/run", json={"prompt": PROMPT, "steps": 50, "count": 8}, timeout=0.5,
            headers={"x-request-id": "gone"},
        )  # fmt: skip
    began = time.monotonic()
    run(client, "lcm", prompt=PROMPT, steps=1).raise_for_status()
    assert time.monotonic() - began < 15  # the whole run would take a minute
    assert server.status("gone") == 499


# -- limits, keys, the end --------------------------------------------------------------------------------------------


KEY, OTHER = "k" * 20, "o" * 20


PAGE = "https://page.example"


@pytest.fixture(scope="module")
def guarded(
    start: Callable[..., Any],
    configs: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    self_signed: Callable[[Path], tuple[Path, Path]],
) -> Any:
    """Return a server with keys, TLS, one place to wait, and four seconds for each request."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys").write_text(f"# who\none {KEY} 3\n\ntwo {OTHER}\n")
    cert, key = self_signed(folder)
    server = start(
        configs["lcm"], "--keys", folder / "keys", "--queue", "1", "--timeout", "4", "--preload", "--cors", PAGE,
        "--tls-cert", cert, "--tls-key", key,
    )  # fmt: skip
    server.certificate = cert
    return server


def test_tls_keys_and_pages_that_may(guarded: Any) -> None:
    assert guarded.url.startswith("https://")
    with guarded.client(headers={"authorization": f"Bearer {KEY}", "origin": PAGE}) as mine:
        answer = mine.get("/v1/models")
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, PAGE)
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        assert mine.options("/v1/models", headers=asked).status_code == 200
        assert mine.get("/v1/models", headers={"origin": "https://other.example"}).status_code == 403


def test_queue_time_and_keys_have_bounds(guarded: Any) -> None:
    # Ten times what a fast machine does in the time allowed; short steps, because a run ends at its next one.
    long = {"prompt": PROMPT, "steps": 50, "count": 8, "width": 384, "height": 384}
    with guarded.client() as stranger:
        assert stranger.get("/v1/pipelines").status_code == 401
        assert stranger.get("/v1/pipelines", headers={"authorization": f"Bearer {KEY}x"}).status_code == 401
        assert stranger.get("/metrics").status_code == 401
        assert stranger.get("/ready").status_code == 200
    with ThreadPoolExecutor(8) as threads:

        def ask(secret: str) -> httpx.Response:
            with guarded.client(headers={"authorization": f"Bearer {secret}"}) as mine:
                return mine.post("/v1/pipelines/lcm/run", json=long)

        first = threads.submit(ask, KEY)
        time.sleep(0.5)
        waiting = threads.submit(ask, KEY)
        time.sleep(0.5)
        full = threads.submit(ask, OTHER).result()
        assert (full.status_code, message(full)) == (429, "1 requests are waiting")
        assert int(full.headers["retry-after"]) >= 1
        for late in (first.result(), waiting.result()):
            assert (late.status_code, message(late)) == (504, "it took more than 4 s")
    with guarded.client(headers={"authorization": f"Bearer {KEY}"}) as mine:
        # What ran ends at its next step, which takes a while on a busy machine.
        statuses = (run(mine, "lcm", prompt=PROMPT, steps=1).status_code for _ in range(20))
        assert 200 in statuses
        assert "ovforge_refused_total 1.0" in mine.get("/metrics").text
        assert "ovforge_waiting 0.0" in mine.get("/metrics").text
    log = guarded.log.read_text()
    assert KEY not in log
    assert '"key": "one"' in log


def test_a_killed_server_leaves_what_the_next_one_removes_and_that_ends_gracefully(
    start: Callable[..., Any], configs: dict[str, Path]
) -> None:
    killed = start(configs["lcm"])
    killed.process.kill()
    killed.process.wait()
    left = killed.left()
    assert left
    again = start(configs["lcm"], "--preload", scratch=killed.scratch)
    assert not set(left) & set(again.left())
    with ThreadPoolExecutor(1) as threads, again.client() as client:
        answer = threads.submit(run, client, "lcm", prompt=PROMPT, steps=40)
        time.sleep(0.5)
        again.process.send_signal(signal.SIGTERM)
        assert answer.result().status_code == 200
        host, port = again.url.removeprefix("http://").split(":")
        with pytest.raises(ConnectionError):  # at once, or, if the answer came before the signal, soon
            for _ in range(50):
                socket.create_connection((host, int(port)), timeout=5).close()
                time.sleep(0.1)
    assert again.process.wait(20) == 0
    assert again.left() == []
    assert again.events()[-1]["event"] == "stopped"


def test_nothing_that_the_openapi_document_allows_is_an_error_of_the_server(
    start: Callable[..., Any], configs: dict[str, Path], tmp_path: Path
) -> None:
    """Schemathesis sends what the document describes, and what it forbids; and nothing else is left open after it."""
    small = [f"--bound={name}={value}" for name, value in {"steps": 1, "width": 64, "height": 64, "count": 1}.items()]
    server = start(configs["lcm"], configs["edit"], *small, "--max-pixels", "4096")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--seed=1"]
    command += ["--checks=not_a_server_error", "--max-examples=4", "--phases=fuzzing", "--request-timeout=30"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    statuses = {event["status"] for event in server.events() if event["event"] == "request"}
    assert {200, 400} <= statuses
    assert max(statuses) < 500


def test_a_crowd_is_answered_or_refused(guarded: Any) -> None:
    """A short form of benchmarks/serve.py: 96 requests of 32 clients, and one place to wait."""

    def ask(number: int) -> list[tuple[int, str]]:
        with guarded.client(headers={"authorization": f"Bearer {OTHER}"}) as client:
            body = {"prompt": PROMPT, "seed": number, "steps": 1}
            answers = [client.post("/v1/pipelines/lcm/run", json=body) for _ in range(3)]
        return [(each.status_code, each.json().get("files", [{}])[0].get("base64", "")) for each in answers]

    with ThreadPoolExecutor(32) as threads:
        each = list(threads.map(ask, range(32)))
    statuses = {status for answers in each for status, _ in answers}
    assert statuses == {200, 429}
    for answers in each:  # every client has its own picture, however crowded it was
        assert len({data for status, data in answers if status == 200}) <= 1
    assert len({data for answers in each for status, data in answers if status == 200}) > 1
