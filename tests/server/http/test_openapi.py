"""The OpenAPI document and its page: off unless asked for, bounded in every place, and true to the code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.app import create_routes
from server.http.errors import STATUS
from server.http.limits import Limits
from server.http.openai.schemas import COMPLETION_SHARED, SHARED, ChatBody, CompletionBody
from server.http.openapi import documentation_page, openapi_document
from server.http.routes import PAGE_PATHS, ROUTES
from server.http.schemas import GenerateBody
from server.metrics import Metrics
from tests.server.http.conftest import LIMITS
from tests.server.http.scripted import ScriptedService, ServerThread

DOCUMENT = openapi_document(Limits(), with_keys=True)
NUMBERS = {"integer", "number"}
PAGE = Path(__file__).resolve().parents[3] / "docs" / "api.md"


def schemas(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place of the document that says of what type a value is."""
    if isinstance(value, dict):
        if "type" in value and isinstance(value["type"], str | list) and "scheme" not in value:
            yield path, value
        for key, item in value.items():
            if key not in ("enum", "const", "required"):
                yield from schemas(item, f"{path}/{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from schemas(item, f"{path}/{index}")


def unbounded(path: str, schema: dict[str, Any]) -> list[str]:
    """What is missing in one place."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    missing = []
    if "enum" in schema or "const" in schema:
        return []
    if NUMBERS & set(kinds):
        missing += [] if {"minimum", "exclusiveMinimum"} & schema.keys() else [f"{path}: no least number"]
        missing += [] if {"maximum", "exclusiveMaximum"} & schema.keys() else [f"{path}: no greatest number"]
    if "string" in kinds and "maxLength" not in schema:
        missing.append(f"{path}: no greatest length")
    if "array" in kinds and not {"maxItems", "items"} <= schema.keys():
        missing.append(f"{path}: no greatest count, or nothing said of the items")
    if "object" in kinds and schema.get("additionalProperties") is not False and "maxProperties" not in schema:
        missing.append(f"{path}: no greatest count of members")
    return missing


def test_everything_in_the_document_has_bounds() -> None:
    found = list(schemas(DOCUMENT))
    assert len(found) > 80
    assert [text for path, schema in found for text in unbounded(path, schema)] == []


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 0},
        {"type": ["number", "null"], "maximum": 0},
        {"type": "string"},
        {"type": "array", "items": {}},
        {"type": "object"},
    ],
)
def test_the_walk_sees_what_is_unbounded(schema: dict[str, Any]) -> None:
    (place,) = schemas({"a": [{"b": schema}]})
    assert unbounded(*place)


def test_the_document_has_every_route_and_no_other() -> None:
    app = create_routes(ScriptedService(), Metrics(), Limits(), asks_for_keys=False, documented=False)
    served = {getattr(route, "path", "").replace("{name:path}", "{model}") for route in app.routes}
    assert set(DOCUMENT["paths"]) == {*ROUTES, "/v1/models/{model}"} == served - set(PAGE_PATHS)
    assert set(PAGE_PATHS) <= served
    for route in app.routes:
        if getattr(route, "path", "") not in PAGE_PATHS and "{" not in getattr(route, "path", "{"):
            operations = set(DOCUMENT["paths"][route.path])
            assert operations == {method.lower() for method in route.methods} - {"head"}


def test_the_document_has_every_parameter_and_no_other() -> None:
    parts = DOCUMENT["components"]["schemas"]
    assert set(parts["GenerateBody"]["properties"]) == set(GenerateBody.model_fields)
    assert set(parts["ChatBody"]["properties"]) == {*ChatBody.model_fields, *SHARED}
    assert set(parts["CompletionBody"]["properties"]) == {*CompletionBody.model_fields, *COMPLETION_SHARED}
    for name in ("GenerateBody", "ChatBody", "CompletionBody", "TokenizeBody", "DetokenizeBody", "PlanBody"):
        assert parts[name]["additionalProperties"] is False
        for schema in parts[name]["properties"].values():
            assert schema["description"]


def test_the_page_of_the_contract_has_every_route_and_code() -> None:
    page = PAGE.read_text()
    routes = page[page.index("## Routes") : page.index("## `POST /generate`")]
    for route in ROUTES:
        assert f"{route}`" in routes, route
    errors = page[page.index("## Errors") : page.index("## API keys")]
    for code, status in STATUS.items():
        row = next(line for line in errors.splitlines() if line.startswith(f"| {status} ") and f"`{code}`" in line)
        assert row


def test_no_documentation_unless_asked_for(client: httpx.Client) -> None:
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert client.get(path).status_code == 404


def test_documentation_when_asked_for() -> None:
    server = ServerThread(LIMITS, docs=True)
    try:
        with httpx.Client(base_url=server.url) as client:
            assert client.get("/openapi.json").json() == json.loads(json.dumps(openapi_document(LIMITS, False)))
            page = client.get("/docs")
    finally:
        server.stop()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<script" not in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    for route in ROUTES:
        assert f"{route}</code>" in page.text
    for name in GenerateBody.model_fields:
        assert f"<code>{name}</code>" in page.text


def test_the_page_escapes_what_it_shows() -> None:
    document = openapi_document(Limits(), False)
    document["info"]["description"] = "<b>"
    document["components"]["schemas"]["GenerateBody"]["properties"]["<i>"] = {"description": "<u>"}
    page = documentation_page(document)
    assert not {"<b>", "<i>", "<u>"} & {page[at : at + 3] for at in range(len(page))}
