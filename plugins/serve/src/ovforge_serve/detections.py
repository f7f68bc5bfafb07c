"""POST /v1/detections: boxes in pictures, in COCO's form, by any pipeline whose result has such a form."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request, Response

from ovforge_serve.log import note
from ovforge_serve.pipelines import Served
from ovforge_serve.server import Server, answers, inputs_of, json_or_form, pipelines_for, received

__all__ = ["add_routes"]


def add_routes(app: FastAPI, server: Server) -> None:
    """Add the route."""
    able = [served for served in server.pipelines.values() if _finds_boxes(served)]
    server.schemas["DetectionRequest"] = {
        "type": "object",
        "description": "The inputs of the pipeline, and `model`, its name.",
        "properties": {
            "model": {"type": "string", "description": "The pipeline's name; by default the first that finds boxes."},
            "image": {"type": "string", "contentEncoding": "base64", "description": "The picture."},
            "text": {"type": "string", "description": "What to find, if the model reads text."},
            "threshold": {"type": "number", "minimum": 0, "maximum": 1, "description": "Score that boxes need."},
        },
        "required": ["image"],
    }

    @app.post(
        "/v1/detections", summary="Find things in pictures", tags=["detection"],
        responses=answers(400, 404, 413, 415, 429, 504),
        openapi_extra=json_or_form({"$ref": "#/components/schemas/DetectionRequest"}),
    )  # fmt: skip
    async def detect(request: Request) -> Response:
        value = await received(request)
        served = pipelines_for(able, value.pop("model", None), "find boxes")
        note(pipeline=served.name)
        with server.sent() as sent:
            given = await inputs_of(request, sent, served, value)

            def answer(result: Any) -> bytes:
                server.metrics.count(served.name, result.timings)
                seconds, warnings = result.timings.whole(), result.warnings
                return json.dumps(sent.shown({**result.as_json(), "seconds": seconds, "warnings": warnings})).encode()

            body = await server.queue.join(request, served, given, answer)
        return Response(body, media_type="application/json")


def _finds_boxes(served: Served) -> bool:
    return hasattr(served.task.result_type(), "coco") and "image" in served.inputs.model_fields
