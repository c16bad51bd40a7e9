"""Who may speak with the app, and with whom its pages may speak: this machine, and nobody else unless told so."""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Sequence
from urllib.parse import quote, urlencode

from dash import Dash
from flask import Response, redirect, request

from moescope.errors import MoescopeError

_LOCAL = ("127.0.0.1", "localhost", "[::1]")


def is_local(host: str) -> bool:
    """Whether an address to bind to is this machine's own."""
    return host in ("127.0.0.1", "localhost", "::1")


def new_token() -> str:
    """A token nobody guesses."""
    return secrets.token_urlsafe(24)


def _origin(text: str) -> str:
    """An origin as a content policy takes it: one host, and no pattern that stands for others."""
    if not re.fullmatch(r"https?://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?", text, re.ASCII):
        raise MoescopeError(f"{text!r} is no origin of a page: write https://hub.example or http://host:8888.")
    return text


def _cookie() -> str:
    """The cookie's name: cookies know no port, and two apps on one machine must not log each other out."""
    port = re.search(r":(\d{1,5})$", request.host)
    return f"moescope-token-{port[1]}" if port else "moescope-token"


def protect(app: Dash, token: str | None, framed_by: Sequence[str] = ()) -> None:
    """Adds the checks and the content policy.

    Without a token the app answers only requests addressed to this machine by name, so that a web page elsewhere
    cannot reach it through a name that it makes point here. A request that another page has sent is refused.

    Args:
        app: the app, with all its callbacks: inline scripts are allowed by their hashes.
        token: asked for once in the URL, then kept in a cookie; None: not asked for.
        framed_by: origins whose pages may show the app in a frame, besides those of this machine.

    Raises:
        MoescopeError: one of them is no origin.
    """
    framing = " ".join(map(_origin, framed_by))

    @app.server.before_request
    def _check() -> Response | tuple[str, int] | None:
        name = request.host.rsplit(":", 1)[0] if not request.host.endswith("]") else request.host
        if token is None and name not in _LOCAL:
            return "This app answers to this machine only; start it with --host and open the link it prints.", 403
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.host:
            return "Another page has sent this request.", 403
        # With an image or a script of another page no origin comes; a notebook's frame navigates.
        site, mode = (request.headers.get(f"Sec-Fetch-{part}") for part in ("Site", "Mode"))
        if site == "cross-site" and mode != "navigate":
            return "Another page has sent this request.", 403
        if token is None:
            return None
        given = request.args.get("token")
        if given is not None and hmac.compare_digest(given.encode(), token.encode()):
            kept = urlencode([(key, value) for key, value in request.args.items() if key != "token"])
            # One slash at the start: two would name another host.
            answer = redirect(quote("/" + request.path.lstrip("/")) + (f"?{kept}" if kept else ""))
            answer.set_cookie(_cookie(), token, httponly=True, samesite="Strict")
            return answer  # pyright: ignore[reportReturnType]
        held = request.cookies.get(_cookie(), "")
        if not hmac.compare_digest(held.encode(), token.encode()):
            return "This app asks for a token: open the link that `moescope app` printed.", 401
        return None

    scripts: list[str] = []

    @app.server.after_request
    def _policy(answer: Response) -> Response:
        if not scripts:
            scripts.extend(app.csp_hashes())
        answer.headers["Content-Security-Policy"] = (
            f"default-src 'self'; script-src 'self' {' '.join(scripts)}; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
            "base-uri 'none'; form-action 'self'; object-src 'none'; "
            f"frame-ancestors 'self' http://localhost:* http://127.0.0.1:* {framing}"
        )
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer
