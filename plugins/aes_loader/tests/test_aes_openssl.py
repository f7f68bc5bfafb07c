"""What the openssl command writes is read here, and what is written here the openssl command reads."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from ovforge import testing
from ovforge.errors import ConfigError, ModelError, OvforgeError
from ovforge.model.bundle import ModelBundle
from ovforge.plugins.manager import Plugins
from ovforge.run.session import Session
from ovforge_aes_loader import files
from ovforge_aes_loader.keys import Key
from ovforge_aes_loader.openssl import OpensslFile
from ovforge_aes_loader.options import CIPHERS, KeyOptions

ARTICLE = "6f70656e76696e6f20656e6372797074"
"""Key and iv of the article: "openvino encrypt" in hexadecimal."""

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl command is not here")
SIZES = [0, 1, 15, 16, 17, 2**20 - 1, 2**20, 2**20 + 1, 9 * 2**20 + 5]


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", "enc", *map(str, arguments)], check=True, capture_output=True)


def opened(path: Path, key: Key) -> OpensslFile:
    return OpensslFile(lambda: path.open("rb", buffering=0), path.stat().st_size, path.name, key)


def content(file: OpensslFile) -> bytes:
    buffer = bytearray(file.size)
    file.read_into(memoryview(buffer))
    assert b"".join(bytes(piece) for piece in file.pieces()) == buffer
    return bytes(buffer)


def with_iv(cipher: str, **changes: Any) -> Key:
    size = int(cipher.split("-")[1]) // 8
    return Key(KeyOptions(**{"function": lambda: "0f" * size, "cipher": cipher, "iv": "f0" * 16, **changes}))


@needs_openssl
@pytest.mark.parametrize("cipher", CIPHERS)
def test_by_key_and_iv(cipher: str, tmp_path: Path) -> None:
    key = with_iv(cipher)
    for size in SIZES:
        plain, sealed, back = tmp_path / "x.bin", tmp_path / "x.enc", tmp_path / "back"
        plain.write_bytes(os.urandom(size))
        openssl(
            f"-{cipher}", "-in", plain, "-out", sealed, "-K", key.raw(int(cipher[4:7]) // 8).hex(), "-iv", "f0" * 16
        )
        assert content(opened(sealed, key)) == plain.read_bytes()
        files.encrypt_openssl(plain, tmp_path / "ours", key, replace=True)
        assert (tmp_path / "ours").read_bytes() == sealed.read_bytes()
        if size > 40:
            part = bytearray(37)
            opened(sealed, key).read_into(memoryview(part))
            assert part == plain.read_bytes()[:37]
    openssl("-d", f"-{cipher}", "-in", tmp_path / "ours", "-out", back, "-K", "0f" * (int(cipher[4:7]) // 8), "-iv", "f0" * 16)  # fmt: skip
    assert back.read_bytes() == plain.read_bytes()


@needs_openssl
@pytest.mark.parametrize(("cipher", "digest", "iterations"), [(None, "sha256", 10_000), ("aes-128-cbc", "sha512", 1234), ("aes-192-ctr", "sha1", 1), ("aes-256-ctr", "sha384", 77)])  # fmt: skip
def test_by_passphrase(cipher: str | None, digest: str, iterations: int, tmp_path: Path) -> None:
    key = Key(KeyOptions(function=lambda: "pass words", form="passphrase", cipher=cipher, digest=digest, iterations=iterations))  # fmt: skip
    how = [f"-{cipher or 'aes-256-cbc'}", "-pbkdf2", "-iter", iterations, "-md", digest, "-pass", "pass:pass words"]
    plain, sealed, back = tmp_path / "x.bin", tmp_path / "x.enc", tmp_path / "back"
    plain.write_bytes(os.urandom(3 * 2**20 + 11))
    openssl(*how, "-in", plain, "-out", sealed)
    assert content(opened(sealed, key)) == plain.read_bytes()
    files.encrypt_openssl(plain, tmp_path / "ours", key)
    assert (tmp_path / "ours").read_bytes()[:8] == b"Salted__"
    openssl("-d", *how, "-in", tmp_path / "ours", "-out", back)
    assert back.read_bytes() == plain.read_bytes()


def encrypted_as_in_the_article(ir: Path) -> Path:
    for suffix in (".xml", ".bin"):
        plain = ir.with_suffix(suffix)
        openssl(
            "-aes-128-cbc",
            "-in",
            plain,
            "-out",
            ir.parent / f"openvino_model_enc{suffix}",
            "-K",
            ARTICLE,
            "-iv",
            ARTICLE,
        )
        plain.unlink()
    return ir.parent / "openvino_model_enc.xml"


@needs_openssl
def test_the_article(ir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = encrypted_as_in_the_article(ir)
    monkeypatch.setenv("MODEL_KEY", ARTICLE)
    said = {"env": "MODEL_KEY", "cipher": "aes-128-cbc", "iv": ARTICLE}
    for place in (source, source.parent):
        with pytest.warns(UserWarning, match="no authentication") as warned:
            bundle = ModelBundle.open(Session(key=said).open_source(str(place), Path()))
        assert len(warned) == 1
        x = np.full((1, 4), 2, np.float32)
        model = next(iter(bundle.models.values()))
        expected = testing.run(testing.small_model(), {"x": x})["y"]
        np.testing.assert_array_equal(testing.run(model, {"x": x})["y"], expected)


@needs_openssl
@pytest.mark.parametrize("cipher", ["aes-128-cbc", "aes-128-ctr"])
@pytest.mark.filterwarnings("ignore:.*no authentication")
def test_wrong_keys_and_damage_are_named_before_the_runtime_sees_anything(
    cipher: str, ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for suffix in (".xml", ".bin"):
        openssl(
            f"-{cipher}", "-in", ir.with_suffix(suffix), "-out", tmp_path / f"e{suffix}", "-K", ARTICLE, "-iv", ARTICLE
        )
    whole = {suffix: (tmp_path / f"e{suffix}").read_bytes() for suffix in (".xml", ".bin")}

    plugins = Plugins()

    def attempt(key: str = ARTICLE, iv: str = ARTICLE) -> ov.Model:
        monkeypatch.setenv("MODEL_KEY", key)
        said = {"env": "MODEL_KEY", "cipher": cipher, "iv": iv}
        source = Session(plugins, key=said).open_source(str(tmp_path / "e.xml"), Path())
        return ModelBundle.open(source).models["model"]

    attempt()
    for n in range(80):  # whatever the padding happens to be
        with pytest.raises(ModelError, match=r"another one than it was encrypted with"):
            attempt(key=f"{n:032x}")
        if n:  # the iv covers the first block: here that is the XML's declaration
            with pytest.raises(ModelError, match=r"another one than it was encrypted with"):
                attempt(iv=f"{n:032x}")
    with pytest.raises(ConfigError, match="expected 32 hexadecimal digits"):
        attempt(key="0f" * 32)
    for suffix, data in whole.items():
        file = tmp_path / f"e{suffix}"
        for cut in range(2, 34):  # the last byte of an .xml is a line's end
            file.write_bytes(data[:-cut])
            with pytest.raises(ModelError):
                attempt()
        file.write_bytes(b"")
        with pytest.raises(OvforgeError):
            attempt()
        file.write_bytes(data)
    attempt()


def test_a_graph_that_is_no_xml_inside_is_refused(ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = with_iv("aes-256-cbc")
    files.encrypt_openssl(ir, tmp_path / "enc", key)
    sealed = tmp_path / "enc" / "openvino_model.xml.enc"
    data = bytearray(sealed.read_bytes())
    data[len(data) // 2] ^= 1
    sealed.write_bytes(data)
    said = {"function": lambda: "0f" * 32, "cipher": "aes-256-cbc", "iv": "f0" * 16}
    with warnings.catch_warnings(action="ignore"), pytest.raises(ModelError, match="not XML when it is decrypted"):
        Session(key=said).open_source(str(tmp_path / "enc"), Path())


@needs_openssl
@pytest.mark.filterwarnings("ignore:.*no authentication")
def test_a_changed_graph_ends_in_an_error_or_a_model(ir: Path, tmp_path: Path) -> None:
    """Counter mode lets every bit be changed by itself, so that the XML stays one: the runtime must not fall over it."""
    for suffix in (".xml", ".bin"):
        openssl(
            "-aes-128-ctr",
            "-in",
            ir.with_suffix(suffix),
            "-out",
            tmp_path / f"e{suffix}",
            "-K",
            ARTICLE,
            "-iv",
            ARTICLE,
        )
    sealed, plugins = tmp_path / "e.xml", Plugins()
    data, loaded = sealed.read_bytes(), 0
    key = {"function": lambda: ARTICLE, "cipher": "aes-128-ctr", "iv": ARTICLE}
    for position in range(0, len(data), 4):
        changed = bytearray(data)
        changed[position] ^= 1 << position // 4 % 7
        sealed.write_bytes(changed)
        with contextlib.suppress(ModelError):
            loaded += (
                ModelBundle.open(Session(plugins, key=key).open_source(str(sealed), Path())).models["model"] is not None
            )
    assert 0 < loaded < len(data) // 8


def test_one_iv_for_several_files_in_counter_mode_is_refused(ir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can be read without the key"):
        files.encrypt_openssl(ir, tmp_path / "enc", with_iv("aes-256-ctr"))
    assert not (tmp_path / "enc").exists()


def test_an_iv_is_asked_for(ir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs the iv"):
        files.encrypt_openssl(ir, tmp_path / "enc", with_iv("aes-256-cbc", iv=None))


def test_salted_files_open_where_the_cipher_is_named(ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nowhere else: with a passphrase for containers, they could be put in the containers' place."""
    files.encrypt_openssl(ir, tmp_path / "enc", Key(KeyOptions(function=lambda: "words", form="passphrase")))
    monkeypatch.setenv("OVFORGE_PASSPHRASE", "words")
    said = {"env": "OVFORGE_PASSPHRASE", "form": "passphrase"}
    for key in (None, said):
        with pytest.raises(ConfigError, match="only where load.key names its cipher"):
            Session(key=key).open_source(str(tmp_path / "enc"), Path())
    with pytest.warns(UserWarning, match="no authentication"):
        source = Session(key={**said, "cipher": "aes-256-cbc"}).open_source(str(tmp_path / "enc"), Path())
    assert source.read("openvino_model.xml") == ir.read_bytes()
    monkeypatch.setenv("OVFORGE_PASSPHRASE", "other words")
    with pytest.raises(ModelError, match="another one than it was encrypted with"):
        Session(key={**said, "cipher": "aes-256-cbc"}).open_source(str(tmp_path / "enc"), Path())


