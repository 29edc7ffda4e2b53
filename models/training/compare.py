"""What int8 costs, and what training for it brings: several weights, each in every precision, on one held-out text.

The model is `models.training.decoder` in float32 with fake quantization, so all that differs between two rows of the
table is the weights or the rounding of the linear layers. Every row is paired with the first one document by document;
the error given for a difference is the standard error of the mean of those pairs, as they stand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from kernels.int8 import LARGEST
from kernels.ops import QuantizationMode
from models.training.corpus import documents, heldout_tasks
from models.training.data import encode
from models.training.decoder import Decoder
from models.training.evaluate import exact_match, padded
from models.training.export import rounded
from models.training.tasks import EXACT, SHOTS, Task
from models.training.train import pick_device

MODES: tuple[QuantizationMode, ...] = ("none", "w8a16", "w8a8")


@dataclass(frozen=True)
class Row:
    """One model in one precision. Perplexities are per token; divergences in nats a token; shares between 0 and 1."""

    weights: str
    mode: QuantizationMode
    perplexity_stories: float
    perplexity_all: float
    excess: float  # nats a token, all documents, over the first row
    excess_error: float  # its standard error
    kl: float  # of this precision from the same weights unquantized
    top1: float  # share of places where both have the same most likely token
    exact: dict[str, float]  # task -> share of answers right to the letter, over all numbers of shots
    exact_all: float

    def line(self) -> str:
        return (
            f"{self.weights:10} {self.mode:5}  stories {self.perplexity_stories:.4f}  all {self.perplexity_all:.4f}  "
            f"excess {self.excess:+.5f} ± {self.excess_error:.5f}  KL {self.kl:.6f}  top-1 {self.top1:.4f}  "
            f"exact {self.exact_all:.4f}  " + "  ".join(f"{name} {share:.3f}" for name, share in self.exact.items())
        )


@dataclass(frozen=True)
class Comparison:
    """All rows, and on how many held-out documents, tokens of them and tasks they were measured."""

    documents: int
    tokens: int
    tasks: int
    rows: list[Row]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Comparison:
        """Raises FileNotFoundError, with what to do, where there is none."""
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `python -m models.training compare` first")
        found = json.loads(path.read_text())
        return cls(**found | {"rows": [Row(**row) for row in found["rows"]]})


@dataclass(frozen=True)
class HeldOut:
    """What is measured on: ids of the documents, which of them are plain stories (bool), and the tasks of each kind."""

    ids: list[list[int]]
    stories: Tensor
    tasks: dict[str, list[Task]]

    @classmethod
    def make(cls, tokenizer: Tokenizer, seed: int, num_documents: int, per_cell: int) -> HeldOut:
        """`num_documents` documents, and `per_cell` tasks a kind and number of shots."""
        found = list(documents(seed, "heldout", num_documents))
        tasks = {name: [t for k in SHOTS for t in heldout_tasks(seed, name, k, per_cell)] for name in EXACT}
        stories = torch.tensor([document.kind == "story" for document in found])
        return cls([encode(tokenizer, document.pieces)[0] for document in found], stories, tasks)

    @property
    def tokens(self) -> Tensor:
        """How many tokens of each document are predicted, float64 [documents]."""
        return torch.tensor([len(row) - 1 for row in self.ids], dtype=torch.float64)


@dataclass(frozen=True)
class Measured:
    """One model in one precision. Per document, float64 [documents]: the sum of its tokens' nats, that of their
    divergence from the same weights unquantized, and at how many places both agree; and a share of each kind of task.
    """

    nats: Tensor
    divergence: Tensor
    agreed: Tensor
    exact: dict[str, float]


@torch.inference_mode()
def _read(model: Decoder, ids: Sequence[Sequence[int]]) -> dict[QuantizationMode, Tensor]:
    """What `Measured` has a document, float64 [3, documents], in every precision."""
    sums = {mode: torch.zeros(3, len(ids), dtype=torch.float64) for mode in MODES}
    device = next(model.parameters()).device
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # less padding
    for start in range(0, len(ids), 16):
        some = by_length[start : start + 16]
        batch = padded([ids[i] for i in some], device)
        lengths = torch.tensor([len(ids[i]) - 1 for i in some], device=device)
        counts = torch.arange(batch.shape[1] - 1, device=device) < lengths[:, None]
        plain: Tensor | None = None
        for mode in MODES:  # unquantized comes first, to hold the others against it
            scores = model.as_served(mode).logits(batch[:, :-1]).log_softmax(-1)
            plain = scores if plain is None else plain
            nats = F.nll_loss(scores.transpose(1, 2), batch[:, 1:], reduction="none")
            divergence = F.kl_div(scores, plain, reduction="none", log_target=True).sum(-1)
            agreed = scores.argmax(-1) == plain.argmax(-1)
            for total, values in zip(sums[mode], (nats, divergence, agreed), strict=True):
                total[some] = (values * counts).sum(1).double().cpu()
    return sums


def measure(model: Decoder, tokenizer: Tokenizer, held_out: HeldOut) -> dict[QuantizationMode, Measured]:
    """One model in every precision. Its weights are rounded to bfloat16 first, as they are exported."""
    rounded(model).to(pick_device()).eval()
    read = _read(model, held_out.ids)
    found = {}
    for mode in MODES:
        model.as_served(mode)
        exact = {name: exact_match(model, tokenizer, tasks) for name, tasks in held_out.tasks.items()}
        nats, divergence, agreed = read[mode]
        found[mode] = Measured(nats, divergence, agreed, exact)
    model.as_served("none")
    return found


def compare(found: Mapping[str, Mapping[QuantizationMode, Measured]], held_out: HeldOut) -> Comparison:
    """The rows of the table, from what was measured of each of the weights, by name; the first row is the first one."""
    tokens, stories = held_out.tokens, held_out.stories
    base = next(iter(found.values()))["none"].nats
    rows = []
    for name, precisions in found.items():
        for mode, measured in precisions.items():
            nats = measured.nats
            excess, error = _paired(nats - base, tokens)
            rows.append(
                Row(
                    name,
                    mode,
                    math.exp(nats[stories].sum() / tokens[stories].sum()),
                    math.exp(nats.sum() / tokens.sum()),
                    excess,
                    error,
                    float(measured.divergence.sum() / tokens.sum()),
                    float(measured.agreed.sum() / tokens.sum()),
                    measured.exact,
                    sum(measured.exact.values()) / len(measured.exact),
                )
            )
    tasks = sum(map(len, held_out.tasks.values()))
    return Comparison(len(held_out.ids), int(tokens.sum()), tasks, rows)


def _paired(differences: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Differences in nats a document -> their mean a token, and its standard error (of a ratio of two means)."""
    mean = differences.sum() / tokens.sum()
    residuals = differences - mean * tokens
    return float(mean), float(residuals.square().sum().sqrt() / tokens.sum())


