"""What a model loses without one expert, on texts of the store that shows it: masked alone, beside others of its layer.

A store holds no model, a model holds no texts: this is where both meet. It is made to be waited for: a few documents of
each label, the same ones for every expert, so that experts compare.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr

from moescope.analysis.contents import contents_of
from moescope.analysis.counts import labelling
from moescope.analysis.labelled import provenance
from moescope.capturing.corpus import Corpus
from moescope.edits import Mask, Recipe, Zero
from moescope.effects.losses import MAX_LENGTH, document_losses
from moescope.effects.recipes import beside_controls
from moescope.errors import MoescopeError
from moescope.hooks import Model

if TYPE_CHECKING:
    from moescope.store import Store
    from moescope.store.manifest import SiteRecord

DOCUMENTS = 8
"""Documents of each label."""
LABELS = 12
"""Labels looked at: those with the most documents."""
CONTROLS = 20
"""Other experts of the layer; p cannot be below 1 / (1 + controls), so that fewer than 19 can show nothing."""
BATCH_TOKENS = 2048  # of one forward pass: it can be stopped between two
ALONE = (
    "each control is another expert of the same layer masked (or zeroed) alone, all of them where there are no more; "
    "p and p_any as in `effects.effect`"
)


def causal_effect(
    model: Model,
    store: Store,
    layer: int | str,
    expert: int,
    *,
    by: str | None = None,
    where: dict[str, Any] | None = None,
    kind: Literal["mask", "zero"] = "mask",
    documents: int = DOCUMENTS,
    controls: int = CONTROLS,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """What masking one expert does to the loss of the store's own texts, beside masking others of its layer.

    How to read it: as `effects.effect`: the expert matters for a label when `change` lies outside what the controls do
    and `p_any`, which has been corrected for looking at several labels, is small. The texts are those that its other
    numbers come from: what stands here need not stand on other texts.

    Args:
        model: the model that the store was captured from.
        store: an open store.
        layer: model layer index, or a site key where a layer has two routers.
        expert: its number.
        by: a label; without one, all documents together.
        where: only these documents, as in every analysis.
        kind: "mask" (others take its place) or "zero" (nothing does).
        documents: of each label at most, drawn at random, the same for every expert; of each the beginning, as long as
            the store's own contexts but at most 512 tokens. Of more than 12 labels the 12 with the most documents.
        controls: other experts of the layer at most.
        seed: of the documents, the controls and the intervals.
        on_progress: called before every forward pass with the tokens done and how many there are in all.

    Returns:
        What `effects.effect` gives by label, with the coordinate control: the expert that was masked instead.

    Raises:
        MoescopeError: another model's store, no such expert, no texts, or no document is left.
        RefusedError: this family's experts cannot be silenced so.
    """
    record, own = store.manifest.model, store.site(layer)
    require_model(model, store)
    if not 0 <= expert < own.n_experts:
        raise MoescopeError(f"Layer {own.layer} has experts 0 to {own.n_experts - 1}; there is no {expert}.")
    if documents < 1 or controls < 0:
        raise MoescopeError("Measure on at least one document of each label, with 0 controls or more.")
    names = [site.layer for site in store.sites]
    place = own.layer if names.count(own.layer) == 1 else own.key
    rng = np.random.default_rng(seed)
    corpus, left_out = _corpus(store, by, where, documents, rng)
    others = [other for other in range(own.n_experts) if other != expert]
    others = sorted(rng.choice(others, others_of(own, controls), replace=False).tolist())
    edit = {"mask": Mask, "zero": Zero}[kind]
    recipe, *beside = (Recipe([edit(layer=place, expert=one)]) for one in (expert, *others))
    recipes = [None, recipe, *beside]
    length = length_of(store)
    done, total = 0, 0 if on_progress is None else len(recipes) * _tokens(model, corpus, length)

    def told(recipe: int, mask: torch.Tensor) -> Any:
        nonlocal done
        if on_progress is not None:
            on_progress(done, total)
        done += int(mask.sum())
        return nullcontext()

    losses = document_losses(
        model, corpus, recipes, max_length=length, batch_tokens=BATCH_TOKENS, beside=told, beginnings=True
    )
    if not losses.documents:
        raise MoescopeError("The drawn documents have fewer than two tokens each: there is nothing to predict.")
    result = beside_controls(model, corpus, recipe, losses, by, rng, seed)
    same = record.weights_fingerprint in (None, model.weights_fingerprint)
    facts = provenance(
        store, kind=kind, layer=place, expert=expert, where=where, documents_per_label=documents,
        labels_left_out=left_out, max_length=length, weights="the store's" if same else "other than the store's",
        control=ALONE, experts_of_layer=own.n_experts,
    )  # fmt: skip
    facts["store_edits"] = facts.pop("edits", "none")
    return result.assign_coords(control=others).assign_attrs(facts, analysis="causal_effect")


def others_of(site: SiteRecord, controls: int = CONTROLS) -> int:
    """How many other experts of a layer are masked instead."""
    return min(controls, site.n_experts - 1)


def length_of(store: Store) -> int:
    """Tokens of a document that are read at most: as many as the store's own contexts have, up to 512."""
    return min(MAX_LENGTH, store.manifest.corpus.max_length)


