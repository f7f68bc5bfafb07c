"""A few hundred bent files of every format: none ends in a traceback or leaves anything. `make torture` runs on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ovforge.model import probing
from torture.formats import FORMATS
from torture.run import OUTCOMES, run_case

CASES = 8
FEWER = {
    # These compile a model for each case,
    **dict.fromkeys(["embedding", "lora-fused", "scheduler-config", "model-index", "model-config"], 1),
    **dict.fromkeys(["ovforge-json", "tokenizer", "mask"], 1),
    # and these start a process.
    **dict.fromkeys(["onnx", "tflite", "tensorflow", "saved-model", "paddle"], 3),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVFORGE_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "torture-cache"))
    monkeypatch.setattr(probing, "_SECONDS", 5.0)  # some of the files are read for ever


@pytest.mark.parametrize("name", FORMATS)
def test_sound_files_are_right_and_bent_ones_are_refused_in_words(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sound = replace(FORMATS[name], change=lambda data, random: data, arguments=lambda random: [])
    assert run_case(sound, 0, tmp_path_factory.mktemp("sound")).kind == "right"
    for seed in range(FEWER.get(name, CASES)):
        outcome = run_case(FORMATS[name], seed, tmp_path_factory.mktemp("bent"))
        assert outcome.kind in ("right", "refused"), f"{name} {seed}: {outcome}"


def test_the_torture_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A command that writes something else than it should, and one that leaves a file, are faults."""
    format_ = replace(FORMATS["ovenc"], change=lambda data, random: data)
    assert run_case(replace(format_, same=("out", "x.ovenc")), 0, tmp_path / "a").kind == "wrong"

    def leave(folder: Path) -> None:
        FORMATS["ovenc"].make(folder)
        (folder / ".it.ovforge-0123456789abcdef.tmp").write_text("left")

    left = replace(format_, name="left", make=leave, command=["--version"])
    assert run_case(replace(left, same=None), 0, tmp_path / "b").kind == "left over"
    assert set(OUTCOMES) >= {"right", "refused", "wrong", "left over", "traceback", "crash", "hang"}
