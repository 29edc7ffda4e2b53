"""Typed access to a config.json: every refusal names the field, what it held and what it must hold. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.errors import ModelError

# Limits far beyond any model, so that a nonsense number is an error and not an attempt to allocate it.
_MAX_SIZE = 2**31 - 1
_MAX_NUMBER = 1e30


class Fields:
    """The fields of a JSON object; `prefix` stands before their names in messages.

    aliases: what an architecture calls a field that others know by its key (GPT-2: "n_embd" for "hidden_size").
    """

    def __init__(self, config: Mapping[str, Any], prefix: str = "", aliases: Mapping[str, str] | None = None) -> None:
        self.config = config
        self.prefix = prefix
        self.aliases = aliases or {}

    def get(self, name: str, missing: Any = None) -> Any:
        """Whatever the field holds."""
        return self.config.get(self.aliases.get(name, name), missing)

    def size(self, name: str, missing: int | None = None, null: int | None = None, least: int = 1) -> int:
        """A positive integer; `missing` and `null` say what an absent or null field means, if that is allowed."""
        name = self.aliases.get(name, name)
        value = self.config.get(name, missing)
        if value is None and name in self.config and null is not None:
            value = null
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        if value is None:
            raise ModelError(f"{self.prefix}{name} is missing; it must be {wanted}")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_SIZE:
            raise ModelError(f"{self.prefix}{name} is {value!r}; it must be {wanted} (up to {_MAX_SIZE})")
        return value

    def positive(self, name: str, missing: float | None = None) -> float:
        """A finite number above zero; `missing` where the field is absent or null, if that is allowed."""
        name = self.aliases.get(name, name)
        value = self.config.get(name)
        if value is None:
            value = missing
        if value is None:
            raise ModelError(f"{self.prefix}{name} is missing; it must be a positive number")
        return positive(f"{self.prefix}{name}", value)

    def flag(self, name: str, missing: bool) -> bool:
        """True or false; `missing` where the field is absent or null."""
        value = self.config.get(name)
        if value is None:
            return missing
        if not isinstance(value, bool):
            raise ModelError(f"{self.prefix}{name} is {value!r}; it must be true or false")
        return value


def positive(name: str, value: Any) -> float:
    """A finite number above zero. Raises ModelError."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < _MAX_NUMBER:  # a NaN compares false
        raise ModelError(f"{name} is {value!r}; it must be a positive number")
    return float(value)


def token_ids(config: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """The field `name` (an id, a list of ids, null or absent) as a tuple without repetition."""
    value = config.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ModelError(f"{name} holds {token!r}; token ids must be integers from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))
