"""The whole protocol on a GPU in one call: probes, gates, experiments, every operator beside its peers."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from kernels.bench import report
from kernels.bench.case import Probes, Row, Spec, measure
from kernels.bench.cases import all_specs
from kernels.bench.experiments import Answer, instruction_families, row_invariance
from kernels.bench.probe import probe
from kernels.bench.timing import Timer, make_timer
from kernels.bench.workload import FULL, SMOKE
from kernels.cuda.common import INTERPRETED


def run(
    rounds: int = 20,
    seconds: float = 450.0,
    only: tuple[str, ...] = (),
    smoke: bool = False,
    save: str | None = None,
    folder: Path = report.RESULTS,
) -> int:
    """Measure and print; the exit code: 1 where an operator failed its gate or an invariant of ours does not hold.

    seconds: cases are skipped, and named, once the run is this old. only: operators whose names contain one of these.
    smoke: tiny shapes, one round: that everything runs, not how fast.
    """
    begin = time.monotonic()
    sizes = SMOKE if smoke else FULL
    if INTERPRETED.value and not smoke:
        raise ValueError("the interpreter measures nothing: pass --smoke, or run without TRITON_INTERPRET on a GPU")
    timer = make_timer(INTERPRETED.value)
    torch.manual_seed(0)
    rows: list[Row] = []
    skipped: list[str] = []
    with torch.inference_mode(), warnings.catch_warnings():
        if smoke:
            warnings.simplefilter("ignore")  # of peers: torch names why each backend refuses
        say("probing the device")
        probes, familiar = probe(timer, *((1 << 16, 64, 2) if smoke else (2 << 30, 8192, 50)))
        experiments = experiment(smoke, timer.device) if not only or "experiments" in only else []
        specs = [spec for spec in all_specs(sizes, timer.device) if not only or any(o in spec.op for o in only)]
        for number, spec in enumerate(specs):
            name = f"{spec.op}, {spec.shape}"
            if time.monotonic() - begin > seconds:
                skipped.append(name)
                continue
            say(f"{number + 1} of {len(specs)}: {name}")
            rows.append(attempt(spec, timer, probes, 1 if smoke else rounds))

    machine = timer.describe() | {"versions": report.versions(), "date": report.now()}
    command = "python -m kernels.bench " + " ".join(sys.argv[1:])
    result: dict[str, object] = {"command": command, "machine": machine, "probes": familiar, "experiments": experiments}
    result |= {"kernels": [asdict(row) for row in rows], "skipped": skipped}
    text = [f"`{command}`", "", *(f"- {key}: {value}" for key, value in (machine | familiar).items())]
    text += ["", "## experiments", "", *map(sentence, experiments)]
    text += ["", "## kernels (microseconds)", "", report.table(rows)]
    text += [f"\nSkipped, the time was over: {name}" for name in skipped]
    print("\n".join(text))
    print(json.dumps(result))
    if save is not None:
        report.save(save, "\n".join(text), result, folder)
    broken = any(answer.get("failure") or (answer["ours"] and not answer["equal"]) for answer in experiments)
    return 1 if broken or any(row.failure for row in rows) else 0


def experiment(smoke: bool, device: torch.device) -> list[Answer]:
    """The questions about the device, and those about our operators, whose answers must be yes (`ours`)."""
    say("comparing bits")
    answers: list[Answer] = []
    questions: tuple[tuple[bool, Callable[[], list[Answer]]], ...] = (
        (False, lambda: instruction_families(256 if smoke else 4096, device)),
        (True, lambda: row_invariance(SMOKE if smoke else FULL, device)),
    )
    for ours, ask in questions:
        try:
            answers += [answer | {"ours": ours} for answer in ask()]
        except Exception as problem:  # one broken kernel must not cost the whole run
            answers.append({"question": "not answered", "ours": ours, "equal": False, "failure": repr(problem)[:300]})
    return answers


def attempt(spec: Spec, timer: Timer, probes: Probes, rounds: int) -> Row:
    """A row; an operator that raises fails, and the others are still measured."""
    try:
        row = measure(spec, timer, probes, rounds)
        timer.release()  # an error on the device shows here at the latest
    except Exception as problem:  # compiler errors and CUDA errors have many types
        return Row(spec.op, spec.shape, None, failure=f"{type(problem).__name__}: {problem}".splitlines()[0][:200])
    return row


def sentence(answer: Answer) -> str:
    """An answer for a person."""
    if "failure" in answer:
        return f"- FAIL: {answer['failure']}"
    verdict = (
        "yes" if answer["equal"] else f"NO, {answer['differing_share']:.2%} of {answer['elements']} elements differ"
    )
    return f"- {answer['question']}: {verdict}"


def say(message: str) -> None:
    """Progress, on stderr, so that stdout holds the result alone."""
    print(message, file=sys.stderr, flush=True)
