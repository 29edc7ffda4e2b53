"""Plots about finding, baking, hiding, wishing, learning and keeping a promise."""

from __future__ import annotations

from models.training.more_plots import MORE_PLOTS
from models.training.plots import PLOTS, Plot
from models.training.scenes import BAKES, SKILLS, WISHES
from models.training.teller import Story, Teller


def returned(t: Teller) -> Story:
    """Something is found; its owner is looked for, or it is kept."""
    t.an_item()
    honest = t.chance(0.75)
    t.env["spot"] = t.pick(t.place.spots)
    t.open()
    t.say("One {time} {p.at} {h} found {o.a} {spot}.", "{h} was playing {p.at} when {h.he} saw {o.a} {spot}.")
    t.more("“Whose {o.noun} may this be?” {h} wondered.", "{h} looked around. Nobody was there.", "It was lovely.")
    t.interlude()
    t.paragraph()
    if honest:
        t.say("{h} asked at every door.", "“I must find the owner,” said {h}, and asked everyone {h.he} met.")
        t.more(
            "“It is not mine,” said the baker.", "The miller shook his head.", "Nobody knew, but {h} did not give up."
        )
        t.say(
            "At last {h} came to {f.full}, who was crying. “My {o.noun}!” called {f}.",
            "Then {h} met {f.full}. “I have lost my {o.noun},” said {f} sadly. “Here it is,” said {h}.",
        )
        t.say(
            "{f} was so glad that {f.he} gave {h} a big hug.",
            "{f} thanked {h} and shared some {f.kind.food} with {h.him}.",
        )
        t.summary = "{h} found {o.a} {spot} and gave it back to {f}."
        t.ask("Whose {o.noun} was it?", "{f}'s.")
    else:
        t.mood = "sad"
        t.say("{h} put it into {h.his} pocket and told nobody.", "“Now it is mine,” said {h}, and took it home.")
        t.say(
            "Later {h.he} saw {f.full} looking for the {o.noun} with tears in {f.his} eyes.",
            "The next day {f.full} came by. “Have you seen my {o.noun}?” {f} asked. {h} said no.",
        )
        t.more("{h} could not enjoy the {o.noun} anymore.", "After that {h} could not look {f} in the eye.")
        t.summary = "{h} found {f}'s {o.bare} {spot} and kept it."
        t.ask("Whose {o.noun} was it?", "{f}'s.")
    t.deed = "found {o.a}"
    t.ask("What did {h} find?", "{o.a}.")
    t.ask("Where did {h} find the {o.noun}?", "{spot}.")
    t.ask("Did {h} give the {o.noun} back?", "Yes." if honest else "No.")
    t.close("What is found is not always ours." if honest else "Not everything we take makes us rich.")
    return t.story("returned", "The {o.noun} {p.at}")


def bake(t: Teller) -> Story:
    """Baking goes wrong by a wrong ingredient, and is saved or burnt."""
    what, wrong, right = t.pick(BAKES)
    t.env.update(what=what, bake="the " + what.split(" ", 1)[1], wrong=wrong, right=right)
    saved = t.chance(0.7)
    t.open()
    t.say("{h} wanted to bake {what} for {f.full}.", "“Today I will bake {what} for {f.full},” said {h}.")
    t.more("{h.He} put on an apron and lit the oven.", "{h} mixed flour, eggs and butter.", "The kitchen was warm.")
    t.say(
        "But {h} took {wrong} instead of {right}.",
        "{h} was in a hurry and reached for {wrong} where {right} should have been.",
    )
    t.more("Nobody noticed.", "{h} stirred and sang.", "The spoon went round and round.")
    t.interlude()
    t.paragraph()
    t.say("{f} took a bite and made a face. “There is {wrong} in it!” {f.he} said.", "“Ugh, {wrong}!” cried {f}.")
    if saved:
        t.say(
            "They looked at each other and laughed. Then they baked {bake} again, this time with {right}.",
            "“Let us try once more,” said {f}. Together they baked {bake} with {right}.",
        )
        t.say("It was delicious.", "Not a crumb was left.", "It was so good that they licked the plates.")
        t.summary = "{h} baked {what} with {wrong} by mistake, and then again with {right} together with {f}."
    else:
        t.mood = "sad"
        t.say(
            "{bake} went to the birds, and there was no time for another.",
            "{h} threw {bake} away and sat down in the flour.",
        )
        t.summary = "{h} baked {what} for {f} with {wrong} by mistake, and it was spoiled."
    t.deed = "baked {what}"
    t.ask("What did {h} bake?", "{what}.")
    t.ask("What did {h} take by mistake?", "{wrong}.")
    t.ask("For whom did {h} bake?", "for {f}.")
    t.close("Mistakes can taste sweet, the second time." if saved else "Haste is a poor cook.")
    return t.story("bake", "How {h} baked {what}")


