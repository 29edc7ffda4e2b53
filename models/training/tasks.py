"""Instruction tasks over the world: prompts with answers, in chat and plain form, with no, one or more examples."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from models.training.late_plots import ALL_PLOTS
from models.training.lumi import arithmetic, translation
from models.training.teller import Story, Teller, join
from models.training.world import a

BEGIN, END_OF_TEXT, PAD = "<|begin|>", "<|endoftext|>", "<|pad|>"
SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (END_OF_TEXT, BEGIN, PAD, SYSTEM, USER, ASSISTANT, END)

Key = tuple[str, ...]
Accept = Callable[[Key], bool]
Example = tuple[str, str]  # prompt, answer

EXACT = ("summary", "question", "mood", "translate", "sum")  # tasks with one right answer
OPEN = ("tell", "continue")  # tasks whose answer is a story
TASKS = EXACT + OPEN
SHOTS = {"zero": 0, "one": 1, "few": 3}


@dataclass(frozen=True)
class Task:
    """One task: the examples that come first, then the prompt whose answer counts."""

    name: str
    shots: tuple[Example, ...]
    prompt: str
    answer: str
    keys: tuple[Key, ...]
    chat: bool
    system: str = ""
    as_turns: bool = False

    def pieces(self) -> list[tuple[str, bool]]:
        """The document as (text, is it an answer): the text of special tokens included, without `BEGIN`."""
        if not self.chat:
            out: list[tuple[str, bool]] = []
            for prompt, answer in (*self.shots, (self.prompt, self.answer)):
                out += [(("\n\n" if out else "") + f"Q: {prompt}\nA:", False), (" " + answer, True)]
            return [*out, (END_OF_TEXT, True)]
        out = [(SYSTEM + self.system + END, False)] if self.system else []
        if self.as_turns:
            turns = (*self.shots, (self.prompt, self.answer))
        else:
            shown = "".join(f"Q: {p}\nA: {r}\n\n" for p, r in self.shots)
            turns = ((shown + (f"Q: {self.prompt}\nA:" if self.shots else self.prompt), self.answer),)
        for prompt, answer in turns:
            out += [(USER + prompt + END + ASSISTANT, False), (answer + END, True)]
        return out

    def question(self) -> str:
        """All of the document before the last answer."""
        pieces = self.pieces()
        while pieces[-1][1]:
            pieces.pop()
        return "".join(text for text, _ in pieces)


def a_story(rng: random.Random, accept: Accept, brief: bool = False) -> Story:
    """A story whose skeleton `accept` takes; draws again until one is."""
    names = tuple(ALL_PLOTS)
    while True:
        told = ALL_PLOTS[rng.choice(names)](Teller(rng, brief))
        if accept(told.key):
            return told


def _tell(rng: random.Random, accept: Accept, brief: bool) -> tuple[str, str, Key]:
    story = a_story(rng, accept)
    hero = a(story.hero.word)
    prompts = [
        f"Tell me a story about {hero} who {story.deed}.",
        f"Tell me a story about {hero} who {story.deed}.",
        f"Write a story about {story.hero.full}, who {story.deed}.",
        f"Tell me a story about {hero} named {story.hero}.",
        f"Tell me a story about {hero}.",
        f"Write a {story.mood} story about {hero}.",
        f"Tell me a {story.mood} story.",
        f"Please tell a story called “{story.title}”.",
        f"Can you tell me a story about {story.hero.full}?",
        f"I would like to hear a story about {hero} and {a(story.item.noun) if story.item else 'a friend'}.",
        "Tell me a story.",
        "Tell me a bedtime story, please.",
        f"story about {hero} please",
        f"Tell me a story about {hero} and {a(story.friend.word) if story.friend else 'a star'}.",
        f"Tell me a story about {story.hero} and {story.friend or 'a star'}.",
        f"Write a short story that takes place {story.place.at}.",
        f"Tell a tale of {hero}.",
        f"Once there was {hero} who {story.deed}. Tell me more!",
    ]
    return rng.choice(prompts), story.text, story.key


def _continue(rng: random.Random, accept: Accept, brief: bool) -> tuple[str, str, Key]:
    story = a_story(rng, accept, brief)
    cut = rng.randint(1, max(1, min(4, len(story.sentences) - 2)))
    start, rest = (
        join(story.sentences[:cut], story.breaks),
        join(story.sentences[cut:], [b - cut for b in story.breaks if b > cut]),
    )
    form = rng.choice(
        ("Continue the story: {}", "Go on with this story: {}", "{} What happened next?", "Finish this story.\n\n{}")
    )
    return form.format(start), rest, story.key


def _summary(rng: random.Random, accept: Accept, brief: bool) -> tuple[str, str, Key]:
    story = a_story(rng, accept, brief)
    form = rng.choice(
        (
            "Summarise the story in one sentence.\n\n{}",
            "{}\n\nWhat happened in this story? One sentence.",
            "Sum it up in a sentence: {}",
        )
    )
    return form.format(story.text), story.summary, story.key


def _question(rng: random.Random, accept: Accept, brief: bool) -> tuple[str, str, Key]:
    story = a_story(rng, accept, brief)
    question, answer = rng.choice(story.facts)
    form = rng.choice(("{} {}", "{}\n\n{}", "Read the story and answer the question.\n\n{}\n\n{}"))
    return form.format(story.text, question), answer, story.key


def _mood(rng: random.Random, accept: Accept, brief: bool) -> tuple[str, str, Key]:
    want = rng.choice(("happy", "sad"))  # as many of the one as of the other
    story = a_story(rng, accept, brief)
    while story.mood != want:
        story = a_story(rng, accept, brief)
    form = rng.choice(("{}\n\nIs this story happy or sad?", "Is the mood happy or sad? {}", "{}\n\nHappy or sad?"))
    return form.format(story.text), story.mood, story.key


def _keyed(make: Callable[[random.Random], tuple[str, str, Key]]) -> Callable[..., tuple[str, str, Key]]:
    def draw(rng: random.Random, accept: Accept, brief: bool) -> tuple[str, str, Key]:
        while True:
            prompt, answer, key = make(rng)
            if accept(key):
                return prompt, answer, key

    return draw


MAKERS: dict[str, Callable[..., tuple[str, str, Key]]] = {
    "tell": _tell,
    "continue": _continue,
    "summary": _summary,
    "question": _question,
    "mood": _mood,
    "translate": _keyed(translation),
    "sum": _keyed(arithmetic),
}
SYSTEMS = (
    "You are a kind storyteller.",
    "You tell little stories and answer questions about them.",
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are Stet, a small model that tells tales.",
)


def task(rng: random.Random, name: str, shots: int, accept: Accept, chat: bool | None = None) -> Task:
    """One task document. Examples and question are drawn so that `accept` takes each of their keys."""
    drawn = []
    for _ in range(shots + 1):
        brief = shots > 0 or rng.random() < 0.4
        drawn.append(MAKERS[name](rng, accept, brief))
    chat = rng.random() < 0.7 if chat is None else chat
    system = rng.choice(SYSTEMS) if chat and rng.random() < 0.2 else ""
    *first, (prompt, answer, _) = drawn
    return Task(
        name,
        tuple((p, r) for p, r, _ in first),
        prompt,
        answer,
        tuple(k for _, _, k in drawn),
        chat,
        system,
        as_turns=rng.random() < 0.5,
    )


TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello!", "Hi", "Hello there.", "Good morning!", "Hey", "Good evening."),
        ("Hello! Shall I tell you a story?", "Hello! Do you want to hear a tale?", "Good day! What shall I tell you?"),
    ),
    (
        ("Who are you?", "What is your name?", "What are you?", "Are you a robot?"),
        ("I am a small model that tells little tales.", "I am stet-tales, a very small language model."),
    ),
    (
        ("What can you do?", "Help", "What do you know?", "How can you help me?"),
        (
            "I can tell little stories, sum them up, answer questions about them, "
            "do small sums and speak a bit of Lumi.",
        ),
    ),
    (
        ("Thank you!", "Thanks", "That was nice.", "I liked that.", "Great story!"),
        ("You are welcome! Shall I tell another one?", "I am glad that you liked it!"),
    ),
    (
        ("Goodbye!", "Bye", "Good night.", "See you tomorrow."),
        ("Goodbye! Sleep well. 🌙", "Goodbye! Come back for a story. 🌙"),
    ),
    (("What is Lumi?", "What language is that?"), ("Lumi is a small language that only lives in my tales.",)),
    (("How are you?", "Are you well?"), ("I am well, thank you! Shall I tell you a story?",)),
    (
        (
            "What is the capital of France?",
            "Write some code.",
            "What is the news today?",
            "Who is the president?",
            "Explain physics.",
            "Can you write Python?",
        ),
        ("I do not know. I only know little tales.", "I am sorry, I only know my little world of tales."),
    ),
)


def talk(rng: random.Random) -> Task:
    """Small talk. It has no key: there is too little of it to split."""
    asked, answers = rng.choice(TALK)
    first: tuple[Example, ...] = ()
    if rng.random() < 0.3:
        more, replies = TALK[rng.choice((0, 0, 6))]
        first = ((rng.choice(more), rng.choice(replies)),)
    return Task("talk", first, rng.choice(asked), rng.choice(answers), (), True, as_turns=True)
