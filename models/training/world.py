"""The little world of the tales: who lives there, where, with what, and in which weather.

Only data and small lookups; `teller.py` turns it into sentences. Every list was written for this corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

VOWELS = "aeiou"


def a(phrase: str) -> str:
    """`phrase` with its indefinite article: "a fox", "an old owl"."""
    return f"{'an' if phrase[0].lower() in VOWELS else 'a'} {phrase}"


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
    Kind("girl", "cottage", "soup", "sing", "👧", "laugh"),
    Kind("boy", "cottage", "noodles", "whistle", "👦", "laugh"),
)
ELDERS = ("baker", "miller", "tailor", "fisherman", "gardener", "blacksmith", "teacher", "doctor", "sailor", "farmer")

SHE = (
    "Mira Lily Anna Ruby Ella Nora Ivy Daisy Clara Luna Poppy Rosa Tilda Hazel Wren Olive Maya Pia Greta Zoé Chloé Åsa "
    "Elsa Nina Juno Flora Amber Pearl Kiki Tess Mabel Sana Leila Yuki Inès Frida Willa Bea"
).split()
HE = (
    "Tom Max Ben Oscar Finn Leo Sam Hugo Otto Milo Jack Paul Noah Felix Toby Rufus Emil Karl Bruno René Noël José Søren "
    "Theo Albert Pip Jasper Omar Kenji Ravi Anton Louis Gus Barney Arlo Basil Walter Ned"
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
    Thing("teddy bear", "hug it", "hugged it", BAG, "tore", THREAD),
    Thing("jump rope", "jump with it", "jumped with it", LEFT, "snapped", THREAD),
    Thing("wooden sword", "play knights with it", "played knights with it", LEFT, "snapped", GLUE),
)
COLOURS = "red blue green yellow white black brown purple orange golden silver pink grey".split()
LOOKS = COLOURS + "little old new shiny striped round pretty tiny big".split()


@dataclass(frozen=True)
class Place:
    """Somewhere to be: `name` with article, how one is there, how one moves there, what is seen, hiding spots."""

    name: str
    at: str
    along: str
    sight: str
    spots: tuple[str, str, str]


PLACES = (
    Place("the river", "by the river", "along the river", "The water sparkled", (
        "under the stone bridge", "between two wet rocks", "in the tall reeds")),
    Place("the forest", "in the forest", "through the forest", "The trees whispered", (
        "behind a mossy log", "in a hollow tree", "under a pile of leaves")),
    Place("the meadow", "in the meadow", "across the meadow", "The grass was soft", (
        "in the long grass", "behind a big stone", "among the daisies")),
    Place("the market", "at the market", "through the market", "The stalls were full of fruit", (
        "under the cheese stall", "behind a barrel of apples", "next to the fountain")),
    Place("the hill", "on the hill", "over the hill", "One could see the whole valley", (
        "behind the old windmill", "under a thorn bush", "beside the lonely pine")),
    Place("the pond", "by the pond", "around the pond", "The lilies were in bloom", (
        "on a lily leaf", "under the little jetty", "in the mud by the shore")),
    Place("the barn", "in the barn", "past the barn", "It smelled of hay", (
        "under the hay", "behind the ladder", "in an empty milk can")),
    Place("the beach", "on the beach", "along the beach", "The waves rolled in", (
        "under a heap of seaweed", "behind a sand castle", "inside a big shell")),
    Place("the mill", "at the mill", "past the mill", "The great wheel turned", (
        "behind the sacks of flour", "under the wooden stairs", "beside the mill wheel")),
    Place("the garden", "in the garden", "through the garden", "The roses smelled sweet", (
        "under the rose bush", "behind the watering tub", "among the cabbages")),
    Place("the library", "in the library", "past the library", "The shelves reached the ceiling", (
        "behind a row of books", "under the reading chair", "on the highest shelf")),
    Place("the school", "at the school", "past the school", "The bell had just rung", (
        "under a desk", "behind the blackboard", "in the coat room")),
    Place("the harbour", "at the harbour", "along the harbour", "The ships rocked gently", (
        "in a coil of rope", "behind a fish crate", "under an old net")),
    Place("the orchard", "in the orchard", "through the orchard", "The branches were heavy with apples", (
        "in the fork of an apple tree", "under a ladder", "in a basket of pears")),
    Place("the cave", "in the cave", "past the cave", "Drops fell from the roof", (
        "behind a tall rock", "in a crack in the wall", "beside the dark pool")),
    Place("the village square", "in the village square", "across the village square", "The fountain splashed", (
        "behind the fountain", "under the stone bench", "on the steps of the town hall")),
    Place("the lighthouse", "at the lighthouse", "past the lighthouse", "The gulls cried above the sea", (
        "on the winding stairs", "behind the green door", "under the great lamp")),
    Place("the bakery", "at the bakery", "past the bakery", "It smelled of fresh bread", (
        "under the flour table", "behind the warm oven", "in the bread basket")),
    Place("the castle", "in the castle", "around the castle", "Flags waved on the towers", (
        "behind a heavy curtain", "under the long table", "in a suit of armour")),
    Place("the swamp", "in the swamp", "around the swamp", "The mud went plop", (
        "on a dry island", "under a crooked root", "behind the old willow")),
    Place("the station", "at the station", "past the station", "A train puffed in the distance", (
        "under a wooden bench", "behind the ticket office", "beside the rails")),
    Place("the field", "in the field", "across the field", "The wheat was golden", (
        "beside the scarecrow", "behind a hay cart", "in a rabbit hole")),
    Place("the park", "in the park", "through the park", "Children played on the swings", (
        "under the slide", "behind a bench", "in the sand box")),
    Place("the waterfall", "at the waterfall", "past the waterfall", "A rainbow hung in the mist", (
        "behind the falling water", "under a fern", "on a flat rock")),
)


@dataclass(frozen=True)
class Weather:
    word: str
    emoji: str
    lines: tuple[str, ...]


WEATHERS = (
    Weather("sunny", "☀️", ("The sun shone brightly.", "There was not a cloud in the sky.", "The day was warm.")),
    Weather("rainy", "🌧️", ("Rain fell on the roofs.", "The rain went tap, tap, tap.", "Puddles covered the path.")),
    Weather("windy", "💨", ("The wind blew hard.", "The leaves danced in the wind.", "The wind sang in the trees.")),
    Weather("snowy", "❄️", ("Snow covered the ground.", "Big flakes fell from the sky.", "Everything was white.")),
    Weather("foggy", "🌫️", ("Fog hung over the land.", "One could hardly see the path.", "The fog was thick as milk.")),
    Weather("cloudy", "☁️", ("Grey clouds covered the sky.", "The sky was full of clouds.", "The sun hid away.")),
    Weather("cold", "🧊", ("The air was cold.", "There was ice on the puddles.", "Everyone wore warm socks.")),
    Weather("stormy", "⛈️", ("Thunder rolled over the hills.", "A storm was coming.", "Lightning lit the sky.")),
)
TIMES = "morning afternoon evening".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = "spring summer autumn winter".split()
FOODS = (
    "an apple|a loaf of bread|a bowl of soup|a honey cake|a berry pie|a piece of cheese|a pancake|a plum tart|"
    "a bag of nuts|a jar of jam|a carrot cake|a bunch of grapes|a sweet bun|a crème brûlée|a café au lait"
).split("|")[:13]
FRUITS = "apples pears plums cherries nuts berries shells stones coins buttons flowers eggs cookies carrots".split()
CROPS = "sunflower pumpkin rose bean carrot melon tulip strawberry tomato cabbage".split()
FEARS = (
    ("the dark", "go into the dark cellar", "went down into the dark cellar", "carried a candle and counted the steps"),
    ("deep water", "swim in the deep lake", "swam across the deep lake", "started where the water was shallow"),
    ("high places", "climb the tall tower", "climbed the tall tower", "looked up and never down"),
    ("thunder", "stay outside in the storm", "watched the storm from the porch", "counted after every flash"),
    ("big crowds", "sing at the summer fair", "sang at the summer fair", "looked only at one friendly face"),
    ("the long bridge", "cross the long bridge", "crossed the long bridge", "held the rope and took small steps"),
    ("the barking dog", "walk past the barking dog", "walked past the barking dog", "spoke softly and offered a bone"),
    ("the tall slide", "go down the tall slide", "slid down the tall slide", "took a deep breath and let go"),
)
NOISES = (
    ("tap, tap, tap", "a branch that knocked on the window", "tied the branch back"),
    ("squeak, squeak", "a tiny bat that could not find its way out", "opened the window for it"),
    ("drip, drop, drip", "a leaky pipe above the stairs", "put a bucket under it"),
    ("whooo, whooo", "the wind in an empty bottle", "put a cork in the bottle"),
    ("scratch, scratch", "a kitten that had lost its mother", "gave it a saucer of milk"),
    ("bump, bump, bump", "a loose shutter in the wind", "closed the shutter"),
    ("crunch, crunch", "a hungry hedgehog at the apple box", "gave it an apple of its own"),
    ("ding, ding", "a goat with a bell around its neck", "led it back to its stable"),
)
TRAPS = (
    ("a deep hole", "a ladder", "let the ladder down into the hole"),
    ("a thorn bush", "a pair of scissors", "cut the thorns one by one"),
    ("the thick mud", "a long rope", "pulled with the long rope"),
    ("a tall tree", "a ladder", "leaned the ladder against the tree"),
    ("an old fishing net", "a pair of scissors", "cut the net open"),
    ("a frozen puddle", "a kettle of warm water", "poured warm water on the ice"),
    ("a dry well", "a long rope", "lowered the long rope into the well"),
    ("a crack between two rocks", "a strong stick", "pushed the rocks apart with the stick"),
)
BUILDS = (
    ("a raft", "four logs", "cross the river"),
    ("a tree house", "old boards", "watch the stars"),
    ("a bridge", "flat stones", "visit each other every day"),
    ("a snow fort", "blocks of snow", "hide from the wind"),
    ("a swing", "a plank and a rope", "swing as high as the roof"),
    ("a bird house", "a wooden box", "listen to the birds"),
    ("a cart", "a crate and four wheels", "bring apples to the market"),
    ("a tent", "a sheet and three poles", "sleep under the moon"),
)
JOBS = (
    "sweep the floor|wash the windows|carry the sacks|feed the hens|pick the cherries|paint the fence|stack the wood|"
    "water the plants|deliver the letters|peel the potatoes|clean the lamps|sort the buttons"
).split("|")
PAST = {
    "sweep": "swept", "wash": "washed", "carry": "carried", "feed": "fed", "pick": "picked", "paint": "painted",
    "stack": "stacked", "water": "watered", "deliver": "delivered", "peel": "peeled", "clean": "cleaned",
    "sort": "sorted",
}


def past(job: str) -> str:
    """The past tense of one of `JOBS`."""
    verb, _, rest = job.partition(" ")
    return f"{PAST[verb]} {rest}"
