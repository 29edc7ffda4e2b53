"""Plots about deeds and days: fear, rescue, races, seeds, storms, newcomers, goodbyes, lies, illness, ways home."""

from __future__ import annotations

from models.training.plots import Plot
from models.training.scenes import BUILDS, CROPS, FEARS, FOODS, NOISES, SIGNS, TRAPS
from models.training.teller import Story, Teller


def afraid(t: Teller) -> Story:
    """Somebody is afraid, learns a way, and dares, or does not yet."""
    fear, todo, did, way = t.pick(FEARS)
    dares = t.chance(0.85)
    t.env.update(fear=fear, todo=todo, did=did, way=way)
    t.open()
    t.say("But {h} was afraid of {fear}.", "There was one problem: {h} was afraid of {fear}.")
    t.more("When the others played, {h} stayed behind.", "{h.His} knees shook at the thought of it.", "Nobody knew it.")
    t.say(
        "One day {h.his} friend {f} said, “Come, let us {todo}.” {h} shook {h.his} head.",
        "“Will you {todo} with me?” asked {f.full}. “I cannot,” whispered {h}.",
    )
    t.say(
        "“I was afraid too,” said {f}. “I {way}.”",
        "{f} smiled. “Do you know what I did? I {way}.”",
    )
    t.interlude()
    t.paragraph()
    if dares:
        t.say("So {h} {way}, too.", "The next {time} {h} tried it. {h.He} {way}.")
        t.say("And then {h} {did}!", "Step by step, {h} {did}.", "{h} {did}, and {f} cheered.")
        t.more(
            "“You did it!” cried {f}.", "“It was not so bad,” said {h}.", "{h.His} heart beat fast, but {h.he} laughed."
        )
        t.summary = "{h} was afraid of {fear}, but with the help of {f} {h.he} {did}."
    else:
        t.mood = "sad"
        t.say("{h} tried, but {h.his} legs would not move.", "{h} took one step and ran back home.")
        t.more("“Maybe another day,” said {f}.", "{f} went alone.")
        t.summary = "{h} was afraid of {fear} and did not dare to {todo}."
    t.deed = "was afraid of {fear}"
    t.ask("What was {h} afraid of?", "{fear}.")
    t.ask("Who was a friend of {h}?", "{f}.")
    t.ask("Did {h} dare to {todo}?", "Yes." if dares else "No.")
    t.close(*(["To be brave is to be afraid and go on."] if dares else []))
    return t.story("afraid", "{h} is afraid")


def rescue(t: Teller) -> Story:
    """Somebody is stuck; a tool and a friend get them out."""
    trap, tool, act = t.pick(TRAPS)
    t.env.update(trap=trap, tool=tool, act=act)
    t.someone("g")
    t.outdoors()
    t.open()
    t.say("One {time} {h} heard a cry {p.at}.", "As {h} walked {p.along}, somebody called, “Help! Help!”")
    t.say("It was {f.full}, stuck in {trap}.", "There was {f}, {f.a}, stuck in {trap}.")
    t.more(
        "“I cannot get out,” said {f}.", "{f} was cold and tired.", "“Do not worry,” said {h}. “I will get you out.”"
    )
    t.more("{h} pulled and pulled, but {f} did not move.", "{h} was not strong enough alone.")
    t.interlude()
    t.paragraph()
    t.say("{h} ran to {g.full} and asked for {tool}.", "So {h} fetched {g.full}, who had {tool}.")
    t.say("Together they {act}, and {f} was free.", "They {act}. At last {f} came out.")
    t.more("“You saved me!” said {f}.", "{f} hugged them both.", "{f} shook off the dirt and laughed.")
    t.more("Then they all had {f.kind.food} for supper.", "They brought {f} home and made hot tea.")
    t.summary = "{f} was stuck in {trap}, and {h} and {g} got {f.him} out with {tool}."
    t.deed = "saved a friend from {trap}"
    t.ask("Who was stuck?", "{f}.")
    t.ask("Where was {f} stuck?", "in {trap}.")
    t.ask("What did they use?", "{tool}.")
    t.ask("Who helped {h}?", "{g}.")
    t.close("Nobody is too small to help.")
    return t.story("rescue", "How {h} saved {f}")


