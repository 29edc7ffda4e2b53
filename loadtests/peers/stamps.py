"""A stamp in a folder says what its content was made from, so that a second run makes nothing again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def up_to_date(folder: Path, inputs: Mapping[str, object]) -> Iterator[bool]:
    """Yields whether `folder` was made from `inputs` (JSON values); if not, the block makes it, and is then stamped.

    An exception in the block leaves no stamp, so that the next run tries again.
    """
    stamp = folder / ".made-from.json"
    wanted = json.dumps(inputs, sort_keys=True, indent=1) + "\n"
    fresh = stamp.is_file() and stamp.read_text() == wanted
    if not fresh:
        folder.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
    yield fresh
    if not fresh:
        stamp.write_text(wanted)
