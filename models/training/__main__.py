"""`python -m models.training STAGE`: makes `stet-tales` from nothing."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from models.training import data, export, tokenizer
from models.training.decoder import Decoder, Shape
from models.training.evaluate import Numbers, evaluate
from models.training.train import Recipe, load_weights, pick_device, train

STAGES = ("tokenizer", "corpus", "pretrain", "tune", "evaluate", "export")
PRETRAIN_SHARE = 0.75  # of the minutes; the rest is instruction tuning
PRETRAIN = Recipe(peak_lr=3e-3, minutes=1)
TUNE = Recipe(peak_lr=1e-3, minutes=1, lengths=((1.0, 1024),), decay_from=0.1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"), help="one stage, or all of them in this order")
    parser.add_argument("--minutes", type=float, default=55, help="training time, both stages (default: 55)")
    parser.add_argument("--tokens", type=int, help="budget in tokens instead of minutes: reproducible to the bit")
    parser.add_argument("--scratch", type=Path, default=Path("build/training"), help="token files and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("models/tales"), help="where `export` writes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus-tokens", type=int, default=16_000_000, help="tokens of the pre-training stream")
    parser.add_argument("--vocab", type=int, default=4096, help="the largest vocabulary")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks a cell of the evaluation")
    return parser.parse_args()


def say(line: str) -> None:
    print(line, flush=True)


def make_tokenizer(args: argparse.Namespace) -> None:
    """A vocabulary that is a multiple of 64, as kernels like it; the world may have words for less than asked."""
    began = time.monotonic()
    texts = list(data.texts(args.seed, 12_000))
    made = tokenizer.train(iter(texts), args.vocab)
    if made.get_vocab_size() % 64:
        made = tokenizer.train(iter(texts), made.get_vocab_size() // 64 * 64)
    tokenizer.save(made, args.scratch, Shape().max_length)
    say(f"tokenizer: {made.get_vocab_size()} tokens, {time.monotonic() - began:.0f} s")


def shape(args: argparse.Namespace) -> Shape:
    vocab = tokenizer.load(args.scratch).get_vocab_size()
    return replace(Shape(), vocab_size=vocab, num_layers=args.layers)


def make_corpus(args: argparse.Namespace) -> None:
    path = args.scratch / "tokenizer.json"
    tokenizer.load(args.scratch)
    data.build(args.scratch, path, args.seed, "train", args.corpus_tokens, say)
    data.build(args.scratch, path, args.seed, "tune", args.corpus_tokens // 3, say)


def run_training(args: argparse.Namespace, stage: str) -> None:
    recipe, share = (PRETRAIN, PRETRAIN_SHARE) if stage == "pretrain" else (TUNE, 1 - PRETRAIN_SHARE)
    minutes = None if args.tokens else args.minutes * share
    tokens = int(args.tokens * share) if args.tokens else None
    recipe = replace(recipe, minutes=minutes, tokens=tokens, seed=args.seed)
    torch.manual_seed(args.seed)
    model = Decoder(shape(args)) if stage == "pretrain" else load_weights(args.scratch / "pretrain.pt", shape(args))
    stream = data.load(args.scratch, "train" if stage == "pretrain" else "tune", masked=stage == "tune")
    say(f"{stage}: {sum(w.numel() for w in model.parameters()):,} parameters, {len(stream.tokens) / 1e6:.1f}M tokens")
    train(model, stream, recipe, args.scratch / f"{stage}.pt", say)


def run_evaluation(args: argparse.Namespace) -> None:
    model = export.rounded(load_weights(args.scratch / "tune.pt", shape(args))).to(pick_device())
    hashes = [args.scratch / f"{split}.hashes.npy" for split in ("train", "tune")]
    numbers = evaluate(model, tokenizer.load(args.scratch), args.seed, hashes, args.tasks, say)
    numbers.save(args.scratch / "evaluation.json")


def run_export(args: argparse.Namespace) -> None:
    model = load_weights(args.scratch / "tune.pt", shape(args))
    size = export.export(model, tokenizer.load(args.scratch), args.out)
    numbers = Numbers.load(args.scratch / "evaluation.json")
    runs = {name: json.loads((args.scratch / f"{name}.json").read_text()) for name in ("pretrain", "tune")}
    parameters = sum(w.numel() for w in model.parameters())
    export.write_card(args.out, export.numbers_section(numbers, parameters, runs))
    say(f"export: {size / 1e6:.1f} MB in {args.out}")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        match stage:
            case "tokenizer":
                make_tokenizer(args)
            case "corpus":
                make_corpus(args)
            case "pretrain" | "tune":
                run_training(args, stage)
            case "evaluate":
                run_evaluation(args)
            case "export":
                run_export(args)


if __name__ == "__main__":
    main()
