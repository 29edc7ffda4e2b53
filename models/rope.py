"""What config.json says about the rotary embedding, in both dialects: `rope_theta`, `rope_scaling`, `rotary_pct` … and
`rope_parameters`. No torch here; `models.rotary` computes the tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from models.errors import ModelError
from models.fields import Fields, positive


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are stretched beyond the length that the model was first trained on.

    kind "linear": every frequency divided by `factor` (position interpolation, arXiv:2306.15595).
    kind "llama3": only the low frequencies are, with a smooth passage between the wavelengths
        original_max_position_embeddings / low_freq_factor and ... / high_freq_factor (Llama 3.1, arXiv:2407.21783).
    kind "yarn": likewise, between beta_fast and beta_slow turns over the original length (arXiv:2309.00071).
    kind "longrope": each by its own of `factors` (arXiv:2402.13753), of which there is one set for sequences up to the
        original length and one for longer ones. A sequence that grows past it would need all its keys anew, so only the
        first set is used here, and original_max_position_embeddings is the model's longest sequence.
    attention_factor multiplies cosines and sines (yarn, longrope; 1 for the others).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """theta: the base of the frequencies;  rotary_dim: how many elements at the start of a head are rotated."""

    theta: float
    scaling: RopeScaling | None
    rotary_dim: int


def read_rope(fields: Fields, head_dim: int, theta: float, partial: float | None, longrope: bool = False) -> Rope:
    """Of all layers, or of those without a sliding window where they differ.

    theta: where config.json is silent. partial: the share of a head that is rotated where it is silent; None: all of
    it, and anything else is refused. longrope: whether it is taken. Raises ModelError.
    """
    config = fields.config
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, Mapping):
        raise ModelError(f"{name} is {rope!r}; it must be an object or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError(f"{name} differs between layers ({', '.join(map(str, rope))}), which is not supported")
    return _rope(name, rope, fields, head_dim, theta, partial, longrope)


def read_rope_by_layer(fields: Fields, head_dim: int, theta: float, sliding_theta: float) -> tuple[Rope, Rope]:
    """Of layers without and with a sliding window (Gemma 3), where config.json is silent with these bases."""
    config = fields.config
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or not all(isinstance(value, Mapping) for value in rope.values()):
        raise ModelError(f"rope_parameters is {rope!r}; it must have objects full_attention and sliding_attention")
    full, sliding = rope.get("full_attention") or {}, rope.get("sliding_attention") or {}
    if rope and set(rope) != {"full_attention", "sliding_attention"}:
        raise ModelError(f"rope_parameters has {', '.join(map(str, rope))}; it must have full_ and sliding_attention")
    if rope:
        name = "rope_parameters.full_attention"
        of_full = _rope(name, full, Fields({**config, "rope_theta": None}), head_dim, theta, None, False)
    else:
        of_full = read_rope(fields, head_dim, theta, None)
    local = {**config, "rope_theta": config.get("rope_local_base_freq"), "partial_rotary_factor": None}
    of_sliding = _rope(
        "rope_parameters.sliding_attention", sliding, Fields(local), head_dim, sliding_theta, None, False
    )
    return of_full, of_sliding


def _rope(
    name: str,
    rope: Mapping[str, Any],
    fields: Fields,
    head_dim: int,
    theta: float,
    partial: float | None,
    longrope: bool,
) -> Rope:
    found = rope.get("rope_theta")
    if found is None:
        found = fields.get("rope_theta") or theta
    base = positive("rope_theta", found)
    if base <= 1:
        raise ModelError(f"rope_theta is {base!r}; it must be above 1")
    rotary_dim = _rotary_dim(name, rope, fields, head_dim, partial)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(base, None, rotary_dim)
    known = _SCALINGS if longrope else {key: read for key, read in _SCALINGS.items() if key != "longrope"}
    if longrope and kind in ("su", "yarn"):  # what earlier files of Phi-3 call it
        kind = "longrope"
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(f"{name}.rope_type is {kind!r}; supported are 'default', {str(list(known))[1:-1]}")
    scaling = known[kind](Fields(rope, f"{name}."), fields)
    if scaling.factors and len(scaling.factors) != rotary_dim // 2:
        raise ModelError(
            f"{name}.short_factor has {len(scaling.factors)} entries; it must have {rotary_dim // 2}, half of what is "
            "rotated of a head"
        )
    return Rope(base, scaling, rotary_dim)


def _rotary_dim(name: str, rope: Mapping[str, Any], fields: Fields, head_dim: int, partial: float | None) -> int:
    where = f"{name}.partial_rotary_factor"
    share = rope.get("partial_rotary_factor")
    if share is None:
        where = fields.aliases.get("partial_rotary_factor", "partial_rotary_factor")
        share = fields.get("partial_rotary_factor")
    if share is None:
        share = 1.0 if partial is None else partial
    if partial is None:
        if share != 1.0 or isinstance(share, bool):
            raise ModelError(f"{where} is {share!r}; only 1.0 is supported")
        return head_dim
    share = positive(where, share)
    rotary_dim = int(head_dim * share) if share <= 1 else 0
    if rotary_dim < 2 or rotary_dim % 2:
        raise ModelError(f"{where} is {share!r}; of a head's {head_dim} elements an even number must be rotated")
    return rotary_dim


def _linear_scaling(rope: Fields, fields: Fields) -> RopeScaling:
    return RopeScaling("linear", rope.positive("factor"))


def _llama3_scaling(rope: Fields, fields: Fields) -> RopeScaling:
    scaling = RopeScaling(
        "llama3",
        rope.positive("factor"),
        _original_length(rope, fields),
        low_freq_factor=rope.positive("low_freq_factor"),
        high_freq_factor=rope.positive("high_freq_factor"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ModelError(f"{rope.prefix}low_freq_factor must be below {rope.prefix}high_freq_factor")
    return scaling


def _yarn_scaling(rope: Fields, fields: Fields) -> RopeScaling:
    factor = rope.positive("factor")

    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = amplitude(1.0)
    if rope.config.get("attention_factor") is not None:
        attention_factor = rope.positive("attention_factor")
    elif rope.config.get("mscale") and rope.config.get("mscale_all_dim"):
        attention_factor = amplitude(rope.positive("mscale")) / amplitude(rope.positive("mscale_all_dim"))
    return RopeScaling(
        "yarn",
        factor,
        _original_length(rope, fields),
        beta_fast=rope.positive("beta_fast") if rope.config.get("beta_fast") else 32.0,
        beta_slow=rope.positive("beta_slow") if rope.config.get("beta_slow") else 1.0,
        truncate=rope.flag("truncate", True),
        attention_factor=attention_factor,
    )


def _longrope_scaling(rope: Fields, fields: Fields) -> RopeScaling:
    original = _original_length(rope, fields)
    factor = rope.positive("factor", fields.size("max_position_embeddings") / original)
    stretched = math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    listed = rope.config.get("short_factor")
    if not isinstance(listed, list) or not listed:
        raise ModelError(f"{rope.prefix}short_factor is {listed!r}; it must be a list of positive numbers")
    return RopeScaling(
        "longrope",
        factor,
        original,
        attention_factor=rope.positive("attention_factor", stretched),
        factors=tuple(positive(f"{rope.prefix}short_factor[{i}]", value) for i, value in enumerate(listed)),
    )


def _original_length(rope: Fields, fields: Fields) -> int:
    """Tokens of the first training, said in the scaling, beside it (which wins), or, unsaid, the present length."""
    name = "original_max_position_embeddings"
    if fields.config.get(name) is not None:
        return fields.size(name)
    return rope.size(name) if rope.config.get(name) is not None else fields.size("max_position_embeddings")


_SCALINGS: dict[str, Callable[[Fields, Fields], RopeScaling]] = {
    "linear": _linear_scaling,
    "llama3": _llama3_scaling,
    "yarn": _yarn_scaling,
    "longrope": _longrope_scaling,
}
