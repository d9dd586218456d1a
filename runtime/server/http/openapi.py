"""Generates the OpenAPI 3.1 description of all paths from the gRPC contract: GET /openapi.json."""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from runtime.rpc import compositor_pb2 as pb
from runtime.server.http.images import FORMATS, MOST_PARTIAL_IMAGES, QUALITIES, WITHOUT_EFFECT
from runtime.server.http.messages import enum_names
from runtime.version import version


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _numbers(count: int) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "integer"}, "minItems": count, "maxItems": count}


_FILE = {"type": "string", "description": "A file: base64, also as a data URL; in a form, the file itself."}
_SENT_FILE = {"type": "string", "contentEncoding": "base64", "description": "In base64."}
"""A file in an answer."""
_FILES = {"oneOf": [_FILE, {"type": "array", "items": _FILE, "minItems": 1}]}
_REQUESTS = (pb.CompositeRequest, pb.DrawRequest, pb.EditRequest, pb.SegmentRequest)
_ANSWERS = (pb.CompositeResponse, pb.SegmentResponse, pb.GetModelInfoResponse)
_SHORTER: dict[str, list[dict[str, Any]]] = {
    "Box": [_numbers(4), {"type": "string", "pattern": r"^-?\d+(,-?\d+){3}$"}],
    "Point": [_numbers(2), {"type": "string", "pattern": r"^!?-?\d+,-?\d+$"}],
    "Clicks": [
        {"type": "array", "items": _reference("Point")},
        {"type": "string", "pattern": r"^!?-?\d+,-?\d+$"},
    ],
    "TimestepInterval": [_numbers(2), {"type": "string", "pattern": r"^\d+,\d+$"}],
    "Remove": [{"type": "boolean"}],
    "View": [_FILE],
}
"""The short forms of messages."""
_LEVEL = {"type": "integer", "minimum": 0, "maximum": 3}
_ON_THE_WAY = {
    "preview_every": {
        "type": "integer",
        "minimum": 0,
        "description": "Steps between previews; 0 for none.",
    },
    "stream": {"type": "boolean", "description": "Whether to answer with events, whatever Accept says."},
}
_ERROR_STATUSES = {
    "400": "A field cannot be used; `param` is its path.",
    "401": "A bearer token is required.",
    "403": "A web page of another origin, or by another name of this server, may not call.",
    "404": "There is no such model.",
    "409": "The server was started without the model that this needs, or a job has not ended.",
    "413": "The body is too large.",
    "429": "The queue or the memory for requests is full; Retry-After says when to try again.",
    "500": "The engine failed on this request.",
    "503": "The model is loaded, or the server is shutting down.",
    "504": "The body did not come, or the answer was not taken, in the time for it.",
}


