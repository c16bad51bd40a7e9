"""The pages of a store: what each shows, in reading order; no page computes."""

from __future__ import annotations

from moescope.app.pages.analyses import ANALYSES
from moescope.app.pages.compare import COMPARE
from moescope.app.pages.expert import EXPERT
from moescope.app.pages.flow import FLOW
from moescope.app.pages.lab import LAB
from moescope.app.pages.map import MAP
from moescope.app.pages.outliers import OUTLIERS
from moescope.app.pages.overview import OVERVIEW
from moescope.app.pages.specialisation import SPECIALISATION
from moescope.app.pages.text import TEXT
from moescope.app.views import Page

ALL: tuple[Page, ...] = (
    OVERVIEW,
    EXPERT,
    TEXT,
    SPECIALISATION,
    FLOW,
    MAP,
    OUTLIERS,
    COMPARE,
    LAB,
    ANALYSES,
)
