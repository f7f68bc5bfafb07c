"""`ovforge lora inspect`: what an adapter file holds, and what of it would find its place in a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ovforge.errors import ModelError
from ovforge.model import PACKAGE, ModelBundle, package_path
from ovforge.store import parse_object
from ovforge_sd_lora.adapter import Adapter, family_name, open_adapter
from ovforge_sd_lora.control_lora import widen
from ovforge_sd_lora.matching import Preflight, preflight

__all__ = ["app", "inspected"]

app = typer.Typer(
    help="Adapters: LoRA and its kin, as PEFT, LyCORIS and kohya write them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_TEXT_WIDTHS = {768: "CLIP ViT-L", 1024: "OpenCLIP ViT-H", 1280: "OpenCLIP ViT-bigG"}
_SHOWN_WORDS = 12


@app.callback()
def _group() -> None:
    """Keep `inspect` a command of its own."""


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(help="A .safetensors file, a folder of PEFT or diffusers, or package:NAME/PATH.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Look up each key in this model: a folder or package:NAME/PATH.")
    ] = None,
    chosen: Annotated[
        str | None, typer.Option("--adapter", help="Which one, of several that PEFT has named in one file.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="With --model: list what fits, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an adapter is, and with --model what of it fits.

    Example: ovforge lora inspect style.safetensors --model models/sd15
    """
    import ovforge
    from ovforge.cli import print_json

    path = package_path(file) if file.startswith(PACKAGE) else Path(file).expanduser()
    adapter = open_adapter(path, path.stem, chosen)
    found = _looked_up(adapter, ovforge.open_model(model)) if model else None
    if as_json:
        print_json(inspected(adapter, found))
    else:
        _show(inspected(adapter, found), keys)


def _looked_up(adapter: Adapter, bundle: ModelBundle) -> Preflight:
    """Return the preflight in a model as the transform would have it: with room for the condition of a Control LoRA."""
    widen(adapter, bundle)
    return preflight(adapter, bundle)


def inspected(adapter: Adapter, found: Preflight | None = None) -> dict[str, Any]:
    """Return all that is known of an adapter, JSON-able; `found` is its preflight."""
    roles: dict[str, Any] = {}
    for role in dict.fromkeys(module.role or "?" for module in adapter.modules):
        modules = [module for module in adapter.modules if (module.role or "?") == role]
        roles[role] = {
            "kinds": dict(Counter(module.label for module in modules)),
            "ranks": dict(sorted(Counter(module.rank for module in modules if module.rank).items())),
            "factors": sorted({round(module.factor, 6) for module in modules if module.rank and module.shape}),
        }
    width = adapter.width()
    told: dict[str, Any] = {
        "file": adapter.where,
        "made_for": (adapter.family.name if adapter.family else None)
        or (family_name(width) if width else _by_text(adapter)),
        "cross_attention": width,
        "base_model": _said(adapter.metadata, "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name"),
        "title": _said(adapter.metadata, "modelspec.title", "ss_output_name"),
        "trigger_words": trigger_words(adapter.metadata),
        "words": list(adapter.words),
        "adapters": list(adapter.names),
        "numbers": sum(math.prod(info.shape) for info in adapter.modules[0].file.tensors.values()),
        "roles": roles,
        "notes": list(adapter.notes),
        "unknown": [{"key": skip.item, "why": skip.reason} for skip in adapter.unknown],
    }
    if found is not None:
        told["model"] = {
            "matched": [
                {"role": m.role, "key": m.module.name, "layer": m.target.path, "kind": m.module.label,
                 "rank": m.module.rank, "compressed": m.target.compressed}
                for m in found.matches
            ],
            "unmatched": [{"key": skip.item, "why": skip.reason} for skip in found.skipped],
            "touched": {
                role: {"numbers": touched, "of": total, "share": touched / max(total, 1)}
                for role, (touched, total) in found.touched.items()
            },
        }  # fmt: skip
    return told


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the words that the training's captions name most, or that the file's author does."""
    said = _said(metadata, "modelspec.trigger_phrase", "modelspec.trigger_words", "trigger_words")
    if said:
        return [word.strip() for word in said.split(",") if word.strip()]
    count: Counter[str] = Counter()
    try:
        folders = parse_object(metadata.get("ss_tag_frequency", "{}"), "ss_tag_frequency")
        for tags in folders.values():
            for tag, number in tags.items():
                count[str(tag).strip()] += int(number)
    except (ModelError, ValueError, TypeError, AttributeError):
        return []
    return [tag for tag, _ in count.most_common(_SHOWN_WORDS)]


def _said(metadata: Mapping[str, str], *keys: str) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def _by_text(adapter: Adapter) -> str | None:
    """Return a guess from the text encoder's width, where the UNet's part tells nothing."""
    for module in adapter.modules:
        attends = module.name.endswith(("q_proj", "k_proj", "v_proj")) and len(module.shape) > 1
        if module.role == "text_encoder" and attends:
            return _TEXT_WIDTHS.get(module.shape[1])
    return None


def _show(told: Mapping[str, Any], keys: bool) -> None:
    from ovforge.cli import print_line, print_table

    facts = {
        "Made for": told["made_for"],
        "Says of its base": told["base_model"],
        "Title": told["title"],
        "Trigger words": ", ".join(told["trigger_words"]) or None,
        "Words it brings": ", ".join(told["words"]) or None,
        "Adapters in it": ", ".join(told["adapters"]) or None,
        "Numbers": f"{told['numbers']:,}",
    }
    print_line((told["file"], "bold"))
    for name, fact in facts.items():
        if fact:
            print_line(f"{name}: {fact}")
    rows = [
        [
            role,
            ", ".join(f"{count} x {kind}" for kind, count in part["kinds"].items()),
            ", ".join(f"{rank} ({count})" for rank, count in part["ranks"].items()),
            ", ".join(f"{factor:g}" for factor in part["factors"][:6]),
        ]
        for role, part in told["roles"].items()
    ]
    print_table(["Role", "Modules", "Ranks", "alpha / rank"], rows, fold=["Modules", "Ranks", "alpha / rank"])
    for note in told["notes"]:
        print_line(f"Note: {note}")
    unmatched = told["unknown"]
    if "model" in told:
        fitting = {(match["role"], match["key"]) for match in told["model"]["matched"]}
        for role, share in told["model"]["touched"].items():
            print_line(f"{role}: touches {share['share']:.1%} of {share['of']:,} weights")
        print_line(f"{len(fitting)} modules fit, {len(told['model']['unmatched'])} do not.")
        unmatched = told["model"]["unmatched"]
    if keys and "model" in told:
        rows = [
            [
                match["role"],
                match["key"],
                match["layer"],
                match["kind"],
                "" if match["rank"] is None else str(match["rank"]),
            ]
            for match in told["model"]["matched"]
        ]
        print_table(["Role", "Key", "Layer", "Kind", "Rank"], rows, fold=["Key", "Layer"])
    if unmatched:
        print_table(
            ["Does not fit", "Why"], [[skip["key"], skip["why"]] for skip in unmatched], fold=["Does not fit", "Why"]
        )
