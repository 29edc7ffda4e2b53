"""The block pool: who holds what, what can be found, what goes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.block_pool import BlockKey, BlockPool, IntegrityError


def chain(*blocks: tuple[int, ...], salt: str = "", digest: object = None) -> list[BlockKey]:
    keys: list[BlockKey] = []
    for tokens in blocks:
        arguments = (keys[-1] if keys else None, tokens, (salt,))
        keys.append(BlockKey(*arguments, digest) if digest else BlockKey(*arguments))
    return keys


def gauges(pool: BlockPool) -> tuple[int, int, int]:
    return pool.num_free, pool.num_used, pool.num_cached


def publish(pool: BlockPool, keys: list[BlockKey]) -> list[int]:
    block_ids = pool.allocate(len(keys))
    for block_id, key in zip(block_ids, keys, strict=True):
        pool.publish(block_id, key)
    return block_ids


def test_blocks_are_free_used_or_cached() -> None:
    pool = BlockPool(4, 2)
    assert gauges(pool) == (4, 0, 0)
    block_ids = pool.allocate(3)
    assert block_ids == [0, 1, 2]
    assert gauges(pool) == (1, 3, 0)
    pool.publish(0, chain((1, 2))[0])
    pool.release(block_ids)
    assert gauges(pool) == (3, 0, 1)
    assert pool.num_available == 4
    pool.check_integrity([])


def test_a_published_block_is_found_and_shared() -> None:
    pool = BlockPool(4, 2)
    keys = chain((1, 2), (3, 4))
    block_ids = publish(pool, keys)
    assert [pool.find(key) for key in chain((1, 2), (3, 4))] == block_ids
    assert pool.find(chain((3, 4))[0]) is None, "the same tokens after another prefix are another block"
    pool.share(block_ids)
    pool.release(block_ids)
    assert gauges(pool) == (2, 2, 0), "one of two references is left"
    pool.release(block_ids)
    assert pool.is_cached(block_ids[0])
    pool.share(block_ids[:1])
    assert gauges(pool) == (2, 1, 1)
    pool.check_integrity(block_ids[:1])


def test_another_salt_is_another_prefix() -> None:
    pool = BlockPool(2, 2)
    publish(pool, chain((1, 2)))
    assert pool.find(chain((1, 2), salt="s")[0]) is None
    assert chain((1, 2), salt="ab")[0].digest != chain((1, 2), salt="a")[0].digest


def test_tails_go_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4, 1)
    old, new = chain((1,), (2,)), chain((3,), (4,))
    old_ids, new_ids = publish(pool, old), publish(pool, new)
    pool.release(old_ids)
    pool.release(new_ids)
    evicted = [pool.allocate(1)[0] for _ in range(4)]
    assert evicted == [old_ids[1], old_ids[0], new_ids[1], new_ids[0]]
    assert pool.find(old[0]) is None


def test_a_hit_makes_a_block_recent() -> None:
    pool = BlockPool(2, 1)
    first, second = publish(pool, chain((1,)))[0], publish(pool, chain((2,)))[0]
    pool.release([first])
    pool.release([second])
    pool.share([first])
    pool.release([first])
    assert pool.allocate(1) == [second]


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(3, 1)
    kept = publish(pool, chain((1,)))
    pool.release(kept)
    pool.allocate(2)
    assert pool.find(chain((1,))[0]) == kept[0]


def test_a_collision_is_no_hit() -> None:
    pool = BlockPool(4, 2, digest=lambda data: b"same")
    key, other = chain((1, 2), digest=pool.digest)[0], chain((5, 6), digest=pool.digest)[0]
    publish(pool, [key])
    assert key.digest == other.digest
    assert pool.find(other) is None
    publish(pool, [other])
    assert pool.find(other) is None, "the first block keeps its place in the index"
    assert pool.find(key) == 0


def test_a_collision_of_parents_is_no_hit_either() -> None:
    digests = iter([b"parent", b"child", b"parent", b"child"])
    pool = BlockPool(4, 1)
    mine = chain((1,), (7,), digest=lambda data: next(digests))
    other = chain((2,), (7,), digest=lambda data: next(digests))
    publish(pool, mine)
    assert other[1].token_ids == mine[1].token_ids
    assert other[1].digest == mine[1].digest
    assert pool.find(other[1]) is None


def test_the_first_of_two_equal_blocks_is_found_and_its_chain_goes_on() -> None:
    pool = BlockPool(6, 1)
    first = publish(pool, chain((1,)))
    second = publish(pool, chain((1,), (2,)))
    assert pool.find(chain((1,))[0]) == first[0]
    assert pool.find(chain((1,), (2,))[1]) == second[1]
    pool.release(second)
    assert gauges(pool) == (4, 1, 1), "the duplicate remembers nothing"


def test_withdrawn_blocks_are_not_found_and_stay_with_their_holders() -> None:
    pool = BlockPool(3, 1)
    keys = chain((1,), (2,))
    block_ids = publish(pool, keys)
    pool.release(block_ids[1:])
    pool.withdraw(block_ids)
    assert [pool.find(key) for key in keys] == [None, None]
    assert gauges(pool) == (2, 1, 0)
    pool.check_integrity(block_ids[:1])


def test_misuse_is_an_integrity_error() -> None:
    pool = BlockPool(2, 2)
    (block_id,) = pool.allocate(1)
    key = chain((1, 2))[0]
    with pytest.raises(IntegrityError, match="2 blocks asked for, 1 available"):
        pool.allocate(2)
    with pytest.raises(IntegrityError, match="not published"):
        pool.share([block_id])
    with pytest.raises(IntegrityError, match="1 of 2 tokens"):
        pool.publish(block_id, chain((1,))[0])
    pool.publish(block_id, key)
    with pytest.raises(IntegrityError, match="published twice"):
        pool.publish(block_id, key)
    pool.release([block_id])
    with pytest.raises(IntegrityError, match="released twice"):
        pool.release([block_id])
    with pytest.raises(IntegrityError, match="0 references, 1 are held"):
        pool.check_integrity([block_id])
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0, 16)


def test_long_equal_chains_are_compared_once() -> None:
    """Keys made by two requests of one long prefix: each find ends after a step, not at the root."""
    pool = BlockPool(300, 1)
    blocks = [(index,) for index in range(300)]
    published, mine = chain(*blocks), chain(*blocks)
    publish(pool, published)
    for index, key in enumerate(mine):
        assert pool.find(key) == index
        assert key.parent is published[index].parent


@given(
    st.lists(st.tuples(st.sampled_from(["allocate", "share", "release", "withdraw"]), st.integers(0, 5)), max_size=60)
)
def test_the_books_balance_whatever_is_done(actions: list[tuple[str, int]]) -> None:
    """Random holders of random prefixes, colliding on purpose."""
    pool = BlockPool(5, 1, digest=lambda data: bytes([sum(data) % 3]))
    held: list[list[int]] = []
    for action, number in actions:
        key = BlockKey(None, (number,), (), pool.digest)
        if action == "allocate" and pool.num_available:
            held.append(pool.allocate(1))
            if number % 2:
                pool.publish(held[-1][0], key)
        elif action == "share" and (found := pool.find(key)) is not None:
            pool.share([found])
            held.append([found])
        elif action == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif action == "withdraw" and held:
            pool.withdraw(held[number % len(held)])
        pool.check_integrity([block_id for block_ids in held for block_id in block_ids])
        assert pool.num_free + pool.num_used + pool.num_cached == 5