def require_model(model: Model, store: Store) -> None:
    """Refuses a model whose experts are not those of the store.

    The same weights are the store's model; so is the same configuration, or the same name with the same experts:
    another precision changes both hashes, another training the one of the weights.

    Raises:
        MoescopeError: it is another model.
    """
    record = store.manifest.model
    if record.weights_fingerprint is not None and record.weights_fingerprint == model.weights_fingerprint:
        return
    widths = [(site.key, site.n_experts) for site in store.sites]
    alike = record.config_hash == model.config_hash or record.name == model.name
    if not alike or widths != [(site.key, site.n_experts) for site in model.sites]:
        raise MoescopeError(
            f"{model.name} is not the model that this store was captured from ({record.name}): its experts are others."
        )


def _corpus(
    store: Store, by: str | None, where: dict[str, Any] | None, documents: int, rng: np.random.Generator
) -> tuple[Corpus, int]:
    """Some documents of each label as they were captured, and how many labels are left out."""
    contents, rows = contents_of(store), []
    if not contents.has_texts:
        raise MoescopeError("This store holds no texts to measure a loss on; `effects.effect` takes texts of your own.")
    labels = labelling(store, by, where)
    kept = np.argsort(-labels.documents_per_label, kind="stable")[:LABELS]
    for label in np.sort(kept):
        known = labels.documents[(labels.code == label) & (labels.tokens > 1)]
        for number in np.sort(rng.choice(known, min(documents, known.size), replace=False)).tolist():
            text = contents.text_of(number) or ""
            if text.strip():
                rows.append({"text": text, "id": str(number)} | ({} if by is None else {by: labels.labels[label]}))
    if not rows:
        raise MoescopeError("None of the documents that are left has a text of two tokens or more.")
    named = [] if by is None else [by]
    if store.manifest.corpus.chat_template:
        chats = [row | {"text": [{"role": "as stored", "content": row["text"]}]} for row in rows]
        return Corpus(chats, named, chat="text").templated(_AsStored), len(labels.labels) - len(kept)
    return Corpus(rows, named), len(labels.labels) - len(kept)


class _AsStored:
    """The template of conversations that a template has written out already, special tokens and all."""

    chat_template = "{{ messages[0].content }}"

    @staticmethod
    def apply_chat_template(messages: list[dict[str, str]], **more: Any) -> str:
        return messages[0]["content"]


def _tokens(model: Model, corpus: Corpus, length: int) -> int:
    """Tokens of all documents' first contexts."""
    if model.tokenizer is None:
        return 0  # refused where it is needed
    texts = [document.text for document in corpus]
    return sum(
        min(len(ids), length) for ids in model.tokenizer(texts, add_special_tokens=corpus.chat is None)["input_ids"]
    )
