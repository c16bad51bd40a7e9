"""Local routing consistency: how well one choice of experts would serve a whole segment of tokens (METHODS 5).

Source: segment routing best performance (SRP) of Liang et al., "Not All Models Suit Expert Offloading" (arXiv
2505.16056). Segments are all windows of m consecutive tokens inside a sequence, a segment router switches each expert
on or off for a whole segment, and SRP is the best F1 it can reach against what the router really did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xarray as xr
from scipy.stats import binom

from moescope.analysis.counts import Phase, labelling, sites_of
from moescope.analysis.discovery import adjusted
from moescope.analysis.labelled import PADDING, LayerAxis, provenance
from moescope.analysis.locality_kernels import count_windows
from moescope.analysis.permutation import TIE
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import INTERVAL, drawn_documents
from moescope.analysis.runs import GROUPED, SHUFFLED, Cells, Runs, over_runs, runs_of_ids, split_runs
from moescope.analysis.sparse import packed, unpack
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from moescope.store import Store

WINDOWS = (4, 16, 64, 256)
"""The segment lengths of the paper."""
WORK = 2e9
"""Changes of a window's counts that the null may take by default: some five seconds on one core."""
CONTROLS = {
    "shuffled": SHUFFLED,
    "independent": "every token draws its experts independently of its neighbours, with the loads as they are",
    "uniform": "every token draws its experts independently, all equally often: what k of E experts give by themselves",
}
UNDEFINED = (
    "values are NaN for a window that no sequence is long enough for, and for an expert never active in one; limits "
    "also where fewer than two documents are"
)


