"""Offloading: what a cache of experts makes a token move over a slow link, and how long that takes (METHODS 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.analysis.caching import SCOPE, Replayed, ReplayTask, cache_sizes, replay_task, replayed
from moescope.analysis.counts import Phase, labelling, sites_of
from moescope.analysis.labelled import LayerAxis, provenance
from moescope.analysis.question import LAYERS, PHASE, SEED, Analysis, Parameter
from moescope.analysis.resampling import INTERVAL, ratio_interval
from moescope.analysis.runs import GROUPED, SHUFFLED
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    from moescope.store import Store

WINDOWS = (16,)
"""Foresight of SCH by default, in tokens."""
BANDWIDTH = 31.5
"""GB/s of PCI Express 4.0 with 16 lanes in one direction: 16 GT/s x 16 x 128/130 / 8, before packet overhead."""
WIDTHS = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
"""Bytes of a parameter."""
COST = (
    "a load takes latency_us + bytes_per_expert / bandwidth, one load after another; a token takes compute_ms and all "
    "its loads, which nothing hides: a prefetching system lies between this and the larger of the two"
)
UNDEFINED = (
    "NaN where a token's k experts do not fit into the cache in some layer, and bytes and times where the bytes of an "
    "expert are not known; tokens_per_second also where nothing takes time"
)


def offload(
    store: Store,
    bytes_per_expert: float | None = None,
    bandwidth: float = BANDWIDTH,
    latency_us: float = 0.0,
    compute_ms: float = 0.0,
    sizes: Sequence[int] | None = None,
    windows: Sequence[int] = WINDOWS,
    layers: Sequence[int] | None = None,
    where: dict[str, str | Sequence[str]] | None = None,
    phase: Phase | None = None,
    draws: int = 2,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Experts loaded, bytes moved and time per token when each layer keeps only some experts in fast memory.

    How to read it: `loads` is how many experts a token fetches over all layers, with a cache of `size` experts in each;
    without a cache it would be `selections`. `bytes_per_token` is that times the bytes of an expert, and `ms_per_token`
    what moving them takes at the given bandwidth; `memory` is what the caches occupy. Belady's cache loads the least
    that any policy could. First loads into a cache that is not full yet are left out, as in the paper's hit rate:
    `loads_empty` counts them, as if every sequence began with nothing cached. `loads_shuffled` says what would be
    loaded if neighbouring tokens were not alike.

    Args:
        store: an open store with the routing tier.
        bytes_per_expert: of one expert as it is moved, for instance quantised. If None, from the manifest: its
            parameters that a token does not meet, over the experts a token does not meet, in the precision that was
            run; that needs layers alike, and is unknown otherwise.
        bandwidth: GB/s of the slow link; 31.5 is PCI Express 4.0 x16.
        latency_us: microseconds that each load waits besides.
        compute_ms: milliseconds that a token takes with all experts at hand; 0 gives the time of the loads alone.
        sizes, windows, layers, where, phase, draws, resamples, seed: as in `analysis.caches`.

    Returns:
        Dataset with dims (policy, size): hit_rate, loads, loads_low, loads_high, loads_empty, loads_shuffled (experts
        per token, all layers), bytes_per_token, bytes_per_token_empty, ms_per_token, ms_per_token_low,
        ms_per_token_high, ms_per_token_empty, tokens_per_second; (layer, policy, size): layer_loads; (size): memory
        (bytes of all caches), share_held (of all experts); (): selections (experts a token needs, all layers),
        bytes_uncached and ms_uncached (per token, without a cache), bytes_all (of all experts). `attrs["bytes_source"]`
        says where the bytes of an expert are from.

    Raises:
        MoescopeError: a number that cannot be, a size no layer can use, or nothing to count.
    """
    if not bandwidth > 0 or latency_us < 0 or compute_ms < 0:
        raise MoescopeError("`bandwidth` must be above 0, `latency_us` and `compute_ms` 0 or more.")
    if bytes_per_expert is not None and not bytes_per_expert > 0:
        raise MoescopeError("`bytes_per_expert` must be above 0.")
    if resamples < 0:
        raise MoescopeError("`resamples` must be 0 or more.")
    sites = sites_of(store, layers)
    held = cache_sizes(sites, sizes)
    chosen = labelling(store, None, where, phase)
    task = replay_task(chosen, windows, draws, seed, {"by": None, "where": where and dict(where), "phase": phase})
    moved, source = _bytes(store, bytes_per_expert)
    found = replayed(store, sites, task)
    attrs = provenance(
        store,
        analysis="offload",
        bytes_per_expert=moved if np.isfinite(moved) else "unknown",
        bytes_source=source,
        bandwidth=bandwidth,
        latency_us=latency_us,
        compute_ms=compute_ms,
        sizes=held,
        windows=list(windows),
        where=where,
        phase=phase,
        draws=draws,
        resamples=resamples,
        seed=seed,
        null=SHUFFLED if draws else "none: no draws were asked for",
        cost=COST,
        scope=SCOPE,
        interval=INTERVAL,
        undefined=UNDEFINED,
        documents_filtered=chosen.filtered,
        table="policy, size",
    )
    if task.grouped:
        attrs["documents_grouped"] = GROUPED.format(groups=task.cells.groups)
    variables = _loads(sites, found, task, held, resamples, seed)
    variables |= _costs(variables, sites, held, moved, bandwidth, latency_us, compute_ms)
    axis = LayerAxis.of_sites(sites)
    coordinates: dict[str, Any] = {name: value for name, value in axis.coordinates().items() if name != "expert"}
    coordinates |= {"policy": list(task.policies), "size": held}
    return xr.Dataset(variables, coords=coordinates, attrs=attrs)