def race(t: Teller) -> Story:
    """A race: the hero wins, or stops for a rival who fell, or boasts and loses."""
    turn = t.pick(("wins", "stops", "boasts"))
    t.outdoors()
    t.env["prize"] = t.pick(("a golden cup", "a blue ribbon", "a big cake", "a paper crown", "a silver medal"))
    t.open()
    t.say(
        "One {season} day there was a race to {p.name}. The prize was {prize}.",
        "A race to {p.name} was held. The winner would get {prize}.",
    )
    t.say("{h} ran against {f.full}.", "{h} and {f.full} stood at the start.")
    if turn == "boasts":
        t.say("“I will win with my eyes closed,” said {h}.", "“You are far too slow for me, {f},” laughed {h}.")
    else:
        t.more("{h} had practised every day.", "{h.His} heart was beating fast.", "“Good luck,” said {f}.")
    t.say("Ready, steady, go! {h} was in front.", "They ran {p.along}. Soon {h} was ahead.")
    t.interlude()
    t.paragraph()
    if turn == "wins":
        t.say("{f} came closer and closer, but {h} did not slow down.", "{h} ran as fast as the wind.")
        t.say("{h} reached the end first and won {prize}.", "{h} won the race and got {prize}.")
        t.more("“You were great,” said {f}.", "{h} shared the joy with everyone.")
        t.summary = "{h} raced against {f} and won {prize}."
    elif turn == "stops":
        t.say("Suddenly {f} fell and hurt {f.his} leg.", "Behind {h.him}, {f} stumbled and fell.")
        t.say("{h} stopped, turned back and helped {f} up.", "{h} forgot the prize and ran back to help {f}.")
        t.say("They crossed the line together, and both got {prize}.", "Side by side they came in, last but laughing.")
        t.summary = "{h} stopped in a race to help {f}, who had fallen."
    else:
        t.mood = "sad"
        t.say(
            "{h} lay down for a nap, for {f} was far behind.", "{h} stopped to show off and did not look at the road."
        )
        t.say("When {h} looked up, {f} had won {prize}.", "{f} ran past {h.him} and won {prize}.")
        t.more("Nobody clapped for {h}.", "{h} could only stare.")
        t.summary = "{h} boasted before a race and lost against {f}."
    t.deed = "ran a race"
    t.ask("What was the prize?", "{prize}.")
    t.ask("Who ran against {h}?", "{f}.")
    t.ask("Where did the race go?", "to {p.name}.")
    t.close(
        {
            "wins": "Practice makes strong legs.",
            "stops": "A friend is worth more than a prize.",
            "boasts": "Pride comes before a fall.",
        }[turn]
    )
    return t.story("race", "The race to {p.name}")


def seed(t: Teller) -> Story:
    """A seed is planted and waited for; it grows, or a storm takes it."""
    t.env["crop"] = t.pick(CROPS)
    grows = t.chance(0.75)
    t.elder()
    t.outdoors()
    t.open()
    t.say(
        "One day {h} found a seed. “That is a {crop} seed,” said {e}.",
        "“This is a {crop} seed,” said {e}, and gave it to {h}.",
    )
    t.say("{h} planted it {p.at} and gave it water.", "{h.He} dug a small hole {p.at} and planted the seed.")
    t.say("The next day there was nothing to see.", "{h} waited one day, two days, three days. Nothing happened.")
    t.more("“Be patient,” said {f.full}.", "“Will it ever grow?” {h} asked {f.full}.", "{f.full} came to look, too.")
    t.more("{h} watered it every {time}.", "{h} sang to the seed.", "The rain helped, and so did the sun.")
    t.interlude()
    t.paragraph()
    t.say("Then a tiny green leaf came out of the ground.", "One {time} a green tip peeped out.")
    if grows:
        t.say("It grew and grew until it was a big {crop}.", "By the end of {season} it was the biggest {crop} of all.")
        t.more("{h} showed it to everyone.", "“Look what I have grown!” said {h}.", "Even {e} was amazed.")
        t.summary = "{h} planted a {crop} seed and waited until it grew big."
    else:
        t.mood = "sad"
        t.say("But in the night a storm came and broke the little plant.", "But a storm tore the little {crop} out.")
        t.more("{h} found only the empty pot of earth.", "{h} picked up the broken leaf.")
        t.summary = "{h} planted a {crop} seed, but a storm broke the little plant."
    t.deed = "planted a {crop} seed"
    t.ask("What did {h} plant?", "a {crop} seed.")
    t.ask("Where did {h} plant the seed?", "{p.at}.")
    t.ask("Who knew what seed it was?", "{e}.")
    t.close(*(["Good things take time."] if grows else []))
    return t.story("seed", "The {crop}")


