"""POST /v1/pipelines/NAME/run: any task, by its own inputs."""

from __future__ import annotations

import math
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response

from ovforge import Pipeline, Result, Stop, adjusted
from ovforge.errors import InputError
from ovforge.model import values_as_json
from ovforge.store import scratch_folder
from ovforge_serve.encoding import as_json
from ovforge_serve.files import Sent, files_as_text
from ovforge_serve.log import note
from ovforge_serve.pipelines import Served
from ovforge_serve.server import Server, answers, inputs_of, json_or_form, received

__all__ = ["add_routes", "saved", "suffix_of"]

_PARAMETERS = [
    {
        "name": name, "in": "query", "required": False, "description": description,
        "schema": {"type": "array", "items": {"type": "string"}} if several else {"type": "string"},
    }
    for name, several, description in (
        ("as", False, "Ending of the files to give, such as .jpg, or / for a folder's; by default the result's own."),
        ("adapter", True, "NAME:WEIGHT of an adapter, for this run."),
        ("control", True, "NAME:VALUE of a control, for this run."),
    )
]  # fmt: skip


def add_routes(app: FastAPI, server: Server) -> None:
    """Add a route for each pipeline, described by its task's inputs."""
    for served in server.pipelines.values():
        _add_route(app, server, served)


def _add_route(app: FastAPI, server: Server, served: Served) -> None:
    async def run(request: Request) -> Response:
        note(pipeline=served.name)
        suffix = suffix_of(served, request.query_params.get("as"))
        adapters = _numbers(request.query_params.getlist("adapter"), "adapter")
        controls = _numbers(request.query_params.getlist("control"), "control")
        with server.sent() as sent:
            given = await inputs_of(request, sent, served, await received(request))
            if server.settings.log_inputs:
                note(inputs=sent.shown(values_as_json(given, "input")))

            def answer(result: Result) -> bytes:
                server.metrics.count(served.name, result.timings)
                return as_json(_answer(result, sent, server.scratch, suffix))

            def call(pipeline: Pipeline, stop: Stop) -> bytes:
                with adjusted(pipeline, adapters=adapters, controls=controls):
                    return answer(pipeline(progress=stop, **given))

            if adapters or controls:
                body = await server.queue.run(request, served, call)
            else:
                body = await server.queue.join(request, served, given, answer)
        return Response(body, media_type="application/json")

    schema = served.inputs.model_json_schema(ref_template=f"#/components/schemas/{served.name}.{{model}}")
    for name, definition in schema.pop("$defs", {}).items():
        server.schemas[f"{served.name}.{name}"] = files_as_text(definition)
    # What the config says of inputs need not be said again.
    schema["required"] = [name for name in schema.get("required", ()) if name not in served.config.input]
    server.schemas[f"{served.name}.inputs"] = files_as_text(schema)
    app.add_api_route(
        f"/v1/pipelines/{served.name}/run", run, methods=["POST"], summary=served.task.summary, tags=["pipelines"],
        operation_id=f"run_{served.name}", responses=answers(400, 413, 415, 429, 504),
        openapi_extra={
            **json_or_form({"$ref": f"#/components/schemas/{served.name}.inputs"}), "parameters": _PARAMETERS,
        },
    )  # fmt: skip


def saved(result: Result, folder: Path, suffix: str) -> list[tuple[str, str, bytes]]:
    """Return the files that a result is written to: name, media type, content. They carry no path of this machine.

    `folder` is for results that write their files themselves.
    """
    result.provenance.pop("base", None)
    if type(result).save is Result.save:
        files = list(result.files(Path(f"result{suffix}"), quick=True))
    else:
        with scratch_folder(folder) as own:
            files = [(file.relative_to(own), file.read_bytes()) for file in result.save(own / f"result{suffix}")]
    return [
        (file.as_posix(), mimetypes.guess_type(file.name)[0] or "application/octet-stream", data)
        for file, data in files
    ]


def _answer(result: Result, sent: Sent, folder: Path, suffix: str | None) -> Any:
    result.provenance["inputs"] = sent.shown(values_as_json(result.provenance.get("inputs", {}), "input"))
    files = [] if suffix is None else saved(result, folder, suffix)
    result.provenance.pop("base", None)
    return sent.shown(
        {
            "result": result.as_json(),
            "timings": result.timings.spans,
            "seconds": result.timings.whole(),
            "warnings": result.warnings,
            "provenance": values_as_json(result.provenance, "provenance"),
        }
    ) | {"files": [{"name": name, "type": kind, "base64": data} for name, kind, data in files]}


def suffix_of(served: Served, asked: str | None) -> str | None:
    """Return the ending of the files to give, "" for a folder, None for JSON alone. Raises InputError."""
    kind = served.task.result_type() or Result
    if asked is None:
        first = next((suffix for suffix in kind.suffixes if suffix), None)
        return None if first == ".json" else first
    ending = asked.lower().removeprefix(".")
    suffix = "" if asked == "/" else f".{ending}"
    try:
        if suffix and not (ending.isascii() and ending.isalnum()):  # it becomes a part of a path
            raise InputError(f"{asked!r} is not the ending of a file", hint="Write it as: ?as=.png")
        kind.check_path(f"result{suffix}")
    except InputError as error:
        error.where = "as"
        raise
    return suffix


def _numbers(texts: Sequence[str], where: str) -> dict[str, float]:
    """Return the numbers of "NAME:NUMBER", by name."""
    found = {}
    for text in texts:
        name, _, number = text.rpartition(":")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not name or not math.isfinite(found[name]):
            raise InputError(f"{text!r} is not NAME:NUMBER", where=where)
    return found
