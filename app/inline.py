"""The app inside a notebook: `store.explore()`."""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from pathlib import Path

from moescope.app.place import Place
from moescope.app.server import build, listen

_SERVED: dict[tuple[Path, tuple[str, ...]], int] = {}


class Explorer:
    """The app in a frame; shows itself in a notebook.

    Attributes:
        url: where it is served, on this machine only, until the notebook's kernel ends.
        height: pixels.
    """

    def __init__(self, url: str, height: int) -> None:
        """Internal: see `explore`."""
        self.url = url
        self.height = height

    def _repr_html_(self) -> str:
        url = html.escape(self.url, quote=True)
        return (
            f"<iframe src='{url}' width='100%' height='{self.height}' style='border:0' title='MoEscope'></iframe>"
            "<p style='font-size:12px'>If this frame stays empty, open "
            f"<a href='{url}' target='_blank' rel='noopener'>{url}</a> on the machine on which the notebook runs, or "
            "let the notebook's page frame the app: <code>explore(framed_by=&quot;https://…&quot;)</code>, with that "
            "page's address up to its first single slash.</p>"
        )

    def __repr__(self) -> str:
        return f"Explorer({self.url})"


def explore(
    path: str | Path,
    page: str = "overview",
    height: int = 820,
    framed_by: str | Sequence[str] = (),
    **place: object,
) -> Explorer:
    """Serves the app on one store in a thread of this process, and shows it.

    Args:
        path: the store's folder.
        page: the page to begin with.
        height: pixels of the frame.
        framed_by: origins of pages that may frame the app besides those on this machine, such as
            "https://hub.example" where notebooks come from there. The kernel must run on the browser's machine, and
            the browser may ask whether that page may reach it.
        place: further fields of `Place`: layer=3, expert=7, by="domain", ….

    Raises:
        MoescopeError: what is in `framed_by` is no origin.
    """
    folder, framing = Path(path).resolve(), (framed_by,) if isinstance(framed_by, str) else tuple(framed_by)
    if (folder, framing) not in _SERVED:
        server = listen(build(folder, framed_by=framing))
        threading.Thread(target=server.serve_forever, name="moescope-app", daemon=True).start()
        _SERVED[folder, framing] = server.server_port
    fields = {name: str(value) if name == "layer" else value for name, value in place.items()}
    start = Place(page=page, store=folder.name, **fields)  # pyright: ignore[reportArgumentType]
    return Explorer(f"http://127.0.0.1:{_SERVED[folder, framing]}{start.href}", height)