def consistency(
    store: Store,
    windows: Sequence[int] = WINDOWS,
    by: str | None = None,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    draws: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How locally consistent routing is: SRP of layers, of the whole model and of single experts, at several windows.

    How to read it: `srp` is the F1 of the best segment router, which must keep its experts for m tokens: 1 if m tokens
    in a row always use the same experts. `size_ratio` says how many times the k experts it switches on for that; near
    1 it needs no more than the router. A high `srp` has four sources, told apart by three controls:
    `srp_uniform` is what k of E experts give by themselves, `srp_independent` adds that some experts are busier
    everywhere, `srp_shuffled` that each sequence has its own, and what `srp` has beyond that is the order of tokens:
    neighbours routed alike. Believe that last step where `q` is small.

    Args:
        store: an open store with the routing tier.
        windows: tokens of a segment, m, each 1 or more.
        by: a document label; adds the dimension `label`.
        layers, where, phase: filters, as in `analysis.load`. Tokens that a phase leaves out close up.
        draws: shuffles behind `srp_shuffled` and p; 0 for none. By default 19 to 199, as many as take seconds.
        resamples: bootstrap draws behind the limits; 0 for none.
        seed: of all draws. They do not depend on how the store is cut into shards.

    Returns:
        Dataset with dims (layer, window) or (layer, window, label): srp, srp_low, srp_high, size_ratio (experts the
        segment router switches on, over those that were active), threshold (it switches an expert on where it is
        active this often or oftener, p*), srp_shuffled (mean of the draws), srp_shuffled_p99, srp_independent,
        srp_uniform, p (a shuffle has at least this srp), q (Benjamini-Hochberg over all layers, windows and labels),
        segments (windows counted). The same with `model_` before the name and without the layer: histograms summed
        over layers, one threshold for all. With dims (layer, expert, window), over all labels: expert_srp,
        expert_size_ratio, expert_threshold, expert_srp_shuffled (draws pooled), expert_srp_independent.

    Raises:
        MoescopeError: a window below 1, or longer than every sequence; an unknown label or layer; nothing to count.
    """
    sizes = _sizes(windows)
    if (draws is not None and draws < 0) or resamples < 0:
        raise MoescopeError("`draws` and `resamples` must be 0 or more.")
    sites = sites_of(store, layers)
    chosen = labelling(store, by, where, phase)
    cells = Cells.of(chosen)
    if draws is None:
        work = int(cells.tokens.sum()) * 2 * sum(site.top_k for site in sites) * len(sizes)
        draws = int(np.clip(WORK / max(work, 1), 19, 199))
    asked = {"by": by, "where": where and dict(where), "phase": phase}
    task = _Task(sizes, cells, len(chosen.labels), draws, seed, phase, asked)
    split = split_runs(store, phase)
    counted = [_counted(store, site, task, split) for site in sites]
    if not any(table.any() for found in counted for table in found.by_cell):
        raise MoescopeError(f"No sequence has {min(sizes)} tokens, the shortest window: ask for smaller windows.")
    if not any(table[:, 1:].any() for found in counted for table in found.by_cell):
        raise MoescopeError("No expert was selected by any token that is left: nothing to count.")
    axis = LayerAxis.of_sites(sites)
    attrs = provenance(
        store,
        analysis="consistency",
        windows=sizes,
        by=by,
        where=where,
        phase=phase,
        draws=draws,
        resamples=resamples,
        seed=seed,
        null=CONTROLS["shuffled"] if draws else "none: no draws were asked for",
        independent=CONTROLS["independent"],
        uniform=CONTROLS["uniform"],
        interval=INTERVAL,
        undefined=UNDEFINED,
        padding=PADDING,
        documents_unlabelled=chosen.unlabelled,
        documents_filtered=chosen.filtered,
        table="layer, window" if by is None else "layer, window, label",
    )
    if np.bincount(cells.label).max() < chosen.documents_per_label.max():
        attrs["documents_grouped"] = GROUPED.format(groups=cells.groups)
    result = _dataset(counted, task, axis, list(chosen.labels), resamples, seed, attrs)
    return result.isel(label=0, drop=True) if by is None else result


def segment_routing(histogram: Float[np.ndarray, "*rest count"]) -> dict[str, Float[np.ndarray, " *rest"]]:
    """SRP from a histogram of activations in windows of m tokens: of one expert, or summed over a group of experts.

    The segment router that switches on wherever there are p activations or more gets `M_p = sum_{c >= p} c H[c]` of
    them right, of `P_p = m sum_{c >= p} H[c]` that it names and `M_0` that there are: `F1_p = 2 M_p / (P_p + M_0)`.

    Args:
        histogram: [..., m + 1]; H[c] (window, expert) pairs with c activations, c = 0 .. m. H[0] is not looked at.

    Returns:
        srp = max over p of F1_p; threshold = the smallest p that reaches it; size_ratio = P_p / M_0 there. NaN
        where nothing was active.

    Raises:
        MoescopeError: no bin for one activation, or negative counts.
    """
    table = np.asarray(histogram, dtype=np.float64)
    if table.ndim < 1 or table.shape[-1] < 2 or (table < 0).any():
        raise MoescopeError("A histogram of activations has bins 0 .. m with m of 1 or more, none below 0.")
    m = table.shape[-1] - 1
    counts = np.arange(m, 0, -1)
    # From the largest count down, so that each cumulative sum is one threshold's.
    right = np.cumsum(table[..., :0:-1] * counts, axis=-1)
    named = m * np.cumsum(table[..., :0:-1], axis=-1)
    there = right[..., -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        score = np.where(there > 0, 2 * right / (named + there), 0.0)
        best = m - 1 - score[..., ::-1].argmax(axis=-1)  # of equal scores the smallest threshold's
        place = best[..., None]
        ratio = np.take_along_axis(named, place, axis=-1) / there
    empty = there[..., 0] <= 0
    return {
        "srp": np.where(empty, np.nan, np.take_along_axis(score, place, axis=-1)[..., 0]),
        "size_ratio": np.where(empty, np.nan, ratio[..., 0]),
        "threshold": np.where(empty, np.nan, m - best),
    }


def window_counts(
    ids: Int[np.ndarray, "token rank"], window: int, n_experts: int, sequence: Int[np.ndarray, " token"] | None = None
) -> Int[np.ndarray, "expert count"]:
    """The histogram of activations of each expert, over all stride-1 windows inside each sequence.

    Args:
        ids: [token, rank] ids of the selected experts, negative where a slot is missing.
        window: tokens of a window, m.
        n_experts: of the layer.
        sequence: [token] which sequence a token is of, its tokens together and in order; one sequence if None.

    Returns:
        [expert, m + 1] int64; windows in which the expert was active at 0 .. m tokens. Rows sum to the windows.

    Raises:
        MoescopeError: as `runs_of_ids`, or a window below 1.
    """
    (window,) = _sizes([window])
    runs = runs_of_ids(ids, sequence, n_experts)
    zeros = np.zeros(runs.document.size, np.int64)
    table = np.zeros((1, n_experts, window + 1), np.int64)
    count_windows(runs.ids, runs.edge, zeros, window, np.zeros((1, window + 1), np.int64), zeros, table)
    return table[0]


def independent_windows(histogram: Float[np.ndarray, "*rest expert count"]) -> Float[np.ndarray, "*rest expert count"]:
    """What the histogram would be if every token chose an expert independently, as often as it did: binomial."""
    table = np.asarray(histogram, dtype=np.float64)
    m = table.shape[-1] - 1
    windows = table.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = (table * np.arange(m + 1)).sum(axis=-1, keepdims=True) / (m * windows)
    return np.where(windows > 0, windows * binom.pmf(np.arange(m + 1), m, np.nan_to_num(rate)), 0.0)


@dataclass(frozen=True)
class _Task:
    """What is counted in every layer; `asked` names it for the store's aggregates."""

    windows: list[int]
    cells: Cells
    n_labels: int
    draws: int
    seed: int
    phase: Phase | None
    asked: dict[str, Any]


@dataclass
class _Counted:
    """One layer's histograms, one array per window.

    Attributes:
        by_cell: [cell, m + 1], over all experts; by_expert: [label, expert, m + 1].
        by_draw: [draw * label, m + 1] of the shuffles; pooled: [expert, m + 1] of all of them together.
    """

    by_cell: list[Int[np.ndarray, "cell count"]]
    by_expert: list[Int[np.ndarray, "label expert count"]]
    by_draw: list[Int[np.ndarray, "draw_label count"]]
    pooled: list[Int[np.ndarray, "one expert count"]]

    @classmethod
    def empty(cls, task: _Task, n_experts: int) -> _Counted:
        def zeros(*shape: int) -> list[np.ndarray]:
            return [np.zeros((*shape, window + 1), np.int64) for window in task.windows]

        draws = task.draws * task.n_labels
        return cls(zeros(task.cells.label.size), zeros(task.n_labels, n_experts), zeros(draws), zeros(1, n_experts))

    def parts(self) -> list[np.ndarray]:
        """All arrays, each [row, m + 1], in the order they are kept in."""
        return [
            table.reshape(-1, table.shape[-1])
            for table in (*self.by_cell, *self.by_expert, *self.by_draw, *self.pooled)
        ]


def _count(runs: Runs, n_experts: int, task: _Task) -> list[np.ndarray]:
    """Histograms of some runs, as `_Counted.parts` has them."""
    found = _Counted.empty(task, n_experts)
    cell, label = task.cells.of_runs(runs.document)
    for place, window in enumerate(task.windows):
        count_windows(runs.ids, runs.edge, cell, window, found.by_cell[place], label, found.by_expert[place])
    for draw in range(task.draws):
        ids = runs.shuffled(task.seed, draw)
        row = np.where(label < 0, -1, draw * task.n_labels + label)
        for place, window in enumerate(task.windows):
            count_windows(ids, runs.edge, row, window, found.by_draw[place], np.zeros_like(row), found.pooled[place])
    return found.parts()


def _counted(store: Store, site: Any, task: _Task, split: frozenset[tuple[int, int]]) -> _Counted:
    """Histograms of one layer, kept in the store's aggregates."""

    def compute() -> pa.Table:
        found = _Counted.empty(task, site.n_experts)
        for part in over_runs(store, site, task.phase, split, _count, site.n_experts, task):
            for total, table in zip(found.parts(), part, strict=True):
                total += table
        return packed(found.parts())

    params = {"site": site.key, "windows": task.windows, "draws": task.draws, "seed": task.seed, **task.asked}
    found = _Counted.empty(task, site.n_experts)
    unpack(store.cached(f"segments-{site.key}", compute, params), found.parts())
    return found


def _sizes(windows: Sequence[int]) -> list[int]:
    sizes = [int(window) for window in windows]
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise MoescopeError("`windows` are different numbers of tokens, each 1 or more.")
    return sizes


def _dataset(
    counted: list[_Counted],
    task: _Task,
    axis: LayerAxis,
    labels: list[str],
    resamples: int,
    seed: int,
    attrs: dict[str, Any],
) -> xr.Dataset:
    shape = (len(counted), len(task.windows), task.n_labels)
    names = ("srp", "srp_low", "srp_high", "size_ratio", "threshold", "srp_shuffled", "srp_shuffled_p99")
    names += ("srp_independent", "srp_uniform", "p", "segments")
    layered = {name: np.full(shape, np.nan) for name in names}
    whole = {name: np.full(shape[1:], np.nan) for name in names}
    experts: dict[str, list[list[np.ndarray]]] = {}
    for place in range(len(task.windows)):
        for label in range(task.n_labels):
            mine = task.cells.label == label
            groups = [
                _Group(
                    found.by_cell[place][mine],
                    found.by_expert[place][label],
                    found.by_draw[place][label :: task.n_labels],
                )
                for found in counted
            ]
            for row, group in enumerate(groups):
                for name, value in group.scores(resamples, seed).items():
                    layered[name][row, place, label] = value
            for name, value in _Group.summed(groups).scores(resamples, seed).items():
                whole[name][place, label] = value
        for found in counted:
            for name, values in _of_experts(found, place, task.draws).items():
                experts.setdefault(name, [[] for _ in task.windows])[place].append(values)
    dims = ("layer", "window", "label")
    layered["segments"], whole["segments"] = layered["segments"].astype(np.int64), whole["segments"].astype(np.int64)
    variables: dict[str, Any] = {name: (dims, values) for name, values in layered.items()}
    variables["q"] = (dims, adjusted(layered["p"]))
    variables |= {f"model_{name}": (dims[1:], values) for name, values in whole.items()}
    for name, by_window in experts.items():
        padded = np.stack([axis.pad(values) for values in by_window], axis=-1)
        variables[f"expert_{name}"] = (("layer", "expert", "window"), padded)
    variables["exists"] = (("layer", "expert"), axis.exists)
    return xr.Dataset(variables, coords=axis.coordinates() | {"window": task.windows, "label": labels}, attrs=attrs)


@dataclass(frozen=True)
class _Group:
    """Histograms of a group of experts (a layer, the model): by cell, by expert, and of each shuffle."""

    by_cell: np.ndarray
    by_expert: np.ndarray
    by_draw: np.ndarray
    uniform: np.ndarray | None = None

    @classmethod
    def summed(cls, groups: list[_Group]) -> _Group:
        """Several layers as one group."""
        return cls(
            np.sum([group.by_cell for group in groups], axis=0),
            np.concatenate([group.by_expert for group in groups]),
            np.sum([group.by_draw for group in groups], axis=0),
            np.sum([group.alike() for group in groups], axis=0),
        )

    def alike(self) -> np.ndarray:
        """[m + 1] the histogram if all experts were chosen independently and equally often."""
        return independent_windows(self.by_expert.mean(axis=0)) * len(self.by_expert)

    def scores(self, resamples: int, seed: int) -> dict[str, float]:
        """The values of one layer (or the model) at one window and label."""
        total = self.by_cell.sum(axis=0)
        values = {name: float(value) for name, value in segment_routing(total).items()}
        values["segments"] = float(self.by_expert[0].sum())
        if np.isnan(values["srp"]):
            return values
        values["srp_low"], values["srp_high"] = _interval(self.by_cell, resamples, seed)
        values["srp_independent"] = float(segment_routing(independent_windows(self.by_expert).sum(axis=0))["srp"])
        values["srp_uniform"] = float(segment_routing(self.alike() if self.uniform is None else self.uniform)["srp"])
        if len(self.by_draw):
            drawn = segment_routing(self.by_draw)["srp"]
            values["srp_shuffled"] = float(drawn.mean())
            values["srp_shuffled_p99"] = float(np.quantile(drawn, 0.99, method="higher"))
            values["p"] = (int((drawn >= values["srp"] - TIE).sum()) + 1) / (drawn.size + 1)
        return values


def _interval(by_cell: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % bootstrap limits of SRP over cells (documents, or groups of them), the threshold chosen anew each time."""
    filled = by_cell[by_cell[:, 1:].any(axis=1)].astype(np.float64)
    if resamples < 1 or len(filled) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    drawn = [segment_routing(draws @ filled)["srp"] for draws in drawn_documents(len(filled), resamples, rng)]
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975])
    return float(low), float(high)


def _of_experts(found: _Counted, place: int, draws: int) -> dict[str, Float[np.ndarray, " expert"]]:
    table = found.by_expert[place].sum(axis=0)
    values = segment_routing(table)
    values["srp_independent"] = segment_routing(independent_windows(table))["srp"]
    if draws:
        values["srp_shuffled"] = segment_routing(found.pooled[place][0])["srp"]
    return values


CONSISTENCY_QUESTION = Analysis(
    name="consistency",
    run=consistency,
    figure="consistency",
    help="Do neighbouring tokens use the same experts, beyond loads and topics? (SRP)",
    parameters=(
        Parameter("windows", int, WINDOWS, "tokens of a segment", many=True),
        Parameter("by", str, None, "a document label: values for each of its values"),
        LAYERS,
        PHASE,
        Parameter("draws", int, None, "shuffles behind the null (default: 19 to 199)"),
        Parameter("resamples", int, 1000, "bootstrap draws behind the limits"),
        SEED,
    ),
    tier="routing",
)
