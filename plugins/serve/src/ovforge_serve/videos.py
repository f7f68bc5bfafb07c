"""POST /v1/videos: what is found in a video, line by line as it is read, or the video with it drawn.

By any task whose input `video` is a file and whose result gives frames when it is iterated, each with `as_json`.
"""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from ovforge import Pipeline, Stop
from ovforge.errors import OvforgeError
from ovforge.model import values_as_json
from ovforge.store import scratch_folder
from ovforge_serve.encoding import as_json
from ovforge_serve.files import Sent
from ovforge_serve.log import note
from ovforge_serve.pipelines import Served
from ovforge_serve.runs import suffix_of
from ovforge_serve.server import Server, answers, inputs_of, json_or_form, pipelines_for, received
from ovforge_serve.settings import error_body
from ovforge_serve.streaming import Pieces, streamed

__all__ = ["add_routes"]

_LINES, _BLOCK = "application/x-ndjson", 2**20


def add_routes(app: FastAPI, server: Server) -> None:
    """Add the route."""
    able = [served for served in server.pipelines.values() if _reads_video(served)]
    server.schemas["VideoRequest"] = {
        "type": "object",
        "description": "The inputs of the pipeline, and `model`, its name.",
        "properties": {
            "model": {"type": "string", "description": "The pipeline's name; by default the first that reads videos."},
            "video": {"type": "string", "contentEncoding": "base64", "description": "The video."},
            "text": {"type": "string", "description": "What to find, if the model reads text."},
            "threshold": {"type": "number", "minimum": 0, "maximum": 1, "description": "Score that boxes need."},
        },
        "required": ["video"],
    }
    ending = {
        "name": "as", "in": "query", "required": False, "schema": {"type": "string"},
        "description": "Ending of a file to give when it is whole, instead of lines: .mp4, with what was found drawn.",
    }  # fmt: skip

    @app.post(
        "/v1/videos", summary="Find things in a video", tags=["detection"],
        responses=answers(400, 404, 413, 415, 429, 504),
        openapi_extra={**json_or_form({"$ref": "#/components/schemas/VideoRequest"}), "parameters": [ending]},
    )  # fmt: skip
    async def find(request: Request) -> Response:
        value = await received(request)
        served = pipelines_for(able, value.pop("model", None), "read videos")
        note(pipeline=served.name)
        asked = request.query_params.get("as")
        work = _Work(server, request, served)
        if asked is None:
            return await streamed(lambda pieces: work.send_lines(value, pieces), _LINES, _error_line)
        suffix = suffix_of(served, asked) or ""
        file = await work.written(value, suffix)
        kind = mimetypes.guess_type(f"x{suffix}")[0] or "application/octet-stream"
        return StreamingResponse(_blocks(file), media_type=kind)


class _Work:
    """One request, from its inputs to the frames."""

    def __init__(self, server: Server, request: Request, served: Served) -> None:
        self._server, self._request, self._served = server, request, served

    async def send_lines(self, value: dict[str, Any], pieces: Pieces) -> None:
        """Send a line for each frame, and one with what is known at the end."""
        with self._server.sent() as sent:
            given = await self._inputs(sent, value)

            def call(pipeline: Pipeline, stop: Stop) -> None:
                result: Any = pipeline(progress=stop, **given)
                for frame in result:
                    pieces.send_from_thread(_line(sent, frame.as_json()), stop)
                end = {"result": result.as_json(), "warnings": result.warnings, "seconds": result.timings.whole()}
                self._server.metrics.count(self._served.name, result.timings)
                pieces.send_from_thread(_line(sent, {"end": end}), stop)

            await self._server.queue.run(self._request, self._served, call)

    async def written(self, value: dict[str, Any], suffix: str) -> BinaryIO:
        """Return the file of the whole result, which has no name any more."""
        with self._server.sent() as sent:
            given = await self._inputs(sent, value)

            def call(pipeline: Pipeline, stop: Stop) -> BinaryIO:
                result = pipeline(progress=stop, **given)
                with scratch_folder(self._server.scratch) as folder:
                    (file,) = result.save(folder / f"result{suffix}")
                    self._server.metrics.count(self._served.name, result.timings)
                    return file.open("rb")

            return await self._server.queue.run(self._request, self._served, call)

    async def _inputs(self, sent: Sent, value: dict[str, Any]) -> dict[str, Any]:
        given = await inputs_of(self._request, sent, self._served, value)
        if self._server.settings.log_inputs:
            note(inputs=sent.shown(values_as_json(given, "input")))
        return given


def _line(sent: Sent, value: Any) -> bytes:
    return as_json(sent.shown(value)) + b"\n"


def _error_line(error: OvforgeError) -> bytes:
    return as_json(error_body(error)) + b"\n"


async def _blocks(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while block := file.read(_BLOCK):
            yield block


def _reads_video(served: Served) -> bool:
    return hasattr(served.task.result_type(), "__iter__") and "video" in served.inputs.model_fields
