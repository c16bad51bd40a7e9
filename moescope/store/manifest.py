"""The manifest: what was captured, from which model and corpus, and how to read it (format version 1)."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from moescope.errors import StoreError
from moescope.store.columns import FloatName, IdName, id_dtype

FORMAT = "moescope-store"
VERSION = 1
MANIFEST = "manifest.json"

Tier = Literal["routing", "logits", "experts", "outliers", "activations"]
Status = Literal["capturing", "complete", "interrupted"]

# Columns every documents table has; a label may not take their names.
DOCUMENT_COLUMNS = ("document", "id", "text", "source", "n_tokens")


class _Record(BaseModel):
    """Unknown fields are refused: within one format version they can only be typing errors."""

    model_config = ConfigDict(extra="forbid")


class ModelRecord(_Record):
    """The model that was run."""

    name: str
    revision: str | None = None
    config_hash: str
    weights_fingerprint: str | None = None
    model_type: str
    architecture: str
    dtype: str
    device: str
    experts_implementation: str | None = None
    n_parameters: int
    n_active_parameters: int | None = None
    n_layers: int
    hidden_size: int


class TokenizerRecord(_Record):
    """The tokenizer; token texts themselves are in vocabulary.parquet."""

    name: str
    hash: str
    vocab_size: int


class CorpusRecord(_Record):
    """The texts; label columns are in documents.parquet under their own names."""

    source: str
    hash: str | None = None
    n_documents: int | None = None
    labels: list[str] = []
    max_length: int
    text_field: str | None = None
    chat_template: bool = False

    @field_validator("labels")
    @classmethod
    def _labels_are_free_names(cls, labels: list[str]) -> list[str]:
        folded = [name.casefold() for name in labels]  # SQL does not tell Domain from domain
        for name, low in zip(labels, folded, strict=True):
            if not name.strip():
                raise ValueError("a label needs a name")
            if low in DOCUMENT_COLUMNS:
                raise ValueError(f"label {name!r} has the name of a fixed column of documents.parquet; rename it")
            if folded.count(low) > 1:
                raise ValueError(f"label {name!r} is named twice")
        return labels


class Selection(_Record):
    """What besides the scores decides the selection.

    `bias_values` [E] are added to the score or logit that `rank_by` names; `group_rule` is (groups, kept, "max" or
    "top-2 sum" of a group's members as its worth), and `group_fill` stands for the members of lost groups (null: they
    are out). With these and the logits tier, selection scores can be had again: `Store.selection_scores`.
    """

    bias: bool = False
    groups: bool = False
    hash: bool = False
    bias_values: list[float] | None = None
    group_rule: tuple[int, int, str] | None = None
    group_fill: float | None = None


class SiteRecord(_Record):
    """One MoE layer: its address, its size, and what its router computes."""

    key: str = Field(pattern=r"^L\d{3,}[A-Za-z0-9_-]*$")
    layer: int = Field(ge=0)
    ordinal: int = Field(ge=0)
    path: str
    n_experts: int = Field(ge=1, le=65_535)
    top_k: int = Field(ge=1)
    slots_can_miss: bool = False
    skip_classes: int = 0  # router classes beyond the experts that mean "no expert"; their logits are not stored (zaya)
    score_function: str
    router_output: Literal["logits", "probabilities"] = "logits"
    selection: Selection = Selection()
    renormalised: bool | None = None
    scaling: float | None = None
    shared_experts: int = 0
    zero_experts: int = 0  # of n_experts, the last ones: they return their input (longcat_flash)
    weight_on: Literal["output", "input"] = "output"  # llama4 weights an expert's input: f(w x), not w f(x)
    id_dtype: IdName | None = None
    weight_dtype: FloatName = "float32"
    logit_dtype: FloatName = "float32"
    rank_by: str

    @model_validator(mode="after")
    def _sizes_agree(self) -> SiteRecord:
        if self.top_k > self.n_experts:
            raise ValueError(f"{self.key}: top_k {self.top_k} exceeds its {self.n_experts} experts")
        right = id_dtype(self.n_experts, self.slots_can_miss)
        if self.id_dtype not in (None, right):
            raise ValueError(f"{self.key}: id_dtype must be {right} for {self.n_experts} experts (or be left out)")
        self.id_dtype = right
        return self

    @property
    def ids(self) -> IdName:
        """The id type, which validation always fills in."""
        return self.id_dtype or id_dtype(self.n_experts, self.slots_can_miss)


class ActivationsRecord(_Record):
    """Which vectors the activations tier holds: kinds, site keys, experts (null: all selected), share of tokens.

    Experts are one list for all sites, or one for each site key.
    """

    kinds: list[Literal["outputs", "neurons", "router_inputs"]] = Field(min_length=1)
    sites: list[str] = Field(min_length=1)
    experts: list[int] | dict[str, list[int]] | None = None
    sample: float = Field(gt=0, le=1)
    seed: int = 0
    max_bytes: int = Field(ge=1)


class ShardSummary(_Record):
    """One committed shard."""

    name: str
    rows: int
    bytes: int


class FileRecord(_Record):
    """Size and blake2b-128 checksum (hex) of one file."""

    bytes: int
    checksum: str


class Manifest(_Record):
    """manifest.json. `n_tokens`, `n_documents`, `shards` and `files` are filled in when a capture ends."""

    format: Literal["moescope-store"] = FORMAT
    version: Literal[1] = VERSION
    store_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    status: Status = "capturing"
    model: ModelRecord
    tokenizer: TokenizerRecord
    corpus: CorpusRecord
    sites: list[SiteRecord] = Field(min_length=1)
    tiers: list[Tier] = Field(min_length=1)
    activations: ActivationsRecord | None = None
    loss: bool = False
    edits: dict[str, Any] | None = None
    versions: dict[str, str] = {}
    settings: dict[str, Any] = {}
    n_tokens: int | None = None
    n_documents: int | None = None
    shards: list[ShardSummary] = []
    files: dict[str, FileRecord] = {}
    self_check: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Manifest:
        keys = [site.key for site in self.sites]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"site key {key!r} is used twice")
        if len(set(self.tiers)) != len(self.tiers):
            raise ValueError("a tier is named twice")
        if "experts" in self.tiers and "routing" not in self.tiers:
            raise ValueError("the experts tier needs the routing tier: its slots are named by the routed ids")
        if ("activations" in self.tiers) != (self.activations is not None):
            raise ValueError("the activations tier and its record go together")
        strange = set(self.activations.sites) - set(keys) if self.activations is not None else set()
        if strange:
            raise ValueError(f"activations name the site {min(strange)!r}, which there is not")
        if self.setting("logits_compression", "none") not in ("none", "zstd"):
            raise ValueError("settings.logits_compression must be 'none' or 'zstd'")
        for name in ("shard_tokens", "shard_bytes"):
            if not isinstance(self.setting(name, 1), int) or self.setting(name, 1) < 1:
                raise ValueError(f"settings.{name} must be a positive integer")
        return self

    def setting(self, name: str, default: Any) -> Any:
        """One of the free-form settings."""
        return self.settings.get(name, default)


def parse_manifest(text: str | bytes, where: Path | str) -> Manifest:
    """Validate manifest.json.

    Raises:
        StoreError: not a manifest, of a newer format version, or with a bad field (named).
    """
    import json

    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}: manifest.json is damaged (not JSON); restore it from a copy.") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise StoreError(f"{where} is not a MoEscope store: its manifest.json is of another kind.")
    version = raw.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{where} has store format version {version}; this MoEscope reads up to {VERSION}. Upgrade moescope."
        )
    return validated(raw, where)


def validated(raw: Manifest | dict[str, Any], where: Path | str) -> Manifest:
    """A checked copy of a manifest, or a StoreError that names the first bad field."""
    if isinstance(raw, Manifest):
        raw = raw.model_dump()
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "manifest"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise StoreError(f"{where}: manifest field {field}: {first['msg']}{more}.") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and validate FOLDER/manifest.json.

    Raises:
        StoreError: the folder is not a store, or its manifest cannot be used.
    """
    try:
        text = (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "has no manifest.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise StoreError(f"{folder} is not a MoEscope store: it {what}.") from error
    except OSError as error:
        raise StoreError(f"{folder}: cannot read manifest.json ({error.strerror}).") from error
    return parse_manifest(text, folder)


# What may change between a capture and its continuation without changing one stored byte.
_FREE_FIELDS = {"store_id", "created", "status", "n_tokens", "n_documents", "shards", "files", "self_check"}
_FREE_VERSIONS = {"python", "pyarrow"}


def first_difference(old: Manifest, new: Manifest) -> str | None:
    """The first field that differs and changes the data, as "field: old -> new"; None if the two agree."""
    left, right = (record.model_dump(exclude=_FREE_FIELDS) for record in (old, new))
    for record in (left, right):
        record["versions"] = {name: v for name, v in record["versions"].items() if name not in _FREE_VERSIONS}
    return _difference(left, right, "")


def _difference(left: Any, right: Any, path: str) -> str | None:
    if isinstance(left, dict) and isinstance(right, dict):
        for name in [*left, *(name for name in right if name not in left)]:
            found = _difference(left.get(name), right.get(name), f"{path}.{name}" if path else str(name))
            if found:
                return found
        return None
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            found = _difference(a, b, f"{path}[{number}]")
            if found:
                return found
        return None
    return None if left == right else f"{path}: {left!r} -> {right!r}"
