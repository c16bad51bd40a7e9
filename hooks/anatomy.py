"""What is in a model, from its configuration alone: built on the meta device, so no weights are read or allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moescope.hooks.loading import load_config, model_class, skeleton
from moescope.hooks.sites import Site, active_parameters, discover


@dataclass(frozen=True)
class Anatomy:
    """A model's skeleton.

    Attributes:
        name, architecture, model_type: as asked for, and as the configuration says.
        dtype: precision of the checkpoint, where the configuration says.
        n_parameters: all of them.
        n_active_parameters: those that one token meets; None where k is not declared.
        bytes: size of the weights in ``dtype``.
        sites: MoE layers. ``n_layers``: layers of their stack, dense ones included.
    """

    name: str
    architecture: str
    model_type: str
    dtype: str
    n_parameters: int
    n_active_parameters: int | None
    bytes: int
    n_layers: int
    sites: list[Site]


def inspect(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Anatomy:
    """Look at a model of any size in seconds, without its weights.

    Args:
        name: alias, hub id or folder; only its configuration is read.
        revision: branch, tag or commit on the hub.
        trust_remote_code: allow code from the model's repository.

    Raises:
        MoescopeError: no such model, or its configuration cannot be built.
        RefusedError: no MoE layer, or none that can be captured faithfully.
    """
    config = load_config(name, revision, trust_remote_code)
    hf = skeleton(model_class(config, trust_remote_code), config, name)
    dtype = getattr(config, "dtype", None) or torch.float32
    sites = discover(hf)
    total = sum(parameter.numel() for parameter in hf.parameters())
    known = {site.key: site.top_k for site in sites if site.top_k is not None}
    return Anatomy(
        name=name,
        architecture=type(hf).__name__,
        model_type=config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        n_parameters=total,
        n_active_parameters=active_parameters(hf, sites, known) if len(known) == len(sites) else None,
        bytes=total * torch.empty((), dtype=dtype).element_size(),
        n_layers=len(hf.get_submodule(sites[0].layer_path.rpartition(".")[0])),  # type: ignore[arg-type]
        sites=sites,
    )
