"""Settings of the whole test run."""

from __future__ import annotations

import os
import sys

# The models of the tests are tiny: a second thread gains nothing, and on a shared machine each step would wait for
# whichever thread is not being run. Set before torch is imported; servers and engines that tests start inherit it.
# Tests about thread counts set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import interpreter

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def interpreted() -> None:
    """Where kernels run in the interpreter, it sums in one order."""
    if "kernels.cuda.common" in sys.modules and os.environ.get("TRITON_INTERPRET") == "1":
        interpreter.install()
