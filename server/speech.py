"""What a chat model says, thinks and calls, told apart in the text of each choice."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable

from server.generation import ChoiceFinished, Event, TextDelta, ToolCallDelta
from server.text.tools import CallDelta, ReasoningParser, ToolFormat, ToolParser


class Speech:
    """The choices of one request. `split` takes its events in order, and each once."""

    def __init__(self, num_choices: int, form: ToolFormat | None, thinks: bool, inside: bool) -> None:
        """form: how calls are written, None where there are no tools. thinks: whether the model may reason before it
        answers; inside: whether the prompt's end has begun that already."""
        self._thoughts = [ReasoningParser(inside) if thinks else None for _ in range(num_choices)]
        self._calls = [None if form is None else ToolParser(form) for _ in range(num_choices)]

    def split(self, events: Iterable[Event]) -> list[Event]:
        """The same events, with `reasoning` and `calls` taken out of their texts."""
        found: list[Event] = []
        for event in events:
            if isinstance(event, TextDelta):
                changed = self._delta(event, *self._said(event.index, event.text))
                if changed.text or changed.token_ids or changed.reasoning or changed.calls:
                    found.append(changed)
            elif isinstance(event, ChoiceFinished):
                last = self._delta(TextDelta(event.index, "", ()), *self._rest(event.index))
                if last.text or last.reasoning or last.calls:
                    found.append(last)
                parser = self._calls[event.index]
                called = parser is not None and parser.num_calls > 0
                found.append(dataclasses.replace(event, called=called))
            else:
                found.append(event)
        return found

    def _said(self, index: int, text: str) -> tuple[str, str, list[CallDelta]]:
        """(answer, reasoning, calls) that new text makes certain."""
        thoughts, parser = self._thoughts[index], self._calls[index]
        reasoning = ""
        if thoughts is not None:
            reasoning, text = thoughts.push(text)
        calls: list[CallDelta] = []
        if parser is not None:
            text, calls = parser.push(text)
        return text, reasoning, calls

    def _rest(self, index: int) -> tuple[str, str, list[CallDelta]]:
        thoughts, parser = self._thoughts[index], self._calls[index]
        reasoning = text = ""
        calls: list[CallDelta] = []
        if thoughts is not None:
            reasoning, text = thoughts.flush()
        if parser is not None:
            text, calls = parser.push(text)
            rest, more = parser.flush()
            text, calls = text + rest, calls + more
        return text, reasoning, calls

    @staticmethod
    def _delta(event: TextDelta, text: str, reasoning: str, calls: list[CallDelta]) -> TextDelta:
        made = tuple(
            ToolCallDelta(
                call.index,
                f"call_{secrets.token_hex(12)}" if call.name is not None else None,
                call.name,
                call.arguments,
            )
            for call in calls
        )
        return dataclasses.replace(event, text=text, reasoning=reasoning, calls=made)
