"""Is this store whole? Every file against its commit, and every value against what the format promises."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moescope.errors import StoreError
from moescope.store.activations import file_name
from moescope.store.commit import SHARDS, Commit, checksum, read_commits, wrong_sizes
from moescope.store.manifest import Manifest, SiteRecord, read_manifest
from moescope.store.shard import Shard


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and where: a file of the store, or the store itself."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def check_store(path: str | Path, *, checksums: bool = True) -> list[Problem]:
    """Everything wrong with a store, also one too damaged to open; an empty list if nothing is. Reads every byte.

    Args:
        path: the store's folder.
        checksums: also compare every file with its checksum (off: sizes and contents only).

    Raises:
        StoreError: the folder is not a store, or of a newer version.
    """
    path = Path(path)
    manifest = read_manifest(path)
    try:
        commits = read_commits(path)
    except StoreError as error:
        return [Problem(SHARDS, str(error))]
    problems = list(_check_root(path, manifest, commits, checksums))
    offset, seen = 0, _Seen()
    for folder, commit in commits:
        where = f"{SHARDS}/{folder.name}"
        bad = {name: Problem(f"{where}/{name}", f"{wrong}.") for name, wrong in wrong_sizes(folder, commit)}
        if checksums:
            for name, record in commit.files.items():
                if name not in bad and checksum(folder / name) != record.checksum:
                    bad[name] = Problem(f"{where}/{name}", "its checksum differs from the commit: bytes were changed.")
        problems += bad.values()
        shard = Shard(folder, commit, manifest, offset)
        for name, steps in _contents(shard, seen).items():
            if f"{name}.parquet" in bad:
                continue
            try:
                problems += [Problem(f"{where}/{name}.parquet", what) for what in steps]
            except (StoreError, ValueError, KeyError) as error:
                problems.append(Problem(f"{where}/{name}.parquet", str(error)))
        offset += commit.rows
    if not problems:
        problems += seen.problems()
    return problems


class _Seen:
    """What must agree across shards: token ids with texts, documents with rows, sequences that stay together."""

    def __init__(self) -> None:
        self.token_ids: set[int] = set()
        self.texts: set[int] = set()
        self.token_documents: set[int] = set()
        self.documents: list[int] = []
        self.last: tuple[int, int] | None = None
        self.sequences: set[int] = set()

    def problems(self) -> Iterator[Problem]:
        if missing := self.token_ids - self.texts:
            yield Problem("vocabulary", f"token id {min(missing)} has no text.")
        if missing := self.token_documents - set(self.documents):
            yield Problem("documents", f"document {min(missing)} has tokens but no row.")
        if len(set(self.documents)) != len(self.documents):
            yield Problem("documents", "a document number occurs twice.")


def _check_root(
    path: Path, manifest: Manifest, commits: list[tuple[Path, Commit]], checksums: bool
) -> Iterator[Problem]:
    for name, record in manifest.files.items():
        file = path / name
        if not file.is_file():
            yield Problem(name, "is missing.")
        elif file.stat().st_size != record.bytes or (checksums and checksum(file) != record.checksum):
            yield Problem(name, "differs from what the manifest says.")
    if manifest.status == "complete":
        rows = sum(commit.rows for _, commit in commits)
        if len(manifest.shards) != len(commits) or manifest.n_tokens != rows:
            yield Problem(
                "manifest.json",
                f"names {len(manifest.shards)} shards and {manifest.n_tokens} tokens; "
                f"{len(commits)} and {rows} are committed.",
            )


def _contents(shard: Shard, seen: _Seen) -> dict[str, Iterator[str]]:
    """Checks by file; each is run only if the file itself is as it was written."""
    checks = {"tokens": _tokens(shard, seen), "documents": _documents(shard, seen), "vocabulary": _texts(shard, seen)}
    for tier, check in {"routing": _routing, "logits": _logits, "experts": _experts}.items():
        if tier in shard.manifest.tiers:
            checks[tier] = _every_site(shard, check)
    record = shard.manifest.activations
    for kind in [] if record is None else record.kinds:
        for key in [] if record is None else record.sites:
            checks[file_name(kind, key)] = _activations(shard, kind, key)
    return checks


def _tokens(shard: Shard, seen: _Seen) -> Iterator[str]:
    table = shard.tokens(["document", "sequence", "position", "token_id", "start", "end"])
    document, sequence, position = (table[name].to_numpy() for name in ("document", "sequence", "position"))
    seen.token_ids.update(np.unique(table["token_id"].to_numpy()).tolist())
    seen.token_documents.update(np.unique(document).tolist())
    if len(sequence):
        same = np.diff(sequence) == 0
        if (np.diff(position)[same] <= 0).any():
            row = int(np.flatnonzero(same & (np.diff(position) <= 0))[0]) + 1
            yield f"row {row}: positions of sequence {sequence[row]} do not increase."
        runs = sequence[np.flatnonzero(np.r_[True, ~same])].tolist()
        goes_on = seen.last is not None and seen.last[0] == runs[0]
        if goes_on and seen.last is not None and position[0] <= seen.last[1]:
            yield f"row 0: positions of sequence {runs[0]} do not increase over the shard boundary."
        fresh = runs[1:] if goes_on else runs
        if len(set(fresh)) != len(fresh) or seen.sequences.intersection(fresh):
            yield "rows of one sequence are not together."
        seen.sequences.update(runs)
        seen.last = (int(sequence[-1]), int(position[-1]))
    start, end = (table[name].fill_null(0).to_numpy() for name in ("start", "end"))
    if (start > end).any():
        yield "a character span ends before it starts."


def _documents(shard: Shard, seen: _Seen) -> Iterator[str]:
    table = shard.documents(["document"])
    seen.documents += table["document"].to_pylist()
    if table.num_rows != shard.commit.n_documents:
        yield f"has {table.num_rows} rows, its commit says {shard.commit.n_documents}."


def _texts(shard: Shard, seen: _Seen) -> Iterator[str]:
    seen.texts.update(shard.table("vocabulary", ["token_id"])["token_id"].to_pylist())
    yield from ()


def _every_site(shard: Shard, check) -> Iterator[str]:
    for site in shard.manifest.sites:
        yield from check(shard, site)


def _routing(shard: Shard, site: SiteRecord) -> Iterator[str]:
    routing = shard.routing(site.key)
    expert, weight = routing.expert, routing.weight
    if routing.valid is not None:
        expert, weight = expert[routing.valid], weight[routing.valid]
    if expert.size and expert.max() >= site.n_experts:
        yield f"{site.key}.expert holds id {expert.max()}, the site has {site.n_experts} experts."
    if not np.isfinite(weight).all():
        yield f"{site.key}.weight holds values that are not finite."
    for name in ("logsumexp", "entropy", "margin"):
        if len(getattr(routing, name)) != shard.n_tokens:
            yield f"{site.key}.{name} has another number of rows."


def _logits(shard: Shard, site: SiteRecord) -> Iterator[str]:
    if len(shard.logits(site.key)) != shard.n_tokens:
        yield f"{site.key}.logits has another number of rows."


def _experts(shard: Shard, site: SiteRecord) -> Iterator[str]:
    outputs = shard.experts(site.key)
    if (outputs.norm < 0).any() or (outputs.absmax > outputs.norm * 1.001).any():
        yield f"{site.key}: an expert's largest output exceeds the norm of its output."


def _activations(shard: Shard, kind: str, key: str) -> Iterator[str]:
    vectors = shard.activations(kind, key)
    row = vectors.row - shard.offset
    if len(row) and (row.min() < 0 or row.max() >= shard.n_tokens):
        yield "names a token row outside the shard."
    elif kind != "router_inputs" and (shard.routing(key).expert[row, vectors.slot] != vectors.expert).any():
        yield "names experts that the routing of their tokens does not."
