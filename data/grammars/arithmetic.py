"""Multi-step arithmetic, worked through inside `<think> … </think>` and then answered.

A problem belongs to the held-out set by a digest of its expression, so that no held-out expression is ever trained on,
in any wording.
"""
# ruff: noqa: SIM905 (word lists are easier to read and to edit as text)

import hashlib
import random
from dataclasses import dataclass

THINK, END_THINK = "<think>", "</think>"
#: One expression in this many is held out.
HELDOUT_SHARE = 8
#: Numbers of operations, as often as they stand here.
OPERATIONS = (2, 2, 3, 3, 4)


@dataclass(frozen=True)
class Level:
    """How hard a problem is: numbers up to `operand`, the first up to `first`, no total above `total`."""

    first: int
    operand: int
    total: int


LEVELS = {"easy": Level(9, 9, 20), "medium": Level(60, 9, 99), "hard": Level(60, 40, 99)}
#: Levels in documents, as often as they stand here.
MIXTURE = ("easy",) * 7 + ("medium",) * 2 + ("hard",)
#: Levels among the problems of the evaluation: all alike, so that steering can move the score both ways.
TEST_MIXTURE = ("easy", "medium", "hard")

QUESTIONS = ("What is {e}?", "Compute {e}.", "Calculate {e}.")
#: Share of problems told as a story.
STORIES = 0.25
NAMES = "Ada Bea Carl Dora Emil Fay Gus Hans Ida Jon Kim Lea Max Nils Ora Pete Quin Rosa Sam Tess".split()
GOODS = "apples pears stamps marbles coins books cards shells pencils tickets eggs stones".split()


@dataclass(frozen=True)
class Problem:
    """A problem with its worked solution.

    Attributes:
        expression: The canonical expression, e.g. `7 * 3 + 15 - 4`.
        question: The question as it is asked.
        steps: Each step as `15 + 3 = 18`, from left to right.
        answer: The final number, as text.
        level: A key of `LEVELS`.
    """

    expression: str
    question: str
    steps: tuple[str, ...]
    answer: str
    level: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        return f"{self.prompt} {THINK} {'; '.join(self.steps)} {END_THINK} {self.answer}"


def solve(numbers: list[int], operators: list[str], largest: int) -> tuple[list[str], int] | None:
    """Steps and result from left to right; None where a total leaves 0 to `largest`."""
    total, steps = numbers[0], []
    for operator, number in zip(operators, numbers[1:], strict=True):
        value = {"*": total * number, "+": total + number, "-": total - number}[operator]
        if not 0 <= value <= largest:
            return None
        steps.append(f"{total} {operator} {number} = {value}")
        total = value
    return steps, total


def is_heldout(expression: str) -> bool:
    """Whether an expression belongs to the held-out set; a matter of its text alone."""
    return hashlib.blake2b(expression.encode(), digest_size=4).digest()[0] % HELDOUT_SHARE == 0


def wording(rng: random.Random, numbers: list[int], operators: list[str], expression: str) -> str:
    """The question: the bare expression, or a small story that tells it in the same order."""
    if rng.random() >= STORIES:
        return rng.choice(QUESTIONS).format(e=expression)
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    told = list(zip(operators, numbers[1:], strict=True))
    if operators[0] == "*":
        begin = f"{name} has {numbers[0]} bags of {numbers[1]} {goods}"
        told = told[1:]
    else:
        begin = f"{name} has {numbers[0]} {goods}"
    moves = [f"{'finds' if operator == '+' else 'loses'} {number}" for operator, number in told]
    return f"{begin}, {' and '.join(moves)}. How many {goods} are there now?"


def problem(rng: random.Random, heldout: bool, levels: tuple[str, ...] = MIXTURE) -> Problem:
    """One problem from the training or the held-out expressions; a product can only stand first."""
    while True:
        name = rng.choice(levels)
        level = LEVELS[name]
        count = rng.choice(OPERATIONS)
        operators = [rng.choice("+-") for _ in range(count)]
        numbers = [rng.randint(1, level.first)] + [rng.randint(1, level.operand) for _ in range(count)]
        if rng.random() < 0.3:
            operators[0] = "*"
            numbers[:2] = [rng.randint(2, 9), rng.randint(2, 9)]
        solved = solve(numbers, operators, level.total)
        expression = " ".join([str(numbers[0])] + [f"{o} {n}" for o, n in zip(operators, numbers[1:], strict=True)])
        if solved is not None and is_heldout(expression) == heldout:
            steps, value = solved
            return Problem(expression, wording(rng, numbers, operators, expression), tuple(steps), str(value), name)


def document(rng: random.Random, heldout: bool) -> str:
    """One to four problems."""
    return "\n\n".join(problem(rng, heldout).text for _ in range(rng.choice((1, 1, 2, 3, 4))))
