"""Leave the last layers of CLIP's text encoder out, as `clip_skip` of diffusers' pipelines does."""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops
from pydantic import BaseModel, ConfigDict, Field

from ovforge.contracts import Report
from ovforge.errors import ModelError
from ovforge.model import ModelBundle
from ovforge_diffusion.graph.nodes import ancestors, kept_operand, port_named, positions
from ovforge_diffusion.text import LAYER, SKIPPED

__all__ = ["ClipSkip", "ClipSkipOptions"]

_ENCODERS = ("text_encoder", "text_encoder_2")
_LAST = "last_hidden_state"
_SD3 = "SD3Transformer2DModel"


class ClipSkipOptions(BaseModel):
    """What to leave out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int = Field(ge=1, le=64, description="How many layers, from the last one.")
    negative: bool = Field(
        False, description="Also for the negative prompt, as the AUTOMATIC1111 web UI does; diffusers reads it whole."
    )


class ClipSkip:
    """Gives the UNet the text states of an earlier layer.

    Models with one text encoder take its last states, normalized: the earlier ones go through the same last norm. SDXL
    and Stable Diffusion 3 take the states that go into the last layer as they are, and a pooled output, which stays. By
    default the encoder gets a further output, `skipped_states`, that the task takes for prompts.
    """

    def __init__(self, options: ClipSkipOptions) -> None:
        self._layers, self._negative = options.layers, options.negative

    def apply(self, bundle: ModelBundle) -> Report:
        """Change every text encoder. Raises ModelError if it has too few layers."""
        roles = tuple(role for role in _ENCODERS if role in bundle.models)
        if not roles:
            raise ModelError("the model has no text encoder", where="clip-skip")
        transformer = bundle.configs.get("transformer", {}).get("_class_name")
        if transformer not in (None, _SD3):
            raise ModelError(
                f"a {transformer} takes no states of CLIP's layers",
                where="clip-skip",
                hint="Take the transform from the config.",
            )
        xl = bundle.configs.get("unet", {}).get("addition_embed_type") == "text_time"
        penultimate = xl or transformer == _SD3
        report = Report(roles=roles)
        for role in roles:
            model = bundle.models[role]
            (self._skip_states if penultimate else self._skip_layers)(model, role)
            model.validate_nodes_and_infer_types()
            bundle.models[role] = model
            report.applied.append(f"{role}: the last {self._layers} layers left out")
        return report

    def _skip_layers(self, model: ov.Model, role: str) -> None:
        """Let the last norm take the states before the last layers: beside the last ones, or in their place."""
        output = port_named(model.outputs, _LAST, role).get_node().input_value(0)
        stream = _stream(model, role)
        count = (len(stream) - 1) // 2  # each layer adds twice: attention, then the two linear layers
        if self._layers > count:
            raise _too_few(role, count)
        last, kept = stream[0].output(0), stream[2 * self._layers].output(0)
        norm = [port for port in last.get_target_inputs() if port.get_node().get_type_name() != "Result"]
        if self._negative:
            self._drop_outputs(model)
            for port in norm:
                port.replace_source_output(kept)
            return
        # Both go through the norm as one batch: it looks at each token alone.
        both = ops.concat([last, kept], axis=0)
        users = output.get_target_inputs()
        for port in norm:
            port.replace_source_output(both.output(0))
        halves = ops.split(output, ops.constant(0), 2)
        names = output.get_names()
        output.get_tensor().set_names(set())
        for port in users:
            port.replace_source_output(halves.output(0))
        halves.output(0).get_tensor().set_names(names)
        halves.output(1).get_tensor().set_names({SKIPPED})
        model.add_results([ops.result(halves.output(1))])

    def _skip_states(self, model: ov.Model, role: str) -> None:
        """Let the states that go into an earlier layer stand for those that go into the last one."""
        states = _states(model)
        if len(states) < 2:
            raise ModelError(
                f"the text encoder has no outputs '{LAYER}N', and this model takes the states before a layer",
                where=role,
                hint="Convert the model as optimum-intel or ovforge does.",
            )
        if self._layers > len(states) - 2:
            raise _too_few(role, len(states) - 2)
        if self._negative:  # the task looks for the last but one
            self._drop_outputs(model)
        else:
            states[len(states) - 2 - self._layers].get_tensor().add_names({SKIPPED})

    def _drop_outputs(self, model: ov.Model) -> None:
        for _, port in sorted(_states(model).items())[-self._layers :]:
            model.remove_result(port.get_node())


def _states(model: ov.Model) -> dict[int, ov.Output]:
    """Return the outputs that hold the states before and after each layer."""
    return {
        int(name.removeprefix(LAYER)): port for port in model.outputs for name in port.names if name.startswith(LAYER)
    }


def _stream(model: ov.Model, role: str) -> list[ov.Node]:
    """Return the states after each half of each layer, from the last to the embeddings.

    The last layer's are the last residual addition before the output; each such addition keeps the one before it.
    """
    places = positions(model)
    output = port_named(model.outputs, _LAST, role).get_node()
    before = sorted(ancestors(output, places), key=lambda node: -places[node.get_name()])
    last = next((node for node in before if kept_operand(node, places)), None)
    stream: list[ov.Node] = []
    while last is not None:
        stream.append(last)
        last = kept_operand(last, places)
    if len(stream) < 3 or len(stream) % 2 == 0:
        raise ModelError(
            "no text encoder of CLIP: its layers cannot be told apart",
            where=role,
            hint="clip-skip is for models of the Stable Diffusion family.",
        )
    return stream


def _too_few(role: str, most: int) -> ModelError:
    return ModelError(f"no more than {most} layers can be left out", where=f"clip-skip: {role}")
