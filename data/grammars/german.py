"""German notes and tales, with gender, case and adjective endings that agree."""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import random

NAMES = (
    "Anke Bernd Birgit Detlef Dieter Elke Frauke Gerd Gisela Günter Hanna Heike Heinz Ilse Ingrid Jürgen Jutta Karin "
    "Klaus Lutz Manfred Marlies Matthias Monika Petra Rainer Renate Sabine Sören Tobias Ulrike Uwe Volker Werner Wiebke"
).split()
# Gender by the article of the nominative.
NOUNS = {
    "der": (
        "Garten Hund Apfel Brief Tisch Wald Berg Fluss Schlüssel Mantel Zug Turm Stuhl Vogel Markt Kuchen Hafen Löffel "
        "Koffer Regenschirm Lehrer Bäcker"
    ).split(),
    "die": (
        "Katze Brücke Straße Lampe Uhr Küche Kirche Tür Blume Stadt Mühle Zeitung Suppe Tasche Wiese Nachbarin Ärztin "
        "Treppe Geige Bäckerei Flasche Jacke"
    ).split(),
    "das": (
        "Haus Buch Fenster Fahrrad Kind Brot Dorf Schiff Pferd Glas Zimmer Messer Boot Bild Feuer Tuch Lied Mädchen "
        "Krankenhaus Rathaus Geschenk"
    ).split(),
}
GENDERS = tuple(NOUNS)
ADJECTIVES = (
    "alt neu klein groß schön kalt warm dunkel lang kurz leer schwer leicht rot blau grün still müde freundlich fremd"
).split()
DEFINITE = {
    "nominative": {"der": "der", "die": "die", "das": "das"},
    "accusative": {"der": "den", "die": "die", "das": "das"},
    "dative": {"der": "dem", "die": "der", "das": "dem"},
}
INDEFINITE = {
    "nominative": {"der": "ein", "die": "eine", "das": "ein"},
    "accusative": {"der": "einen", "die": "eine", "das": "ein"},
    "dative": {"der": "einem", "die": "einer", "das": "einem"},
}
WEAK = {"nominative": dict.fromkeys(GENDERS, "e"), "dative": dict.fromkeys(GENDERS, "en")}
WEAK["accusative"] = {"der": "en", "die": "e", "das": "e"}
MIXED = {"nominative": {"der": "er", "die": "e", "das": "es"}, "dative": dict.fromkeys(GENDERS, "en")}
MIXED["accusative"] = {"der": "en", "die": "e", "das": "es"}
TRANSITIVE = (
    "sieht sucht findet kauft verkauft trägt malt vergisst öffnet holt bringt bezahlt zeichnet putzt verliert".split()
)
PLACED = "auf unter hinter neben vor in über".split()
TIMES = (
    "heute|am Morgen|am Abend|jeden Tag|gestern Nacht|im Winter|im Sommer|nach dem Essen|um acht Uhr|am Sonntag|"
    "vor langer Zeit|bald|manchmal|zum Glück|leider|plötzlich"
).split("|")
CLAUSES = (
    "weil es draußen regnet|obwohl niemand zu Hause ist|damit die Kinder schlafen können|bevor der Zug abfährt|"
    "wenn die Sonne scheint|weil das Geld nicht reicht|während die anderen tanzen|bis es dunkel wird|"
    "als ob nichts geschehen wäre|sobald der Schnee schmilzt"
).split("|")
SPEECH = (
    "Das habe ich nicht gewusst|Wir müssen jetzt gehen|Hast du den Arzt gerufen|Morgen wird alles besser|"
    "Ich möchte nach Hause|Niemand darf davon erfahren|Wo bist du gewesen|Es ist noch nicht zu spät|"
    "Bitte mach die Tür zu|So etwas habe ich noch nie gesehen"
).split("|")
SAYS = "sagt fragt ruft flüstert antwortet meint".split()


def adjective(stem: str, ending: str) -> str:
    """An inflected adjective; `dunkel` drops its e, as it must."""
    return ("dunkl" if stem == "dunkel" else stem) + ending


def noun(rng: random.Random, case: str) -> str:
    """A noun phrase in `case`: article, often an adjective, noun."""
    gender = rng.choice(GENDERS)
    word = rng.choice(NOUNS[gender])
    definite = rng.random() < 0.55
    article = (DEFINITE if definite else INDEFINITE)[case][gender]
    if rng.random() < 0.5:
        ending = (WEAK if definite else MIXED)[case][gender]
        return f"{article} {adjective(rng.choice(ADJECTIVES), ending)} {word}"
    return f"{article} {word}"


def capital(text: str) -> str:
    """The text with a capital first letter (and the rest as it is)."""
    return text[0].upper() + text[1:]


def sentence(rng: random.Random, name: str, other: str) -> str:
    """One German main clause, at times with a subordinate clause; the verb stands second."""
    kind = rng.randrange(7)
    time = rng.choice(TIMES)
    if kind == 0:
        return f"{capital(time)} {rng.choice(TRANSITIVE)} {name} {noun(rng, 'accusative')}, {rng.choice(CLAUSES)}."
    if kind == 1:
        place = f"{rng.choice(PLACED)} {noun(rng, 'dative')}"
        return f"{capital(noun(rng, 'nominative'))} steht {place}."
    if kind == 2:
        return f"{name} gibt {noun(rng, 'dative')} {noun(rng, 'accusative')}."
    if kind == 3:
        return f"„{rng.choice(SPEECH)}“, {rng.choice(SAYS)} {other}."
    if kind == 4:
        return f"{capital(time)} ist {noun(rng, 'nominative')} {rng.choice(ADJECTIVES)}, aber {name} bleibt ruhig."
    if kind == 5:
        return f"{name} und {other} gehen {time} mit {noun(rng, 'dative')} spazieren, {rng.choice(CLAUSES)}."
    return f"{capital(noun(rng, 'nominative'))} {rng.choice(TRANSITIVE)} {noun(rng, 'accusative')}."


def document(rng: random.Random, heldout: bool) -> str:
    """A short German text of one to three paragraphs, at times as a letter."""
    name, other = rng.sample(NAMES, 2)
    paragraphs = [
        " ".join(sentence(rng, name, other) for _ in range(rng.randint(3, 5))) for _ in range(rng.randint(1, 3))
    ]
    if rng.random() < 0.25:
        return f"Hallo {other},\n" + "\n".join(paragraphs) + f"\nViele Grüße\n{name}"
    return "\n".join(paragraphs)
