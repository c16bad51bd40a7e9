"""Spanish travel notes, with articles and adjectives that agree in gender."""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import random

NAMES = (
    "Alicia Álvaro Andrés Beatriz Begoña Carlos Carmen Diego Elena Esteban Gonzalo Inés Íñigo Javier Jimena Julián "
    "Lucía Manuel Marta Mercedes Nuria Pablo Pilar Ramón Raquel Rocío Rodrigo Sofía Teresa Xavier"
).split()
TOWNS = "Sevilla Bilbao Cuenca Toledo Lugo Cádiz Huesca León Soria Murcia Zamora Girona Ronda Teruel Vigo".split()
MASCULINE = (
    "mercado puente barco tren camino perro libro jardín castillo río sombrero vaso pueblo reloj mapa piano caballo "
    "cuadro horno cuaderno"
).split()
FEMININE = (
    "plaza playa iglesia casa calle montaña guitarra ventana mesa carta naranja torre fuente puerta maleta biblioteca "
    "lámpara escalera panadería bicicleta"
).split()
# Masculine, feminine.
ADJECTIVES = tuple(
    tuple(pair.split("/"))
    for pair in (
        "viejo/vieja nuevo/nueva pequeño/pequeña blanco/blanca rojo/roja tranquilo/tranquila hermoso/hermosa "
        "largo/larga oscuro/oscura antiguo/antigua estrecho/estrecha grande/grande azul/azul verde/verde triste/triste "
        "vacío/vacía"
    ).split()
)
VERBS = "busca encuentra compra mira dibuja olvida vende recuerda abre cierra prefiere visita pinta describe".split()
PLACES = "cerca de|detrás de|delante de|lejos de|al lado de|enfrente de".split("|")
TIMES = (
    "Por la mañana|Al mediodía|Por la noche|Todos los días|El domingo|Después de comer|A las cinco|De repente|"
    "Hace muchos años|En verano|Durante el viaje|Antes de salir"
).split("|")
CLAUSES = (
    "porque hace mucho calor|aunque no tiene dinero|mientras los niños juegan|cuando sale el sol|para no llegar tarde|"
    "porque el autobús no llega|si no llueve demasiado|sin decir nada a nadie|hasta que cierra el bar|"
    "como si fuera la primera vez"
).split("|")
SPEECH = (
    "¿Dónde está la estación?|¡Qué sorpresa!|No me acuerdo de nada.|¿Cuánto cuesta?|Mañana será otro día.|"
    "¡Vamos a la playa!|Nunca he estado aquí.|¿Quién ha cerrado la puerta?|Te lo dije ayer.|Ya no queda pan."
).split("|")


def noun(rng: random.Random, preposition: str = "") -> str:
    """A noun phrase, its article contracted with `de` or `a` where Spanish wants it."""
    feminine = rng.random() < 0.5
    word = rng.choice(FEMININE if feminine else MASCULINE)
    definite = rng.random() < 0.6
    article = (("el", "la") if definite else ("un", "una"))[feminine]
    phrase = f"{article} {word}"
    if rng.random() < 0.55:
        phrase += f" {rng.choice(ADJECTIVES)[feminine]}"
    if not preposition:
        return phrase
    if phrase.startswith("el ") and preposition.endswith("de"):
        return f"{preposition[:-2]}del {phrase[3:]}"
    return f"{preposition} {phrase}"


def sentence(rng: random.Random, name: str, other: str) -> str:
    """One Spanish sentence."""
    kind = rng.randrange(6)
    if kind == 0:
        return f"{rng.choice(TIMES)} {name} {rng.choice(VERBS)} {noun(rng)}, {rng.choice(CLAUSES)}."
    if kind == 1:
        subject = noun(rng)
        return f"{subject[0].upper()}{subject[1:]} está {noun(rng, rng.choice(PLACES))}."
    if kind == 2:
        return f"{other} pregunta: «{rng.choice(SPEECH)}»"
    if kind == 3:
        return f"A {name} le gusta {noun(rng)} y también {noun(rng)}."
    if kind == 4:
        return f"{rng.choice(TIMES)}, {name} y {other} viajan a {rng.choice(TOWNS)}, {rng.choice(CLAUSES)}."
    return f"{name} {rng.choice(VERBS)} {noun(rng)} {noun(rng, rng.choice(PLACES))}."


def document(rng: random.Random, heldout: bool) -> str:
    """Travel notes of one to three paragraphs, often under a place and a date."""
    name, other = rng.sample(NAMES, 2)
    body = "\n".join(
        " ".join(sentence(rng, name, other) for _ in range(rng.randint(3, 5))) for _ in range(rng.randint(1, 3))
    )
    if rng.random() < 0.4:
        month = rng.choice("enero marzo abril mayo junio julio septiembre octubre noviembre".split())
        return f"{rng.choice(TOWNS)}, {rng.randint(1, 30)} de {month}\n{body}"
    return body
