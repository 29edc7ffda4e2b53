"""Tells one story: draws a cast and a scene, keeps its facts, and words each event in one of many ways.

A plot (see `plots.py` and `more_plots.py`) is a function that changes the teller's state and calls `say` for what
happens, `more` for detail that may be left out, and `ask` for facts that follow from the state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from models.training.scenes import GLANCES, PLACES, SEASONS, TIMES, WEATHERS, Place, Weather
from models.training.world import ELDERS, HE, KINDS, LOOKS, SHE, THINGS, TRAITS, Kind, Thing, a

T = TypeVar("T")
# A letter that begins a sentence: at the start, or after ". " and the like, but not after a closing quote
# (“Who?” asked ...).
SENTENCE_START = re.compile(r"(^“?|[.!?] “?)([a-zà-ÿ])")


@dataclass(frozen=True)
class Someone:
    """A character. `str()` is the name; the pronouns are attributes, so that templates can say `{h.his}`.

    `{h.He}` begins a sentence.
    """

    name: str
    kind: Kind
    trait: str
    habit: str
    he: str

    @property
    def him(self) -> str:
        return "her" if self.he == "she" else "him"

    @property
    def his(self) -> str:
        return "her" if self.he == "she" else "his"

    @property
    def He(self) -> str:
        return self.he.capitalize()

    @property
    def His(self) -> str:
        return self.his.capitalize()

    @property
    def word(self) -> str:
        return self.kind.word

    @property
    def full(self) -> str:
        return f"{self.name} the {self.kind.word}"

    @property
    def a(self) -> str:
        return a(f"{self.trait} {self.kind.word}")

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Item:
    """A thing with a look of its own; `str()` is "the red kite"."""

    look: str
    thing: Thing

    @property
    def bare(self) -> str:
        return f"{self.look} {self.thing.noun}"

    @property
    def a(self) -> str:
        return a(self.bare)

    @property
    def noun(self) -> str:
        return self.thing.noun

    def __str__(self) -> str:
        return f"the {self.bare}"


@dataclass
class Story:
    """A finished story and everything that is known to be true of it."""

    plot: str
    hero: Someone
    title: str
    sentences: list[str]
    breaks: list[int]  # indices of sentences that begin a paragraph
    summary: str
    deed: str  # completes "a story about a fox who ..."
    mood: str  # "happy" or "sad"
    facts: list[tuple[str, str]]
    key: tuple[str, ...]  # the skeleton: what the plot chose, without names and wording
    item: Item | None
    weather: Weather
    place: Place
    friend: Someone | None = None  # the second character, where there is one
    names: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return join(self.sentences, self.breaks)


def join(sentences: Sequence[str], breaks: Sequence[int] = ()) -> str:
    """Sentences as text; a sentence whose index is in `breaks` begins a new paragraph."""
    out = ""
    for i, sentence in enumerate(sentences):
        out += ("" if i == 0 else "\n\n" if i in breaks else " ") + sentence
    return out


class Teller:
    """The state of one story while it is told. Everything random comes from `rng`."""

    def __init__(self, rng: random.Random, brief: bool = False) -> None:
        self.rng = rng
        self.brief = brief
        self.curly = rng.random() < 0.5
        self.sentences: list[str] = []
        self.breaks: list[int] = []
        self.facts: list[tuple[str, str]] = []
        self.key: list[str] = []
        self.env: dict[str, object] = {}
        self.used_names: list[str] = []
        self.used_kinds: list[str] = []
        self.summary = self.deed = ""
        self.mood = "happy"
        self.item: Item | None = None
        self.weather = rng.choice(WEATHERS)
        self.time = rng.choice(TIMES)
        self.h = self.someone("h")
        self.f = self.someone("f")
        self.place = self.a_place("p")
        cold = self.weather.word in ("snowy", "cold")
        season = "winter" if cold else rng.choice([s for s in SEASONS if s != "winter"])
        self.env.update(time=self.time, season=season, w=self.weather.word)

    # -- choices ------------------------------------------------------------------------------------------------
    def pick(self, options: Sequence[T]) -> T:
        """A choice that belongs to the plot: it becomes part of the skeleton."""
        i = self.rng.randrange(len(options))
        self.key.append(str(i))
        return options[i]

    def chance(self, share: float) -> bool:
        hit = self.rng.random() < share
        self.key.append("y" if hit else "n")
        return hit

    def someone(self, slot: str) -> Someone:
        """A new character, of another name and kind than those already here, in `slot` of the templates."""
        kind = self.rng.choice([k for k in KINDS if k.word not in self.used_kinds])
        she = kind.word in ("girl", "princess") or (kind.word != "boy" and self.rng.random() < 0.5)
        name = self.rng.choice([n for n in (SHE if she else HE) if n not in self.used_names])
        trait = self.rng.choice(TRAITS)
        who = Someone(name, kind, trait.word, "", "she" if she else "he")
        who = Someone(name, kind, trait.word, trait.habit.format(h=who), who.he)
        self.used_names.append(name)
        self.used_kinds.append(kind.word)
        self.key.append(kind.word)
        self.env[slot] = who
        return who

    def elder(self) -> str:
        word = "the " + self.pick(ELDERS)
        self.env["e"] = word
        return word

    def a_place(self, slot: str) -> Place:
        used = {p.name for p in self.env.values() if isinstance(p, Place)}
        home = "the " + self.h.kind.home
        place = self.pick([p for p in PLACES if p.name not in used and p.name != home])
        self.env[slot] = place
        return place

    def an_item(self, slot: str = "o", gift: bool = False) -> Item:
        """An item owned by somebody; `{use}`, `{used}`, `{lost}`, `{broke}`, `{mend}` follow from it."""
        thing = self.pick([x for x in THINGS if x.gift or not gift])
        item = Item(self.rng.choice(LOOKS), thing)
        self.env[slot] = item
        if slot == "o":
            self.item = item
            self.env.update(use=thing.use, used=thing.used, broke=thing.broke, mend=thing.mend)
            self.env["lost"] = thing.lost.format(h=self.h)
        return item

    # -- words --------------------------------------------------------------------------------------------------
    def fill(self, template: str) -> str:
        text = template.format(**self.env)
        text = SENTENCE_START.sub(lambda m: m.group(1) + m.group(2).upper(), text)
        return text if self.curly else text.replace("“", '"').replace("”", '"')

    def say(self, *options: str) -> None:
        """What happens: one of `options` becomes the next sentence (or sentences)."""
        self.sentences.append(self.fill(self.rng.choice(options)))

    def more(self, *options: str, share: float = 0.6) -> None:
        """Detail: left out of brief tellings and sometimes elsewhere; nothing later may depend on it."""
        if self.rng.random() < share and not self.brief:
            self.say(*options)

    def paragraph(self) -> None:
        if not self.brief and self.sentences:
            self.breaks.append(len(self.sentences))

    def ask(self, question: str, answer: str) -> None:
        """A fact of the state. The answer is a short phrase, worded as in the story."""
        self.facts.append((self.fill(question), self.fill(answer).replace("\n", " ")))

    def open(self) -> None:
        """The first sentences: who, where, in which weather."""
        h = self.h
        lines = (
            "Once upon a time there was {h.a} named {h}.",
            "Once upon a time, {h.a} named {h} lived in {home} near {p.name}.",
            "Once upon a time there lived {h.a}. {h.His} name was {h}.",
            "There once was {h.a} called {h}.",
            "Near {p.name} there lived {h.a} named {h}.",
            "{h} was {h.a} who lived near {p.name}.",
            "{h.full} lived in {home} near {p.name}.",
            "One {w} {time}, {h.full} went to {p.name}.",
            "It was a {w} {time} in {season}. {h.full} was {p.at}.",
            "Long ago, when the {season}s were long, there was {h.a} named {h}.",
            "In a small {bare_home} near {p.name} lived {h.full}.",
            "This is the story of {h}, {h.a}.",
            "Not far from {p.name}, in a cosy {bare_home}, lived {h.a} named {h}.",
            "On a {w} day, {h.a} named {h} woke up early.",
            "Everyone near {p.name} knew {h}, {h.a}.",
        )
        self.env.update(home=a(h.kind.home), bare_home=h.kind.home)
        first = self.rng.randrange(len(lines)) if self.rng.random() < 0.5 else self.rng.randrange(3)
        self.say(lines[first])
        self.more("{h} " + h.habit + ".", "{h.He} " + h.habit + ".", share=0.4)
        self.more(
            f"{h.He} liked {h.kind.food} more than anything.",
            f"Every day {h.he} ate {h.kind.food} for breakfast.",
            f"{h.He} loved to {h.kind.skill}.",
            f"{h.He} could {h.kind.skill} better than anyone.",
            share=0.25,
        )
        if self.rng.random() < 0.35 and not self.brief:
            self.say("It was a {w} {time}.", *self.weather.lines)
        self.interlude(0.25)
        if self.weather.word in " ".join(self.sentences):
            self.facts.append(("What was the weather like?", f"{self.weather.word.capitalize()}."))
        self.facts.append(("Who is the story about?", f"{h}."))

    def outdoors(self) -> None:
        """Move the story to a place under the sky, for plots that need one."""
        self.place = self.pick([p for p in PLACES if not p.indoors and p.name != "the " + self.h.kind.home])
        self.env["p"] = self.place

    def interlude(self, share: float = 0.35) -> None:
        """A glance at the world that changes nothing."""
        self.more(*GLANCES, f"{self.place.sight} {self.place.at}.", share=share)

    def close(self, *morals: str) -> None:
        """The last sentence: a moral of the plot, or a plain ending that fits the mood."""
        happy = (
            "{h} was happy.",
            "{h} smiled all the way home.",
            "That night {h} slept very well.",
            "From that day on, {h} and {f} were the best of friends.",
            "And they all lived happily.",
            "It was the best day of the {season}.",
            "{h} could not stop smiling.",
        )
        sad = (
            "{h} was sad.",
            "{h} cried a little that night.",
            "It was a sad day for {h}.",
            "{h} went home with a heavy heart.",
            "That night {h} lay awake for a long time.",
        )
        endings = happy if self.mood == "happy" else sad
        told = " ".join(self.sentences)
        self.say(*(line for line in endings if "{f}" not in line or f"{self.f}" in told))
        if morals:
            self.more(*morals, share=0.5)
        if self.rng.random() < 0.15 and not self.brief:
            self.say("The end.")
        self.facts.append((f"How did {self.h} feel at the end?", "Happy." if self.mood == "happy" else "Sad."))
        for who in (self.h, self.f):
            if re.search(rf"\b{who.word}\b", told) and who.word not in ("girl", "boy"):
                self.facts.append((f"What is {who}?", f"{a(who.word).capitalize()}."))

    def story(self, plot: str, title: str) -> Story:
        deed = self.deed.format(**self.env)
        breaks = [i for i in self.breaks if i < len(self.sentences)]
        return Story(
            plot=plot,
            hero=self.h,
            title=self.fill(title),
            sentences=self.sentences,
            breaks=breaks,
            summary=self.fill(self.summary),
            deed=deed,
            mood=self.mood,
            facts=self.facts,
            key=(plot, *self.key),
            item=self.item,
            weather=self.weather,
            place=self.place,
            friend=self.f if self.f.name in " ".join(self.sentences) else None,
            names=list(self.used_names),
        )
