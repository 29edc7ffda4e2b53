"""The client alone, over a supervisor that the test plays: routing, mailboxes, and who is replayed after a crash."""

from __future__ import annotations

import asyncio
from typing import Any

from server.client import CRASHED_TWICE, ENGINE_FAILED, PROBATION_TOKENS, EngineClient, Mailbox
from server.engine.messages import Abort, Delta, FirstToken, StepOutput, Submit, ToEngine
from server.engine.request import FinishReason, SamplingParams
from tests.server.harness import Books


class PlayedSupervisor:
    """Records what is sent; the test says what comes back."""

    def __init__(self) -> None:
        self.state = "ready"
        self.writable = True
        self.listener: Any = None
        self.sent: list[ToEngine] = []

    def send(self, message: ToEngine) -> bool:
        self.sent.append(message)
        return True

    def take(self) -> list[ToEngine]:
        sent, self.sent = self.sent, []
        return sent

    def crash(self) -> None:
        self.state = "restarting"
        self.listener.engine_down()

    def restart(self) -> None:
        self.state = "ready"
        self.listener.engine_ready(None)


def make() -> tuple[PlayedSupervisor, EngineClient, Books]:
    supervisor, books = PlayedSupervisor(), Books()
    return supervisor, EngineClient(supervisor, books), books  # type: ignore[arg-type]


def open_one(client: EngineClient, prompt: list[int], **options: Any) -> Mailbox:
    return client.open(prompt, SamplingParams(max_new_tokens=100, seed=7), **options)


def submits(sent: list[ToEngine]) -> list[Submit]:
    return [message for message in sent if isinstance(message, Submit)]


def step(client: EngineClient, *deltas: Delta) -> None:
    client.engine_output(StepOutput(list(deltas)))


def test_a_slow_readers_deltas_merge() -> None:
    supervisor, client, _ = make()
    mailbox = open_one(client, [1])
    (submit,) = submits(supervisor.take())
    first = FirstToken(0, 0.1, 0.2)
    step(client, Delta(submit.request_id, [0], first=first))
    for token in range(1, 1000):
        step(client, Delta(submit.request_id, [token]))
    step(client, Delta(submit.request_id, [1000], FinishReason.STOP, 1000))
    (arrival,) = asyncio.run(mailbox.receive())
    assert arrival.token_ids == list(range(1001))
    assert (arrival.finish_reason, arrival.stop_token_id, arrival.first) == (FinishReason.STOP, 1000, first)
    assert client.num_open == 0
    assert mailbox.take() == []


def test_readers_are_woken_once_a_step_after_all_mailboxes_are_filled() -> None:
    async def main() -> None:
        supervisor, client, _ = make()
        mailboxes = [open_one(client, [i]) for i in range(5)]
        ids = [submit.request_id for submit in submits(supervisor.take())]
        wakes = 0

        async def read(mailbox: Mailbox) -> None:
            nonlocal wakes
            (arrival,) = await mailbox.receive()
            wakes += 1
            assert arrival.token_ids == [1, 2]

        readers = [asyncio.create_task(read(mailbox)) for mailbox in mailboxes]
        await asyncio.sleep(0)
        step(client, *[Delta(i, [1]) for i in ids], *[Delta(i, [2]) for i in ids])
        await asyncio.gather(*readers)
        assert wakes == 5

    asyncio.run(main())


def test_choices_share_a_mailbox_and_keep_their_numbers() -> None:
    supervisor, client, _ = make()
    mailbox = open_one(client, [1, 2], num_choices=3)
    sent = submits(supervisor.take())
    assert [submit.choice for submit in sent] == [0, 1, 2]
    assert len({submit.request_id for submit in sent}) == 3
    step(client, Delta(sent[2].request_id, [5]), Delta(sent[0].request_id, [6]))
    assert {arrival.index: arrival.token_ids for arrival in mailbox.take()} == {2: [5], 0: [6]}
    client.stop_choice(mailbox, 2)
    assert supervisor.take() == [Abort([sent[2].request_id])]


