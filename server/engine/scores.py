"""Log-probabilities and explanations on their way from the engine to an answer: packed, and free of torch."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TokenScore:
    """The natural logarithm of a token's raw probability, and those of the most likely tokens, most likely first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


def score_bytes(count: int) -> int:
    """Bytes of one packed score with `count` alternatives."""
    return 4 + 8 * count


def pack_score(score: TokenScore) -> bytes:
    """float32 logprob, then int32 ids and float32 logprobs of the alternatives."""
    count = len(score.top_ids)
    return struct.pack(f"<f{count}i{count}f", score.logprob, *score.top_ids, *score.top_logprobs)


def unpack_scores(data: bytes, count: int) -> list[TokenScore]:
    """What `pack_score` made, one after the other, each with `count` alternatives."""
    found = []
    for logprob, *rest in struct.iter_unpack(f"<f{count}i{count}f", data):
        found.append(TokenScore(logprob, tuple(rest[:count]), tuple(rest[count:])))
    return found


@dataclass(frozen=True, slots=True)
class Candidate:
    """One token that could have been drawn.

    probability        raw: of the model, before anything that the request asks for
    final_probability  what the filters made of it; 0 where one of them has removed it
    removed_by         the parameter that removed it; None if none did. "weight": its probability beside that of the
                       most likely token is below 2^-36, which counts as none
    start, end         its interval of the integers 0 to total - 1: end - start is its weight, empty where removed
    """

    token_id: int
    probability: float
    final_probability: float
    removed_by: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a token was drawn: floor(random * total / 2^31) lies in its interval.

    position    index of the token in the output; with the seed and the choice it gives `random`, of 31 bits
    total       sum of the weights of all tokens that the filters left
    candidates  the most likely tokens by raw probability, and the drawn one if it is not among them
    """

    token_id: int
    position: int
    random: int
    total: int
    candidates: list[Candidate] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Details:
    """What a step found out about one request beside its tokens.

    scores         packed, of the tokens drawn
    explanations   of the tokens drawn
    prompt_scores  packed, of the prompt's tokens from position `prompt_start` on
    """

    scores: bytes = b""
    explanations: list[Explanation] = field(default_factory=list)
    prompt_start: int = 0
    prompt_scores: bytes = b""
