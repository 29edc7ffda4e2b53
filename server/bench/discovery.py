"""What is served at an address, found out by asking: the dialect, the model, its context, its tokens a word."""

from __future__ import annotations

import json
from typing import Any

from server.bench.client import Target, exchange
from server.bench.dialect import Ask, Dialect
from server.bench.measure import Record, send

_PROBE_SECONDS = 60.0


class BenchError(Exception):
    """A server that cannot be measured, and why. One line."""


async def discover(target: Target, api: str, model: str | None) -> tuple[Dialect, dict[str, Any], int | None]:
    """The dialect, what the server says of itself, and its context in tokens, where it says so. Raises BenchError.

    /info is this project's; other servers list their models at /v1/models, some of them with the context.
    """
    info = await _get(target, "/info")
    if info is not None and "identity" in info:
        identity = info["identity"]
        names = ("model", "dtype", "quantization", "kv_cache_dtype", "device", "instruction_set", "threads", "versions")
        server = {name: identity.get(name) for name in names} | {"weights_hash": identity.get("weights_hash")}
        dialect = Dialect("generate" if api == "auto" else api, model or info["model"])
        return dialect, server, int(info["context_length"])
    listed = await _get(target, "/v1/models")
    models = (listed or {}).get("data") or []
    if not models and (api == "auto" or model is None) and api != "generate":
        raise BenchError("neither /info nor /v1/models says what is served there: name it with --model and --api")
    first: dict[str, Any] = next((one for one in models if model in (None, one.get("id"))), {})
    name = model or str(first.get("id", ""))
    meta = first.get("meta") or {}
    context = first.get("max_model_len") or meta.get("n_ctx") or meta.get("n_ctx_train")
    return Dialect("completions" if api == "auto" else api, name), {"model": name}, int(context) if context else None


async def _get(target: Target, path: str) -> dict[str, Any] | None:
    """A JSON object, or None if the server has none there. Raises BenchError if a key is needed."""
    reply = await exchange(target, target.request("GET", path))
    if reply.status in (401, 403):
        raise BenchError(f"the server answers {reply.status}: it wants a key (--api-key, or STET_BENCH_KEY)")
    if reply.status in (502, 503, 504):
        raise BenchError(f"the server answers {reply.status}: it is not ready")
    if reply.status != 200:
        return None
    try:
        found = json.loads(reply.body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


async def tokens_per_word(target: Target, dialect: Dialect, ask: Ask) -> float:
    """One request, which also shows that the server answers: prompt tokens a word, as the server counts them.

    1.3, which is common for English, where it does not count. Raises BenchError if it does not complete.
    """
    record = Record(0.0, ask.max_tokens)
    await send(target, dialect, ask, record, 0.0, _PROBE_SECONDS)
    if not record.completed:
        raise BenchError(f"a first request to {dialect.path} failed: {record.error}")
    return (record.usage.prompt_tokens / len(ask.prompt.split())) or 1.3
