"""What PEFT's config says of an adapter: which kind it is, and the numbers that its tensors leave open.

Sources: huggingface/peft (config.py; tuners/lora/config.py; utils/other.py, get_pattern_key). diffusers writes the same
into the metadata of its files, with the role in front of each key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ovforge.errors import ModelError
from ovforge.model import Source
from ovforge.store import parse_object

__all__ = ["PeftConfig", "config_of", "read_configs"]

SUPPORTED = (
    "LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "GLORA", "VERA", "HRA", "HIRA", "FOURIERFT", "MISS",
    "RANDLORA", "SHIRA", "C3A", "ROAD", "DELORA", "GRALORA", "LN_TUNING",
)  # fmt: skip
"""The values of `peft_type` that can be applied."""

_RANKED = ("LORA", "ADALORA", "LOHA", "LOKR")

_VARIANTS = {
    "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "monteclora_config": "MonteCLoRA", "kasa_config": "KaSA",
    "alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow", "layer_replication": "replicated layers",
    "target_parameters": "target_parameters", "trainable_token_indices": "trained tokens",
}  # fmt: skip
"""Keys of LoRA's config that make another thing of it, and what that is called."""

_PLAIN_STARTS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal", "mica")
_COMPUTED_STARTS = ("pissa", "olora")
_SMALL = 256 * 2**10
_SECONDS = 1.0


@dataclass(frozen=True)
class PeftConfig:
    """A config as it was read; its numbers are checked when asked for, and ValueError says which are wrong."""

    values: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The value of `peft_type`; diffusers' metadata may leave it out, and means LoRA."""
        return str(self.values.get("peft_type") or "LORA")

    @property
    def start(self) -> str:
        """How training began where it changed the base for that: "pissa" or "olora"; else ""."""
        start = self.values.get("init_lora_weights")
        return start.lower() if isinstance(start, str) and start.lower() in _COMPUTED_STARTS else ""

    @property
    def replaces(self) -> bool:
        """Whether the file may hold whole weights or biases beside the adapter's tensors, under their own names."""
        return self.values.get("bias", "none") not in ("none", None) or bool(self.values.get("modules_to_save"))

    def number(self, key: str, default: float) -> float:
        """Return a finite number."""
        return _finite(key, self.values.get(key, default))

    def rank(self, module: str) -> int:
        """Return the rank of a module, by `rank_pattern` or `r`."""
        return _whole("r", self._by_pattern("rank_pattern", module, self.values.get("r", 1)))

    def factor(self, module: str, rank: int | None) -> float:
        """Return alpha / rank of a module; the config's own rank where the factors have none, as PEFT divides it."""
        if self.kind == "ADALORA":
            first = _whole("init_r", self.values.get("init_r", 12))
            alpha = self.number("lora_alpha", 8)
            return (alpha if alpha > 0 else float(rank or first)) / (first + 1e-5)
        rank = rank or self.rank(module)
        whole = self.values.get("lora_alpha", self.values.get("alpha", self.values.get("r", 1)))
        alpha = _finite("alpha", self._by_pattern("alpha_pattern", module, whole))
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def feeds_forward(self, module: str) -> bool:
        """Say whether an (IA)3 vector scales a module's inputs, as `feedforward_modules` tells."""
        named = self.values.get("feedforward_modules") or []
        if isinstance(named, str):
            return _matches(named, module)
        return any(module.endswith(str(end)) for end in named)

    def check(self, where: str) -> None:
        """Raise ModelError for a kind that cannot be applied, by its name; ValueError for numbers that are none."""
        if self.kind not in SUPPORTED:
            raise ModelError(
                f"a PEFT adapter of the kind {self.kind}, which cannot be applied",
                where=where,
                hint=f"These can: {', '.join(SUPPORTED)}.",
            )
        for key, name in _VARIANTS.items():
            if self.values.get(key):
                raise ModelError(
                    f"a LoRA with {name} ({key}), which cannot be applied",
                    where=where,
                    hint="Merge it into its base model with peft, and convert that.",
                )
        start = self.values.get("init_lora_weights")
        start = start.lower() if isinstance(start, str) else start
        if start not in _PLAIN_STARTS and start not in _COMPUTED_STARTS:
            raise ModelError(
                f"its training changed the base model (init_lora_weights = {start!r}), and what it took out of it is "
                "not in the file",
                where=where,
                hint="Let peft convert it to a plain LoRA: save_pretrained(FOLDER, "
                "path_initial_model_for_weight_conversion=INITIAL_ADAPTER).",
            )
        for pattern in ("alpha_pattern", "rank_pattern"):
            table = self.values.get(pattern) or {}
            for key, value in table.items():
                _check_pattern(_behind_dots(key))
                if not (self.kind == "ADALORA" and pattern == "rank_pattern"):
                    _finite(f"{pattern}: {key}", value)
        if self.kind in _RANKED:
            self.factor("", None)

    def _by_pattern(self, table: str, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches a module's path, as peft matches them."""
        patterns = self.values.get(table) or {}
        return next((value for key, value in patterns.items() if _matches(_behind_dots(key), module)), default)


def read_configs(source: Source, file: str, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Return role -> config, from a folder's adapter_config.json (role "") or diffusers' metadata in the file.

    Raises ModelError for a config that is none, or of a kind that cannot be applied.
    """
    beside = str(PurePosixPath(file).parent / "adapter_config.json")
    where, text = f"{source.name}: {beside}", ""
    if beside in source.files() and source.files()[beside] <= _SMALL:
        text = source.read(beside).decode("utf-8", "replace")
    elif "lora_adapter_metadata" in metadata:
        where, text = f"{source.name}: lora_adapter_metadata", metadata["lora_adapter_metadata"]
    if not text:
        return {}
    try:
        configs = _by_role(parse_object(text, where))
        for config in configs.values():
            config.check(where)
        return configs
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelError(
            f"not a PEFT config: {error}", where=where, hint="Give the .safetensors file alone."
        ) from error


def config_of(configs: Mapping[str, PeftConfig], role: str | None) -> PeftConfig | None:
    """Return the config of a role's modules."""
    return configs.get(role or "") or configs.get("")


def _by_role(value: Any) -> dict[str, PeftConfig]:
    """Split diffusers' metadata, whose keys begin with roles; a config of PEFT is that of every role."""
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if not any("." in key for key in value):
        return {"": PeftConfig(dict(value))}
    roles: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        role, _, name = key.partition(".")
        roles.setdefault(role, {})[name] = item
    return {role: PeftConfig(items) for role, items in roles.items()}


def _behind_dots(key: Any) -> str:
    """Return the pattern that PEFT makes of a key: it matches a module's path, or the end of it behind a dot."""
    return rf"(.*\.)?({key})$"


def _check_pattern(pattern: str) -> None:
    import regex

    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is not a valid pattern: {error}") from error


def _matches(pattern: str, text: str) -> bool:
    """Say whether the whole of a text matches a pattern of the file's, which may be one that takes for ever."""
    import regex

    try:
        return regex.fullmatch(pattern, text, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(f"the pattern {pattern!r} takes too long to match") from error


def _finite(key: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{key} is {value}, not a finite number")
    return number


def _whole(key: str, value: Any) -> int:
    if _finite(key, value) != int(value) or int(value) < 1:
        raise ValueError(f"{key} is {value}, not a whole number from 1")
    return int(value)
