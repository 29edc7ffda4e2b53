"""How a JSON object is held to a table of parameters: every problem at once, in words that all bodies share.

A body is a pydantic class whose fields are made by `parameter`: pydantic says where a value is wrong, and the words
come from `allowed`, so that every message reads the same and none quotes a library. The same text is a row of
docs/api.md.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, Field, JsonValue, ValidationError
from pydantic.fields import FieldInfo

from server.generation import Problem

_MAX_UNKNOWN = 16
_MAX_NAME_CHARS = 64

Body = TypeVar("Body", bound=BaseModel)


def parameter(allowed: str, note: str = "", *, default: Any = None, shown: str = "null", **bounds: Any) -> Any:
    """A field whose `allowed` text is what errors say, and with `note` and `shown` a row of docs/api.md."""
    extra: dict[str, JsonValue] = {"allowed": allowed, "note": note, "shown": shown}
    return Field(default=default, json_schema_extra=extra, **bounds)


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of the inside of a parameter.

    items    parameter -> what each of its items must be
    members  parameter -> its members, or those of its items, and what each must be; members of members by a path
             with dots
    """

    items: Mapping[str, str] = field(default_factory=dict)
    members: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Checked(Generic[Body]):
    """A body as far as it is valid (invalid parameters are at their defaults), and what is wrong with the rest."""

    valid: Body
    problems: list[Problem]


def check(kind: type[Body], sent: Mapping[str, Any], words: Words) -> Checked[Body]:
    """Hold the parameters of this kind of body to it; others are left alone. Null and leaving out are the same."""
    known = {name: value for name, value in sent.items() if name in kind.model_fields and value is not None}
    try:
        return Checked(kind.model_validate(known), [])
    except ValidationError as error:
        found = error.errors(include_url=False)
    wrong = {str(item["loc"][0]) for item in found}
    # Where a string may stand for a list of one, its only item is the parameter itself.
    places = [item["loc"][:1] if isinstance(known[str(item["loc"][0])], str) else item["loc"] for item in found]
    problems = [
        _translate(kind, words, place, item["type"], item["input"]) for place, item in zip(places, found, strict=True)
    ]
    return Checked(kind.model_validate({name: value for name, value in known.items() if name not in wrong}), problems)


def unknown_names(
    sent: Mapping[str, Any], known: Sequence[str], elsewhere: Mapping[str, str] | None = None
) -> list[Problem]:
    """A problem for each name that is no parameter, with the nearest that is; `elsewhere`: other dialects' names."""
    problems: list[Problem] = []
    names = set(known)
    for name in [name for name in sent if name not in names][:_MAX_UNKNOWN]:
        shown = short(name)
        nearest = (elsewhere or {}).get(name) or _nearest(name, list(known))
        hint = f" Did you mean {nearest}?" if nearest else ""
        problems.append(Problem(shown, f"{shown} is not a parameter.{hint}", allowed=nearest))
    return problems


def not_yet(sent: Mapping[str, Any], unsupported: Mapping[str, Any], prefix: str = "") -> list[Problem]:
    """A problem for each parameter that is sent with another value than the one that asks for nothing."""
    problems: list[Problem] = []
    for name, idle in unsupported.items():
        value = sent.get(name)
        if value is None or (type(value) is type(idle) and value == idle):
            continue
        shown = json.dumps(idle)
        text = f"{prefix}{name} is not supported yet: leave it out, or send {shown}."
        problems.append(Problem(f"{prefix}{name}", text, value, shown))
    return problems


def allowed_of(info: FieldInfo) -> str:
    """What a parameter may be, in words."""
    extra = info.json_schema_extra
    return str(extra["allowed"]) if isinstance(extra, dict) else ""


def short(name: str) -> str:
    """A name that a client sent, short enough to send back."""
    return name if len(name) <= _MAX_NAME_CHARS else name[:_MAX_NAME_CHARS] + "…"


def must_be(param: str, value: Any, allowed: str) -> Problem:
    """The problem of a value outside what is allowed."""
    return Problem(param, f"{param} must be {allowed}.", value, allowed)


def _nearest(name: str, known: list[str]) -> str | None:
    if len(name) > _MAX_NAME_CHARS:
        return None
    matches = difflib.get_close_matches(name.lower(), known, n=1)
    return matches[0] if matches else None


def _translate(kind: type[BaseModel], words: Words, location: tuple[int | str, ...], error: str, value: Any) -> Problem:
    """A problem in our words from where pydantic found it."""
    name = str(location[0])
    allowed = allowed_of(kind.model_fields[name])
    if len(location) == 1:
        return must_be(name, value, allowed)
    param, path = name, ""
    for part in location[1:]:
        param += f"[{part}]" if isinstance(part, int) else f".{short(part)}"
        path += "" if isinstance(part, int) else f".{short(part)}"
    if not path:
        return must_be(param, value, words.items.get(name, "valid"))
    members, path = words.members.get(name, {}), path[1:]
    if error == "missing":
        return Problem(param, f"{param} is missing.", None, members.get(path))
    if error == "extra_forbidden":
        above, _, member = path.rpartition(".")
        siblings = [each.rpartition(".")[2] for each in members if each.rpartition(".")[0] == above]
        nearest = _nearest(member, siblings)
        hint = f" Did you mean {nearest}?" if nearest else ""
        whole = param.rpartition(".")[0] if above else "a message" if name == "messages" else name
        return Problem(param, f"{param} is not a member of {whole}.{hint}", value, " and ".join(siblings))
    return must_be(param, value, members.get(path, "valid"))
