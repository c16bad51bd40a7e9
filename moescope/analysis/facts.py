"""What a store's model and corpus are, in the few numbers that a page about it begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.store import Store


def model_facts(store: Store) -> dict[str, Any]:
    """What the model and the corpus are, for the head of the page."""
    manifest = store.manifest
    widths = sorted({site.n_experts for site in store.sites})
    active = sorted({site.top_k for site in store.sites})
    shared = max(site.shared_experts for site in store.sites)
    # A folder's name is enough in a headline; the whole path stands in the provenance.
    name = manifest.model.name.rstrip("/").rsplit("/", 1)[-1]
    facts = [
        (f"{len(store.sites)}", "MoE layers" if len(store.sites) > 1 else "MoE layer"),
        (_span(widths), "experts in each"),
        (_span(active), "active per token"),
    ]
    if shared:
        facts.append((str(shared), "shared expert" if shared == 1 else "shared experts"))
    facts.append((_millions(manifest.model.n_parameters), "parameters"))
    if manifest.model.n_active_parameters:
        facts.append((_millions(manifest.model.n_active_parameters), "active parameters"))
    facts += [(f"{store.n_tokens:,}", "tokens read"), (f"{store.n_documents:,}", "documents")]
    return {"name": name, "facts": facts, "status": store.status, "type": manifest.model.model_type}


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}–{values[-1]}"


def _millions(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= 0.9995 * size:  # what rounds to 1,000 of the smaller unit is 1 of this one
            return f"{value / size:.3g}{unit}"
    return str(value)
