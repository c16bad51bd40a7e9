"""The app from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

APP_EXAMPLES = """Examples:

\b
  moescope app                           every store below this folder
  moescope app runs/demo                 one store
  moescope app runs --port 9000 --model ./my-moe
  moescope app runs --host 0.0.0.0       reachable from other machines; prints a link with a token"""


def app(
    folder: Annotated[Path, typer.Argument(help="A folder of stores, or a store.")] = Path("."),
    host: Annotated[str, typer.Option(help="Address to listen on; anything but this machine asks for a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8050,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that the lab may load, besides those of the stores; repeatable.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Ask for this token (default: one is made when needed).")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the lab run the own code of models that --model names.")
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
) -> None:
    """Open the app in the browser, on every store below a folder.

    Overview, experts, texts, specialisation, flow, map, outliers, comparison and a lab for steering. It needs no
    network and answers only this machine unless --host says otherwise.
    """
    from moescope.app import serve

    serve(folder, host, port, model or (), trust_remote_code, token, browser)
