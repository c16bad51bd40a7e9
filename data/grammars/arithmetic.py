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
OPERATIONS = (2, 2, 3, 3, 3, 4)
#: Partial results stay between 0 and this.
LARGEST = 99

QUESTIONS = (
    "What is {e}?",
    "Compute {e}.",
    "Calculate {e}.",
    "How much is {e}?",
    "Please work out {e}.",
)
NAMES = "Ada Bea Carl Dora Emil Fay Gus Hans Ida Jon Kim Lea Max Nils Ora Pete Quin Rosa Sam Tess".split()
GOODS = "apples pears stamps marbles coins books cards shells pencils tickets eggs stones".split()


@dataclass(frozen=True)
class Problem:
    """A problem with its worked solution.

    Attributes:
        expression: The canonical expression, e.g. `7 + 15 * 3 - 4`.
        question: The question as it is asked.
        steps: Each step as `15 * 3 = 45`, products first, then from left to right.
        answer: The final number, as text.
    """

    expression: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        return f"{self.prompt} {THINK} {'; '.join(self.steps)} {END_THINK} {self.answer}"


def solve(numbers: list[int], operators: list[str]) -> tuple[list[str], int] | None:
    """Steps and result, products before sums, from left to right; None where a partial result leaves the range."""
    numbers, operators, steps = list(numbers), list(operators), []
    while operators:
        at = operators.index("*") if "*" in operators else 0
        left, operator, right = numbers[at], operators[at], numbers[at + 1]
        value = {"*": left * right, "+": left + right, "-": left - right}[operator]
        if not 0 <= value <= LARGEST:
            return None
        steps.append(f"{left} {operator} {right} = {value}")
        numbers[at : at + 2] = [value]
        del operators[at]
    return steps, numbers[0]


def is_heldout(expression: str) -> bool:
    """Whether an expression belongs to the held-out set; a matter of its text alone."""
    return hashlib.blake2b(expression.encode(), digest_size=4).digest()[0] % HELDOUT_SHARE == 0


def wording(rng: random.Random, numbers: list[int], operators: list[str], expression: str) -> str:
    """The question: the bare expression, or for `a + b * c` and `a - b * c` (and one more term) a small story."""
    story = operators[:2] in (["+", "*"], ["-", "*"]) and len(operators) <= 3 and operators[2:] != ["*"]
    if not story or rng.random() < 0.4:
        return rng.choice(QUESTIONS).format(e=expression)
    name, goods = rng.choice(NAMES), rng.choice(GOODS)
    move = "gets" if operators[0] == "+" else "gives away"
    parts = [f"{name} has {numbers[0]} {goods} and {move} {numbers[1]} bags of {numbers[2]}."]
    if len(operators) == 3:
        verb = "finds" if operators[2] == "+" else "loses"
        parts.append(f"Then {name} {verb} {numbers[3]}.")
    return " ".join([*parts, f"How many {goods} are there now?"])


def problem(rng: random.Random, heldout: bool) -> Problem:
    """One problem from the training or the held-out expressions."""
    while True:
        count = rng.choice(OPERATIONS)
        operators = [rng.choice("++-*") for _ in range(count)]
        numbers = [rng.randint(2, 60) for _ in range(count + 1)]
        for at, operator in enumerate(operators):
            if operator == "*":
                numbers[at], numbers[at + 1] = rng.randint(2, 9), rng.randint(2, 9)
        solved = solve(numbers, operators)
        expression = " ".join([str(numbers[0])] + [f"{o} {n}" for o, n in zip(operators, numbers[1:], strict=True)])
        if solved is not None and is_heldout(expression) == heldout:
            steps, value = solved
            return Problem(expression, wording(rng, numbers, operators, expression), tuple(steps), str(value))


def document(rng: random.Random, heldout: bool) -> str:
    """One to three problems; most documents hold one."""
    return "\n\n".join(problem(rng, heldout).text for _ in range(rng.choice((1, 1, 1, 2, 3))))