def milliseconds(loads: Any, bytes_per_expert: float, bandwidth: float, latency_us: float, compute_ms: float) -> Any:
    """Time of a token by the cost model: see `COST`. GB/s are millions of bytes per millisecond."""
    return compute_ms + loads * (latency_us / 1e3 + bytes_per_expert / (bandwidth * 1e6))


def _bytes(store: Store, given: float | None) -> tuple[float, str]:
    """(bytes of an expert, where from); NaN where nobody said."""
    if given is not None:
        return float(given), "given"
    model, sites = store.manifest.model, store.manifest.sites
    shapes = {(site.n_experts, site.top_k, site.zero_experts, site.skip_classes) for site in sites}
    ask = "give bytes_per_expert"
    if len(shapes) > 1 or any(site.zero_experts for site in sites):
        return float("nan"), f"unknown: the layers' experts are not alike; {ask}"
    idle = sum(site.n_experts - site.top_k for site in sites)
    if model.n_active_parameters is None or model.dtype not in WIDTHS or not idle:
        return float("nan"), f"unknown: the manifest does not tell; {ask}"
    parameters, rest = divmod(model.n_parameters - model.n_active_parameters, idle)
    if rest or parameters <= 0:
        return float("nan"), f"unknown: the manifest's parameters do not divide among its experts; {ask}"
    return float(parameters * WIDTHS[model.dtype]), (
        f"the manifest: {parameters:,} parameters an expert, in {model.dtype} as the model was run"
    )


