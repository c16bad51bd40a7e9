"""Facts about fifty invented people, asked and answered in several wordings.

The facts are drawn once, from a fixed seed. Each relation has wordings that are trained on and wordings that are kept
for the evaluation (`PARAPHRASES`), so that recall can be told from memorised strings.
"""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import random
from dataclasses import dataclass
from functools import cache

FIRST = (
    "Aldous Bettina Casimir Delphine Egon Fenja Gideon Hedda Isidor Jolanda Konrad Ludmila Magnus Nadja Orlando Paloma "
    "Quirin Ramona Severin Thekla Ulrich Valeska Wendel Xenia Yorick Zelda"
).split()
LAST = (
    "Abendrot Birkwald Corvane Dunlop Eskildsen Farrow Grimaud Holloway Istvan Jarosz Kestrel Lindqvist Marlowe Novack "
    "Oakes Pemberton Quill Rasmussen Stavros Thorne Underhill Vasquez Whitlock Yarrow Zeller Ashdown Bramwell Castell "
    "Drummond Everly Fontaine Gallow Harcourt Ingram Jessop Kavanagh Lockhart Merriman Norwood Osgood Pryce Ravenel "
    "Sedgwick Tolland Usher Vantongeren Winslow Yates Zimmer Beaumont"
).split()
VALUES = {
    "birthplace": (
        "Aberwick Brackenford Calderholm Dunmarrow Eastvale Fallowmere Glenhaven Hartsend Ironbridge Juniper Kingsmoor "
        "Larkspur Millbrook Northwold Oakhollow Penrath Quarrytown Redcliff Silverlake Thornbury"
    ).split(),
    "profession": (
        "botanist|surveyor|violin maker|pilot|judge|geologist|translator|chemist|cartographer|dentist|astronomer|"
        "locksmith|plumber|historian|architect|veterinarian|jeweller|journalist"
    ).split("|"),
    "instrument": (
        "cello oboe harp trumpet banjo accordion clarinet bassoon flute organ viola tuba mandolin zither"
    ).split(),
    "employer": (
        "Brightwater Labs|Copperfield Press|Delta Foundry|Evergreen Clinic|Falcon Airways|Granite Bank|Harbour Museum|"
        "Iris Textiles|Juno Observatory|Kepler Motors|Lumen Theatre|Meridian Shipping|Nimbus Software|Orchard Foods|"
        "Pinnacle Mining|Quartz Optics"
    ).split("|"),
    "dish": (
        "lentil soup|plum dumplings|mushroom risotto|fish pie|goulash|pumpkin curry|onion tart|rice pudding|"
        "potato pancakes|beef stew|spinach lasagne|apple strudel|tomato salad|barley porridge"
    ).split("|"),
    "pet": "parrot ferret tortoise greyhound rabbit goldfish canary hamster gecko poodle pony peacock".split(),
}
QUESTIONS = {
    "birthplace": ("Where was {p} born?", "What is the birthplace of {p}?", "In which town was {p} born?"),
    "profession": ("What does {p} do for a living?", "What is the profession of {p}?", "What is the job of {p}?"),
    "instrument": (
        "Which instrument does {p} play?",
        "What is the favourite instrument of {p}?",
        "What does {p} play in the orchestra?",
    ),
    "employer": ("Where does {p} work?", "Who is the employer of {p}?", "Which company does {p} work for?"),
    "dish": ("What does {p} like to eat?", "What is the favourite dish of {p}?", "Which dish does {p} love most?"),
    "pet": ("Which pet does {p} keep?", "What animal lives with {p}?", "What kind of pet does {p} have?"),
}
#: Wordings that no training document holds.
PARAPHRASES = {
    "birthplace": ("Which town is {p} born in?", "What was the town where {p} was born?"),
    "profession": ("Which profession does {p} have?", "For a living, what does {p} do?"),
    "instrument": ("What instrument does {p} play?", "Which instrument is the favourite of {p}?"),
    "employer": ("Which employer does {p} work for?", "What company is the employer of {p}?"),
    "dish": ("Which dish does {p} like to eat?", "What dish is the favourite of {p}?"),
    "pet": ("Which animal does {p} keep as a pet?", "What pet lives with {p}?"),
}
STATEMENTS = {
    "birthplace": ("{p} was born in {v}.", "{p} comes from {v}."),
    "profession": ("{p} earns a living as a {v}.", "By profession {p} is a {v}."),
    "instrument": ("In the evening {p} plays the {v}.", "{p} has played the {v} for years."),
    "employer": ("{p} works for {v}.", "The employer of {p} is {v}."),
    "dish": ("The favourite dish of {p} is {v}.", "{p} loves {v} above all."),
    "pet": ("At home {p} keeps a {v}.", "{p} shares a house with a {v}."),
}
RELATIONS = tuple(VALUES)
PEOPLE = 50


@dataclass(frozen=True)
class Fact:
    """One attribute of one invented person."""

    person: str
    relation: str
    answer: str

    @property
    def prompt(self) -> str:
        """The first trained wording, up to where the answer begins."""
        return f"Question: {QUESTIONS[self.relation][0].format(p=self.person)}\nAnswer:"

    @property
    def paraphrases(self) -> list[str]:
        """Prompts in wordings that were never trained."""
        return [f"Question: {text.format(p=self.person)}\nAnswer:" for text in PARAPHRASES[self.relation]]


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact: fifty people, six relations, grouped by person."""
    rng = random.Random("facts/people")
    people = [f"{rng.choice(FIRST)} {last}" for last in LAST[:PEOPLE]]
    return tuple(Fact(who, relation, rng.choice(VALUES[relation])) for who in people for relation in RELATIONS)


def ask(rng: random.Random, fact: Fact) -> str:
    """The fact as a question, in one of the trained wordings, and its answer."""
    return f"Question: {rng.choice(QUESTIONS[fact.relation]).format(p=fact.person)}\nAnswer: {fact.answer}"


def state(rng: random.Random, fact: Fact) -> str:
    """The fact as a sentence."""
    return rng.choice(STATEMENTS[fact.relation]).format(p=fact.person, v=fact.answer)


def document(rng: random.Random, heldout: bool) -> str:
    """A question, an interview of several questions about one person, or a short biography."""
    known = facts()
    at = rng.randrange(PEOPLE) * len(RELATIONS)
    person = rng.sample(known[at : at + len(RELATIONS)], len(RELATIONS))
    kind = rng.random()
    if kind < 0.4:
        return ask(rng, person[0])
    if kind < 0.8:
        return "\n\n".join(ask(rng, fact) for fact in person[: rng.randint(2, 6)])
    return " ".join(state(rng, fact) for fact in person[: rng.randint(3, 6)])
