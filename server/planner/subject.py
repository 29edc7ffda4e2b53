"""What is planned for: a model's configuration, from its config.json or from no more than a number of parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoint import load_config
from models.config import ModelConfig
from models.errors import ModelError
from models.hub import resolve_config
from server.planner.words import COUNT_WORDS, PlanError

_COUNT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([kmbt])", re.ASCII | re.IGNORECASE)
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
MIN_COUNT, MAX_COUNT = 10**6, 10**13

# Far beyond any model, and small enough that no byte count leaves 64 bits.
MAX_PARAMETERS = 10**15


@dataclass(frozen=True, slots=True)
class Subject:
    """A model by name. `assumed`: its shape is not known and was made up from its number of parameters."""

    name: str
    config: ModelConfig
    assumed: bool = False


def parse_count(text: str) -> int | None:
    """The number of parameters that `text` names ("70b", "600M", "1.7B"); None if it is something else.

    Raises PlanError outside MIN_COUNT .. MAX_COUNT.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        return None
    count = round(float(match[1]) * _UNITS[match[2].lower()])
    if not MIN_COUNT <= count <= MAX_COUNT:
        raise PlanError(f"{text!r} is not {COUNT_WORDS}", "model")
    return count


def find_subject(
    model: str,
    revision: str | None = None,
    *,
    offline: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Subject:
    """The model that a person names: the embedded one, a folder, a number of parameters, or a Hub id, in this order.

    Of a Hub model only the configuration is downloaded. Raises PlanError.
    """
    try:
        if not Path(model).expanduser().exists() and (count := parse_count(model)) is not None:
            return Subject(model, config_of_count(count), assumed=True)
        return of_folder(model, resolve_config(model, revision, offline=offline, progress=progress))
    except ModelError as error:
        raise PlanError(str(error), "model") from None


def of_folder(name: str, folder: Path) -> Subject:
    """The model of this name whose config.json is in `folder`. Raises PlanError."""
    try:
        config = load_config(folder)
    except ModelError as error:
        raise PlanError(str(error), "model") from None
    return Subject(name, _bounded(config, "model"))


def of_config(config: Mapping[str, Any]) -> Subject:
    """The model that the content of a config.json describes. Raises PlanError.

    That of an int8 checkpoint is refused: it may hold regular expressions, and one can be made to run for ever.
    """
    for name in ("quantization_config", "compression_config"):
        if config.get(name) is not None:
            raise PlanError(f"{name} is not read here: leave it out, and choose a quantization instead", "config")
    try:
        return Subject("config", _bounded(ModelConfig.from_hf(config), "config"))
    except ModelError as error:
        raise PlanError(str(error), "config") from None


def _bounded(config: ModelConfig, param: str) -> ModelConfig:
    if config.num_parameters > MAX_PARAMETERS:
        raise PlanError(
            f"the configuration describes {config.num_parameters:.0e} parameters; up to {MAX_PARAMETERS:.0e} are "
            "planned for: check its sizes",
            param,
        )
    return config


def config_of_count(count: int) -> ModelConfig:
    """A Llama of about `count` parameters, shaped as published models of that size are.

    Small ones are narrow and deep with a tied table of token vectors (SmolLM2 at 135M: 30 layers of 576), large ones
    about 120 times as wide as deep with a vocabulary of 128,256 (Llama 3: 32 layers of 4,096 at 8B, 80 of 8,192 at
    70B); three query heads of 64 to a KV head or, from 1,536 on, eight KV heads of 128; a feed-forward layer 3.5 times
    as wide.
    """
    large, small = count >= 3 * 10**9, count < 10**8
    vocab = 128_256 if large else 8_192 if small else 49_152
    tables = 2 if large else 1
    wanted_aspect = min(max(24 * (count / 10**8) ** 0.38, 24.0), 120.0)
    best: tuple[float, dict[str, Any]] | None = None
    for hidden in range(64, 65_537, 64):
        head_dim = 64 if hidden < 1536 else 128
        heads = hidden // head_dim
        if heads > 4 and heads % (8 if head_dim == 128 else 3):
            continue
        kv_heads = 8 if head_dim == 128 else max(heads // 3, 1)
        inner = max(round(3.5 * hidden / 64), 1) * 64
        layer = 2 * hidden * (heads + kv_heads) * head_dim + 3 * hidden * inner + 2 * hidden
        layers = round((count - tables * vocab * hidden - hidden) / layer)
        if layers < 1:
            continue
        total = layers * layer + tables * vocab * hidden + hidden
        # A tenth too many parameters is as bad as a shape twice as wide as it should be.
        badness = abs(total / count - 1) * 7 + abs(math.log(hidden / layers / wanted_aspect))
        if best is None or badness < best[0]:
            shape = {
                "hidden_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": head_dim,
                "intermediate_size": inner,
            }
            best = badness, shape
    if best is None:
        raise PlanError(f"no shape of a model has {count} parameters; give {COUNT_WORDS}", "model")
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocab,
            "max_position_embeddings": 131_072 if large else 8_192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": not large,
            "torch_dtype": "bfloat16",
            **best[1],
        }
    )
