"""The little world of the tales: who lives there, and with what (`scenes.py` has places, weather and events).

Only data and small lookups; `teller.py` turns it into sentences. Every list was written for this corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

VOWELS = "aeiou"


def a(phrase: str) -> str:
    """`phrase` with its indefinite article: "a fox", "an old owl"."""
    silent = phrase.startswith("honest")
    return f"{'an' if phrase[0].lower() in VOWELS or silent else 'a'} {phrase}"


@dataclass(frozen=True)
class Kind:
    """A sort of creature: its word, where it sleeps, what it eats, what it does well, its picture."""

    word: str
    home: str
    food: str
    skill: str
    emoji: str = ""
    sound: str = ""


KINDS = (
    Kind("fox", "den", "berries", "run", "🦊", "yip"),
    Kind("rabbit", "burrow", "carrots", "hop", "🐰", "squeak"),
    Kind("bear", "cave", "honey", "lift", "🐻", "growl"),
    Kind("mouse", "hole", "cheese", "squeeze", "🐭", "squeak"),
    Kind("owl", "hollow tree", "soup", "fly", "🦉", "hoot"),
    Kind("hedgehog", "pile of leaves", "apples", "roll", "🦔", "snuffle"),
    Kind("squirrel", "oak tree", "nuts", "climb", "🐿️", "chatter"),
    Kind("frog", "pond", "pancakes", "jump", "🐸", "croak"),
    Kind("duck", "nest", "bread", "swim", "🦆", "quack"),
    Kind("badger", "burrow", "mushrooms", "dig", "🦡", "grunt"),
    Kind("otter", "hut", "fish", "swim", "🦦", "chirp"),
    Kind("cat", "cottage", "milk", "climb", "🐱", "meow"),
    Kind("dog", "kennel", "sausages", "run", "🐶", "bark"),
    Kind("turtle", "hut", "salad", "swim", "🐢", "hum"),
    Kind("deer", "thicket", "clover", "run", "🦌", "call"),
    Kind("goat", "barn", "turnips", "climb", "🐐", "bleat"),
    Kind("pig", "barn", "potatoes", "dig", "🐷", "oink"),
    Kind("hen", "henhouse", "corn", "scratch", "🐔", "cluck"),
    Kind("crow", "nest", "plums", "fly", "", "caw"),
    Kind("mole", "tunnel", "roots", "dig", "", "mumble"),
    Kind("wolf", "den", "stew", "run", "🐺", "howl"),
    Kind("lamb", "stable", "clover", "hop", "🐑", "bleat"),
    Kind("donkey", "stable", "oats", "carry", "🫏", "bray"),
    Kind("goose", "henhouse", "grain", "fly", "🪿", "honk"),
    Kind("beaver", "lodge", "pears", "build", "🦫", "chirp"),
    Kind("snail", "flowerpot", "lettuce", "crawl", "🐌", "whisper"),
    Kind("lion", "cave", "pies", "run", "🦁", "roar"),
    Kind("elephant", "tall hut", "melons", "lift", "🐘", "trumpet"),
    Kind("monkey", "tree house", "bananas", "climb", "🐵", "chatter"),
    Kind("penguin", "snow house", "fish", "slide", "🐧", "honk"),
    Kind("dragon", "cave", "toast", "fly", "🐉", "roar"),
    Kind("robot", "workshop", "warm oil", "lift", "🤖", "beep"),
    Kind("bee", "hive", "honey", "fly", "🐝", "buzz"),
    Kind("pony", "stable", "apples", "run", "🐴", "neigh"),
    Kind("koala", "tree house", "leaves", "climb", "🐨", "hum"),
    Kind("panda", "bamboo hut", "bamboo", "roll", "🐼", "hum"),
    Kind("seal", "icy bay", "fish", "dive", "🦭", "bark"),
    Kind("camel", "tent", "dates", "carry", "🐫", "grunt"),
    Kind("parrot", "nest", "seeds", "talk", "🦜", "squawk"),
    Kind("bat", "attic", "figs", "fly", "🦇", "squeak"),
    Kind("zebra", "stable", "hay", "run", "🦓", "neigh"),
    Kind("tiger", "den", "pies", "jump", "🐯", "roar"),
    Kind("kitten", "cottage", "cream", "climb", "🐈", "purr"),
    Kind("princess", "castle", "cake", "dance", "👸", "laugh"),
    Kind("wizard", "tower", "porridge", "sing", "🧙", "mumble"),
    Kind("knight", "castle", "stew", "ride", "🛡️", "laugh"),
    Kind("girl", "cottage", "soup", "sing", "👧", "laugh"),
    Kind("boy", "cottage", "noodles", "whistle", "👦", "laugh"),
)
ELDERS = ("baker", "miller", "tailor", "fisherman", "gardener", "blacksmith", "teacher", "doctor", "sailor", "farmer")

SHE = (
    "Mira Lily Anna Ruby Ella Nora Ivy Daisy Clara Luna Poppy Rosa Tilda Hazel Wren Olive Maya Pia Greta "
    "Zoé Chloé Åsa Elsa Nina Juno Flora Amber Pearl Kiki Tess Mabel Sana Leila Yuki Inès Frida Willa Bea"
).split()
HE = (
    "Tom Max Ben Oscar Finn Leo Sam Hugo Otto Milo Jack Paul Noah Felix Toby Rufus Emil Karl Bruno René "
    "Noël José Søren Theo Albert Pip Jasper Omar Kenji Ravi Anton Louis Gus Barney Arlo Basil Walter Ned"
).split()


@dataclass(frozen=True)
class Trait:
    word: str
    habit: str  # completes "<name> ..."; may use {h.his} and so on


TRAITS = (
    Trait("kind", "liked to help everyone"),
    Trait("curious", "asked questions all day long"),
    Trait("brave", "was the first to try new things"),
    Trait("quiet", "listened more than {h.he} spoke"),
    Trait("cheerful", "sang on the way to every place"),
    Trait("clever", "could solve any puzzle"),
    Trait("careful", "looked twice before every step"),
    Trait("playful", "turned every chore into a game"),
    Trait("gentle", "never said a loud word"),
    Trait("stubborn", "never gave up"),
    Trait("dreamy", "often looked at the clouds"),
    Trait("hungry", "always thought about lunch"),
    Trait("messy", "left {h.his} things everywhere"),
    Trait("tidy", "put each thing in its place"),
    Trait("funny", "knew a hundred jokes"),
    Trait("patient", "could wait for a long time"),
    Trait("proud", "liked to be the best"),
    Trait("busy", "worked from morning to night"),
    Trait("small", "was no taller than a tulip"),
    Trait("sleepy", "could nap in any corner"),
    Trait("honest", "always told the truth"),
    Trait("shy", "spoke only when {h.he} was asked"),
    Trait("merry", "laughed at every joke, even at bad ones"),
    Trait("wise", "had read many books"),
    Trait("lazy", "liked {h.his} bed more than work"),
    Trait("grumpy", "needed a while to smile"),
    Trait("generous", "gave away whatever {h.he} could"),
    Trait("clumsy", "stumbled over {h.his} own feet"),
    Trait("lively", "could not sit still"),
    Trait("thoughtful", "never forgot a birthday"),
    Trait("polite", "said please and thank you"),
)


@dataclass(frozen=True)
class Thing:
    """A thing one can own: how it is used, lost, broken and mended (past tense, `it` stands for the thing)."""

    noun: str
    use: str
    used: str
    lost: str
    broke: str
    mend: str
    gift: bool = True


WIND = "the wind carried it away"
BAG = "it fell out of {h.his} bag"
SLIP = "it slipped out of {h.his} hands"
LEFT = "{h.he} put it down and forgot it"
GLUE, THREAD, NAILS, WIRE = "glue", "a needle and thread", "a hammer and two nails", "a piece of wire"
THINGS = (
    Thing("kite", "fly it", "flew it", WIND, "tore", THREAD),
    Thing("ball", "kick it", "kicked it", "it rolled away", "burst", "a patch"),
    Thing("drum", "play it", "played it", LEFT, "split", GLUE),
    Thing("book", "read it", "read it", LEFT, "lost a page", GLUE),
    Thing("hat", "wear it", "wore it", WIND, "tore", THREAD),
    Thing("scarf", "wear it", "wore it", WIND, "tore", THREAD),
    Thing("lantern", "light it", "lit it", LEFT, "cracked", WIRE),
    Thing("basket", "carry it", "carried it", LEFT, "came apart", "a bit of straw"),
    Thing("flute", "play it", "played it", BAG, "cracked", GLUE),
    Thing("bell", "ring it", "rang it", BAG, "cracked", WIRE),
    Thing("whistle", "blow it", "blew it", BAG, "cracked", GLUE),
    Thing("umbrella", "open it", "opened it", WIND, "snapped", WIRE),
    Thing("blanket", "sleep under it", "slept under it", WIND, "tore", THREAD),
    Thing("key", "turn it", "turned it", SLIP, "bent", "a small hammer"),
    Thing("map", "study it", "studied it", WIND, "tore", GLUE),
    Thing("spoon", "stir soup with it", "stirred soup with it", LEFT, "bent", "a small hammer"),
    Thing("cup", "drink from it", "drank from it", LEFT, "cracked", GLUE),
    Thing("teapot", "pour tea from it", "poured tea from it", LEFT, "cracked", GLUE),
    Thing("ring", "wear it", "wore it", SLIP, "bent", "a small hammer"),
    Thing("coat", "wear it", "wore it", LEFT, "tore", THREAD),
    Thing("doll", "play with it", "played with it", BAG, "came apart", THREAD),
    Thing("wagon", "pull it", "pulled it", "it rolled away", "lost a wheel", NAILS),
    Thing("puppet", "play with it", "played with it", BAG, "came apart", THREAD),
    Thing("fiddle", "play it", "played it", LEFT, "snapped", GLUE),
    Thing("compass", "follow it", "followed it", SLIP, "cracked", WIRE),
    Thing("mirror", "look into it", "looked into it", SLIP, "cracked", GLUE),
    Thing("brush", "paint with it", "painted with it", BAG, "snapped", GLUE),
    Thing("necklace", "wear it", "wore it", SLIP, "came apart", WIRE),
    Thing("ribbon", "wear it", "wore it", WIND, "tore", THREAD),
    Thing("pillow", "sleep on it", "slept on it", LEFT, "tore", THREAD),
    Thing("clock", "listen to it", "listened to it", BAG, "stopped", WIRE),
    Thing("bucket", "carry water in it", "carried water in it", "it rolled away", "cracked", NAILS),
    Thing("sled", "ride it", "rode it", "it slid away", "snapped", NAILS),
    Thing("toy boat", "sail it", "sailed it", "the water carried it away", "cracked", GLUE),
    Thing("marble", "roll it", "rolled it", "it rolled away", "cracked", GLUE),
    Thing("letter", "read it", "read it", WIND, "tore", GLUE, False),
    Thing("painting", "look at it", "looked at it", WIND, "tore", GLUE),
    Thing("paper crown", "wear it", "wore it", WIND, "tore", GLUE),
    Thing("spinning top", "spin it", "spun it", "it rolled away", "cracked", GLUE),
    Thing("music box", "listen to it", "listened to it", LEFT, "stopped", WIRE),
    Thing("watering can", "water the roses with it", "watered the roses with it", LEFT, "cracked", WIRE),
    Thing("telescope", "look at the stars with it", "looked at the stars with it", LEFT, "cracked", WIRE),
    Thing("glove", "wear it", "wore it", BAG, "tore", THREAD),
    Thing("candle", "light it", "lit it", BAG, "snapped", "a little warm wax"),
    Thing("trumpet", "play it", "played it", LEFT, "bent", "a small hammer"),
    Thing("purse", "carry it", "carried it", BAG, "tore", THREAD),
    Thing("notebook", "write in it", "wrote in it", LEFT, "lost a page", GLUE),
    Thing("pencil", "draw with it", "drew with it", SLIP, "snapped", GLUE),
    Thing("vase", "put flowers in it", "put flowers in it", LEFT, "cracked", GLUE),
    Thing("snow globe", "shake it", "shook it", SLIP, "cracked", GLUE),
    Thing("backpack", "carry it", "carried it", LEFT, "tore", THREAD),
    Thing("cap", "wear it", "wore it", WIND, "tore", THREAD),
    Thing("toy train", "play with it", "played with it", BAG, "lost a wheel", NAILS),
    Thing("fishing rod", "fish with it", "fished with it", LEFT, "snapped", WIRE),
    Thing("paintbox", "paint with it", "painted with it", BAG, "cracked", GLUE),
    Thing("teddy bear", "hug it", "hugged it", BAG, "tore", THREAD),
    Thing("jump rope", "jump with it", "jumped with it", LEFT, "snapped", THREAD),
    Thing("toy sword", "play knights with it", "played knights with it", LEFT, "snapped", GLUE),
)
COLOURS = (
    "scarlet violet turquoise crimson red blue green yellow white black brown purple orange golden silver pink grey"
).split()
LOOKS = (
    COLOURS
    + (
        "dusty spotted fancy heavy light funny precious wooden painted "
        "little old new shiny striped round pretty tiny big"
    ).split()
)
