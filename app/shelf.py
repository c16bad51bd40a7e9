"""The stores below one folder: found, opened, watched; nothing outside the folder is ever opened."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from moescope.app.place import short
from moescope.errors import MoescopeError, StoreError
from moescope.store import Store
from moescope.store.manifest import MANIFEST

_DEEPEST = 4  # folders below the root in which stores are looked for


@dataclass(frozen=True)
class Opened:
    """One store as it stands at this moment.

    Attributes:
        name: its path below the folder, with "/" between steps.
        store: open; shows the shards committed when it was opened.
        version: changes whenever the store's contents do.
    """

    name: str
    store: Store
    version: str


class Shelf:
    """The stores of a folder, or the one store that the folder itself is."""

    def __init__(self, root: str | Path) -> None:
        """Looks into `root`.

        Raises:
            StoreError: there is no such folder.
        """
        self.root = Path(root).resolve()
        if not self.root.is_dir():
            raise StoreError(f"{root} is no folder; name a store or a folder of stores (`moescope demo` makes one).")
        self.alone = (self.root / MANIFEST).is_file()
        self._open: dict[str, Opened] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Every store's name, also of those that cannot be opened."""
        if self.alone:
            return [self.root.name]
        with self._lock:  # what has been deleted is let go
            for name in [name for name in self._open if not (self.root / name / MANIFEST).is_file()]:
                del self._open[name]
        found = []
        for folder, inside, files in os.walk(self.root):
            depth = len(Path(folder).relative_to(self.root).parts)
            if MANIFEST in files and depth:
                found.append(Path(folder).relative_to(self.root).as_posix())
                inside.clear()
            elif depth >= _DEEPEST:
                inside.clear()
            inside[:] = sorted(name for name in inside if not name.startswith("."))
        return sorted(found)

    def path(self, name: str) -> Path:
        """The folder of a store.

        Raises:
            StoreError: it is not below the root, or no store.
        """
        steps = name.split("/")
        wrong = any(step in ("", ".", "..") or step.startswith(".") or "\\" in step or "\0" in step for step in steps)
        folder = self.root if self.alone and name == self.root.name else self.root.joinpath(*steps)
        try:
            # Also against a link that leads out of the folder.
            inside = not wrong and folder.resolve().is_relative_to(self.root)
            held = inside and not (self.alone and folder != self.root) and (folder / MANIFEST).is_file()
        except (OSError, RuntimeError):  # a name too long for a file, links that lead to each other
            held = False
        if not held:
            raise StoreError(f"There is no store {short(name)!r} in this folder (any more).")
        return folder

    def open(self, name: str) -> Opened:
        """A store as it is now; opened again only if it has changed.

        Raises:
            StoreError: no such store, or a damaged one.
        """
        folder = self.path(name)
        version = _version(folder)
        with self._lock:
            known = self._open.get(name)
        if known is not None and known.version == version:
            return known
        opened = Opened(name, Store.open(folder), version)
        with self._lock:
            self._open[name] = opened
        return opened

    def sole(self) -> str | None:
        """The store's name where there is only one."""
        names = self.names()
        return names[0] if len(names) == 1 else None

    def trouble(self, name: str) -> str | None:
        """Why a store cannot be opened, None if it can."""
        try:
            self.open(name)
        except MoescopeError as error:
            return self.without_root(str(error))
        return None

    def changed(self, name: str) -> str:
        """Changes whenever a store's contents do, also that it can no longer be read."""
        try:
            return _version(self.path(name))
        except StoreError as error:
            return str(error)

    def without_root(self, message: str) -> str:
        """A message with paths as a person in the browser knows them: below the folder."""
        return message.replace(f"{self.root}{os.sep}", "").replace(str(self.root), self.root.name)


def _version(folder: Path) -> str:
    """Of the manifest and of each commit record; looks at names, sizes and times only."""
    seen = hashlib.blake2b(digest_size=8)
    try:
        for path in (folder / MANIFEST, folder / "shards"):
            stat = path.stat()
            seen.update(f"{path.name} {stat.st_mtime_ns} {stat.st_ino}".encode())
        with os.scandir(folder / "shards") as shards:
            for shard in sorted(shards, key=lambda entry: entry.name):
                seen.update(f"{shard.name} {os.path.exists(os.path.join(shard.path, 'commit.json'))}".encode())
    except FileNotFoundError as error:
        raise StoreError(f"{folder.name} is no longer there, or has no shards: {error.filename}.") from error
    return seen.hexdigest()
