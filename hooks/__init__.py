"""Hook adapters: find the MoE layers of a Hugging Face model, read them bit-exactly, and prove the reading true."""

from moescope.hooks.aliases import ALIASES
from moescope.hooks.anatomy import Anatomy, inspect
from moescope.hooks.loading import load
from moescope.hooks.model import Model, wrap
from moescope.hooks.selfcheck import SelfCheck, SiteCheck, self_check
from moescope.hooks.semantics import Semantics
from moescope.hooks.sites import Site, discover
from moescope.hooks.taps import Tap, Want

__all__ = [
    "ALIASES", "Anatomy", "Model", "SelfCheck", "Semantics", "Site", "SiteCheck", "Tap", "Want",
    "discover", "inspect", "load", "self_check", "wrap",
]  # fmt: skip
