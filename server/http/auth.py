"""Who asks: API keys from a file that may change, and a gate before every route.

The gate stands before the router and before the body is read. It knows routes by their path as it was sent
(`server.http.routes`), so what is not listed there is refused whatever the router would make of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from starlette.types import ASGIApp, Receive, Scope, Send

from server.generation import GenerationRequest, Problem, Refusal
from server.http.budgets import Budget
from server.http.errors import HttpError, error_response, refusal_response
from server.http.intake import Intake
from server.http.limits import Limits
from server.http.routes import ADMIN, GENERATING, INFER, find_route, not_found, role_of
from server.keys import KeyEntry, KeysError, find_entry, parse_keys, read_keys
from server.metrics import Metrics

logger = logging.getLogger("stet.http")

CALLER = "stet.caller"
FIELDS = "stet.fields"
_RELOAD_SECONDS = 1.0
_MAX_KEY_CHARS = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: an API key's name and roles, and what is left of its limits. Without keys, everyone is one caller."""

    name: str
    roles: frozenset[str]
    budget: Budget

    @property
    def is_admin(self) -> bool:
        return ADMIN in self.roles

    def may(self, role: str) -> bool:
        """Whether its roles include this one."""
        return role in self.roles or self.is_admin


def caller_of(scope: Mapping[str, Any]) -> Caller:
    """Who sent this request. Behind the gate there is always one."""
    caller: Caller = scope[CALLER]
    return caller


def sign(scope: Mapping[str, Any], request: GenerationRequest) -> GenerationRequest:
    """The request with its tenant, the key that sent it, and its trace. Raises HttpError (403) for what its roles do
    not allow."""
    caller = caller_of(scope)
    if request.priority > 0 and not caller.is_admin:
        text = "priority above 0 needs an API key with the role admin."
        raise HttpError("forbidden", [Problem("priority", text, request.priority, "an integer from −100 to 0")])
    traceparent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
    return dataclasses.replace(request, tenant=caller.name, traceparent=traceparent.decode("latin-1"))


class KeyRing:
    """The keys in force. Owns what each has used of its limits, which a reload of the file does not reset."""

    def __init__(self, path: Path, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. Raises KeysError."""
        self._path = path
        self._metrics = metrics
        self._clock = clock
        self._content: bytes | None = None
        self._refused: str | None = None
        self._entries: tuple[KeyEntry, ...] = ()
        self._callers: dict[str, Caller] = {}
        content = read_keys(path)
        self._take(content, parse_keys(content))

    def _take(self, content: bytes, entries: tuple[KeyEntry, ...]) -> None:
        now = self._clock()
        callers: dict[str, Caller] = {}
        for entry in entries:
            known = self._callers.get(entry.name)
            if known is not None:
                known.budget.change(entry, now)
            budget = known.budget if known is not None else Budget(entry, now)
            callers[entry.name] = Caller(entry.name, entry.roles, budget)
        self._content, self._entries, self._callers = content, entries, callers
        self._refused = None
        self._metrics.keys_loaded(len(entries))

    def find(self, key: str) -> Caller | None:
        """The caller of a key; None if it is not in force."""
        entry = find_entry(self._entries, key)
        return None if entry is None else self._callers[entry.name]

    async def reload(self) -> None:
        """Take a changed file. One that cannot be used leaves the keys as they are, which is said once a cause."""
        try:
            content = await asyncio.to_thread(read_keys, self._path)
            if content == self._content:
                self._refused = None
                return
            entries = await asyncio.to_thread(parse_keys, content)
        except KeysError as error:
            if str(error) != self._refused:
                self._refused = str(error)
                self._metrics.keys_refused()
                logger.error("API keys not reloaded: the old ones stay", extra={"fields": {"cause": str(error)}})
            return
        self._take(content, entries)
        logger.info("API keys reloaded", extra={"fields": {"keys": len(entries)}})

    def spend(self, name: str, tokens: int) -> None:
        """Tokens were used by this key, if it is still in force."""
        caller = self._callers.get(name)
        if caller is not None:
            caller.budget.spend(tokens, self._clock())

    async def watch(self) -> None:
        """Reload the file when it changes, for ever."""
        while True:
            await asyncio.sleep(_RELOAD_SECONDS)
            await self.reload()


class Places(Protocol):
    """What the gate needs of server.service.Service."""

    def refusal_of(self, tenant: str) -> Refusal | None: ...


class Gate:
    """Before every route: who asks, whether it may, whether it may now, and whether there is such a route at all.

    Where no place is left for a generation it is refused here, before its body is read: the busier the server, the less
    it costs it to say so.

    Without keys everyone may everything but what needs the role admin, which nobody has.
    """

    def __init__(
        self,
        app: ASGIApp,
        places: Places,
        keys: KeyRing | None,
        metrics: Metrics,
        limits: Limits,
        documented: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._places = places
        self._keys = keys
        self._metrics = metrics
        self._documented = documented
        self._clock = clock
        self._intake = Intake(limits.max_intake_bytes)
        self._everyone = Caller("", frozenset({INFER, "metrics"}), Budget(None, clock()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither lifespan nor websocket: nothing here answers them
        raw_path = scope.get("raw_path") or b""
        route = find_route(raw_path, self._documented)
        generates = route in GENERATING and scope["method"] == "POST"
        try:
            caller = self._admit(route, scope)
            if route is None:
                raise not_found(raw_path)
            if generates and (refusal := self._places.refusal_of(caller.name)) is not None:
                raise refusal
        except (HttpError, Refusal) as error:
            scope.get(FIELDS, {})["outcome"] = error.code
            if generates and route is not None:
                self._metrics.request_refused(route, error.code)
            if isinstance(error, Refusal):
                answer = refusal_response(error)
            else:
                answer = error_response(error.code, error.problems, error.headers)
            await answer(scope, receive, send)
            return
        scope[CALLER] = caller
        share = self._intake.watch(receive)
        try:
            await self._app(scope, share.receive, send)
        finally:
            share.close()

    def _admit(self, route: str | None, scope: Scope) -> Caller:
        role = None if route is None else role_of(route)
        if self._keys is None or (route is not None and role is None):
            return self._everyone
        caller = self._keys.find(_bearer(scope))
        if caller is None:
            text = "An API key is needed: send the header 'Authorization: Bearer KEY' with one that is in force."
            raise HttpError("unauthorized", [Problem(None, text)], {"www-authenticate": "Bearer"})
        scope.get(FIELDS, {})["key"] = caller.name
        if role is not None and not caller.may(role):
            raise HttpError("forbidden", [Problem(None, f"This API key has not the role that is needed: {role}.")])
        if role == INFER:
            caller.budget.ask(self._clock(), generates=route in GENERATING and scope["method"] == "POST")
        return caller


def _bearer(scope: Scope) -> str:
    """The key that was sent; "" if there is none, or more than one."""
    sent = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(sent) != 1:
        return ""
    scheme, _, key = sent[0].decode("latin-1").partition(" ")
    key = key.strip(" ")
    return key if scheme.lower() == "bearer" and len(key) <= _MAX_KEY_CHARS else ""
