"""Python: small functions, classes and scripts that compile."""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import random

NOUNS = (
    "item row node user order price score line word token path file page record event job task edge layer color point "
    "group cell frame packet ticket match city"
).split()
VERBS = "load parse count filter merge build find update check collect format compute read select scale render".split()
MODULES = "json math os re sys time random itertools collections pathlib logging csv".split()
CLASSES = (
    "Queue Cache Reader Writer Parser Counter Graph Table Stack Matrix Account Timer Buffer Index Registry".split()
)
ERRORS = "ValueError KeyError TypeError RuntimeError IndexError FileNotFoundError".split()
OPERATORS = "+ - * // %".split()
COMPARE = "< > <= >= == !=".split()
TYPES = "int str float bool list dict bytes".split()
DOCS = (
    "Return the {n}s in order.|Count every {n} once.|{v} all {n}s of the list.|Raise if the {n} is missing.|"
    "Keep the largest {n}.|This is slow for many {n}s.|Both {n}s must have the same size."
).split("|")


def comprehension(rng: random.Random, noun: str, source: str) -> str:
    """A list, set or dict comprehension over `source`."""
    x = noun[0]
    test = f"{x} {rng.choice(COMPARE)} {rng.randint(0, 99)}"
    return rng.choice(
        (
            f"[{x} for {x} in {source} if {test}]",
            f"[{x} {rng.choice(OPERATORS)} {rng.randint(1, 9)} for {x} in {source}]",
            f"{{{x}: i for i, {x} in enumerate({source})}}",
            f"sum({x} for {x} in {source} if {test})",
            f"sorted({source}, key=lambda {x}: -{x})",
            f"any({test} for {x} in {source})",
        )
    )


def loop(rng: random.Random, noun: str, source: str, result: str, indent: str) -> list[str]:
    """Lines that fold `source` into `result`."""
    kind = rng.randrange(5)
    if kind == 0:
        start = rng.choice(("0", "1"))
        return [
            f"{indent}{result} = {start}",
            f"{indent}for {noun} in {source}:",
            f"{indent}    if {noun} {rng.choice(COMPARE)} {rng.randint(0, 99)}:",
            f"{indent}        {result} {rng.choice(OPERATORS)}= {noun}",
        ]
    if kind == 1:
        return [
            f"{indent}{result} = []",
            f"{indent}for i, {noun} in enumerate({source}):",
            f"{indent}    if i % {rng.randint(2, 9)} == {rng.randint(0, 1)}:",
            f"{indent}        continue",
            f"{indent}    {result}.append({noun})",
        ]
    if kind == 2:
        return [
            f"{indent}{result} = {{}}",
            f"{indent}for {noun} in {source}:",
            f"{indent}    {result}[{noun}] = {result}.get({noun}, 0) + 1",
        ]
    if kind == 3:
        return [
            f"{indent}{result} = None",
            f"{indent}while {source}:",
            f"{indent}    {noun} = {source}.pop()",
            f"{indent}    if {result} is None or {noun} {rng.choice('<>')} {result}:",
            f"{indent}        {result} = {noun}",
        ]
    return [f"{indent}{result} = {comprehension(rng, noun, source)}"]


def function(rng: random.Random, indent: str = "", method: bool = False) -> list[str]:
    """A function or a method with its body."""
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    source = f"{noun}s"
    result = rng.choice(("result", "total", "out", "best", "found"))
    typed = rng.random() < 0.4
    arguments = [f"{source}: list[{rng.choice(TYPES)}]" if typed else source]
    if rng.random() < 0.4:
        arguments.append(f"limit={rng.randint(1, 200)}" if not typed else f"limit: int = {rng.randint(1, 200)}")
    if method:
        arguments.insert(0, "self")
    inner = indent + "    "
    lines = [f"{indent}def {verb}_{noun}s({', '.join(arguments)}){' -> ' + rng.choice(TYPES) if typed else ''}:"]
    if rng.random() < 0.6:
        text = rng.choice(DOCS).format(n=noun, v=verb.capitalize())
        lines.append(f'{inner}"""{text}"""')
    if rng.random() < 0.4:
        lines += [
            f"{inner}if not {source}:",
            f'{inner}    raise {rng.choice(ERRORS)}("no {source} to {verb}")',
        ]
    lines += loop(rng, noun, source, result, inner)
    tail = f"{result}" if rng.random() < 0.7 else f"{result}, len({source})"
    lines.append(f"{inner}return {tail}")
    return lines


def klass(rng: random.Random) -> list[str]:
    """A class with a constructor and one or two methods."""
    name, noun = rng.choice(NOUNS).capitalize() + rng.choice(CLASSES), rng.choice(NOUNS)
    size = rng.randint(1, 500)
    lines = [f"class {name}:", f"    def __init__(self, {noun}s, size={size}):"]
    lines += [f"        self.{noun}s = list({noun}s)", "        self.size = size", ""]
    for _ in range(rng.randint(1, 2)):
        lines += [*function(rng, "    ", method=True), ""]
    lines += ["    def __len__(self):", f"        return len(self.{noun}s)"]
    return lines


def script(rng: random.Random) -> list[str]:
    """A few lines at top level: a file read under error handling."""
    noun, verb = rng.choice(NOUNS), rng.choice(VERBS)
    return [
        "try:",
        f'    with open("{noun}s.txt") as handle:',
        f"        {noun}s = [line.strip() for line in handle]",
        f"except {rng.choice(ERRORS)} as error:",
        f'    print(f"cannot {verb} {noun}s: {{error}}")',
        f"    {noun}s = []",
        f"print({comprehension(rng, noun, noun + 's')})",
    ]


def document(rng: random.Random, heldout: bool) -> str:
    """A small module: imports, then one or two definitions."""
    parts = []
    if rng.random() < 0.7:
        parts.append([f"import {name}" for name in sorted(rng.sample(MODULES, rng.randint(1, 3)))])
    for _ in range(rng.randint(1, 2)):
        parts.append(rng.choice((function, function, klass, script))(rng))
    return "\n\n".join("\n".join(part) for part in parts)
