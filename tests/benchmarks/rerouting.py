"""What rerouting at test time (R2-T2) does to answers: a small sample of arithmetic problems, with intervals.

The first 100 problems are references, the last 40 are asked: plainly, with their routing moved toward the nearest
references that were answered correctly, and toward random ones. Both objectives, the paper's numbers.

`python -m tests.benchmarks.rerouting` writes the results file (many minutes); busy machines give the same numbers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import moescope as ms
from moescope import decoding
from moescope.analysis import table
from moescope.data import ARITHMETIC
from tests.benchmarks.answers import MOST

RESULTS = Path(__file__).with_name("rerouting.json")
REFERENCES, ASKED = 100, 40
OBJECTIVES: tuple[Literal["answers", "routing"], ...] = ("routing", "answers")


def main() -> None:
    """Run all problems, print and write the results file."""
    model = ms.load("tiny-qwen-moe")
    problems = decoding.read_problems(ARITHMETIC)
    rerouter = decoding.Rerouter(model, problems[:REFERENCES], after="</think>", max_new_tokens=MOST)
    found: dict[str, Any] = {}
    for objective in OBJECTIVES:
        rerouter.objective = objective
        result = decoding.judge(rerouter, problems[-ASKED:], after="</think>", max_new_tokens=MOST)
        found[objective] = {row.pop("decoding"): row for row in table(result).to_dict("records")}
        found[objective]["plain"] = {
            key: value for key, value in found[objective]["plain"].items() if value == value
        }  # nothing was moved: no such numbers
        print(f"{objective}: {found[objective]}", file=sys.stderr, flush=True)
    results = {
        "model": "tiny-qwen-moe", "asked": ASKED, "references": REFERENCES,
        "references answered correctly": len(rerouter.known), "neighbours": rerouter.neighbours,
        "steps": rerouter.steps, "rate": rerouter.rate, "objective": found,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
