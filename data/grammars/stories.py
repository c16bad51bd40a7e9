"""English stories: a character, a place, a wish, a trouble, a helper and an ending."""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import random

NAMES = (
    "Ada Alma Anton Arlo Bea Bruno Cleo Clara Dora Edith Elio Emil Felix Flora Gilda Greta Hanno Hazel Ida Ivor Jonas "
    "Juno Kai Lena Leo Lotte Mabel Maya Milo Mira Nell Nico Nora Oda Olga Oscar Otto Pia Pip Rosa Rufus Ruth Sami "
    "Selma Silas Tara Theo Tilda Tom Una Vera Viola Wanda Will Yara Zeno Zoe"
).split()
ANIMALS = (
    "fox hare owl badger heron otter mouse goose crow hedgehog donkey beaver squirrel frog goat wolf swan mole "
    "bear cat sparrow turtle"
).split()
ROLES = (
    "baker|miller|sailor|gardener|teacher|fisherman|shepherd|carpenter|weaver|painter|postman|doctor|farmer|tailor|"
    "clockmaker|singer|lighthouse keeper|librarian|blacksmith|beekeeper"
).split("|")
PLACES = (
    "forest|village|harbour|valley|castle|garden|market|mountain|island|meadow|mill|library|lighthouse|river|bridge|"
    "orchard|tower|cave|town square|old inn|railway station|vineyard|swamp|beach"
).split("|")
THINGS = (
    "lantern|silver key|map|violin|red kite|clock|wooden boat|letter|golden ring|basket|mirror|book|blue coat|compass|"
    "loaf of bread|music box|feather|glass bottle|ladder|drum|hat|bell|telescope|rope|candle|quilt|pocket knife|seed|"
    "painting|kettle|whistle|saddle"
).split("|")
ADJECTIVES = (
    "small old quiet bright lonely clever brave tired gentle curious proud hungry stubborn patient cheerful shy "
    "careful young lazy honest"
).split()
WEATHER = (
    "It was a cold morning|The rain had stopped|Snow lay on the roofs|A warm wind blew from the south|"
    "The fog was thick|The sun was already low|The night was full of stars|Thunder rolled over the hills|"
    "The first leaves were falling|It was the hottest day of the summer"
).split("|")
FEELINGS = "happy sad afraid surprised angry relieved worried calm proud ashamed grateful nervous".split()
MOVES = (
    "walked ran climbed crept hurried wandered travelled rode marched".split(),
    "through|past|over to|down to|all the way to|towards|away from|around".split("|"),
)
FINDS = "found lost saw carried hid broke borrowed repaired sold dropped remembered opened".split()
TIMES = (
    "The next day|In the evening|Before sunrise|After a long while|At noon|That night|A week later|Soon|At last|"
    "When the bells rang|On the third day|Without a word"
).split("|")
SAYINGS = (
    "I will help you|We must not give up|Nobody has ever seen it|You can have mine|Please wait for me|"
    "It was here all the time|I never believed the stories|Look at the sky|There is no time to lose|"
    "This belongs to my mother|Follow the river and do not turn back|I am not afraid of the dark|"
    "You should have asked me first|The door is never locked"
).split("|")
SPEAK = "said whispered answered cried asked murmured laughed shouted".split()
REASONS = (
    "because winter was coming|because nobody else would do it|although it was late|while the others were asleep|"
    "so that the children could see it|but the road was closed|and the whole village heard of it|"
    "even though the bridge was broken|because a promise is a promise|until the light went out"
).split("|")
ENDINGS = (
    "From that day on, {n} and {f} were the best of friends.|And {n} never went to the {p} alone again.|"
    "The {t} still hangs above the door of the {r}.|So {n} came home, {a} but {e}.|"
    "If you visit the {p} today, you can still hear the song of the {m}.|"
    "{n} kept the {t} for a whole life, and told this story every winter.|"
    "And that is how the {p} got its name.|Nobody ever spoke of the {t} again."
).split("|")


def article(phrase: str) -> str:
    """The phrase behind its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def event(rng: random.Random, who: str, friend: str, thing: str, place: str) -> str:
    """One or two sentences that move the story on."""
    kind = rng.randrange(7)
    if kind == 0:
        verb, way = rng.choice(MOVES[0]), rng.choice(MOVES[1])
        return f"{rng.choice(TIMES)} {who} {verb} {way} the {rng.choice(PLACES)}, {rng.choice(REASONS)}."
    if kind == 1:
        return f'"{rng.choice(SAYINGS)}," {rng.choice(SPEAK)} {friend}. {who} was {rng.choice(FEELINGS)}.'
    if kind == 2:
        other = rng.choice(THINGS)
        return f"{rng.choice(TIMES)} {friend} {rng.choice(FINDS)} {article(other)} near the {place}."
    if kind == 3:
        return f"{who} {rng.choice(FINDS)} the {thing} {rng.choice(REASONS)}."
    if kind == 4:
        return f"{rng.choice(WEATHER)}, and {who} felt {rng.choice(FEELINGS)} and {rng.choice(FEELINGS)}."
    if kind == 5:
        animal = rng.choice(ANIMALS)
        tail = f"The {animal} looked at the {thing}" if rng.random() < 0.5 else f"The {animal} only shook its head"
        return f"There sat {article(rng.choice(ADJECTIVES))} {animal}. {tail}."
    return f'"Where is the {thing}?" {rng.choice(SPEAK)} {who}. "{rng.choice(SAYINGS)}," {rng.choice(SPEAK)} {friend}.'


def document(rng: random.Random, heldout: bool) -> str:
    """One story of two to five paragraphs."""
    name, friend = rng.sample(NAMES, 2)
    thing, place, role = rng.choice(THINGS), rng.choice(PLACES), rng.choice(ROLES)
    animal, adjective = rng.choice(ANIMALS), rng.choice(ADJECTIVES)
    opening = rng.choice(
        (
            f"Once upon a time there was {article(adjective)} {role} called {name} who lived near the {place}.",
            f"{name} was {article(adjective)} {role}, and everyone at the {place} knew it.",
            f"{rng.choice(WEATHER)} when {name}, the {adjective} {role}, came to the {place}.",
            f"Long ago, {article(adjective)} {animal} and {article(role)} named {name} shared a house by the {place}.",
        )
    )
    wish = rng.choice(
        (
            f"More than anything, {name} wanted {article(thing)}.",
            f"One day the {thing} of the {role} was gone.",
            f"{name} owned nothing but {article(thing)} and {article(rng.choice(THINGS))}.",
            f"Every evening {friend} came by and asked about the {thing}.",
        )
    )
    paragraphs = [f"{opening} {wish}"]
    for _ in range(rng.choice((1, 2, 2, 3, 4))):
        paragraphs.append(" ".join(event(rng, name, friend, thing, place) for _ in range(rng.randint(2, 3))))
    fields = {"n": name, "f": friend, "p": place, "t": thing, "r": role, "a": adjective, "m": animal}
    paragraphs[-1] += " " + rng.choice(ENDINGS).format(e=rng.choice(FEELINGS), **fields)
    return "\n".join(paragraphs)
