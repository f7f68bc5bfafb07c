"""Routes that tell how the server is, and what runs on it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from ovforge_serve.pipelines import Served
from ovforge_serve.server import Server, answers
from ovforge_serve.settings import HttpError

__all__ = ["add_routes"]


def add_routes(app: FastAPI, server: Server) -> None:
    """Add /health, /ready, /metrics and /v1/pipelines."""

    @app.get("/health", summary="Whether the process answers", tags=["server"])
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready", summary="Whether requests are taken", tags=["server"], responses={503: {"description": "no"}})
    async def ready() -> Response:
        return JSONResponse({"status": "ready" if server.ready else "stopping"}, 200 if server.ready else 503)

    @app.get("/metrics", summary="Counters, in Prometheus' format", tags=["server"], response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/pipelines", summary="What is served", tags=["pipelines"])
    async def pipelines() -> dict[str, Any]:
        return {"pipelines": [describe(served) for served in server.pipelines.values()]}

    @app.get("/v1/pipelines/{name}", summary="One pipeline", tags=["pipelines"], responses=answers(404))
    async def pipeline(name: str) -> dict[str, Any]:
        if name not in server.pipelines:
            raise HttpError(404, f"there is no pipeline {name!r}", hint=f"There are: {', '.join(server.pipelines)}.")
        return describe(server.pipelines[name])


def describe(served: Served) -> dict[str, Any]:
    """Return what a pipeline is, and, if it is loaded, what of models it runs. Paths of this machine are not in it."""
    facts: dict[str, Any] = {"name": served.name, "task": served.task.name, "summary": served.task.summary}
    pipeline = served.pipeline
    if pipeline is None:
        return {**facts, "loaded": False}
    known = pipeline.provenance()
    return {
        **facts,
        "loaded": True,
        **{key: known[key] for key in ("digests", "precision", "device", "versions")},
        "transforms": [use.use for use in served.config.transform],
        "quantizers": [use.use for use in served.config.quantize],
        "adapters": dict(pipeline.adapters),
        "controls": {
            name: {"value": value, "summary": pipeline.controls.summary(name)}
            for name, value in pipeline.controls.items()
        },
    }
