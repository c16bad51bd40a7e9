"""Random routing and random token kinds at the level of tokens, dependent inside documents, and their plain counts."""

from __future__ import annotations

import numpy as np


def sticky(rng: np.random.Generator, size: int, shares: np.ndarray, stay: float = 0.7) -> np.ndarray:
    """A sequence of kinds that tends to stay what it is."""
    fresh = rng.choice(shares.size, size, p=shares)
    kept = np.maximum.accumulate(np.where((rng.random(size) > stay) | (np.arange(size) == 0), np.arange(size), 0))
    return fresh[kept]


def made_properties(
    rng: np.random.Generator,
    documents: int = 40,
    experts: int = 8,
    k: int = 2,
    layers: int = 1,
    shares: tuple[float, ...] = (0.6, 0.25, 0.12, 0.03),
    busy: float = 0.0,
    planted: tuple[int, int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(joint [d, l, e, kind], held [d, kind], selections [d, l, e], tokens [d]).

    Args:
        shares: of the kinds; documents differ in them.
        busy: log-preference of all tokens for expert 0.
        planted: (layer, expert, kind) that go together; nothing else depends on the kind.
    """
    sizes = rng.integers(5, 60, documents)
    n_kinds = len(shares)
    joint = np.zeros((documents, layers, experts, n_kinds), dtype=int)
    held = np.zeros((documents, n_kinds), dtype=int)
    for d, size in enumerate(sizes):
        kind = sticky(rng, size, rng.dirichlet(5 * np.array(shares)))
        held[d] = np.bincount(kind, minlength=n_kinds)
        for layer in range(layers):
            moods = rng.normal(size=(3, experts))  # stretches of a document are alike too
            scores = moods[sticky(rng, size, np.ones(3) / 3, 0.8)] + rng.gumbel(size=(size, experts))
            scores[:, 0] += busy
            if planted is not None and planted[0] == layer:
                scores[kind == planted[2], planted[1]] += 3.0
            chosen = np.argsort(-scores, axis=1)[:, :k]
            np.add.at(joint[d, layer], (chosen, kind[:, None]), 1)
    return joint, held, joint.sum(axis=3), sizes
