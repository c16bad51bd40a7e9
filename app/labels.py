"""What a label can be."""

from __future__ import annotations

from moescope.app.scene import Scene

_PATIENCE = 0.3  # seconds: enough to read a column of many documents, and a page may wait for it


def label_values(scene: Scene, column: str | None = None) -> list[str]:
    """Values of a label (of the one that counts, if None), in order; read once for a store as it stands."""
    import pyarrow.compute as pc

    by = scene.by if column is None else column
    if by is None:
        return []

    def read() -> list[str]:
        values = pc.unique(scene.store.documents([by])[by]).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
        return sorted(str(value) for value in values if value is not None)

    return scene.compute(("label values", by), "reading the labels", read, patience=_PATIENCE)
