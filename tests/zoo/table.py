"""What capture makes of every family of the zoo, as rows: for `moescope doctor --zoo` and the README.

`python -m tests.zoo.table` writes the README's table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moescope.errors import RefusedError
from moescope.hooks import Model, wrap
from tests import readme

from .building import build
from .families import ZOO

PART = "families"
COLUMNS = ("family", "sites", "experts", "active", "score", "shared", "verdict", "rebuild error")


def names() -> list[str]:
    """Families, then old shapes; variants show nothing that the family does not."""
    return sorted(name for name in ZOO if "+" not in name)


def row(name: str) -> dict[str, Any]:
    """One family: what its tiny random model is made of, whether it is captured, and how closely it is rebuilt."""
    try:
        model = wrap(build(name), name=name)
    except RefusedError as refusal:
        return {"family": name, "verdict": f"refused: {refusal}"}
    errors = [check.rebuild_error for check in model.check.sites]
    return {
        "family": name,
        "sites": len(model.sites),
        "experts": _range(site.n_experts for site in model.sites),
        "active": _range(model.semantics[site.key].top_k for site in model.sites),
        "score": _score(model),
        "shared": max(site.n_shared for site in model.sites),
        "verdict": "captured" if None not in errors else "captured (routing and logits only)",
        "rebuild error": max((error for error in errors if error is not None), default=None),
    }


def _range(values: Iterator[int]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def _score(model: Model) -> str:
    """How weights and selection follow from the logits, in a few words; every kind of layer the model has."""
    kinds = []
    for semantics in model.semantics.values():
        words = [semantics.score_function or "unproven"]
        words += ["renormalised"] * bool(semantics.renormalised) + ["+ bias"] * (semantics.bias is not None)
        words += ["groups"] * (semantics.groups is not None) + ["hash"] * semantics.hashed
        words += ["skips"] * (semantics.skips > 0) + ["drops"] * semantics.drops
        words += ["weights the input"] * (semantics.weight_on == "input")
        kinds.append(", ".join(words).replace(", +", " +"))
    return "; ".join(dict.fromkeys(kinds))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The README's table."""
    captured = sum(r["verdict"].startswith("captured") for r in rows if not r["family"].startswith("old_"))
    families = sum(not r["family"].startswith("old_") for r in rows)
    lines = [f"{captured} of {families} families of transformers are captured (tiny random models, float32).\n"]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for r in rows:
        cells = [*(str(r.get(name, "")) for name in COLUMNS[:-1]), _bound(r.get("rebuild error"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bound(error: float | None) -> str:
    """The power of ten that an error stays below: the digits differ from machine to machine."""
    return "" if error is None else f"< 1e{max(-6, math.ceil(math.log10(max(error, 1e-300)))):d}"


def main() -> None:
    """Write the README's table."""
    readme.put(PART, markdown([row(name) for name in names()]))


if __name__ == "__main__":
    main()
