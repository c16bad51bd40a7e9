"""Labelled results: layers of unequal width in one xarray Dataset, provenance in its attributes, tidy tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float, Int

    from moescope.store import Store

PADDING = (
    "layers with fewer experts than the widest one are padded: `exists` is False and every value is NaN there, never 0"
)


NONE_IS_MINUS_ONE = {"none": -1}
"""Attributes of a variable of whole numbers in which -1 stands for none: `table` leaves it out."""


@dataclass(frozen=True)
class LayerAxis:
    """The layer axis of a result: which MoE layers it has and how wide each is.

    Attributes:
        layers: [layer] model layer indices, as the model numbers them (dense layers counted).
        sites: [layer] site keys of the store, unique even where one block holds two routers.
        n_experts: [layer] number of experts of each.
        top_k: [layer] selections per token; NaN where plain counts did not say.
    """

    layers: Int[np.ndarray, " layer"]
    sites: tuple[str, ...]
    n_experts: Int[np.ndarray, " layer"]
    top_k: Float[np.ndarray, " layer"]

    @classmethod
    def of_sites(cls, sites: Sequence[Any]) -> LayerAxis:
        """The axis of a store's site records."""
        return cls(
            layers=np.array([site.layer for site in sites], dtype=np.int64),
            sites=tuple(site.key for site in sites),
            n_experts=np.array([site.n_experts for site in sites], dtype=np.int64),
            top_k=np.array([site.top_k for site in sites], dtype=np.float64),
        )

    @classmethod
    def of_array(
        cls,
        values: Float[np.ndarray, "layer expert *rest"],
        layers: Sequence[int] | None,
        top_k: int | None = None,
        n_experts: Sequence[int] | None = None,
    ) -> LayerAxis:
        """The axis of a plain array. A layer is as wide as its last expert that is not NaN, unless `n_experts` says."""
        n_layers, widest = values.shape[:2]
        index = np.arange(n_layers) if layers is None else np.asarray(layers, dtype=np.int64)
        if index.shape != (n_layers,):
            raise MoescopeError(
                f"`layers` names {index.size} layers, but the array has {n_layers}: give one index per layer."
            )
        if n_experts is None:
            present = ~np.isnan(values.reshape(n_layers, widest, -1)).all(axis=2)
            width = np.where(present, np.arange(1, widest + 1), 0).max(axis=1, initial=0)
        else:
            width = np.asarray(n_experts, dtype=np.int64)
        return cls(
            layers=index,
            sites=tuple(f"L{layer:03d}" for layer in index),
            n_experts=width,
            top_k=np.full(n_layers, np.nan if top_k is None else top_k, dtype=np.float64),
        )

    @property
    def exists(self) -> np.ndarray:
        """[layer, expert] bool: does this expert exist in this layer?"""
        widest = int(self.n_experts.max(initial=0))
        return np.arange(widest)[None, :] < self.n_experts[:, None]

    def pad(self, per_layer: Sequence[np.ndarray]) -> Float[np.ndarray, "layer expert *rest"]:
        """Stacks one [expert, ...] array per layer into [layer, expert, ...], NaN where a layer has no such expert."""
        rest = per_layer[0].shape[1:] if per_layer else ()
        out = np.full((len(per_layer), int(self.n_experts.max(initial=0)), *rest), np.nan)
        for row, values in enumerate(per_layer):
            out[row, : values.shape[0]] = values
        return out

    def coordinates(self) -> dict[str, Any]:
        """Coordinates shared by every result: layer, expert, and along layer the site key, width and top-k."""
        return {
            "layer": ("layer", self.layers, {"long_name": "model layer index"}),
            "expert": ("expert", np.arange(int(self.n_experts.max(initial=0))), {"long_name": "expert"}),
            "site": ("layer", np.array(self.sites, dtype=object)),
            "n_experts": ("layer", self.n_experts),
            "top_k": ("layer", self.top_k),
        }


def layer_name(layer: int, site: str) -> str:
    """A layer as people write it: its model index, or its site key where that says more ("L003-mlp" of two routers)."""
    return str(int(layer)) if site == f"L{int(layer):03d}" else site


def layer_names(result: xr.Dataset) -> list[str]:
    """Each layer of a result as people write it, whatever other layers it has."""
    layers = result["layer"].values.tolist()
    if "site" not in result.coords:
        return [str(int(layer)) for layer in layers]
    return [layer_name(layer, str(site)) for layer, site in zip(layers, result["site"].values, strict=True)]


