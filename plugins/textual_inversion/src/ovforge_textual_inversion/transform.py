"""The transform: files -> words -> tokenizers, tables of embeddings and the tokenizers' files, all or nothing."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovforge import open_file
from ovforge.contracts import Report, Skipped
from ovforge.errors import ConfigError, ModelError
from ovforge.model import ModelBundle
from ovforge_textual_inversion.assets import LIST, add_to_files, read_list, remove_from_files, write_list
from ovforge_textual_inversion.files import ANY, Array, Learned, read_source
from ovforge_textual_inversion.graph import remove_marked
from ovforge_textual_inversion.options import TextualInversionOptions
from ovforge_textual_inversion.table import extend_table, width_of
from ovforge_textual_inversion.tokenizer import (
    TokenizerGraph,
    extend_detokenizer,
    normalized,
    parts_of,
    restore_tokenizer,
)

__all__ = ["TextualInversion", "unload"]

ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Role -> the part of SDXL's files that is for it."""

FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's second text encoder"}
WORD_LIMIT = 128


@dataclass
class _Lesson:
    """What one text encoder is to learn."""

    role: str
    tokenizer: TokenizerGraph
    old: dict[str, list[int]]
    new: dict[str, Array]
    width: int

    @property
    def size(self) -> int:
        """How many tokens there are before."""
        return self.tokenizer.size + sum(map(len, self.old.values()))


class TextualInversion:
    """Adds the words of textual inversion files to a pipeline's tokenizers and text encoders."""

    def __init__(self, options: TextualInversionOptions) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change the text encoders, their tokenizers and detokenizers, and their files.

        Skipped is what the model has no place for: vectors of another family's width, a word that it has already, a
        text encoder that a file says nothing of. Raises ModelError for damaged files, ConfigError for words that
        cannot be or stand twice.
        """
        learned = self._read()
        _check_words([item.word for item in learned], [item.vectors for item in learned])
        report = Report(notes=list(dict.fromkeys(item.note for item in learned if item.note)))
        lessons = [_lesson(bundle, role) for role in self._roles(bundle)]
        for lesson in lessons:
            for item in learned:
                reason = _place(item, lesson, alone=len(lessons) == 1)
                if reason:
                    report.skipped.append(Skipped(f"{item.word} in {lesson.role}", reason))
        if self.options.roles is None:
            report.skipped += _left_over(learned, [lesson.role for lesson in lessons])
        for lesson in lessons:
            if lesson.new:
                self._teach(bundle, lesson, report)
            elif lesson.old:
                lesson.tokenizer.extend(lesson.old)  # as it was
        files = {item.word: item.file for item in learned}
        for word in dict.fromkeys(word for lesson in lessons for word in lesson.new):
            places = [lesson for lesson in lessons if word in lesson.new]
            count = len(places[0].new[word])
            vectors = f"{count} vector{'s' if count > 1 else ''}"
            report.applied.append(f"{word}: {vectors} of {files[word]} in {', '.join(p.role for p in places)}")
        return report

    def _read(self) -> list[Learned]:
        """Return the words of all files, under the names that the options give them."""
        tokens = self.options.token
        learned: list[Learned] = []
        for position, path in enumerate(self.options.path):
            words = read_source(open_file(path))
            if tokens is None:
                learned += words
                continue
            names = tokens if len(self.options.path) == 1 else tokens[position : position + 1]
            if len(words) == 1:
                learned += words[0].named(names)
                continue
            if len(words) != len(names):
                raise ConfigError(
                    f"{len(words)} words are there, and `token` has {len(names)} names for them",
                    where=str(path),
                    hint="Give a name for each, or leave token out.",
                )
            learned += [word.named([name])[0] for word, name in zip(words, names, strict=True)]
        return learned

    def _roles(self, bundle: ModelBundle) -> list[str]:
        roles = self.options.roles or [role for role in ENCODERS if role in bundle.models]
        if not roles:
            raise ModelError("the model has no text encoder", hint=f"It has: {', '.join(sorted(bundle.models))}.")
        bundle.require(*roles, *map(_tokenizer_of, roles))
        return list(dict.fromkeys(roles))

    def _teach(self, bundle: ModelBundle, lesson: _Lesson, report: Report) -> None:
        role, tokenizer = lesson.role, _tokenizer_of(lesson.role)
        number = lesson.size
        new: dict[str, list[int]] = {}
        for word, rows in lesson.new.items():
            new[word] = list(range(number, number + len(rows)))
            number += len(rows)
        kind = extend_table(bundle.models[role], lesson.size, np.concatenate(list(lesson.new.values())), role)
        if kind != "f32":
            report.notes.append(f"{role} keeps its embeddings in {kind}: the vectors are rounded to it")
        lesson.tokenizer.extend({**lesson.old, **new})
        changed = [role, tokenizer]
        if (detokenizer := f"de{tokenizer}") in bundle.models:
            remove_marked(bundle.models[detokenizer])
            extend_detokenizer(bundle.models[detokenizer], {**lesson.old, **new})
            changed.append(detokenizer)
        _keep(bundle, changed)
        report.roles += tuple(changed)
        add_to_files(bundle.assets, tokenizer, new)
        write_list(bundle.assets, {**read_list(bundle.assets), tokenizer: {**lesson.old, **new}})
        if "vocab_size" in bundle.configs.get(role, {}):
            bundle.configs[role]["vocab_size"] = number


def unload(bundle: ModelBundle) -> None:
    """Take out every word that was learned: the models are byte for byte what they were, the files say the same."""
    for tokenizer, words in read_list(bundle.assets).items():
        role = tokenizer.replace("tokenizer", "text_encoder")
        remove_marked(bundle.models[role])
        restore_tokenizer(bundle.models[tokenizer])
        if f"de{tokenizer}" in bundle.models:
            remove_marked(bundle.models[f"de{tokenizer}"])
        remove_from_files(bundle.assets, tokenizer, words)
        if "vocab_size" in bundle.configs.get(role, {}):
            bundle.configs[role]["vocab_size"] -= sum(map(len, words.values()))
        changed = [name for name in (role, tokenizer, f"de{tokenizer}") if name in bundle.models]
        _keep(bundle, changed)
        for name in changed:
            bundle.identity.pop(name, None)
            bundle.location.pop(name, None)
    bundle.assets.pop(LIST, None)


def _keep(bundle: ModelBundle, roles: Sequence[str]) -> None:
    """Make roles the models that were changed: lazy ones would be read anew where they are released."""
    for role in roles:
        bundle.models[role] = bundle.models[role]


def _tokenizer_of(role: str) -> str:
    return role.replace("text_encoder", "tokenizer")


def _lesson(bundle: ModelBundle, role: str) -> _Lesson:
    """Return an empty lesson; the tokenizer's model is without the words that it had learned before."""
    tokenizer = _tokenizer_of(role)
    restore_tokenizer(bundle.models[tokenizer])
    graph = TokenizerGraph(bundle.models[tokenizer], tokenizer)
    lesson = _Lesson(role, graph, read_list(bundle.assets).get(tokenizer, {}), {}, 0)
    lesson.width = width_of(bundle.models[role], lesson.size, role)
    return lesson