def storm(t: Teller) -> Story:
    """A storm; somebody has no roof; a door is opened or stays shut."""
    opens = t.chance(0.75)
    t.outdoors()
    t.open()
    t.say("One {time} a great storm came over {p.name}.", "Dark clouds came, and soon a storm shook the trees.")
    t.more(
        "Thunder rolled, and rain beat on the roofs.", "The wind howled like a wolf.", "Branches broke and flew away."
    )
    t.say(
        "{h} sat in {h.his} warm {bare_home}. Then somebody knocked. It was {f.full}.",
        "Knock, knock! {f.full} stood at the door of {h}'s {bare_home}, wet and cold.",
    )
    t.say(
        "“The storm took my roof,” said {f}. “May I come in?”",
        "“My {f.kind.home} is full of water,” said {f}. “May I stay?”",
    )
    t.interlude()
    t.paragraph()
    if opens:
        t.say(
            "“Come in,” said {h}, and made some {h.kind.food} and hot tea.",
            "{h} opened the door wide and gave {f} a dry blanket.",
        )
        t.more(
            "They sat by the fire and told stories.", "{f} stopped shivering.", "All night they listened to the rain."
        )
        t.say(
            "In the morning {h} helped {f} to build a new home.",
            "When the storm was over, they mended {f}'s home together.",
        )
        t.summary = "In a storm {h} let {f} in, and later they mended {f.his} home."
    else:
        t.mood = "sad"
        t.say("“There is no room,” said {h}, and closed the door.", "{h} was afraid and did not open the door.")
        t.say("{f} spent the night under a tree.", "{f} walked away into the dark rain.")
        t.more("{h} could not sleep for shame.", "The fire was warm, but {h} felt cold.")
        t.summary = "In a storm {h} did not let {f} in, and {f} stayed outside."
    t.deed = "heard a knock in a storm"
    t.ask("Who knocked on the door?", "{f}.")
    t.ask("Did {h} let {f} in?", "Yes." if opens else "No.")
    t.ask("Where did {h} live?", "in {home}.")
    t.close("There is always room for a friend." if opens else "A closed door keeps out more than rain.")
    return t.story("storm", "The storm")


def newcomer(t: Teller) -> Story:
    """A shy newcomer is asked to play."""
    t.an_item()
    t.someone("g")
    t.open()
    t.say("A new neighbour came to {p.name}: {f.full}.", "One day {f.full} moved into the empty house near {p.name}.")
    t.say("{f} was shy and sat alone {p.at}.", "{f} knew nobody and looked at {f.his} feet.")
    t.more(
        "“{f.He} looks strange,” said {g.full}.",
        "“Why does {f.he} never speak?” asked {g.full}.",
        "Nobody talked to {f.him}.",
    )
    t.interlude()
    t.paragraph()
    t.say(
        "But {h} took {h.his} {o.bare} and went to {f}. “Do you want to {use}?” {h.he} asked.",
        "{h} sat down beside {f} and showed {f.him} {o.a}.",
    )
    t.say("{f} smiled for the first time.", "“I would love to,” said {f}.")
    t.more(
        "They played all {time}.", "{f} knew a funny game, and they played until dark.", "Soon {g} joined them, too."
    )
    t.summary = "{f} was new and shy until {h} came with {h.his} {o.bare}."
    t.deed = "made friends with a shy neighbour"
    t.ask("Who was new?", "{f}.")
    t.ask("What did {h} bring?", "{o.a}.")
    t.close("A stranger is a friend you do not know yet.")
    return t.story("newcomer", "The new neighbour")


def goodbye(t: Teller) -> Story:
    """A friend leaves and gives a keepsake; sometimes the friend comes back."""
    t.an_item(gift=True)
    back = t.chance(0.35)
    t.open()
    t.say("{h.His} best friend was {f.full}.", "{h} and {f.full} did everything together.")
    t.more("Every day they met {p.at}.", "They knew all of each other's secrets.")
    t.say("One day {f} said, “We are moving far away.”", "But {f} had to move to a town beyond the mountains.")
    t.more("{h} did not know what to say.", "“Must you go?” asked {h}.")
    t.interlude()
    t.paragraph()
    t.say(
        "{f} gave {h} {o.a}. “Think of me when you see it,” {f.he} said.",
        "“This is for you,” said {f}, and gave {h} {o.a}.",
    )
    t.say(
        "Then the cart rolled away, and {h} waved until it was gone.", "{h} waved until {f} was only a dot on the road."
    )
    if back:
        t.say("A year later there was a knock on the door. It was {f}!", "But in {season} {f} came back to stay.")
        t.more("“I missed you,” said {f}.", "They laughed and cried at once.")
        t.summary = "{f} moved away and gave {h} {o.a}, but later {f.he} came back."
    else:
        t.mood = "sad"
        t.say("{h} sat alone {p.at} with {o}.", "The days were long without {f}.")
        t.summary = "{f} moved away and gave {h} {o.a} to remember {f.him}."
    t.deed = "had to say goodbye to a friend"
    t.ask("Who moved away?", "{f}.")
    t.ask("What did {f} give to {h}?", "{o.a}.")
    t.ask("Did {f} come back?", "Yes." if back else "No.")
    t.close("True friends are never really far.")
    return t.story("goodbye", "Goodbye, {f}")


