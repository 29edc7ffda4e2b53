"""What the model can do, in numbers: held-out perplexity, exact match per task and shots, checks of stories."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from models.training.corpus import documents, heldout_tasks, is_heldout, wants
from models.training.data import digest, encode
from models.training.decoder import Decoder
from models.training.tasks import ASSISTANT, BEGIN, END, END_OF_TEXT, EXACT, SHOTS, USER, Task, a_story
from models.training.world import HE, SHE, a

Report = Callable[[str], None]
TEMPERATURE = 0.7
STORIES = 24  # sampled for the checks


@dataclass(frozen=True)
class Numbers:
    """Results on held-out documents. Perplexities are per token; shares are between 0 and 1."""

    documents: int
    dropped: int  # held-out documents whose text occurs in training, left out
    perplexity_stories: float
    perplexity_all: float
    bits_per_byte_stories: float
    exact: dict[str, dict[str, float]]  # task -> shots -> share of answers that are right to the letter
    per_cell: int  # tasks behind each share
    stories: dict[str, float]  # checks of sampled stories -> share that pass
    samples: list[tuple[str, str]]  # prompt, story

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Numbers:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: run `python -m models.training evaluate` first")
        return cls(**json.loads(path.read_text()))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of ids as one [rows, longest] int64 tensor, zeros on the right (causal attention never looks there)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


@torch.inference_mode()
def nats(model: Decoder, rows: Sequence[Sequence[int]]) -> Tensor:
    """Sum of the cross-entropy of each row's tokens after its first, [rows] float32."""
    ids = padded(rows, next(model.parameters()).device)
    losses = F.cross_entropy(model.logits(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    lengths = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
    return (losses * (torch.arange(losses.shape[1], device=ids.device) < lengths[:, None])).sum(1)


def spelled_out(tokenizer: Tokenizer, tasks: Sequence[Task]) -> list[tuple[list[int], int]]:
    """Of each task the ids of prompt and right answer, and how many of them are the prompt's."""
    found = []
    for task in tasks:
        pieces = task.pieces()
        ids, _ = encode(tokenizer, ((BEGIN, False), *pieces))
        answers = 1 + next(i for i, (_, counts) in enumerate(reversed(pieces)) if not counts)
        prompt, _ = encode(tokenizer, ((BEGIN, False), *pieces[: len(pieces) - answers + 1]))
        found.append((ids, len(prompt)))
    return found


@torch.inference_mode()
def exact_match(model: Decoder, tokenizer: Tokenizer, tasks: Sequence[Task]) -> float:
    """Share of tasks whose greedy answer is right to the letter and ends where it should.

    Greedy decoding spells the answer exactly if and only if, reading prompt and right answer, the most likely next
    token is the answer's at each of its places: so one forward pass decides it, without decoding.
    """
    right = 0
    for start in range(0, len(tasks), 16):
        spelled = spelled_out(tokenizer, tasks[start : start + 16])
        ids = padded([row for row, _ in spelled], next(model.parameters()).device)
        hidden = model(ids)
        answers = [(i, slice(prompt - 1, len(row) - 1)) for i, (row, prompt) in enumerate(spelled)]
        # The head is much of the work, so it sees the answers only.
        best = model.head(torch.cat([hidden[i, places] for i, places in answers])).argmax(-1)
        said = torch.split(best, [places.stop - places.start for _, places in answers])
        right += sum(torch.equal(a, ids[i, 1:][places]) for a, (i, places) in zip(said, answers, strict=True))
    return right / max(1, len(tasks))


@torch.inference_mode()
def sample(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], seed: int, temperature: float, limit: int = 320
) -> list[tuple[str, bool]]:
    """For each prompt (special tokens spelled out) its continuation, and whether it ended by itself.

    Top-p is 0.9. Without a KV cache: simple, and fast enough for a few dozen stories.
    """
    stops = {tokenizer.token_to_id(END), tokenizer.token_to_id(END_OF_TEXT)}
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    lengths, done = [len(row) for row in rows], [False] * len(rows)
    for _ in range(limit):
        live = [i for i, over in enumerate(done) if not over]
        if not live:
            break
        hidden = model(padded([rows[i] for i in live], device))
        last = hidden[torch.arange(len(live)), torch.tensor([len(rows[i]) - 1 for i in live])]
        logits = model.head(last).float().cpu()
        chosen = logits.argmax(-1)
        if temperature > 0:
            share, order = (logits / temperature).softmax(-1).sort(descending=True)
            share[share.cumsum(-1) - share > 0.9] = 0
            chosen = order.gather(1, torch.multinomial(share, 1, generator=generator))[:, 0]
        for i, token in zip(live, chosen.tolist(), strict=True):
            if token in stops:
                done[i] = True
            else:
                rows[i].append(token)
    return [(tokenizer.decode(row[n:]), over) for row, n, over in zip(rows, lengths, done, strict=True)]


def story_checks(text: str, asked: str, ended: bool) -> dict[str, bool]:
    """Simple signs of a story that can be followed; `asked` is the kind of hero that the prompt named."""
    names = re.findall(r"\b(?:" + "|".join(map(re.escape, SHE + HE)) + r")\b", text)
    hero = names[0] if names else ""
    sentences = re.split(r"(?<=[.!?”\"]) ", text)
    return {
        "ends by itself": ended,
        "is about the animal asked for": re.search(rf"\b{asked}\b", " ".join(sentences[:3])) is not None,
        "keeps its hero": bool(hero) and hero in text[len(text) // 2 :],
        "has at most three names": 0 < len(set(names)) <= 3,
    }


def evaluate(
    model: Decoder, tokenizer: Tokenizer, seed: int, trained_on: Sequence[Path], size: int, report: Report
) -> Numbers:
    """All numbers of the model card, with `size` tasks a cell; `trained_on` are files of training text hashes."""
    model.eval()
    known = {int(h) for path in trained_on for h in np.load(path)}
    kept = list(documents(seed, "heldout", 4 * size))
    count = len(kept)
    kept = [d for d in kept if int.from_bytes(digest(d.text), "little") not in known]
    if not all(is_heldout(key) for d in kept for key in d.keys):
        raise RuntimeError("a held-out document carries a key of the training split")
    sums = {True: [0.0, 0, 0], False: [0.0, 0, 0]}  # is a plain story -> nats, tokens, bytes
    for start in range(0, len(kept), 16):
        some = kept[start : start + 16]
        rows = [encode(tokenizer, d.pieces)[0] for d in some]
        for doc, row, value in zip(some, rows, nats(model, rows).tolist(), strict=True):
            cell = sums[doc.kind == "story"]
            cell[0] += value
            cell[1] += len(row) - 1
            cell[2] += len(doc.text.removeprefix(BEGIN).removesuffix(END_OF_TEXT).encode())
    (story_nats, story_tokens, story_bytes), (task_nats, task_tokens, _) = sums[True], sums[False]
    perplexity = math.exp(story_nats / story_tokens)
    perplexity_all = math.exp((story_nats + task_nats) / (story_tokens + task_tokens))
    report(f"held-out perplexity: stories {perplexity:.3f}, all documents {perplexity_all:.3f}")
    exact: dict[str, dict[str, float]] = {}
    for name in EXACT:
        exact[name] = {}
        for shots in SHOTS:
            exact[name][shots] = exact_match(model, tokenizer, heldout_tasks(seed, name, shots, size))
        report(f"exact match, {name}: " + ", ".join(f"{k}-shot {v:.3f}" for k, v in exact[name].items()))
    rng = random.Random(f"{seed}/samples")
    heroes = [a_story(rng, lambda key: wants("heldout", key)) for _ in range(STORIES)]
    asked = [f"Tell me a story about {a(s.hero.word)} who {s.deed}." for s in heroes]
    told = sample(model, tokenizer, [f"{BEGIN}{USER}{p}{END}{ASSISTANT}" for p in asked], seed, TEMPERATURE)
    checks = [story_checks(text, s.hero.word, ended) for (text, ended), s in zip(told, heroes, strict=True)]
    stories = {name: sum(c[name] for c in checks) / len(checks) for name in checks[0]}
    report("sampled stories: " + ", ".join(f"{k} {v:.2f}" for k, v in stories.items()))
    prompts = ["Tell me a story about a fox who lost her kite.", "Tell me a sad story about a robot."]
    texts = sample(model, tokenizer, [f"{BEGIN}{USER}{p}{END}{ASSISTANT}" for p in prompts], seed, TEMPERATURE)
    texts += sample(model, tokenizer, [BEGIN + "Once upon a time"], seed, TEMPERATURE)
    texts[-1] = ("Once upon a time" + texts[-1][0], texts[-1][1])
    samples = [(p, text) for p, (text, _) in zip([*prompts, "Once upon a time"], texts, strict=True)]
    for prompt, text in samples:
        report(f"\n> {prompt}\n{text}")
    return Numbers(
        len(kept),
        count - len(kept),
        perplexity,
        perplexity_all,
        story_nats / math.log(2) / story_bytes,
        exact,
        size,
        stories,
        samples,
    )
