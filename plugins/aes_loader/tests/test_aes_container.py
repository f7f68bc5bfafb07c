"""The container: what was put in comes out, and nothing else ever does."""

from __future__ import annotations

import io
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovforge.errors import OvforgeError
from ovforge_aes_loader.container import (
    HEADER_LIMIT,
    MAGIC,
    TAG,
    Container,
    Set,
    new_header,
    parse_header,
    with_key,
    write_container,
)
from ovforge_aes_loader.keys import Key, Master, Scrypt
from ovforge_aes_loader.options import KeyOptions

MASTER = Master.of(b"k" * 32)
KEY = Key(KeyOptions(function=lambda: b"k" * 32, form="raw"))
CHUNK = 4096


def seal(data: bytes, name: str = "m.bin", files: Set | None = None, master: Master = MASTER) -> bytes:
    out = io.BytesIO()
    write_container(out, new_header(name, len(data), master, files or Set(), chunk=12), [data], master)
    return out.getvalue()


def unseal(data: bytes, key: Key = KEY, limit: int | None = None) -> bytes:
    container = Container(lambda: io.BytesIO(data), len(data), "m.ovenc", with_key(key))
    buffer = bytearray(container.size if limit is None else limit)
    container.read_into(memoryview(buffer))
    return bytes(buffer)


def refused(data: bytes, key: Key = KEY) -> str:
    """Return why nothing at all comes out, by either way of reading."""
    with pytest.raises(OvforgeError) as caught:
        unseal(data, key)
    container = None
    with pytest.raises(OvforgeError):
        container = Container(lambda: io.BytesIO(data), len(data), "m.ovenc", with_key(key))
        b"".join(bytes(piece) for piece in container.pieces())
    return str(caught.value)


@settings(max_examples=60)
@given(st.integers(0, 5 * CHUNK + 1), st.integers(0, 2**32 - 1), st.data())
def test_round_trips(size: int, seed: int, data: st.DataObject) -> None:
    plain = random.Random(seed).randbytes(size)
    sealed = seal(plain)
    assert len(sealed) == parse_header(sealed, len(sealed), "").total
    assert unseal(sealed) == plain
    limit = data.draw(st.integers(0, size))
    assert unseal(sealed, limit=limit) == plain[:limit]
    container = Container(lambda: io.BytesIO(sealed), len(sealed), "", with_key(KEY))
    assert b"".join(bytes(piece) for piece in container.pieces()) == plain
    assert plain[:16] not in sealed or size < 16


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 40 * CHUNK + 7])
def test_sizes_at_the_borders_of_chunks(size: int) -> None:
    plain = os.urandom(size)
    assert unseal(seal(plain)) == plain


def test_what_is_written_in_pieces_is_what_is_written_at_once() -> None:
    plain = os.urandom(3 * CHUNK + 5)
    for step in (1000, CHUNK, CHUNK + 1, 10**6):
        out = io.BytesIO()
        pieces = [plain[start : start + step] for start in range(0, len(plain), step)]
        write_container(out, new_header("x", len(plain), MASTER, Set(), chunk=12), pieces, MASTER)
        assert unseal(out.getvalue()) == plain
    with pytest.raises(OvforgeError, match="changed while it was read"):
        write_container(io.BytesIO(), new_header("x", 5, MASTER, Set()), [b"four"], MASTER)
    with pytest.raises(OvforgeError, match="changed while it was read"):
        write_container(io.BytesIO(), new_header("x", 5, MASTER, Set()), [b"six..."], MASTER)


def test_every_flipped_bit_of_header_and_borders_is_refused() -> None:
    """All bits of the header and of its tag; of chunks, the bytes around each border and each tag."""
    sealed = seal(os.urandom(3 * CHUNK + 100), name="unet/openvino_model.bin")
    start = parse_header(sealed, len(sealed), "").size
    borders = [start + n * (CHUNK + TAG) for n in range(4)] + [len(sealed)]
    near = {p + d for p in borders for d in range(-TAG - 4, 5) if start <= p + d < len(sealed)}
    cases = [(position, 1 << bit) for position in range(start) for bit in range(8)]
    cases += [(position, 1 << bit) for position in sorted(near) for bit in (0, 7)]
    assert len(cases) > 1500
    for position, mask in cases:
        changed = bytearray(sealed)
        changed[position] ^= mask
        with pytest.raises(OvforgeError):
            unseal(bytes(changed))


