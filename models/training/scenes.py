"""Where and in which weather the tales happen, and what the plots draw from. Only data, written for this corpus."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Somewhere to be: `name` with article, how one is there, how one moves there, what is seen, hiding spots."""

    name: str
    at: str
    along: str
    sight: str
    spots: tuple[str, str, str]
    indoors: bool = False


PLACES = (
    Place(
        "the river",
        "by the river",
        "along the river",
        "The water sparkled",
        ("under the stone bridge", "between two wet rocks", "in the tall reeds"),
    ),
    Place(
        "the forest",
        "in the forest",
        "through the forest",
        "The trees whispered",
        ("behind a mossy log", "in a hollow tree", "under a pile of leaves"),
    ),
    Place(
        "the meadow",
        "in the meadow",
        "across the meadow",
        "The grass was soft",
        ("in the long grass", "behind a big stone", "among the daisies"),
    ),
    Place(
        "the market",
        "at the market",
        "through the market",
        "The stalls were full of fruit",
        ("under the cheese stall", "behind a barrel of apples", "next to the fountain"),
        True,
    ),
    Place(
        "the hill",
        "on the hill",
        "over the hill",
        "One could see the whole valley",
        ("behind the old windmill", "under a thorn bush", "beside the lonely pine"),
    ),
    Place(
        "the pond",
        "by the pond",
        "around the pond",
        "The lilies were in bloom",
        ("on a lily leaf", "under the little jetty", "in the mud by the shore"),
    ),
    Place(
        "the barn",
        "in the barn",
        "past the barn",
        "It smelled of hay",
        ("under the hay", "behind the ladder", "in an empty milk can"),
        True,
    ),
    Place(
        "the beach",
        "on the beach",
        "along the beach",
        "The waves rolled in",
        ("under a heap of seaweed", "behind a sand castle", "inside a big shell"),
    ),
    Place(
        "the mill",
        "at the mill",
        "past the mill",
        "The great wheel turned",
        ("behind the sacks of flour", "under the wooden stairs", "beside the mill wheel"),
    ),
    Place(
        "the garden",
        "in the garden",
        "through the garden",
        "The roses smelled sweet",
        ("under the rose bush", "behind the watering tub", "among the cabbages"),
    ),
    Place(
        "the library",
        "in the library",
        "past the library",
        "The shelves reached the ceiling",
        ("behind a row of books", "under the reading chair", "on the highest shelf"),
        True,
    ),
    Place(
        "the school",
        "at the school",
        "past the school",
        "The bell had just rung",
        ("under a desk", "behind the blackboard", "in the coat room"),
        True,
    ),
    Place(
        "the harbour",
        "at the harbour",
        "along the harbour",
        "The ships rocked gently",
        ("in a coil of rope", "behind a fish crate", "under an old net"),
    ),
    Place(
        "the orchard",
        "in the orchard",
        "through the orchard",
        "The branches were heavy with apples",
        ("in the fork of an apple tree", "under a ladder", "in a basket of pears"),
    ),
    Place(
        "the cave",
        "in the cave",
        "past the cave",
        "Drops fell from the roof",
        ("behind a tall rock", "in a crack in the wall", "beside the dark pool"),
        True,
    ),
    Place(
        "the village square",
        "in the village square",
        "across the village square",
        "The fountain splashed",
        ("behind the fountain", "under the stone bench", "on the steps of the town hall"),
    ),
    Place(
        "the lighthouse",
        "at the lighthouse",
        "past the lighthouse",
        "The gulls cried above the sea",
        ("on the winding stairs", "behind the green door", "under the great lamp"),
        True,
    ),
    Place(
        "the bakery",
        "at the bakery",
        "past the bakery",
        "It smelled of fresh bread",
        ("under the flour table", "behind the warm oven", "in the bread basket"),
        True,
    ),
    Place(
        "the castle",
        "in the castle",
        "around the castle",
        "Flags waved on the towers",
        ("behind a heavy curtain", "under the long table", "in a suit of armour"),
        True,
    ),
    Place(
        "the swamp",
        "in the swamp",
        "around the swamp",
        "The mud went plop",
        ("on a dry island", "under a crooked root", "behind the old willow"),
    ),
    Place(
        "the station",
        "at the station",
        "past the station",
        "A train puffed in the distance",
        ("under a wooden bench", "behind the ticket office", "beside the rails"),
        True,
    ),
    Place(
        "the field",
        "in the field",
        "across the field",
        "The wheat was golden",
        ("beside the scarecrow", "behind a hay cart", "in a rabbit hole"),
    ),
    Place(
        "the park",
        "in the park",
        "through the park",
        "Children played on the swings",
        ("under the slide", "behind a bench", "in the sand box"),
    ),
    Place(
        "the waterfall",
        "at the waterfall",
        "past the waterfall",
        "A rainbow hung in the mist",
        ("behind the falling water", "under a fern", "on a flat rock"),
    ),
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
    "a bag of nuts|a jar of jam|a carrot cake|a bunch of grapes|a sweet bun|a crème caramel|a bowl of purée|"
    "a basket of strawberries|a slice of melon|a cheese sandwich|a bag of cookies|a gingerbread heart"
).split("|")
FRUITS = "apples pears plums cherries nuts berries shells stones coins buttons flowers eggs cookies carrots".split()
CROPS = "sunflower pumpkin rose bean carrot melon tulip strawberry tomato cabbage lily cucumber radish daisy".split()
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
SIGNS = (
    ("the north star", "walked towards it"),
    ("a small stream", "walked beside it"),
    ("a light in a window", "went to it"),
    ("the sound of a bell", "went where it rang"),
    ("the smell of bread", "followed {h.his} nose"),
    ("{h.his} own footprints", "followed them back"),
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
    "water the plants|deliver the letters|peel the potatoes|clean the lamps|sort the buttons|"
    "polish the boots|fold the towels|mow the lawn|rake the leaves|brush the pony"
).split("|")
PAST = {
    "sweep": "swept",
    "wash": "washed",
    "carry": "carried",
    "feed": "fed",
    "pick": "picked",
    "paint": "painted",
    "stack": "stacked",
    "water": "watered",
    "deliver": "delivered",
    "peel": "peeled",
    "clean": "cleaned",
    "sort": "sorted",
    "polish": "polished",
    "fold": "folded",
    "mow": "mowed",
    "rake": "raked",
    "brush": "brushed",
}


