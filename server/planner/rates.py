"""How fast a device is: measured by `probe` on this machine, or published by a card's maker.

Both answer the same questions, in seconds. What they answer is a model of the engine: a step reads every weight but the
token table once, multiplies each by every row, lets each sequence attend to its own K and V, and pays for being a step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.planner.sizes import ITEMSIZE


class Rates(Protocol):
    """Seconds of the parts of a step.

    measured             whether the numbers come from this machine; if not, from a maker's data sheet
    bandwidth            bytes a second at which memory is read
    matrix_rates         quantization mode -> operations a second of large products, two for each multiply-add
    """

    @property
    def measured(self) -> bool: ...

    @property
    def bandwidth(self) -> float: ...

    @property
    def matrix_rates(self) -> Mapping[str, float]: ...

    def linear(self, mode: str, num_weights: int, num_bytes: int, model_bytes: int, rows: int) -> float:
        """Products of `rows` rows with `num_weights` weights in `num_bytes` bytes, of a model that reads `model_bytes`
        in a step."""
        ...

    def attention(self, kv_dtype: str, operations: float, kv_bytes: float, decode: bool) -> float:
        """Attention of a step over all layers: `operations` on `kv_bytes` of K and V."""
        ...

    def elementwise(self, values: float) -> float:
        """Norms, rotations and gates that produce so many values."""
        ...

    def sampling(self, logits: float) -> float:
        """Drawing tokens from so many logits, greedily."""
        ...

    def overhead(self, layers: int, rows: int) -> float:
        """What a step of `rows` sequences costs beside all that."""
        ...


@dataclass(frozen=True, slots=True)
class LinearCurve:
    """What a product takes for each weight, by the number of rows, measured on weights of `num_bytes` in all.

    rows, ascending; seconds_per_weight: of all rows together, one for each entry of rows.
    """

    num_bytes: int
    rows: tuple[int, ...]
    seconds_per_weight: tuple[float, ...]

    def at(self, rows: int) -> float:
        """Linear between the measured numbers of rows, proportional beyond the last."""
        if rows >= self.rows[-1]:
            return self.seconds_per_weight[-1] * rows / self.rows[-1]
        above = bisect_right(self.rows, rows)
        if above == 0:
            return self.seconds_per_weight[0]
        low, high = self.rows[above - 1], self.rows[above]
        first, last = self.seconds_per_weight[above - 1], self.seconds_per_weight[above]
        return first + (last - first) * (rows - low) / (high - low)


@dataclass(frozen=True, slots=True)
class MeasuredRates:
    """What `probe` found.

    linears                   quantization mode -> curves, by ascending bytes: the first fit the caches, the last do not
    attention_rates           KV dtype -> operations a second: [decode, prefill]
    elementwise_seconds       for each value that norms, rotations and gates produce
    sampling_seconds          for each logit
    step_seconds              of a step alone; layer_seconds: for each layer; row_seconds: for each sequence;
    row_layer_seconds         for each sequence and layer
    whole_step_factor         how much longer the parts before `step_seconds` take within a step of the engine than by
                              themselves, over and over again
    """

    bandwidth: float
    linears: Mapping[str, Sequence[LinearCurve]]
    attention_rates: Mapping[str, tuple[float, float]]
    elementwise_seconds: float
    sampling_seconds: float
    step_seconds: float
    layer_seconds: float
    row_seconds: float
    row_layer_seconds: float
    whole_step_factor: float = 1.0

    @property
    def measured(self) -> bool:
        return True

    @property
    def matrix_rates(self) -> dict[str, float]:
        """At the largest number of rows that was measured."""
        return {
            mode: max(2 * curve.rows[-1] / curve.seconds_per_weight[-1] for curve in curves)
            for mode, curves in self.linears.items()
        }

    def linear(self, mode: str, num_weights: int, num_bytes: int, model_bytes: int, rows: int) -> float:
        """Between two sizes, by the logarithm of what a step reads: how much of it the caches hold is not known."""
        curves = self.linears[mode]
        above = bisect_right([curve.num_bytes for curve in curves], model_bytes)
        if above in (0, len(curves)):
            return num_weights * curves[max(above - 1, 0)].at(rows) * self.whole_step_factor
        low, high = curves[above - 1], curves[above]
        share = math.log(model_bytes / low.num_bytes) / math.log(high.num_bytes / low.num_bytes)
        return num_weights * (low.at(rows) * (1 - share) + high.at(rows) * share) * self.whole_step_factor

    def attention(self, kv_dtype: str, operations: float, kv_bytes: float, decode: bool) -> float:
        rate = self.attention_rates[kv_dtype][0 if decode else 1]
        return max(operations / rate, kv_bytes / self.bandwidth) * self.whole_step_factor

    def elementwise(self, values: float) -> float:
        return values * self.elementwise_seconds * self.whole_step_factor

    def sampling(self, logits: float) -> float:
        return logits * self.sampling_seconds * self.whole_step_factor

    def overhead(self, layers: int, rows: int) -> float:
        alone = self.step_seconds + layers * self.layer_seconds
        return alone + rows * (self.row_seconds + layers * self.row_layer_seconds)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> MeasuredRates:
        """The inverse of dataclasses.asdict, after a passage through JSON. Raises KeyError, TypeError, ValueError."""
        linears = {
            mode: tuple(
                LinearCurve(curve["num_bytes"], tuple(curve["rows"]), tuple(curve["seconds_per_weight"]))
                for curve in curves
            )
            for mode, curves in value["linears"].items()
        }
        attention = {dtype: (float(pair[0]), float(pair[1])) for dtype, pair in value["attention_rates"].items()}
        return cls(**{**value, "linears": linears, "attention_rates": attention})


@dataclass(frozen=True, slots=True)
class PublishedRates:
    """The roofline of a data sheet: each part takes as long as its bytes or its operations, whichever is longer. No
    engine reaches it, so what is predicted from it is a bound and not an expectation."""

    bandwidth: float
    bfloat16_rate: float
    int8_rate: float

    @property
    def measured(self) -> bool:
        return False

    @property
    def matrix_rates(self) -> dict[str, float]:
        return {"none": self.bfloat16_rate, "w8a16": self.bfloat16_rate, "w8a8": self.int8_rate}

    def linear(self, mode: str, num_weights: int, num_bytes: int, model_bytes: int, rows: int) -> float:
        return max(num_bytes / self.bandwidth, 2.0 * num_weights * rows / self.matrix_rates[mode])

    def attention(self, kv_dtype: str, operations: float, kv_bytes: float, decode: bool) -> float:
        return max(kv_bytes / self.bandwidth, operations / self.bfloat16_rate)

    def elementwise(self, values: float) -> float:
        return values * ITEMSIZE["bfloat16"] / self.bandwidth

    def sampling(self, logits: float) -> float:
        return logits * ITEMSIZE["float32"] / self.bandwidth

    def overhead(self, layers: int, rows: int) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its maker describes it. Sizes in bytes; rates a second, dense, with sums in float32 or int32."""

    title: str
    memory: int
    rates: PublishedRates


def _card(title: str, gigabytes: float, bandwidth: float, bfloat16: float, int8: float) -> Card:
    return Card(title, round(gigabytes * 2**30), PublishedRates(bandwidth * 1e9, bfloat16 * 1e12, int8 * 1e12))


# GB, GB/s, TFLOP/s in bfloat16 and TOP/s in int8, without sparsity, from NVIDIA's data sheets (A100, H100, H200, L4,
# L40S) and its Ada architecture white paper (RTX 4090). Published, not measured here.
CARDS: Mapping[str, Card] = {
    "a100-40gb": _card("NVIDIA A100 40GB SXM", 40, 1555, 312, 624),
    "a100-80gb": _card("NVIDIA A100 80GB SXM", 80, 2039, 312, 624),
    "h100-80gb": _card("NVIDIA H100 80GB SXM", 80, 3350, 989, 1979),
    "h200-141gb": _card("NVIDIA H200 141GB SXM", 141, 4800, 989, 1979),
    "l4-24gb": _card("NVIDIA L4", 24, 300, 121, 242),
    "l40s-48gb": _card("NVIDIA L40S", 48, 864, 362, 733),
    "rtx4090-24gb": _card("NVIDIA GeForce RTX 4090", 24, 1008, 165.2, 660.6),
}
