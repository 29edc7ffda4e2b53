"""Each of the hard situations as a function: what was measured, and under "failures" what must not have been."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from functools import partial
from typing import Any

from loadtests.hard.client import (
    Answer,
    KeptConnections,
    ask,
    metrics,
    probe,
    repeated,
    request_bytes,
    resident_bytes,
    settled,
)
from loadtests.http_bench import cpu_seconds
from loadtests.processes import RunningServer
from server.bench.summary import percentile

Result = dict[str, Any]
PLAIN = {"prompt": "Once upon a time", "temperature": 0, "max_new_tokens": 24, "return_token_ids": True}
SHORT = {"prompt": "A little fox", "max_new_tokens": 16, "ignore_eos": True, "seed": 1}


def with_every_feature(rng: random.Random) -> dict[str, Any]:
    """A stream with whatever a request may have."""
    return {
        "prompt": rng.choice(["Once upon a time", "日本の小さな話 🐢", "A fox " * 40]),
        "max_new_tokens": rng.randint(20, 120),
        "temperature": rng.choice([0.0, 0.7, 2.0]),
        "top_k": rng.choice([0, 1, 40]),
        "top_p": rng.choice([0.5, 1.0]),
        "min_p": rng.choice([0.0, 0.1]),
        "typical_p": rng.choice([0.9, 1.0]),
        "repetition_penalty": rng.choice([1.0, 1.3]),
        "presence_penalty": rng.choice([-1.0, 0.0, 1.0]),
        "frequency_penalty": rng.choice([-1.0, 0.0, 1.0]),
        "logit_bias": rng.choice([{}, {"7": 5, "9": -100}]),
        "n": rng.choice([1, 1, 3]),
        "stop": rng.choice([[], ["\n\n", "zzz"]]),
        "stop_token_ids": rng.choice([[], [11]]),
        "min_new_tokens": rng.choice([0, 10]),
        "priority": rng.choice([0, -5]),
        "cache_salt": rng.choice(["", "mine"]),
        "return_token_ids": rng.random() < 0.5,
        "ignore_eos": True,
        "seed": rng.getrandbits(40),
        "stream": True,
    }


async def disconnects(server: RunningServer, count: int, seed: int = 1) -> Result:
    """Streams whose reader leaves in the middle, beside a plain request whose tokens must not change."""
    rng, failures = random.Random(seed), []
    before = await metrics(server)
    expected = (await ask(server, PLAIN)).body.partition(b'"outputs"')[2].partition(b'"usage"')[0]
    bodies = [(with_every_feature(rng), rng.choice([0, 1, 1, 2, 5, 12])) for _ in range(count)]
    done, num_plain = asyncio.Event(), 0

    async def plain() -> None:
        nonlocal num_plain
        while not done.is_set():
            answer = await ask(server, PLAIN)
            num_plain += 1
            if answer.body.partition(b'"outputs"')[2].partition(b'"usage"')[0] != expected:
                failures.append(f"a plain request answers otherwise beside them: {answer.status}")
                return

    beside = asyncio.create_task(plain())
    probing = asyncio.create_task(probe(server, done))
    answers = await repeated(count, 24, lambda i: ask(server, bodies[i][0], leave_after=bodies[i][1]))
    done.set()
    await beside
    probes = await probing
    now = await settled(server)
    ended = sum(now[name] - before[name] for name in now if name.startswith('stet_requests_total{endpoint="/generate"'))
    if ended != count + num_plain + 1:
        failures.append(f"{count + num_plain + 1} requests were sent, and {ended:.0f} have an outcome")
    refused = sum(answer.status not in (0, 200) for answer in answers)
    cancelled = 'stet_requests_total{endpoint="/generate",outcome="cancelled"}'
    return {
        "left in the middle": count,
        "of them refused": refused,
        "ended as cancelled": round(now[cancelled] - before[cancelled]),
        "plain requests beside": num_plain,
        "livez, worst ms": round(max(probes) * 1e3, 1),
        "failures": failures,
    }


async def readers(server: RunningServer, count: int, num_neighbours: int, new_tokens: int) -> Result:
    """Streams that nobody reads, against the same streams read: the neighbours' times, and the server's memory."""
    body = {"prompt": "Once", "max_new_tokens": new_tokens, "ignore_eos": True, "stream": True, "seed": 3,
            "return_token_ids": True}  # fmt: skip

    async def neighbours() -> list[float]:
        answers = await repeated(num_neighbours, 2, lambda i: ask(server, SHORT | {"seed": i}))
        return [answer.seconds for answer in answers if answer.status == 200]

    await neighbours()  # warm
    alone = await neighbours()
    reading = [asyncio.create_task(ask(server, body | {"seed": i})) for i in range(count)]
    await asyncio.sleep(0.2)
    beside_readers = await neighbours()
    await asyncio.gather(*reading)
    await settled(server, 60.0)

    memory = resident_bytes(server.process.pid)
    sockets = []
    for number in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((server.host, server.port))
        sock.sendall(request_bytes(body | {"seed": number}))
        sockets.append(sock)
    await asyncio.sleep(0.2)
    done = asyncio.Event()
    probing = asyncio.create_task(probe(server, done))
    beside_sleepers = await neighbours()
    await asyncio.sleep(1.0)
    grown = resident_bytes(server.process.pid) - memory
    done.set()
    probes = await probing
    for sock in sockets:
        sock.close()
    await settled(server, 60.0)
    ratio = percentile(beside_sleepers, 0.95) / percentile(beside_readers, 0.95)
    failures = []
    if grown > 32 * 2**20:
        failures.append(f"the memory has grown by {grown / 2**20:.1f} MiB")
    if ratio > 1.2:
        failures.append(f"the neighbours' p95 is {ratio:.2f} times that beside readers")
    if max(probes) > 0.1:
        failures.append(f"/livez took {max(probes) * 1e3:.0f} ms")
    return {
        "readers that never read": count,
        "memory grown, MiB": round(grown / 2**20, 1),
        "neighbours' p95 ms: alone": round(percentile(alone, 0.95) * 1e3, 1),
        "beside streams that are read": round(percentile(beside_readers, 0.95) * 1e3, 1),
        "beside streams that are not": round(percentile(beside_sleepers, 0.95) * 1e3, 1),
        "ratio": round(ratio, 2),
        "livez, worst ms": round(max(probes) * 1e3, 1),
        "failures": failures,
    }


async def overload(
    server: RunningServer, at_once: int, seconds: float, new_tokens: int, *, factor: float = 10.0, kept: bool = True
) -> Result:
    """Ten times what the server can do, in arrivals that do not wait for answers; what it can do is measured first.

    kept: connections are used again, as proxies and clients' pools do; otherwise each request comes on its own.
    """

    def length(number: int) -> int:
        """Of one answer: from a half to one and a half of new_tokens, so that they do not end together in waves."""
        return new_tokens // 2 + 37 * number % (new_tokens + 1)

    def body(number: int) -> dict[str, Any]:
        return SHORT | {"seed": number, "max_new_tokens": length(number)}

    async def closed() -> float:
        """Answers of the mean length a second, with as many clients as there are places."""
        end, tokens, numbers = time.perf_counter() + seconds, 0, itertools.count()

        async def client() -> None:
            nonlocal tokens
            while time.perf_counter() < end:
                number = next(numbers)
                answer = await send(body(number))
                if answer.status == 200 and time.perf_counter() < end:
                    tokens += length(number)

        await asyncio.gather(*(client() for _ in range(at_once)))
        return tokens / seconds / new_tokens

    clients = KeptConnections(server) if kept else None
    send = partial(ask, server) if clients is None else clients.ask
    await send(body(0))
    peak = await closed()
    before = await metrics(server)
    done = asyncio.Event()
    probing = asyncio.create_task(probe(server, done))
    http = server.process.pid
    began, own_cpu, http_cpu = time.perf_counter(), time.process_time(), cpu_seconds(http)
    tasks: list[asyncio.Task[Answer]] = []
    tokens = 0

    async def one(number: int) -> Answer:
        nonlocal tokens
        answer = await send(body(number))
        if answer.status == 200 and time.perf_counter() - began < seconds:
            tokens += length(number)
        return answer

    rate = factor * peak
    while (now := time.perf_counter() - began) < seconds:
        while len(tasks) < now * rate:
            tasks.append(asyncio.create_task(one(len(tasks))))
        await asyncio.sleep(0.002)
    own_cpu, http_cpu = time.process_time() - own_cpu, cpu_seconds(http) - http_cpu
    answers = await asyncio.gather(*tasks)
    done.set()
    probes = await probing
    after = await settled(server, 60.0)
    # The machine's speed drifts by more than what is looked for: the peak is that of before and after.
    peaks = [peak, await closed()]
    peak = sum(peaks) / 2
    if clients is not None:
        clients.close()
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    goodput = tokens / seconds / new_tokens
    counted = sum(
        after[name] - before[name] for name in after if name.startswith('stet_requests_total{endpoint="/generate"')
    )
    failures = []
    if len(accepted) + len(refused) != len(answers):
        failures.append(f"{len(answers)} sent, {len(accepted)} accepted, {len(refused)} refused")
    if counted != len(answers):
        failures.append(f"{len(answers)} sent, and {counted:.0f} counted")
    if any("retry-after" not in answer.headers for answer in refused):
        failures.append("a refusal without Retry-After")
    slow = percentile([answer.seconds for answer in refused], 0.99) if refused else 0.0
    if slow > 0.1:
        failures.append(f"the refusals' p99 is {slow * 1e3:.0f} ms")
    if goodput < 0.9 * peak:
        failures.append(f"the goodput is {goodput / peak:.0%} of the peak")
    if max(probes) > 0.1:
        failures.append(f"/livez took {max(probes) * 1e3:.0f} ms")
    return {
        "peak before and after, answers a second": [round(each, 1) for each in peaks],
        "sent a second": round(len(answers) / seconds, 1),
        "sent": len(answers),
        "accepted": len(accepted),
        "refused": len(refused),
        "refusals' p99 ms": round(slow * 1e3, 1),
        "goodput of the peak": round(goodput / peak, 3),
        "processors meanwhile: clients": round(own_cpu / seconds, 2),
        "HTTP process": round(http_cpu / seconds, 2),
        "livez, worst ms": round(max(probes) * 1e3, 1),
        "failures": failures,
    }


async def flood(
    server: RunningServer, keys: dict[str, str], num_requests: int, at_once: int, new_tokens: int
) -> Result:
    """One key sends as much as it may and tries again at once; another one asks one thing after the other."""
    body = SHORT | {"max_new_tokens": new_tokens}
    storm = SHORT | {"max_new_tokens": new_tokens // 4}

    async def solo() -> list[float]:
        taken = []
        for number in range(num_requests):
            answer = await ask(server, body | {"seed": number}, key=keys["quiet"])
            if answer.status != 200:
                raise RuntimeError(f"the quiet key was answered {answer.status}: {answer.body!r:.200}")
            taken.append(answer.seconds)
        return taken

    await ask(server, body, key=keys["quiet"])  # warm
    alone = await solo()
    done, num_flood = asyncio.Event(), 0

    async def flooder(number: int) -> None:
        nonlocal num_flood
        while not done.is_set():
            answer = await ask(server, storm | {"seed": number}, key=keys["flood"])
            num_flood += answer.status == 200
            if answer.status != 200:
                await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(flooder(number)) for number in range(at_once)]
    await asyncio.sleep(0.5)
    beside = await solo()
    done.set()
    await asyncio.gather(*tasks)
    ratio = percentile(beside, 0.95) / percentile(alone, 0.95)
    return {
        "requests of the quiet key": num_requests,
        "of the flood meanwhile": num_flood,
        "p95 ms: alone": round(percentile(alone, 0.95) * 1e3, 1),
        "beside the flood": round(percentile(beside, 0.95) * 1e3, 1),
        "ratio": round(ratio, 2),
        "failures": [f"the quiet key's p95 is {ratio:.2f} times its own"] if ratio > 2 else [],
    }
