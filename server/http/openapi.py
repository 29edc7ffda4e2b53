"""The OpenAPI document of the routes, made from the classes that check their bodies, and a page that shows it.

Every number, string, list and map in it has bounds. Where a parameter has none of its own, the body's limit is one:
what is longer cannot be sent.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.http.errors import STATUS
from server.http.limits import MAX_DEPTH, Limits
from server.http.openai.schemas import COMPLETION_SHARED, MAX_PROMPTS, SHARED, ChatBody, CompletionBody
from server.http.plan import PlanBody
from server.http.routes import CHAT, COMPLETIONS, MODELS, ROLE_OF, ROUTES
from server.http.schemas import GenerateBody
from server.http.tokens import DetokenizeBody, TokenizeBody
from server.version import VERSION

_REF = "#/components/schemas/"
_MAX_MESSAGE = 4096
_HEADERS = {"x-request-id": {"schema": {"type": "string", "maxLength": 64}}}

# How server.http.fields.parameter names its words in a schema.
_WORDS = ("allowed", "note", "shown")
_BODIES: dict[str, type[BaseModel]] = {
    "/generate": GenerateBody,
    COMPLETIONS: CompletionBody,
    CHAT: ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
    "/plan": PlanBody,
}
# Parameters of /generate that the other dialect takes over.
_SHARED: dict[str, Collection[str]] = {COMPLETIONS: COMPLETION_SHARED, CHAT: SHARED}
_SUMMARIES = {
    "/generate": "Text from a prompt; a stream with `stream`",
    COMPLETIONS: "Text from prompts, in OpenAI's shape",
    CHAT: "The next message of a chat, in OpenAI's shape",
    MODELS: "The served model, in OpenAI's shape",
    "/tokenize": "Text to token ids",
    "/detokenize": "Token ids to text",
    "/plan": "What a model would need, what fits, how fast it would be",
    "/info": "What is served",
    "/livez": "Whether the process answers",
    "/readyz": "Whether requests are accepted",
    "/health": "The same",
    "/metrics": "Prometheus text",
}
_POST_STATUSES = (400, 401, 403, 408, 413, 415, 429, 431, 500, 501, 503)
_STREAMING = ("/generate", COMPLETIONS, CHAT)


def openapi_document(limits: Limits, with_keys: bool) -> dict[str, Any]:
    """The document, as JSON values. with_keys: whether API keys are asked for."""
    models = sorted(set(_BODIES.values()), key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REF + "{model}")
    schemas: dict[str, Any] = definitions["$defs"]
    shared = dict(schemas["GenerateBody"]["properties"])
    for route, wanted in _SHARED.items():
        properties = schemas[_BODIES[route].__name__]["properties"]
        properties.update({name: shared[name] for name in wanted})
    for name, own in _own_schemas(limits).items():
        owner, _, member = name.partition(".")
        if owner in schemas and member in schemas[owner]["properties"]:
            words = schemas[owner]["properties"][member]
            schemas[owner]["properties"][member] = {key: words[key] for key in _WORDS if key in words} | own
    schemas["Error"] = _error_schema()
    for schema in schemas.values():
        _describe(schema)
        _bound(schema, limits)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Stet", "version": VERSION, "description": _about(limits)},
        "paths": {route: _operations(route, with_keys) for route in ROUTES},
        "components": {"schemas": schemas},
    }
    document["paths"][f"{MODELS}/{{model}}"] = _one_model(document["paths"][MODELS])
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def _about(limits: Limits) -> str:
    return (
        "An inference server whose tokens stand. docs/api.md is the contract; this is its outline. A body has "
        f"{limits.max_body_bytes} bytes and {MAX_DEPTH} levels of nesting at most."
    )


def _own_schemas(limits: Limits) -> dict[str, Any]:
    """What pydantic leaves open because the checks are ours: "class.parameter" -> its schema."""
    token_id = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
    ids = {"type": "array", "items": token_id, "minItems": 1}
    text = {"type": "string"}
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": text},
        "required": ["type", "text"],
        "additionalProperties": False,
    }
    bias = {
        "type": ["object", "null"],
        "propertyNames": {"type": "string", "pattern": "^(0|[1-9][0-9]{0,9})$", "maxLength": 10},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": limits.max_body_bytes // 6,
    }
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": MAX_PROMPTS}
    id_lists = {"type": "array", "items": ids, "minItems": 1, "maxItems": MAX_PROMPTS}
    owners = ("GenerateBody", "ChatBody", "CompletionBody")
    return {
        "ChatMessage.content": {"anyOf": [text, {"type": "array", "items": part, "minItems": 1}]},
        "CompletionBody.prompt": {"anyOf": [text, texts, ids, id_lists]},
        **{f"{owner}.logit_bias": bias for owner in owners},
    }


def _error_schema() -> dict[str, Any]:
    nullable = {"type": ["string", "null"], "maxLength": _MAX_MESSAGE}
    detail = {
        "type": "object",
        "properties": {"param": nullable, "message": nullable, "value": {}, "allowed": nullable},
        "required": ["param", "message", "value", "allowed"],
        "additionalProperties": False,
    }
    error = {
        "type": "object",
        "properties": {
            "message": {"type": "string", "maxLength": _MAX_MESSAGE},
            "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
            "param": nullable,
            "code": {"enum": list(STATUS)},
            "details": {"type": "array", "items": detail, "maxItems": 32},
        },
        "required": ["message", "type", "param", "code", "details"],
        "additionalProperties": False,
    }
    return {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}


def _describe(schema: Any) -> None:
    """Our words for a parameter become its description."""
    if isinstance(schema, dict):
        if "allowed" in schema and isinstance(schema["allowed"], str):
            note, shown = schema.pop("note", ""), schema.pop("shown", "null")
            schema["description"] = f"{schema.pop('allowed')}{'; ' + note if note else ''}. Default: {shown}."
        if isinstance(schema.get("title"), str):
            del schema["title"]
        if "default" in schema and not isinstance(schema["default"], dict):
            del schema["default"]
        for value in list(schema.values()):
            _describe(value)
    elif isinstance(schema, list):
        for value in schema:
            _describe(value)


def _bound(schema: Any, limits: Limits) -> None:
    """Bounds of the body for whatever has none of its own."""
    if isinstance(schema, list):
        for value in schema:
            _bound(value, limits)
    if not isinstance(schema, dict):
        return
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" in kinds and "enum" not in schema and "const" not in schema:
        schema.setdefault("maxLength", limits.max_body_bytes)
    if "array" in kinds:
        # The shortest item and its comma are two bytes.
        schema.setdefault("maxItems", limits.max_body_bytes // 2)
    if "object" in kinds and schema.get("additionalProperties") is not False:
        # The shortest member, such as "":0, with its comma.
        schema.setdefault("maxProperties", limits.max_body_bytes // 5)
    for value in schema.values():
        _bound(value, limits)


def _operations(route: str, with_keys: bool) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": f"{_REF}Error"}}}, "headers": _HEADERS}
    body = _BODIES.get(route)
    if body is not None:
        answers: dict[str, Any] = {"application/json": {"schema": {"type": "object", "maxProperties": 32}}}
        if route in _STREAMING:
            answers["text/event-stream"] = {"schema": {"type": "string", "maxLength": 2**31}}
        statuses: tuple[int, ...] = _POST_STATUSES + ((404,) if body is not GenerateBody else ())
    else:
        kind = "text/plain" if route == "/metrics" else "application/json"
        schema = (
            {"type": "string", "maxLength": 2**24} if route == "/metrics" else {"type": "object", "maxProperties": 32}
        )
        answers = {kind: {"schema": schema}}
        statuses = (431, 500, 503) if ROLE_OF[route] is None else (401, 403, 429, 431, 500, 503)
    operation: dict[str, Any] = {
        "summary": _SUMMARIES[route],
        "operationId": route.strip("/").replace("/", "_"),
        "responses": {
            "200": {"description": "done", "content": answers, "headers": _HEADERS},
            **{str(status): {"description": ", ".join(_codes(status)), **error} for status in sorted(set(statuses))},
        },
    }
    if route in ("/readyz", "/health"):
        operation["responses"]["503"] = {"description": "not ready", "content": answers}
    if body is not None:
        schema = {"$ref": _REF + body.__name__}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if with_keys and ROLE_OF[route] is not None:
        operation["security"] = [{"key": []}]
    return {"get" if body is None else "post": operation}


def _one_model(models: Mapping[str, Any]) -> dict[str, Any]:
    """The served model by its name, from the operations of the list of models."""
    error = {"content": {"application/json": {"schema": {"$ref": f"{_REF}Error"}}}, "headers": _HEADERS}
    name = {"type": "string", "minLength": 1, "maxLength": 256}
    operation = models["get"] | {
        "summary": "That model alone",
        "operationId": "v1_models_one",
        "parameters": [{"name": "model", "in": "path", "required": True, "schema": name}],
        "responses": models["get"]["responses"] | {"404": {"description": ", ".join(_codes(404)), **error}},
    }
    return {"get": operation}


def _codes(status: int) -> list[str]:
    return [code for code, its in STATUS.items() if its == status]


def documentation_page(document: Mapping[str, Any]) -> str:
    """The document as one page of HTML: no script, nothing from elsewhere."""
    schemas = document["components"]["schemas"]
    parts = [f"<h1>{html.escape(document['info']['title'])}</h1><p>{html.escape(document['info']['description'])}</p>"]
    for route, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(route)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            if "requestBody" in operation:
                reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
                parts.append("<table><tr><th>parameter<th>what</tr>")
                for name, schema in schemas[reference.removeprefix(_REF)]["properties"].items():
                    text = html.escape(schema.get("description", ""))
                    parts.append(f"<tr><td><code>{html.escape(name)}</code><td>{text}</tr>")
                parts.append("</table>")
            answers = (
                f"{status} {html.escape(answer['description'])}" for status, answer in operation["responses"].items()
            )
            parts.append(f"<p>Answers: {'; '.join(answers)}</p>")
    style = (
        "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}td{padding:.1rem .8rem .1rem 0}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Stet</title><style>{style}'
        f"td,th{{text-align:left;vertical-align:top}}</style>{''.join(parts)}</html>"
    )