def section(comparison: Comparison, titles: Mapping[str, str]) -> str:
    """The table as Markdown; `titles` says what each of the weights is."""
    lines = [
        "| weights | served as | perplexity, stories | perplexity, all | nats a token over the first row "
        "| KL from bf16 | same most likely token | tasks solved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in comparison.rows:
        plain = row.mode == "none"
        kept = ("", "") if plain else (f"{row.kl:.5f}", f"{100 * row.top1:.2f} %")
        lines.append(
            f"| {titles.get(row.weights, row.weights)} | {'bf16' if plain else row.mode} "
            f"| {row.perplexity_stories:.4f} | {row.perplexity_all:.4f} "
            f"| {row.excess:+.5f} ± {row.excess_error:.5f} | {kept[0]} | {kept[1]} | {100 * row.exact_all:.2f} % |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Clip:
    """What happens when each row's scale is that of `share` of its largest magnitude, and what is larger is clipped."""

    share: float
    error: float  # squares of what int8 changes in all rows, over the squares of the weights
    best: int  # for how many rows this share has the smallest error of those tried


def clipping(weights: Sequence[Tensor], shares: Sequence[float] = (1.0, 0.98, 0.95, 0.9, 0.8)) -> list[Clip]:
    """Whether a scale that clips would be nearer to the `weights` [N, K] than the server's, which does not clip."""
    errors, squares = [], 0.0
    for weight in weights:
        rows = weight.detach().double()
        squares += float(rows.square().sum())
        tried = []
        for share in shares:
            step = rows.abs().amax(1, keepdim=True) * (share / LARGEST)
            kept = (rows / step).nan_to_num().round().clamp(-LARGEST, LARGEST) * step
            tried.append((kept - rows).square().sum(1))
        errors.append(torch.stack(tried))
    by_row = torch.cat(errors, 1)
    best = by_row.argmin(0)
    return [Clip(share, float(by_row[i].sum()) / squares, int((best == i).sum())) for i, share in enumerate(shares)]
