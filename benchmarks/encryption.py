"""Encrypted against plain: decryption of weights, loading and compiling, and the second start from the cache.

Every measurement is a process of its own, and the ways take turns; the first round fills caches and is not counted.

    python benchmarks/encryption.py MODEL.xml [--work FOLDER] [--rounds 3]

MODEL.xml is an OpenVINO model with its .bin. FOLDER keeps encrypted copies of it, and what is compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import child, peak_mib

KEY = "6f70656e76696e6f20656e6372797074"
"""Of the article, for AES-128-CBC; doubled for containers."""

CBC = {"cipher": "aes-128-cbc", "iv": KEY}


def options(form: str) -> dict[str, Any]:
    """Return what `load.key` says."""
    return {"function": lambda: KEY * 2} if form == "ovenc" else {"function": lambda: KEY, **CBC}


def opened(path: Path, form: str | None, memo: Any = None) -> Any:
    """Return the bundle of a plain model, or of an encrypted one; `memo` remembers digests, as pipelines do."""
    from ovforge.model import ModelBundle
    from ovforge.run.session import Session

    return ModelBundle.open(Session(key=options(form) if form else None, memo=memo).open_source(str(path), Path()))


def only(bundle: Any) -> tuple[str, Any]:
    """Return the bundle's one role and its model."""
    [role] = bundle.models
    return role, bundle.models[role]


def article(path: Path) -> Any:
    """Read as the article's sample does: all ciphertext, then all plain text, then the model."""
    import openvino as ov
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    def decrypted(file: Path) -> bytes:
        data = file.read_bytes()
        decryptor = Cipher(algorithms.AES(bytes.fromhex(KEY)), modes.CBC(bytes.fromhex(KEY))).decryptor()
        plain = decryptor.update(data) + decryptor.finalize()
        return plain[: -plain[-1]]

    weights = decrypted(path.with_name("openvino_model.bin.enc"))
    tensor = ov.Tensor(ov.Type.u8, ov.Shape([len(weights)]))
    memoryview(tensor.data)[:] = weights
    return ov.Core().read_model(decrypted(path.with_name("openvino_model.xml.enc")).decode(), tensor)


def load(way: str, work: Path) -> dict[str, Any]:
    """Read a model, compile it and infer once: a mapped file is in memory from then on only."""
    import openvino as ov

    plain = work / "plain" / "openvino_model.xml"
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: only(opened(plain, None))[1],
        "plain, not mapped": lambda: ov.Core().read_model(plain, config={"ENABLE_MMAP": False}),
        ".ovenc": lambda: only(opened(work / "ovenc", "ovenc"))[1],
        "openssl's CBC": lambda: only(opened(work / "cbc", "cbc"))[1],
        "article's way": lambda: article(work / "cbc" / "openvino_model.xml.enc"),
    }
    start = time.perf_counter()
    model = ways[way]()
    read = time.perf_counter() - start
    read_peak = peak_mib()
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    total = time.perf_counter() - start
    compiled({port.any_name: np_ones(port) for port in compiled.inputs})
    inferred = time.perf_counter() - start
    return {
        "read, s": read,
        "and compile, s": total,
        "and infer once, s": inferred,
        "peak when read, MiB": read_peak,
        "peak, MiB": peak_mib(),
    }


def decrypt(way: str, work: Path) -> dict[str, Any]:
    """Decrypt the weights into memory that is there, on one core or on all."""
    import numpy as np

    form, cores = way.split(", ")
    if cores == "one core":
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
        os.cpu_count = lambda: 1
    weights = work / "plain" / "openvino_model.bin"
    size = weights.stat().st_size
    if form == "openssl enc -d":
        start = time.perf_counter()
        command = [
            "openssl",
            "enc",
            "-d",
            "-aes-128-cbc",
            "-K",
            KEY,
            "-iv",
            KEY,
            "-in",
            work / "cbc" / "openvino_model.bin.enc",
        ]
        subprocess.run([*map(str, command), "-out", "/dev/null"], check=True)
        return {"GB/s": size / (time.perf_counter() - start) / 1e9}
    from ovforge.run.session import Session

    source = Session(key=options(form)).open_source(str(work / form), Path())
    buffer = np.ones(size, np.uint8)  # its pages are there
    start = time.perf_counter()
    source.read_into("openvino_model.bin", memoryview(buffer))
    seconds = time.perf_counter() - start
    assert buffer[:4096].tobytes() == weights.open("rb").read(4096)
    return {"GB/s": size / seconds / 1e9}


