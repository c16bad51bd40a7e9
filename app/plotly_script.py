"""Plotly's script, which is larger than all else: the browser compiles it while the first page is on its way.

Left alone, a browser first asks for it when a figure is there, and then works through most of it twice: to find where
its functions end, and again when they are called. A hint makes Chromium compile it once, in a thread beside the page's
(v8.dev/blog/explicit-compile-hints); to others it is a comment.
"""

from __future__ import annotations

from dash import Dash
from flask import Response, request

PATH = "/_dash-component-suites/plotly/package_data/plotly.min.js"
FIRST = r"^plotly\.js$"
"""Of the assets, what the page itself begins with: it asks for plotly's script."""
_HINT = b"//# allFunctionsCalledOnLoad\n"


def register(app: Dash) -> None:
    """Adds the hint to the script."""

    @app.server.after_request
    def _hinted(answer: Response) -> Response:
        if request.path == PATH and answer.status_code == 200:
            answer.set_data(_HINT + answer.get_data())
        return answer
