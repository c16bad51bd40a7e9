"""From one expert to the next, and from one layer to the next."""

from __future__ import annotations

from moescope.app.place import Place
from moescope.app.scene import Scene


def stepped(here: Place, scene: Scene, do: str, view: str = "") -> Place:
    """The place after a key: the next or previous expert or layer, or a panel over the whole window."""
    layers = scene.layers
    row = layers.index(here.layer) if here.layer in layers else 0
    width = scene.store.sites[row].n_experts
    expert = here.expert if here.expert is not None else 0
    if do == "full":
        return here.go(full=None if here.full == view else view or None)
    if do in ("next-expert", "previous-expert"):
        step = 1 if do == "next-expert" else -1
        to = (expert + step) % width if here.expert is not None and here.layer is not None else 0
        return here.go(layer=layers[row], expert=to)
    if do in ("next-layer", "previous-layer"):
        row = (row + (1 if do == "next-layer" else -1)) % len(layers) if here.layer is not None else 0
        kept = None if here.expert is None else min(here.expert, scene.store.sites[row].n_experts - 1)
        return here.go(layer=layers[row], expert=kept)
    return here
