"""The compiled library through ctypes: its structures (csrc/step.h), and a team of threads that runs commands."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch

from kernels.cpu.build import library_path

if TYPE_CHECKING:
    from torch import Tensor

FLOAT32, BFLOAT16, FLOAT16, INT8, INT8_DOT = range(5)
TYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.int8: INT8}

EMBEDDING, NORM, LINEAR, GATED, WRITE_KV, ATTENTION, QUANTIZE, SAMPLE = range(8)
LAYER_NORM, UNGATED, ADD, ADD_POSITIONS, SOFTCAP = range(8, 13)
ROUTE, GROUP, EXPERT_LINEAR, COMBINE = range(13, 17)
WEIGHTS = 17

SCRATCH_FLOATS = 1 << 18
"""What each thread has for the intermediate values of a row, or of a part of attention."""


class LibraryMissing(Exception):
    """The library is not there, or does not fit. One line for a person, with what to do."""


class Command(ctypes.Structure):
    """One operation on given addresses; what p, n and f mean is said beside its kernel in csrc/."""

    _fields_ = (
        ("op", c_int32),
        ("flags", c_int32),
        ("rows", c_int64),
        ("p", c_void_p * 10),
        ("n", c_int64 * 6),
        ("f", c_float * 2),
    )


class Step(ctypes.Structure):
    """Where each token of a step stands."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("query_starts", c_void_p),
        ("positions", c_void_p),
        ("sequences", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
    )


class Cache(ctypes.Structure):
    """One layer's K and V."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("num_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("type", c_int32),
        ("unused", c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """The library of the current sources. Raises LibraryMissing."""
    path = library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        reason = "it is not there" if not path.exists() else str(error)
        raise LibraryMissing(
            f"the compiled CPU kernels cannot be loaded ({reason}): python -m kernels.cpu.build makes them"
        ) from None
    sizes = (c_int64 * 3)()
    loaded.stet_layout(sizes)
    if list(sizes) != [ctypes.sizeof(each) for each in (Command, Step, Cache)]:
        raise LibraryMissing(f"the structures of {path.name} are not those of kernels/cpu/native.py")
    loaded.stet_team.restype = c_void_p
    loaded.stet_team.argtypes = (c_int32, ctypes.c_char_p)
    loaded.stet_runs.restype = c_int32
    loaded.stet_runs.argtypes = (ctypes.c_char_p,)
    loaded.stet_free.argtypes = (c_void_p,)
    loaded.stet_kernels.restype = ctypes.c_char_p
    loaded.stet_kernels.argtypes = (c_void_p,)
    loaded.stet_group_of.argtypes = (c_void_p,)
    loaded.stet_run.argtypes = (c_void_p, c_void_p, c_int64, c_void_p)
    loaded.stet_pack.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p)
    loaded.stet_pack_dot.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p)
    loaded.stet_random_31_bits.argtypes = (c_void_p, c_void_p, c_void_p, c_int64, c_void_p)
    loaded.stet_large_pages.argtypes = loaded.stet_populate.argtypes = (c_void_p, c_int64)
    for name in (
        *("free", "run", "pack", "pack_dot", "random_31_bits"),
        *("large_pages", "populate", "keep_memory", "return_large_memory"),
    ):
        getattr(loaded, f"stet_{name}").restype = None
    loaded.stet_return_large_memory()
    return loaded


class Team:
    """Threads that carry out commands together with the one that calls. Owns them until it is collected."""

    def __init__(self, num_threads: int, kernels: str | None = None) -> None:
        """kernels: "avx512", "avx2" or "generic"; None: the best of this processor. Raises LibraryMissing, and
        ValueError for kernels that the processor does not run or more threads than the system gives."""
        self._handle = None
        self._library = library()
        name = None if kernels is None else kernels.encode()
        if name is not None and not self._library.stet_runs(name):
            raise ValueError(f"kernels is {kernels!r}; this processor does not run them")
        handle = self._library.stet_team(num_threads, name)
        if not handle:
            raise ValueError(
                f"threads is {num_threads}; the system does not give this process so many, or their memory"
            )
        self._handle = handle
        self.num_threads = num_threads
        self.kernels: str = self._library.stet_kernels(handle).decode()
        # How many integers of a quantized row take four bytes: what these kernels multiply at once.
        self.group_of: int = self._library.stet_group_of(handle)
        self._run = self._library.stet_run
        self._process = os.getpid()

    def run(self, commands: ctypes.Array[Command] | Command, count: int, step: Step | None) -> None:
        """Carry out `count` commands in order. The memory that they name must be there and stay as it is."""
        self._run(self._handle, ctypes.addressof(commands), count, None if step is None else ctypes.addressof(step))

    def __del__(self) -> None:
        # After a fork the threads are not there to be ended.
        if self._handle and os.getpid() == self._process:
            self._library.stet_free(self._handle)


def keep_freed_memory() -> None:
    """Loading gave its memory back; from now on what a step frees is kept for the next one."""
    library().stet_keep_memory()


def command(
    op: int, rows: int, pointers: Sequence[Tensor | int | None], numbers: Sequence[int], flags: int = 0, f: float = 0.0
) -> Command:
    """A command on these tensors (or addresses; None: null)."""
    made = Command(op, flags, rows)
    for i, pointer in enumerate(pointers):
        made.p[i] = pointer if pointer is None or isinstance(pointer, int) else pointer.data_ptr()
    made.n[: len(numbers)] = numbers
    made.f[0] = f
    return made


def zeros(size: int, dtype: torch.dtype) -> Tensor:
    """`size` elements of zero on pages of their own, which the system hands out when they are first written to.

    So a large cache takes no time to make and only as much memory as is used; and what loading frees leaves no holes
    between what stays. The system is asked for large pages: the tables that turn addresses into places in memory are
    then small enough to stay in the core.
    """
    num_bytes = max(size, 1) * dtype.itemsize
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    # A tensor born under inference_mode could not be written to outside of it.
    with torch.inference_mode(False):
        tensor = torch.frombuffer(mmap.mmap(-1, num_bytes, **private), dtype=dtype, count=max(size, 1))[:size]
    library().stet_large_pages(tensor.data_ptr(), num_bytes)
    return tensor