def test_decrypting_gives_the_files_back(ir: Path, tmp_path: Path) -> None:
    key = with_iv("aes-192-cbc")
    files.encrypt_openssl(ir.parent, tmp_path / "enc", key)
    with warnings.catch_warnings(action="ignore"):
        written = files.decrypt(tmp_path / "enc", tmp_path / "dec", key)
    assert sorted(path.name for path in written) == ["openvino_model.bin", "openvino_model.xml"]
    for path in written:
        assert path.read_bytes() == (ir.parent / path.name).read_bytes() and path.stat().st_mode & 0o777 == 0o600


LEGACY = ["-aes-256-cbc", "-pass", "pass:pass words"]


def with_words(**options: Any) -> Key:
    return Key(KeyOptions(function=lambda: "pass words", form="passphrase", cipher="aes-256-cbc", **options))


@needs_openssl
@pytest.mark.parametrize("digest", ["sha256", "md5", "sha512"])
def test_files_made_without_pbkdf2_are_named_and_open(digest: str, tmp_path: Path) -> None:
    plain, sealed, back = tmp_path / "x.bin", tmp_path / "x.bin.enc", tmp_path / "back"
    plain.write_bytes(os.urandom(5003))
    openssl(*LEGACY, "-md", digest, "-in", plain, "-out", sealed)
    legacy = with_words(kdf="legacy", digest=digest)
    assert content(opened(sealed, legacy)) == plain.read_bytes()
    files.encrypt_openssl(plain, tmp_path / "ours", legacy)
    openssl("-d", *LEGACY, "-md", digest, "-in", tmp_path / "ours", "-out", back)
    assert back.read_bytes() == plain.read_bytes()
    with pytest.raises(ModelError, match="made without -pbkdf2") as caught:
        for _ in range(8):  # one wrong key in 256 passes for padding: then another salt is tried
            opened(sealed, with_words(digest="sha512" if digest == "sha512" else "sha256"))
            openssl(*LEGACY, "-md", digest, "-in", plain, "-out", sealed)
    assert 'kdf = "legacy"' in str(caught.value) and ("md5" in str(caught.value)) == (digest == "md5")


