"""Plots about things: lost, broken, earned, given, traded, borrowed, hidden.

Each function tells one story through a `Teller`: state first, then words. The dictionary `PLOTS` names them.
"""

from __future__ import annotations

from collections.abc import Callable

from models.training.scenes import FOODS, FRUITS, JOBS, past
from models.training.teller import Story, Teller

Plot = Callable[[Teller], Story]


def lost(t: Teller) -> Story:
    """Something is lost, looked for and found, or not."""
    item = t.an_item()
    found = t.chance(0.75)
    helped = t.chance(0.6)
    t.env["spot"] = t.pick(t.place.spots)
    t.env["wrong"] = t.rng.choice([s for s in t.place.spots if s != t.env["spot"]])
    t.open()
    t.say("{h} had {o.a}.", "{h.He} owned {o.a}, and {h.he} loved it.", "{h}'s dearest thing was {o.a}.")
    t.more(
        "Every day {h.he} {used}.", "{h} {used} whenever {h.he} could.", "It was a present from {h.his} grandmother."
    )
    t.say(
        "One day, {p.at}, {lost}.",
        "But one {time} {h} went to {p.name}, and there {lost}.",
        "Then something bad happened {p.at}: {lost}.",
    )
    t.more("“Oh no, where is my {o.noun}?” cried {h}.", "“My {o.noun} is gone!” said {h}.", "{h} could not believe it.")
    t.interlude()
    t.paragraph()
    t.say(
        "{h} looked {wrong}, but the {o.noun} was not there.",
        "First {h.he} looked {wrong}. There was no {o.noun}.",
        "{h} searched {wrong} and found only dust.",
    )
    if helped:
        t.say(
            "Then {h} met {f.full}. “What is wrong?” asked {f}.",
            "{f}, {f.a}, came by and asked, “Why do you look so worried?”",
            "A friend came along. It was {f.full}.",
        )
        t.more("“I lost my {o.noun},” said {h}.", "“I cannot find my {o.noun},” {h} answered.", share=0.7)
        t.more("“Let us look together,” said {f}.", "“Two can see more than one,” said {f}.", "“I will help you.”")
    if found:
        finder = "{f}" if helped else "{h}"
        t.say(
            f"At last {finder} looked {{spot}}, and there was {{o}}.",
            f"{finder} looked {{spot}}. There it was!",
            f"Then {finder} saw something {t.item.look if t.item else ''} {{spot}}. It was the {{o.noun}}!",
        )
        t.more("“Thank you, {f}!” said {h}." if helped else "“There you are!” said {h}.", "{h} jumped for joy.")
        t.more("{h} held the {o.noun} tight.", "{h} could {use} again.", "{h.He} {used} until it was dark.")
        t.ask("Where was the {o.noun}?", "{spot}.")
        t.ask("Who found the {o.noun}?", f"{finder}.")
        t.summary = "{h} lost {h.his} {o.bare} and found it {spot}."
        if helped:
            t.summary = "{h} lost {h.his} {o.bare}, and {f} found it {spot}."
    else:
        t.mood = "sad"
        t.say(
            "They looked until the sun went down, but they did not find it."
            if helped
            else "{h} looked until the sun went down, but {h.he} did not find it.",
            "It got dark, and the {o.noun} was still gone.",
            "The {o.noun} was nowhere to be found.",
        )
        t.more("{h} never saw {h.his} {o.noun} again.", "{h} missed {h.his} {o.noun} very much.")
        t.summary = "{h} lost {h.his} {o.bare} and never found it."
    t.deed = f"lost {{h.his}} {item.noun}"
    t.ask("What did {h} lose?", "{o.a}.")
    t.ask("What did the {o.noun} look like?", "{o.look}.")
    if helped:
        t.ask("Who helped {h}?", "{f}.")
    t.close(*(["After that, {h} took better care of {h.his} {o.noun}."] if found else []))
    return t.story("lost", "{h} and the {o.bare}")


