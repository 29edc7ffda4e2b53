"""A whole service over a fake engine process, and books that are checked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from server.engine.config import EngineConfig
from server.engine.messages import StepStats
from server.generation import ChoiceFinished, Completed, Event, GenerationRequest, Started, TextDelta
from server.metrics import Metrics
from server.service import Service, ServiceSettings
from server.supervisor import Limits, Supervisor
from tests.server.text import tokenizers as kinds

FAKE_ENGINE = Path(__file__).parent / "fake_engine.py"
TOKENIZER: Tokenizer = kinds.byte_level()
VOCABULARY = 362  # the model's: more than its tokenizer knows


def command(**options: Any) -> list[str]:
    """How to start a fake engine with these options."""
    return [sys.executable, str(FAKE_ENGINE), json.dumps(options)]


def model_folder(folder: Path) -> Path:
    """A folder with a small byte-level tokenizer and a chat template."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(TOKENIZER.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": kinds.CHATML}), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5}), encoding="utf-8")
    return folder


class Books(Metrics):
    """The real metrics, and sums of what was reported, to be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.sampled = 0
        self.delivered = 0
        self.discarded: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.inter_tokens = 0
        self.downs = 0

    def engine_step(self, stats: StepStats) -> None:
        super().engine_step(stats)
        self.sampled += stats.sampled_tokens
        self.discarded["pipeline"] += stats.pipeline_discarded_tokens

    def engine_down(self) -> None:
        super().engine_down()
        self.downs += 1

    def tokens_delivered(self, count: int) -> None:
        super().tokens_delivered(count)
        self.delivered += count

    def tokens_discarded(self, reason: str, count: int) -> None:
        super().tokens_discarded(reason, count)
        self.discarded[reason] += count

    def inter_token(self, seconds: float, count: int = 1, exemplar: dict[str, str] | None = None) -> None:
        super().inter_token(seconds, count, exemplar)
        self.inter_tokens += count

    def request_finished(self, endpoint: str, outcome: str, **numbers: Any) -> None:
        super().request_finished(endpoint, outcome, **numbers)
        self.outcomes[outcome] += 1

    @property
    def balanced(self) -> bool:
        """Whether every token that was drawn was delivered or discarded."""
        return self.sampled == self.delivered + sum(self.discarded.values())


class Server:
    """A service and the parts that a test looks into."""

    def __init__(self, service: Service, supervisor: Supervisor, books: Books) -> None:
        self.service = service
        self.supervisor = supervisor
        self.books = books

    @property
    def client(self) -> Any:
        return self.service._client

    def is_clean(self) -> bool:
        """Whether nothing of any request is left."""
        return (
            self.service.num_open == 0
            and not self.service._jobs
            and self.client.num_open == 0
            and not self.client._at_engine
        )

    async def settled(self, seconds: float = 3.0) -> None:
        """Wait until the books balance: tokens of aborted requests may still be on their way."""
        async with asyncio.timeout(seconds):
            while not self.books.balanced:  # noqa: ASYNC110 - the books have no event
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    settings: ServiceSettings | None = None,
    limits: Limits | None = None,
    wait: bool = True,
    **options: Any,
) -> AsyncIterator[Server]:
    """A running service whose fake engine has these options."""
    options.setdefault("model_path", str(model_folder(folder / "model")))
    options.setdefault("vocab_size", VOCABULARY)
    options.setdefault("state_path", str(folder / "starts"))
    books = Books()
    config = EngineConfig(heartbeat_seconds=0.02)
    supervisor = Supervisor(config, books, command=command(**options), limits=limits or Limits(tick=0.02))
    service = Service(supervisor, books, settings)
    await service.start()
    try:
        if wait:
            async with asyncio.timeout(20):
                await service.ready()
        yield Server(service, supervisor, books)
    finally:
        await service.stop()


Test = Callable[[Server], Coroutine[Any, Any, None]]


def run(
    folder: Path,
    test: Test,
    seconds: float = 30.0,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    **options: Any,
) -> None:
    """Run a test against a service, then look whether anything is left of its requests."""

    async def main() -> None:
        async with asyncio.timeout(seconds), serving(folder, **options) as server:
            await test(server)
            assert server.is_clean()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def encode(text: str) -> list[int]:
    """The model folder's tokens of a text."""
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def decode(ids: list[int]) -> str:
    """The text of tokens."""
    text: str = TOKENIZER.decode(ids)
    return text


class Answer:
    """What the events of one request add up to; checks their order on the way."""

    def __init__(self, num_choices: int = 1) -> None:
        self.started: Started | None = None
        self.texts = [""] * num_choices
        self.ids: list[list[int]] = [[] for _ in range(num_choices)]
        self.ends: list[ChoiceFinished | None] = [None] * num_choices
        self.completed: Completed | None = None
        self.deltas: list[TextDelta] = []

    def take(self, event: Event) -> None:
        assert self.completed is None
        if isinstance(event, Started):
            assert self.started is None
            self.started = event
            return
        assert self.started is not None
        if isinstance(event, TextDelta):
            assert self.ends[event.index] is None
            assert event.text or event.token_ids
            self.texts[event.index] += event.text
            self.ids[event.index] += event.token_ids
            self.deltas.append(event)
        elif isinstance(event, ChoiceFinished):
            assert self.ends[event.index] is None
            self.ends[event.index] = event
        else:
            assert all(self.ends)
            self.completed = event

    @property
    def text(self) -> str:
        return self.texts[0]

    @property
    def end(self) -> ChoiceFinished:
        end = self.ends[0]
        assert end is not None
        return end


async def collect(service: Service, request: GenerationRequest) -> Answer:
    """All events of a request."""
    answer = Answer(request.n)
    async for event in service.generate(request):
        answer.take(event)
    assert answer.completed is not None
    return answer


def ids_request(ids: Sequence[int], **options: Any) -> GenerationRequest:
    """A request for tokens."""
    return GenerationRequest(prompt_token_ids=tuple(ids), **options)
