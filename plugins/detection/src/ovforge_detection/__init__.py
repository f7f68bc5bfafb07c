"""Object detection: RT-DETR, D-FINE, and ready models with a description. Listing it imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from ovforge import hookimpl
from ovforge.contracts import CommandExtension, LoaderExtension, TaskExtension

__all__ = ["ovforge_commands", "ovforge_loaders", "ovforge_tasks"]


@hookimpl
def ovforge_tasks() -> Iterator[TaskExtension]:
    """Yield the one task of all detectors."""
    yield TaskExtension(
        name="detect",
        summary="Find things in pictures, by text or by the model's own classes",
        config="ovforge_detection.task:DetectOptions",
        inputs="ovforge_detection.results:DetectInputs",
        result="ovforge_detection.results:DetectionsResult",
        factory="ovforge_detection.task:Detect",
        roles=("detector",),
        optional_roles=("text_encoder", "tokenizer"),
        advice='A ready model needs a description of its outputs: load.use = "model-proc" with load.proc = "FILE.json" '
        "in DL Streamer's model-proc format; `ovforge detect --model-proc FILE` says both.",
    )


@hookimpl
def ovforge_loaders() -> Iterator[LoaderExtension]:
    """Yield the converting loader, and that of ready models."""
    yield LoaderExtension(
        name="detr",
        summary="Convert RT-DETR, RT-DETRv2 or D-FINE: a transformers folder",
        config="ovforge_detection.detr:DetrOptions",
        factory="ovforge_detection.detr:DetrLoader",
        converts=True,
    )
    yield LoaderExtension(
        name="model-proc",
        summary="A ready model (IR, ONNX, ...) of SSD's or YOLO's kind, with Intel's model-proc description",
        config="ovforge_detection.model_proc:ModelProcOptions",
        factory="ovforge_detection.model_proc:ModelProcLoader",
    )


@hookimpl
def ovforge_commands() -> Iterator[CommandExtension]:
    """Yield the pipeline in one command."""
    yield CommandExtension(
        name="detect",
        summary="Find things in pictures and folders, by text or by classes",
        factory="ovforge_detection.command:detect",
    )
