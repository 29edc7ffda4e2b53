"""What training the same model would take: parameters, gradients, Adam's moments and activations.

The textbook's count in float32 is 4 bytes a parameter and 20 more (Fregly, Barth and Eigenbrode, "Generative AI on
AWS", chapter 4): 4 for the gradient, 8 for Adam's two moments (arXiv:1412.6980), and an allowance of 8 for activations
and temporary memory. The first three are exact. The allowance is a rule of thumb, so activations are computed here from
the batch as well, and both are shown.

In mixed precision (arXiv:1710.03740, counted as in ZeRO, arXiv:1910.02054, section 3.1) a parameter and its gradient
take 2 bytes each in bfloat16, and the optimizer keeps 12: a float32 copy and the two moments.

On n devices DDP keeps all of that on each; FSDP, which is stage 3 of ZeRO, keeps a share of 1/n on each, and gathers
the parameters of one layer while it computes with them (of the next as well, where it prefetches). Activations belong
to the sequences of a device and are not shared.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.config import ModelConfig
from server.planner.sizes import linear_shapes

TEXTBOOK_ACTIVATION_BYTES = 8


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of a parameter, its gradient, what the optimizer keeps for it, and of a value of the activations."""

    name: str
    parameter: int
    gradient: int
    optimizer: int
    activation: int

    @property
    def state(self) -> int:
        """Bytes a parameter, activations aside."""
        return self.parameter + self.gradient + self.optimizer


FLOAT32 = Precision("float32", 4, 4, 8, 4)
BFLOAT16 = Precision("bfloat16 mixed", 2, 2, 12, 2)


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes on each device. textbook: the state with the textbook's allowance of 8 bytes a parameter for activations,
    shared like the state: without a batch it says no more.

    gathered: parameters that FSDP holds beyond its share, of the largest layer and the one prefetched; else 0.
    """

    precision: str
    sharding: str
    devices: int
    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    textbook: int

    @property
    def total(self) -> int:
        """With the activations that were computed."""
        return self.parameters + self.gradients + self.optimizer + self.gathered + self.activations


def training_memory(config: ModelConfig, devices: int, batch: int, context: int) -> list[TrainingMemory]:
    """Each precision on one device, then by DDP and by FSDP on `devices`; `batch` sequences of `context` tokens on each
    device."""
    plans: list[TrainingMemory] = []
    for precision in (FLOAT32, BFLOAT16):
        activations = activation_bytes(config, precision, batch, context)
        shardings = (("none", 1),) if devices == 1 else (("none", 1), ("DDP", devices), ("FSDP", devices))
        for sharding, count in shardings:
            parts = count if sharding == "FSDP" else 1
            number = -(-config.num_parameters // parts)
            gathered = 0 if parts == 1 else 2 * largest_unit(config) * precision.parameter
            plans.append(
                TrainingMemory(
                    precision=precision.name,
                    sharding=sharding,
                    devices=count,
                    parameters=number * precision.parameter,
                    gradients=number * precision.gradient,
                    optimizer=number * precision.optimizer,
                    gathered=gathered,
                    activations=activations,
                    textbook=number * (precision.state + TEXTBOOK_ACTIVATION_BYTES),
                )
            )
    return plans


def largest_unit(config: ModelConfig) -> int:
    """Parameters of the largest of the pieces that FSDP gathers: a layer, or a table of token vectors."""
    shapes = linear_shapes(config)
    layer = sum(shape.n * shape.k for shape in shapes if shape.role == "layer")
    return max(layer, config.vocab_size * config.hidden_size)


def activation_bytes(config: ModelConfig, precision: Precision, batch: int, context: int) -> int:
    """What the forward pass keeps for the backward one, without recomputation, attention in blocks (arXiv:2205.14135).

    For each token a norm keeps its input in float32, the normalized and the scaled row, and one float32; attention q
    and k as rotated, v, its result and one float32 a head; the feed-forward layer gate, its silu, up and their product;
    the end its norm and the float32 logarithms of the softmax. Counted as in arXiv:2205.05198, for these layers; a test
    compares it with what autograd keeps.
    """
    hidden, itemsize = config.hidden_size, precision.activation
    inner = config.intermediate_size * max(config.experts_per_token, 1)
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = hidden * (4 + 2 * itemsize) + 4
    layer = 2 * norm + 2 * (q + kv) * itemsize + 4 * config.num_heads + 4 * inner * itemsize
    return batch * context * (config.num_layers * layer + norm + 4 * config.vocab_size)
