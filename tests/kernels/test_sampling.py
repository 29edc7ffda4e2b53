"""Sampling: the distribution is that of transformers' processors, the arithmetic is DESIGN's integers, to the token."""

from __future__ import annotations

import math
import random
import warnings
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from kernels.cpu.ops import CpuOps
from kernels.ops import Ops, SamplingMetadata
from kernels.philox import philox_4x32_10, random_31_bits
from kernels.portable import PortableOps
from kernels.reference import ReferenceOps
from kernels.sampling import (
    draw,
    filter_stages,
    kept_weights,
    multiply_shift_ceil,
    multiply_shift_floor,
    token_weights,
)
from tests.kernels.cases import random_sampling, sampling

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS: list[Ops] = [ReferenceOps(), PortableOps(), CpuOps(2)]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the authors' Random123 library, kat_vectors
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = [np.array([word], dtype=np.uint64) for word in (*key, *counter)]
    result = philox_4x32_10((words[0], words[1]), (words[2], words[3], words[4], words[5]))
    assert [int(word[0]) for word in result] == expected


def test_random_bits_depend_on_every_part() -> None:
    base = (1 << 40, 5, 1)
    others = [(1 << 41, 5, 1), ((1 << 40) + 1, 5, 1), (1 << 40, 6, 1), (1 << 40, 5, 2)]
    seeds, positions, choices = zip(base, *others, base, strict=True)
    bits = random_31_bits(seeds, positions, choices).tolist()
    assert len(set(bits)) == 5
    assert bits[0] == bits[-1]
    assert all(0 <= b < 1 << 31 for b in bits)


def test_split_multiplication_is_exact() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        fraction, total = rng.randrange((1 << 31) + 1), rng.randrange(1 << rng.randrange(1, 55))
        exact = Fraction(fraction * total, 1 << 31)
        assert multiply_shift_floor(fraction, total) == math.floor(exact)
        assert multiply_shift_ceil(fraction, total) == max(1, math.ceil(exact))


def oracle(logits: list[float], m: SamplingMetadata, row: int, random_bits: int) -> int:
    """The rule of kernels/sampling.py in plain Python integers and float64, token by token, without its code."""
    x_of = {i: float(np.float32(x)) for i, x in enumerate(logits)}
    with np.errstate(over="ignore"):
        for r, token, bias in m.biases:
            if r == row:
                x_of[token] = float(np.float32(x_of[token]) + np.float32(bias))
        if row in m.allowed:
            x_of = {i: x if i in m.allowed[row] else -math.inf for i, x in x_of.items()}
        prompt, output = m.prompt_tokens.get(row, []), m.output_tokens.get(row, [])
        rep = np.float32(m.repetition_penalties[row])
        for token in set(prompt) | set(output):
            x = np.float32(x_of[token])
            x_of[token] = float(x * rep if x < 0 else x / rep)
        for token in set(output):
            penalty = m.frequency_penalties[row] * list(output).count(token) + m.presence_penalties[row]
            x_of[token] = float(np.float32(x_of[token]) - np.float32(penalty))
    best = max(x_of.values())
    if best == -math.inf:
        return 0
    if m.temperatures[row] == 0:
        return min(i for i, x in x_of.items() if x == best)
    x_of = {i: float(np.float32(x) / np.float32(m.temperatures[row])) for i, x in x_of.items()}
    best = max(x_of.values())
    w = {i: math.floor(float(np.exp(np.float64(x - best))) * 2.0**36) for i, x in x_of.items()}
    if m.top_ks[row]:
        kth = sorted(x_of.values(), reverse=True)[min(m.top_ks[row], len(x_of)) - 1]
        w = {i: v for i, v in w.items() if x_of[i] >= kth}
    if m.top_ps[row] < 1:
        p = Fraction(round(m.top_ps[row] * 2**31), 2**31)
        threshold = max(1, math.ceil(p * sum(w.values())))
        w = {i: v for i, v in w.items() if sum(u for u in w.values() if u > v) < threshold}
    w = {i: v for i, v in w.items() if v >= math.ceil(Fraction(m.min_ps[row]) * 2**36)}
    if m.typical_ps[row] < 1:
        total = sum(w.values())
        q = {i: round((x_of[i] - best) * 2.0**22) for i, v in w.items() if v}
        mean = round(float(sum(w[i] * q[i] for i in q)) / float(total))
        p = Fraction(round(m.typical_ps[row] * 2**31), 2**31)
        threshold = max(1, math.ceil(p * total))
        far = {i: abs(q[i] - mean) for i in q}
        w = {i: w[i] for i in q if sum(w[j] for j in q if far[j] < far[i]) < threshold}
    target, cumulative = random_bits * sum(w.values()) >> 31, 0
    for i in sorted(w):
        cumulative += w[i]
        if cumulative > target:
            return i
    raise AssertionError("no token drawn")