def start(way: str, work: Path) -> dict[str, Any]:
    """Start three times through the cache, which is filled in the first round; the best counts.

    A virtual machine gets memory that was never used from its host, a second a GiB: the first start pays for that.
    """
    return min((started(way, work) for _ in range(3)), key=lambda measured: measured["first inference done, s"])


def started(way: str, work: Path) -> dict[str, Any]:
    """Compile through the cache, and infer once."""
    from ovforge import Cache
    from ovforge.contracts import DevicePlan
    from ovforge.run.compiled import compile_model

    begin = time.perf_counter()
    encrypted = way == ".ovenc"
    cache = Cache(work / "cache", 2**40)
    bundle = opened(work / ("ovenc" if encrypted else "plain"), "ovenc" if encrypted else None, cache.memo)
    plan = DevicePlan("CPU", {"INFERENCE_PRECISION_HINT": "f32"}, "CPU", "f32", True)
    compiled = compile_model(bundle, next(iter(bundle.models)), plan, cache)
    ready = time.perf_counter() - begin
    assert compiled.model is not None
    compiled.model({port.any_name: np_ones(port) for port in compiled.model.inputs})
    total = time.perf_counter() - begin
    return {"ready, s": ready, "first inference done, s": total, "peak, MiB": peak_mib(), "cached": compiled.cached}


def np_ones(port: Any) -> Any:
    """Return ones of an input's shape, open dimensions being 1, or 8 for height and width."""
    import numpy as np

    shape = [
        (8 if number > 1 and len(port.partial_shape) == 4 else 1) if size.is_dynamic else size.get_length()
        for number, size in enumerate(port.partial_shape)
    ]
    return np.ones(shape, port.element_type.to_dtype())


GROUPS: dict[str, tuple[Callable[[str, Path], dict[str, Any]], list[str]]] = {
    "decrypt": (
        decrypt,
        ["ovenc, one core", "ovenc, all cores", "cbc, one core", "cbc, all cores", "openssl enc -d, one core"],
    ),
    "load": (load, ["plain", "plain, not mapped", ".ovenc", "openssl's CBC", "article's way"]),
    "start": (start, ["plain", ".ovenc"]),
}


def prepare(model: Path, work: Path) -> None:
    """Link the plain model into `work` and encrypt it there, once."""
    from ovforge_aes_loader import files
    from ovforge_aes_loader.keys import Key
    from ovforge_aes_loader.options import KeyOptions

    plain = work / "plain"
    plain.mkdir(parents=True, exist_ok=True)
    for suffix in (".xml", ".bin"):
        link = plain / f"openvino_model{suffix}"
        if not link.exists():
            link.symlink_to(model.with_suffix(suffix).resolve())
    for form, encrypt in (("ovenc", files.encrypt), ("cbc", files.encrypt_openssl)):
        if not (work / form).exists():
            begin = time.perf_counter()
            encrypt(plain, work / form, Key(KeyOptions(**options(form))))
            size = (plain / "openvino_model.bin").stat().st_size
            print(
                f"encrypted as {form}: {size / (time.perf_counter() - begin) / 1e9:.2f} GB/s, with the disk", flush=True
            )


def main() -> None:
    """Measure, and print a table a group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=GROUPS, help="one group")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        group, way, work, _, _ = arguments.child
        print(json.dumps(GROUPS[group][0](way, Path(work))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        prepare(arguments.model, work)
        for group, (_, ways) in GROUPS.items():
            if arguments.only in (None, group):
                measure(group, ways, work, arguments.rounds)


def measure(group: str, ways: list[str], work: Path, rounds: int) -> None:
    """Let the ways of a group take turns, and print their medians."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in list(results):
            command = [sys.executable, __file__, "--child", group, way, str(work), "-"]
            measured = child(command, work / "default-cache", way)
            if measured is None:
                del results[way]
            elif number:
                results[way].append(measured)
    figures = [figure for figure in next(iter(results.values()))[0] if figure != "cached"]
    print(f"\n| {group} | {' | '.join(figures)} |\n|{' --- |' * (len(figures) + 1)}")
    base = next(iter(results))
    for way, measurements in results.items():
        cells = []
        for figure in figures:
            values = [measured[figure] for measured in measurements]
            middle, first = statistics.median(values), statistics.median(m[figure] for m in results[base])
            digits = 0 if "MiB" in figure else 2
            ratio = "" if way == base else f", {middle / first:.2f}x"
            cells.append(f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f}){ratio}")
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
