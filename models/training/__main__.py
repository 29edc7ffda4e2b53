"""`python -m models.training STAGE`: makes `stet-tales` from nothing."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from models.training import data, export, qat, tokenizer
from models.training.compare import MODES, Comparison, HeldOut, clipping, compare, measure, section
from models.training.decoder import Decoder, Shape
from models.training.evaluate import Numbers, evaluate
from models.training.train import Recipe, load_weights, pick_device, save_checkpoint, train

ALL = ("tokenizer", "corpus", "pretrain", "tune", "evaluate", "export")
# Training for int8 and what measures it: not part of `all`, because these weights lose nothing to int8 (model card).
STAGES = (*ALL, "qat", "compare")
SPLITS = ("train", "tune")
SHARES = {"pretrain": 0.75, "tune": 0.25, "qat": 0.25}  # of the minutes or tokens
PRETRAIN = Recipe(peak_lr=3e-3, minutes=1)
TUNE = Recipe(peak_lr=1e-3, minutes=1, lengths=((1.0, 1024),), decay_from=0.1)
TITLES = {"start": "before `qat`", "qat-none": "control: `qat` without rounding", "qat-w8a8": "after `qat`"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.training", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "all"), help=f"one stage, or all: {' '.join(ALL)}")
    parser.add_argument(
        "--minutes", type=float, default=55, help="training time (default: 55); of it tune and qat take a quarter"
    )
    parser.add_argument("--tokens", type=int, help="budget in tokens instead of minutes: reproducible to the bit")
    parser.add_argument("--scratch", type=Path, default=Path("build/training"), help="token files and checkpoints")
    parser.add_argument("--out", type=Path, default=Path("models/tales"), help="where `export` writes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus-tokens", type=int, default=16_000_000, help="tokens of the pre-training stream")
    parser.add_argument("--vocab", type=int, default=4096, help="the largest vocabulary")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks a cell of the evaluation")
    parser.add_argument("--mode", choices=MODES, default="w8a8", help="what `qat` trains for; none is its control")
    parser.add_argument("--weights", choices=("tune", "qat"), default="tune", help="what `evaluate` and `export` take")
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


def budgeted(recipe: Recipe, args: argparse.Namespace, stage: str) -> Recipe:
    """The recipe with the stage's share of the budget."""
    minutes = None if args.tokens else args.minutes * SHARES[stage]
    tokens = int(args.tokens * SHARES[stage]) if args.tokens else None
    return replace(recipe, minutes=minutes, tokens=tokens, seed=args.seed)


def run_training(args: argparse.Namespace, stage: str) -> None:
    recipe = budgeted(PRETRAIN if stage == "pretrain" else TUNE, args, stage)
    torch.manual_seed(args.seed)
    model = Decoder(shape(args)) if stage == "pretrain" else load_weights(args.scratch / "pretrain.pt", shape(args))
    stream = data.load(args.scratch, "train" if stage == "pretrain" else "tune", masked=stage == "tune")
    say(f"{stage}: {sum(w.numel() for w in model.parameters()):,} parameters, {len(stream.tokens) / 1e6:.1f}M tokens")
    train(model, stream, recipe, args.scratch / f"{stage}.pt", say)


def before_qat(args: argparse.Namespace) -> Decoder:
    """What `qat` starts from and compares with: the tuned weights or, where they were not made here, the exported ones.

    Kept as qat-start.pt from then on, because `export` overwrites them.
    """
    kept = args.scratch / "qat-start.pt"
    if not kept.exists():
        tuned = args.scratch / "tune.pt"
        if tuned.exists():
            model = load_weights(tuned, shape(args))
        else:
            model = export.load(args.out)
            tokenizer.save(tokenizer.load(args.out), args.scratch, model.shape.max_length)
        say(f"qat: starts from {tuned if tuned.exists() else args.out}")
        save_checkpoint(kept, {"model": model.state_dict()})
    return load_weights(kept, shape(args))


def run_qat(args: argparse.Namespace) -> None:
    start = before_qat(args)
    stream = qat.build_stream(args.scratch, args.seed, args.corpus_tokens // 16, args.threads, say)
    qat.run(start, stream, budgeted(qat.RECIPE, args, "qat"), args.mode, args.scratch, say)


def run_comparison(args: argparse.Namespace) -> None:
    models = {"start": before_qat(args)}
    for mode in MODES:
        if (path := qat.checkpoint(args.scratch, mode)).exists():
            models[path.stem] = load_weights(path, shape(args))
    matrices = [weight for weight in models["start"].parameters() if weight.dim() == 2]
    for clip in clipping(matrices):
        say(f"compare: scale at {clip.share:.2f} of the maximum: error {clip.error:.2e}, best for {clip.best:,} rows")
    tokens = tokenizer.load(args.scratch)
    held_out = HeldOut.make(tokens, args.seed, 4 * args.tasks, args.tasks)
    measured = {}
    for name, model in models.items():
        say(f"compare: measuring {name} in {', '.join(MODES)}")
        measured[name] = measure(model, tokens, held_out)
    found = compare(measured, held_out)
    for row in found.rows:
        say(row.line())
    found.save(args.scratch / "comparison.json")


def chosen_weights(args: argparse.Namespace) -> Decoder:
    """Those of the stage `--weights`. Raises FileNotFoundError, with what to do, where there are none."""
    path = args.scratch / "tune.pt" if args.weights == "tune" else qat.checkpoint(args.scratch, "w8a8")
    return load_weights(path, shape(args))


def run_evaluation(args: argparse.Namespace) -> None:
    model = export.rounded(chosen_weights(args)).to(pick_device())
    hashes = [folder / f"{split}.hashes.npy" for folder in (args.scratch, args.scratch / "qat") for split in SPLITS]
    for path in hashes:
        if not path.exists():
            say(f"evaluate: {path} is missing, so held-out documents are not compared with that part of the corpus")
    there = [path for path in hashes if path.exists()]
    numbers = evaluate(model, tokenizer.load(args.scratch), args.seed, there, args.tasks, say)
    numbers.save(args.scratch / "evaluation.json")


def run_export(args: argparse.Namespace) -> None:
    model = chosen_weights(args)
    size = export.export(model, tokenizer.load(args.scratch), args.out)
    numbers = Numbers.load(args.scratch / "evaluation.json")
    made = ("pretrain", "tune") if args.weights == "tune" else ("pretrain", "tune", "qat-w8a8")
    paths = {name: args.scratch / f"{name}.json" for name in made}
    runs = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    parameters = sum(w.numel() for w in model.parameters())
    export.write_card(args.out, export.numbers_section(numbers, parameters, runs))
    if (path := args.scratch / "comparison.json").exists():
        export.write_card(args.out, section(Comparison.load(path), TITLES), export.INT8_MARKERS)
    say(f"export: {size / 1e6:.1f} MB in {args.out}")


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)
    for stage in ALL if args.stage == "all" else (args.stage,):
        match stage:
            case "tokenizer":
                make_tokenizer(args)
            case "corpus":
                make_corpus(args)
            case "pretrain" | "tune":
                run_training(args, stage)
            case "qat":
                run_qat(args)
            case "compare":
                run_comparison(args)
            case "evaluate":
                run_evaluation(args)
            case "export":
                run_export(args)


if __name__ == "__main__":
    main()
