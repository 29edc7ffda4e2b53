"""A Llama decoder that can be trained, in plain torch; its parameter names are those of Hugging Face checkpoints.

The architecture is the one of Touvron et al. 2023 (RMSNorm before each block, rotary positions, SwiGLU) with grouped
queries (Ainslie et al. 2023) and the embedding used again as output layer. It can compute as if its linear layers were
quantized (`Decoder.as_served`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.ops import QuantizationMode
from models.training import fake_quantize


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder. Lengths are in tokens."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    max_length: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def hf_config(self, bos: int, eos: list[int], pad: int) -> dict[str, Any]:
        """This shape as the config.json of a `LlamaForCausalLM`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_length,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "tie_word_embeddings": True,
            "use_cache": True,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Shape:
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            intermediate_size=config["intermediate_size"],
            max_length=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rotary_table(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position and frequency, each [length, head_dim], float32 (Su et al. 2021)."""
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), shape.rope_theta**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of each head of `x` [batch, heads, length, head_dim] by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Projection(nn.Linear):
    """A linear layer without bias, in the precision `mode`."""

    mode: QuantizationMode = "none"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize.linear(x, self.weight, self.mode)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj = Projection(shape.hidden_size, wide)
        self.k_proj = Projection(shape.hidden_size, narrow)
        self.v_proj = Projection(shape.hidden_size, narrow)
        self.o_proj = Projection(wide, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = self.shape.num_heads // self.shape.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Projection(shape.hidden_size, shape.intermediate_size)
        self.up_proj = Projection(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Projection(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token ids [batch, length] (int64) to hidden states [batch, length, hidden]; `logits` and `loss` on top.

    `mode` is the precision of all linear layers, of the token table and of the head; only `as_served` sets it.
    """

    mode: QuantizationMode = "none"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw the weights so that copying a token from the context is easy to learn.

        The names of a story can only be kept apart by copying them, and from normal weights that skill comes late. So
        tokens keep their identity in the residual stream (large embeddings, a small last norm to match), and in each
        layer but the first half of the heads write what they read (value and output projections are transposes, in
        the way of Trockman and Kolter 2023): only where to look is left to learn.
        """
        shape = self.shape
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Projections back into the residual stream start smaller, so that depth does not add up (GPT-2).
                scale = (2 * shape.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(weight, std=0.02 * scale)
        nn.init.normal_(self.embed_tokens.weight, std=1.0)
        self.norm.weight.fill_(0.04)
        groups = shape.num_heads // shape.num_kv_heads
        for layer in list(self.layers)[1:]:
            attention = layer.self_attn
            if not isinstance(attention, Attention):
                raise TypeError("a layer without attention")
            for kv in range(shape.num_kv_heads // 2, shape.num_kv_heads):
                reading = torch.linalg.qr(torch.randn(shape.hidden_size, shape.head_dim))[0]
                rows = slice(kv * shape.head_dim, (kv + 1) * shape.head_dim)
                attention.v_proj.weight[rows] = reading.T
                for head in range(kv * groups, (kv + 1) * groups):
                    columns = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
                    attention.o_proj.weight[:, columns] = reading

    def forward(self, ids: Tensor) -> Tensor:
        x = fake_quantize.embedding(ids, self.embed_tokens.weight, self.mode)
        cos, sin = rotary_table(self.shape, ids.shape[1], ids.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)  # type: ignore[no-any-return]

    def as_served(self, mode: QuantizationMode) -> Decoder:
        """Compute from now on as a server with this quantization would; weights stay as they are. Returns itself."""
        self.mode = mode
        for module in self.modules():
            if isinstance(module, Projection):
                module.mode = mode
        return self

    def head(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> logits [..., vocab]"""
        return fake_quantize.linear(hidden, self.embed_tokens.weight, self.mode)

    def logits(self, ids: Tensor) -> Tensor:
        """[batch, length, vocab]"""
        return self.head(self(ids))

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets [batch, length] that are not -100."""
        logits = self.logits(ids).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def hf_weights(self) -> dict[str, Tensor]:
        """The weights under their names in a Hugging Face checkpoint (tied: without lm_head)."""
        return {f"model.{name}": weight.detach() for name, weight in self.named_parameters()}

    @classmethod
    def from_hf(cls, shape: Shape, weights: dict[str, Tensor]) -> Decoder:
        decoder = cls(shape)
        decoder.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
        return decoder