def broken(t: Teller) -> Story:
    """A friend's thing breaks; the truth is told or hidden; it is mended or not."""
    t.an_item()
    honest = t.chance(0.7)
    mended = honest and t.chance(0.85)
    t.open()
    t.say("{h}'s friend {f}, {f.a}, had {o.a}.", "{h} had a friend, {f.full}, who owned {o.a}.")
    t.more("{f} {used} every day.", "It was the finest {o.noun} in the village.")
    t.say(
        "One {time} {f} lent it to {h}. “Please be careful,” said {f}.",
        "“May I borrow it?” asked {h}. “Yes,” said {f}, and gave the {o.noun} to {h}.",
    )
    t.say(
        "But {p.at} {h} tripped, and the {o.noun} {broke}.", "{h} ran {p.along}, fell down, and the {o.noun} {broke}."
    )
    t.more("{h}'s heart sank.", "“Oh dear,” whispered {h}.", "{h.He} looked at it and felt terrible.")
    t.interlude()
    t.paragraph()
    if honest:
        t.say(
            "{h} went to {f} and told the truth. “I am sorry,” {h.he} said.",
            "“I must tell you something,” said {h}. “Your {o.noun} {broke}. I am so sorry.”",
        )
        t.more("{f} was quiet for a moment.", "{f} sighed.", "“Thank you for telling me,” said {f}.")
    else:
        t.say("{h} was afraid and hid the {o.noun} {p.at}.", "{h} told nobody and hid the {o.noun} in a box.")
        t.more("All night {h.he} could not sleep.", "{h} had a bad feeling in {h.his} belly.")
    if mended:
        t.say(
            "Together they took {mend} and mended the {o.noun}.",
            "“We can mend it,” said {f}. They used {mend}, and soon the {o.noun} was as good as new.",
        )
        t.more("“Now it is even better than before,” laughed {f}.", "{f} tried it out, and it worked.")
        t.summary = "{h} broke {f}'s {o.bare}, told the truth, and they mended it together."
        t.ask("What did they use to mend the {o.noun}?", "{mend}.")
    elif honest:
        t.mood = "sad"
        t.say("They tried to mend the {o.noun} with {mend}, but it did not hold.", "The {o.noun} could not be mended.")
        t.more("{f} kept the pieces in a drawer.", "{f} put the {o.noun} away and said no more.")
        t.summary = "{h} broke {f}'s {o.bare} and told the truth, but it could not be mended."
    else:
        t.mood = "sad"
        t.say("When {f} found out, {f.he} did not want to play with {h} anymore.", "{f} found it and walked away.")
        t.summary = "{h} broke {f}'s {o.bare} and hid it, and {f} was hurt."
    t.deed = "broke a friend's {o.noun}"
    t.ask("Whose {o.noun} was it?", "{f}'s.")
    t.ask("What did {h} break?", "{f}'s {o.bare}.")
    t.ask("Did {h} tell the truth?", "Yes." if honest else "No.")
    t.close("An honest word mends more than glue." if honest else "A lie is heavier than a stone.")
    return t.story("broken", "The broken {o.noun}")


def earned(t: Teller) -> Story:
    """Something costs a few coins; the hero works for them."""
    t.an_item(gift=True)
    first, second = t.pick((2, 3, 4, 5)), t.pick((1, 2, 3, 4))
    t.env.update(one=first, two=second, price=first + second)
    jobs = t.rng.sample(JOBS, 2)
    t.key += jobs
    t.env.update(job=jobs[0], job2=jobs[1], did=past(jobs[0]), did2=past(jobs[1]))
    t.elder()
    t.open()
    t.say(
        "{h} wanted to have {o.a} from the shop. It cost {price} coins, but {h.he} had none.",
        "In a shop window {h} saw {o.a}. “It costs {price} coins,” said the shopkeeper. {h} had no coins.",
    )
    t.more("“Then I will work for it,” said {h}.", "{h} had an idea.", "{h} did not give up.")
    t.say(
        "First {h.he} {did} for {e}, who gave {h.him} {one} coins.",
        "{e} needed help. {h} {did} and got {one} coins.",
    )
    t.more("It was hard work, but {h} did not mind.", "{h.He} counted the coins twice.", "“Well done,” said {e}.")
    t.say(
        "Then {h} {did2} for {f.full} and got {two} more.",
        "After that {h.he} {did2} for {f.full}, who gave {h.him} {two} coins.",
    )
    t.say("Now {h} had {price} coins.", "{one} and {two} make {price}. That was enough!")
    t.interlude()
    t.paragraph()
    t.say(
        "{h} ran to the shop and bought {o}.",
        "“Here are {price} coins,” said {h}, and the shopkeeper gave {h.him} {o}.",
    )
    t.more("{h} {used} all the way home.", "At home {h.he} {used} at once.", "“I earned it myself,” said {h} proudly.")
    t.summary = "{h} worked for {price} coins and bought {o.a}."
    t.deed = "worked to buy {o.a}"
    t.ask("What did {h} buy?", "{o.a}.")
    t.ask("How many coins did the {o.noun} cost?", "{price}.")
    t.ask("How many coins did {f} give to {h}?", "{two}.")
    t.ask("Who gave {h} {one} coins first?", "{e}.")
    t.close("What we earn ourselves is twice as sweet.", "Work makes a wish come true.")
    return t.story("earned", "{price} coins")


