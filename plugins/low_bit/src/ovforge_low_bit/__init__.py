"""Weights in few bits by methods of the literature, in numpy. Listing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovforge import hookimpl
from ovforge.contracts import Need, QuantizerExtension

__all__ = ["ovforge_quantizers"]


def _learns(options: Any) -> Need:
    return "inputs" if options.learns else "nothing"


@hookimpl
def ovforge_quantizers() -> Iterator[QuantizerExtension]:
    """Yield one quantizer a method."""
    yield QuantizerExtension(
        name="auto-round",
        summary="Weights in 2 to 8 bits, rounded to the nearest or by signed gradient descent",
        config="ovforge_low_bit.options:AutoRoundOptions",
        factory="ovforge_low_bit.rounding:AutoRound",
        needs=_learns,
    )
    yield QuantizerExtension(
        name="f16-range",
        summary="Divides activations that leave float16's range, as recorded inputs show, by a power of two",
        config="ovforge_low_bit.options:HalfRangeOptions",
        factory="ovforge_low_bit.half_range:HalfRange",
        needs="inputs",
    )
    yield QuantizerExtension(
        name="lorc",
        summary="Weights in 2 to 8 bits, with a low-rank branch that makes up for the error",
        config="ovforge_low_bit.options:LorcOptions",
        factory="ovforge_low_bit.low_rank:LowRankCorrection",
        needs="nothing",
    )
    yield QuantizerExtension(
        name="power-quant",
        summary="Weights in 3 or 4 bits of a codebook of powers, its exponent searched for",
        config="ovforge_low_bit.options:PowerQuantOptions",
        factory="ovforge_low_bit.power:PowerQuant",
        needs=_learns,
    )
    yield QuantizerExtension(
        name="softmax-bias",
        summary="Makes up for the bias of softmax outputs that were quantized before",
        config="ovforge_low_bit.options:SoftmaxBiasOptions",
        factory="ovforge_low_bit.softmax:SoftmaxBias",
        needs="inputs",
    )
    yield QuantizerExtension(
        name="wanda",
        summary="Zeroes the weights that matter least for the inputs seen: a share, or 2 of 4",
        config="ovforge_low_bit.options:WandaOptions",
        factory="ovforge_low_bit.pruning:Wanda",
        needs="inputs",
    )
