"""Numbers for a person."""

from __future__ import annotations


def size(num_bytes: int) -> str:
    """Bytes in binary units."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} B"


def count(number: int) -> str:
    """A count, of parameters say."""
    for unit, factor in (("billion", 10**9), ("million", 10**6)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number:,}"
