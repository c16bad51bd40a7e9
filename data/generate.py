"""Writes the corpus: every document is drawn from its own seed, so the same call gives the same bytes anywhere.

`python -m moescope.data.generate --out DIR` writes the four files that are shipped in `data/corpus`.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from .grammars import arithmetic, facts, german, python_code, records, spanish, stories

#: A domain's grammar draws one document; its second argument asks for held-out material.
GRAMMARS: dict[str, Callable[[random.Random, bool], str]] = {
    "stories": stories.document,
    "german": german.document,
    "spanish": spanish.document,
    "python": python_code.document,
    "records": records.document,
    "arithmetic": arithmetic.document,
    "facts": facts.document,
}
DOMAINS = tuple(GRAMMARS)
#: Documents per domain in the shipped corpus: about 10,000 tokens each.
DEMO = {
    "stories": 80,
    "german": 90,
    "spanish": 100,
    "python": 80,
    "records": 70,
    "arithmetic": 140,
    "facts": 160,
}
RETAIN_PER_DOMAIN = 40
ARITHMETIC_PROBLEMS = 300


@dataclass(frozen=True)
class Document:
    """A text with its domain and a name that tells the draw it came from."""

    text: str
    domain: str
    id: str


def document(domain: str, split: str, number: int) -> Document:
    """Draws one document.

    Args:
        domain: One of `DOMAINS`.
        split: `train`, or any other name: every other split is drawn from held-out material under its own seeds.
        number: The draw, from 0.
    """
    name = f"{domain}-{split}-{number}"
    return Document(GRAMMARS[domain](random.Random(name), split != "train"), domain, name)


def documents(domain: str, split: str, number: int) -> Iterator[Document]:
    """The first `number` documents of a split."""
    return (document(domain, split, at) for at in range(number))


def demo_corpus() -> list[dict]:
    """The shipped corpus: held-out documents of every domain (the facts are those that were trained)."""
    return [vars(d) for domain, number in DEMO.items() for d in documents(domain, "demo", number)]


def retain_set() -> list[dict]:
    """Held-out documents of every domain but the facts, none of them in `demo_corpus`."""
    shown = {row["text"] for row in demo_corpus()}
    names = [name for name in DOMAINS if name != "facts"]
    found: list[dict] = []
    for name in names:
        drawn = (document(name, "retain", at) for at in count())
        found += [vars(d) for d in islice((d for d in drawn if d.text not in shown), RETAIN_PER_DOMAIN)]
    return found


def fact_set() -> list[dict]:
    """Every fact as prompt and answer, with prompts in wordings that were never trained."""
    return [
        {
            "prompt": fact.prompt,
            "answer": fact.answer,
            "text": f"{fact.prompt} {fact.answer}",
            "person": fact.person,
            "relation": fact.relation,
            "paraphrases": fact.paraphrases,
        }
        for fact in facts.facts()
    ]


def arithmetic_set() -> list[dict]:
    """Distinct held-out problems."""
    found: dict[str, dict] = {}
    number = 0
    while len(found) < ARITHMETIC_PROBLEMS:
        p = arithmetic.problem(random.Random(f"arithmetic-test-{number}"), True, arithmetic.TEST_MIXTURE)
        number += 1
        row = {"prompt": p.prompt, "answer": p.answer, "text": p.text, "expression": p.expression}
        found.setdefault(p.expression, {**row, "steps": len(p.steps), "level": p.level})
    return list(found.values())


FILES: dict[str, Callable[[], list[dict]]] = {
    "demo.jsonl": demo_corpus,
    "facts.jsonl": fact_set,
    "retain.jsonl": retain_set,
    "arithmetic.jsonl": arithmetic_set,
}


def jsonl(rows: list[dict]) -> bytes:
    """Rows as UTF-8 JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main(arguments: list[str] | None = None) -> None:
    """Writes the shipped files into a folder."""
    parser = argparse.ArgumentParser(prog="python -m moescope.data.generate", description="Write the bundled corpus.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the four JSONL files into")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in FILES.items():
        found = rows()
        content = jsonl(found)
        (out / name).write_bytes(content)
        print(f"{out / name}: {len(found):,} lines, {len(content):,} bytes")


if __name__ == "__main__":
    main()
