"""A server of OpenAI-shaped streams whose timings are set, and which writes down when it really sent each event.

    python -m tests.server.bench.scripted '{"first": 0.05, "gap": 0.01}'

Prints its port. first: seconds from a request's turn to its first event; gap: between events; stall: a longer gap in
the middle of every stream; serial: one request at a time; refuse: every so many-th is answered 429; cut: every so
many-th stream ends without [DONE]; fail: every so many-th brings an error event. GET /log lists, for each stream in
the order of arrival, the times of its events on the clock that all processes share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any


class Script:
    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.log: list[list[float]] = []
        self.count = 0
        self.most_at_once = 0
        self.at_once = 0
        self.turn = asyncio.Lock()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split(" ")[1]
            if path == "/v1/models":
                self.answer(writer, 200, {"data": [{"id": "scripted", "max_model_len": 4096}]})
            elif path == "/log":
                self.answer(writer, 200, {"streams": self.log, "most_at_once": self.most_at_once})
            elif "content-length" not in head.lower():
                self.answer(writer, 404, {"error": "nothing here"})
            else:
                length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
                await self.stream(json.loads(await reader.readexactly(length)), path, writer)
        finally:
            writer.close()

    def answer(self, writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(data), data))

    async def stream(self, request: dict[str, Any], path: str, writer: asyncio.StreamWriter) -> None:
        probe = request["max_tokens"] == 2  # how the client counts the tokens of a word
        number = 0 if probe else self.count + 1
        self.count = max(self.count, number)

        def due(what: str) -> bool:
            return bool(number and self.plan.get(what) and number % self.plan[what] == 0)

        if due("refuse"):
            self.answer(writer, 429, {"error": {"message": "no room"}})
            return
        times: list[float] = []
        if not probe:
            self.log.append(times)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.plan.get("serial"):
                async with self.turn:
                    await self.events(request, path, writer, times, due("cut"), due("fail"))
            else:
                await self.events(request, path, writer, times, due("cut"), due("fail"))
        finally:
            self.at_once -= 1

    async def events(
        self,
        request: dict[str, Any],
        path: str,
        writer: asyncio.StreamWriter,
        times: list[float],
        cut: bool,
        fail: bool,
    ) -> None:
        chat = "chat" in path
        count = request["max_tokens"]
        words = request["messages"][-1]["content"] if chat else request["prompt"]

        def send(event: dict[str, Any] | str) -> None:
            data = b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))

        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(count):
            stalled = number and number == count // 2
            wait = self.plan["first"] if number == 0 else self.plan.get("stall", self.plan["gap"]) if stalled else None
            await asyncio.sleep(self.plan["gap"] if wait is None else wait)
            choice = {"delta": {"content": " a"}} if chat else {"text": " a"}
            times.append(time.perf_counter())
            send({"choices": [choice | {"finish_reason": None}]})
            if number == count // 2 and (cut or fail):
                if fail:
                    send({"error": {"message": "it broke"}})
                writer.write(b"0\r\n\r\n")
                return
        send({"choices": [{"text": "", "finish_reason": "length"}]})
        # Two tokens a word, and twice as many output tokens as events: what counts is what the server says.
        usage = {"prompt_tokens": 2 * len(words.split()), "completion_tokens": 2 * count}
        send({"choices": [], "usage": usage})
        send("[DONE]")
        writer.write(b"0\r\n\r\n")


async def main() -> None:
    script = Script(json.loads(sys.argv[1]))
    server = await asyncio.start_server(script.handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
