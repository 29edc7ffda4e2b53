"""Sampling on the device: the tokens of `kernels.sampling`, without a sort and without the host."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda import sampling, sampling_logprobs, sampling_plan, sampling_weights
from kernels.cuda.common import device_type
from kernels.cuda.sampling_weights import key_of, value_of
from kernels.cuda.upload import Upload
from kernels.cuda.workspace import Workspace
from kernels.ops import SampleResult, SamplingMetadata
from kernels.reference import ReferenceOps
from kernels.sampling import token_weights
from tests.kernels.cases import random_sampling
from tests.kernels.cases import sampling as parameters

DEVICE = torch.device(device_type())
REFERENCE = ReferenceOps()


def sample(
    logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None, workspace: Workspace | None = None
) -> SampleResult:
    """Draw on the device; everything back on the host."""
    upload = Upload(DEVICE)
    plan = sampling.make_plan(metadata, *logits.shape, upload)
    upload.send()
    on_device = None if pending is None else pending.to(DEVICE)
    result = sampling.sample(logits.to(DEVICE), plan, on_device, workspace or Workspace(DEVICE))
    return SampleResult(result.token_ids.cpu(), result.finite.cpu())


@triton.jit
def _keys(x_ptr, keys_ptr, back_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    key = key_of(tl.load(x_ptr + index))
    tl.store(keys_ptr + index, key)
    tl.store(back_ptr + index, value_of(key))


def device_weights(scaled: Tensor, maximum: float) -> Tensor:
    return sampling_weights.token_weights(scaled.to(DEVICE), maximum).cpu()


def test_weights_are_those_of_float64() -> None:
    """Over 196,608 logits: about one weight in a hundred differs from NumPy's float64 exp, by one unit of 2^-36."""
    generator = torch.Generator().manual_seed(1)
    differing = 0
    for maximum in (0.0, 3.7, 88.25, 1e4):
        distance = torch.rand(12 * 4096, generator=generator) ** 2 * 26
        scaled = maximum - distance
        scaled[0] = maximum
        expected = token_weights(scaled.numpy(), np.float32(maximum))
        actual = device_weights(scaled, maximum).numpy()
        assert actual[0] == 1 << 36
        assert np.abs(actual - expected).max() <= 1
        differing += int((actual != expected).sum())
    print(f"{differing} of {4 * 12 * 4096} weights differ by one")
    assert differing < 0.02 * 4 * 12 * 4096


