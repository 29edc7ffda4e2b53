"""One admitted request: it turns what the engine sends into events, decides its end, and keeps its part of the books.

Every token that arrives is counted once, as delivered or as discarded. The first cause of an end wins: a stop string
ends its choice even if the engine has gone on, and an end by the engine stands even if the server is being stopped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.client import Arrival, EngineClient, Mailbox
from server.details import DetailReader
from server.engine.messages import FirstToken
from server.engine.request import FinishReason, SamplingParams
from server.generation import ChoiceFinished, Event, GenerationRequest, PromptLogprobs, TextDelta, Timings, Usage
from server.text.detokenizer import Detokenizer
from server.text.stops import StopMatcher
from server.text.tokenizer import ModelText

if TYPE_CHECKING:
    from server.metrics import Metrics


class Choice:
    """One choice on its way from token ids to text. `num_tokens` counts through the token that completed its text."""

    __slots__ = ("detokenizer", "finish_reason", "index", "last_at", "matcher", "min_new_tokens", "num_tokens")

    def __init__(self, index: int, detokenizer: Detokenizer, matcher: StopMatcher | None, min_new_tokens: int) -> None:
        self.index = index
        self.detokenizer = detokenizer
        self.matcher = matcher
        self.min_new_tokens = min_new_tokens
        self.num_tokens = 0
        self.last_at: float | None = None
        self.finish_reason: FinishReason | None = None

    def text_of(self, token_ids: list[int]) -> tuple[str, int]:
        """The text of new tokens, and how many of them were used: fewer than given if a stop string was completed."""
        matcher = self.matcher
        if matcher is None:
            self.num_tokens += len(token_ids)
            return self.detokenizer.push(token_ids), len(token_ids)
        text = ""
        for used, token_id in enumerate(token_ids, 1):
            self.num_tokens += 1
            text += matcher.push(self.detokenizer.push((token_id,)), self.num_tokens >= self.min_new_tokens)
            if matcher.matched is not None:
                return text, used
        return text, len(token_ids)

    def rest(self) -> str:
        """What was held back, once no token will follow. It may still complete a stop string."""
        text = self.detokenizer.flush()
        if self.matcher is None:
            return text
        text = self.matcher.push(text, self.num_tokens >= self.min_new_tokens)
        return text if self.matcher.matched is not None else text + self.matcher.flush()


class Job:
    """One request from its admission on: its choices, its times, its end. Only `take` and `cancel` change it."""

    def __init__(self, request: GenerationRequest, began: float, metrics: Metrics) -> None:
        self.mailbox: Mailbox | None = None
        self.cancelled = False
        self.expired = False
        self.prompt_tokens = 0
        self.error: str | None = None
        self.refused = False
        self.exemplar: dict[str, str] | None = None  # of the latencies' histograms, where requests are traced
        self._request = request
        self._metrics = metrics
        self._began = began
        self._submitted = began
        self._choices: list[Choice] = []
        self._num_open = request.n
        self._details: DetailReader | None = None
        self._first: FirstToken | None = None
        self._first_at: float | None = None
        self._last_at = began

    def prepare(self, text: ModelText, params: SamplingParams, prompt_ids: list[int], now: float) -> None:
        """Before the request goes to the engine."""
        request = self._request
        self.prompt_tokens = len(prompt_ids)
        self._submitted = now
        if params.wants_details:
            self._details = DetailReader(text, params, prompt_ids)
        stops = StopMatcher(request.stop, request.include_stop) if request.stop else None
        for index in range(request.n):
            matcher = stops.fresh() if stops is not None else None
            detokenizer = text.detokenizer(request.skip_special_tokens, continues=True)
            self._choices.append(Choice(index, detokenizer, matcher, params.min_new_tokens))

    @property
    def ended(self) -> bool:
        """Whether every choice has had its terminal event."""
        return self._num_open == 0

    @property
    def grammar_param(self) -> str | None:
        """The parameter that its grammar comes from; None without one."""
        request = self._request
        return request.grammar[0] if request.grammar is not None else "tools" if request.tools else None

    @property
    def num_tokens(self) -> int:
        """Tokens delivered, of all choices."""
        return sum(choice.num_tokens for choice in self._choices)

    @property
    def outcome(self) -> str:
        """How the request ended as a whole: an error of any choice, else how its first one ended."""
        reasons = [choice.finish_reason for choice in self._choices if choice.finish_reason is not None]
        if FinishReason.ERROR in reasons:
            return FinishReason.ERROR.value
        return reasons[0].value if reasons else FinishReason.CANCELLED.value

    def cancel(self, client: EngineClient) -> None:
        """The server ends it: what has arrived is still delivered, then CANCELLED."""
        self.cancelled = True
        if self.mailbox is not None:
            client.end(self.mailbox, FinishReason.CANCELLED)

    def expire(self, client: EngineClient) -> None:
        """Its deadline has passed: what has arrived is still delivered, then DEADLINE."""
        self.expired = True
        if self.mailbox is not None:
            client.end(self.mailbox, FinishReason.DEADLINE)

    def take(self, arrivals: list[Arrival], client: EngineClient) -> list[Event]:
        """The events of what has arrived."""
        events: list[Event] = []
        for arrival in arrivals:
            choice = self._choices[arrival.index]
            if arrival.token_ids:
                self._note_times(choice, arrival)
            if choice.matcher is None and arrival.finish_reason is None:
                # Nearly all tokens take this way: every microsecond on it is paid once a token and stream.
                token_ids = arrival.token_ids
                choice.num_tokens += len(token_ids)
                self._metrics.tokens_delivered(len(token_ids))
                text = choice.detokenizer.push(token_ids)
                if self._details is None:
                    events.append(TextDelta(choice.index, text, tuple(token_ids)))
                else:
                    self._details.append_prompt(arrival)
                    if token_ids:
                        events.append(TextDelta(choice.index, text, *self._details.of(arrival, len(token_ids))))
            else:
                self._take_with_care(choice, arrival, events, client)
        return events

    def _take_with_care(self, choice: Choice, arrival: Arrival, events: list[Event], client: EngineClient) -> None:
        """Where the choice may end, by a stop string or by the engine."""
        if self._details is not None:
            self._details.append_prompt(arrival)
        token_ids = arrival.token_ids
        reason, ending = arrival.finish_reason, arrival.stop_token_id
        # The token that ends a choice has no text of its own in the output.
        spoken = token_ids[:-1] if ending is not None else token_ids
        text, used = choice.text_of(spoken)
        stopped = choice.matcher.matched if choice.matcher is not None else None
        if stopped is None and reason is not None:
            if ending is not None:
                choice.num_tokens += 1
                used += 1
            text += choice.rest()
            stopped = choice.matcher.matched if choice.matcher is not None else None
        if token_ids:
            self._metrics.tokens_delivered(used)
            if used < len(token_ids):
                self._metrics.tokens_discarded("stop", len(token_ids) - used)
        if text or used:
            if self._details is None:
                delivered = token_ids if used == len(token_ids) else token_ids[:used]
                events.append(TextDelta(choice.index, text, tuple(delivered)))
            else:
                events.append(TextDelta(choice.index, text, *self._details.of(arrival, used)))
        if stopped is not None:
            if reason is None and self.mailbox is not None:
                client.stop_choice(self.mailbox, choice.index)
            self._finish(choice, events, FinishReason.STOP, stopped)
        elif reason is not None:
            self.error = self.error or arrival.error
            self.refused |= arrival.refused
            self._finish(choice, events, reason, ending if reason is FinishReason.STOP else None, arrival.error)

    def _finish(
        self,
        choice: Choice,
        events: list[Event],
        reason: FinishReason,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> None:
        choice.finish_reason = reason
        self._num_open -= 1
        events.append(ChoiceFinished(choice.index, reason, stop_reason, error))

    def _note_times(self, choice: Choice, arrival: Arrival) -> None:
        count = len(arrival.token_ids)
        before = choice.last_at
        choice.last_at = self._last_at = arrival.last_at
        if before is not None:
            self._metrics.inter_token(arrival.last_at - before, count, self.exemplar)
            return
        if self._first_at is None:
            self._first_at, self._first = arrival.first_at, arrival.first
            self._metrics.first_token(arrival.first_at - self._began, self.exemplar)
        if count > 1:
            self._metrics.inter_token(arrival.last_at - arrival.first_at, count - 1, self.exemplar)

    def prompt_logprobs(self) -> PromptLogprobs | None:
        """Those of the prompt, where they were asked for; whole once there is a first token."""
        return self._details.prompt() if self._details is not None else None

    def usage(self) -> Usage:
        """Token counts of the whole request."""
        return Usage(self.prompt_tokens, self.num_tokens, self._first.cached_tokens if self._first is not None else 0)

    def timings(self, now: float) -> Timings:
        """Where the time went, on one clock: queue, prefill and decode add up to the time of the last token."""
        waited = self._submitted - self._began
        if self._first_at is None:
            return Timings(1e3 * (now - self._began), 0.0, 0.0, 1e3 * (now - self._began))
        until_first = self._first_at - self._began
        queue = min(until_first, waited + (self._first.queue_seconds if self._first is not None else 0.0))
        return Timings(
            1e3 * queue, 1e3 * (until_first - queue), 1e3 * (self._last_at - self._first_at), 1e3 * (now - self._began)
        )
