"""The application: routes over a service, and one middleware that counts, logs and hides defects."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.generation import Problem, Refusal
from server.http.auth import FIELDS, Caller, Gate, KeyRing, caller_of
from server.http.errors import ClientGone, HttpError, error_response, internal_problem, refusal_response
from server.http.generate import Call, GenerationResponse, known_params, read_generate
from server.http.limits import Limits
from server.http.openai.calls import read_chat, read_completion
from server.http.openai.schemas import ChatBody, CompletionBody
from server.http.openapi import documentation_page, openapi_document
from server.http.page import PageFile, page_files
from server.http.plan import PlanBody, PlanRoute, PlanService
from server.http.routes import CHAT, COMPLETIONS, MODELS, PAGE, find_route, not_found
from server.http.schemas import GenerateBody
from server.http.sse import encode_json
from server.http.tokens import DetokenizeBody, TokenizeBody, TokenService, detokenize, tokenize
from server.logs import SparingLog
from server.metrics import Metrics

request_log = logging.getLogger("stet.request")
logger = logging.getLogger("stet.http")

_NAMES = frozenset().union(
    *(body.model_fields for body in (GenerateBody, ChatBody, CompletionBody, TokenizeBody, DetokenizeBody, PlanBody))
)
# No client sees it: the log's and the metrics' way to say that the client left before an answer, as in nginx.
_CLIENT_GONE = 499
_DOCUMENTATION_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
# Of the requests that get 429 so many a second are logged; the next line says how many were not.
_REFUSAL_LINES_A_SECOND = 10
# They come every second and say what the metrics say too; a page has many files.
_NOT_LOGGED = frozenset({"/livez", "/readyz", "/health", "/metrics", PAGE})


class AppService(TokenService, PlanService, Protocol):
    """What the routes need of server.service.Service."""

    @property
    def state(self) -> str: ...

    def info(self) -> Mapping[str, Any]: ...

    def refusal_of(self, tenant: str) -> Refusal | None: ...


def create_app(
    service: AppService,
    metrics: Metrics,
    limits: Limits | None = None,
    keys: KeyRing | None = None,
    documented: bool = False,
) -> ASGIApp:
    """The ASGI application over a service. Owns nothing: starting, draining and stopping are the caller's.

    keys: the API keys that are asked for; None asks for none. documented: whether /openapi.json and /docs are there.
    """
    limits = limits or Limits()
    routes = create_routes(service, metrics, limits, keys is not None, documented)
    # Around the framework, not its middleware: what is refused at the gate then never pays for its layers.
    return Observer(Gate(routes, service, keys, metrics, limits, documented), metrics)


def create_routes(
    service: AppService, metrics: Metrics, limits: Limits, asks_for_keys: bool, documented: bool
) -> FastAPI:
    """What is behind the gate."""
    # Not the documentation pages of the framework: they load scripts from elsewhere, and know nothing of our bodies.
    app = FastAPI(title="Stet", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _routing_error)
    app.add_exception_handler(Exception, _internal_error)

    def generation(path: str, read: Callable[[Request, AppService, Limits], Awaitable[Call]]) -> None:
        @app.post(path, response_model=None)
        async def generate(request: Request) -> Response:
            fields: dict[str, Any] = request.scope[FIELDS]
            began = time.monotonic()
            try:
                call = await read(request, service, limits)
            except HttpError as error:
                # The service never heard of this request: its ending is counted here.
                _count_refusal(metrics, path, error.code, began)
                fields.update(outcome=error.code, params=known_params(error.problems, _NAMES))
                return error_response(error.code, error.problems, error.headers)
            except ClientGone:
                _count_refusal(metrics, path, "cancelled", began)
                return Response(status_code=_CLIENT_GONE)
            except BaseException:
                _count_refusal(metrics, path, "internal", began)
                raise
            fields["stream"] = call.stream
            caller = caller_of(request.scope)
            try:
                caller.budget.enter(call.num_outputs, time.monotonic())
            except HttpError as error:
                _count_refusal(metrics, path, error.code, began)
                fields.update(outcome=error.code)
                return error_response(error.code, error.problems, error.headers)
            return _Held(GenerationResponse(call, limits, fields), caller, call.num_outputs)

    def text(path: str, answer: Callable[[Request, AppService, Limits], Awaitable[bytes]]) -> None:
        @app.post(path, response_model=None)
        async def tokens(request: Request) -> Response:
            fields: dict[str, Any] = request.scope[FIELDS]
            try:
                return Response(await answer(request, service, limits), media_type="application/json")
            except HttpError as error:
                fields.update(outcome=error.code, params=known_params(error.problems, _NAMES))
                return error_response(error.code, error.problems, error.headers)
            except Refusal as refusal:
                fields.update(outcome=refusal.code)
                return refusal_response(refusal)
            except ClientGone:
                return Response(status_code=_CLIENT_GONE)

    generation("/generate", read_generate)
    generation(CHAT, read_chat)
    generation(COMPLETIONS, read_completion)
    text("/tokenize", tokenize)
    text("/detokenize", detokenize)
    text("/plan", PlanRoute().answer)

    since = int(time.time())

    def model_object() -> dict[str, Any]:
        return {
            "id": service.model,
            "object": "model",
            "created": since,
            "owned_by": "stet",
            "max_model_len": service.context_length,
        }

    def loading() -> Response:
        return error_response("loading", [Problem(None, "The model is being loaded.")])

    @app.api_route(MODELS, methods=["GET", "HEAD"], response_model=None)
    async def models() -> Response:
        return _json({"object": "list", "data": [model_object()]}) if service.model else loading()

    @app.api_route(MODELS + "/{name:path}", methods=["GET", "HEAD"], response_model=None)
    async def model(name: str) -> Response:
        if not service.model:
            return loading()
        if name != service.model:
            # The name is not repeated: as in the answer to an unknown route.
            text = f"No such model is served here: {service.model} is."
            return error_response("model_not_found", [Problem("model", text)])
        return _json(model_object())

    @app.api_route("/info", methods=["GET", "HEAD"], response_model=None)
    async def info() -> Response:
        return _json(service.info())

    @app.api_route("/livez", methods=["GET", "HEAD"], response_model=None)
    async def livez() -> Response:
        return _json({"status": "ok"})

    @app.api_route("/readyz", methods=["GET", "HEAD"], response_model=None)
    @app.api_route("/health", methods=["GET", "HEAD"], response_model=None)
    async def readyz() -> Response:
        state = service.state
        return _json({"status": state}, 200 if state == "ready" else 503)

    @app.api_route("/metrics", methods=["GET", "HEAD"], response_model=None)
    async def metrics_page(request: Request) -> Response:
        body, content_type = metrics.render(request.headers.get("accept"))
        return Response(body, headers={"content-type": content_type})

    def page(path: str, file: PageFile) -> None:
        @app.api_route(path, methods=["GET", "HEAD"], response_model=None)
        async def page_file(request: Request) -> Response:
            return file.answer(request.headers)

    for path, file in page_files().items():
        page(path, file)

    if documented:
        document = openapi_document(limits, asks_for_keys)
        documentation = documentation_page(document)

        @app.api_route("/openapi.json", methods=["GET", "HEAD"], response_model=None)
        async def openapi() -> Response:
            return _json(document)

        @app.api_route("/docs", methods=["GET", "HEAD"], response_model=None)
        async def docs() -> Response:
            return Response(documentation, headers=_DOCUMENTATION_HEADERS, media_type="text/html")

    return app


class _Held(Response):
    """An answer that holds its caller's places until its last bytes go out, or could not.

    Not for longer: who has them and asks again at once is not to find his own places taken.
    """

    def __init__(self, answer: Response, caller: Caller, places: int) -> None:
        self.background = None
        self._answer = answer
        self._caller = caller
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_leave(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._leave()
            await send(message)

        try:
            await self._answer(scope, receive, send_and_leave)
        finally:
            self._leave()

    def _leave(self) -> None:
        if self._places:
            self._caller.budget.leave(self._places, time.monotonic())
            self._places = 0


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(encode_json(value), status, {"cache-control": "no-store"}, "application/json")


def _count_refusal(metrics: Metrics, endpoint: str, outcome: str, began: float) -> None:
    metrics.request_finished(
        endpoint,
        outcome,
        duration=time.monotonic() - began,
        queue=None,
        prefill=None,
        decode=None,
        prompt_tokens=0,
        generated_tokens=0,
    )


async def _routing_error(request: Request, error: Exception) -> Response:
    """404 and 405, which the router raises, in our shape."""
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 405:
        allow = ", ".join(sorted(method.strip() for method in (error.headers or {}).get("Allow", "").split(",")))
        text = f"{request.method} is not allowed here: use {allow}."
        return error_response("method_not_allowed", [Problem(None, text)], {"allow": allow})
    unknown = not_found()
    return error_response(unknown.code, unknown.problems)


async def _internal_error(request: Request, error: Exception) -> Response:
    """The answer to a defect. The framework raises it again, for the log."""
    return error_response("internal", [internal_problem()])


class Observer:
    """Around every request: an id, one log line, the HTTP metrics, and a fixed answer to any defect.

    Plain ASGI: a wrapped body stream would hide disconnects and cost most of a millisecond a token.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._refusals = SparingLog(_REFUSAL_LINES_A_SECOND)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        # Not a secret, and the system's random bytes would let other threads in, for milliseconds where they compute.
        request_id = f"req-{random.getrandbits(64):016x}"
        fields: dict[str, Any] = {}
        scope[FIELDS] = fields

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, observed_send)
        except Exception as error:
            logger.error("internal error", exc_info=error, extra={"fields": {"request": request_id}})
            fields["outcome"] = "internal"
            if status == 0:
                await error_response("internal", [internal_problem()])(scope, receive, observed_send)
            # Otherwise the answer is left unfinished, and the server closes the connection.
        finally:
            seconds = time.perf_counter() - began
            route = find_route(scope.get("raw_path") or b"") or "other"
            self._metrics.http_request(route, scope["method"], status or _CLIENT_GONE, seconds)
            # Refusals may come by the thousand.
            level = logging.DEBUG if route in _NOT_LOGGED else logging.INFO
            wanted = request_log.isEnabledFor(level)
            if wanted and status == 429:
                left_out = self._refusals.line(began)
                wanted = left_out is not None
                if left_out:
                    fields["lines_left_out"] = left_out
            if wanted:
                line = {
                    "request": request_id,
                    "method": scope["method"] if len(scope["method"]) <= 16 else "other",
                    "route": route,
                    "status": status or _CLIENT_GONE,
                    "ms": round(seconds * 1000, 3),
                    **fields,
                }
                request_log.log(level, "request", extra={"fields": line})