def gift(t: Teller) -> Story:
    """A birthday present goes wrong on the way and is loved all the same, or comes too late."""
    t.an_item(gift=True)
    mishap = t.pick(("rain", "fall", "none"))
    t.open()
    t.say("Tomorrow was the birthday of {f.full}.", "{h}'s friend {f}, {f.a}, had a birthday soon.")
    t.say(
        "{h} made {o.a} for {f.him}.",
        "“I will give {f.him} {o.a},” said {h}, and worked on it all {time}.",
        "{h} saved up and got {o.a} for {f}.",
    )
    t.more("{h.He} wrapped it in paper with stars.", "{h} tied a ribbon around it.", "It took {h.him} all night.")
    if mishap == "rain":
        t.say(
            "But on the way it began to rain, and the paper got wet.", "Rain fell on the present and spoiled the paper."
        )
    elif mishap == "fall":
        t.say("But {p.at} {h} tripped, and the {o.noun} {broke} a little.", "{h} stumbled, and the {o.noun} {broke}.")
    else:
        t.say("{h} carried the present {p.along}, step by step.", "{h} hid the present behind {h.his} back.")
    if mishap != "none":
        t.more("“It is ruined!” cried {h}.", "{h} wanted to turn back.", "A tear ran down {h.his} nose.")
    t.interlude()
    t.paragraph()
    t.say("At the party {h} gave it to {f}.", "{h} knocked on the door and gave the present to {f}.")
    t.more("“Happy birthday!” said {h}.", "“It is only a small thing,” said {h}.", "Everyone was watching.", share=0.7)
    t.say(
        "{f} smiled. “You made me very happy,” {f.he} said.",
        "“It is the best present of all,” said {f}, and hugged {h}.",
        "{f} laughed with joy and {used} at once." if mishap != "fall" else "“We will mend it together,” laughed {f}.",
    )
    t.more("Then they ate cake with cream.", "They danced until midnight.", "The cake had seven candles.")
    t.summary = "{h} gave {f} {o.a} for {f.his} birthday."
    t.deed = "gave a friend {o.a}"
    t.ask("Whose birthday was it?", "{f}'s.")
    t.ask("What did {f} get?", "{o.a}.")
    t.ask("Who gave the present?", "{h}.")
    t.close("A gift from the heart is never too small.")
    return t.story("gift", "A present for {f}")


def trade(t: Teller) -> Story:
    """A chain of swaps: from one thing to another, to the one that was wanted."""
    t.an_item(gift=True)
    t.an_item("o2", gift=True)
    t.env["food"] = t.pick(FOODS)
    t.env["itsfood"] = "the " + str(t.env["food"]).split(" ", 1)[1]
    t.someone("g")
    good = t.chance(0.8)
    t.open()
    t.say("{h} had only {food}, but {h.he} wished for {o.a}.", "{h} dreamed of {o.a}, but all {h.he} had was {food}.")
    t.more("“Perhaps I can trade,” {h.he} thought.", "{h} took it and set out.", "So {h.he} went {p.along}.")
    t.say(
        "{p.at} {h} met {f.full}, who was hungry. {f} gave {h.him} {o2.a} for {itsfood}.",
        "{f.full} saw {itsfood} and said, “I will give you {o2.a} for it.” {h} agreed.",
    )
    t.more("{f} ate every crumb.", "“That was a good trade,” said {f}.", "{f} waved goodbye.")
    t.interlude()
    t.paragraph()
    if good:
        t.say(
            "Next {h} met {g.full}, who had {o.a}. {g} needed a {o2.noun}, so they traded.",
            "Then {g.full} came by with {o.a}. “I would love that {o2.noun},” said {g}. So they traded.",
        )
        t.say("Now {h} had {o}.", "At last {o} belonged to {h}.")
        t.more("{h} {used} right away.", "“From {food} to {o.a}!” laughed {h}.")
        t.summary = "{h} traded {food} for {o2.a}, and {o2} for {o.a}."
        t.ask("Who gave {h} {o}?", "{g}.")
    else:
        t.mood = "sad"
        t.say(
            "Next {h} met {g.full}, who had {o.a}. But {g} did not want a {o2.noun} and walked on.",
            "{g.full} had {o.a}, but {g} shook {g.his} head. “I do not need a {o2.noun},” {g.he} said.",
        )
        t.more("Now {h} was hungry too.", "{h} looked at {o2} and sighed.")
        t.summary = "{h} traded {food} for {o2.a} but did not get {o.a}."
    t.deed = "wanted to trade {food} for {o.a}"
    t.ask("What did {h} have at first?", "{food}.")
    t.ask("What did {f} give to {h}?", "{o2.a}.")
    t.ask("Did {h} get {o}?", "Yes." if good else "No.")
    t.close()
    return t.story("trade", "The trade")


