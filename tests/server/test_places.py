"""Places on a clock of the test's own: who may take how many, how long the rest waits, and what is left over."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.generation import Refusal
from server.places import Places

RUNNING = 8


def fill(places: Places, tenant: str) -> tuple[int, Refusal]:
    """Take places one by one until there is none for this tenant: how many, and what it was told."""
    for taken in range(1000):
        try:
            places.take(1, tenant, RUNNING, 0.0)
        except Refusal as refusal:
            return taken, refusal
    raise AssertionError("no end of places")


def test_one_tenant_leaves_places_for_the_next() -> None:
    """Whoever holds much may not take what is left, whoever comes next may; without a name all of it may be taken."""
    places = Places(max_waiting=52)
    capacity = places.capacity(RUNNING)
    assert capacity == 60
    taken: dict[str, int] = {}
    for tenant in ("flood", "second", "third"):
        taken[tenant], refusal = fill(places, tenant)
        assert (refusal.code, refusal.retry_after) == ("queue_full", 5)
        assert f"holds {taken[tenant]} of 60 places" in str(refusal)
    assert taken["flood"] == capacity * 4 // 5
    assert taken["flood"] > taken["second"] > taken["third"] > 0
    taken[""], refusal = fill(places, "")
    assert sum(taken.values()) == capacity
    assert "All 60 places are taken (8 running, the rest waiting)" in str(refusal)
    for tenant, held in taken.items():
        places.release(held, tenant, 0.0)
    assert places.taken == 0
    assert fill(places, "flood")[0] == taken["flood"], "of what was given back, something is still counted as held"


def test_a_tenants_first_request_may_be_larger_than_its_share() -> None:
    places = Places(max_waiting=2)
    places.take(10, "large", RUNNING, 0.0)
    places.release(10, "large", 0.0)
    places.take(1, "large", RUNNING, 0.0)
    with pytest.raises(Refusal, match="holds 1 of 10 places"):
        places.take(9, "large", RUNNING, 0.0)
    with pytest.raises(Refusal, match="exceed the 10 places") as caught:
        places.check(11, "large", RUNNING, 0.0)
    assert (caught.value.code, caught.value.retry_after) == ("invalid_request", None)


def test_the_wait_follows_what_got_free_lately() -> None:
    places = Places(max_waiting=2)
    places.take(10, "", RUNNING, 0.0)
    assert places.seconds_in_queue(RUNNING, 0.0) is None, "nothing is known yet"
    for now in (10.0, 20.0):
        places.release(1, "", now)
        places.take(1, "", RUNNING, now)
    assert places.seconds_in_queue(RUNNING, 20.0) == 10.0, "two wait, and two got free in ten seconds"
    with pytest.raises(Refusal) as caught:
        places.take(4, "", RUNNING, 20.0)
    assert caught.value.retry_after == 20
    places.release(2, "", 20.0)
    assert places.seconds_in_queue(RUNNING, 20.0) == 0.0, "nobody waits"


def test_it_is_known_when_all_are_free() -> None:
    async def main() -> None:
        places = Places(max_waiting=2)
        await asyncio.wait_for(places.wait_until_free(), 1)
        places.take(2, "a", RUNNING, 0.0)
        waiting = asyncio.create_task(places.wait_until_free())
        places.release(1, "a", 0.0)
        await asyncio.sleep(0)
        assert not waiting.done()
        places.release(1, "a", 0.0)
        await asyncio.wait_for(waiting, 1)

    asyncio.run(main())


STEPS = st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.integers(-4, 4).filter(bool)), max_size=60)


@given(STEPS)
def test_never_more_than_there_are_and_refused_takes_nothing(steps: list[tuple[str, int]]) -> None:
    """Against a count per tenant: what is free or refused depends on what is held now, never on how it came to that."""
    places, held = Places(max_waiting=4), Counter[str]()
    for tenant, change in steps:
        if change < 0:
            if held[tenant] >= -change:
                places.release(-change, tenant, 0.0)
                held[tenant] += change
            continue
        free_after = 12 - held.total() - change
        allowed = free_after >= 0 and (not tenant or not held[tenant] or held[tenant] + change <= 4 * free_after)
        try:
            places.take(change, tenant, RUNNING, 0.0)
        except Refusal:
            assert not allowed
        else:
            assert allowed
            held[tenant] += change
        assert places.taken == held.total()
