"""Flow: where tokens go from layer to layer, who meets whom inside one, and what a placement of experts would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dash import html

from moescope import figures
from moescope.analysis.labelled import table
from moescope.app import controls
from moescope.app.expert_words import where_of
from moescope.app.place import Place
from moescope.app.scene import Scene
from moescope.app.views import BlockView, FigureView, Page, TableView
from moescope.errors import MoescopeError
from moescope.figures.affinities import READ_INFORMATION, READ_MAP
from moescope.figures.pathways import READ_BANDS
from moescope.figures.placements import NAMES, READ_SIMULATED

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_FILTERS = ("by", "label", "phase", "slices", "slice")
_PAIR = ("layer", "neighbour", *_FILTERS)
_LENGTH, _PATIENCE, _DEVICES = 4, 5, 4
_LONGEST = 120  # seconds of a solver
_INSIDE, _OUTSIDE = 450, 50  # GB/s of a device, the defaults of `analysis.placement`
_METHODS = {"all": "all three", "exflow": "ExFlow", "moetuner": "MoETuner", "eplb": "EPLB"}
_NETWORK = ("nodes", "bandwidth", "node_bandwidth")


def _filters(scene: Scene) -> dict[str, Any]:
    return {"where": where_of(scene), "phase": scene.place.phase}


def pair_of(scene: Scene) -> tuple[str, str]:
    """The chosen pair of layers, as the place names them: by default the layer and the next one.

    Raises:
        MoescopeError: there is no such layer, no second one, or both are one.
    """
    names = scene.layers
    if len(names) < 2:
        raise MoescopeError("This store has one MoE layer: there is no other that its experts lead to.")
    for name in (scene.place.layer, scene.place.neighbour):
        if name is not None:
            scene.site(name)
    last = len(names) - 1
    at = None if scene.place.layer is None else names.index(scene.place.layer)
    to = None if scene.place.neighbour is None else names.index(scene.place.neighbour)
    if at is None:
        at = 0 if to is None else to - 1 if to else 1
    if to is None:
        to = at + 1 if at < last else at - 1
    if at == to:
        raise MoescopeError(f"Layer {names[at]} is chosen twice: choose another as its neighbour.")
    return names[at], names[to]


def _affinity(scene: Scene) -> xr.Dataset:
    source, target = (scene.site(name).key for name in pair_of(scene))
    return scene.ask("affinity", pairs=((source, target),), **_filters(scene))


def _map(scene: Scene) -> Any:
    return figures.affinity_map(_affinity(scene))


def _to_source(scene: Scene, point: dict[str, Any]) -> Place | None:
    """Selects the expert of a row."""
    layer, neighbour = pair_of(scene)
    try:
        return scene.place.go(layer=layer, neighbour=neighbour, expert=int(point["y"]))
    except (KeyError, TypeError, ValueError):
        return None


def _information(scene: Scene) -> Any:
    return figures.mutual_information(scene.ask("affinity", pairs=None, cells=False, **_filters(scene)))


def _to_pair(scene: Scene, point: dict[str, Any]) -> Place | None:
    """Selects the pair of layers of a bar."""
    ends = str(point.get("y", "")).split(" → ")
    names = [name for end in ends for name, site in zip(scene.layers, scene.store.sites, strict=True)
             if end in (name, site.key)]  # fmt: skip
    return scene.place.go(layer=names[0], neighbour=names[1], expert=None) if len(names) == 2 else None


def _links(scene: Scene) -> pd.DataFrame:
    """The strongest transitions of the pair, of the selected expert alone if one of its first layer is."""
    layer, neighbour = pair_of(scene)
    frame: Any = table(_affinity(scene)).rename(columns={"source_expert": "source", "target_expert": "target"})
    frame = frame[frame["count"] > 0]  # `table` has put the most used first
    if scene.place.layer is not None and scene.place.expert is not None:
        scene.chosen()
        frame = frame[frame["source"] == scene.place.expert]
    return frame.assign(from_layer=layer, to_layer=neighbour).reset_index(drop=True)


def _to_target(place: Place, row: dict[str, Any]) -> Place | None:
    return place.go(page="expert", layer=str(row["to_layer"]), expert=int(row["target"]))


def _together(scene: Scene) -> Any:
    site = scene.site()
    result = scene.ask("coactivation", layers=(site.layer,), **_filters(scene))
    if result.sizes["layer"] > 1:  # two routers of one block share its number
        result = result.isel(layer=[list(result["site"].values).index(site.key)])
    if site.top_k < 2:
        raise MoescopeError(f"Layer {site.layer} gives each token one expert: no two are active together.")
    return figures.coactivation(result)


def _to_other(scene: Scene, point: dict[str, Any]) -> Place | None:
    try:
        return scene.place.go(layer=scene.place.layer or scene.layers[0], expert=int(point["y"]))
    except (KeyError, TypeError, ValueError):
        return None


def _paths(scene: Scene) -> Any:
    """The window from the chosen layer on, moved back where the model ends."""
    names = scene.layers
    if len(names) < 2:
        raise MoescopeError("This store has one MoE layer: there are no paths through several.")
    wanted = scene.place.length if scene.place.length is not None else _LENGTH
    length = min(max(wanted, 2), len(names))
    scene.site()
    start = min(0 if scene.place.layer is None else names.index(scene.place.layer), len(names) - length)
    layers = tuple(site.key for site in scene.store.sites[start : start + length])
    result = scene.ask("paths", layers=layers, **_filters(scene))
    return figures.paths(result, bands=scene.place.bands or "paths")


def _placement(scene: Scene) -> xr.Dataset:
    """The simulation that the place asks for."""
    place = scene.place
    fits, default = _fitting(scene)
    if place.devices is None and not fits:
        widths = ", ".join(map(str, sorted({site.n_experts for site in scene.store.sites})))
        raise MoescopeError(
            f"No number of devices divides every layer's experts ({widths}): `moescope analyze placement --uneven` "
            "lets devices differ by one expert per layer."
        )
    patience = _given(place.patience, _PATIENCE)
    if not 1 <= patience <= _LONGEST:
        raise MoescopeError(f"Each solver may take 1 to {_LONGEST} seconds, not {patience:,}.")
    return scene.ask(
        "placement",
        devices=_given(place.devices, default),
        method=place.method or "all",
        time_limit=float(patience),
        redundant=_given(place.group, 0),
        devices_per_node=place.nodes,
        bandwidth=float(_given(place.bandwidth, _INSIDE)),
        node_bandwidth=float(_given(place.node_bandwidth, _OUTSIDE)),
        **_filters(scene),
    )


def _given(chosen: int | None, default: int) -> int:
    """What the place says, also where that is 0: the analysis then says why it cannot be."""
    return default if chosen is None else chosen


def _simulated(scene: Scene) -> Any:
    return figures.placement(_placement(scene))


def _plans(scene: Scene) -> pd.DataFrame:
    frame = table(_placement(scene), ["plan"])
    return frame.assign(plan=[NAMES.get(name, name) for name in frame["plan"]])


def _said(scene: Scene) -> Any:
    """The simulation in words: the best placement beside chance, and what was proved of it."""
    result = _placement(scene)
    best = result.isel(plan=int(result["crossings_per_token"].values.argmin()))
    even = result.isel(plan=int(result["imbalance_mean"].values.argmin()))
    random, turn = result.sel(plan="random"), result.sel(plan="round_robin")
    steps = int((result["tokens"] > 0).sum())

    def name(part: xr.Dataset) -> str:
        return NAMES.get(str(part["plan"].item()), str(part["plan"].item()))

    gap = float(best["gap"])
    proved = f"at most {gap:.1%} of its crossings could still be saved where it was fitted"
    if gap != gap:
        proved = "no bound is known with replicas"
    parts = [
        [html.Strong(f"{float(best['crossings_per_token']):.2f}"), f" crossings per token with {name(best)}"],
        [
            f"random {float(random['crossings_per_token']):.2f}, round robin {float(turn['crossings_per_token']):.2f}, "
            f"no placement without replicas below {float(result['bound_per_step']) * steps:.2f}"
        ],
        [proved],
        [
            html.Strong(f"{float(even['imbalance_mean']):.2f} ×"),
            f" its fair share on the busiest device with {name(even)}, random {float(random['imbalance_mean']):.2f} ×, "
            f"round robin {float(turn['imbalance_mean']):.2f} ×",
        ],
    ]
    return html.Div([html.Span(part) for part in parts], className="facts")


def _neighbour(scene: Scene) -> Any:
    options = [(name, name) for name in scene.layers]
    return controls.select(
        "neighbour", "Neighbour", options, width=controls.wide(scene.layers, 104), placeholder="next"
    )


def _bands(scene: Scene) -> Any:
    options = [("paths", "Paths"), ("transitions", "Transitions")]
    return controls.switch("bands", "What the bands are", options, "paths")


def _window(scene: Scene) -> Any:
    longest = min(8, max(2, len(scene.layers)))
    options = [(str(n), f"{n} layers") for n in range(2, longest + 1)]
    return controls.select("length", "Layers", options, str(min(_LENGTH, longest)), width=96)


def _fitting(scene: Scene) -> tuple[list[int], int]:
    """Numbers of devices over which all layers' experts divide, and the one that counts unless another is chosen."""
    fewest = min(site.n_experts for site in scene.store.sites)
    fits = [n for n in range(2, min(fewest, 64) + 1) if all(site.n_experts % n == 0 for site in scene.store.sites)]
    return fits, _DEVICES if _DEVICES in fits else (fits or [2])[0]


