"""A forward pass written down once, and carried out with one call a step.

A decoder asks for the same operations on the same buffers in every step; only the tokens, their number and their places
in the cache differ, and those the kernels read from the Step. So its calls are recorded, once, as commands, and a step
hands all of them to the threads together: between two operations the threads meet, nothing returns to Python, and
Python's part of a step does not grow with the number of layers. The same thought as a CUDA graph, for a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cpu.native import Command, Team
from kernels.cpu.plan import CpuPlan


class Recording:
    """Commands in the making, what they point to, and the buffers that their results go to.

    A buffer has room for `max_tokens` rows. One serves every call of the same operation with the same width: as the
    contract says, a result is valid until the next call of the same method.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.commands: list[Command] = []
        self.kept: list[Any] = []
        self.max_positions: int | None = None
        self.num_blocks: int | None = None
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], Tensor] = {}

    def buffer(self, name: str, rows: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first `rows` rows of the buffer of this name: [rows, *shape]."""
        key = (name, shape, dtype)
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = torch.empty((self.max_tokens, *shape), dtype=dtype)
        return found[:rows]

    def bound(self, max_positions: int | None = None, num_blocks: int | None = None) -> None:
        """Note what a plan must stay within."""
        for name, limit in (("max_positions", max_positions), ("num_blocks", num_blocks)):
            known = getattr(self, name)
            if limit is not None and (known is None or limit < known):
                setattr(self, name, limit)


class Program:
    """A recorded forward pass. Owns its buffers; the result of a call is valid until the next one."""

    def __init__(self, team: Team, recording: Recording, token_ids: Tensor, result: Tensor) -> None:
        """token_ids: int64 [max_tokens], which the commands read; result: the first rows of what they write."""
        self._team = team
        self._recording = recording  # keeps alive what the commands point to
        self._count = len(recording.commands)
        self._commands = (Command * self._count)(*recording.commands)
        self._token_ids = token_ids
        self._result = result.as_strided((recording.max_tokens, *result.shape[1:]), result.stride())
        self._rows = self._result

    def __call__(self, token_ids: Tensor, plan: CpuPlan) -> Tensor:
        """token_ids int64 [T] -> what the recorded forward pass returns for them, [T, ...]. Raises ValueError if there
        are more tokens, longer sequences or other blocks than it was recorded for."""
        limits = self._recording
        tokens = plan.num_tokens
        if token_ids.shape != (tokens,) or tokens > limits.max_tokens:
            raise ValueError(
                f"token_ids has shape {tuple(token_ids.shape)}, the plan {tokens} tokens; up to {limits.max_tokens} fit"
            )
        if limits.max_positions is not None and plan.longest > limits.max_positions:
            raise ValueError(f"rotary has {limits.max_positions} positions; a sequence has {plan.longest} tokens")
        if limits.num_blocks is not None and plan.largest_block >= limits.num_blocks:
            raise ValueError(f"plan uses block {plan.largest_block}, kv_cache has {limits.num_blocks} blocks")
        given = token_ids.to(torch.int64).contiguous()
        # Not by an operator of torch: the first after the weights have passed through the caches is slow.
        ctypes.memmove(self._token_ids.data_ptr(), given.data_ptr(), given.nbytes)
        self._team.run(self._commands, self._count, plan.struct)
        if len(self._rows) != tokens:
            self._rows = self._result[:tokens]
        return self._rows


# Operators that only look at a tensor in another way, and the making of buffers.
_VIEWS = frozenset(
    "view reshape _unsafe_view split split_with_sizes slice select as_strided unsqueeze squeeze detach alias expand "
    "transpose t permute unbind chunk empty empty_strided narrow".split()
)


class _NothingComputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch compiles nothing here. To have its compiler skip this class it would import it, which takes seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name not in _VIEWS:
            raise RuntimeError(f"torch's operator {name} would run once, while recording, and never again: use Ops")
        return func(*args, **(kwargs or {}))


@contextmanager
def computing_is_an_error() -> Iterator[None]:
    """While this lasts, torch operators that compute raise RuntimeError: they would be missing in the program."""
    with _NothingComputed():  # type: ignore[no-untyped-call]
        yield
