"""Is an expert active on tokens of a kind more than on the other tokens of the same documents? Documents are the unit.

For each document, the tokens of the kind at which the expert was active are held against what its own rate in that
document would give. If kind and activation have nothing to do with each other inside a document, this difference is as
often above as below 0, whatever the dependence between its tokens: the test flips the signs of whole documents. Its
p-value needs no draws: no flipping of signs exceeds z standard deviations with a probability above 3.178 times the
normal's (Bentkus & Dzindzalieta, Bernoulli 21, 2015), which is exact for any number of documents and goes as far out as
many tests ask for. Where few tokens of the kind make the differences too uneven for signs to stand for them, the
variance of tokens picked at random inside each document takes the place of the observed one; the larger of the two
always does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from moescope.analysis.pairs import PairCounts

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from scipy.sparse import csr_array

BOUND = float(1 / (4 * norm.sf(np.sqrt(2))))
"""3.178: the best constant (Bentkus & Dzindzalieta 2015, theorem 1.1)."""
Z99 = float(norm.isf(0.01 / BOUND))
"""Standard deviations that at most 1 % of sign patterns exceed."""
NULL = (
    "activation and kind unrelated inside each document: the expert's rate among all tokens of the same document, "
    "signs of documents flipped; p is an upper bound, 3.178 times the normal tail (Bentkus & Dzindzalieta 2015); where "
    "tokens picked at random inside documents vary more than the documents do, their variance is taken"
)


@dataclass(frozen=True)
class WithinDocuments:
    """The test of one layer.

    Attributes:
        joint: tokens of the kind at which the expert was active.
        mean: what the expert's rate in each document gives.
        deviation: standard deviation of `joint` under the null.
        z: (joint - mean) / deviation; 0 where nothing can vary.
    """

    joint: Float[np.ndarray, "expert kind"]
    mean: Float[np.ndarray, "expert kind"]
    deviation: Float[np.ndarray, "expert kind"]
    z: Float[np.ndarray, "expert kind"]

    def p_value(self, alternative: str) -> Float[np.ndarray, "expert kind"]:
        """Bound of the p-value: of `joint` this large, or ("two-sided") this far from the mean."""
        if alternative == "greater":
            return np.where(self.z > 0, np.minimum(1.0, BOUND * norm.sf(self.z)), 1.0)
        return np.minimum(1.0, 2 * BOUND * norm.sf(np.abs(self.z)))


def within_documents(
    joint: PairCounts,
    held: csr_array,
    selections: Float[np.ndarray, "document expert"],
    tokens: Int[np.ndarray, " document"],
) -> WithinDocuments:
    """Tests one layer.

    Args:
        joint: tokens of each kind at which each expert was active; groups are document x kinds + kind.
        held: [document, kind] tokens of the kind, sparse.
        selections: tokens at which the expert was active.
        tokens: tokens of each document, >= 1.
    """
    n, experts = selections.shape
    per_entry = np.repeat(np.arange(n), np.diff(held.indptr))
    kinds = (held.T @ np.ones(n)).size
    rate = selections / tokens[:, None]
    mean = (held.T @ rate).T
    # What tokens picked at random inside each document vary: the hypergeometric variance, summed.
    spare = held.copy()
    size = tokens[per_entry].astype(np.float64)
    spare.data = held.data * (size - held.data) / np.maximum(size - 1, 1)
    picked = (spare.T @ (rate * (1 - rate))).T
    # What the documents' own differences vary: sum over documents of (count - expected)^2.
    squares = held.copy()
    squares.data = held.data**2
    document, kind = np.divmod(joint.group, kinds)
    cell = joint.expert.astype(np.int64) * kinds + kind
    expected = np.asarray(held[document, kind]).ravel() * rate[document, joint.expert]
    count = joint.count.astype(np.float64)
    observed = np.bincount(cell, weights=count**2 - 2 * count * expected, minlength=experts * kinds)
    observed = observed.reshape(experts, kinds) + (squares.T @ rate**2).T
    total = np.bincount(cell, weights=count, minlength=experts * kinds).reshape(experts, kinds)
    deviation = np.sqrt(np.maximum(np.maximum(observed, picked), 0))
    # Below this, differences are rounding: the expert always fires in these documents, or they hold nothing else.
    varies = deviation > 1e-6
    z = np.where(varies, (total - mean) / np.where(varies, deviation, 1.0), 0.0)
    return WithinDocuments(total, mean, np.where(varies, deviation, 0.0), z)