def test_weights_never_grow_with_the_distance() -> None:
    """On neighbouring floats around every border of the table, and down to where weights end."""
    borders = (torch.arange(18_432) * (math.log(2) / 512)).float()
    around = torch.stack(
        [borders, torch.nextafter(borders, torch.tensor(1e9)), torch.nextafter(borders, torch.tensor(0.0))]
    )
    distance = torch.cat([around.flatten(), torch.linspace(24.9, 25.1, 4096)]).clamp(min=0).sort().values
    distance = distance[: len(distance) // 4096 * 4096]
    weights = device_weights(-distance, 0.0)
    assert (weights.diff() <= 0).all()
    assert weights[0] == 1 << 36
    assert (weights[distance >= 25] == 0).all()


def test_keys_are_in_the_order_of_floats() -> None:
    values = torch.cat(
        [torch.randn(500) * 10.0 ** torch.randint(-40, 38, (500,)), torch.tensor([0.0, -0.0, 3.4e38, -3.4e38])]
    )
    values = torch.cat([values, torch.full((8,), float("-inf"))])[:512].to(DEVICE)
    keys = torch.empty(512, dtype=torch.int32, device=DEVICE)
    back = torch.empty(512, device=DEVICE)
    _keys[(1,)](values, keys, back, BLOCK=512)
    assert torch.equal(back, values + 0.0)
    order = keys.sort().indices
    assert (values[order].diff() >= 0).all() or values[order].isinf().any()
    assert torch.equal(values[order].sort().values, values[order])


def check(logits: Tensor, metadata: SamplingMetadata, pending: Tensor | None = None) -> int:
    """How many tokens differ from the reference's."""
    actual, expected = sample(logits, metadata, pending), REFERENCE.sample(logits, metadata, pending)
    assert torch.equal(actual.finite, expected.finite)
    return int((actual.token_ids != expected.token_ids)[expected.finite].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_filter_at_random(dtype: torch.dtype) -> None:
    """Rows with all filters, biases and penalties mixed: the reference's tokens. Weights may differ by one unit, so a
    token could at a border; in these rows none does."""
    rng = random.Random(5)
    for vocab, spread in ((61, 1.0), (300, 4.0), (1000, 0.1), (2500, 2.0)):
        generator = torch.Generator().manual_seed(vocab)
        logits = (torch.randn(5, vocab, generator=generator) * spread).to(dtype)
        assert check(logits, random_sampling(rng, 5, vocab)) == 0


@pytest.mark.parametrize("flat", [False, True])
def test_long_rows(flat: bool) -> None:
    """Vocabularies of many chunks: candidates suffice for a peaked row, and do not for a flat one."""
    vocab = 20_009
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(5, vocab, generator=generator) * (0.3 if flat else 3.0)).to(torch.bfloat16)
    metadata = parameters(
        5,
        seeds=[7, (1 << 64) - 1, 12345678901234567890, 3, 4],
        positions=[0, 1, 4_000_000_000, 3, 4],
        temperatures=[0.0, 0.8, 1.0, 1.3, 0.7],
        top_ks=[0, 0, 40, 0, 0],
        top_ps=[1.0, 1.0, 0.9, 0.9, 1.0],
        min_ps=[0.0, 0.0, 0.0, 0.0, 0.05],
    )
    assert check(logits, metadata) == 0


def test_a_row_alone_and_among_others() -> None:
    rng = random.Random(8)
    logits = torch.randn(5, 700) * 2
    metadata = random_sampling(rng, 5, 700)
    together = sample(logits, metadata).token_ids
    for row in range(5):
        fields: dict[str, Any] = {}
        for name in metadata.__slots__:  # type: ignore[attr-defined]
            value = getattr(metadata, name)
            if name == "biases":
                fields[name] = [(0, token, bias) for r, token, bias in value if r == row]
            elif isinstance(value, dict):
                fields[name] = {0: value[row]} if row in value else {}
            else:
                fields[name] = [value[row]]
        assert sample(logits[row : row + 1], SamplingMetadata(**fields)).token_ids == together[row]


def test_the_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(4, 1500) * 2
    metadata = random_sampling(random.Random(4), 4, 1500)
    tokens = sample(logits, metadata).token_ids
    monkeypatch.setattr(sampling, "BLOCK", 512)
    monkeypatch.setattr(sampling, "CAPACITY", 1024)
    assert torch.equal(sample(logits, metadata).token_ids, tokens)


def test_ties_at_every_border() -> None:
    """Few distinct values: top-k, top-p and the draw all meet ties, which are kept."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(0, 4, (8, 3000), generator=generator).float()
    metadata = parameters(8, top_ks=[1, 5, 0, 0, 2000, 0, 7, 0], top_ps=[1.0, 1.0, 0.3, 0.999, 0.5, 0.0, 0.9, 1.0])
    assert check(logits, metadata) == 0
    greedy = sample(logits, parameters(8, temperatures=0.0))
    assert torch.equal(greedy.token_ids, logits.argmax(-1))


def test_temperatures_that_merge_logits() -> None:
    """So hot that neighbouring logits are rounded to one: top-k must keep what the division has made a tie."""
    base = torch.full((2, 3000), 1.0)
    base[:, ::7] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    metadata = parameters(2, temperatures=[3e38, 1.7], top_ks=[20, 20])
    assert check(base, metadata) == 0


def test_pending_tokens_count_for_penalties() -> None:
    """Known before or drawn a moment ago: the same penalties, whether the token is new or not."""
    rng = random.Random(6)
    logits = torch.randn(6, 200)
    fields = {
        "repetition_penalties": [1.0, 1.3, 0.8, 1.2, 1.0, 1.5],
        "presence_penalties": [0.5, 0.0, 0.3, 0.0, 0.0, 0.2],
        "frequency_penalties": [0.2, 0.4, 0.0, 0.0, 0.0, 0.1],
        "prompt_tokens": {row: [rng.randrange(200) for _ in range(5)] for row in range(5)},
        "temperatures": [0.0, 0.0, 1.0, 0.7, 0.0, 0.0],
        "allowed": {5: [3, 4, 5, 6]},
    }
    output = {row: [rng.randrange(200) for _ in range(4)] for row in range(6)}
    pending = torch.tensor([output[0][0], int(logits[1].argmax()), int(logits[2].argmax()), -1, 9, 4])
    with_output = parameters(6, **fields, output_tokens=output)
    assert check(logits, with_output, pending) == 0
    known = {row: [*tokens, int(pending[row])] if pending[row] >= 0 else tokens for row, tokens in output.items()}
    before = sample(logits, with_output, pending).token_ids
    assert torch.equal(before, sample(logits, parameters(6, **fields, output_tokens=known)).token_ids)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's, for the huge logits
def test_faults_and_dead_ends() -> None:
    """NaN and infinities end their row alone; a row of which all is forbidden gives 0; huge logits are numbers."""
    logits = torch.randn(6, 100)
    logits[1, 50] = float("nan")
    logits[2, 99] = float("inf")
    logits[3, 0] = float("-inf")
    logits[5] = torch.linspace(-1.0, 1.0, 100) * 3.3e38
    metadata = parameters(
        6,
        biases=[(4, token, float("-inf")) for token in range(100)],
        temperatures=[1.0, 1.0, 0.0, 1.0, 1.0, 0.5],
    )
    result = sample(logits, metadata)
    assert result.finite.tolist() == [True, False, False, False, True, True]
    assert result.token_ids[1:5].tolist() == [0, 0, 0, 0]
    assert check(logits, metadata) == 0


def test_log_probabilities() -> None:
    """Of given tokens and of the most likely, the lower id first on a tie; a row that is not finite harms no other."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(4, 5001, generator=generator) * 3
    logits[2, 100:400] = 20.0
    logits[3, 7] = float("nan")
    token_ids = torch.tensor([17, 5000, 399, 0])
    workspace = Workspace(DEVICE)
    for count in (0, 5):
        found = sampling_logprobs.log_probabilities(logits.to(DEVICE), token_ids.to(DEVICE), count, workspace)
        expected = REFERENCE.log_probabilities(logits, token_ids, count)
        for name in ("logprobs", "top_ids", "top_logprobs"):
            actual = getattr(found, name).cpu()[:3]
            torch.testing.assert_close(actual, getattr(expected, name)[:3], atol=1e-5, rtol=1e-5)


def test_masks() -> None:
    """Packed masks beside allowed ids, biases and penalties, in some rows only."""
    rng, vocab = random.Random(5), 3001
    logits = torch.randn(6, vocab) * 2
    masks = {row: np.zeros(94, dtype=np.uint32) for row in (0, 2, 5)}
    for row, ids in ((0, range(0, vocab, 3)), (2, [3000]), (5, rng.sample(range(vocab), 40))):
        for token in ids:
            masks[row][token // 32] |= np.uint32(1 << token % 32)
    fields = random_sampling(rng, 6, vocab)
    metadata = dataclasses.replace(fields, masks=masks, allowed={5: list(range(vocab)), 1: [7, 9]})
    assert check(logits, metadata) == 0
    assert sample(logits, metadata).token_ids[2] == 3000


def test_poisoned_memory_is_never_read() -> None:
    logits = torch.randn(3, 1001) * 2
    metadata = random_sampling(random.Random(13), 3, 1001)
    expected = sample(logits, metadata).token_ids
    workspace = Workspace(DEVICE)
    sample(logits, metadata, workspace=workspace)
    for buffer in workspace._buffers.values():
        buffer.fill_(float("nan") if buffer.dtype.is_floating_point else -1)
    assert torch.equal(sample(logits, metadata, workspace=workspace).token_ids, expected)


def test_bad_input_is_refused() -> None:
    upload = Upload(DEVICE)
    with pytest.raises(ValueError, match="logits have 262145 columns"):
        sampling.make_plan(parameters(1), 1, sampling_plan.MAX_VOCAB + 1, upload)
    with pytest.raises(ValueError, match="count is 1025; allowed is 0 to 1024"):
        sampling_logprobs.log_probabilities(
            torch.zeros(1, 5000), torch.zeros(1, dtype=torch.int64), 1025, Workspace(DEVICE)
        )
    plan = sampling.make_plan(parameters(2), 2, 10, upload)
    upload.send()
    workspace = Workspace(DEVICE)
    with pytest.raises(ValueError, match=r"logits must be \[2, 10\]"):
        sampling.sample(torch.zeros(3, 10, device=DEVICE), plan, None, workspace)
    with pytest.raises(ValueError, match=r"dtype torch\.int64"):
        sampling.sample(torch.zeros(2, 10, dtype=torch.int64, device=DEVICE), plan, None, workspace)
    with pytest.raises(ValueError, match="pending must be"):
        sampling.sample(torch.zeros(2, 10, device=DEVICE), plan, torch.zeros(3, dtype=torch.int64), workspace)
