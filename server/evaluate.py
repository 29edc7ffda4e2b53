"""`stet evaluate`: measure a model as it would be served against the same model unquantized, and write the receipt.

It computes in this process, on the device that an engine with the same settings would take.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

# Read when torch loads it, as in the engine: idle threads soon sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch

from models.config import ModelConfig
from models.errors import ModelError
from models.evaluate import (
    ObservedOps,
    Reader,
    Text,
    compare,
    exact_match,
    heldout_answers,
    heldout_text,
    keep_unquantized,
    text_of_file,
)
from models.hub import BUILT_IN_MODELS
from models.layers import DecoderModel
from models.loader import LoadProgress, load_config, load_model, resolve_model, weights_hash
from models.receipt import Receipt, ReceiptMatch, ReceiptText, receipt_json, write_receipt
from server.config import Settings
from server.engine.build import quantization_mode
from server.engine.config import StartupError
from server.engine.device import Device, make_device
from server.engine.dtypes import dtype_name
from server.progress import ProgressLine
from server.version import VERSION

__all__ = ["Measurement", "evaluate", "run"]

Say = Callable[[str, float | None], None]
_EMBEDDED = "stet-tales"


@dataclass(frozen=True, slots=True)
class Measurement:
    """What to measure, beside what the settings say.

    text: a file; None: held-out documents of the embedded model. max_tokens: of the text. tasks: held-out tasks for
    each kind and number of examples. against: the unquantized model; None: the model itself, loaded unquantized.
    keep: "table", "head" or "both" are left unquantized, which is not what is served: there is no receipt of it.
    """

    text: Path | None = None
    max_tokens: int = 100_000
    tasks: int = 100
    against: str | None = None
    keep: str | None = None


def run(settings: Settings, measurement: Measurement, as_json: bool) -> int:
    """The command: progress on standard error, table or JSON on standard output. Returns the exit code."""
    progress = ProgressLine()
    try:
        receipt, folder = evaluate(settings, measurement, progress.say)
    except (ModelError, StartupError, ValueError) as error:
        progress.clear()
        print(f"stet: {error}", file=sys.stderr)
        return 2
    progress.clear()
    print(receipt_json(receipt) if as_json else table(receipt), end="")
    if measurement.keep is not None:
        print("no receipt: a model with an unquantized part is not what is served", file=sys.stderr)
        return 0
    try:
        file = write_receipt(folder, receipt)
    except ModelError as error:
        print(f"stet: {error}", file=sys.stderr)
        return 1
    print(f"written to {file}", file=sys.stderr)
    return 0


def evaluate(settings: Settings, measurement: Measurement, say: Say) -> tuple[Receipt, Path]:
    """Measure; return the receipt and the model's folder, in which it belongs.

    say(what is being done, share done or None). Raises ModelError, StartupError or ValueError, one line for a person.
    """
    path = _resolve(settings, settings.model, say)
    base_path = path if measurement.against is None else _resolve(settings, measurement.against, say)
    embedded = base_path == BUILT_IN_MODELS[_EMBEDDED]
    config = load_config(base_path)
    if config.quantization is not None:
        raise ModelError(
            f"{measurement.against or settings.model} is int8 already; say --against MODEL with the unquantized model "
            "that it was made from"
        )
    if measurement.text is None and not embedded:
        raise ModelError(f"--text FILE is needed: only {_EMBEDDED} comes with a text that it was not trained on")
    text = _text(measurement, base_path, config)

    device = make_device(settings.engine_config())
    mode = quantization_mode(settings.quantization, load_config(path), device)
    # One object for both models, so that they can share parts.
    ops = ObservedOps(device.ops)

    def load(folder: Path, quantized: bool) -> DecoderModel:
        def loaded(progress: LoadProgress) -> None:
            say(f"loading {folder.name}", progress.loaded_bytes / max(progress.total_bytes, 1))

        return load_model(folder, ops.as_ops(), quantization=mode if quantized else "none", progress=loaded)

    device.check_weights(config, settings.engine_config())
    kv_dtype = device.kv_cache_dtype(settings.kv_cache_dtype, config)
    base_kv_dtype = device.kv_cache_dtype("auto", config)
    base = reader = Reader(load(base_path, quantized=False), ops, base_kv_dtype)
    if (path, mode, kv_dtype) != (base_path, "none", base_kv_dtype):
        reader = Reader(load(path, quantized=True), ops, kv_dtype)
    if reader.model.config.vocab_size != base.model.config.vocab_size:
        raise ModelError(f"{settings.model} and {measurement.against} have vocabularies of different sizes")
    if measurement.keep is not None:
        keep_unquantized(reader.model, base.model, measurement.keep)

    compared = compare(base, reader, text.rows, say)
    matches = _matches(base, reader, base_path, measurement.tasks, say) if embedded else {}
    description = device.describe()
    receipt = Receipt(
        model=_name(settings.model),
        weights_hash=weights_hash(path),
        unquantized_weights_hash=weights_hash(base_path),
        quantization=mode,
        kv_cache_dtype=dtype_name(kv_dtype),
        dtype=dtype_name(device.ops.dtype),
        backend=description["backend"],
        device=description["device"],
        instruction_set=description["instruction_set"],
        versions=_versions(device),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        text=ReceiptText(text.source, text.sha256, len(text.rows), compared.tokens),
        perplexity_unquantized=compared.perplexity_unquantized,
        perplexity=compared.perplexity,
        mean_kl=compared.mean_kl,
        top1_agreement=compared.top1_agreement,
        layer_errors=compared.layer_errors,
        exact_match=matches,
        weight_bytes_unquantized=base.model.weight_bytes,
        weight_bytes=reader.model.weight_bytes,
    )
    return receipt, path


def _resolve(settings: Settings, model: str, say: Say) -> Path:
    # A revision is the model's own; another one is looked up as it stands.
    revision = settings.revision if model == settings.model else None
    return resolve_model(model, revision, offline=settings.offline, progress=lambda line: say(line, None))


def _text(measurement: Measurement, folder: Path, config: ModelConfig) -> Text:
    if measurement.text is None:
        return heldout_text(folder, measurement.max_tokens)
    context = config.max_position_embeddings
    return text_of_file(measurement.text, folder, config.bos_token_id, context, measurement.max_tokens)


def _matches(base: Reader, reader: Reader, folder: Path, tasks: int, say: Say) -> dict[str, ReceiptMatch]:
    matches = {}
    for name, answers in heldout_answers(folder, tasks).items():

        def solving(what: str, share: float, name: str = name) -> None:
            say(f"{what}: {name}", share)

        before = exact_match(base, answers, solving)
        after = before if reader is base else exact_match(reader, answers, solving)
        matches[name] = ReceiptMatch(len(answers), before, after)
    return matches


def _versions(device: Device) -> dict[str, str]:
    versions = {"stet": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}
    return versions | dict(device.versions())


def _name(model: str) -> str:
    """What was asked for, without the path where it was a folder: receipts are shown to clients."""
    return Path(model).name if Path(model).expanduser().is_dir() else model


def _all_tasks(matches: list[ReceiptMatch]) -> ReceiptMatch:
    total = sum(match.tasks for match in matches)
    before = sum(match.tasks * match.unquantized for match in matches) / total
    return ReceiptMatch(total, before, sum(match.tasks * match.quantized for match in matches) / total)


def table(receipt: Receipt) -> str:
    """The receipt for a person."""
    mode = receipt.quantization + (", int8 KV cache" if receipt.kv_cache_dtype == "int8" else "")
    rows = [("", "unquantized", receipt.quantization, "")]
    before, after = receipt.perplexity_unquantized, receipt.perplexity
    rows.append(("perplexity", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.2%}"))
    matches = list(receipt.exact_match.items())
    if matches:
        matches.append(("all", _all_tasks(list(receipt.exact_match.values()))))
    for name, match in matches:
        x, y = match.unquantized, match.quantized
        rows.append((f"{name}, {match.tasks} tasks", f"{x:.1%}", f"{y:.1%}", f"{100 * (y - x):+.1f} points"))
    full, size = receipt.weight_bytes_unquantized, receipt.weight_bytes
    rows.append(("weights", f"{full / 2**20:.1f} MiB", f"{size / 2**20:.1f} MiB", f"{size / full - 1:+.0%}"))
    errors = " ".join(f"{error:.2%}" for error in receipt.layer_errors)
    text = receipt.text
    other = "itself" if receipt.weights_hash == receipt.unquantized_weights_hash else "the model it was made from,"
    lines = [f"{receipt.model}, {mode} ({receipt.backend}, {receipt.instruction_set}), against {other} unquantized", ""]
    lines += [f"  {a:<22}{b:>14}{c:>14}{d:>16}".rstrip() for a, b, c, d in rows]
    lines += [
        "",
        f"  mean KL divergence    {receipt.mean_kl:.6f} nats a token",
        f"  same most likely      {receipt.top1_agreement:.2%} of the predictions",
        f"  error after layers    {errors}",
        f"  text                  {text.source}: {text.tokens:,} predictions in {text.sequences:,} sequences",
        "",
    ]
    return "\n".join(lines)
