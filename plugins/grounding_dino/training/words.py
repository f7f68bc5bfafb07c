"""What the embedded detector is asked for: names of things, their plurals and kinds; and the vocabulary."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from scenes import Thing, read_things

SIZE = 2048
"""Tokens of the vocabulary. Those of [CLS], [SEP], the full stop and the question mark have BERT's numbers, which
GroundingDINO's code knows by heart."""

SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}

_PLURALS = {
    "sheep": "sheep", "fish": "fish", "octopus": "octopuses", "cactus": "cacti", "watermelon": "watermelons",
    "broccoli": "broccoli", "clothing": "clothing", "food": "food",
}  # fmt: skip


def plural(word: str) -> str:
    """Return the plural of a name."""
    if word in _PLURALS:
        return _PLURALS[word]
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|sh|ch|to)$", word) else "s")


def phrases(things: list[Thing]) -> dict[str, set[int]]:
    """Return each name and kind -> numbers of the classes that it means."""
    found: dict[str, set[int]] = {thing.word: {number} for number, thing in enumerate(things)}
    for number, thing in enumerate(things):
        for kind in thing.kinds:
            found.setdefault(kind, set()).add(number)
    return found


def other_words(packages: Path, things: list[Thing]) -> list[str]:
    """Return words for what is in no scene: labels of emoji that share no word with the classes."""
    known = {part for phrase in phrases(things) for form in (phrase, plural(phrase)) for part in form.split()}
    known |= {part for thing in things for label in thing.labels for part in label.split()}
    entries = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    words = {entry["label"].lower() for entry in entries if entry.get("group") in {3, 4, 5, 6, 7}}
    words |= {tag for entry in entries if entry.get("group") in {0, 1, 3, 4, 5, 6, 7} for tag in entry.get("tags", [])}
    plain = (word for word in words if re.fullmatch(r"[a-z]+( [a-z]+)?", word) and len(word) > 2)
    return sorted(word for word in plain if not known & set(word.split()))


def write_vocabulary(packages: Path, folder: Path) -> None:
    """Write vocab.txt: word pieces learned from the labels and tags of all emoji, the classes' own words whole."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    things = read_things()
    entries = json.loads((packages / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    counts = Counter(
        word for entry in entries for text in (entry["label"], *entry.get("tags", [])) for word in text.lower().split()
    )
    ours = {form for phrase in phrases(things) for form in (phrase, plural(phrase))}
    counts.update({part: 1000 for form in sorted(ours) for part in form.split()})
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    taken = list(SPECIAL.values())
    trainer = trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=taken, min_frequency=1, show_progress=False)
    learner.train_from_iterator((word for word, count in counts.items() for _ in range(count)), trainer)
    pieces = sorted(set(learner.get_vocab()) - set(taken))  # the learner numbers them otherwise each time
    rows = [SPECIAL.get(number) or (pieces.pop(0) if pieces else f"[unused{number}]") for number in range(SIZE)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")


def copy_vocabulary(model: Path, folder: Path) -> None:
    """Write vocab.txt with the words of a model that was trained before."""
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    Tokenizer.from_file(str(model / "tokenizer.json")).model.save(str(folder))


class Asker:
    """Draws texts for scenes, as token ids with which classes each phrase means."""

    def __init__(self, folder: Path, packages: Path) -> None:
        import transformers

        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
        self.things = read_things()
        self.meant = phrases(self.things)
        forms = [(phrase, form) for phrase in self.meant for form in (phrase, plural(phrase))]
        others = other_words(packages, self.things)
        words = [form for _, form in forms] + others
        ids = dict(zip(words, tokenizer(words, add_special_tokens=False)["input_ids"], strict=True))
        self.forms = {phrase: [ids[phrase], ids[plural(phrase)]] for phrase in self.meant}
        self.others = [ids[word] for word in others]
        self.names = [thing.word for thing in self.things]
        self.kinds = [phrase for phrase in self.meant if phrase not in self.names]

    def draw(self, rng: np.random.Generator, present: set[int]) -> list[tuple[list[int], set[int]]]:
        """Return phrases: most of what is there, some of what is not, in any order."""
        total = int(np.exp(rng.uniform(np.log(2), np.log(64))))
        asked = [self.names[n] for n in present if rng.random() < 0.9]
        chosen = set(asked[: max(1, total)])
        if rng.random() < 0.3:
            chosen |= set(rng.choice(self.kinds, min(3, total), replace=False).tolist())
        missing = max(0, total - len(chosen))
        chosen |= set(rng.choice(self.names, missing, replace=False).tolist())
        found = [(self.forms[phrase][int(rng.random() < 0.25)], self.meant[phrase]) for phrase in chosen]
        found += [(self.others[rng.integers(len(self.others))], set()) for _ in range(int(rng.integers(0, 4)))]
        return [found[n] for n in rng.permutation(len(found))]


def main() -> None:
    """Write the vocabulary."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder")
    parser.add_argument("--work", type=Path, default=Path("work"))
    arguments = parser.parse_args()
    write_vocabulary(arguments.packages, arguments.work)
    asker = Asker(arguments.work, arguments.packages)
    pieces = {phrase: len(forms[0]) for phrase, forms in asker.forms.items() if len(forms[0]) > len(phrase.split())}
    print(
        f"{len(asker.names)} names, kinds {asker.kinds}, {len(asker.others)} other words; in several pieces: {pieces}"
    )


if __name__ == "__main__":
    main()
