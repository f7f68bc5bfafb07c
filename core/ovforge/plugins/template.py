"""The project that `ovforge plugins new` writes: a graph transform with its options, tests and packaging."""

from __future__ import annotations

import re
from pathlib import Path

from ovforge.errors import InputError
from ovforge.store import atomic_folder

__all__ = ["write_project"]

_FILES = {
    "pyproject.toml": """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "ovforge-{name}"
version = "0.1.0"
description = "{name} for ovforge"
requires-python = ">=3.11"
dependencies = ["ovforge>=0.1,<0.2"]

[project.optional-dependencies]
test = ["pytest"]

# This line is all that ovforge needs to find the plugin.
[project.entry-points.ovforge]
{name} = "{package}"

[tool.hatch.build.targets.wheel]
packages = ["src/{package}"]
""",
    "README.md": """\
# ovforge-{name}

A graph transform for ovforge: it multiplies a model's outputs by a factor. Change it into yours.

    [[transform]]
    use = "{name}"
    factor = 2.0
""",
    "src/{package}/__init__.py": '''\
"""{name}: what this plugin offers to ovforge. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import GraphTransformExtension
from ovforge.contracts import Phase


@hookimpl
def ovforge_graph_transforms() -> Iterator[GraphTransformExtension]:
    """Describe the transform; its module is imported when a config uses it."""
    yield GraphTransformExtension(
        name="{name}",
        summary="Multiply a model's outputs by a factor",
        config="{package}.transform:Options",
        factory="{package}.transform:Transform",
        phase=Phase.STRUCTURE,
    )
''',
    "src/{package}/transform.py": '''\
"""The transform itself."""

from __future__ import annotations

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from ovforge.model import ModelBundle
from ovforge.contracts import Report, Skipped
from pydantic import BaseModel, ConfigDict, Field


class Options(BaseModel):
    """What a config may say; a misspelt key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: float = Field(1.0, description="What to multiply by.")
    role: str = Field("model", description="Which model of the pipeline.")


class Transform:
    """Multiplies every output of one role."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def apply(self, bundle: ModelBundle) -> Report:
        """Change the bundle in place; report what was done, and what could not be."""
        role, factor = self.options.role, self.options.factor
        if role not in bundle.models:
            return Report(skipped=[Skipped(role, f"the model has only {{', '.join(bundle.models)}}")])
        model: ov.Model = bundle.models[role]
        for result in model.get_results():
            source = result.input_value(0)
            names = source.get_names()
            scaled = ops.multiply(source, ops.constant(factor, source.get_element_type()))
            source.get_tensor().set_names(set())
            scaled.output(0).get_tensor().set_names(names)
            result.input(0).replace_source_output(scaled.output(0))
        model.validate_nodes_and_infer_types()
        return Report(roles=(role,), applied=[f"{{role}}: outputs times {{np.float32(factor):g}}"])
''',
    "tests/test_{package}.py": '''\
"""The plugin keeps ovforge's contract, and does what it says."""

from __future__ import annotations

import numpy as np
import {package}
from ovforge import testing


def test_contract() -> None:
    testing.check_plugin({package})


def test_transform_keeps_the_contract() -> None:
    report = testing.check_transform({package}, "{name}", {{"factor": 2.0}}, testing.small_bundle)
    assert report.roles == ("model",)


def test_outputs_are_multiplied() -> None:
    bundle, plain = testing.small_bundle(), testing.small_bundle()
    transform = testing.extension({package}, "transform", "{name}")
    transform.create(transform.options_model()(factor=2.0)).apply(bundle)
    x = np.ones((1, 4), np.float32)
    changed, before = (testing.run(one.models["model"], {{"x": x}})["y"] for one in (bundle, plain))
    np.testing.assert_allclose(changed, 2 * before, rtol=1e-5)


def test_a_role_that_is_not_there_is_said() -> None:
    transform = testing.extension({package}, "transform", "{name}")
    report = transform.create(transform.options_model()(role="unet")).apply(testing.small_bundle())
    assert report.skipped[0].item == "unet"
''',
}


def write_project(name: str, parent: Path) -> Path:
    """Write the project `parent`/ovforge-`name`, whole or not at all; return its folder."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise InputError(
            f"{name!r} is no plugin name", where="name", hint="Use lower-case words joined by hyphens: my-plugin."
        )
    package = f"ovforge_{name.replace('-', '_')}"
    folder = parent / f"ovforge-{name}"
    try:
        with atomic_folder(folder, marked=False) as temporary:
            for path, text in _FILES.items():
                file = temporary / path.format(package=package)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text.format(name=name, package=package), encoding="utf-8")
    except FileExistsError as error:
        raise InputError("is there already", where=str(folder), hint="Choose another name or folder.") from error
    return folder
