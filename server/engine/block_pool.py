"""The KV cache as the scheduler sees it: numbered blocks, who holds them, and which prefix each one remembers.

A block is in one of three states, and `num_free + num_used + num_cached == num_blocks` at all times:

    free    nobody holds it and it remembers nothing
    used    at least one request holds it (its reference count says how many)
    cached  nobody holds it, but it still contains a published prefix: a later request may take it back, until the
            block is needed for something else

Published blocks, used or cached, can be found by what they contain. They are full and never written again.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

Digest = Callable[[bytes], bytes]


class IntegrityError(Exception):
    """The books do not balance: a bug in the engine, never a fault of a request. Nothing can be trusted any more."""


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class BlockKey:
    """What a full block contains: its tokens, all tokens before it, and what else its K and V depend on.

    `digest` is SHA-256 over the parent's digest, the extra keys (salt, later the adapter) and the token ids. The
    digest finds a block; `same_prefix` then compares what the digest stands for, so that two prefixes which collide
    are never mistaken for each other. Immutable, but for `parent` being replaced by an equal key.
    """

    __slots__ = ("digest", "extra_keys", "parent", "token_ids")

    def __init__(
        self,
        parent: BlockKey | None,
        token_ids: Sequence[int],
        extra_keys: tuple[str, ...] = (),
        digest: Digest = sha256,
    ) -> None:
        self.parent = parent
        self.token_ids = tuple(token_ids)
        self.extra_keys = extra_keys
        parts = [parent.digest if parent is not None else b""]
        for extra in extra_keys:
            encoded = extra.encode("utf-8", "surrogatepass")
            parts += (struct.pack("<I", len(encoded)), encoded)
        parts.append(struct.pack(f"<{len(self.token_ids)}q", *self.token_ids))
        self.digest: bytes = digest(b"".join(parts))

    def same_prefix(self, other: BlockKey) -> bool:
        """Whether both stand for the same tokens from the first on, under the same extra keys."""
        a: BlockKey | None = self
        b: BlockKey | None = other
        while a is not b:
            if a is None or b is None:
                return False
            if a.digest != b.digest or a.token_ids != b.token_ids or a.extra_keys != b.extra_keys:
                return False
            a, b = a.parent, b.parent
        return True


class BlockPool:
    """Owns the reference counts, the free blocks and the index of published prefixes. Deterministic, no device memory.

    Blocks are handed out by `allocate` (empty) or `share` (found by `find`), with one reference each, and given back by
    `release`. `publish` makes a used block findable; `withdraw` takes that back. Every method either succeeds or raises
    IntegrityError and changes nothing: what the caller may ask for, it can know from `num_available`.
    """

    def __init__(self, num_blocks: int, block_size: int, digest: Digest = sha256) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.digest = digest
        self._ref_counts = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def is_cached(self, block_id: int) -> bool:
        """Whether nobody holds this published block (sharing it makes one block less available)."""
        return block_id in self._cached

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self, count: int) -> list[int]:
        """Hand out blocks with one reference each. Cached blocks are forgotten, least recently used first."""
        if count > self.num_available:
            raise IntegrityError(f"{count} blocks asked for, {self.num_available} available")
        block_ids = []
        for _ in range(count):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._cached.popitem(last=False)
                self._unpublish(block_id)
            if self._ref_counts[block_id] != 0:
                raise IntegrityError(f"block {block_id} is free and has {self._ref_counts[block_id]} references")
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, key: BlockKey) -> int | None:
        """The published block with this content, or None. Takes no reference."""
        block_id = self._published.get(key.digest)
        if block_id is None:
            return None
        found = self._keys[block_id]
        if found is None:
            raise IntegrityError(f"block {block_id} is indexed and not published")
        if not key.same_prefix(found):
            return None  # a collision
        # Equal keys share their ancestors from now on: comparing the next block of this chain ends after one step.
        key.parent = found.parent
        return block_id

    def share(self, block_ids: Iterable[int]) -> None:
        """Take one more reference to each of these published blocks."""
        for block_id in block_ids:
            if self._keys[block_id] is None:
                raise IntegrityError(f"block {block_id} is shared and not published: somebody may still write it")
            if self._ref_counts[block_id] == 0:
                del self._cached[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block of a sequence, its tail first.

        Whoever comes later is reused later: the head of a prefix, which more requests have in common, outlives its end.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            if count < 0:
                raise IntegrityError(f"block {block_id} is released twice")
            self._ref_counts[block_id] = count
            if count == 0:
                if self._keys[block_id] is None:
                    self._free.append(block_id)
                else:
                    self._cached[block_id] = None

    def publish(self, block_id: int, key: BlockKey) -> None:
        """Make a full, computed block findable. Where the digest is taken already, the first block stays."""
        if self._ref_counts[block_id] == 0 or self._keys[block_id] is not None:
            raise IntegrityError(f"block {block_id} is published twice or by nobody")
        if len(key.token_ids) != self.block_size:
            raise IntegrityError(f"block {block_id} is published with {len(key.token_ids)} of {self.block_size} tokens")
        if key.digest not in self._published:
            self._published[key.digest] = block_id
            self._keys[block_id] = key

    def withdraw(self, block_ids: Iterable[int]) -> None:
        """Let nobody find these blocks from now on. Those who hold them keep them."""
        for block_id in block_ids:
            if self._keys[block_id] is not None:
                self._unpublish(block_id)
                if block_id in self._cached:
                    del self._cached[block_id]
                    self._free.append(block_id)

    def _unpublish(self, block_id: int) -> None:
        key = self._keys[block_id]
        if key is None or self._published.pop(key.digest, None) != block_id:
            raise IntegrityError(f"block {block_id} is not indexed under its key")
        self._keys[block_id] = None

    def check_integrity(self, held_block_ids: Iterable[int]) -> None:
        """Every invariant of the pool, given all references that exist, one entry each. Linear in the pool's size."""
        expected = [0] * self.num_blocks
        for block_id in held_block_ids:
            expected[block_id] += 1
        idle = [0] * self.num_blocks
        for block_id in (*self._free, *self._cached):
            idle[block_id] += 1
        for block_id in range(self.num_blocks):
            count, key = self._ref_counts[block_id], self._keys[block_id]
            if count != expected[block_id]:
                raise IntegrityError(f"block {block_id} has {count} references, {expected[block_id]} are held")
            if idle[block_id] != (count == 0):
                raise IntegrityError(f"block {block_id} with {count} references is listed idle {idle[block_id]} times")
            if count == 0 and (key is not None) != (block_id in self._cached):
                raise IntegrityError(f"idle block {block_id} is in the wrong list")
            if key is not None and self._published.get(key.digest) != block_id:
                raise IntegrityError(f"block {block_id} is not indexed under its key")
        if len(self._published) != sum(key is not None for key in self._keys):
            raise IntegrityError("the index knows blocks that are not published")
