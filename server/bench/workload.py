"""What is sent, and when: arrival times, lengths and prompts, all from one seed.

Lengths are drawn from lognormal distributions, which conversations with chat models follow roughly: a median and a
sigma of the logarithm. The default ones have the means that the paper on PagedAttention (Kwon et al. 2023, section 6)
gives for ShareGPT, 161 tokens in and 338 out; their sigmas, 1.0 and 0.8, are ours. Prompts are made of words from a
list in this file, so that nothing has to be downloaded. The first words of all prompts of a run are drawn afresh: the
same run against the same server again must not find its prompts in the prefix cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

ARRIVALS = ("poisson", "constant")

_WORDS = (
    "river window stone paper garden morning silver quiet winter basket lantern copper meadow engine harbor candle "
    "forest button thunder village pepper mirror ladder island orange ribbon shadow butter anchor feather market "
    "hammer violin cloud bridge pocket summer kettle marble needle travel autumn branch castle dragon eagle falcon "
    "ginger helmet insect jungle kitten lemon magnet napkin oyster parrot quartz rabbit saddle timber urchin valley "
    "walnut yellow zipper always before carry double every follow gentle happen inside jumped kindly listen moving "
    "never open people quick remember slowly together under very while answer began count deep early found great"
).split()


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal distribution of tokens: its median, the sigma of its logarithm (0: always the median), its bounds."""

    median: float
    sigma: float = 0.0
    low: int = 1
    high: int = 1 << 20

    def draw(self, rng: random.Random) -> int:
        value = self.median if self.sigma == 0 else self.median * math.exp(rng.gauss(0.0, self.sigma))
        return max(self.low, min(self.high, round(value)))

    @property
    def mean(self) -> float:
        """Of the distribution without its bounds."""
        return self.median * math.exp(self.sigma**2 / 2)


# Means 161 and 338.
SHAREGPT_PROMPT = Lengths(98.0, 1.0, low=4, high=2048)
SHAREGPT_OUTPUT = Lengths(245.0, 0.8, low=4, high=2048)


def arrivals(kind: str, rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Times in seconds from 0 below `seconds`. rate: a second. poisson: independent exponential gaps; constant: equal
    ones. The first request comes after the first gap, half of one if they are equal."""
    at = 0.5 / rate if kind == "constant" else rng.expovariate(rate)
    while at < seconds:
        yield at
        at += 1 / rate if kind == "constant" else rng.expovariate(rate)


def text(num_words: int, rng: random.Random) -> str:
    """So many words, at least one, in sentences."""
    words = rng.choices(_WORDS, k=max(1, num_words))
    for end in range(11, len(words), 12):
        words[end] += "."
    return " ".join(words)


def fresh_words() -> str:
    """Four words that no other run begins with: not from a seed."""
    return " ".join(random.SystemRandom().choices(_WORDS, k=4))


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be: its prompt, and how many tokens are asked for."""

    prompt: str
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """prompt and output: tokens. tokens_per_word: of the served model's tokenizer, as it was measured. max_total: of a
    prompt with its output, what the model's context allows; a longer prompt is cut, and the output gets what is left.
    begin: the first words of every prompt, each then goes on with words of its own."""

    prompt: Lengths
    output: Lengths
    tokens_per_word: float
    max_total: int | None = None
    begin: str = ""

    def jobs(self, seed: int) -> Iterator[Job]:
        """Requests without end: the same lengths for the same seed, whatever the tokenizer."""
        lengths, words_of = random.Random(seed), random.Random(seed + 1)
        while True:
            prompt, output = self.prompt.draw(lengths), self.output.draw(lengths)
            if self.max_total is not None:
                # A tenth of the prompt in reserve: its length in tokens is an estimate.
                prompt = min(prompt, int((self.max_total - 1) / 1.1))
                output = max(1, min(output, self.max_total - math.ceil(1.1 * prompt)))
            words = text(round(prompt / self.tokens_per_word), words_of).split()
            # Its own words first: prompts of one run must not share a beginning either.
            first = self.begin.split()[: len(words) - 1]
            yield Job(" ".join([words[0], *first, *words[1 + len(first) :]]), output)
