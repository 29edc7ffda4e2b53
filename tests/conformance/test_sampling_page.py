"""docs/sampling.md: its code runs and prints what the page says, and the page's filters are the engine's."""

from __future__ import annotations

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernels.ops import SamplingMetadata
from kernels.sampling import kept_weights
from server.http.schemas import GenerateBody

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sampling.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def run_page() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The names that the page's code defines, and for each block what it prints and what the page says."""
    names: dict[str, Any] = {}
    outputs: list[tuple[str, str]] = []
    for code, text in BLOCK.findall(PAGE.read_text()):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), names)
        outputs.append((printed.getvalue(), text))
    return names, outputs


def test_the_code_prints_what_the_page_says() -> None:
    _, outputs = run_page()
    assert len(outputs) >= 6
    for printed, text in outputs:
        assert printed == text


def metadata(**changes: Any) -> SamplingMetadata:
    settings: dict[str, Any] = {
        "seeds": [0],
        "positions": [0],
        "choices": [0],
        "temperatures": [1.0],
        "top_ks": [0],
        "top_ps": [1.0],
        "min_ps": [0.0],
        "typical_ps": [1.0],
        "repetition_penalties": [1.0],
        "presence_penalties": [0.0],
        "frequency_penalties": [0.0],
        "biases": [],
        "allowed": {},
        "prompt_tokens": {},
        "output_tokens": {},
    }
    return SamplingMetadata(**(settings | changes))


@pytest.mark.parametrize(("name", "value"), [("top_k", 3), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.5)])
def test_the_pages_filters_are_the_engines(name: str, value: float) -> None:
    names, _ = run_page()
    logits = names["logits"]
    kept = names[name](names["probabilities"], value)
    row = np.array(list(logits.values()), dtype=np.float32)
    weights = kept_weights(row, metadata(**{f"{name}s": [value]}), 0)
    assert {token for token, weight in zip(logits, weights, strict=True) if weight} == set(kept)


@pytest.mark.parametrize(
    ("page", "engine"),
    [
        ({"repetition": 1.25}, {"repetition_penalties": [1.25]}),
        ({"frequency": 0.5}, {"frequency_penalties": [0.5]}),
        ({"presence": 0.5}, {"presence_penalties": [0.5]}),
    ],
)
def test_the_pages_penalties_are_the_engines(page: dict[str, float], engine: dict[str, Any]) -> None:
    names, _ = run_page()
    logits = names["logits"]
    ids = {token: index for index, token in enumerate(logits)}
    engine = engine | {
        "prompt_tokens": {0: [ids[token] for token in names["prompt"]]},
        "output_tokens": {0: [ids[token] for token in names["output"]]},
    }
    weights = kept_weights(np.array(list(logits.values()), dtype=np.float32), metadata(**engine), 0)
    expected = names["softmax"](names["penalized"](logits, **page))
    for weight, probability in zip(weights, expected.values(), strict=True):
        assert math.isclose(int(weight) / int(weights.sum()), probability, rel_tol=1e-6)


def test_the_page_explains_every_sampling_parameter() -> None:
    text = PAGE.read_text()
    others = {
        *("prompt", "prompt_token_ids", "messages", "stream", "return_token_ids", "skip_special_tokens"),
        *("add_special_tokens", "priority", "request_id", "cache_salt", "echo", "deadline_ms", "dry_run"),
        *("truncate_prompt_tokens", "json_schema", "regex", "grammar", "choice"),
    }
    for name in set(GenerateBody.model_fields) - others:
        assert f"`{name}" in text, name