def _loads(
    sites: Sequence[Any],
    found: list[dict[str, tuple[Replayed, Replayed]]],
    task: ReplayTask,
    sizes: list[int],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Experts loaded per token, by policy and size."""
    shape = (len(task.policies), len(sizes))
    names = ("hit_rate", "loads", "loads_low", "loads_high", "loads_empty", "loads_shuffled")
    out = {name: np.full(shape, np.nan) for name in names}
    by_layer = np.full((len(sites), *shape), np.nan)
    tokens = task.cells.tokens.astype(np.float64)
    fits = np.array([[size >= site.top_k for size in sizes] for site in sites])
    selected = np.sum([of_site[task.policies[0]][0].selections for of_site in found], axis=0)
    for place, policy in enumerate(task.policies):
        plain = [of_site[policy][0] for of_site in found]
        mixed = [of_site[policy][1] for of_site in found]
        missed = [one.selections[:, None] - one.hits(sizes) for one in plain]
        whole = np.sum(missed, axis=0).astype(np.float64)
        by_layer[:, place] = np.stack([part.sum(axis=0) for part in missed]) / tokens.sum()
        empty = np.sum([one.selections[:, None] - one.hits(sizes, full=False) for one in plain], axis=0)
        out["hit_rate"][place] = 1 - whole.sum(axis=0) / selected.sum()
        out["loads"][place] = whole.sum(axis=0) / tokens.sum()
        out["loads_empty"][place] = empty.sum(axis=0) / tokens.sum()
        if task.draws:
            drawn = np.sum([m.selections[:, None] - m.hits(sizes) for m in mixed], axis=0)[0]
            out["loads_shuffled"][place] = drawn / (task.draws * tokens.sum())
        below = np.repeat(tokens[:, None], len(sizes), axis=1)
        limits = ratio_interval(whole, below, resamples, np.random.default_rng(seed))
        out["loads_low"][place], out["loads_high"][place] = limits
    for values in out.values():
        values[:, ~fits.all(axis=0)] = np.nan
    by_layer[~np.broadcast_to(fits[:, None], by_layer.shape)] = np.nan
    variables: dict[str, Any] = {name: (("policy", "size"), values) for name, values in out.items()}
    variables["layer_loads"] = (("layer", "policy", "size"), by_layer)
    variables["selections"] = ((), float(selected.sum() / tokens.sum()))
    return variables


def _costs(
    loads: dict[str, Any],
    sites: Sequence[Any],
    sizes: list[int],
    moved: float,
    bandwidth: float,
    latency_us: float,
    compute_ms: float,
) -> dict[str, Any]:
    """Bytes, times and memory of what is loaded."""

    def time(count: Any) -> Any:
        return milliseconds(count, moved, bandwidth, latency_us, compute_ms)

    dims = ("policy", "size")
    variables: dict[str, Any] = {}
    for ending in ("", "_empty"):
        variables[f"bytes_per_token{ending}"] = (dims, loads[f"loads{ending}"][1] * moved)
    for ending in ("", "_low", "_high", "_empty"):
        variables[f"ms_per_token{ending}"] = (dims, time(loads[f"loads{ending}"][1]))
    each = variables["ms_per_token"][1]
    variables["tokens_per_second"] = (dims, np.divide(1e3, each, out=np.full_like(each, np.nan), where=each > 0))
    kept = np.array([sum(min(size, site.n_experts) for site in sites) for size in sizes], dtype=np.float64)
    every = sum(site.n_experts for site in sites)
    selections = loads["selections"][1]
    return variables | {
        "memory": ("size", kept * moved),
        "share_held": ("size", kept / every),
        "bytes_uncached": ((), selections * moved),
        "ms_uncached": ((), float(time(selections))),
        "bytes_all": ((), every * moved),
    }


OFFLOAD_QUESTION = Analysis(
    name="offload",
    run=offload,
    figure="offload",
    help="What do caches of experts move per token over a slow link, and how long does it take?",
    parameters=(
        Parameter("bytes_per_expert", float, None, "bytes of one expert as it is moved (default: from the manifest)"),
        Parameter("bandwidth", float, BANDWIDTH, "GB/s of the slow link"),
        Parameter("latency_us", float, 0.0, "microseconds that each load waits besides"),
        Parameter("compute_ms", float, 0.0, "milliseconds of a token with all experts at hand"),
        Parameter("sizes", int, None, "experts a layer's cache holds (default: 1 to 8 times k)", many=True),
        Parameter("windows", int, WINDOWS, "tokens that SCH foresees", many=True),
        LAYERS,
        PHASE,
        Parameter("draws", int, 2, "shuffles behind the control"),
        Parameter("resamples", int, 1000, "bootstrap draws behind the limits"),
        SEED,
    ),
    tier="routing",
)