def noise(t: Teller) -> Story:
    """A noise in the night has a harmless cause."""
    sound, cause, fix = t.pick(NOISES)
    t.env.update(sound=sound, cause=cause, fix=fix)
    t.open()
    t.say("One night {h} woke up. There was a noise: {sound}.", "In the middle of the night {h} heard it: {sound}!")
    t.more("{h} pulled the blanket over {h.his} head.", "“Is it a ghost?” whispered {h}.", "It came again and again.")
    t.say("{h} woke {f.full}, who was staying the night.", "{h} went to {f.full}, who lived next door.")
    t.more("“I hear it too,” said {f}.", "“Let us go and see,” said {f}.", "They took a lantern and went on tiptoe.")
    t.interlude()
    t.paragraph()
    t.say("They looked everywhere. Then they saw it: it was only {cause}.", "“Look!” said {f}. It was only {cause}.")
    t.say("{h} {fix}, and all was quiet.", "{h} {fix}. Then they went back to bed.")
    t.more("They laughed about their fear.", "“What a night!” said {f}.")
    t.summary = "{h} and {f} heard a noise in the night, and it was only {cause}."
    t.deed = "heard a noise in the night"
    t.ask("What was the noise?", "{cause}.")
    t.ask("Who went with {h}?", "{f}.")
    t.close("Most ghosts are smaller than they sound.")
    return t.story("noise", "The noise in the night")


def liar(t: Teller) -> Story:
    """False alarms cost trust; a true alarm is believed, or not."""
    danger = t.pick(("a flood", "a fire", "a giant", "a storm", "a wild boar"))
    believed = t.chance(0.5)
    t.env["danger"] = danger
    t.open()
    t.say(
        "{h} was bored. “Help! {danger} is coming!” {h.he} shouted for fun.",
        "For a joke {h} cried, “Run! {danger} is coming!”",
    )
    t.say(
        "{f.full} came running, but there was nothing.", "{f.full} ran all the way from {p.name}. There was no danger."
    )
    t.more("{h} laughed and laughed.", "“It was only a joke,” said {h}.", "{f} was not amused.")
    t.interlude()
    t.paragraph()
    t.say("The next day {danger} really came.", "But one {time} there really was {danger}.")
    if believed:
        t.say(
            "“Please believe me! I am sorry for the joke,” cried {h}.", "“This time it is true, I promise,” said {h}."
        )
        t.say(
            "{f} looked into {h.his} eyes and believed {h.him}. Everyone was safe.",
            "{f} believed {h.him}, and they all got away.",
        )
        t.summary = "{h} told a lie about {danger}, but {f} believed {h.him} when it was true."
    else:
        t.mood = "sad"
        t.say("“Help!” cried {h}, but {f} did not believe {h.him}.", "{h} called for help, but nobody came.")
        t.say("{h} lost {h.his} home that day.", "When it was over, {h}'s home was gone.")
        t.summary = "{h} lied about {danger}, and nobody believed {h.him} when it was true."
    t.deed = "told a lie for fun"
    t.ask("What did {h} shout about?", "{danger}.")
    t.ask("Who came running?", "{f}.")
    t.ask("Did {f} believe {h} in the end?", "Yes." if believed else "No.")
    t.close("Who lies once is not soon believed.")
    return t.story("liar", "The joke")


