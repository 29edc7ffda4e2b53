"""The training loop: pre-training on the whole stream, instruction tuning on the answers, training for int8 (qat.py).

A run is resumable: its checkpoint holds weights, optimizer and the number of tokens seen, and the batch at a token
count is a slice of the stream. With a budget in tokens a resumed run equals an uninterrupted one to the bit; with a
budget in minutes the schedule follows the clock, so that the run ends when it should on a machine that others use.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.training.decoder import Decoder, Shape

Report = Callable[[str], None]
Objective = Callable[[Tensor, Tensor], Tensor]  # inputs and targets, each [rows, length] -> loss in nats, a scalar
EMBEDDING_BOOST = 4.0  # the learning rate of the embedding, whose weights are large, over that of the rest


@dataclass(frozen=True)
class Recipe:
    """How to train. Exactly one of `minutes` and `tokens` is the budget."""

    peak_lr: float
    minutes: float | None = None
    tokens: int | None = None
    batch_tokens: int = 4096
    lengths: tuple[tuple[float, int], ...] = ((0.7, 256), (1.0, 512))  # until this share, so long
    warmup: float = 0.02
    decay_from: float = 0.5  # constant until then, linear to zero afterwards (WSD, Hu et al. 2024)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1
    compile: bool = True
    bf16: bool = True  # products in bfloat16; weights and optimizer stay float32
    muon: bool = True  # for the matrices of the layers; otherwise AdamW for all weights
    checkpoint_seconds: float = 60.0
    report_seconds: float = 5.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.tokens is None):
            raise ValueError("give a budget either in minutes or in tokens")

    def lr(self, share: float) -> float:
        """The learning rate at a share (0 to 1) of the budget."""
        if share < self.warmup:
            return self.peak_lr * (share + 1e-3) / (self.warmup + 1e-3)
        if share < self.decay_from:
            return self.peak_lr
        return self.peak_lr * max(0.02, (1 - share) / (1 - self.decay_from))

    def length(self, share: float) -> int:
        return next((length for until, length in self.lengths if share < until), self.lengths[-1][1])


class Batches(Protocol):
    """What a model is trained on."""

    def batch(self, start: int, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [rows, length] int64, after `start` tokens; a function of the arguments."""
        ...


@dataclass(frozen=True)
class Stream:
    """Token ids in one row, documents one after the other; `mask` marks the tokens that the loss counts (None: all)."""

    tokens: NDArray[np.uint16]
    mask: NDArray[np.uint8] | None = None

    def batch(self, start: int, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [rows, length] int64, from token `start` on; the stream repeats at its end."""
        where = np.arange(start, start + rows * length + 1) % len(self.tokens)
        ids = torch.from_numpy(self.tokens[where].astype(np.int64))
        inputs, targets = ids[:-1], ids[1:]
        if self.mask is not None:
            targets = torch.where(torch.from_numpy(self.mask[where][1:].astype(bool)), targets, -100)
        return inputs.view(rows, length).to(device), targets.reshape(rows, length).to(device)


@dataclass(frozen=True)
class Mixture:
    """Several streams in equal parts: each batch has as many rows of the one as of the other."""

    streams: tuple[Stream, ...]

    def batch(self, start: int, rows: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """As that of a stream. Raises ValueError where the rows cannot be shared out evenly."""
        count = len(self.streams)
        if rows % count:
            raise ValueError(f"{rows} rows are not a multiple of {count} streams: change batch_tokens or lengths")
        parts = [stream.batch(start // count, rows // count, length, device) for stream in self.streams]
        inputs, targets = zip(*parts, strict=True)
        return torch.cat(inputs), torch.cat(targets)


def optimizers(model: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for the embedding and the norms.

    Muon learns more from a token, and tokens are what two CPU cores are short of. But its steps are products in
    bfloat16: on a processor without them one takes longer than the batch (5 s against 2.5 s on one AVX2 core).
    """
    matrices = [w for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name]
    embedding = [w for name, w in model.named_parameters() if "embed" in name]
    norms = [w for w in model.parameters() if w.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": embedding, "boost": EMBEDDING_BOOST}, {"params": norms}]
    opts: list[torch.optim.Optimizer] = []
    if recipe.muon:
        decay = recipe.weight_decay
        opts.append(
            torch.optim.Muon(
                matrices, lr=recipe.peak_lr, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            )
        )
    else:
        groups.append({"params": matrices, "weight_decay": recipe.weight_decay})
    return [*opts, torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), weight_decay=0.0)]


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename: a kill leaves the old checkpoint or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, path)