def random_logits(rng: random.Random, rows: int, vocab: int) -> torch.Tensor:
    """Smooth, bf16 (heavy with ties) or coarsely rounded logits."""
    logits = torch.randn(rows, vocab) * rng.choice([0.1, 1.0, 4.0])
    kind = rng.choice(["float32", "bf16", "coarse"])
    if kind == "coarse":
        return (logits * 2).round() / 2
    return logits.bfloat16() if kind == "bf16" else logits


def test_backends_pick_the_tokens_of_the_oracle() -> None:
    rng, checked = random.Random(0), 0
    for _ in range(150):
        rows, vocab = rng.randint(1, 5), rng.choice([2, 17, 60])
        logits, metadata = random_logits(rng, rows, vocab), random_sampling(rng, rows, vocab)
        bits = random_31_bits(metadata.seeds, metadata.positions, metadata.choices).tolist()
        expected = [oracle(logits[r].tolist(), metadata, r, bits[r]) for r in range(rows)]
        for backend in BACKENDS:
            assert backend.sample(logits, metadata).token_ids.tolist() == expected
        checked += rows
    assert checked > 300


def test_backends_pick_the_same_tokens() -> None:
    """Thousands of rows, vocabularies around the borders of the fast paths."""
    rng, rows_seen = random.Random(1), 0
    reference, *others = BACKENDS
    while rows_seen < 4000:
        rows, vocab = rng.randint(1, 12), rng.choice([1, 5, 127, 128, 129, 700, 6500])
        logits, metadata = random_logits(rng, rows, vocab), random_sampling(rng, rows, vocab)
        expected = reference.sample(logits, metadata)
        for backend in others:
            actual = backend.sample(logits, metadata)
            assert torch.equal(actual.token_ids, expected.token_ids)
            assert torch.equal(actual.finite, expected.finite)
        rows_seen += rows


def test_sums_beyond_exact_float64_still_agree() -> None:
    """A flat row of 2^17 + 5 tokens: the sum of the weights exceeds 2^53."""
    logits = torch.zeros(2, (1 << 17) + 5)
    metadata = sampling(2, top_ps=[1.0, 0.7])
    expected, *others = (backend.sample(logits, metadata).token_ids for backend in BACKENDS)
    assert all(torch.equal(other, expected) for other in others)