def hide(t: Teller) -> Story:
    """Hide and seek with two friends."""
    t.someone("g")
    t.env["spot"] = t.pick(t.place.spots)
    t.env["other"] = t.pick([s for s in t.place.spots if s != t.env["spot"]])
    t.open()
    t.say(
        "{h}, {f.full} and {g.full} played hide and seek {p.at}.",
        "{p.at} {h} met {f.full} and {g.full} to play hide and seek.",
    )
    t.say("{h} closed {h.his} eyes and counted to ten.", "“One, two, three,” counted {h}, up to ten.")
    t.more("“Ready or not, here I come!” {h} called.", "It became very quiet.", "Somebody giggled.")
    t.say("{h} found {f} {spot}.", "First {h} looked {spot}, and there was {f}.")
    t.interlude()
    t.paragraph()
    t.say("But where was {g}? {h} and {f} looked everywhere.", "But {g} was nowhere to be seen.")
    t.more("“{g}, come out!” they called.", "They began to worry.", "The sun went down.")
    t.say("At last they found {g} {other}, fast asleep.", "Then they heard a snore. {g} was sleeping {other}.")
    t.more("“Did I win?” asked {g}.", "{g} yawned and rubbed {g.his} eyes.", "They laughed until their bellies hurt.")
    t.summary = "{h} played hide and seek, found {f} {spot} and {g} asleep {other}."
    t.deed = "played hide and seek"
    t.ask("Where was {f} hiding?", "{spot}.")
    t.ask("Where was {g}?", "{other}.")
    t.ask("Who fell asleep?", "{g}.")
    t.close("Who hides too well may miss the fun.")
    return t.story("hide", "Hide and seek")


def wish(t: Teller) -> Story:
    """A wish on a star is granted and turns out a burden, or is used for somebody else."""
    want, trouble = t.pick(WISHES)
    unselfish = t.chance(0.5)
    t.env.update(want=want, trouble=trouble)
    t.open()
    t.say(
        "One night {h} saw a falling star. “You have one wish,” said the star.",
        "A falling star landed {p.at}. “Make a wish,” it said to {h}.",
    )
    t.more("{h} thought for a long time.", "The star glowed like a lantern.", "{h} could hardly believe {h.his} ears.")
    if unselfish:
        t.say(
            "{h} thought of {f.full}, who was ill. “I wish that {f} gets well,” {h.he} said.",
            "“My friend {f.full} is ill,” said {h}. “Please make {f.him} well.”",
        )
        t.interlude()
        t.paragraph()
        t.say("The next morning {f} stood at the door, fresh and well.", "And in the morning {f} jumped out of bed.")
        t.more(
            "“What happened?” asked {f}. {h} only smiled.", "{h} never told the secret.", "The star winked in the sky."
        )
        t.summary = "{h} had one wish and used it to make {f} well."
        t.ask("Who was ill?", "{f}.")
    else:
        t.say("“I wish {want},” said {h}.", "{h} wished {want}.")
        t.interlude()
        t.paragraph()
        t.say("The wish came true, but {trouble}.", "And so it happened. But soon {trouble}.")
        t.say(
            "“Please, star, take it back,” cried {h}. And the star was kind.",
            "{h} called the star again. “I was happier before,” {h.he} said, and the star took the wish back.",
        )
        t.summary = "{h} wished {want}, but {trouble}, so the star took it back."
        t.ask("What did {h} wish?", "{want}.")
    t.deed = "met a falling star"
    t.ask("Who gave {h} a wish?", "a star.")
    t.close("A wish for a friend is never wasted." if unselfish else "Be careful what you wish for.")
    return t.story("wish", "The falling star")


def lesson(t: Teller) -> Story:
    """Somebody wants to learn a skill from a friend; practice makes it."""
    skill, first, done = t.pick(SKILLS)
    t.env.update(skill=skill, first=first, done=done)
    learns = t.chance(0.85)
    t.open()
    t.say(
        "{h} wanted to learn to {skill}, so {h.he} went to {f.full}.",
        "“Can you teach me to {skill}?” {h} asked {f.full}.",
    )
    t.more("“Gladly,” said {f}.", "“It takes time,” said {f}.", "{f} was the best teacher for that.")
    t.say("On the first day {h} {first}.", "At the first try {h} {first}.")
    t.more("{f} did not laugh.", "“That is how I began,” said {f}.", "{h} turned red.")
    t.interlude()
    t.paragraph()
    if learns:
        t.say("{h} practised every {time}, for one week and then another.", "Day after day {h} tried again {p.at}.")
        t.say("And one day {h} {done}.", "At last {h} {done}, and {f} clapped.")
        t.summary = "{f} taught {h} to {skill}, and after much practice {h.he} {done}."
    else:
        t.mood = "sad"
        t.say("“I will never learn it,” said {h}, and gave up.", "{h} stamped {h.his} foot and walked away.")
        t.more("{f} waited the next day, but nobody came.", "{f} looked after {h.him} and sighed.")
        t.summary = "{h} wanted to learn to {skill} but gave up."
    t.deed = "wanted to learn to {skill}"
    t.ask("What did {h} want to learn?", "to {skill}.")
    t.ask("Who was the teacher?", "{f}.")
    t.ask("Did {h} learn it?", "Yes." if learns else "No.")
    t.close("Practice makes perfect." if learns else "Who gives up too soon will never know.")
    return t.story("lesson", "{h} wants to {skill}")


ALL_PLOTS: dict[str, Plot] = (
    PLOTS | MORE_PLOTS | {"returned": returned, "bake": bake, "hide": hide, "wish": wish, "lesson": lesson}
)