@settings(max_examples=300)
@given(st.data())
def test_any_other_byte_is_refused(data: st.DataObject) -> None:
    sealed = SEALED
    position = data.draw(st.integers(0, len(sealed) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != sealed[position]))
    refused(sealed[:position] + bytes([value]) + sealed[position + 1 :])


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_anything_else_is_no_container(data: bytes) -> None:
    refused(data)
    refused(MAGIC + data)
    refused(SEALED[:200] + data)


SEALED = seal(os.urandom(5 * CHUNK + 9))
START = parse_header(SEALED, len(SEALED), "").size


def parts(sealed: bytes) -> list[bytes]:
    return [sealed[p : p + CHUNK + TAG] for p in range(START, len(sealed), CHUNK + TAG)]


def test_every_truncation_is_refused() -> None:
    for size in [*range(START + 40), *range(START + 40, len(SEALED), 97), len(SEALED) - 1]:
        assert "container" in refused(SEALED[:size])
    assert "bytes instead of" in refused(SEALED + b"x")


def with_length(sealed: bytes, length: int) -> bytes:
    return sealed[:16] + struct.pack("<Q", length) + sealed[24:]


def test_lengths_that_lie_are_refused_before_anything_is_allocated() -> None:
    for length in [0, 1, CHUNK, 5 * CHUNK + 8, 5 * CHUNK + 10, 2**32, 2**32 + 5, 2**40, 2**63, 2**64 - 1]:
        assert "container" in refused(with_length(SEALED, length))
    # A chunk less, and a length that fits the file: only the header's tag tells.
    shorter = SEALED[: START + 3 * (CHUNK + TAG)]
    assert "header was changed" in refused(with_length(shorter, 3 * CHUNK))


def test_files_over_4_gib_by_header_alone(tmp_path: Path) -> None:
    """A file of 5 GiB of nothing: it is refused at its first chunk, in no time and no memory."""
    size = 5 * 2**30
    header = new_header("huge.bin", size, MASTER, Set())
    path = tmp_path / "huge.ovenc"
    with path.open("wb") as file:
        file.write(header.raw + header.tag)
        file.truncate(header.total)
    start = time.perf_counter()
    container = Container(lambda: path.open("rb", buffering=0), path.stat().st_size, "huge", with_key(KEY))
    assert container.size == size
    part = bytearray(10)
    with pytest.raises(OvforgeError, match="chunk 0 of 5120 was changed"):
        container.read_into(memoryview(part))
    with pytest.raises(OvforgeError, match="chunk 0 of 5120 was changed"):
        next(container.pieces())
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [c[1], c[0], *c[2:]],
        lambda c: [c[0], c[0], *c[2:]],
        lambda c: [*c[:4], c[3], c[5]],
        lambda c: [*c[:2], c[4], c[3], c[2], c[5]],
        lambda c: [c[2], *c[1:]],
    ],
)
def test_chunks_in_another_order_are_refused(change: Callable[[list[bytes]], list[bytes]]) -> None:
    changed = SEALED[:START] + b"".join(change(parts(SEALED)))
    assert len(changed) == len(SEALED)
    assert "was changed" in refused(changed)


def test_chunks_of_another_file_are_refused() -> None:
    other = seal(os.urandom(5 * CHUNK + 9))
    for n in range(6):
        mixed = parts(SEALED)
        mixed[n] = parts(other)[n]
        assert f"chunk {n} of 6 was changed" in refused(SEALED[:START] + b"".join(mixed))
    assert "was changed" in refused(other[:START] + SEALED[START:])


