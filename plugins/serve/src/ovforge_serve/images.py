"""OpenAI's images API: /v1/images/generations and /v1/images/edits, /v1/models.

Source: the API's reference of 2026, as the official client for Python speaks it. Beside its own fields are those that
OpenVINO Model Server takes. What a pipeline has no means for (quality, style...) is accepted, and `warnings` says so.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ovforge import ImagesResult, Pipeline, Progress, Result, Stop, adjusted
from ovforge.config import checked
from ovforge.errors import InputError, OvforgeError
from ovforge.model import open_picture, values_as_json
from ovforge_serve.encoding import as_json
from ovforge_serve.files import Sent
from ovforge_serve.log import note
from ovforge_serve.pipelines import Served
from ovforge_serve.runs import saved
from ovforge_serve.server import Server, answers, at_once_or_aside, json_or_form, pipelines_for, received
from ovforge_serve.settings import HttpError, error_body
from ovforge_serve.streaming import Pieces, streamed

__all__ = ["EditRequest", "GenerationRequest", "add_routes"]

_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})", re.ASCII)
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_WITHOUT_EFFECT = (
    "quality", "style", "background", "complexity", "moderation", "input_fidelity", "output_compression",
)  # fmt: skip
_PLAIN = (None, "auto", "standard", "opaque")
"""Fields that a pipeline has no means for, and values of them which ask for nothing."""


class GenerationRequest(BaseModel):
    """What /v1/images/generations takes."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=32_000, description="What the pictures show.")
    model: str | None = Field(None, description="The pipeline's name; by default the first that can do it.")
    n: int | None = Field(None, ge=1, le=10, description="How many pictures; by default one.")
    num_images_per_prompt: int | None = Field(None, ge=1, le=10, description="The same as n.")
    size: str | None = Field("auto", description="WIDTHxHEIGHT in pixels, or auto: the model's own.")
    width: int | None = Field(None, ge=1, description="Pixels, with height; the same as size.")
    height: int | None = Field(None, ge=1, description="Pixels, with width.")
    response_format: Literal["b64_json", "url"] | None = Field(
        "b64_json", description="The picture itself, or a URL of this server that has it for an hour."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field("png", description="Kind of the pictures' files.")
    stream: bool | None = Field(False, description="Send server-sent events.")
    partial_images: int | None = Field(0, ge=0, le=3, description="Pictures of the unfinished work in a stream.")

    num_inference_steps: int | None = Field(None, ge=1, description="Denoising steps.")
    guidance_scale: float | None = Field(None, ge=0, description="How closely to follow the prompt.")
    negative_prompt: str | None = Field(None, max_length=32_000, description="What the pictures should not show.")
    prompt_2: str | None = Field(None, max_length=32_000, description="For models with a second text encoder.")
    negative_prompt_2: str | None = Field(None, max_length=32_000, description="Likewise.")
    rng_seed: int | None = Field(None, description="Random seed of the first picture.")
    seed: int | None = Field(None, description="The same as rng_seed.")
    strength: float | None = Field(None, gt=0, le=1, description="Edits: how far to go from the picture.")
    lora_weights: dict[str, float] = Field(default_factory=dict, description="Weights of the pipeline's adapters.")

    quality: str | None = Field(None, description="Has no effect.")
    style: str | None = Field(None, description="Has no effect.")
    background: str | None = Field(None, description="Has no effect.")
    complexity: str | None = Field(None, description="Has no effect.")
    moderation: str | None = Field(None, description="Has no effect.")
    input_fidelity: str | None = Field(None, description="Has no effect.")
    output_compression: int | None = Field(None, description="Has no effect.")
    user: str | None = Field(None, description="Has no effect.")
    safety_identifier: str | None = Field(None, description="Has no effect.")

    @field_validator("lora_weights", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """In a form it is JSON."""
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError("it is not a JSON object") from error

    def warnings(self) -> list[str]:
        """Return what was asked for and has no effect."""
        return [f"{name} has no effect" for name in _WITHOUT_EFFECT if getattr(self, name) not in _PLAIN]

    def inputs(self, served: Served) -> dict[str, Any]:
        """Return the task's inputs. Raises InputError for one that the task does not have."""
        wanted = {
            "prompt": self.prompt,
            "prompt_2": self.prompt_2,
            "negative_prompt": self.negative_prompt,
            "negative_prompt_2": self.negative_prompt_2,
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "strength": self.strength,
            "seed": self.rng_seed if self.seed is None else self.seed,
            "count": self.num_images_per_prompt if self.n is None else self.n,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        for name in given:
            if name not in served.inputs.model_fields:
                raise InputError(f"the pipeline {served.name} does not take it", where=name)
        return given

    def pixels(self) -> tuple[int, int] | None:
        """Return (width, height), None for the model's own. Raises InputError."""
        if self.width is not None and self.height is not None:
            return self.width, self.height
        if (self.width, self.height) != (None, None):
            raise InputError("width and height go together", where="size")
        if self.size in (None, "auto"):
            return None
        match = _SIZE.fullmatch(self.size or "")
        if match is None:
            raise InputError(f"{self.size!r} is not WIDTHxHEIGHT", where="size")
        return int(match[1]), int(match[2])


class EditRequest(GenerationRequest):
    """What /v1/images/edits takes: a form, with the picture and perhaps a mask as files, or JSON with base64."""

    image: str = Field(description="The picture to change.", json_schema_extra={"contentEncoding": "base64"})
    mask: str | None = Field(
        None,
        description="The picture is painted anew wherever the mask is transparent, or white if it has no transparency.",
        json_schema_extra={"contentEncoding": "base64"},
    )


def add_routes(app: FastAPI, server: Server) -> None:
    """Add the routes."""
    drawing = [served for served in server.pipelines.values() if _can(served) and not _can(served, "image")]
    for asks in (GenerationRequest, EditRequest):
        server.schemas[asks.__name__] = asks.model_json_schema()
    refusals = answers(400, 404, 413, 415, 429, 504)

    @app.post(
        "/v1/images/generations", summary="Make pictures", tags=["OpenAI"], responses=refusals,
        openapi_extra=json_or_form({"$ref": "#/components/schemas/GenerationRequest"}),
    )  # fmt: skip
    async def generate(request: Request) -> Response:
        asked = checked(GenerationRequest, await received(request), where="body")
        served = pipelines_for(drawing, asked.model, "make pictures of a prompt")
        return await _Work(server, request, served, asked, "image_generation").answer(lambda sent: asked.inputs(served))

    @app.post(
        "/v1/images/edits", summary="Change a picture", tags=["OpenAI"], responses=refusals,
        openapi_extra=json_or_form({"$ref": "#/components/schemas/EditRequest"}),
    )  # fmt: skip
    async def edit(request: Request) -> Response:
        value = await received(request)
        files = {name: value.pop(name) for name in ("image", "image[]", "mask") if value.get(name) is not None}
        image, mask = files.get("image", files.get("image[]")), files.get("mask")
        if image is None or isinstance(image, list):
            raise InputError("one picture is to be changed", where="image", hint="Send exactly one image.")
        asked = checked(GenerationRequest, value, where="body")
        fields = ("image", "mask") if mask is not None else ("image",)
        able = [served for served in server.pipelines.values() if _can(served, *fields)]
        if mask is None:
            able = [served for served in able if not _can(served, "mask")]
        served = pipelines_for(able, asked.model, "paint a masked part anew" if mask else "change a picture")

        def inputs(sent: Sent) -> dict[str, Any]:
            given = asked.inputs(served)
            for name, content in zip(fields, (image, mask), strict=False):
                picture = open_picture(sent.file(content, name), name, "RGBA")
                if name == "mask":
                    picture = _mask(picture)
                if (size := asked.pixels()) is not None:
                    picture = picture.resize(size, Image.Resampling.LANCZOS)
                given[name] = _png(picture)
            return given

        return await _Work(server, request, served, asked, "image_edit").answer(inputs)

    @app.get("/v1/files/{name}", summary="A picture that an answer named", tags=["OpenAI"], responses=answers(404))
    async def file(name: str) -> Response:
        found = server.pictures.get(name)
        if found is None:
            raise HttpError(404, "there is no such file, or it is older than an hour")
        return Response(found[1], media_type=found[0])

    @app.get("/v1/models", summary="Pipelines, as OpenAI lists models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(served) for served in server.pipelines.values()]}

    @app.get("/v1/models/{name}", summary="One pipeline", tags=["OpenAI"], responses=answers(404))
    async def model(name: str) -> dict[str, Any]:
        return _model(pipelines_for(list(server.pipelines.values()), name, "be used"))


class _Work:
    """One request for pictures, from its inputs to the answer; `kind` is the first word of its events."""

    def __init__(self, server: Server, request: Request, served: Served, asked: GenerationRequest, kind: str) -> None:
        self._server, self._request, self._served = server, request, served
        self._asked, self._kind = asked, kind
        if asked.response_format == "url" and not server.settings.alone:
            raise InputError(
                "several processes answer here, and another one may be asked for the URL", where="response_format",
                hint="Ask for b64_json.",
            )  # fmt: skip
        note(pipeline=served.name)

    async def answer(self, inputs: Callable[[Sent], dict[str, Any]]) -> Response:
        """Run, and answer at once or as a stream. What is refused before anything was made is answered as an error."""
        if not self._asked.stream:
            pictures, warnings = await self._run(inputs, Stop())
            body = as_json(
                {
                    "created": int(time.time()),
                    "data": [self._picture(kind, data) for kind, data, _ in pictures],
                    "output_format": self._asked.output_format or "png",
                    "size": pictures[0][2] if pictures else "auto",
                    "warnings": warnings,
                }
            )
            return Response(body, media_type="application/json")
        return await streamed(lambda pieces: self._stream(inputs, pieces), "text/event-stream", _failed)

    async def _stream(self, inputs: Callable[[Sent], dict[str, Any]], pieces: Pieces) -> None:
        wanted, count = self._asked.partial_images or 0, 0

        def watch(moment: Progress) -> None:
            """Send what is to be seen of the work, at even distances over its steps."""
            nonlocal count
            if moment.preview is None or count >= wanted:
                return
            if moment.done >= moment.total or moment.done * (wanted + 1) < moment.total * (count + 1):
                return
            picture = moment.preview()[0]
            event = self._event("partial_image", *self._encoded(picture), partial_image_index=count)
            count += 1
            pieces.send_from_thread(_sent_event(event), stop)

        stop = Stop(watch)
        pictures, warnings = await self._run(inputs, stop)
        zero = {"image_tokens": 0, "text_tokens": 0}
        usage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0, "input_tokens_details": zero}
        for _, data, size in pictures:
            event = self._event("completed", data, size, usage=usage, warnings=warnings)
            await pieces.send(_sent_event(event))

    async def _run(
        self, inputs: Callable[[Sent], dict[str, Any]], stop: Stop
    ) -> tuple[list[tuple[str, bytes, str]], list[str]]:
        """Return (media type, content, size) of each picture, and warnings."""
        server, served, asked = self._server, self._served, self._asked
        with server.sent() as sent:

            def prepare() -> dict[str, Any]:
                given = inputs(sent)
                size = asked.pixels()
                if size is not None and "image" not in given:
                    given |= {"width": size[0], "height": size[1]}
                return sent.inputs(served, given)

            given = await at_once_or_aside(self._request, prepare)
            if server.settings.log_inputs:
                note(inputs=sent.shown(values_as_json(given, "input")))

            def answer(result: Result) -> tuple[list[tuple[str, bytes, str]], list[str]]:
                assert isinstance(result, ImagesResult)
                server.metrics.count(served.name, result.timings)
                result.provenance["inputs"] = sent.shown(values_as_json(result.provenance.get("inputs", {}), "input"))
                files = saved(result, server.scratch, _SUFFIXES[asked.output_format or "png"])
                sizes = [f"{image.width}x{image.height}" for image in result.images]
                pictures = [(kind, data, size) for (_, kind, data), size in zip(files, sizes, strict=True)]
                return pictures, sent.shown([*asked.warnings(), *result.warnings])

            def call(pipeline: Pipeline, stop: Stop) -> tuple[list[tuple[str, bytes, str]], list[str]]:
                with adjusted(pipeline, adapters=asked.lora_weights):
                    return answer(pipeline(progress=stop, **given))

            if asked.lora_weights or asked.partial_images:
                return await server.queue.run(self._request, served, call, stop)
            return await server.queue.join(self._request, served, given, answer)

    def _picture(self, kind: str, data: bytes) -> dict[str, Any]:
        if self._asked.response_format == "url":
            name = self._server.pictures.add(kind, data)
            return {"url": f"{str(self._request.base_url).rstrip('/')}/v1/files/{name}"}
        return {"b64_json": data}

    def _encoded(self, picture: Image.Image) -> tuple[bytes, str]:
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, self._asked.output_format or "png")
        return buffer.getvalue(), f"{picture.width}x{picture.height}"

    def _event(self, name: str, data: bytes, size: str, **more: Any) -> dict[str, Any]:
        return {
            "type": f"{self._kind}.{name}",
            "b64_json": data,
            "created_at": int(time.time()),
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": self._asked.output_format or "png",
            **more,
        }


def _sent_event(event: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), as_json(event))


def _failed(error: OvforgeError) -> bytes:
    return _sent_event({"type": "error", **error_body(error)})


def _can(served: Served, *fields: str) -> bool:
    """Say whether a pipeline makes pictures of a prompt and of these inputs."""
    kind = served.task.result_type()
    known = served.inputs.model_fields
    return kind is not None and issubclass(kind, ImagesResult) and all(name in known for name in ("prompt", *fields))


def _model(served: Served) -> dict[str, Any]:
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "ovforge", "task": served.task.name}


def _mask(picture: Image.Image) -> Image.Image:
    """Return a mask whose white is painted anew: what OpenAI's masks show transparent, or what others show white."""
    alpha = picture.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return picture.convert("L")
    return alpha.point(lambda value: 255 - value)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    (picture if picture.mode == "L" else picture.convert("RGB")).save(buffer, "PNG")
    return buffer.getvalue()
