"""Hook adapters: find the MoE layers of a Hugging Face model, read them bit-exactly, and check that the reading is true."""

from moescope.hooks.aliases import ALIASES
from moescope.hooks.model import Model, load, wrap
from moescope.hooks.selfcheck import SelfCheck, SiteCheck, self_check
from moescope.hooks.semantics import Semantics
from moescope.hooks.sites import Site, discover
from moescope.hooks.taps import Tap, Want

__all__ = [
    "ALIASES", "Model", "SelfCheck", "Semantics", "Site", "SiteCheck", "Tap", "Want", "discover", "load", "self_check", "wrap",
]  # fmt: skip