def test_closing_aborts_and_counts_what_was_not_read() -> None:
    supervisor, client, books = make()
    mailbox = open_one(client, [1])
    (submit,) = submits(supervisor.take())
    step(client, Delta(submit.request_id, [1, 2, 3]))
    client.close(mailbox)
    client.close(mailbox)
    assert supervisor.take() == [Abort([submit.request_id])]
    step(client, Delta(submit.request_id, [4]))
    assert books.discarded == {"abort": 4}
    assert client.num_open == 0


def test_tokens_after_a_stop_string_are_discarded_as_such() -> None:
    supervisor, client, books = make()
    mailbox = open_one(client, [1])
    (submit,) = submits(supervisor.take())
    client.stop_choice(mailbox, 0)
    step(client, Delta(submit.request_id, [4, 5]))
    client.close(mailbox)
    assert books.discarded == {"stop": 2}
    assert supervisor.take() == [Abort([submit.request_id])]


def test_before_the_engine_is_ready_requests_wait_and_keep_their_order() -> None:
    supervisor, client, _ = make()
    supervisor.state = "loading"
    first, second, third = open_one(client, [1]), open_one(client, [2]), open_one(client, [3])
    client.close(second)
    assert supervisor.take() == []
    supervisor.restart()
    assert [submit.prompt_token_ids for submit in submits(supervisor.take())] == [[1], [3]]
    client.close(first)
    client.close(third)


def test_an_engine_that_does_not_read_gets_no_new_requests() -> None:
    supervisor, client, _ = make()
    supervisor.writable = False
    waiting, gone = open_one(client, [1]), open_one(client, [2])
    client.close(gone)
    assert supervisor.take() == []
    supervisor.writable = True
    client.engine_writable()
    assert [submit.prompt_token_ids for submit in submits(supervisor.take())] == [[1]]
    client.close(waiting)


def test_a_single_request_goes_on_where_its_last_token_stood() -> None:
    supervisor, client, _ = make()
    mailbox = open_one(client, [1, 2], priority=-3, tenant="t", cache_salt="s")
    (before,) = submits(supervisor.take())
    step(client, Delta(before.request_id, [10, 11]))
    supervisor.crash()
    assert supervisor.take() == []
    supervisor.restart()
    (after,) = submits(supervisor.take())
    assert after.output_token_ids == [10, 11]
    assert after.request_id != before.request_id
    same = ("prompt_token_ids", "params", "choice", "priority", "tenant", "cache_salt", "arrival")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    step(client, Delta(after.request_id, [12, 13, 14], FinishReason.LENGTH))
    (arrival,) = mailbox.take()
    assert arrival.token_ids == [10, 11, 12, 13, 14]


def test_suspects_are_replayed_one_by_one_and_new_requests_wait() -> None:
    supervisor, client, _ = make()
    mailboxes = [open_one(client, [i]) for i in range(3)]
    supervisor.take()
    supervisor.crash()
    mailboxes.append(open_one(client, [3]))
    supervisor.restart()
    for i in range(3):
        (submit,) = submits(supervisor.take())
        assert submit.prompt_token_ids == [i]
        for token in range(PROBATION_TOKENS):
            assert supervisor.take() == []
            step(client, Delta(submit.request_id, [token]))
    # The last of them stays; the innocent and the new one join it, in order of arrival, with what they have.
    rest = submits(supervisor.take())
    assert [submit.prompt_token_ids for submit in rest] == [[0], [1], [3]]
    assert [submit.output_token_ids for submit in rest] == [[0, 1, 2], [0, 1, 2], []]
    assert client.num_open == 4


def test_the_one_in_flight_in_two_crashes_ends_and_the_innocent_do_not() -> None:
    supervisor, client, _ = make()
    mailboxes = [open_one(client, [i]) for i in range(3)]
    supervisor.take()
    supervisor.crash()
    supervisor.restart()
    (first,) = submits(supervisor.take())
    step(client, Delta(first.request_id, [1] * PROBATION_TOKENS))
    (poison,) = submits(supervisor.take())
    assert poison.prompt_token_ids == [1]
    supervisor.crash()
    (arrival,) = mailboxes[1].take()
    assert (arrival.finish_reason, arrival.error) == (FinishReason.ERROR, CRASHED_TWICE)
    supervisor.restart()
    (third,) = submits(supervisor.take())
    assert third.prompt_token_ids == [2]
    step(client, Delta(third.request_id, [5], FinishReason.LENGTH))
    assert [submit.prompt_token_ids for submit in submits(supervisor.take())] == [[0]]


