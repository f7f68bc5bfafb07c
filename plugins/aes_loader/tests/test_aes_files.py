"""Sources of every format, the commands on disk, and what happens when a disk or a process fails."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

import ovforge_aes_loader
import test_bundle
from ovforge import open_file, testing
from ovforge.builtin.loader import NativeLoader, NativeOptions
from ovforge.errors import ConfigError, InputError, ModelError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.run.session import Session
from ovforge_aes_loader import files
from ovforge_aes_loader.keys import Key, Scrypt
from ovforge_aes_loader.options import KeyOptions

X = np.full((1, 4), 2, np.float32)


def opened(path: Path, key: Key) -> ModelBundle:
    source = Session(key={"function": key.options.function, "form": key.options.form}).open_source(str(path), Path())
    loader = NativeLoader(NativeOptions())
    assert loader.can_load(source)
    return loader.load(source)


def test_contract(ir: Path, tmp_path: Path, key: Key) -> None:
    offers = testing.check_plugin(ovforge_aes_loader)
    assert [offer.name for offer in offers] == ["aes", "encrypt", "decrypt", "rekey"]
    files.encrypt(ir.parent, tmp_path / "enc", key)
    options = {"function": key.options.function}
    source = testing.check_source(ovforge_aes_loader, "aes", tmp_path / "enc", ir.parent, options)
    assert source.read("openvino_model.xml") == ir.read_bytes()


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("who", ["key", "passphrase"])
def test_an_ir(single: bool, who: str, ir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    key: Key = request.getfixturevalue(who)
    written = files.encrypt(ir, tmp_path / "enc", key, scrypt=Scrypt(log_n=14))
    assert sorted(path.name for path in written) == ["openvino_model.bin.ovenc", "openvino_model.xml.ovenc"]
    bundle = opened(tmp_path / "enc" / "openvino_model.xml.ovenc" if single else tmp_path / "enc", key)
    expected = testing.run(testing.small_model(), {"x": X})["y"]
    np.testing.assert_array_equal(testing.run(next(iter(bundle.models.values())), {"x": X})["y"], expected)
    assert bundle.location == {}
    with pytest.raises(ModelError, match="would be written plain"):
        bundle.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


FORMATS = [
    test_bundle.test_onnx,
    test_bundle.test_tensorflow_frozen_graph,
    test_bundle.test_tensorflow_saved_model,
    test_bundle.test_tflite,
    test_bundle.test_paddle,
]


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__[5:])
def test_other_formats(make: Callable[[Path], None], tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(test_bundle, "check", made.append)
    (tmp_path / "plain").mkdir()
    make(tmp_path / "plain")
    source = made[0] if made[0].is_dir() else tmp_path / "plain"
    files.encrypt(source, tmp_path / "enc", key)
    path = tmp_path / "enc"
    if path.is_dir() and made[0].suffix == ".pdmodel":
        path /= "m.pdmodel.ovenc"  # takes its weights along
    model = opened(path, key).models["model"]
    result = ov.compile_model(model, "CPU")(np.full((1, 3), 2, np.float32))[0]
    np.testing.assert_array_equal(result, np.full((1, 3), 4, np.float32))


def test_onnx_with_weights_in_other_files(tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx = pytest.importorskip("onnx")
    weights = np.arange(3000, dtype=np.float32).reshape(3, 1000)
    x, y = (onnx.helper.make_tensor_value_info(n, 1, s) for n, s in (("x", [1, 3]), ("y", [1, 1000])))
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    plain = tmp_path / "plain"
    (plain / "weights").mkdir(parents=True)
    onnx.save(model, plain / "m.onnx", save_as_external_data=True, location="weights/m.onnx_data", size_threshold=0)
    ones = np.ones((1, 3), np.float32)
    # A folder, or the model by itself, which takes its weights along; then the folder, or the model in it by its name.
    for source in (plain, plain / "m.onnx"):
        target = tmp_path / f"enc-{source.name}"
        files.encrypt(source, target, key)
        assert sorted(path.name for path in target.rglob("*.ovenc")) == ["m.onnx.ovenc", "m.onnx_data.ovenc"]
        for named in (target, target / "m.onnx.ovenc", target / "m.onnx"):
            found = testing.run(opened(named, key).models["model"], {"x": ones})["y"]
            np.testing.assert_allclose(found, ones @ weights)
    files.decrypt(tmp_path / "enc-m.onnx", tmp_path / "back", key)
    assert (tmp_path / "back" / "weights" / "m.onnx_data").read_bytes() == weights.tobytes()
    # Without them it is refused; those that somebody laid into the current folder are not taken.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "enc-m.onnx" / "m.onnx.ovenc", alone)
    (tmp_path / "here" / "weights").mkdir(parents=True)
    (tmp_path / "here" / "weights" / "m.onnx_data").write_bytes(bytes(12000))
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError, match="m.onnx_data is missing"):
        opened(alone / "m.onnx.ovenc", key).models["model"]
    (plain / "weights" / "m.onnx_data").unlink()
    with pytest.raises(ModelError, match="its weights are not in its folder"):
        files.encrypt(plain / "m.onnx", tmp_path / "none", key)
    with pytest.raises(ModelError, match="no such file"):
        opened(tmp_path / "enc-plain" / "n.onnx", key)


def test_formats_that_need_files_are_refused_where_there_are_none_in_memory(
    tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.pb").write_bytes(test_bundle.tensorflow_graph())
    files.encrypt(tmp_path / "m.pb", tmp_path / "m.ovenc", key)
    monkeypatch.setattr("ovforge.model.memory.AVAILABLE", False)
    with pytest.raises(ModelError, match=r"reading m.pb takes plain files.*\n.*convert the model to OpenVINO IR"):
        opened(tmp_path / "m.ovenc", key).models["model"]


def test_files_of_options_open_by_the_key_of_their_pipeline(tmp_path: Path, key: Key) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"adapter")
    files.encrypt(tmp_path / "lora.safetensors", tmp_path / "lora.ovenc", key)
    with pytest.raises(ConfigError, match=f"the key {key.new_master().id.hex()}, and no key is given"):
        open_file(tmp_path / "lora.ovenc")
    session = Session(key={"function": key.options.function})
    with session.active():
        source = open_file(tmp_path / "lora.ovenc")
    with pytest.raises(ConfigError, match="no key is given"):
        open_file(tmp_path / "lora.ovenc")
    assert source.files() == {"lora.safetensors": 7} and source.read("lora.safetensors") == b"adapter"
    assert source.protection is not None and source.local("lora.safetensors") is None
    plain = open_file(tmp_path / "lora.safetensors")
    assert plain.read("lora.safetensors") == b"adapter" and plain.protection is None


def test_a_missing_or_wrong_size_is_said(ir: Path, tmp_path: Path, key: Key) -> None:
    files.encrypt(ir, tmp_path / "enc", key)
    source = Session(key={"function": key.options.function}).open_source(str(tmp_path / "enc"), Path())
    for attempt in (source.read, source.digest, lambda path: source.read_into(path, memoryview(bytearray(1)))):
        with pytest.raises(ModelError, match="no-such-file is missing"):
            attempt("no-such-file")
    with pytest.raises(ModelError, match="openvino_model.bin has 48 bytes, not 1"):
        source.read_into("openvino_model.bin", memoryview(bytearray(1)))


def test_on_disk(ir: Path, tmp_path: Path, key: Key, other_key: Key) -> None:
    (ir.parent / "config.json").write_text("{}")
    enc = tmp_path / "enc"
    files.encrypt(ir.parent, enc, key)
    before = {path: path.read_bytes() for path in enc.rglob("*")}
    for attempt in (
        lambda: files.encrypt(ir.parent, enc, key),
        lambda: files.encrypt(enc, tmp_path / "twice", key),
        lambda: files.decrypt(enc, tmp_path / "dec", other_key),
        lambda: files.decrypt(ir.parent, tmp_path / "dec", key),
        lambda: files.rekey(enc, other_key, key),
        lambda: files.rekey(enc / "openvino_model.bin.ovenc", key, other_key),
        lambda: files.rekey(enc / "openvino_model.xml.ovenc", key, other_key),
        lambda: files.rekey(ir.parent, key, other_key),
        lambda: files.encrypt(tmp_path / "nothing", tmp_path / "x", key),
    ):
        with pytest.raises(OvforgeError):
            attempt()
        assert {path: path.read_bytes() for path in enc.rglob("*")} == before
        assert not (tmp_path / "dec").exists() and not (tmp_path / "twice").exists()
    files.rekey(enc, key, other_key)
    for path in enc.rglob("*"):
        if path.name != ".ovforge-files":
            assert path.read_bytes() != before[path] and path.stat().st_mode & 0o777 == 0o600
    files.decrypt(enc, tmp_path / "dec", other_key)
    for path in ir.parent.iterdir():
        assert (tmp_path / "dec" / path.name).read_bytes() == path.read_bytes()
    single = tmp_path / "one.ovenc"
    files.encrypt(ir.parent / "config.json", single, key)
    files.rekey(single, key, other_key)
    files.decrypt(single, tmp_path / "one.json", other_key)
    assert (tmp_path / "one.json").read_text() == "{}" and (tmp_path / "one.json").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.rglob(".*")} == {".ovforge-files"}
    for attempt in (
        lambda: files.encrypt(ir.parent, ir.parent, key, replace=True),
        lambda: files.encrypt(ir.parent, ir.parent / "enc", key, replace=True),
        lambda: files.decrypt(enc, tmp_path, other_key, replace=True),
        lambda: files.encrypt(ir.parent / "config.json", ir.parent / "config.json", key, replace=True),
    ):
        with pytest.raises(InputError, match="which is read|is what the model is read from"):
            attempt()


def test_a_damaged_file_is_not_decrypted_in_part(tmp_path: Path, key: Key) -> None:
    (tmp_path / "x.bin").write_bytes(os.urandom(5 * 2**20))
    files.encrypt(tmp_path / "x.bin", tmp_path / "x.ovenc", key)
    with (tmp_path / "x.ovenc").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"12345")
    (tmp_path / "old").write_text("old")
    with pytest.raises(ModelError, match="chunk 4 of 5 was changed"):
        files.decrypt(tmp_path / "x.ovenc", tmp_path / "old", key, replace=True)
    assert (tmp_path / "old").read_text() == "old" and list(tmp_path.rglob(".*")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="folders are swapped at once on Linux alone")
@pytest.mark.parametrize("what", ["encrypt", "rekey"])
def test_a_process_killed_leaves_the_old_files(what: str, tmp_path: Path) -> None:
    """Killed at ten moments or more; what is there is always one whole model, the old one until the new one is."""
    source, target, secret = tmp_path / "model", tmp_path / "enc", tmp_path / "key"
    source.mkdir()
    for n in range(6):
        (source / f"{n}.bin").write_bytes(os.urandom(6 * 2**20))
    secret.write_text("0f" * 32)
    secret.chmod(0o600)
    old = Key(KeyOptions(file=secret))
    files.encrypt(source, target, old)
    call = (
        "files.encrypt(Path(a), Path(b), key, replace=True)" if what == "encrypt" else "files.rekey(Path(b), key, key)"
    )
    code = (
        "import sys; from pathlib import Path; from ovforge_aes_loader import files\n"
        "from ovforge_aes_loader.keys import Key; from ovforge_aes_loader.options import KeyOptions\na, b, c = sys.argv[1:]; key = Key(KeyOptions(file=c))\n"
        f"print('go', flush=True)\nwhile True: {call}"
    )
    killed_at_work = 0
    for n in range(60):
        if n >= 10 and killed_at_work:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(target), str(secret)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None and process.stdout.readline() == b"go\n"
        time.sleep(0.013 * n)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        left = [path for path in tmp_path.iterdir() if path.name.startswith(".enc.")]
        killed_at_work += any(path.suffix == ".tmp" for path in left)
        files.decrypt(target, tmp_path / "check", old, replace=True)
        for path in source.iterdir():
            assert (tmp_path / "check" / path.name).read_bytes() == path.read_bytes()
    assert killed_at_work


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, key: Key) -> None:
    """A limit on the size of files stands for it: the system says so in the middle of a write."""
    (tmp_path / "x.bin").write_bytes(os.urandom(3 * 2**20))
    target = tmp_path / "x.ovenc"
    target.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.encrypt(tmp_path / "x.bin", target, key, replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_text() == "old" and list(tmp_path.rglob(".*")) == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not here")
def test_a_full_disk_is_explained(ir: Path, tmp_path: Path) -> None:
    """The real thing, a file system of 64 KB, where the test may make one."""
    small = tmp_path / "small"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=64k none {small} && head -c 300000 /dev/urandom > {tmp_path}/x.bin && "
        f"OVFORGE_KEY={'0f' * 32} {Path(sys.executable).with_name('ovforge')} encrypt {tmp_path}/x.bin -o {small}/x; "
        f"echo code $?; ls -A {small} | wc -l"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if "code" not in done.stdout:
        pytest.skip("this system lets nobody mount a small file system")
    assert done.stdout.split() == ["code", "1", "0"]
    assert "No space left on device" in done.stderr and "Free some space" in done.stderr


def test_models_loaded_side_by_side(ir: Path, tmp_path: Path, key: Key) -> None:
    files.encrypt(ir, tmp_path / "enc", key)
    expected = testing.run(testing.small_model(), {"x": X})["y"]
    results: list[bool] = []

    def load() -> None:
        model = next(iter(opened(tmp_path / "enc", key).models.values()))
        results.append(np.array_equal(testing.run(model, {"x": X})["y"], expected))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8


def test_memory_is_that_of_the_plain_model(tmp_path: Path, key: Key) -> None:
    """256 MB of weights: the peak of an encrypted load is at most 1.1 times that of a plain one, and 64 MB."""
    from openvino import opset13 as ops

    x = ops.parameter([1, 64], np.float32, name="x")
    weights = np.random.default_rng(0).standard_normal((2**20, 64)).astype(np.float32)
    plain = tmp_path / "plain"
    plain.mkdir()
    ov.save_model(ov.Model([ops.matmul(x, ops.constant(weights), False, True)], [x]), plain / "m.xml", False)
    files.encrypt(plain, tmp_path / "enc", key)
    code = (
        "import sys, numpy as np; from pathlib import Path; import openvino as ov\n"
        "from ovforge.model.bundle import ModelBundle; from ovforge.run.session import Session\n"
        "source = Session().open_source(sys.argv[1], Path())\n"
        "model = next(iter(ModelBundle.open(source).models.values()))\n"
        "compiled = ov.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})\n"
        "print(float(compiled(np.ones((1, 64), np.float32))[0].sum()))\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    environment = {**os.environ, "OVFORGE_KEY": "a1" * 32}
    results = []
    for folder in (plain, tmp_path / "enc"):
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        results.append(done.stdout.split())
    (plain_sum, plain_peak), (sum_, peak) = results
    assert sum_ == plain_sum
    assert int(peak) * 1024 <= 1.1 * int(plain_peak) * 1024 + 64e6, f"{peak} kB against {plain_peak} kB"