@needs_openssl
@pytest.mark.parametrize("how", ["-a", "-A"])
def test_base64_is_read(how: str, ir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    flags = ["-a", "-A"] if how == "-A" else ["-a"]
    for suffix in (".xml", ".bin"):
        plain = ir.with_suffix(suffix)
        openssl(
            "-aes-256-cbc",
            "-pbkdf2",
            "-pass",
            "pass:pass words",
            *flags,
            "-in",
            plain,
            "-out",
            folder / f"m{suffix}.enc",
        )
    key = {"function": lambda: "pass words", "form": "passphrase", "cipher": "aes-256-cbc"}
    with pytest.warns(UserWarning, match="no authentication"):
        source = Session(key=key).open_source(str(folder), Path())
    assert source.read("m.bin") == ir.with_suffix(".bin").read_bytes()
    assert source.read("m.xml") == ir.read_bytes()
    damaged = folder / "m.bin.enc"
    damaged.write_bytes(damaged.read_bytes() + b"!")
    with pytest.raises(ModelError, match="is not base64 to its end"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Session(key=key).open_source(str(folder), Path())


@needs_openssl
def test_base64_by_key_and_iv(tmp_path: Path) -> None:
    plain, sealed = tmp_path / "x.bin", tmp_path / "x.bin.enc"
    plain.write_bytes(os.urandom(4000))
    openssl("-aes-128-cbc", "-a", "-in", plain, "-out", sealed, "-K", "0f" * 16, "-iv", "f0" * 16)
    key = {"function": lambda: "0f" * 16, "cipher": "aes-128-cbc", "iv": "f0" * 16}
    with pytest.warns(UserWarning, match="no authentication"):
        assert Session(key=key).open_source(str(sealed), Path()).read("x.bin") == plain.read_bytes()