def row_of_expert(result: xr.Dataset, site: str, expert: int) -> int:
    """The row of an expert's layer in a result.

    Raises:
        MoescopeError: the result has no such expert.
    """
    sites = [str(key) for key in result["site"].values]
    if site not in sites or not 0 <= expert < int(result["n_experts"].values[sites.index(site)]):
        raise MoescopeError(f"This result has no expert {expert} in {site}.")
    return sites.index(site)


def expert_name(layer: str, expert: int) -> str:
    """An expert as people write it, its layer as `layer_name` does: "L3E7", "L003-mlpE7"."""
    return f"{layer if layer.startswith('L') else f'L{layer}'}E{expert}"


def provenance(store: Store | None, **parameters: Any) -> dict[str, Any]:
    """Attributes that say where a result came from; flat, so that the result can be saved as netCDF.

    None becomes "none" and sequences become comma-separated strings. Without a store, `store_id` is "plain counts".
    """
    if store is None:
        found: dict[str, Any] = {"store_id": "plain counts"}
    else:
        manifest = store.manifest
        found = {
            "store_id": manifest.store_id,
            "store_status": store.status,
            "store_tokens": int(store.n_tokens),
            "model": manifest.model.name,
            "config_hash": manifest.model.config_hash,
            "corpus": manifest.corpus.source,
        }
        if manifest.settings.get("edits"):  # not the plain model's routing
            found["edits"] = "; ".join(manifest.settings["edits"])
    return found | {name: _flat(value) for name, value in parameters.items()}


def _flat(value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}={_flat(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_flat(inner)) for inner in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


def table(result: xr.Dataset, dims: Sequence[str] | None = None) -> pd.DataFrame:
    """A tidy table of a result, one row per coordinate: what `--csv` and `--json` print.

    Args:
        result: a Dataset from any analysis.
        dims: the dimensions that make a row, e.g. `["layer"]` for the balance of each layer; the result's own finest
            table (`attrs["table"]`) if not given.

    Returns:
        A DataFrame: the coordinates of `dims`, then every variable with exactly these dimensions. Experts that do not
        exist in a layer are left out, and so is a -1 that stands for none; the rows follow the result's own order
        (`attrs["table_order"]`), largest first.

    Raises:
        MoescopeError: no variable of the result has these dimensions.
    """
    import pandas as pd

    wanted = tuple(str(result.attrs["table"]).split(", ")) if dims is None else tuple(dims)
    names = [str(name) for name, variable in result.data_vars.items() if set(variable.dims) == set(wanted)]
    if not names or (dims is not None and set(wanted) - set(result.dims)):
        offered = sorted({", ".join(map(str, variable.dims)) for variable in result.data_vars.values()} - {""})
        raise MoescopeError(f"This result has no table by {', '.join(wanted)}; it has tables by: {'; '.join(offered)}.")
    index = np.indices([result.sizes[dim] for dim in wanted]).reshape(len(wanted), -1)
    columns: dict[str, Any] = {
        dim: result[dim].values[place] for dim, place in zip(wanted, index, strict=True) if dim in result.coords
    }
    if "layer" in wanted and not result.indexes["layer"].is_unique:
        # Two routers in one block share a layer number: their site keys tell the rows apart.
        columns["site"] = result["site"].values[index[wanted.index("layer")]]
    columns |= {name: _column(result[name].transpose(*wanted)) for name in names if name != "exists"}
    frame = pd.DataFrame(columns)
    if "exists" in result and {"layer", "expert"} <= set(wanted):
        rows, experts = index[wanted.index("layer")], index[wanted.index("expert")]
        there = result["exists"].values[rows, experts]
        if "other" in wanted:  # pairs of experts of one layer: both must exist, and be two
            others = index[wanted.index("other")]
            there &= result["exists"].values[rows, others] & (experts != others)
        frame = frame.loc[there]
    order = str(result.attrs.get("table_order"))
    if order in columns:
        frame = frame.sort_values(by=order, ascending=False, kind="stable", na_position="last")
    return frame.reset_index(drop=True)


def _column(variable: xr.DataArray) -> Any:
    """The values of a variable in one row; nullable whole numbers where some are none."""
    import pandas as pd

    values = variable.values.ravel()
    if "none" not in variable.attrs or not (values == variable.attrs["none"]).any():
        return values
    none: Any = values == variable.attrs["none"]
    return pd.Series(values).astype("Int64").mask(none).array
