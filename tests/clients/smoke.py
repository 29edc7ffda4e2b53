"""What the two clients do most, against the server at the given address. Run by `python -m tests.clients`.

Imports nothing of the server's: it runs in the clients' own environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

# Neither client is to call home, nor to fetch a table of prices.
os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "LITELLM_TELEMETRY": "False"}

MODEL = "stet-tales"
ASKED = [{"role": "user", "content": "Tell me a story about a fox."}]
SCHEMA = {
    "title": "Animal",
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["fox", "owl"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "feed",
        "description": "Feed an animal",
        "parameters": {
            "type": "object",
            "properties": {"animal": {"enum": ["fox", "owl"]}},
            "required": ["animal"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


def litellm_smoke(url: str) -> None:
    import litellm

    where: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"}
    plain = {"messages": ASKED, "max_tokens": 12, "temperature": 0.0, "seed": 1}
    answer = litellm.completion(**where, **plain)
    text = answer.choices[0].message.content
    assert text
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    chunks = list(litellm.completion(**where, **plain, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    forced = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 64}
    call = litellm.completion(**where, **plain | forced).choices[0].message.tool_calls[0].function
    assert call.name == "feed"
    assert json.loads(call.arguments)["animal"] in ("fox", "owl")
    refused = ""
    try:
        litellm.completion(**where, **plain | {"top_p": 0.0})
    except litellm.BadRequestError as error:
        refused = str(error)
    assert "top_p" in refused


def langchain_smoke(url: str) -> None:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    model = ChatOpenAI(
        model=MODEL, base_url=f"{url}/v1", api_key=SecretStr("none"), temperature=0, seed=1, max_completion_tokens=64
    )
    said = model.invoke("Tell me a story about a fox.")
    assert said.content
    assert said.usage_metadata is not None
    assert said.usage_metadata["output_tokens"] > 0
    assert "".join(str(piece.content) for piece in model.stream("Tell me a story about a fox.")) == said.content
    animal = model.with_structured_output(SCHEMA, method="json_schema").invoke("An animal, please.")
    assert isinstance(animal, dict)
    assert set(animal) == {"name", "kind"}
    called: Any = model.bind_tools([TOOL], tool_choice="required").invoke("Feed the fox.")
    assert called.tool_calls[0]["name"] == "feed"
    assert called.tool_calls[0]["args"]["animal"] in ("fox", "owl")


def main(url: str) -> int:
    parts: list[Callable[[str], None]] = [litellm_smoke, langchain_smoke]
    for part in parts:
        part(url)
        print(f"{part.__name__}: ok", flush=True)
    print(f"{len(parts)} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
