"""What a seed stands for. Everything is drawn here or from the generator that is returned: a seed is a whole run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from server.engine.config import SchedulerConfig, StepTimes
from server.engine.request import Request, SamplingParams
from tests.simulation.oracle import VOCAB_SIZE


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request, when it comes (virtual time), when its client gives up, and whether it breaks the forward pass."""

    time: int
    request: Request
    deadline: int | None
    stalls: bool
    raises_from: int | None


@dataclass(frozen=True, slots=True)
class World:
    seed: int
    config: SchedulerConfig
    digest: Callable[[bytes], bytes]
    arrivals: tuple[Arrival, ...]
    chances: dict[str, float]
    extra_draws: int
    rng: random.Random


def truncated_digest(bits: int) -> Callable[[bytes], bytes]:
    """SHA-256 cut to a few bits, so that prefixes collide all the time."""
    return lambda data: bytes([hashlib.sha256(data).digest()[0] & ((1 << bits) - 1)])


def full_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def make_world(seed: int) -> World:
    rng = random.Random(seed)
    block_size = rng.choice((1, 2, 2, 3, 4))
    num_blocks = rng.randint(6, 24)
    max_running = rng.randint(1, 6)
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=rng.randint(8, max(8, num_blocks * block_size + 4)),
        max_running=max_running,
        max_tokens_per_step=max_running + rng.randint(0, 16),
        mixed_step_tokens=rng.randint(1, 8),
        pipeline_depth=1 + seed % 2,
        priority_aging_steps=rng.randint(1, 24),
        prefix_caching=rng.random() < 0.9,
        step_times=_step_times(seed),
        eos_token_ids=(0, 1) if rng.random() < 0.5 else (0,),
    )
    bits = rng.choice((None, None, 1, 3, 5))
    calm = rng.random() < 0.25  # some seeds without faults: what breaks there breaks for everyone
    chances = {
        name: 0.0 if calm or rng.random() < 0.35 else chance * rng.random()
        for name, chance in {
            "abort": 0.08,
            "preempt": 0.15,
            "exception": 0.1,
            "nan": 0.05,
            "restart": 0.02,
            "late result": 0.3,
            "doubled result": 0.3,
            "clock jump": 0.02,
        }.items()
    }
    if not calm and seed % 8 == 3:  # and some with many of them at once, two steps in flight
        chances |= {"preempt": 0.4, "exception": 0.3}
    extra_draws = rng.choice((0, 0, 0, 1, 3)) if config.pipeline_depth == 1 else 0
    arrivals = tuple(_arrivals(rng, config, calm))
    digest = full_digest if bits is None else truncated_digest(bits)
    config = replace(config, attention_span=random.Random(f"span {seed}").choice((None, None, 3, 20)))
    return World(seed, config, digest, arrivals, chances, extra_draws, rng)


def _step_times(seed: int) -> StepTimes:
    """From a generator of its own. Where the base is small, few rows of a flood fit beside another tenant's."""
    rng = random.Random(f"step times of seed {seed}")
    return StepTimes(rng.choice((0, 0, 3, 10, 40)), rng.randint(1, 12), rng.randint(1, 4))


def _arrivals(rng: random.Random, config: SchedulerConfig, calm: bool) -> list[Arrival]:
    room = min(config.max_model_len, config.num_blocks * config.block_size + 1)
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(room)] for _ in range(rng.randint(1, 3))]
    tenants = ["a", "b", "c"][: rng.randint(1, 3)]
    priorities = rng.choice(((0,), (0,), (-1, 0, 3), (-100, 0)))
    flood = rng.random() < 0.4  # one tenant sends most of the requests, at once
    lasting = rng.choice((0.2, 0.2, 1.0))  # where all requests run to their limits, memory runs short
    arrivals: list[Arrival] = []
    time = 0
    num_requests = rng.choice((6, 12, 24, 60 if flood else 30))
    while len(arrivals) < num_requests:
        if rng.random() < (0.1 if flood else 0.4):
            time += rng.randint(1, 12)
        tenant = "a" if flood and rng.random() < 0.8 else rng.choice(tenants)
        stem = rng.choice(stems)
        length = rng.randint(1, max(1, min(room - 1, rng.choice((3, 8, 40)))))
        if rng.random() < 0.3:  # whole blocks, where a prompt may be cached to its last token
            length = max(1, length // config.block_size * config.block_size)
        prompt = stem[:length]
        if rng.random() < 0.4 and len(prompt) > 1:
            prompt = [*prompt[:-1], rng.randrange(VOCAB_SIZE)]
        max_new_tokens = rng.randint(1, rng.choice((2, 8, 30, 60)))
        if room < config.max_model_len:  # the pool is the limit: more would not be admitted
            max_new_tokens = min(max_new_tokens, room - len(prompt))
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=rng.choice((0, 0, 3)) if max_new_tokens >= 3 else 0,
            seed=rng.getrandbits(64),
            stop_token_ids=(5,) if rng.random() < 0.2 else (),
            ignore_eos=rng.random() < lasting,
        )
        salt, priority = rng.choice(("", "", "", "s")), rng.choice(priorities)
        doomed = not calm and rng.random() < 0.04
        for choice in range(rng.choice((1, 1, 1, 3))):
            request = Request(
                request_id=len(arrivals),
                prompt_token_ids=list(prompt),
                params=params,
                choice=choice,
                priority=priority,
                tenant=tenant,
                cache_salt=salt,
                arrival=len(arrivals),
            )
            arrivals.append(
                Arrival(
                    time=time,
                    request=request,
                    deadline=time + rng.randint(5, 200) if not calm and rng.random() < 0.15 else None,
                    stalls=rng.random() < 0.2,
                    raises_from=rng.randint(0, room) if doomed else None,
                )
            )
    return arrivals
