"""Edits that analyses suggest, each with where it came from: plain functions of labelled results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from moescope.edits.edit import Demote, Mask, Merge, Promote, Scale, Zero
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import xarray as xr

Silence = Literal["mask", "zero"]
Stage = Literal["logit", "score", "weight", "weight_renormalised"]
Cell = tuple[int | str, int, float]
Suggestion = tuple[list[Any], dict[str, Any]]
SILENCE = {"mask": Mask, "zero": Zero}
ORIGIN = ("analysis", "store_id", "model", "corpus", "by")


def by_npmi(result: xr.Dataset, label: str, top: int, factor: float, stage: Stage) -> Suggestion:
    """Scale the experts of the highest nPMI with a label."""
    cells = _largest(_of_label(result, label)["npmi"], top)
    edits = [Scale(layer=layer, expert=(expert,), factor=factor, stage=stage) for layer, expert, _ in cells]
    return edits, _source(result, "from_npmi", cells, label=label, top=top)


def by_cognitive_experts(result: xr.Dataset, top: int, factor: float, stage: Stage) -> Suggestion:
    """Scale the experts of the highest nPMI with the markers of thinking."""
    if result.attrs.get("analysis") != "npmi_markers":
        raise MoescopeError("Cognitive experts are read off a result of analysis.npmi_markers.")
    marker = str(result["label"].values[-1])  # all of them together, where there are several
    edits, source = by_npmi(result, marker, top, factor, stage)
    return edits, source | {"recipe": "from_cognitive_experts", "markers": str(result.attrs["markers"])}


def by_risk_difference(result: xr.Dataset, label: str, promote: int, demote: int) -> Suggestion:
    """Promote the experts of the largest risk difference, demote those of the smallest."""
    if "label" in result.dims:
        difference = _of_label(result, label)["risk_difference"]
    else:  # of two sets: their own difference, or its negative for the second set
        sets = [str(result.attrs.get(name)) for name in ("first", "second")]
        if label not in sets:
            raise MoescopeError(f"This result compares {sets[0]!r} with {sets[1]!r}; there is no {label!r} in it.")
        difference = result["risk_difference"] * (1 if label == sets[0] else -1)
    up, down = _largest(difference, promote), [(a, b, -c) for a, b, c in _largest(-difference, demote)]
    edits = [Promote(layer=layer, expert=(expert,)) for layer, expert, _ in up]
    edits += [Demote(layer=layer, expert=(expert,)) for layer, expert, _ in down]
    return edits, _source(result, "from_risk_difference", [*up, *down], label=label)


def by_importance(result: xr.Dataset, criterion: str, lowest: int, kind: Silence) -> Suggestion:
    """Silence the experts with the least of a criterion."""
    if criterion not in result:
        raise MoescopeError(f"This result has no {criterion!r}; it has {', '.join(map(str, result.data_vars))}.")
    cells = [(layer, expert, -value) for layer, expert, value in _largest(-result[criterion], lowest)]
    edits = [SILENCE[kind](layer=layer, expert=(expert,)) for layer, expert, _ in cells]
    return edits, _source(result, "from_importance", cells, criterion=criterion)


def by_groups(result: xr.Dataset, keep: Literal["all", "first"], align: bool) -> Suggestion:
    """Merge the groups of two experts or more, the dominant one first, the others by their share."""
    if "group" not in result or "share" not in result:
        raise MoescopeError("Merging needs groups of experts, such as `analysis.expert_groups` gives.")
    edits, cells = [], []
    for row, layer in enumerate(_layers(result["layer"])):
        width = int(result["n_experts"].values[row])
        group, share = (result[name].values[row, :width] for name in ("group", "share"))
        for head in sorted(set(group.astype(int).tolist())):
            members = [head, *(e for e in range(width) if group[e] == head and e != head)]
            if len(members) > 1:
                weights = tuple(float(share[e]) for e in members)
                edits.append(Merge(layer=layer, expert=tuple(members), weights=weights, align=align, keep=keep))
                cells += [(layer, e, float(share[e])) for e in members]
    if not edits:
        raise MoescopeError("Every group has one expert alone, so there is nothing to merge.")
    return edits, _source(result, "from_groups", cells, keep=keep, align=align)


def by_super_experts(result: xr.Dataset, kind: Silence) -> Suggestion:
    """Silence the super experts."""
    size = result["absmax"].where(result["super"])
    cells = _largest(size, int(result["super"].sum()))
    if not cells:
        raise MoescopeError("The analysis found no super expert, so there is nothing to silence.")
    edits = [SILENCE[kind](layer=layer, expert=(expert,)) for layer, expert, _ in cells]
    return edits, _source(result, "from_super_experts", cells)


def _of_label(result: xr.Dataset, label: str) -> xr.Dataset:
    known = [str(name) for name in result["label"].values] if "label" in result.coords else []
    if label not in known:
        raise MoescopeError(f"This result has no label {label!r}; it has {', '.join(known) or 'none'}.")
    return result.sel(label=label)


def _largest(values: xr.DataArray, count: int) -> list[Cell]:
    """(layer, expert, value) of the `count` largest that are numbers; the first of equals first."""
    table = values.transpose("layer", "expert")
    cells = [
        (layer, int(expert), float(value))
        for layer, row in zip(_layers(table["layer"]), table.values, strict=True)
        for expert, value in zip(table["expert"].values, row, strict=True)
        if value == value  # not NaN: the expert exists and has a value
    ]
    if count > len(cells):
        raise MoescopeError(f"{count} experts were asked for, and the result has values for {len(cells)}.")
    return sorted(cells, key=lambda cell: -cell[2])[:count]


def _layers(layer: xr.DataArray) -> list[int | str]:
    """What an edit calls each layer: its number, or its site's key where layers have two routers."""
    numbers = [int(number) for number in layer.values]
    if len(set(numbers)) == len(numbers) or "site" not in layer.coords:
        return list(numbers)
    return [str(site) for site in layer["site"].values]


def _source(result: xr.Dataset, how: str, cells: list[Cell], **more: Any) -> dict[str, Any]:
    kept = {name: str(result.attrs[name]) for name in ORIGIN if name in result.attrs}
    values = [{"layer": layer, "expert": expert, "value": value} for layer, expert, value in cells]
    return {"recipe": how, **more, **kept, "values": values}
