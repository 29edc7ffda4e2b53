"""The fake model's arithmetic, and the right answer for a request: a pure function of it, without blocks or batches."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.request import FinishReason, Request, SamplingParams

VOCAB_SIZE = 17
MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit number in which every bit depends on all the values and on their order."""
    x = 0x9E3779B97F4A7C15
    for value in values:
        x = ((x ^ value) * 0xBF58476D1CE4E5B9) & MASK
        x ^= x >> 29
    return x


def salt_number(tenant: str, salt: str) -> int:
    """Both as if they were an adapter: K and V depend on them, so that a block found under others is wrong."""
    return sum(ord(letter) << (8 * index) for index, letter in enumerate(f"{tenant}/{salt}"))


def extend(context: int, value: int) -> int:
    """The digest of a context with one more stored value; `context` is 0 when nothing is stored yet."""
    return (context * 0x94D049BB133111EB + value + 1) & MASK


def stored_value(context: int, position: int, token_id: int, salt: int) -> int:
    """What the fake model stores at a position: its "K and V", which depend on everything before it."""
    return mix(context, position, token_id, salt)


def draw(context: int, request: Request, output_index: int, eos_token_ids: tuple[int, ...]) -> int:
    """The token that follows a context. Ending tokens cannot be drawn before min_new_tokens."""
    params = request.params
    token_id = mix(context, params.seed, request.choice, output_index) % VOCAB_SIZE
    if output_index < params.min_new_tokens:
        while token_id in ending_tokens(params, eos_token_ids):
            token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def ending_tokens(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids + eos_token_ids


@dataclass(frozen=True, slots=True)
class Answer:
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_token_id: int | None


def answer(request: Request, max_model_len: int, eos_token_ids: tuple[int, ...]) -> Answer:
    """All the tokens of a request from its prompt on, and how it ends."""
    salt, context, output = salt_number(request.tenant, request.cache_salt), 0, []
    for position, token_id in enumerate(request.prompt_token_ids):
        context = extend(context, stored_value(context, position, token_id, salt))
    while True:
        token_id = draw(context, request, len(output), eos_token_ids)
        output.append(token_id)
        position = len(request.prompt_token_ids) + len(output) - 1
        ends = token_id in ending_tokens(request.params, eos_token_ids)
        if ends and len(output) > request.params.min_new_tokens:
            return Answer(tuple(output), FinishReason.STOP, token_id)
        if len(output) == request.params.max_new_tokens or position + 1 == max_model_len:
            return Answer(tuple(output), FinishReason.LENGTH, None)
        context = extend(context, stored_value(context, position, token_id, salt))
