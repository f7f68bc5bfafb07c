"""Tokenizers: as OpenVINO models, and as the file that the library `tokenizers` reads at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from ovforge.errors import ModelError
from ovforge.model import temporary_files
from ovforge.store import scratch_folder
from ovforge_convert import settle_names
from ovforge_diffusers.added_tokens import end_added_tokens
from ovforge_diffusers.convert import quiet
from ovforge_diffusers.requirements import need

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["TOKENIZERS", "TokenizerFolder", "fits_kind"]

PURPOSE = "converting a tokenizer"
CLIP = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
TOKENIZERS = CLIP | {f"{name}Tokenizer{fast}" for name in ("T5", "Gemma", "Qwen2") for fast in ("", "Fast")}
_WHOLE = "tokenizer.json"
_FILES: dict[bool, tuple[frozenset[str], ...]] = {
    True: (frozenset({_WHOLE}), frozenset({"vocab.json", "merges.txt"})),
    False: (frozenset({_WHOLE}), frozenset({"vocab.json", "merges.txt"}), frozenset({"spiece.model"}),
            frozenset({"tokenizer.model"})),
}  # fmt: skip
_UNLIMITED = 2**17
"""A model_max_length from here on is transformers' way to say that there is none."""


def fits_kind(kind: str, names: Collection[str]) -> bool:
    """Say whether a folder with files of these names may be a tokenizer of transformers' class `kind`."""
    return any(choice <= set(names) for choice in _FILES[kind in CLIP])


class TokenizerFolder:
    """A tokenizer's small files, by their paths, of transformers' class `kind`.

    transformers reads tokenizers from files alone, so that these few are laid out in a private folder while it reads;
    in memory if the source is `protected`. Raises ModelError if files are missing, or cannot be read.
    """

    def __init__(self, component: str, kind: str, files: Mapping[str, bytes], *, where: str, protected: bool) -> None:
        self._component, self._kind, self._files = component, kind, dict(files)
        self._where, self._protected = where, protected
        names = {PurePosixPath(path).name for path in files}
        if not fits_kind(kind, names):
            choices = _FILES[kind in CLIP]
            wanted = ", or ".join(" and ".join(sorted(choice, reverse=True)) for choice in choices)
            raise ModelError(
                f"{component} needs {wanted}",
                where=where,
                hint="The folder may be an incomplete download: fetch it again.",
            )

    def assets(self) -> dict[str, bytes]:
        """Return the files that go along: those given, and tokenizer.json as transformers itself would use it.

        CLIP's vocab.json and merges.txt say all that there is. Others are built of their files by code of their class,
        also from SentencePiece's model; what the class makes of them is written down.
        """
        if self._kind in CLIP:
            return self._files
        with self._opened() as tokenizer:
            whole = tokenizer.backend_tokenizer.to_str()
        return {**self._files, f"{self._component}/{_WHOLE}": whole.encode()}

    def models(self) -> tuple[ov.Model, ov.Model]:
        """Convert to a tokenizer and a detokenizer.

        It pads and cuts to its model_max_length, as diffusers' pipelines ask of it.
        """
        tokenizers = need("openvino_tokenizers", PURPOSE)
        with self._opened() as tokenizer:
            limited = tokenizer.model_max_length < _UNLIMITED
            models = tokenizers.convert_tokenizer(
                tokenizer, with_detokenizer=True, use_max_padding=limited, truncation=limited
            )
        if self._kind in CLIP:
            end_added_tokens(models[0])
        for role, model in zip((self._component, self._component.replace("token", "detoken")), models, strict=True):
            settle_names(role, model)
        return models[0], models[1]

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        transformers = need("transformers", PURPOSE)
        names = {PurePosixPath(path).name for path in self._files}
        if not names & {_WHOLE, "vocab.json"}:
            need("sentencepiece", PURPOSE)  # transformers itself would take the file for another kind
        place = temporary_files(PURPOSE) if self._protected else contextlib.nullcontext()
        with place, scratch_folder() as folder:
            for path, data in self._files.items():
                (folder / PurePosixPath(path).name).write_bytes(data)
            try:
                with quiet():
                    yield getattr(transformers, self._kind).from_pretrained(folder, local_files_only=True)
            except Exception as error:  # the parsers of vocabularies raise bare Exception
                raise ModelError(
                    f"the tokenizer cannot be converted: {error}",
                    where=self._where,
                    hint="Its files may be damaged: fetch them again.",
                ) from error
