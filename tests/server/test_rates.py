"""Allowances and waits on a clock of the test's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.rates import DrainRate, TokenBucket


def test_a_bucket_holds_a_minutes_worth() -> None:
    bucket = TokenBucket(60, 0.0)
    assert bucket.wait(60, 1000.0) == 0, "what is saved up has a bound"
    assert bucket.wait(61, 1000.0) == 1.0
    bucket.take(60, 1000.0)
    assert bucket.wait(1, 1000.0) == 1.0
    assert bucket.wait(1, 1000.5) == 0.5
    assert bucket.wait(1, 1001.0) == 0.0


def test_a_debt_is_paid_off_first() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(180, 0.0)
    assert bucket.wait(1, 0.0) == 121.0


def test_a_changed_allowance_forgets_no_use() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(50, 0.0)
    bucket.change(20, 0.0)
    assert bucket.wait(1, 0.0) == 31 * 60 / 20
    bucket.change(60, 0.0)
    assert bucket.wait(10, 0.0) == 0


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 500)), max_size=40))
def test_never_more_than_allowed_in_the_long_run(per_minute: int, asked: list[tuple[float, int]]) -> None:
    """Whoever waits as long as told is served, and what was used is the allowance, the savings and one overdraft."""
    bucket, now, used, largest = TokenBucket(per_minute, 0.0), 0.0, 0, 0
    for pause, cost in asked:
        now += pause
        wait = bucket.wait(1, now)
        if wait == 0:
            bucket.take(cost, now)
            used, largest = used + cost, max(largest, cost)
        else:
            assert bucket.wait(1, now + wait * 1.000001) < 1e-6 * 60
            assert bucket.wait(1, now + wait * 1.000001) == 0 or wait < 1e-3
        now += wait * 1.000001
    assert used <= per_minute * (1 + now / 60) + largest + 1e-3 * used


def test_a_drain_rate_tells_when_places_get_free() -> None:
    drain = DrainRate()
    assert drain.wait(1, 100.0) == 5, "nothing is known yet"
    drain.freed(1, 100.0)
    drain.freed(4, 119.5)
    assert drain.wait(1, 119.5) == 4
    assert drain.seconds_until(1, 119.5) == 3.9
    assert drain.wait(8, 119.5) == 32
    assert drain.wait(64, 119.5) == 60
    drain.freed(1000, 119.5)
    assert drain.wait(1, 119.5) == 1
    assert drain.wait(1, 200.0) == 5, "what was long ago says nothing"