def ill(t: Teller) -> Story:
    """A friend is ill and gets better with care."""
    t.env["food"] = t.pick(FOODS)
    cause = t.pick(("a cold", "a fever", "a sore throat", "a broken leg", "a tummy ache"))
    t.env["ill"] = cause
    t.open()
    t.say(
        "One day {h.his} friend {f.full} did not come out to play.",
        "{h} waited {p.at} for {f.full}, but {f.he} did not come.",
    )
    t.say("{f} was in bed with {ill}.", "“I have {ill},” said {f} in a small voice.")
    t.more("{h} thought about what to do.", "{f}'s face was pale.", "“Poor {f},” said {h}.")
    t.interlude()
    t.paragraph()
    t.say("{h} brought {food} and sat down by the bed.", "So {h} came every {time} with {food}.")
    t.more(
        "{h.He} told funny tales until {f} laughed.",
        "{h} read from an old book.",
        "{h} opened the window to let the sun in.",
    )
    t.say("After three days {f} was well again.", "Soon {f} could get up and play.")
    t.more("“You are the best doctor,” said {f}.", "They ran {p.along} together.")
    t.summary = "{f} had {ill}, and {h} brought {food} until {f.he} was well."
    t.deed = "cared for a friend who was ill"
    t.ask("Who was ill?", "{f}.")
    t.ask("What did {f} have?", "{ill}.")
    t.ask("What did {h} bring?", "{food}.")
    t.close("Care is the best medicine.")
    return t.story("ill", "{f} is ill")


def astray(t: Teller) -> Story:
    """Lost on the way; a sign leads home."""
    sign, follow = t.pick(SIGNS)
    t.env.update(sign=sign.format(**t.env), follow=follow.format(**t.env))
    t.open()
    t.say(
        "{h} walked too far from {p.name} and lost the way.",
        "One {time} {h} followed a butterfly, and soon {h.he} was lost.",
    )
    t.more(
        "All the trees looked the same.", "“Which way is home?” asked {h}, but nobody answered.", "It was getting dark."
    )
    t.say(
        "{h} wanted to cry, but then {h.he} met {f.full}, who was lost, too.",
        "Behind a bush sat {f.full}. “I am lost, too,” said {f}.",
    )
    t.more("“Then we are lost together,” said {h}.", "Together they were less afraid.")
    t.interlude()
    t.paragraph()
    t.say("Then {h} noticed {sign}. They {follow}.", "“Look there!” said {f}. It was {sign}. So they {follow}.")
    t.say("Before long they saw the roofs of the village.", "After an hour they were home.")
    t.more("Mother had kept the soup warm.", "Everyone had been looking for them.")
    t.summary = "{h} and {f} were lost, and {sign} led them home."
    t.deed = "lost the way home"
    t.ask("Who was lost, too?", "{f}.")
    t.ask("What led them home?", "{sign}.")
    t.close("Two who are lost are not alone.")
    return t.story("astray", "The way home")


def build(t: Teller) -> Story:
    """Two friends build something; it fails once, and is made better."""
    what, of, goal = t.pick(BUILDS)
    t.env.update(what=what, it="the " + what.split(" ", 1)[1], of=of, goal=goal)
    fails = t.chance(0.6)
    t.open()
    t.say("{h} and {h.his} friend {f.full} wanted to {goal}.", "“I wish we could {goal},” said {h} to {f.full}.")
    t.say("So they built {what} out of {of}.", "“Let us build {what}!” said {f}. They found {of} and began.")
    t.more(
        "They worked all {time}.", "{h} held the pieces, and {f} tied them together.", "{h} drew a plan in the sand."
    )
    t.interlude()
    t.paragraph()
    if fails:
        t.say("But {it} fell apart on the first day.", "At the first try {it} broke in two.")
        t.more("“It is my fault,” said {f}.", "{h} kicked a stone.", "They looked at each other and began to laugh.")
        t.say(
            "“Let us try again,” said {h}, and this time they made it stronger.",
            "They did not give up and built it again, only better.",
        )
    t.say("Now they could {goal}.", "From then on they could {goal}.")
    t.summary = "{h} and {f} built {what} to {goal}."
    t.deed = "built {what}"
    t.ask("What did they build?", "{what}.")
    t.ask("Who built it with {h}?", "{f}.")
    t.ask("What was it made of?", "{of}.")
    t.close("What two friends build will stand.", "Try, and try again.")
    return t.story("build", "How {h} built {what}")


MORE_PLOTS: dict[str, Plot] = {
    "afraid": afraid, "rescue": rescue, "race": race, "seed": seed, "storm": storm, "newcomer": newcomer,
    "goodbye": goodbye, "noise": noise, "liar": liar, "ill": ill, "astray": astray, "build": build,
}  # fmt: skip