def test_a_file_is_not_its_beginning() -> None:
    """Cut after whole chunks, with a header made for that by who has no key: the last chunk is marked as such."""
    header = new_header("m.bin", 3 * CHUNK, MASTER, Set(), chunk=12)  # even with the key, chunks are bound to a header
    assert "was changed" in refused(header.raw + header.tag + b"".join(parts(SEALED)[:3]))


def test_another_key_is_named(other_key: Key) -> None:
    said = refused(SEALED, other_key)
    assert MASTER.id.hex() in said and other_key.new_master().id.hex() in said
    with pytest.raises(OvforgeError, match="encrypted with a key, which a Python function is not"):
        unseal(SEALED, Key(KeyOptions(function=lambda: "x", form="passphrase")))


def test_passphrases(passphrase: Key) -> None:
    master = passphrase.new_master(Scrypt(log_n=14))
    sealed = seal(b"words", master=master)
    again = Key(KeyOptions(function=lambda: "correct horse battery staple\n", form="passphrase"))
    assert unseal(sealed, again) == b"words"
    assert "a wrong passphrase" in refused(sealed, Key(KeyOptions(function=lambda: "x", form="passphrase")))
    assert "encrypted with a passphrase" in refused(sealed, KEY)


def test_a_strangers_file_may_not_ask_for_any_cost() -> None:
    sealed = seal(b"x", master=Master(b"k" * 32, b"i" * 16, Scrypt(14), b"s" * 16))
    for log_n, r, p in [
        (0, 8, 1),
        (13, 8, 1),
        (21, 8, 1),
        (63, 8, 1),
        (14, 0, 1),
        (14, 17, 1),
        (14, 8, 0),
        (20, 16, 1),
    ]:
        changed = sealed[:10] + bytes([log_n, r, p]) + sealed[13:]
        assert "cost out of bounds" in refused(changed)


def test_other_versions_and_names_are_said() -> None:
    assert "it is of version 2" in refused(SEALED[:8] + b"\x02" + SEALED[9:])
    for name in ("/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b"):
        with pytest.raises(OvforgeError, match="not a relative path"):
            unseal(seal(b"x", name=name))
    with pytest.raises(OvforgeError, match="more than 1024"):
        new_header("x" * 1025, 0, MASTER, Set())
    assert len(seal(b"", name="x" * 1024)) == HEADER_LIMIT + TAG


def test_loads_side_by_side() -> None:
    plain = os.urandom(64 * CHUNK + 1)
    sealed = seal(plain)
    container = Container(lambda: io.BytesIO(sealed), len(sealed), "", with_key(KEY))
    results: list[bool] = []

    def load() -> None:
        buffer = bytearray(len(plain))
        container.read_into(memoryview(buffer))
        results.append(bytes(buffer) == plain)

    threads = [threading.Thread(target=load) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 16


def test_known_answer() -> None:
    """The format is what the docs say: decrypted here with nothing but the library's primitives."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    plain = os.urandom(2 * CHUNK + 3)
    sealed = seal(plain, name="a/b.bin")
    (length,) = struct.unpack_from("<Q", sealed, 16)
    (size,) = struct.unpack_from("<H", sealed, 14)
    key_id, salt = sealed[24:40], sealed[56:88]
    (name_size,) = struct.unpack_from("<H", sealed, 136)
    assert (length, sealed[138 : 138 + name_size], size) == (len(plain), b"a/b.bin", 138 + 7 + 16)
    derive = lambda info, salt: HKDF(SHA256(), 32, salt, info).derive(b"k" * 32)  # noqa: E731
    assert key_id == derive(b"ovenc key id", b"")[:16]
    raw = sealed[: size - 16]
    assert AESGCM(derive(b"ovenc 1 header", salt)).encrypt(bytes(12), b"", raw) == sealed[size - 16 : size]
    content, found = AESGCM(derive(b"ovenc 1 content", salt)), b""
    for n, begin in enumerate(range(size, len(sealed), CHUNK + 16)):
        nonce = bytes(7) + struct.pack(">IB", n, n == 2)
        found += content.decrypt(nonce, sealed[begin : begin + CHUNK + 16], raw)
    assert found == plain