def test_distribution_is_that_of_transformers() -> None:
    """1,000 cases: equal support away from borders, probabilities within 1e-6."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import (
            MinPLogitsWarper,
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
            TypicalLogitsWarper,
        )
    rng, on_border = random.Random(2), 0
    for case in range(1000):
        vocab = rng.choice([30, 200, 1000])
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(case)) * rng.choice([0.5, 2.0, 5.0])
        seen = [rng.randrange(vocab) for _ in range(6)]
        temperature, repetition = rng.choice([0.4, 0.8, 1.0, 1.6]), rng.choice([1.0, 1.2, 0.7])
        top_k, top_p = rng.choice([0, 1, 7, 40]), rng.choice([1.0, 0.95, 0.6, 0.1])
        min_p, typical_p = rng.choice([0.0, 0.02, 0.3]), rng.choice([1.0, 1.0, 0.9, 0.3])
        processors = [RepetitionPenaltyLogitsProcessor(repetition), TemperatureLogitsWarper(temperature)]
        processors += [TopKLogitsWarper(top_k)] if top_k else []
        processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        processors += [MinPLogitsWarper(min_p)] if min_p else []
        processors += [TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
        scores = logits.clone()
        for processor in processors:
            scores = processor(torch.tensor([seen]), scores)
        expected = scores.double().softmax(-1)[0].numpy()

        metadata = sampling(
            1,
            temperatures=temperature,
            repetition_penalties=repetition,
            top_ks=top_k,
            top_ps=top_p,
            min_ps=min_p,
            typical_ps=typical_p,
            prompt_tokens={0: seen[:3]},
            output_tokens={0: seen[3:]},
        )
        weights = kept_weights(logits[0].numpy(), metadata, 0)
        actual = weights / weights.sum()
        if not np.array_equal(actual > 0, expected > 0):
            # A token may differ only where a float32 running sum cannot tell on which side of the border it lies;
            # shown by a nudge of the thresholds by 3e-6, in one direction or the other.
            nudged = []
            for nudge in (-3e-6, 3e-6):
                fields = {
                    "top_ps": [min(1.0, max(0.0, top_p + nudge))] if top_p < 1 else [1.0],
                    "typical_ps": [min(1.0, max(0.0, typical_p + nudge))] if typical_p < 1 else [1.0],
                    "min_ps": [min_p * (1 + nudge)],
                }
                names = {name: getattr(metadata, name) for name in metadata.__slots__}
                other = kept_weights(logits[0].numpy(), SamplingMetadata(**{**names, **fields}), 0)
                nudged.append(np.array_equal(other > 0, expected > 0))
            tiny = max(expected[(actual > 0) != (expected > 0)].max(), actual[(actual > 0) != (expected > 0)].max())
            # A weight below 2^-36 of the largest is 0 here: a probability that no test of 1e-6 can see.
            assert any(nudged) or tiny < 1e-9, f"case {case}: {top_k=} {top_p=} {min_p=} {typical_p=}"
            on_border += tiny >= 1e-9
            continue
        assert np.abs(actual - expected).max() < 1e-6, f"case {case}"
    assert on_border < 20


def test_presence_and_frequency_penalties() -> None:
    """A NumPy oracle: l - frequency * count - presence, over the output only, after the repetition penalty."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        logits = rng.normal(size=40).astype(np.float32)
        output, prompt = rng.integers(0, 40, size=15), rng.integers(0, 40, size=15)
        presence, frequency = rng.normal(size=2).round(2).tolist()
        metadata = sampling(
            1,
            presence_penalties=presence,
            frequency_penalties=frequency,
            prompt_tokens={0: prompt.tolist()},
            output_tokens={0: output.tolist()},
        )
        counts = np.bincount(output, minlength=40)
        adjusted = logits.astype(np.float64) - frequency * counts - presence * (counts > 0)
        expected = np.exp(adjusted - adjusted.max())
        weights = kept_weights(logits, metadata, 0)
        np.testing.assert_allclose(weights / weights.sum(), expected / expected.sum(), atol=1e-6)


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    """The statistic and its value that 1 of 10,000 fair samples exceeds (Wilson and Hilferty's approximation)."""
    expected = probabilities * counts.sum()
    freedom = len(counts) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), limit