def share(t: Teller) -> Story:
    """Food is shared or kept; what follows depends on it."""
    t.env["food"] = t.pick(FOODS)
    t.env["itsfood"] = "the " + str(t.env["food"]).split(" ", 1)[1]
    shares = t.chance(0.7)
    trouble, rescue = t.pick(
        (
            ("fell into a ditch", "pulled {h.him} out"),
            ("lost the way", "showed {h.him} the way home"),
            ("got a thorn in {h.his} foot", "pulled out the thorn"),
            ("got caught in the rain", "held a big leaf over {h.him}"),
            ("could not open the heavy gate", "pushed it open for {h.him}"),
        )
    )
    t.env.update(trouble=trouble.format(**t.env), rescue=rescue.format(**t.env))
    t.open()
    t.say("{h} had {food} for lunch.", "One {time} {h} sat down {p.at} to eat {food}.")
    t.say(
        "Then {f.full} came by. “I am so hungry,” said {f}.",
        "{f}, {f.a}, looked at {itsfood}. “May I have a bite?” {f.he} asked.",
    )
    t.interlude()
    t.paragraph()
    if shares:
        t.say("{h} gave half of it to {f}.", "“Of course,” said {h}, and they shared {itsfood}.")
        t.more("They ate and talked about the {season}.", "“You are kind,” said {f}.", "It tasted better together.")
        t.say("Later {h} {trouble}, and {f} came and {rescue}.", "On the way home {h} {trouble}. But {f} {rescue}.")
        t.more("“You helped me, so I help you,” said {f}.", "“Thank you!” said {h}.")
        t.summary = "{h} shared {food} with {f}, and later {f} helped {h.him}."
    else:
        t.mood = "sad"
        t.say("“No, it is mine,” said {h}, and ate it alone.", "{h} shook {h.his} head and ate all of it.")
        t.more("{f} walked away slowly.", "{f} said nothing and left.")
        t.say("Later {h} {trouble}, and nobody came to help.", "On the way home {h} {trouble}, but no friend was near.")
        t.more("“I should have shared,” thought {h}.", "Now {h} was sorry.")
        t.summary = "{h} did not share {food} with {f}, and later nobody helped {h.him}."
    t.deed = "shared {food} with a friend" if shares else "did not want to share {food}"
    t.ask("What did {h} have to eat?", "{food}.")
    t.ask("Who was hungry?", "{f}.")
    t.ask("Did {h} share?", "Yes." if shares else "No.")
    t.close("Who shares has more." if shares else "Who keeps everything may end with nothing.")
    return t.story("share", "{h} and {f}")


def counted(t: Teller) -> Story:
    """A basket is filled, some is given away, the rest is counted."""
    got, gave = t.pick((5, 6, 7, 8, 9, 10)), t.pick((1, 2, 3, 4))
    fruit = t.pick(FRUITS)
    t.env.update(n=got, k=gave, left=got - gave, fruit=fruit)
    more_than_one = got - gave > 1
    t.open()
    t.say("{h} went to {p.name} and found {n} {fruit}.", "{p.at} {h} gathered {n} {fruit} in a basket.")
    t.more("{h.He} counted them one by one.", "“So many!” said {h}.", "The basket was heavy.")
    t.say(
        "On the way {h.he} met {f.full} and gave {f.him} {k} of them.",
        "{f.full} had none, so {h} gave {f.him} {k}.",
    )
    t.more("“You are a true friend,” said {f}.", "{f} thanked {h.him} and made a bow.")
    t.say(
        "Now {h} had {left} {fruit}." if more_than_one else "Now {h} had only {left}.",
        "{left} were left." if more_than_one else "Only {left} was left.",
    )
    t.interlude()
    t.paragraph()
    t.say(
        "That was enough for everyone at home.",
        "{h} put them on the table and called the family.",
        "“Good enough,” said {h}.",
    )
    t.more("Grandmother made a big pot of tea.", "They told stories until bedtime.", "The little ones clapped.")
    t.summary = "{h} found {n} {fruit}, gave {k} to {f} and kept {left}."
    t.deed = f"found some {fruit}"
    t.ask("How many {fruit} did {h} find?", "{n}.")
    t.ask("How many {fruit} did {h} have in the end?", "{left}.")
    t.ask("Who got {k} {fruit} from {h}?", "{f}.")
    t.close()
    return t.story("counted", f"The {fruit}")


PLOTS: dict[str, Plot] = {
    "lost": lost,
    "broken": broken,
    "earned": earned,
    "gift": gift,
    "trade": trade,
    "share": share,
    "counted": counted,
}