def load_weights(path: Path, shape: Shape) -> Decoder:
    """The decoder of a checkpoint. Raises FileNotFoundError, with what to do, where there is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the stage `{path.stem.partition('-')[0]}` first")
    model = Decoder(shape)
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu")["model"])
    return model


def train(
    model: Decoder,
    stream: Batches,
    recipe: Recipe,
    checkpoint: Path,
    report: Report = print,
    stop_after: int | None = None,
    objective: Objective | None = None,
) -> dict[str, float]:
    """Train `model` in place until the budget is spent; resume from `checkpoint` where it exists.

    `stop_after` ends the call after so many steps (as a kill after a checkpoint would). `objective` is what is
    minimized, a function of `model`'s weights (None: its own loss). Returns tokens, seconds and smoothed loss, which
    also go into a JSON file beside the checkpoint.
    """
    device = pick_device()
    torch.manual_seed(recipe.seed)
    model.to(device).train()
    opts = optimizers(model, recipe)
    seen, spent, smooth, steps = 0, 0.0, math.nan, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        seen, spent, smooth = state["tokens"], state["seconds"], state["loss"]
        report(f"resumed at {seen / 1e6:.2f}M tokens, {spent / 60:.1f} min")
    objective = model.loss if objective is None else objective
    loss_of = torch.compile(objective, dynamic=False) if recipe.compile else objective
    began = time.monotonic() - spent
    saved_at = reported_at = time.monotonic()
    reported_tokens = seen

    def share() -> float:
        if recipe.tokens is not None:
            return seen / recipe.tokens
        return (time.monotonic() - began) / (60 * (recipe.minutes or 1))

    def save() -> None:
        state = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
        save_checkpoint(checkpoint, state | {"tokens": seen, "seconds": time.monotonic() - began, "loss": smooth})

    while (now := share()) < 1 and (stop_after is None or steps < stop_after):
        length = recipe.length(now)
        rate = recipe.lr(now)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate * group.get("boost", 1.0)
        inputs, targets = stream.batch(seen, max(1, recipe.batch_tokens // length), length, device)
        autocast = torch.autocast(device.type, torch.bfloat16) if recipe.bf16 else contextlib.nullcontext()
        with autocast:
            loss = loss_of(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seen += inputs.numel()
        steps += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at {seen} tokens: lower the learning rate")
        smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
        clock = time.monotonic()
        if clock - reported_at >= recipe.report_seconds:
            left = (clock - began) * (1 - share()) / max(share(), 1e-9)
            speed = (seen - reported_tokens) / (clock - reported_at)
            report(
                f"{checkpoint.stem}: {100 * share():5.1f}%  {seen / 1e6:6.2f}M tokens  loss {smooth:.4f}  "
                f"lr {rate:.2e}  length {length}  {speed:,.0f} tokens/s  {left / 60:.1f} min left"
            )
            reported_at, reported_tokens = clock, seen
        if clock - saved_at >= recipe.checkpoint_seconds:
            save()
            saved_at = clock
    save()
    result = {"tokens": float(seen), "seconds": time.monotonic() - began, "loss": smooth}
    checkpoint.with_suffix(".json").write_text(json.dumps(result) + "\n")
    return result
