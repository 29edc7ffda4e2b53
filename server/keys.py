"""The file of API keys: who may ask for what, and how much. It holds hashes, never a key.

    [[key]]
    name = "alice"                  # the tenant that shares fairly with the others, and what the log calls it
    sha256 = "9f86d0…"              # of the key, in hexadecimal
    roles = ["infer"]               # infer, metrics, admin; admin may do what the others may
    requests_per_minute = 600       # these three are limits; left out, there is none
    tokens_per_minute = 200000
    max_concurrent = 8

Keys are made by `stet keys create` from 256 random bits. So one round of SHA-256 hides them: there is nothing to guess,
which is what slow password hashes are for. Whoever writes an entry by hand has to choose a key as long.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("infer", "metrics", "admin")
MAX_KEYS = 1024
MAX_FILE_BYTES = 1024 * 1024
MAX_LIMIT = 10**12

_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
_MEMBERS = ("name", "sha256", "roles", *_LIMITS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class KeysError(Exception):
    """A file of keys that cannot be used. One line for the operator; it holds no hash."""


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key: the digest that stands for it, what it may do, and its limits (None: without)."""

    name: str
    digest: bytes
    roles: frozenset[str]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None


def digest_of(key: str) -> bytes:
    """The SHA-256 of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def find_entry(entries: Iterable[KeyEntry], key: str) -> KeyEntry | None:
    """Whose key this is. All are compared, each in constant time: how long it takes tells nothing of any hash."""
    digest, found = digest_of(key), None
    for entry in entries:
        if hmac.compare_digest(entry.digest, digest):
            found = entry
    return found


def read_keys(path: Path) -> bytes:
    """The content of a file of keys. Raises KeysError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(f"the file of API keys cannot be read: {error.strerror or type(error).__name__}") from None
    if len(content) > MAX_FILE_BYTES:
        raise KeysError(f"the file of API keys is larger than {MAX_FILE_BYTES} bytes")
    return content


def parse_keys(content: bytes) -> tuple[KeyEntry, ...]:
    """The entries of a file of keys, at least one. Raises KeysError for anything that is not exactly its format.

    A file without entries is refused like a broken one: it is what a file looks like that is just being written.
    """
    try:
        sent = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise KeysError("the file of API keys is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError):
        # The decoder's own message may quote the file.
        raise KeysError("the file of API keys is not TOML") from None
    tables = sent.pop("key", None)
    if sent:
        raise KeysError("the file of API keys holds something else than [[key]] tables")
    if not isinstance(tables, list) or not tables:
        raise KeysError("the file of API keys has no [[key]] table")
    if len(tables) > MAX_KEYS:
        raise KeysError(f"the file of API keys has more than {MAX_KEYS} keys")
    entries = tuple(_entry(position, table) for position, table in enumerate(tables, 1))
    for what, values in (("name", [e.name for e in entries]), ("sha256", [e.digest for e in entries])):
        if len(set(values)) < len(values):
            raise KeysError(f"two API keys have the same {what}")
    return entries


def _entry(position: int, table: Any) -> KeyEntry:
    where = f"API key {position}"
    if not isinstance(table, dict):
        raise KeysError(f"{where} is no table")
    name = table.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise KeysError(f"{where}: name must be 1 to 64 letters, digits, dots, dashes and underscores")
    if not all(member in _MEMBERS for member in table):
        raise KeysError(f"{where} ({name}) has a member that is not known: there are {', '.join(_MEMBERS)}")
    sha256, roles = table.get("sha256"), table.get("roles")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise KeysError(f"{where} ({name}): sha256 must be 64 hexadecimal digits in lower case")
    if not isinstance(roles, list) or not roles or not all(role in ROLES for role in roles):
        raise KeysError(f"{where} ({name}): roles must be a list of {', '.join(ROLES)}")
    limits: dict[str, int] = {}
    for limit in _LIMITS:
        value = table.get(limit)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= MAX_LIMIT:
            raise KeysError(f"{where} ({name}): {limit} must be an integer from 1 to {MAX_LIMIT}")
        limits[limit] = value
    return KeyEntry(name, bytes.fromhex(sha256), frozenset(roles), **limits)


def create_key(path: Path, name: str, roles: Sequence[str], limits: dict[str, int]) -> str:
    """Add an entry to a file of keys, which may be new, and return its key: nothing keeps it. Raises KeysError.

    The file is replaced as a whole, so that a server that reads it meanwhile sees the old one or the new one; what
    else is in it, comments too, stays. A new file can be read by its owner alone.
    """
    path = path.resolve()
    before = read_keys(path) if path.exists() else b""
    names = [entry.name for entry in parse_keys(before)] if before.strip() else []
    if name in names:
        raise KeysError(f"there is an API key named {name} already")
    key = "stet-" + secrets.token_urlsafe(32)
    lines = [
        "[[key]]",
        f'name = "{name}"',
        f'sha256 = "{digest_of(key).hex()}"',
        f"roles = [{', '.join(f'{chr(34)}{role}{chr(34)}' for role in roles)}]",
        *(f"{limit} = {value}" for limit, value in limits.items()),
    ]
    text = before.rstrip() + (b"\n\n" if before.strip() else b"") + "\n".join(lines).encode() + b"\n"
    parse_keys(text)
    _replace(path, text)
    return key


def _replace(path: Path, content: bytes) -> None:
    """Write beside the file, then rename. The name of the new file is the lock of its writers."""
    new = path.with_name(path.name + ".new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise KeysError(f"{new.name} exists: another 'stet keys' is writing, or one was broken off") from None
    except OSError as error:
        raise KeysError(f"the file of API keys cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(new, path.stat().st_mode & 0o777)
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise KeysError(f"the file of API keys cannot be written: {error.strerror}") from None
