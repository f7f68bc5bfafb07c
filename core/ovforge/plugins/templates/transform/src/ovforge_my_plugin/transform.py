"""The transform itself."""

from __future__ import annotations

import openvino as ov
from openvino import opset13 as ops
from ovforge.contracts import Report, Skipped
from ovforge.model import ModelBundle
from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What a config may say. A misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(1.0, description="What to multiply by.")
    role: str = Field("model", description="Which model of the pipeline.")


class Transform:
    """Multiplies every output of one model."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change the bundle in place; report what was done, and what could not be done."""
        role, factor = self.options.role, self.options.factor
        if role not in bundle.models:
            return Report(skipped=[Skipped(role, f"the model has only {', '.join(bundle.models)}")])
        model: ov.Model = bundle.models[role]
        for result in model.get_results():
            source = result.input_value(0)
            names = source.get_names()
            scaled = ops.multiply(source, ops.constant(factor, source.get_element_type()))
            # The name of the output moves along, since whoever runs the model asks for it.
            source.get_tensor().set_names(set())
            scaled.output(0).get_tensor().set_names(names)
            result.input(0).replace_source_output(scaled.output(0))
        model.validate_nodes_and_infer_types()
        return Report(roles=(role,), applied=[f"{role}: outputs times {factor:g}"])