@pytest.mark.parametrize("varied", ["seeds", "positions"])
def test_100_000_draws_follow_the_distribution(varied: str) -> None:
    logits = torch.randn(48) * 1.5
    fields = {"temperatures": 0.9, "top_ks": 40, "top_ps": 0.97}
    weights = kept_weights(logits.numpy(), sampling(1, **fields), 0)
    support = np.flatnonzero(weights)
    probabilities = weights[support] / weights.sum()
    assert 20 < len(support) < 41
    counts = np.zeros(48)
    for start in range(0, 100_000, 10_000):
        values = list(range(start, start + 10_000))
        metadata = sampling(10_000, **fields, **{"seeds": 7, varied: values})
        bits = random_31_bits(metadata.seeds, metadata.positions, metadata.choices).tolist()
        counts += np.bincount([draw(weights, r) for r in bits], minlength=48)
        if start == 0:  # the backend draws what this loop draws
            few = sampling(300, **fields, **{"seeds": 7, varied: values[:300]})
            tokens = BACKENDS[1].sample(logits.expand(300, -1), few).token_ids.tolist()
            assert tokens == [draw(weights, r) for r in bits[:300]]
    assert counts[support].sum() == counts.sum() == 100_000
    statistic, limit = chi_squared(counts[support], probabilities)
    assert statistic < limit
    # The test can see: the distribution at a slightly different temperature would fail it.
    warmer = kept_weights(logits.numpy(), sampling(1, **{**fields, "temperatures": 0.95, "top_ps": 1.0}), 0)[support]
    statistic, limit = chi_squared(counts[support], warmer / warmer.sum())
    assert statistic > limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_gives_the_same_tokens_twice(backend: Ops) -> None:
    logits = torch.randn(8, 500)
    metadata = sampling(8, positions=[0, 1, 2, 3, 4, 5, 6, 7], seeds=42)
    first = backend.sample(logits, metadata).token_ids
    assert torch.equal(first, backend.sample(logits, metadata).token_ids)
    other = backend.sample(logits, sampling(8, positions=[0, 1, 2, 3, 4, 5, 6, 7], seeds=43)).token_ids
    assert not torch.equal(first, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ends_of_the_rule(backend: Ops) -> None:
    inf = float("inf")
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, -3.4e38, 3.4e38]]).repeat(9, 1)
    logits[:5, 5] = 0.0
    metadata = sampling(
        9,
        temperatures=[0.0, 0.0, 1.0, 1e-45, 1.0, 0.5, 1e-38, 1.0, 0.0],
        top_ks=[0, 0, 1, 0, 1, 0, 0, 0, 0],
        biases=[(1, 1, -inf), (2, 1, -inf), *((7, t, -inf) for t in range(6)), (8, 5, 3.4e38), (5, 0, 1.0)],
        allowed={4: [0, 3]},
    )
    tokens = backend.sample(logits, metadata).token_ids.tolist()
    # Greedy takes the lowest of equal ids; a temperature too small for float32 is 0; nothing allowed gives 0; what
    # overflows is the largest float32.
    assert tokens == [1, 2, 2, 1, 3, 5, 5, 0, 5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_finite(backend: Ops) -> None:
    logits = torch.zeros(4, 10, dtype=torch.bfloat16)
    logits[0, 3], logits[1, 0], logits[2, 9] = float("nan"), float("inf"), float("-inf")
    result = backend.sample(logits, sampling(4, top_ks=[0, 3, 0, 0], top_ps=0.9))
    assert result.finite.tolist() == [False, False, False, True]
    assert result.token_ids.dtype == torch.int64
    assert all(0 <= token < 10 for token in result.token_ids.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fields", [{}, {"min_ps": 0.5}, {"top_ks": 511}], ids=str)
def test_a_draw_on_a_border_takes_the_next_token(
    backend: Ops, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """512 equal weights: r = j * 2^22 is exactly the sum of the first j, so token j is the first that exceeds it."""
    wanted = [0, 1, 127, 128, 300, 511]
    for off, expected in ((0, wanted), (-1, [j - 1 for j in wanted[1:]])):
        bits = np.array([(j << 22) + off for j in (wanted if off == 0 else wanted[1:])])
        for module in ("kernels.reference", "kernels.portable.sampling", "kernels.cpu.sampling"):
            monkeypatch.setattr(f"{module}.random_31_bits", lambda *args, bits=bits: bits)
        logits = torch.zeros(len(bits), 512)
        assert backend.sample(logits, sampling(len(bits), **fields)).token_ids.tolist() == expected


def test_ties_at_a_border_are_kept() -> None:
    logits = np.array([2.0, 1.0, 1.0, 1.0, 0.0], dtype=np.float32)
    assert np.count_nonzero(kept_weights(logits, sampling(1, top_ks=2), 0)) == 4
    assert np.count_nonzero(kept_weights(logits, sampling(1, top_ps=0.5), 0)) == 4
    assert np.count_nonzero(kept_weights(logits, sampling(1, min_ps=math.exp(-1) - 1e-9), 0)) == 4


@pytest.mark.parametrize("backend", [ReferenceOps, PortableOps, CpuOps])
def test_log_probabilities(backend: type) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, -1.0], [1.0, float("nan"), 0.0, 0.0]])
    token_ids = torch.tensor([3, 0])
    result = backend().log_probabilities(logits, token_ids, 3)
    expected = logits[0].double().log_softmax(-1)
    assert float(result.logprobs[0]) == pytest.approx(float(expected[3]))
    assert result.top_ids[0].tolist() == [1, 2, 0]
    assert result.top_logprobs[0].tolist() == pytest.approx(expected[[1, 2, 0]].tolist())
    assert backend().log_probabilities(logits, token_ids, 0).top_ids.shape == (2, 0)
    for count in (5, -1):
        with pytest.raises(ValueError, match=f"count is {count}; allowed is 0 to 4"):
            backend().log_probabilities(logits, token_ids, count)
    with pytest.raises(ValueError, match="token_ids must be int64"):
        backend().log_probabilities(logits, token_ids[:1], 1)