def _devices(scene: Scene) -> Any:
    fits, default = _fitting(scene)
    return controls.select("devices", "Devices", [(str(n), f"{n} devices") for n in fits], str(default), width=116)


def _method(scene: Scene) -> Any:
    return controls.select("method", "Method", list(_METHODS.items()), "all", width=116)


def _per_node(scene: Scene) -> Any:
    return controls.select(
        "nodes",
        "Devices per node",
        [(value, shown) for value, shown in _nodes(scene)],
        width=116,
        placeholder="one node",
    )


def _nodes(scene: Scene) -> list[list[str]]:
    """Sizes of nodes into which the devices divide, but for one node of all."""
    total = _given(scene.place.devices, _fitting(scene)[1])
    return [[str(n), f"{n} a node"] for n in range(1, min(total, 65)) if total % n == 0]


def _redundant(scene: Scene) -> Any:
    return controls.slider("group", "Replicas a layer (EPLB)", 0, 0, 16, width=124)


def _inside(scene: Scene) -> Any:
    return controls.slider("bandwidth", "GB/s in a node", _INSIDE, 10, 900, width=116)


def _outside(scene: Scene) -> Any:
    return controls.slider("node_bandwidth", "GB/s between nodes", _OUTSIDE, 5, 400, width=116)


def _time(scene: Scene) -> Any:
    options = [(str(n), f"{n} s each") for n in (2, 5, 15, 30, 60, 120)]
    return controls.select("patience", "Solving time", options, str(_PATIENCE), width=104)


