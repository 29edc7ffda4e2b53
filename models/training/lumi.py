"""Lumi, the small second language of the tales, and small sums: tasks with one right answer.

Lumi is English word for word: each word has one translation, and the order stays.
"""

from __future__ import annotations

import random

from models.training.scenes import FRUITS
from models.training.world import HE, SHE

NOUNS = dict(
    pair.split("=")
    for pair in (
        "fox=vika rabbit=lopo bear=bruma mouse=piki owl=huru hedgehog=spino squirrel=tiksa frog=kvako duck=natta "
        "badger=graso otter=lutri cat=miau dog=vuffa turtle=testu deer=elano goat=bika pig=ronko hen=klukka "
        "crow=korvu "
        "mole=talpa wolf=lupé lamb=belo donkey=asso goose=gansa beaver=kastu snail=limak lion=leono elephant=fanto "
        "monkey=simo penguin=pingu dragon=drako robot=botto bee=zuma pony=ponka girl=nilla boy=nillo king=reko "
        "river=aqelo forest=silvu hill=monto pond=lagi house=domo door=porta garden=jardé tree=arbo "
        "flower=florö sun=solé "
        "moon=lunö star=stelo rain=pluvi snow=nevo wind=vento sea=maré boat=navi kite=flugo ball=bolo book=libru "
        "hat=kapo bell=dingo lantern=lumé bread=pano apple=pomo honey=mielu soup=supi friend=amiko "
        "night=noktu day=diré "
        "song=kanto road=vojo bridge=ponté key=klavo stone=petru cake=torté"
    ).split()
)
ADJECTIVES = dict(
    pair.split("=")
    for pair in (
        "red=roto blue=azuri green=verdo yellow=jala white=blanko black=nigru golden=oré little=eti "
        "big=grando old=anto "
        "new=novu kind=bonu happy=ridé sad=plora brave=kora quiet=silo warm=varmo cold=frido clever=sagi sleepy=dorma"
    ).split()
)
VERBS = dict(
    pair.split("=")
    for pair in (
        "sleeps=somna runs=kurri sings=kantas jumps=salta swims=nada eats=manja laughs=hahö waits=atta comes=venna "
        "goes=irra flies=flugas falls=tomba dances=dansé shines=brila smiles=sorri"
    ).split()
)
SMALL = {"the": "la", "and": "ko", "in": "en", "under": "sub", "with": "kun", "my": "mi", "we": "nos", "love": "amas"}
LEXICON = NOUNS | ADJECTIVES | VERBS | SMALL
BACK = {lumi: english for english, lumi in LEXICON.items()}


def to_lumi(phrase: str) -> str:
    """Word for word. Raises KeyError for a word outside the lexicon."""
    return " ".join(LEXICON[word] for word in phrase.split())


def to_english(phrase: str) -> str:
    return " ".join(BACK[word] for word in phrase.split())


def phrase(rng: random.Random) -> str:
    """One to six English words that Lumi can say."""
    noun, other = rng.sample(list(NOUNS), 2)
    look, look2 = rng.sample(list(ADJECTIVES), 2)
    verb = rng.choice(list(VERBS))
    forms = (
        f"the {look} {noun} {verb}",
        f"the {noun} {verb}",
        f"the {look} {noun}",
        f"the {noun} and the {other}",
        f"the {look} {noun} and the {look2} {other}",
        f"the {noun} {verb} in the {other}",
        f"the {look} {noun} {verb} with the {other}",
        f"we love the {look} {noun}",
        f"my {look} {noun} {verb}",
        f"my {noun} {verb} under the {other}",
        f"{look} {noun}",
    )
    return rng.choice(forms)


def translation(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """A prompt, its answer, and the key by which the splits keep apart."""
    english = phrase(rng)
    if rng.random() < 0.15:
        english = rng.choice([w for w in english.split() if w not in SMALL])
    key = ("lumi", english)
    if rng.random() < 0.25:
        form = rng.choice(("Translate from Lumi into English: {}", "What does “{}” mean in English?"))
        return form.format(to_lumi(english)), english, key
    form = rng.choice(
        ("Translate into Lumi: {}", "Say in Lumi: {}", "How do you say “{}” in Lumi?", "Translate “{}” into Lumi.")
    )
    return form.format(english), to_lumi(english), key


def arithmetic(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """A sum or difference of numbers up to 20, bare or as a little problem."""
    x, y = rng.randint(0, 20), rng.randint(0, 20)
    minus = rng.random() < 0.4
    if minus and x < y:
        x, y = y, x
    answer = x - y if minus else x + y
    # Both orders of an addition fall into one split, or the held-out answer would have been seen.
    key = ("sum", "-" if minus else "+", str(max(x, y)), str(min(x, y)))
    if rng.random() < 0.6 or min(x, y) < 2:
        sign = "-" if minus else "+"
        word = "minus" if minus else "plus"
        form = rng.choice(("What is {x} {sign} {y}?", "{x} {sign} {y} =", "How much is {x} {word} {y}?"))
        return form.format(x=x, y=y, sign=sign, word=word), str(answer), key
    name, other = rng.sample(SHE + HE, 2)
    fruit = rng.choice(FRUITS)
    form = rng.choice(
        (
            "{name} has {x} {fruit} and gives {y} to {other}. How many {fruit} are left?",
            "There were {x} {fruit}. {name} took {y} of them. How many are there now?",
        )
        if minus
        else (
            "{name} has {x} {fruit} and finds {y} more. How many {fruit} is that?",
            "{name} has {x} {fruit} and {other} has {y}. How many do they have together?",
        )
    )
    return form.format(name=name, other=other, fruit=fruit, x=x, y=y), str(answer), key
