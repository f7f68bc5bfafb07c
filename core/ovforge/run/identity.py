"""What each stage's result depends on: the keys that it is found by in the cache.

A key holds what was read and what was done: the content of sources and files, the extension with the code of its plugin
and of all that the plugin's distribution requires, its options, and the identity of the models that go in.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any

from ovforge.config.options import input_files
from ovforge.contracts.extensions import QuantizerExtension
from ovforge.contracts.quantization import KeptLayers
from ovforge.model.runtime import openvino_version
from ovforge.model.sources import FileSource, source_digest
from ovforge.plugins.requirements import code_of, installed_requirements
from ovforge.run.resolution import Chosen, ResolvedPipeline, ResolvedSource, Step
from ovforge.store.digests import DigestMemo, digest_file, fingerprint

__all__ = [
    "caller_dependencies",
    "content_of",
    "load_dependencies",
    "loaded_identity",
    "quantizers_dependencies",
    "step_dependencies",
]

_FORM = 3
"""Of what the core itself writes beside models: reports, configs, controls. Entries of another form are not found."""


def load_dependencies(resolved: ResolvedSource) -> dict[str, Any]:
    """Return what a conversion depends on."""
    assert resolved.loader is not None
    return {**_done_by(resolved.loader, "load"), "form": _FORM, "input": source_digest(resolved.source)}


def loaded_identity(identity: Mapping[str, str], resolved: ResolvedSource, read: Set[Path]) -> dict[str, str]:
    """Return the identity of roles that a loader knows the content of, if it stores no conversion.

    What it says may be too little, so that what it read and did counts as well.
    """
    memo = resolved.loader.session.memo if resolved.loader else None
    done = {**load_dependencies(resolved), "read": [content_of(path, memo) for path in sorted(read)]}
    return {role: fingerprint({**done, "role": role, "identity": value}) for role, value in identity.items()}


def step_dependencies(
    step: Step, identity: str, pipeline: ResolvedPipeline, keep: KeptLayers | None = None
) -> dict[str, Any]:
    """Return what a step's result depends on; a quantizer's also on what calibrates it, if it asks for that."""
    dependencies = {**_done_by(step.chosen, step.kind), "form": _FORM, "input": identity}
    if pipeline.protection:
        dependencies["encrypted"] = pipeline.protection.identity
    extension = step.chosen.extension
    if isinstance(extension, QuantizerExtension):
        need = extension.needed(step.chosen.options)
        if need != "nothing" and pipeline.driver is not None:
            digest = partial(digest_file, memo=pipeline.session.memo)
            dependencies["calibration"] = {**_callers(pipeline), **pipeline.driver.content(need, digest)}
            if need == "score":
                dependencies["after"] = [_done_by(later.chosen, later.kind) for later in pipeline.after]
    if keep:
        named = {role: sorted(names) for role, names in sorted(keep.items())}
        # Keys are plain: the layers of encrypted models are not named in them.
        dependencies["keep"] = fingerprint(named) if pipeline.protection else named
    return dependencies


def caller_dependencies(pipeline: ResolvedPipeline, identity: str) -> dict[str, Any]:
    """Return what the inferences of a pipeline's models depend on, besides the inputs of its task."""
    sealed = {"encrypted": pipeline.protection.identity} if pipeline.protection else {}
    return {"form": _FORM, "input": identity, **_callers(pipeline), **sealed, "openvino": openvino_version()}


def quantizers_dependencies(pipeline: ResolvedPipeline) -> dict[str, Any]:
    """Return what the quantizers and the steps after them do."""
    return {
        "quantize": [step_dependencies(step, "", pipeline) for step in pipeline.quantizers],
        "after": [_done_by(step.chosen, step.kind) for step in pipeline.after],
    }


def _callers(pipeline: ResolvedPipeline) -> dict[str, Any]:
    """Return who calls models, and with what: task, scheduler, device, and the driver that chooses inputs."""
    driver = pipeline.driven_by
    return {
        "driver": f"{driver.plugin} {code_of(driver)}" if driver else None,
        "task": _done_by(pipeline.task, "task") if pipeline.task else None,
        "scheduler": _done_by(pipeline.scheduler, "scheduler") if pipeline.scheduler else None,
        "device": _done_by(pipeline.device, "device"),
    }


def _done_by(chosen: Chosen, stage: str) -> dict[str, Any]:
    """Return who does a stage, with the versions of what does the work, and how; files count by their content."""
    files = {str(path): content_of(path, chosen.session.memo) for path in input_files(chosen.options)}
    worker = chosen.offer.worker or chosen.offer  # a recipe is its quantizer with options, by whatever name
    return {
        "stage": stage,
        "use": worker.extension.name,
        "plugin": worker.plugin,
        "version": code_of(worker),
        "requires": installed_requirements(worker.distribution),
        "options": _by_content(chosen.options.model_dump(mode="json"), files) if chosen.options else {},
        "openvino": openvino_version(),
    }


def _by_content(value: Any, files: Mapping[str, str]) -> Any:
    """Return options with each file's path replaced by its digest: a file counts by its content, not its place."""
    if isinstance(value, dict):
        return {key: _by_content(part, files) for key, part in value.items()}
    if isinstance(value, list):
        return [_by_content(part, files) for part in value]
    return files.get(value, value) if isinstance(value, str) else value


def content_of(path: Path, memo: DigestMemo | None) -> str:
    """Return the digest of a file, or of all files of a folder."""
    return source_digest(FileSource(path, memo=memo)) if path.is_dir() else digest_file(path, memo)
