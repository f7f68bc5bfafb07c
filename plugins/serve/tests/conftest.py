"""Servers as a user starts them: `ovforge serve` in a process of its own."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openvino as ov
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openvino import opset13 as ops

from ovforge import testing

TASKS = {"lcm": "text-to-image", "edit": "image-to-image", "paint": "inpainting"}


@dataclass
class Running:
    """A server's process, its address, and the files that it writes its log and temporary files to."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    scratch: Path
    certificate: Path | None = None

    def client(self, **options: Any) -> httpx.Client:
        verify = ssl.create_default_context(cafile=self.certificate) if self.certificate else False
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=verify, **options)

    def events(self) -> list[dict[str, Any]]:
        """Return the log; a line that is not JSON fails the test."""
        *whole, _ = self.log.read_text().split("\n")  # the last line may still be written
        return [json.loads(line) for line in whole]

    def status(self, request: str) -> int:
        """Return the status that the log gives a request, once it does."""
        for _ in range(100):
            for event in self.events():
                if event.get("request") == request:
                    return int(event["status"])
            time.sleep(0.05)
        raise AssertionError(f"the log has no request {request}")

    def left(self) -> list[str]:
        """Return what lies among its temporary files."""
        return sorted(str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*"))

    def uploads(self) -> list[str]:
        """Return what is left of files that were sent, once what is removed after an answer has had its time."""
        for _ in range(200):
            if not (left := [name for name in self.left() if not name.startswith(".") and "/" in name]):
                break
            time.sleep(0.05)
        return left


@pytest.fixture(scope="session")
def self_signed() -> Callable[[Path], tuple[Path, Path]]:
    """Return a function that writes a certificate for 127.0.0.1 and its key into a folder."""

    def write(folder: Path) -> tuple[Path, Path]:
        secret = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(
                name, name, secret.public_key(), 1, now - timedelta(days=1), now + timedelta(days=1)
            )
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
            .sign(secret, hashes.SHA256())
        )
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (folder / "key.pem").write_bytes(secret.private_bytes(serialization.Encoding.PEM, *form))
        (folder / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return folder / "cert.pem", folder / "key.pem"

    return write


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return configs of the embedded models by name."""
    folder = tmp_path_factory.mktemp("configs")
    for name, task in TASKS.items():
        text = f'task = "{task}"\nload = "package:ovforge_lcm/model"\n'
        text += '[scheduler]\nuse = "lcm"\n[device]\nprecision = "f32"\n[input]\nsteps = 2\n'
        (folder / f"{name}.toml").write_text(text)
    (folder / "pencil.toml").write_text(
        (folder / "lcm.toml").read_text()
        + '[[transform]]\nuse = "lora"\nmode = "runtime"\npath = "package:ovforge_sd_lora/examples/pencil.safetensors"\n'
    )
    for task in ("detect", "video"):
        text = f'task = "{task}"\nload = "package:ovforge_grounding_dino/model"\n'
        (folder / f"{task}.toml").write_text(text + '[device]\nprecision = "f32"\n')
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a server and waits until it listens; all are ended after the tests."""
    cache = tmp_path_factory.mktemp("cache")
    started: list[Running] = []

    def begin(*arguments: object, scratch: Path | None = None, **environment: str) -> Running:
        folder = tmp_path_factory.mktemp("server")
        scratch = scratch or folder / "scratch"
        scratch.mkdir(exist_ok=True)
        variables = {
            **os.environ, "OVFORGE_CACHE_DIR": str(cache), "OVFORGE_REGISTRY": str(folder / "none"),
            "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip
        command = [sys.executable, "-m", "ovforge", "serve", "--trust", "-p", "0", *map(str, arguments)]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=variables)
        assert process.stdout is not None
        started.append(Running(process, process.stdout.readline().strip(), folder / "log", scratch))
        assert started[-1].url, started[-1].log.read_text()
        return started[-1]

    yield begin
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="session")
def server(
    start: Callable[..., Running], configs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Return a server of the embedded models, and of single ones: `small`, `typed`, and the roles of `folder`."""
    folder = tmp_path_factory.mktemp("models")
    testing.small_bundle().save(folder / "small")
    sides = ops.parameter([-1, 2], np.float32, name="a"), ops.parameter([-1, 2], np.int64, name="b")
    flags = ops.parameter([-1, 2], bool, name="c")
    chosen = ops.select(flags, sides[0], ops.convert(sides[1], "f32"))
    results = [ops.convert(chosen, "f16"), ops.add(sides[1], np.int64(1)), ops.logical_not(flags)]
    model = ov.Model([ops.result(each, name=name) for each, name in zip(results, "xyz", strict=True)], [*sides, flags])
    for port, name in zip([*model.inputs, *model.outputs], "abcxyz", strict=True):
        port.get_tensor().set_names({name})
    ov.save_model(model, folder / "typed.xml")
    text = ops.parameter([-1, -1], ov.Type.string, name="text")
    half = ops.parameter([-1], ov.Type.bf16, name="half")
    echo = ov.Model([ops.result(text, name="text"), ops.result(ops.add(half, half), name="twice")], [text, half])
    for port, name in zip([*echo.inputs, echo.outputs[1]], ("text", "half", "twice"), strict=True):
        port.get_tensor().set_names({name})
    ov.save_model(echo, folder / "echo.xml", compress_to_fp16=False)
    models = [
        "small=" + str(folder / "small"),
        folder / "typed.xml",
        folder / "echo.xml",
        "folder=package:ovforge_lcm/model",
    ]
    return start(*configs.values(), *models)


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    """Return a client of it."""
    with server.client() as client:
        yield client
