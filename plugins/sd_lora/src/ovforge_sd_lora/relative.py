"""Kinds whose change is made from the layer's own weight, or by its shape: which tensors and settings each takes.

They have no thin factors: beside a weight, at run time, they act with a branch as large as the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovforge_sd_lora import orthogonal, structured
from ovforge_sd_lora.config import PeftConfig
from ovforge_sd_lora.kinds import Misshapen

__all__ = ["RELATIVE", "Relative", "relative_kind"]

Array = NDArray[np.float32]
Shape = tuple[int, ...]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Relative:
    """A kind. `needed` and `optional` are its tensors; `norms` says that it acts on norms, too;
    `whole` that it acts at full strength, or not at all.

    `check(shapes, weight_shape, settings)` raises Misshapen if they do not fit a layer;
    `delta(weight, tensors, settings)` returns what is added to the weight, in its shape; and
    `bias(weight, bias, tensors, settings)` what is added to the bias, where the kind changes that.
    `settings(config, module)` reads what the tensors leave open; if it is set, PEFT's config is needed, unless the
    tensors `instead` are all there.
    `rank(shapes)` is shown to people.
    """

    needed: tuple[str, ...]
    check: Callable[[Mapping[str, Shape], Shape, Settings], None]
    delta: Callable[[Array, Mapping[str, Array], Settings], Array]
    bias: Callable[[Array, Array, Mapping[str, Array], Settings], Array] | None = None
    optional: tuple[str, ...] = ()
    settings: Callable[[PeftConfig, str], Settings] | None = None
    instead: tuple[str, ...] = ()
    rank: Callable[[Mapping[str, Shape]], int] | None = None
    norms: bool = False
    whole: bool = False
    weight_marks: tuple[str, ...] = ()
    bias_marks: tuple[str, ...] = ()
    """Tensors that the weight, or the bias, needs one of; () if all do for it."""

    def on_weight(self, names: set[str]) -> bool:
        """Say whether a module of these tensors changes the weight."""
        return not self.weight_marks or bool(names & {*self.weight_marks})

    def on_bias(self, names: set[str]) -> bool:
        """Say whether a module of these tensors changes the bias."""
        return self.bias is not None and (not self.bias_marks or bool(names & {*self.bias_marks}))

    @property
    def makes_bias(self) -> bool:
        """Whether a layer without bias gets one: scales and rotations of nothing are nothing."""
        return bool(self.bias_marks)

    def settings_of(self, config: PeftConfig | None, module: str, names: set[str]) -> Settings:
        """Return the settings of a module of these tensors. Raises Misshapen without the config that they stand in."""
        if self.settings is None or (self.instead and names.issuperset(self.instead)):
            return {}
        if config is None:
            raise Misshapen("adapter_config.json, which says how it was trained, is not there: give the folder")
        return self.settings(config, module)


def _oft(config: PeftConfig, module: str) -> Settings:
    values = config.values
    # Without the key the file is of a PEFT that had the exact form alone.
    terms = int(config.number("num_cayley_neumann_terms", 5)) if values.get("use_cayley_neumann") else 0
    constraint = config.number("eps", 6e-5) if values.get("coft") else 0.0
    return {"share": bool(values.get("block_share")), "terms": terms, "constraint": constraint}


def _miss(config: PeftConfig, module: str) -> Settings:
    form = config.values.get("init_weights")
    return {"form": form if form in ("bat", "mini") else ""}


def _road(config: PeftConfig, module: str) -> Settings:
    return {
        "variant": str(config.values.get("variant", "road_1")),
        "group": max(1, int(config.number("group_size", 64))),
    }


def _fourier(config: PeftConfig, module: str) -> Settings:
    return {"factor": config.number("scaling", 150.0), "seed": int(config.number("random_loc_seed", 777))}


RELATIVE: dict[str, Relative] = {
    "(IA)3": Relative(
        ("ia3_l",), structured.check_ia3, structured.delta_ia3, structured.bias_ia3,
        settings=lambda config, module: {"inputs": config.feeds_forward(module)},
    ),
    "(IA)3 of LyCORIS": Relative(
        ("ia3_w", "on_input"), structured.check_ia3_lycoris, structured.delta_ia3_lycoris
    ),
    "OFT": Relative(("oft_R",), orthogonal.check_oft, orthogonal.delta_oft, settings=_oft),
    "BOFT": Relative(("boft_R", "boft_s"), orthogonal.check_boft, orthogonal.delta_boft),
    "OFT of the outputs": Relative(
        ("oft_blocks",), orthogonal.check_outer, orthogonal.delta_outer, optional=("rescale", "alpha")
    ),
    "HRA": Relative(
        ("hra_u",), orthogonal.check_hra, orthogonal.delta_hra,
        settings=lambda config, module: {"orthogonal": bool(config.values.get("apply_GS"))},
        rank=lambda shapes: shapes["hra_u"][-1],
    ),
    "RoAd": Relative(
        ("road_theta", "road_alpha"), orthogonal.check_road, orthogonal.delta_road, orthogonal.bias_road,
        settings=_road,
    ),
    "GLoRA": Relative(
        (), structured.check_glora, structured.delta_glora, structured.bias_glora,
        optional=tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")),
        bias_marks=tuple(f"glora_{path}.{part}" for path in "CDE" for part in ("Xd", "X")),
    ),
    "GLoRA of LyCORIS": Relative(
        ("a1", "a2", "b1", "b2"), structured.check_glora_lycoris, structured.delta_glora_lycoris,
        optional=("bm", "alpha"), rank=lambda shapes: shapes["a2"][0],
    ),
    "VeRA": Relative(
        ("vera_lambda_b", "vera_lambda_d"), structured.check_vera, structured.delta_vera,
        optional=("vera_A", "vera_B"), instead=("vera_A", "vera_B"),
        settings=lambda config, module: {"seed": int(config.number("projection_prng_key", 0))},
        rank=lambda shapes: shapes["vera_lambda_d"][0],
    ),
    "RandLoRA": Relative(
        ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        structured.check_randlora, structured.delta_randlora,
        settings=lambda config, module: {"factor": config.number("randlora_alpha", 640) / config.rank(module)},
        rank=lambda shapes: shapes["randlora_lambda"][0],
    ),
    "FourierFT": Relative(
        ("fourierft_spectrum",), structured.check_fourier, structured.delta_fourier, settings=_fourier
    ),
    "MiSS": Relative(
        ("miss_block",), structured.check_miss, structured.delta_miss, settings=_miss,
        rank=lambda shapes: shapes["miss_block"][0],
    ),
    "SHiRA": Relative(("shira_weight", "shira_indices"), structured.check_shira, structured.delta_shira),
    "C3A": Relative(("c3a_kernel",), structured.check_c3a, structured.delta_c3a),
    "DeLoRA": Relative(
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), structured.check_delora, structured.delta_delora,
        rank=lambda shapes: shapes["delora_A"][0],
    ),
    "HiRA": Relative(
        ("hira_A", "hira_B"), structured.check_hira, structured.delta_hira, rank=lambda shapes: shapes["hira_A"][0]
    ),
    "GraLoRA": Relative(
        ("gralora_A", "gralora_B"), structured.check_gralora, structured.delta_gralora,
        optional=("gralora_A_general", "gralora_B_general"),
        settings=lambda config, module: {"alpha": config.number("alpha", 64)},
        rank=lambda shapes: shapes["gralora_A"][-1],
    ),
    "norm scale": Relative(("scale",), structured.check_norm, structured.delta_norm, norms=True, whole=True),
    "replaced": Relative(
        (), structured.check_replaced, structured.delta_replaced, structured.bias_replaced,
        optional=("new", "new_b"), norms=True, weight_marks=("new",), bias_marks=("new_b",),
    ),
}  # fmt: skip
"""Name -> kind."""


def relative_kind(names: set[str]) -> str | None:
    """Return the kind that a module's tensors are of, None for none here. Raises Misshapen if some are missing."""
    for name, kind in RELATIVE.items():
        own = {*kind.needed, *kind.optional} - {"alpha"}
        if names & own:
            if missing := set(kind.needed) - names:
                raise Misshapen(f"it has no {', '.join(sorted(missing))}")
            if unused := names - {*own, "alpha"}:
                raise Misshapen(f"{', '.join(sorted(unused))} does not belong to {name}")
            return name
    return None
