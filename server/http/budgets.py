"""What an API key has left of its limits: requests and tokens a minute, and choices at once."""

from __future__ import annotations

import math

from server.generation import Problem
from server.http.errors import HttpError
from server.keys import KeyEntry
from server.rates import DrainRate, TokenBucket


class Budget:
    """One key's use of its limits. Times are seconds of a monotonic clock, given by the caller.

    requests_per_minute  every request but probes and metrics, counted before its body is read
    tokens_per_minute    prompt and output, counted as they were used when a request ends; while more was used than is
                         allowed, no further request may begin
    max_concurrent       choices that are generated or wait for it
    """

    def __init__(self, entry: KeyEntry | None, now: float) -> None:
        """entry: None is without limits."""
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        self._max_concurrent: int | None = None
        self._num_open = 0
        self._drain = DrainRate()
        if entry is not None:
            self.change(entry, now)

    def change(self, entry: KeyEntry, now: float) -> None:
        """Other limits from now on. What was used of a limit that stays is not forgotten."""
        self._requests = _changed(self._requests, entry.requests_per_minute, now)
        self._tokens = _changed(self._tokens, entry.tokens_per_minute, now)
        self._max_concurrent = entry.max_concurrent

    def ask(self, now: float, *, generates: bool) -> None:
        """Count a request. Raises HttpError (429) if it is one too many; then it is not counted."""
        if self._requests is not None and (wait := self._requests.wait(1, now)) > 0:
            limit = self._requests.per_minute
            raise _limited(f"This API key may send {limit} requests a minute.", wait)
        # One whole token must be left: a bucket that was just paid off is not yet worth a request.
        if generates and self._tokens is not None and (wait := self._tokens.wait(1, now)) > 0:
            limit = self._tokens.per_minute
            raise _limited(f"This API key may use {limit} tokens a minute, prompt and output.", wait)
        if self._requests is not None:
            self._requests.take(1, now)

    def enter(self, choices: int, now: float) -> None:
        """Choices begin: `leave` when they have ended. Raises HttpError (429) if they are too many at once."""
        limit = self._max_concurrent
        if limit is not None and self._num_open + choices > limit:
            if choices > limit:
                text = f"This API key may have {limit} choices at once, and the request asks for {choices}."
                raise HttpError("forbidden", [Problem("n", text, choices, f"up to {limit} choices")])
            over = self._num_open + choices - limit
            raise _limited(f"This API key may have {limit} choices at once.", self._drain.wait(over, now))
        self._num_open += choices

    def leave(self, choices: int, now: float) -> None:
        """Choices that entered have ended."""
        self._num_open -= choices
        self._drain.freed(choices, now)

    def spend(self, tokens: int, now: float) -> None:
        """Tokens were used."""
        if self._tokens is not None:
            self._tokens.take(tokens, now)


def _changed(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    bucket.change(per_minute, now)
    return bucket


def _limited(text: str, wait: float) -> HttpError:
    seconds = max(1, math.ceil(wait))
    problem = Problem(None, f"{text} Come back in {seconds} s.")
    return HttpError("rate_limited", [problem], {"retry-after": str(seconds)})
