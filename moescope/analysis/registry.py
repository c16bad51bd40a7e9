"""Every analysis by name, with its figure and parameters, so that a face needs no code for any one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xarray as xr

from moescope.analysis.loads import load
from moescope.analysis.outliers import super_experts
from moescope.analysis.pathways import coactivation, paths
from moescope.analysis.specialisation import npmi
from moescope.analysis.transitions import affinity


@dataclass(frozen=True)
class Parameter:
    """One keyword of an analysis, as an option of a command line or a control of an app.

    Attributes:
        name: the keyword.
        type: int, float, str or bool; the type of one value.
        default: its default; None means the analysis chooses.
        help: one line.
        choices: the allowed values, if they are few.
        many: the keyword takes a list of values.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    many: bool = False


@dataclass(frozen=True)
class Analysis:
    """One analysis: `run(store, **parameters)` gives a labelled result, `moescope.figures.draw(result)` its figure.

    Attributes:
        name: as on the command line and in `result.attrs["analysis"]`.
        run: the public function on stores.
        figure: the function of `moescope.figures` that draws its result.
        help: one line: the question it answers.
        parameters: its keywords.
        tier: the store tier it needs.
    """

    name: str
    run: Callable[..., xr.Dataset]
    figure: str
    help: str
    parameters: tuple[Parameter, ...]
    tier: str


_SEED = Parameter("seed", int, 0, "seed of the random draws behind the null")
_LAYERS = Parameter("layers", int, None, "model layer indices to look at (default: all MoE layers)", many=True)
_PHASE = Parameter("phase", str, None, "only tokens of this phase (default: both)", ("prefill", "decode"))

ANALYSES: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            name="load",
            run=load,
            figure="load",
            help="How often is each expert chosen, and how evenly is the work shared?",
            parameters=(
                Parameter("by", str, None, "a document label: load and balance for each of its values"),
                _LAYERS,
                _PHASE,
                Parameter("draws", int, 400, "random draws behind the balance null"),
                _SEED,
            ),
            tier="routing",
        ),
        Analysis(
            name="npmi",
            run=npmi,
            figure="npmi",
            help="Which experts specialise in which label, beyond the luck of which documents were read?",
            parameters=(
                Parameter("by", str, None, "the document label (default: the store's first)"),
                Parameter(
                    "permutations",
                    int,
                    None,
                    "random dealings of labels over documents (default: enough for the tests)",
                ),
                Parameter(
                    "alternative", str, "greater", "test for preference, or either way", ("greater", "two-sided")
                ),
                Parameter("correction", str, "bh", "q-values: Benjamini-Hochberg or -Yekutieli", ("bh", "by")),
                _LAYERS,
                _PHASE,
                _SEED,
            ),
            tier="routing",
        ),
        Analysis(
            name="super_experts",
            run=super_experts,
            figure="super_experts",
            help="Which experts' outputs are outliers that form the massive activations?",
            parameters=(
                Parameter("definition", str, "paper", "the published text's rule or its code's", ("paper", "code")),
                Parameter("ratio", float, 10.0, "times its layer's median an outlier must reach"),
                Parameter("depth", int, None, "last model layer to pool (default: found from the store)"),
                _SEED,
            ),
            tier="outliers",
        ),
        Analysis(
            name="affinity",
            run=affinity,
            figure="affinity",
            help="Which experts of one layer are followed by which of another, beyond topics and runs?",
            parameters=(
                Parameter(
                    "ranks", str, "top1", "first-ranked experts, all k x k, or weighted", ("top1", "all", "weighted")
                ),
                Parameter("pairs", str, None, "neighbours (default), all, or pairs such as 3-7", many=True),
                Parameter("null", str, "rotate", "what moves one layer against the other", ("rotate", "shuffle")),
                Parameter("permutations", int, None, "draws of the null (default: enough for the tests)"),
                Parameter("cells", bool, True, "keep every transition, not only the scores of each pair"),
                _PHASE,
                _SEED,
            ),
            tier="routing",
        ),
        Analysis(
            name="coactivation",
            run=coactivation,
            figure="coactivation",
            help="Which experts of one layer are chosen together at the same token, beyond their loads?",
            parameters=(
                Parameter("definition", str, "paper", "all pairs of the top-k, or adjacent ranks", ("paper", "code")),
                Parameter("groups", int, 20, "groups of documents behind the intervals"),
                _LAYERS,
                _PHASE,
            ),
            tier="routing",
        ),
        Analysis(
            name="paths",
            run=paths,
            figure="paths",
            help="Which paths through consecutive layers do tokens take, and how free are they?",
            parameters=(
                Parameter("layers", int, None, "consecutive MoE layers (default: the first few)", many=True),
                Parameter("length", int, 4, "layers in the window"),
                Parameter("top", int, 50, "paths to keep"),
                Parameter("links", int, 30, "transitions to keep between each two layers"),
                Parameter("draws", int, 19, "controls with rotated layers"),
                _PHASE,
                _SEED,
            ),
            tier="routing",
        ),
    )
}
