"""Whether a request can run here at all, however long it waits."""

from __future__ import annotations

from server.engine.config import SchedulerConfig
from server.engine.request import Request


class AdmissionError(Exception):
    """A request that could never run here. The message has the numbers, or says what is wrong with its grammar: it is
    for the client."""


def token_limit(request: Request, config: SchedulerConfig) -> int:
    """The number of tokens, prompt and output, at which a request ends. Raises AdmissionError if it can never run.

    A request that passes can run alone to its end: the pool has blocks for all of it.
    """
    known = request.num_known_tokens
    if not request.prompt_token_ids:
        raise AdmissionError("the prompt is empty: at least one token is needed")
    if known >= config.max_model_len:
        raise AdmissionError(
            f"{known} tokens leave no room for a new one: prompt and output have {config.max_model_len} at most"
        )
    limit = min(request.num_prompt_tokens + request.params.max_new_tokens, config.max_model_len)
    if known >= limit:
        raise AdmissionError(
            f"nothing is left to generate: {len(request.output_token_ids)} of "
            f"{request.params.max_new_tokens} new tokens are there"
        )
    # The last token's K and V are never needed: nothing comes after it.
    num_blocks = -(-(limit - 1) // config.block_size)
    if num_blocks > config.num_blocks:
        raise AdmissionError(
            f"{limit} tokens ({request.num_prompt_tokens} of the prompt, the rest new) need {num_blocks} blocks of "
            f"{config.block_size} tokens, and the cache has {config.num_blocks}: ask for fewer tokens"
        )
    return limit
