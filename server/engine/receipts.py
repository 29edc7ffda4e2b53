"""The quality receipt of the mode that is served, if the model's folder has one (models/receipt.py).

A receipt is shown, never trusted: it may have come with a model from elsewhere. So it is read as typed data of bounded
size, and one that is damaged or about other weights is ignored, with a line in the log.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from models.receipt import FORMAT, Receipt, receipt_name
from server.engine.identity import Identity

logger = logging.getLogger("stet.engine")

MAX_BYTES = 64 * 1024


def find_receipt(folder: Path, identity: Identity) -> dict[str, Any] | None:
    """The fields of the receipt that belongs to what is served, as JSON values; None if there is none."""
    file = folder / receipt_name(identity.quantization, identity.kv_cache_dtype)
    if not file.is_file():
        return None
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        receipt = msgspec.json.decode(data, type=Receipt)
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        logger.warning("the quality receipt %s is ignored: %s", file.name, error)
        return None
    about = (receipt.format, receipt.weights_hash, receipt.quantization)
    if about != (FORMAT, identity.weights_hash, identity.quantization):
        logger.warning(
            "the quality receipt %s is ignored: it is about other weights or another mode; make it anew: stet evaluate",
            file.name,
        )
        return None
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(receipt))  # without what Receipt does not know
    return fields
