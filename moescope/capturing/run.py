"""Run a corpus through a model under taps into a store: forecast, forward passes, writer; nothing lost on the way."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moescope.capturing.activations import Activations, Plan, plan
from moescope.capturing.assemble import TokenTexts, assemble
from moescope.capturing.batches import TextBatch, ahead, batches
from moescope.capturing.corpus import Census, Corpus
from moescope.capturing.forecast import Forecast, forecast
from moescope.capturing.generating import checked, defaults, feels_left_padding, generations
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.model import Model
from moescope.hooks.readings import HostCopy
from moescope.hooks.semantics import Semantics
from moescope.hooks.sinks import SinkWatch
from moescope.hooks.sites import plain_path
from moescope.hooks.taps import Tap, Want
from moescope.store import Store
from moescope.store.commit import read_commits
from moescope.store.manifest import CorpusRecord, Manifest, ModelRecord, Selection, SiteRecord, TokenizerRecord
from moescope.store.sinks import SINKS
from moescope.store.writer import SHARD_TOKENS, StoreWriter

TIERS = ("routing", "logits", "experts", "outliers", "activations")
DEFAULT_TIERS = ("routing", "outliers")
MAX_LENGTH = 2048  # tokens of context, where the model allows more
BATCH_TOKENS = 8192  # padded tokens of one forward pass
LOSS_ROWS = 1024  # positions whose float32 logits are held at once

OnForecast = Callable[[Forecast], None]
OnProgress = Callable[[int], None]


def capture(
    model: Model,
    corpus: Corpus | str | Path,
    out: str | Path,
    tiers: Sequence[str] = DEFAULT_TIERS,
    *,
    loss: bool = False,
    sinks: bool = False,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    shard_tokens: int = SHARD_TOKENS,
    compress_logits: bool = False,
    activations: Activations | None = None,
    generate: Mapping[str, Any] | None = None,
    resume: bool = False,
    on_forecast: OnForecast | None = None,
    on_progress: OnProgress | None = None,
) -> Store:
    """Capture a model's routing over a corpus into a store.

    Interrupted (Ctrl-C, an error, a killed process), it leaves a store that opens with what was committed; the same
    call with ``resume=True`` goes on from there and ends with the same rows as an uninterrupted capture.

    Args:
        model: from `moescope.load` or `moescope.wrap`.
        corpus: a `Corpus`, or the path of one without labels.
        out: folder of the new store.
        tiers: any of "routing" (ids, weights, logsumexp, entropy, margin), "logits" (all router logits), "experts"
            (norm and largest magnitude of each selected expert's output), "outliers" (maxima by expert and layer) and
            "activations" (chosen vectors).
        loss: also store each token's loss in nats, given the tokens before it in its context; while generating, of
            the written tokens alone.
        sinks: also store how much attention each head puts on a sequence's first token, over one sequence of each
            batch (its attention is worked out once more, which costs about a tenth).
        max_length: tokens of context; longer documents are cut. By default 2048 or the model's own limit.
        batch_tokens: padded tokens of one forward pass; models whose texts need a batch of their own (doge, nllb_moe,
            diffusion_gemma: `Model.own_batch` says why) get one text each.
        shard_tokens: tokens after which a shard is closed.
        compress_logits: compress the logits tier (zstd): smaller for bf16 models, slower to read.
        activations: which vectors the "activations" tier keeps; naming it adds the tier.
        generate: let the model go on from each document: ``{"max_new_tokens": 32}``, and where wanted ``do_sample``,
            ``temperature``, ``top_p``, ``seed``, … Rows then have the phase "prefill" or "decode", and a document's
            text is the prompt with what was written. The last token written was never run and has no row.
        resume: go on with an interrupted capture in ``out``.
        on_forecast: called once, before the first forward pass.
        on_progress: called after each batch with the number of tokens done so far.

    Returns:
        The complete store.

    Raises:
        MoescopeError: a bad option, corpus or folder; nothing is written then.
    """
    corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    if activations is not None:
        tiers = [*([tiers] if isinstance(tiers, str) else tiers), "activations"]
    tiers = _checked_tiers(model, tiers)
    chosen = plan(model, activations or Activations()) if "activations" in tiers else None
    max_length = _checked_length(model, max_length)
    if model.tokenizer is None:
        raise MoescopeError("This model was wrapped without a tokenizer; pass one: moescope.wrap(hf_model, tokenizer).")
    corpus = corpus.templated(model.tokenizer, answer=generate is not None)
    census = corpus.census()
    options = None if generate is None else checked(model, generate)
    if model.own_batch is not None or (options is not None and feels_left_padding(model)):
        batch_tokens = 1  # one text for each forward pass: in company its routing would not be its own
    settings: dict[str, Any] = {
        "batch_tokens": batch_tokens,
        "shard_tokens": shard_tokens,
        "logits_compression": "zstd" if compress_logits else "none",
    }
    if sinks:
        settings[SINKS] = 1
    if options is not None:
        settings["generate"] = options | {"defaults": defaults(model)}
        max_length = _leaving_room(model, max_length, options["max_new_tokens"])
    manifest = manifest_of(model, corpus, census, tiers, loss, max_length, settings, chosen)
    require_new(Path(out), resume)
    expected = forecast(
        model,
        corpus,
        census,
        out=Path(out),
        tiers=tiers,
        max_length=max_length,
        batch_tokens=batch_tokens,
        loss=loss,
        new_tokens=0 if options is None else options["max_new_tokens"],
        activations=chosen,
    )
    expected.require_room(Path(out), None if chosen is None else chosen.record.max_bytes)
    if on_forecast is not None:
        on_forecast(expected)
    with (StoreWriter.resume if resume else StoreWriter.create)(out, manifest) as writer:
        cut = batches(
            corpus, model.tokenizer, max_length=max_length, batch_tokens=batch_tokens, prompts=options is not None
        )
        todo = ahead(islice(cut, writer.cursor, None))
        read = readings(model, todo, want(tiers), loss=loss, sinks=sinks, chosen=chosen)
        if options is not None:
            read = generations(model, todo, want(tiers), options, loss=loss, chosen=chosen)
        texts = TokenTexts(model.tokenizer)
        kept = _kept_before(Path(out))
        for batch, arrays in read:
            whole = assemble(model, batch, arrays, texts, chosen)
            kept += sum(vectors.nbytes for vectors in whole.activations.values())
            if chosen is not None and kept > chosen.record.max_bytes:
                raise MoescopeError(
                    f"The kept activations reached their limit of {chosen.record.max_bytes / 1e9:.2f} GB; what was "
                    f"captured before is whole in {out}. Sample fewer tokens, or raise the limit, in another folder."
                )
            writer.append(whole)
            if on_progress is not None:
                on_progress(writer.n_tokens)
    return Store.open(out)


def _kept_before(out: Path) -> int:
    """Bytes of activations that an interrupted capture left in its committed shards."""
    files = (item for _, commit in read_commits(out) for item in commit.files.items())
    return sum(record.bytes for name, record in files if name.startswith("activations."))


def want(tiers: Sequence[str]) -> Want:
    """What the taps must read for these tiers."""
    return Want(logits="logits" in tiers, experts="experts" in tiers, outliers="outliers" in tiers)


def readings(
    model: Model,
    todo: Iterator[TextBatch],
    wanted: Want,
    *,
    loss: bool = False,
    sinks: bool = False,
    chosen: Plan | None = None,
) -> Iterator[tuple[TextBatch, dict[tuple[str, ...], np.ndarray]]]:
    """Run batches through the model under taps.

    One batch stays in flight: its copy to the host is waited for only when the next forward pass has been started.
    """
    waiting: tuple[TextBatch, HostCopy] | None = None
    wanted = wanted if chosen is None else chosen.wanting(wanted)
    with (
        torch.inference_mode(),
        Tap(model.hf, model.sites, model.semantics, wanted) as tap,
        SinkWatch(model.hf, decoder_layers(model)) if sinks else nullcontext() as watch,
    ):
        for batch in todo:
            ids, mask = (torch.from_numpy(array).to(model.device) for array in batch.padded(model.pad_id))
            rows = _real_rows(batch, ids.shape[1]).to(model.device)
            keep = None if chosen is None else torch.from_numpy(chosen.rows(batch)).to(model.device)
            tap.begin(ids.numel(), None if len(rows) == ids.numel() else rows, keep)
            if watch is not None:
                watch.begin(mask[:1])
            logits = model.forward(ids, mask, head=loss)
            reading = tap.take()
            extra: dict[tuple[str, ...], torch.Tensor] = {}
            if loss:
                extra[("loss",)] = token_losses(logits, ids).flatten()[rows]
            for layer, share in {} if watch is None else watch.take().items():
                extra |= {("sink", str(layer), name): value for name, value in vars(share).items()}
            started = batch, HostCopy(reading, extra)
            if waiting is not None:
                yield waiting[0], waiting[1].arrays()
            waiting = started
        if waiting is not None:
            yield waiting[0], waiting[1].arrays()


def decoder_layers(model: Model) -> dict[int, str]:
    """Paths of the decoder layers by number; none where two stacks share numbers."""
    stacks = {site.layer_path.rpartition(".")[0] for site in model.sites}
    return {n: f"{stack}.{n}" for stack in stacks for n in range(model.n_layers)} if len(stacks) == 1 else {}


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Loss of each token given those before it, nats [B, S] float32; NaN for the first.

    Args:
        logits: [B, S, V].
        ids: [B, S].
    """
    losses = torch.full(ids.shape, torch.nan, device=ids.device)
    for row in range(len(ids)):
        for start in range(0, ids.shape[1] - 1, LOSS_ROWS):
            stop = min(start + LOSS_ROWS, ids.shape[1] - 1)
            losses[row, start + 1 : stop + 1] = torch.nn.functional.cross_entropy(
                logits[row, start:stop].float(), ids[row, start + 1 : stop + 1], reduction="none"
            )
    return losses


def _real_rows(batch: TextBatch, width: int) -> torch.Tensor:
    """Flat positions of the real tokens in the padded batch."""
    return torch.from_numpy(
        np.concatenate([row * width + np.arange(len(sequence)) for row, sequence in enumerate(batch.sequences)])
    )


def _checked_tiers(model: Model, tiers: Sequence[str]) -> list[str]:
    names = [tiers] if isinstance(tiers, str) else list(dict.fromkeys(tiers))
    unknown = [name for name in names if name not in TIERS]
    if unknown or not names:
        raise MoescopeError(f"Unknown tier {unknown[0]!r}." if unknown else "Name at least one tier."
                            f" Tiers are {', '.join(TIERS)}.")  # fmt: skip
    blind = next((check for check in model.check.sites if check.rebuild_error is None), None)
    if blind is not None and {"experts", "outliers", "activations"} & set(names):
        raise RefusedError(blind.note)
    unseen = next((key for key, semantics in model.semantics.items() if semantics.logits_from == "none"), None)
    if unseen is not None and "logits" in names:
        raise RefusedError(f"The router of {unseen} returns probabilities only; its logits cannot be captured.")
    # Slots of every other tier are named by the ids, so the routing tier always comes along.
    return [name for name in TIERS if name in names or name == "routing"]


def _checked_length(model: Model, max_length: int | None) -> int:
    limit = model.max_positions
    if max_length is None:
        return min(MAX_LENGTH, limit or MAX_LENGTH)
    if max_length < 1:
        raise MoescopeError(f"max_length must be at least 1, not {max_length}.")
    if limit is not None and max_length > limit:
        raise MoescopeError(f"max_length {max_length} exceeds the {limit} positions that {model.name} was made for.")
    return max_length


def _leaving_room(model: Model, max_length: int, new_tokens: int) -> int:
    """Tokens of a prompt, so that what is written after it fits the model's context too."""
    limit = model.max_positions
    if limit is not None and max_length + new_tokens > limit:
        max_length = limit - new_tokens
    if max_length < 1:
        raise MoescopeError(f"{new_tokens} new tokens leave no room for a prompt in {limit} positions of {model.name}.")
    return max_length


def require_new(out: Path, resume: bool) -> None:
    """Refuse an occupied folder before the forecast costs anybody time; the writer checks again, under its lock."""
    if not resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MoescopeError(f"{out} already exists; choose another --out, or --resume if it is an interrupted capture.")


def manifest_of(
    model: Model,
    corpus: Corpus,
    census: Census,
    tiers: list[str],
    loss: bool,
    max_length: int,
    settings: dict[str, Any],
    chosen: Plan | None,
) -> Manifest:
    """The manifest of a store yet to be written."""
    versions = {name: version(name) for name in ("moescope", "transformers", "torch", "pyarrow", "numpy")}
    return Manifest(
        model=ModelRecord(
            name=model.name,
            revision=model.revision,
            config_hash=model.config_hash,
            weights_fingerprint=model.weights_fingerprint,
            model_type=model.hf.config.model_type,
            architecture=type(model.hf).__name__,
            dtype=str(model.hf.dtype).removeprefix("torch."),
            device=model.device.type,
            experts_implementation=model.experts_implementation,
            n_parameters=model.n_parameters,
            n_active_parameters=model.n_active_parameters,
            n_layers=model.n_layers,
            hidden_size=model.hidden_size,
        ),
        tokenizer=TokenizerRecord(
            name=type(model.tokenizer).__name__, hash=model.tokenizer_hash, vocab_size=len(model.tokenizer)
        ),
        corpus=CorpusRecord(
            source=os.path.basename(corpus.name) if os.path.exists(corpus.name) else corpus.name,
            hash=census.hash,
            n_documents=census.documents,
            labels=corpus.labels,
            max_length=max_length,
            text_field=corpus.chat or corpus.text,
            chat_template=corpus.chat is not None,
        ),
        sites=[_site_record(model, site.key) for site in model.sites],
        tiers=tiers,  # type: ignore[arg-type]
        activations=None if chosen is None else chosen.record,
        loss=loss,
        versions=versions | {"python": platform.python_version()},
        settings=settings | ({"edits": list(model.edits)} if model.edits else {}),
        self_check={**model.check.as_dict(), "execution": model.execution},
    )


def _site_record(model: Model, key: str) -> SiteRecord:
    site = next(site for site in model.sites if site.key == key)
    semantics = model.semantics[key]
    return SiteRecord(
        key=key,
        layer=site.layer,
        ordinal=site.ordinal,
        path=plain_path(site.block),
        n_experts=site.n_experts,
        top_k=semantics.top_k,
        slots_can_miss=semantics.can_miss,
        skip_classes=semantics.skips,
        score_function=semantics.score_function or "unknown",
        router_output=semantics.router_output,  # type: ignore[arg-type]
        selection=_selection(semantics),
        renormalised=semantics.renormalised,
        scaling=semantics.scaling,
        shared_experts=site.n_shared,
        zero_experts=site.zero_experts,
        weight_on=semantics.weight_on,  # type: ignore[arg-type]
        weight_dtype=model.dtypes[key].weight,  # type: ignore[arg-type]
        logit_dtype=model.dtypes[key].logits,  # type: ignore[arg-type]
        rank_by=semantics.rank_by,
    )


def _selection(semantics: Semantics) -> Selection:
    bias, grouped = semantics.selection_bias, semantics.groups is not None
    return Selection(
        bias=semantics.bias is not None,
        groups=grouped,
        hash=semantics.hashed,
        bias_values=None if bias is None else bias.float().tolist(),
        group_rule=semantics.groups,
        group_fill=semantics.group_fill if grouped and math.isfinite(semantics.group_fill) else None,
    )
