"""The corpus: the same everywhere, apart between splits, and true to its own facts."""

from __future__ import annotations

import random
import re

import pytest

from models.training.corpus import document, documents, heldout_tasks, is_heldout
from models.training.late_plots import ALL_PLOTS
from models.training.lumi import BACK, LEXICON, arithmetic, to_english, to_lumi, translation
from models.training.tasks import ASSISTANT, BEGIN, END, END_OF_TEXT, SHOTS, TASKS, USER, task
from models.training.teller import Story, Teller

SEEDS = range(40)


def stories(plot: str, brief: bool = False) -> list[Story]:
    return [ALL_PLOTS[plot](Teller(random.Random(f"{plot}/{seed}"), brief)) for seed in SEEDS]


def words(text: str) -> str:
    return text.replace("“", '"').replace("”", '"').lower()


def test_documents_are_a_function_of_seed_split_and_index() -> None:
    first = [document(1, "train", i) for i in range(30)]
    assert first == [document(1, "train", i) for i in range(30)]
    assert first[7] == next(documents(1, "train", 1, start=7))
    assert first != [document(2, "train", i) for i in range(30)]


def test_the_splits_share_no_document_and_no_skeleton() -> None:
    train = [*documents(1, "train", 1500), *documents(1, "tune", 500)]
    heldout = list(documents(1, "heldout", 150))
    assert not {d.text for d in train} & {d.text for d in heldout}
    assert not any(is_heldout(key) for d in train for key in d.keys)
    assert all(is_heldout(key) for d in heldout for key in d.keys)
    assert all(d.keys for d in heldout), "a document without a key belongs to no split"


@pytest.mark.parametrize("plot", ALL_PLOTS)
@pytest.mark.parametrize("brief", [False, True])
def test_a_story_is_true_to_its_state(plot: str, brief: bool) -> None:
    for story in stories(plot, brief):
        text = words(story.text)
        hero = story.hero.name
        assert hero.lower() in text
        assert hero in story.summary
        assert story.mood in ("happy", "sad")
        assert "{" not in story.text
        assert not re.search(r"\ba [aeio][a-z]", text), story.text
        # Whoever the summary names, the story introduces.
        for name in story.names:
            if re.search(rf"\b{name}\b", story.summary):
                assert name.lower() in text, (story.text, story.summary)


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_questions_are_answered_by_the_story(plot: str) -> None:
    """Each answer is in the text (its last word at least), or yes, no or the mood, which follow from the events."""
    for story in stories(plot):
        text = words(story.text)
        for question, answer in story.facts:
            if answer in ("Yes.", "No.", "Happy.", "Sad."):
                continue
            if question.startswith("What was the weather"):
                assert answer.lower().rstrip(".") in text
                continue
            last = re.sub(r"'s$", "", words(answer).rstrip(".").split()[-1])
            assert last in text, (question, answer, story.text)


@pytest.mark.parametrize("plot", ALL_PLOTS)
def test_the_hero_keeps_one_pronoun(plot: str) -> None:
    """In stories with no second character there is no pronoun but the hero's."""
    for story in stories(plot):
        if story.friend is None and len(story.names) == 2:
            other = {"she": ("he", "him", "his"), "he": ("she", "her", "hers")}[story.hero.he]
            spoken = re.sub(r'"[^"]*"', "", words(story.text))
            assert not re.search(rf"\b({'|'.join(other)})\b", spoken.replace("old woman", "")), story.text


def test_there_are_many_plots_and_words() -> None:
    assert len(ALL_PLOTS) >= 12
    seen: set[str] = set()
    for plot in ALL_PLOTS:
        for story in stories(plot):
            seen |= set(re.findall(r"[^\W\d_]+", story.text.lower()))
    assert len(seen) > 1000  # the whole corpus knows more: this is a sample of a few hundred stories


def test_lumi_translates_word_for_word_and_back() -> None:
    assert len(BACK) == len(LEXICON), "two English words share a translation"
    rng = random.Random(3)
    for _ in range(300):
        prompt, answer, key = translation(rng)
        assert answer in (to_lumi(key[1]), key[1])
        assert to_english(to_lumi(key[1])) == key[1]
        assert prompt
    assert to_lumi("the red fox sleeps") == "la roto vika somna"


def test_sums_are_right() -> None:
    rng = random.Random(4)
    for _ in range(300):
        prompt, answer, (_, sign, x, y) = arithmetic(rng)
        assert int(answer) == (int(x) - int(y) if sign == "-" else int(x) + int(y))
        assert {x, y} <= set(re.findall(r"\d+", prompt))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("shots", SHOTS)
def test_tasks_come_in_every_form(name: str, shots: str) -> None:
    for chat in (True, False):
        made = task(random.Random(5), name, SHOTS[shots], lambda key: True, chat)
        text = "".join(piece for piece, _ in made.pieces())
        assert len(made.shots) == SHOTS[shots]
        if chat:
            assert text.endswith(ASSISTANT + made.answer + END)
            assert USER in text
        else:
            assert text.endswith(f"A: {made.answer}{END_OF_TEXT}")
        assert text.startswith(made.question())
    assert all(is_heldout(key) for made in heldout_tasks(1, name, shots, 2) for key in made.keys)


def test_every_document_begins_and_ends() -> None:
    for split in ("train", "tune", "heldout"):
        for doc in documents(3, split, 50):
            assert doc.text.startswith(BEGIN)
            assert doc.text.endswith((END, END_OF_TEXT))
