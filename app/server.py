"""The app, put together and served."""

from __future__ import annotations

import logging
import sys
import threading
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
from dash import Dash
from flask import request
from plotly.io.json import to_json_plotly
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from moescope.app import book, downloads, drawing, guard, navigation, plotly_script, shell, tables
from moescope.app.answers import Answers, Pending
from moescope.app.jobs import Jobs
from moescope.app.place import Place
from moescope.app.scene import Desk
from moescope.app.shelf import Shelf
from moescope.app.views import BlockView, FigureView
from moescope.errors import MoescopeError

with suppress(ImportError):
    # plotly asks for it while it writes a figure, and fails where another thread is half way through loading it.
    import PIL.Image  # noqa: F401

_OPENING = 2.0  # seconds that a page takes to stand


def build(
    folder: str | Path = ".",
    models: Sequence[str] = (),
    trust_remote_code: bool = False,
    token: str | None = None,
    framed_by: Sequence[str] = (),
) -> Dash:
    """The Dash app on all stores below a folder.

    Args:
        folder: a folder of stores, or a store.
        models: models that the lab may load, besides those of the stores and the aliases.
        trust_remote_code: whether the lab may run the own code of `models`; that of others never runs.
        token: asked of every browser, if given.
        framed_by: origins, as `https://hub.example`, whose pages may show the app in a frame.

    Raises:
        StoreError: there is no such folder.
        MoescopeError: what is in `framed_by` is no origin.
    """
    jobs = Jobs()
    desk = Desk(Shelf(folder), jobs, Answers(jobs), tuple(models), trust_remote_code)
    app = Dash(
        "moescope",
        title="MoEscope",
        update_title=None,  # pyright: ignore[reportArgumentType]
        serve_locally=True,
        assets_folder=str(Path(__file__).parent / "assets"),
        assets_ignore=plotly_script.FIRST,
        index_string=shell.INDEX,
        suppress_callback_exceptions=True,
        on_error=lambda error: navigation.alarmed(desk, error),
        add_log_handler=False,
    )
    app.layout = shell.layout(desk)
    navigation.register(app, desk)
    drawing.register(app, desk)
    tables.register(app, desk)
    downloads.register(app, desk)
    for page in book.PAGES.values():
        if page.register is not None:
            page.register(app, desk)
    plotly_script.register(app)
    guard.protect(app, token or None, framed_by)  # an empty one would let everybody in
    app.server.extensions["moescope"] = desk

    @app.server.before_request
    def _opened() -> None:
        if request.path == "/" or request.path.startswith("/store/"):  # a browser opens a page: it needs every core
            desk.answers.make_way(_OPENING)

    return app


def listen(app: Dash, host: str = "127.0.0.1", port: int = 0) -> BaseWSGIServer:
    """A server for the app, bound but not yet serving; port 0 takes a free one (`server.server_port`).

    Raises:
        MoescopeError: the port is taken.
    """
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    try:
        return make_server(host, port, app.server, threaded=True, request_handler=_Quiet)
    except (OSError, SystemExit) as error:
        raise MoescopeError(f"Port {port} of {host} cannot be used; name another with --port.") from error


def serve(
    folder: str | Path = ".",
    host: str = "127.0.0.1",
    port: int = 8050,
    models: Sequence[str] = (),
    trust_remote_code: bool = False,
    token: str | None = None,
    browser: bool = False,
) -> None:
    """Serves the app until it is interrupted; bound to anything but this machine, it asks for a token.

    Raises:
        StoreError: there is no such folder.
        MoescopeError: the port is taken.
    """
    asked = token or (None if guard.is_local(host) else guard.new_token())
    app = build(folder, models, trust_remote_code, asked)
    server = listen(app, host, port)
    shown = f"[{host}]" if ":" in host else host
    link = f"http://{shown}:{server.server_port}/{f'?token={asked}' if asked else ''}"
    print(f"MoEscope: {link}   (Ctrl-C ends it)", flush=True)
    if browser:
        webbrowser.open(link)
    sys.setswitchinterval(0.001)  # counting lets go of Python's lock often, so that a click need not wait for it
    threading.Thread(target=warm, args=(app.server.extensions["moescope"],), daemon=True).start()
    try:
        server.serve_forever()
    finally:
        server.server_close()


def warm(desk: Desk) -> None:
    """Draws the overview of the only store once, while the browser starts: so that what it needs is there."""
    name = desk.shelf.sole()
    if name is None or desk.shelf.trouble(name) is not None:
        return
    place = Place("overview", name)
    for view in book.PAGES["overview"].shown(place):
        with suppress(Pending, MoescopeError, OSError, pa.ArrowException):  # whoever looks at it is told
            scene = desk.scene(place, patience=2)
            if isinstance(view, FigureView):
                to_json_plotly(drawing.sent(view, scene, drawing.figure_of(view, scene)))
            elif isinstance(view, BlockView):
                view.draw(scene)


class _Quiet(WSGIRequestHandler):
    """Does not write a line for every request."""

    protocol_version = "HTTP/1.1"

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing."""
