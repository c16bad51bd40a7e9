"""Structured data: JSON, CSV and YAML records of orders, sensors, members and books, always well formed."""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import json
import random

CITIES = "Oslo Riga Turin Porto Ghent Lyon Graz Brno Bergen Tartu Cork Malmo Varna Split Nantes Bristol".split()
GOODS = "bolt hinge lamp chair cable mirror filter valve sensor pump brush drill panel wheel spring bracket".split()
STATUS = "open paid shipped cancelled returned pending".split()
UNITS = {"temperature": "C", "pressure": "hPa", "humidity": "%", "voltage": "V", "flow": "l/min", "power": "kW"}
FIRST = "ana ben cara dan eva finn gwen hugo iris jan kim luc max nina omar paul rita sven tess ugo vic wim".split()
TITLES = "Salt|Night Trains|The Glass Hill|Letters Home|A Short Winter|North of Here|Blue Hour|Paper Boats".split("|")
TAGS = "new sale fragile bulk export gift heavy spare urgent sample".split()


def day(rng: random.Random) -> str:
    """A date in ISO form."""
    return f"20{rng.randint(18, 26)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def order(rng: random.Random) -> dict:
    """An order with its lines' total left to the reader."""
    return {
        "order": rng.randint(1000, 9999),
        "date": day(rng),
        "city": rng.choice(CITIES),
        "item": rng.choice(GOODS),
        "quantity": rng.randint(1, 40),
        "price": rng.randint(100, 9999) / 100,
        "status": rng.choice(STATUS),
    }


def reading(rng: random.Random) -> dict:
    """One reading of a sensor."""
    kind = rng.choice(tuple(UNITS))
    return {
        "sensor": f"{kind[:2]}-{rng.randint(10, 99)}",
        "time": f"{day(rng)}T{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:00Z",
        "kind": kind,
        "value": rng.randint(0, 2000) / 10,
        "unit": UNITS[kind],
        "ok": rng.random() < 0.9,
    }


def member(rng: random.Random) -> dict:
    """A member of some club."""
    name = rng.choice(FIRST)
    return {
        "id": rng.randint(100, 999),
        "user": name,
        "email": f"{name}{rng.randint(1, 99)}@example.org",
        "city": rng.choice(CITIES),
        "joined": day(rng),
        "active": rng.random() < 0.7,
    }


def book(rng: random.Random) -> dict:
    """A book in a catalogue."""
    return {
        "title": rng.choice(TITLES),
        "year": rng.randint(1900, 2025),
        "pages": rng.randint(80, 900),
        "copies": rng.randint(0, 9),
        "shelf": f"{rng.choice('ABCDEF')}{rng.randint(1, 30)}",
    }


def as_csv(rows: list[dict]) -> str:
    """Rows under a header line."""
    lines = [",".join(rows[0])]
    lines += [",".join(json.dumps(v) if isinstance(v, bool) else str(v) for v in row.values()) for row in rows]
    return "\n".join(lines)


def as_yaml(rng: random.Random, kind: str, rows: list[dict]) -> str:
    """Rows as a YAML list under a small header; dates and times are quoted, so that they stay strings."""
    lines = [f"version: {rng.randint(1, 4)}", f"{kind}s:"]
    for row in rows:
        for i, (key, value) in enumerate(row.items()):
            text = json.dumps(value) if isinstance(value, bool) or key in ("date", "time", "joined", "unit") else value
            lines.append(("  - " if i == 0 else "    ") + f"{key}: {text}")
        if rng.random() < 0.4:
            lines.append("    tags: [" + ", ".join(rng.sample(TAGS, rng.randint(1, 3))) + "]")
    return "\n".join(lines)


def document(rng: random.Random, heldout: bool) -> str:
    """A file of two to six records of one kind, as JSON, JSON lines, CSV or YAML."""
    make = rng.choice((order, reading, member, book))
    shape = rng.randrange(4)
    if shape == 0:
        count = rng.randint(1, 2)
        body = {make.__name__ + "s": [make(rng) for _ in range(count)], "count": count, "page": rng.randint(1, 9)}
        return json.dumps(body, indent=2)
    rows = [make(rng) for _ in range(rng.randint(2, 5))]
    if shape == 1:
        return "\n".join(json.dumps(row) for row in rows[:4])
    if shape == 2:
        return as_csv(rows + [make(rng) for _ in range(2)])
    return as_yaml(rng, make.__name__, rows[:3])
