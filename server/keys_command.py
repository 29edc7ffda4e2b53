"""`stet keys`: make an API key, or list those that there are."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from server.config import ConfigError, integer, resolve
from server.config import add_flags as add_setting_flags
from server.keys import MAX_LIMIT, ROLES, KeysError, create_key, parse_keys, read_keys

_LIMITS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute, prompt and output",
    "max_concurrent": "choices at once, running or waiting",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `stet keys`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="add a key to the file, and print it once", allow_abbrev=False)
    create.add_argument("name", metavar="NAME", help="who it is for: letters, digits, dots, dashes and underscores")
    add_setting_flags(create, ("api_keys",))
    create.add_argument(
        "--role",
        action="append",
        choices=ROLES,
        help="what it may do: infer, metrics, or admin, who may do all of it; may be given several times "
        "(default: infer)",
    )
    for name, text in _LIMITS.items():
        create.add_argument(
            f"--{name.replace('_', '-')}", metavar="COUNT", help=f"{text} at most (default: without a limit)"
        )
    listing = actions.add_parser("list", help="show names, roles and limits", allow_abbrev=False)
    add_setting_flags(listing, ("api_keys",))


def run(flags: argparse.Namespace) -> int:
    """Carry it out. Returns the exit code: 0, or 2 for what the caller can repair."""
    try:
        settings = resolve({"api_keys": flags.api_keys}, os.environ)
        if settings.api_keys is None:
            raise ConfigError("--api-keys FILE is needed: where the keys are kept")
        path = Path(settings.api_keys)
        if flags.action == "list":
            print(_table(path))
        else:
            _create(path, flags)
    except (ConfigError, KeysError) as error:
        print(f"stet: {error}", file=sys.stderr)
        return 2
    return 0


def _create(path: Path, flags: argparse.Namespace) -> None:
    limits: dict[str, int] = {}
    for name in _LIMITS:
        text = getattr(flags, name)
        if text is not None:
            try:
                limits[name] = integer(1, MAX_LIMIT)(text)
            except ValueError as error:
                raise ConfigError(f"--{name.replace('_', '-')}: {text!r} is not {error}") from None
    roles = list(dict.fromkeys(flags.role or ["infer"]))
    key = create_key(path, flags.name, roles, limits)
    print(key)
    print(f"Only its hash is kept, in {path}: this is the one time that the key is shown.", file=sys.stderr)


def _table(path: Path) -> str:
    rows = [("name", "roles", *_LIMITS)]
    for entry in parse_keys(read_keys(path)):
        limits = (getattr(entry, name) for name in _LIMITS)
        rows.append((entry.name, " ".join(sorted(entry.roles)), *("-" if v is None else str(v) for v in limits)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