_SIMULATION = ("devices", "method", "patience", "group", *_NETWORK, *_FILTERS)

FLOW = Page(
    name="flow",
    title="Flow",
    question="Where do tokens go from layer to layer, and which experts belong together?",
    controls=(_neighbour,),
    choices=lambda scene: {"nodes": _nodes(scene)},
    views=(
        FigureView(
            name="transitions",
            title="From layer to layer",
            how=f"{READ_MAP}\nThe pair is the selected layer and its neighbour, the next one unless you choose. "
            "A click selects the expert of the row.",
            reads=_PAIR,
            width=7,
            draw=_map,
            pick=_to_source,
            marks="row",
        ),
        FigureView(
            name="information",
            title="Information between layers",
            how=f"{READ_INFORMATION}\nA click on a bar selects the pair.",
            reads=_FILTERS,
            width=5,
            draw=_information,
            pick=_to_pair,
        ),
        TableView(
            name="links",
            title="Strongest links",
            how="Transitions of the pair, the most used first; of the selected expert alone, if one is selected. "
            "Tokens: those for which the two come first, one in either layer. Share: of all for which the first of "
            "them does. Lift: times the second one's usual share. Expected: the mean count when the second layer is "
            "rotated within sequences, which q is held against, over all cells of the pair. A click leads to the "
            "second expert's page.",
            reads=("expert", *_PAIR),
            width=6,
            frame=_links,
            columns={
                "source": ("Expert", ""),
                "target": ("goes on to", ""),
                "count": ("Tokens", ",.0f"),
                "expected": ("Expected", ",.1f"),
                "conditional": ("Share", ".1%"),
                "lift": ("Lift", ".2f"),
                "q": ("q", ".2~g"),
            },
            go=_to_target,
            height=500,
        ),
        FigureView(
            name="together",
            title="Together in one layer",
            how="Of the selected layer (the first, unless one is selected). Orange: two experts are active at the same "
            "token more often than their loads alone would have it, blue: less often. Full colour stands at q ≤ 0.05, "
            "by the spread between groups of documents. A click selects the expert of the row.",
            reads=("layer", *_FILTERS),
            width=6,
            draw=_together,
            pick=_to_other,
            marks="row",
        ),
        FigureView(
            name="paths",
            title="Paths",
            how=f"{READ_BANDS} The window begins at the selected layer.",
            reads=("layer", "length", "bands", *_FILTERS),
            controls=(_bands, _window),
            draw=_paths,
        ),
        BlockView(name="said", title="Placement in words", how="", reads=_SIMULATION, draw=_said, bare=True),
        FigureView(
            name="placement",
            title="Placement on devices",
            how=f"{READ_SIMULATED} Solved on one half of the documents, judged on the other. The solvers stop at the "
            "solving time with the best they have, and say how far from the optimum it can be at most.",
            reads=_SIMULATION,
            controls=(_devices, _method, _time, _redundant, _per_node, _inside, _outside),
            draw=_simulated,
            marks="cell",
        ),
        TableView(
            name="plans",
            title="Every placement",
            how="Crossings per token with 95 % limits over held-out documents; p is the share of random placements "
            "that cross no more; gap is the share of its crossings that could at most still be saved, on the half it "
            "was fitted to. Imbalance is the busiest device's load over its fair share.",
            reads=_SIMULATION,
            frame=_plans,
            columns={
                "plan": ("Placement", ""),
                "crossings_per_token": ("Crossings a token", ".3f"),
                "crossings_low": ("low", ".3f"),
                "crossings_high": ("high", ".3f"),
                "crossings_per_step": ("Share of steps", ".1%"),
                "p": ("p", ".2~g"),
                "gap": ("Gap at most", ".1%"),
                "imbalance_mean": ("Imbalance", ".3f"),
                "imbalance_max": ("Worst layer", ".3f"),
                "microseconds": ("µs a token", ".4~g"),
                "seconds": ("Solved in s", ".1f"),
            },
            go=lambda place, row: None,
            height=330,
        ),
    ),
)
