"""Quantization-aware training: an optional last stage, which makes the tuned weights at home in int8.

The student computes as it will be served (`fake_quantize`: linear layers, token table and head; norms, rotary and
attention stay float32) and learns two things at once: the text itself, and to say what its teacher says, which is the
model of the stage before, unquantized (distillation, Hinton et al. 2015, arXiv:1503.02531). The text is half
instructions, of which the answers count, as in tuning, and half documents of pre-training, so that neither is
forgotten. Those documents come from far down the stream, where no other stage has been.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.ops import QuantizationMode
from models.training import data
from models.training.decoder import Decoder
from models.training.train import Batches, Mixture, Objective, Recipe, Report, pick_device, train

# A low rate, falling from the start. Not in bfloat16: all rounding there is should be that of the int8 server.
RECIPE = Recipe(
    peak_lr=5e-4,
    minutes=1,
    batch_tokens=2048,
    lengths=((1.0, 512),),
    warmup=0.05,
    decay_from=0.05,
    compile=False,
    bf16=False,
    muon=False,
)
DISTILLED = 0.5  # the share of the divergence from the teacher in the loss
FIRST_BLOCK = 1_000_000 // data.BLOCK  # the other stages end before document 200,000


def checkpoint(scratch: Path, mode: QuantizationMode) -> Path:
    """Where the weights trained for `mode` go; "none" is a control that sees the same text, unquantized."""
    return scratch / f"qat-{mode}.pt"


def build_stream(scratch: Path, seed: int, num_tokens: int, processes: int, report: Report) -> Mixture:
    """Instructions and documents, `num_tokens` at least of each; made under `scratch` if they are not there yet."""
    folder = scratch / "qat"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("tune", "train"):
        if not (folder / f"{split}.npy").exists():
            path = scratch / "tokenizer.json"
            data.build(folder, path, seed, split, num_tokens, report, FIRST_BLOCK, processes)
    return Mixture((data.load(folder, "tune", masked=True), data.load(folder, "train", masked=False)))


def objective(student: Decoder, teacher: Decoder, distilled: float = DISTILLED) -> Objective:
    """The loss of the student on a batch, in nats.

    (1 - distilled) * cross-entropy of the targets that are not -100
        + distilled * KL(teacher || student) of the next token, averaged over all places.
    """

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        logits = student.logits(inputs).flatten(0, 1)
        with torch.no_grad():
            wanted = teacher.logits(inputs).flatten(0, 1).log_softmax(-1)
        text = F.cross_entropy(logits, targets.flatten(), ignore_index=-100)
        divergence = F.kl_div(logits.log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        return (1 - distilled) * text + distilled * divergence

    return loss


def run(
    start: Decoder,
    stream: Batches,
    recipe: Recipe,
    mode: QuantizationMode,
    scratch: Path,
    report: Report = print,
    stop_after: int | None = None,
    distilled: float = DISTILLED,
) -> Decoder:
    """Train a copy of `start` for `mode`, with `start` itself as the teacher; resume where there is a checkpoint.

    Returns the copy, whose weights are float32 and not rounded: quantized as `kernels.int8` says after a rounding to
    bfloat16, they are the integers that the last step trained. `stop_after` as in `train`, `distilled` as
    in `objective`.
    """
    teacher = start.to(pick_device()).eval().requires_grad_(False)
    student = deepcopy(teacher).requires_grad_(True).as_served(mode)
    train(
        student, stream, recipe, checkpoint(scratch, mode), report, stop_after, objective(student, teacher, distilled)
    )
    return student
