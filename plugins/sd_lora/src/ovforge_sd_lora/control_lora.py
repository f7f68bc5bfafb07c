"""Control LoRAs of FLUX.1 (Canny and Depth as adapters): room for a condition in the transformer's first layer.

They are trained on a transformer that takes latents of a condition behind those of the picture, as FLUX.1-Canny-dev
does. What reads the condition begins with zeros, as in diffusers, and the adapter alone fills it.
Source: FluxLoraLoaderMixin of diffusers' loaders/lora_pipeline.py (_maybe_expand_transformer_param_shape_or_error_).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_sd_lora.adapter import Adapter
from ovforge_sd_lora.architectures import family_of
from ovforge_sd_lora.fuse import store
from ovforge_sd_lora.names import flat
from ovforge_sd_lora.targets import Target, find_targets

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["FIRST", "condition_inputs", "widen"]

FIRST, _ROLE, _FAMILY = "x_embedder", "transformer", "FLUX.1"
_NAMES = {flat(FIRST), flat("img_in")}


def condition_inputs(adapter: Adapter, inputs: int) -> int | None:
    """Return how many inputs an adapter's first layer has, if that is twice as many as a model's; else None."""
    given = [module.shape[1] for module in adapter.modules if flat(module.name) in _NAMES and len(module.shape) == 2]
    return 2 * inputs if 2 * inputs in given else None


def widen(adapter: Adapter, bundle: ModelBundle) -> str | None:
    """Let FLUX.1 take a condition beside the latents if the adapter was trained on one; return a note of that.

    The transformer's input `hidden_states`, (pictures, tokens, channels), then has twice the channels, and its config
    says so. Anything else stays as it is. Raises ModelError if the first layer cannot be changed.
    """
    if _ROLE not in bundle.models or not any(flat(module.name) in _NAMES for module in adapter.modules):
        return None
    model = bundle.models[_ROLE]
    targets = find_targets(_ROLE, model)
    first = targets.get(FIRST)
    if first is None or family_of(targets) != _FAMILY:
        return None
    inputs = first.shape[1]
    wide = condition_inputs(adapter, inputs)
    if wide is None:
        return None
    parameter = _taken(first)
    store(first.weight_inputs(), _padded(first), FIRST, reshaped=True)
    shape = parameter.get_partial_shape()
    shape[2] = wide
    parameter.set_partial_shape(shape)
    model.validate_nodes_and_infer_types()
    bundle.models[_ROLE] = model
    bundle.configs[_ROLE] = {"out_channels": inputs, **_known(bundle), "in_channels": wide}
    return f"{_ROLE}: takes a condition beside the latents, {wide} channels in place of {inputs}: give it as `control`"


def _padded(first: Target) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return the layer's weight with zeros for as many inputs more, as the graph holds it."""
    weight = np.pad(first.weight(), ((0, 0), (0, first.shape[1])))
    return weight.T if first.transposed else weight


def _known(bundle: ModelBundle) -> dict[str, object]:
    """Return the transformer's config without what is not said."""
    return {name: value for name, value in bundle.configs.get(_ROLE, {}).items() if value is not None}


def _taken(first: Target) -> ov.Node:
    """Return the model's input that the first layer takes as it is."""
    [node] = first.nodes
    parameter = node.input_value(0).get_node()
    if parameter.get_type_name() == "Convert":
        parameter = parameter.input_value(0).get_node()
    users = parameter.output(0).get_target_inputs() if parameter.get_type_name() == "Parameter" else ()
    if len(users) != 1 or len(parameter.get_partial_shape()) != 3:
        raise ModelError(
            f"the adapter is a Control LoRA, which needs a wider {FIRST}, and this one does not take the latents as "
            "they are",
            where=_ROLE,
            hint="Name a Control LoRA before other adapters that act at run time; if activations are quantized, take a "
            "model whose weights alone are.",
        )
    return parameter
