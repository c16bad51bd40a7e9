"""The store in a notebook: a small table of facts. Names and texts come from strangers, so everything is escaped."""

from __future__ import annotations

import unicodedata
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moescope.store.reader import Store

_TEXT = 160  # characters of a document shown
_ROWS = 3


def store_html(store: Store) -> str:
    """HTML for `Store._repr_html_`."""
    manifest = store.manifest
    size = sum(shard.commit.bytes for shard in store.shards)
    facts = {
        "model": f"{manifest.model.name} ({manifest.model.model_type}, {manifest.model.dtype})",
        "corpus": manifest.corpus.source,
        "status": manifest.status,
        "tokens": f"{store.n_tokens:,} of {store.n_documents:,} documents, {len(store.shards)} shards, {_size(size)}",
        "labels": ", ".join(store.labels) or "none",
        "tiers": ", ".join(manifest.tiers) + (", loss" if manifest.loss else ""),
        "edits": "yes" if manifest.edits else "none",
        "folder": str(store.path),
    }
    groups: dict[tuple[object, ...], list[str]] = {}
    for site in store.sites:
        kind = (site.n_experts, site.top_k, site.score_function, site.shared_experts)
        groups.setdefault(kind, []).append(site.key)
    layers = [[_range(keys), *kind] for kind, keys in groups.items()]
    parts = [
        "<div><strong>MoEscope store</strong>",
        _table([], [[name, value] for name, value in facts.items()]),
        _table(["layers", "experts", "top k", "score", "shared experts"], layers),
    ]
    if store.shards:
        columns = ["document", *store.labels, "text"]
        rows = store.shards[0].documents(columns).slice(0, _ROWS).to_pylist()
        parts.append(_table(columns, [[_short(row[name]) for name in columns] for row in rows]))
    return "".join([*parts, "</div>"])


def plain(text: object) -> str:
    """Escaped for HTML; control and direction-changing characters are shown as their code points."""
    shown = "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in str(text))
    return escape(shown, quote=True)


def _table(head: list[str], rows: list[list[object]]) -> str:
    top = f"<thead><tr>{''.join(f'<th>{plain(h)}</th>' for h in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{plain(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def _short(value: object) -> str:
    text = "" if value is None else str(value).replace("\n", " ")
    return text if len(text) <= _TEXT else text[:_TEXT] + "…"


def _range(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} … {keys[-1]} ({len(keys)})"


def _size(n: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