@pytest.mark.parametrize("backend", [ReferenceOps, PortableOps, CpuOps])
def test_masks_forbid_what_their_bits_do_not_allow(backend: type) -> None:
    """As the same ids in `allowed`; in one row of three, over a vocabulary that fills no whole word."""
    logits = torch.randn(3, 75, generator=torch.Generator().manual_seed(0)) * 2
    ids = [3, 31, 32, 64, 74]
    mask = np.zeros(3, dtype=np.uint32)
    for token in ids:
        mask[token // 32] |= np.uint32(1 << token % 32)
    for temperature in (0.0, 1.0):
        for seed in range(20):
            fields: dict[str, Any] = {"temperatures": temperature, "seeds": [seed] * 3, "top_ks": [0, 3, 0]}
            masked = backend().sample(logits, sampling(3, **fields, masks={1: mask})).token_ids
            allowed = backend().sample(logits, sampling(3, **fields, allowed={1: ids})).token_ids
            assert torch.equal(masked, allowed)
            assert int(masked[1]) in ids
    with pytest.raises(ValueError, match=r"metadata\.masks\[1\]"):
        backend().sample(logits, sampling(3, masks={1: mask[:2]}))


@pytest.mark.parametrize("backend", [ReferenceOps, PortableOps, CpuOps])
def test_a_pending_token_counts_for_penalties(backend: type) -> None:
    """A token that a step in flight has drawn is the last of its row's output."""
    logits = torch.tensor([[1.0, 1.5, 0.0]] * 2)
    fields = {"temperatures": 0.0, "presence_penalties": [1.0, 1.0], "output_tokens": {0: [], 1: []}}
    result = backend().sample(logits, sampling(2, **fields), pending=torch.tensor([1, -1]))
    assert result.token_ids.tolist() == [0, 1]


@pytest.mark.parametrize("backend", [ReferenceOps, PortableOps, CpuOps])
def test_the_weights_of_a_backend_are_those_that_it_draws_with(backend: type) -> None:
    """Draws at the borders of the intervals that its weights make: a unit more or less would show."""
    ops = backend()
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)) * 3
    weights = ops.token_weights(logits[0].numpy(), np.float32(logits.max()))
    expected = token_weights(logits[0].numpy(), np.float32(logits.max()))
    assert int(weights.max()) == 1 << 36
    assert np.abs(weights - expected).max() <= 1
    for typical_p in (1.0, 0.9):
        rows, metadata = 400, sampling(400, typical_ps=typical_p)
        kept = kept_weights(logits[0].numpy(), metadata, 0, ops.token_weights)
        random = random_31_bits(metadata.seeds, metadata.positions, metadata.choices)
        drawn = ops.sample(logits.expand(rows, -1), metadata).token_ids.tolist()
        assert drawn == [draw(kept, int(bits)) for bits in random]


def test_stages_name_the_filter_that_removes_a_token() -> None:
    logits = np.array([5.0, 4.0, 3.0, 2.0, -30.0], dtype=np.float32)
    metadata = sampling(1, biases=[(0, 3, -math.inf)], top_ks=2, top_ps=0.5)
    seen = {name: weights.astype(bool).tolist() for name, weights in filter_stages(logits, metadata, 0)}
    assert seen == {
        "allowed": [True, True, True, False, True],
        "weight": [True, True, True, False, False],
        "top_k": [True, True, False, False, False],
        "top_p": [True, False, False, False, False],
    }
    greedy = [name for name, _ in filter_stages(logits, sampling(1, temperatures=0.0), 0)]
    assert greedy == ["allowed", "temperature"]
