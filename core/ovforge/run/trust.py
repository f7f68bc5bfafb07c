"""The rule for configs and pictures of somebody else: what they use outside their folder is shown before it is used.

Commands ask (`ovforge.cli.check_trust`). In Python, whoever names a config file trusts it; a picture is trusted only
with `trust=True`, because nobody reads what is written in a picture before it is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovforge.config.pipeline import PipelineConfig
from ovforge.config.trust import foreign_effects, is_own
from ovforge.errors import ConfigError, require_type
from ovforge.model.results import PICTURE_SUFFIXES
from ovforge.run.resolution import load_table, read_pipeline

__all__ = ["effects_of", "read_trusted", "untrusted"]


def effects_of(config: Path, overrides: Sequence[str] = ()) -> list[str]:
    """Return, in words, what a config or picture that is not one's own would use outside its folder.

    What `overrides` set is the caller's, and is left out.
    """
    if is_own(config):
        return []
    checked, base = read_pipeline(config)
    effects = foreign_effects(config, _written(checked), base)
    if overrides and effects:
        changed, _ = read_pipeline(config, overrides)
        still = foreign_effects(config, _written(changed), base)
        effects = [effect for effect in effects if effect in still]
    return effects


def untrusted(config: Path, effects: Sequence[str], hint: str) -> ConfigError:
    """Return the error for a config that is not trusted with these effects."""
    listed = "".join(f"\n  it {' '.join(effect.splitlines())}" for effect in effects)
    return ConfigError(
        f"it is not a config of your own, and uses files outside its folder:{listed}", where=str(config), hint=hint
    )


def read_trusted(
    config: str | Path | Mapping[str, Any] | PipelineConfig, overrides: Sequence[str] = (), *, trust: bool
) -> tuple[PipelineConfig, Path]:
    """Return a checked config and its base, as `read_pipeline` does, for running it.

    Raises ConfigError for a picture that uses files outside its folder, unless `trust` is true.
    """
    require_type(trust, bool, where="trust", hint="Write trust=True if the picture's config may use other files.")
    if not trust and isinstance(config, str | Path):
        path = Path(config)
        effects = effects_of(path, overrides) if path.suffix.lower() in PICTURE_SUFFIXES else []
        if effects:
            raise untrusted(path, effects, "If that is right, add trust=True.")
    return read_pipeline(config, overrides)


def _written(config: PipelineConfig) -> dict[str, Any]:
    """Return a config as it was written, with the key's place, which dumps leave out."""
    value = config.as_dict()
    return value if config.load.key is None else {**value, "load": load_table(config)}
