"""The app inside a notebook: `store.explore()`."""

from __future__ import annotations

import html
import threading
from pathlib import Path

from moescope.app.place import Place
from moescope.app.server import build, listen

_SERVED: dict[Path, int] = {}


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
        return (
            f"<iframe src='{html.escape(self.url, quote=True)}' width='100%' height='{self.height}' "
            "style='border:0' title='MoEscope'></iframe>"
        )

    def __repr__(self) -> str:
        return f"Explorer({self.url})"


def explore(path: str | Path, page: str = "overview", height: int = 820, **place: object) -> Explorer:
    """Serves the app on one store in a thread of this process, and shows it.

    Args:
        path: the store's folder.
        page: the page to begin with.
        height: pixels of the frame.
        place: further fields of `Place`: layer=3, expert=7, by="domain", ….
    """
    folder = Path(path).resolve()
    if folder not in _SERVED:
        server = listen(build(folder))
        threading.Thread(target=server.serve_forever, name="moescope-app", daemon=True).start()
        _SERVED[folder] = server.server_port
    fields = {name: str(value) if name == "layer" else value for name, value in place.items()}
    start = Place(page=page, store=folder.name, **fields)  # pyright: ignore[reportArgumentType]
    return Explorer(f"http://127.0.0.1:{_SERVED[folder]}{start.href}", height)
