"""Made-up captures for the store's tests: any number of experts, types, missing slots and batches, from one seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from moescope.store import (
    Batch,
    CorpusRecord,
    DocumentRow,
    ExpertMaxima,
    HiddenMaximum,
    Manifest,
    ModelRecord,
    OutlierBatch,
    SiteBatch,
    SiteRecord,
    TokenizerRecord,
)

ALL_TIERS = ["routing", "logits", "experts", "outliers"]


def a_site(layer: int = 1, n_experts: int = 8, top_k: int = 2, **more: Any) -> SiteRecord:
    return SiteRecord(
        key=f"L{layer:03d}",
        layer=layer,
        ordinal=layer,
        path=f"model.layers.{layer}.mlp",
        n_experts=n_experts,
        top_k=top_k,
        score_function="softmax",
        rank_by="weight",
        **more,
    )


def a_manifest(sites: list[SiteRecord] | None = None, tiers: list[str] | None = None, **more: Any) -> Manifest:
    labels = more.pop("labels", ["domain"])
    return Manifest(
        model=ModelRecord(
            name="made-up",
            config_hash="c0",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            dtype="bfloat16",
            device="cpu",
            n_parameters=1,
            n_layers=4,
            hidden_size=8,
        ),
        tokenizer=TokenizerRecord(name="bytes", hash="t0", vocab_size=50),
        corpus=CorpusRecord(source="made up", labels=labels, max_length=64),
        sites=sites or [a_site(1), a_site(3)],
        tiers=tiers or ALL_TIERS,
        **more,
    )


def stored_floats(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Any finite numbers of a declared type, bit patterns included that rounding would not give."""
    if name == "bfloat16":
        return rng.integers(0, 0x7F80, shape).astype(np.uint16) | (rng.integers(0, 2, shape) << 15).astype(np.uint16)
    return rng.normal(size=shape).astype(name)


def a_site_batch(rng: np.random.Generator, site: SiteRecord, rows: int) -> SiteBatch:
    slots = (rows, site.top_k)
    expert = np.argsort(rng.random((rows, site.n_experts)), axis=1)[:, : site.top_k]
    norm = rng.random(slots, dtype=np.float32)
    return SiteBatch(
        expert=expert,
        weight=stored_floats(rng, slots, site.weight_dtype),
        logsumexp=rng.normal(size=rows).astype(np.float32),
        entropy=rng.random(rows, dtype=np.float32),
        margin=rng.random(rows, dtype=np.float32),
        valid=rng.random(slots) < 0.8 if site.slots_can_miss else None,
        logits=stored_floats(rng, (rows, site.n_experts), site.logit_dtype),
        norm=norm,
        absmax=norm * 0.5,
    )


def an_outlier_batch(rng: np.random.Generator, manifest: Manifest, tokens: dict[str, np.ndarray]) -> OutlierBatch:
    """Maxima with few distinct values, so that ties happen, and with experts that are never selected."""
    experts = {}
    for site in manifest.sites:
        n = site.n_experts
        at = rng.integers(0, len(tokens["token_id"]), n)
        experts[site.key] = ExpertMaxima(
            absmax_out=rng.integers(1, 6, n).astype(np.float32),
            document=tokens["document"][at],
            position=tokens["position"][at],
            token_id=tokens["token_id"][at],
            absmax_in=rng.integers(1, 6, n).astype(np.float32),
            first_row_max=rng.integers(1, 6, n).astype(np.float32),
            tokens=rng.integers(0, 3, n) * (np.arange(n) != 0),
        )
    hidden = {}
    for layer in range(2):
        at = int(rng.integers(0, len(tokens["token_id"])))
        place = {name: int(tokens[name][at]) for name in ("document", "position", "token_id")}
        hidden[layer] = HiddenMaximum(absmax=float(rng.integers(1, 6)), channel=int(rng.integers(0, 8)), **place)
    return OutlierBatch(experts, hidden)


def made_batches(manifest: Manifest, n_batches: int, rows: int = 20, seed: int = 0) -> list[Batch]:
    """One document a batch, one sequence a document, characters of one to four bytes, one token a character."""
    rng = np.random.default_rng(seed)
    alphabet = "aé日𝄞 <"
    batches = []
    for number in range(n_batches):
        ids = rng.integers(0, len(alphabet), rows)
        tokens = {
            "document": np.full(rows, number),
            "sequence": np.full(rows, number),
            "position": np.arange(rows),
            "token_id": ids,
            "start": np.arange(rows),
            "end": np.arange(1, rows + 1),
            "phase": np.where(np.arange(rows) < rows - 3, "prefill", "decode"),
            "loss": np.where(np.arange(rows) == 0, np.nan, rng.random(rows)).astype(np.float32),
        }
        text = "".join(alphabet[i] for i in ids)
        label = ["law", "code", None][number % 3]
        labels = dict.fromkeys(manifest.corpus.labels, label)
        sites = {site.key: a_site_batch(rng, site, rows) for site in manifest.sites}
        outliers = an_outlier_batch(rng, manifest, tokens) if "outliers" in manifest.tiers else None
        document = DocumentRow(number, f"d{number}", text, "made up", labels, rows)
        batches.append(Batch(tokens, [document], dict(enumerate(alphabet)), sites, outliers))
    return batches
