"""The table of cosines and sines of the rotary position embedding (RoFormer, arXiv:2104.09864), scaling applied.

Everything is rounded to float32 where the reference implementation rounds: a frequency off by one unit in the last
place is, at position 100 000, an angle off by almost 0.01.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.ops import RotaryTable
from models.config import ModelConfig
from models.rope import RopeScaling


def rotary_table(config: ModelConfig, device: torch.device) -> RotaryTable:
    """The table of every position of the model, float32 [max_position_embeddings, rotary_dim / 2]."""
    frequencies = _frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
    return _table(config, frequencies, config.rope_scaling.attention_factor if config.rope_scaling else 1.0, device)


def layer_tables(config: ModelConfig, device: torch.device) -> list[RotaryTable]:
    """The table of each layer: that of `rotary_table`, that of layers with a window, or one that rotates by nothing."""
    found: dict[str, RotaryTable] = {}
    for layer in range(config.num_layers):
        kind = config.rotary_kind(layer)
        if kind in found:
            continue
        if kind == "full":
            found[kind] = rotary_table(config, device)
        elif kind == "none":
            found[kind] = identity_table(config, device)
        else:
            assert config.sliding_rope_theta is not None
            found[kind] = _table(config, _frequencies(config.rotary_dim, config.sliding_rope_theta, None), 1.0, device)
    return [found[config.rotary_kind(layer)] for layer in range(config.num_layers)]


def identity_table(config: ModelConfig, device: torch.device) -> RotaryTable:
    """The table that rotates by nothing, for layers without positions: x * 1 - y * 0 is x to the bit."""
    shape = (config.max_position_embeddings, config.rotary_dim // 2)
    return RotaryTable(cos=torch.ones(shape, device=device), sin=torch.zeros(shape, device=device))


def _table(config: ModelConfig, frequencies: Tensor, amplitude: float, device: torch.device) -> RotaryTable:
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = positions[:, None] * frequencies[None, :]
    return RotaryTable(cos=(angles.cos() * amplitude).to(device), sin=(angles.sin() * amplitude).to(device))


def _frequencies(rotary_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair of elements: theta^(-2i/D), scaled; float32 [D / 2]."""
    powers = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    if scaling is not None and scaling.kind == "longrope":
        return 1.0 / (torch.tensor(scaling.factors) * powers)
    frequencies = 1.0 / powers
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return _yarn(powers, theta, scaling)


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Short waves stay, long ones are stretched by the factor, those between blend (Llama 3.1, arXiv:2407.21783)."""
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    keep = (length / wavelengths - low) / (high - low)  # 0 where the wavelength is length / low, 1 at length / high
    blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
    scaled = torch.where(wavelengths < length / high, frequencies, blended)
    return torch.where(wavelengths > length / low, frequencies / scaling.factor, scaled)


def _yarn(powers: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Like llama3 in spirit: the blend is linear in the index of the pair, between the pairs that turn beta_fast and
    beta_slow times over the original length (YaRN, arXiv:2309.00071, section 3.2)."""
    pairs = len(powers)

    def pair_that_turns(turns: float) -> float:
        return pairs * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)  # the upper limit is that of the reference implementation
    if first == last:
        last += 0.001
    keep = 1 - ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - keep) + 1.0 / powers * keep
