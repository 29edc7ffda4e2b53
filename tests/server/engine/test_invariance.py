"""The check at start: it passes for backends that keep the promise, and fails for one that does not."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cuda.ops import CudaOps
from kernels.ops import Activations, LinearWeight, Ops
from kernels.portable import PortableOps
from models.config import ModelConfig
from models.loader import random_model
from server.engine.invariance import rows_agree
from tests.server.engine.cores import TINY


class Careless(PortableOps):
    """A backend whose linear layers add something that depends on the number of rows."""

    def linear(self, x: Activations, weight: LinearWeight) -> Tensor:
        """x [T, K] -> [T, N], with a last bit that many rows do not get."""
        return super().linear(x, weight) * (1.0 + (x.shape[0] < 16) * 2.0**-20)


def agree(ops: Ops, kv_dtype: torch.dtype, length: int) -> bool:
    config = ModelConfig.from_hf(TINY | {"num_hidden_layers": 1})
    model = random_model(config, ops, seed=1, std=0.3)
    return rows_agree(model, ops, model.kv_cache_specs(16, kv_dtype), length)


def test_invariant_backends_pass() -> None:
    assert agree(PortableOps(dtype=torch.float32), torch.float32, 300)
    assert agree(CudaOps(torch.bfloat16), torch.int8, 40)


def test_a_careless_backend_fails() -> None:
    assert not agree(Careless(dtype=torch.float32), torch.float32, 300)