def test_an_innocent_request_survives_many_crashes() -> None:
    supervisor, client, _ = make()
    mailbox = open_one(client, [1])
    for crash in range(5):
        (submit,) = submits(supervisor.take())
        assert len(submit.output_token_ids) == crash * PROBATION_TOKENS
        step(client, Delta(submit.request_id, [1] * PROBATION_TOKENS))
        supervisor.crash()
        supervisor.restart()
    (arrival,) = mailbox.take()
    assert arrival.finish_reason is None
    assert len(arrival.token_ids) == 5 * PROBATION_TOKENS


def test_the_next_suspect_waits_until_an_aborted_one_has_left_the_engine() -> None:
    supervisor, client, _ = make()
    mailboxes = [open_one(client, [i]) for i in range(2)]
    supervisor.take()
    supervisor.crash()
    supervisor.restart()
    (poison,) = submits(supervisor.take())
    client.close(mailboxes[0])
    assert supervisor.take() == [Abort([poison.request_id])]
    supervisor.crash()
    supervisor.restart()
    (other,) = submits(supervisor.take())
    assert other.prompt_token_ids == [1]
    assert mailboxes[1].take() == []


def test_after_an_abort_in_the_middle_an_idle_heartbeat_lets_the_next_suspect_in() -> None:
    supervisor, client, _ = make()
    mailboxes = [open_one(client, [i]) for i in range(2)]
    supervisor.take()
    supervisor.crash()
    supervisor.restart()
    client.close(mailboxes[0])
    assert not submits(supervisor.take()[1:])
    client.engine_idle()
    assert [submit.prompt_token_ids for submit in submits(supervisor.take())] == [[1]]


def test_suspects_that_leave_are_skipped() -> None:
    supervisor, client, _ = make()
    mailboxes = [open_one(client, [i]) for i in range(4)]
    supervisor.take()
    supervisor.crash()
    client.close(mailboxes[0])
    client.close(mailboxes[1])
    supervisor.restart()
    assert [submit.prompt_token_ids for submit in submits(supervisor.take())] == [[2]]
    assert client.num_open == 2


def test_when_the_engine_is_given_up_everything_ends() -> None:
    supervisor, client, _ = make()
    mailboxes = [open_one(client, [i]) for i in range(2)]
    supervisor.crash()
    mailboxes.append(open_one(client, [2]))
    supervisor.state = "failed"
    client.engine_failed("cause")
    mailboxes.append(open_one(client, [3]))
    for mailbox in mailboxes:
        (arrival,) = mailbox.take()
        assert (arrival.finish_reason, arrival.error) == (FinishReason.ERROR, ENGINE_FAILED)
    assert client.num_open == 0


def test_an_end_of_ours_comes_after_what_had_arrived() -> None:
    supervisor, client, books = make()
    mailbox = open_one(client, [1], num_choices=2)
    sent = submits(supervisor.take())
    step(client, Delta(sent[0].request_id, [1], FinishReason.LENGTH), Delta(sent[1].request_id, [2]))
    client.end(mailbox, FinishReason.CANCELLED)
    assert supervisor.take() == [Abort([sent[1].request_id])]
    ends = {arrival.index: (arrival.token_ids, arrival.finish_reason) for arrival in mailbox.take()}
    assert ends == {0: ([1], FinishReason.LENGTH), 1: ([2], FinishReason.CANCELLED)}
    step(client, Delta(sent[1].request_id, [3]))
    assert books.discarded == {"abort": 1}


def test_the_memory_of_aborted_ids_is_bounded() -> None:
    _, client, _ = make()
    for _ in range(5000):
        client.close(open_one(client, [1]))
    assert len(client._aborted) <= 4096
    assert client.num_open == 0
