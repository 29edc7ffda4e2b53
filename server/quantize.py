"""`stet quantize`: write an int8 checkpoint, and show how far it is."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from models.errors import ModelError
from models.evaluate import text_of_file
from models.loader import LoadProgress, load_config, load_model, resolve_model
from models.quantize import HEAD, TABLE, Change, quantize_checkpoint
from models.smooth import calibrate
from server.engine.config import EngineConfig, StartupError
from server.engine.device import make_device
from server.progress import ProgressLine

_KEPT = {None: (), "table": (TABLE,), "head": (HEAD,), "both": (TABLE, HEAD)}
# Of the text that a model is calibrated on: a few hundred sequences' worth, as in the paper.
CALIBRATION_TOKENS = 100_000


def run(flags: argparse.Namespace) -> int:
    """The command: progress on standard error. Returns the exit code: 2 for whatever the caller can repair."""
    for number in (signal.SIGTERM, signal.SIGINT):  # what is half written must be removed
        signal.signal(number, _stop)
    progress = ProgressLine()
    target = Path(flags.out).expanduser()
    try:
        source = resolve_model(
            flags.model, flags.revision, offline=flags.offline, progress=lambda line: progress.say(line, None)
        )
        change = None if flags.smooth is None else _smoothing(source, flags.smooth, progress)
        # The steps of the quantization are too short to be worth a second thread's waiting.
        torch.set_num_threads(1)
        size = quantize_checkpoint(
            source,
            target,
            flags.mode,
            keep=_KEPT[flags.keep],
            change=change,
            progress=lambda at: progress.say(f"quantizing {flags.model}", at.loaded_bytes / max(at.total_bytes, 1)),
        )
    except (ModelError, StartupError, ValueError) as error:
        progress.clear()
        print(f"stet: {error}", file=sys.stderr)
        return 2
    finally:
        progress.clear()
    print(f"{flags.model} as {flags.mode}: {size / 1e6:,.1f} MB of weights in {target}; serve it by that path")
    return 0


def _smoothing(source: Path, text: Path, progress: ProgressLine) -> Change:
    config = load_config(source)
    if config.quantization is not None:
        raise ModelError(f"{source} is quantized already; use the checkpoint that it was quantized from")
    rows = text_of_file(text, source, config.bos_token_id, config.max_position_embeddings, CALIBRATION_TOKENS).rows

    def loaded(at: LoadProgress) -> None:
        progress.say("loading the model to calibrate it", at.loaded_bytes / max(at.total_bytes, 1))

    ops = make_device(EngineConfig()).ops
    smoothing = calibrate(
        lambda watched: load_model(source, watched, quantization="none", progress=loaded),
        ops,
        rows,
        progress=progress.say,
    )
    return smoothing.apply


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
