"""Hook adapters: find the MoE layers of a Hugging Face model, read them bit-exactly, and prove the reading true.

Names are loaded on first use, so that the list of aliases does not cost an import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moescope.hooks.aliases import ALIASES
    from moescope.hooks.anatomy import Anatomy, inspect
    from moescope.hooks.loading import load
    from moescope.hooks.model import Model, wrap
    from moescope.hooks.selfcheck import SelfCheck, SiteCheck, self_check
    from moescope.hooks.semantics import Semantics
    from moescope.hooks.sites import Site, discover
    from moescope.hooks.taps import Tap, Want

_HOME = {
    "ALIASES": "aliases",
    "Anatomy": "anatomy",
    "Model": "model",
    "SelfCheck": "selfcheck",
    "Semantics": "semantics",
    "Site": "sites",
    "SiteCheck": "selfcheck",
    "Tap": "taps",
    "Want": "taps",
    "discover": "sites",
    "inspect": "anatomy",
    "load": "loading",
    "self_check": "selfcheck",
    "wrap": "model",
}

__all__ = [
    "ALIASES", "Anatomy", "Model", "SelfCheck", "Semantics", "Site", "SiteCheck", "Tap", "Want",
    "discover", "inspect", "load", "self_check", "wrap",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