def _place(item: Learned, lesson: _Lesson, *, alone: bool) -> str | None:
    """Put a word into a lesson, or return why not."""
    part = ENCODERS[lesson.role]
    rows = item.parts.get(part, item.parts.get(ANY))
    if rows is None:
        return f"{item.file} has no {part}, which is the part for it"
    width = rows.shape[1]
    if width != lesson.width:
        family = f", as for {FAMILIES[width]}" if width in FAMILIES else ""
        reason = f"{item.file} has vectors of {width} numbers{family}, and {lesson.role} takes {lesson.width}"
        return reason if alone else f"{reason}; to teach one text encoder alone, set `roles`"
    # One name more than there are vectors: diffusers reads word, word_1, word_2... as one word wherever they come from.
    names = parts_of(item.word, len(rows) + 1)
    if taken := next((name for name in names if lesson.tokenizer.knows(name)), None):
        return f"the tokenizer has a token {taken!r} already; name the word otherwise: token = ..."
    before = {normalized(name) for word, numbers in lesson.old.items() for name in parts_of(word, len(numbers) + 1)}
    if taken := next((name for name in names if normalized(name) in before), None):
        return f"{taken!r} was learned before; name the word otherwise: token = ..."
    lesson.new[item.word] = rows
    return None


def _left_over(learned: Sequence[Learned], roles: Sequence[str]) -> list[Skipped]:
    """Return the parts of files that are for text encoders that the model has not."""
    return [
        Skipped(f"{part} of {item.word}", f"the model has no {role}; to go without it, set `roles` to those it has")
        for item in learned
        for role, part in ENCODERS.items()
        if part in item.parts and role not in roles
    ]


def _check_words(words: Sequence[str], vectors: Sequence[int]) -> None:
    """Raise ConfigError for words that cannot be, or that would be taken for each other."""
    for word in words:
        odd = next((c for c in word if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace()), None)
        if odd is not None or word != word.strip() or not 0 < len(word) <= WORD_LIMIT:
            why = f"has {len(word)} characters" if word == word.strip() else "begins or ends with a blank"
            raise ConfigError(
                f"the word {word[:WORD_LIMIT]!r} {f'has the control character {odd!r} in it' if odd else why}",
                where="token",
                hint="Prompts may lose that: name it otherwise, in up to 128 characters, token = ...",
            )
    taken: dict[str, str] = {}
    for number, word in enumerate(words):
        # diffusers reads word, word_1, word_2... as the vectors of one word, whichever file they come from.
        for name in map(normalized, parts_of(word, vectors[number] + 1)):
            if name in taken:
                raise ConfigError(
                    f"{word!r} and {taken[name]!r} would be taken for each other",
                    where="path",
                    hint="Two files teach the same word, or nearly: give each its own, token = [...]",
                )
        taken |= dict.fromkeys(map(normalized, parts_of(word, vectors[number] + 1)), word)