@cache
def document(has_jobs: bool) -> dict[str, Any]:
    """Returns the document, to be sent as JSON.

    Args:
        has_jobs: whether the server has jobs.
    """
    schemas: dict[str, Any] = {"Error": _error()}
    for messages, file in ((_REQUESTS, _FILE), (_ANSWERS, _SENT_FILE)):
        for message in messages:
            _add(schemas, message.DESCRIPTOR, file)  # type: ignore[arg-type]
    for name, shorter in _SHORTER.items():
        schemas[name] = {"oneOf": [schemas[name], *shorter]}
    schemas["Placement"]["properties"]["reference"] = _FILES
    places = schemas["Where"]["properties"]
    schemas["CompositeRequest"]["properties"] |= schemas["Placement"]["properties"]
    for name in ("EditRequest", "SegmentRequest"):
        schemas[name]["properties"] |= places
    for name in ("CompositeRequest", "DrawRequest", "EditRequest"):
        schemas[name]["properties"] |= _ON_THE_WAY
    of_sampling = schemas["Sampling"]["properties"]
    schemas["ImageEdit"] = _edit(schemas["Placement"]["properties"] | of_sampling)
    schemas["ImageGeneration"] = _generation(schemas["DrawRequest"]["properties"] | of_sampling)
    schemas["Images"] = _images()
    paths = _paths()
    if has_jobs:
        schemas["Job"] = _job()
        paths |= _job_paths()
    return {
        "openapi": "3.1.0",
        "info": {"title": "AnyDoor Runtime", "version": version()},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


_IDENTITY = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


def _paths() -> dict[str, Any]:
    name = {**_IDENTITY, "name": "name"}
    chosen = {**_IDENTITY, "name": "model", "in": "query", "required": False}
    answer = _answers("CompositeResponse", ["image/*", "text/event-stream"])
    mask = _answers("SegmentResponse", ["image/png"])
    images = _answers("Images", ["text/event-stream"])
    model = {"200": _content({"type": "object"})}
    return {
        "/v1/composite": {"post": _post("Composite", _reference("CompositeRequest"), answer)},
        "/v1/draw": {"post": _post("Draw", _reference("DrawRequest"), answer)},
        "/v1/edit": {"post": _post("Edit", _reference("EditRequest"), answer)},
        "/v1/segment": {"post": _post("Segment", _reference("SegmentRequest"), mask)},
        "/v1/model": {"get": _get("GetModelInfo", _answers("GetModelInfoResponse"), [chosen])},
        "/v1/images/edits": {"post": _post("EditImage", _reference("ImageEdit"), images)},
        "/v1/images/generations": {"post": _post("GenerateImage", _reference("ImageGeneration"), images)},
        "/v1/models": {"get": _get("ListModels", {**model, **_refusals()})},
        "/v1/models/{name}": {"get": _get("GetModel", {**model, **_refusals()}, [name])},
        "/healthz": {"get": _get("IsAlive", {**model, "503": model["200"]})},
        "/readyz": {"get": _get("IsReady", {**model, "503": model["200"]})},
    }


def _job_paths() -> dict[str, Any]:
    any_ = {"anyOf": [_reference(name) for name in ("CompositeRequest", "DrawRequest", "EditRequest")]}
    job, result = _answers("Job"), _answers("CompositeResponse", ["image/*"])
    accepted = {"202" if status == "200" else status: body for status, body in job.items()}
    unknown = {"404": _refusal("There is no such thing here.")}
    states = {
        "200": {"description": "Done.", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }
    deleted = {"200": _content({"type": "object"}), **_refusals(), **unknown}
    return {
        "/v1/jobs": {"post": _post("CreateJob", any_, accepted)},
        "/v1/jobs/{id}": {
            "get": _get("GetJob", {**job, **unknown}, [_IDENTITY]),
            "delete": _get("CancelJob", deleted, [_IDENTITY]),
        },
        "/v1/jobs/{id}/events": {"get": _get("FollowJob", {**states, **_refusals(), **unknown}, [_IDENTITY])},
        "/v1/jobs/{id}/result": {"get": _get("GetResult", {**result, **unknown}, [_IDENTITY])},
    }


def _post(name: str, schema: dict[str, Any], answers: dict[str, Any]) -> dict[str, Any]:
    kinds = ("application/json", "multipart/form-data")
    body = {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}
    return {"operationId": name, "requestBody": body, "responses": answers}


def _get(name: str, answers: dict[str, Any], parameters: list[Any] | None = None) -> dict[str, Any]:
    return {"operationId": name, "parameters": parameters or [], "responses": answers}


def _answers(name: str, others: list[str] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(name)}}
    content |= {kind: {"schema": {"type": "string"}} for kind in others or ()}
    return {"200": {"description": "Done.", "content": content}, **_refusals()}


def _refusals() -> dict[str, Any]:
    return {status: _refusal(text) for status, text in _ERROR_STATUSES.items()}


def _refusal(text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": _reference("Error")}}}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "Done.", "content": {"application/json": {"schema": schema}}}


def _add(schemas: dict[str, Any], message: Descriptor, file: dict[str, Any]) -> None:
    if message.name in schemas:
        return
    properties: dict[str, Any] = {}
    schemas[message.name] = {"type": "object", "properties": properties}
    for field in message.fields:
        kind = _schema(schemas, field, file)
        properties[field.name] = {"type": "array", "items": kind} if _is_list(field) else kind


def _is_list(field: FieldDescriptor) -> bool:
    return field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry)


def _schema(schemas: dict[str, Any], field: FieldDescriptor, file: dict[str, Any]) -> dict[str, Any]:
    kinds = FieldDescriptor
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return {"type": "object", "additionalProperties": {"type": "number"}}
        _add(schemas, field.message_type, file)
        return _reference(field.message_type.name)
    if field.enum_type is not None:
        names = {"type": "string", "enum": enum_names(field.enum_type)}
        return {"oneOf": [names, _LEVEL]} if field.enum_type.name == "MaskLevel" else names
    if field.type == kinds.TYPE_BYTES:
        return dict(file)
    if field.type == kinds.TYPE_STRING:
        return {"type": "string"}
    if field.type == kinds.TYPE_BOOL:
        return {"type": "boolean"}
    return {"type": "number" if field.type in (kinds.TYPE_DOUBLE, kinds.TYPE_FLOAT) else "integer"}


def _error() -> dict[str, Any]:
    text = {"type": "string"}
    fields = {"message": text, "type": text, "code": text, "param": {"type": ["string", "null"]}}
    return {"type": "object", "properties": {"error": {"type": "object", "properties": fields}}}


def _job() -> dict[str, Any]:
    status = {"type": "string", "enum": ["queued", "running", "succeeded", "failed", "cancelled"]}
    number, text = {"type": "integer"}, {"type": "string"}
    fields = {"id": text, "status": status, "position": number, "done": number, "total": number}
    fields |= {"object": {"type": "string", "enum": ["job"]}, "created_at": number, "result": text}
    return {"type": "object", "properties": fields | _error()["properties"]}


def _common() -> dict[str, Any]:
    return {
        "prompt": {"type": "string"},
        "model": {"type": "string"},
        "n": {"type": "integer", "minimum": 1},
        "size": {"type": "string", "description": "auto, or WIDTHxHEIGHT"},
        "quality": {"type": "string", "enum": list(QUALITIES)},
        "output_format": {"type": "string", "enum": list(FORMATS)},
        "response_format": {"type": "string", "enum": ["b64_json"]},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": MOST_PARTIAL_IMAGES},
        "seed": {"type": "integer"},
        **{name: {"description": "Without effect."} for name in WITHOUT_EFFECT},
    }


def _edit(ours: dict[str, Any]) -> dict[str, Any]:
    mask = {**_FILE, "description": "A picture of the scene's size; what is transparent is the place."}
    fields = {"image": _FILES, "mask": mask, "reference_image": _FILES, **_common()}
    return {"type": "object", "required": ["image"], "properties": ours | fields}


def _generation(ours: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": ["prompt"], "properties": ours | _common()}


def _images() -> dict[str, Any]:
    image = {"type": "object", "properties": {"b64_json": {"type": "string"}, "seed": {"type": "integer"}}}
    fields = {"created": {"type": "integer"}, "data": {"type": "array", "items": image}}
    return {"type": "object", "properties": fields}