def past(job: str) -> str:
    """The past tense of one of `JOBS`."""
    verb, _, rest = job.partition(" ")
    return f"{PAST[verb]} {rest}"


# What one may notice anywhere; nothing follows from it.
GLANCES = tuple(
    (
        "A butterfly danced over the flowers.|On a fence sat a robin and sang.|Far away a church bell rang.|"
        "{h} hummed a little tune.|A beetle said good morning and hurried on.|Somewhere a cuckoo called.|"
        "Two sparrows were quarrelling about a crumb.|A spider was mending its web.|The clouds looked like sheep.|"
        "A snail crossed the path without haste.|A smell of pancakes was in the air.|"
        "{h} counted the clouds. There were six.|"
        "A ladybird landed on {h.his} nose and flew on.|Bees were busy in the clover.|"
        "An old cart creaked along the road.|"
        "From a chimney rose a thin line of smoke.|A leaf fell and landed at {h.his} feet.|The swallows flew low.|"
        "{h} whistled, and an echo answered.|A grasshopper played its tiny violin.|Someone had hung up the washing.|"
        "A dragonfly stood still in the air.|A ferryman waved from his boat.|The post coach rattled by.|"
        "Ants carried a crumb as big as a house.|A scarecrow nodded in the breeze.|The bakers were already at work.|"
        "{h} had a pocket full of chestnuts.|A magpie watched everything with a bright eye.|"
        "The path smelled of thyme.|"
        "A caterpillar was having breakfast on a cabbage.|The shepherd played a slow song.|A gate squeaked.|"
        "There was a taste of salt in the air.|{h} jumped over a puddle.|A firefly blinked in the bushes.|"
        "A kettle sang in some kitchen.|The windmill turned its arms.|A white pigeon sat on the roof.|"
        "{h} tied {h.his} shoe and went on.|Dandelion seeds sailed by like tiny umbrellas.|"
        "A woodpecker knocked on a trunk.|"
        "The moon was still in the sky, pale and thin.|A kind old woman sold lemonade.|Geese were flying south.|"
        "{h} found a smooth pebble and kept it.|A trumpet sounded from the town hall.|A puppy chased its own tail."
    ).split("|")
)
BAKES = (
    ("an apple pie", "salt", "sugar"),
    ("a birthday cake", "pepper", "cinnamon"),
    ("a tray of cookies", "mustard", "honey"),
    ("a plum tart", "soap", "butter"),
    ("a loaf of bread", "sand", "flour"),
    ("a pumpkin pie", "vinegar", "cream"),
    ("a chocolate cake", "garlic", "vanilla"),
    ("a stack of waffles", "chalk", "baking powder"),
)
WISHES = (
    ("to be as tall as a tower", "no door was high enough"),
    ("to be very small", "every raindrop was like a bucket"),
    ("for a mountain of cake", "there was no room left to sleep"),
    ("that it would always be night", "the flowers did not open anymore"),
    ("to be the loudest of all", "everyone ran away"),
    ("for a hundred servants", "they were always in the way"),
    ("to be invisible", "nobody said hello anymore"),
    ("that everything would turn to gold", "even the soup was hard and cold"),
)
SKILLS = (
    ("juggle", "dropped every ball", "juggled five balls at once"),
    ("skate", "fell on the ice seven times", "skated in a perfect circle"),
    ("whistle", "made only a hiss", "whistled a whole song"),
    ("dance", "stepped on the teacher's toes", "danced like a feather"),
    ("knit", "made a terrible knot", "knitted a warm sock"),
    ("row a boat", "went round in circles", "rowed straight across the lake"),
    ("read", "mixed up all the letters", "read a whole page aloud"),
    ("paint", "spilled the paint", "painted a picture of the sea"),
    ("ride a bicycle", "rode into a hedge", "rode all the way to the village"),
    ("play the piano", "hit all the wrong notes", "played a waltz without a mistake"),
)
