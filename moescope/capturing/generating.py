"""Capture while a model writes: prefill and every decoding step, past the key-value cache, in the model's own generate.

Prompts go in padded on the left; each call that `generate` makes of the model is one reading. A token has a row if the
model was run on it: all of the prompt, and all that was written but the last token, which nobody read any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from moescope.capturing.activations import FIELDS, Plan
from moescope.capturing.batches import Sequence, TextBatch
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.model import Model
from moescope.hooks.readings import HostCopy
from moescope.hooks.taps import Tap, Want

Arrays = dict[tuple[str, ...], np.ndarray]
# Options whose effect on rows is understood: one sequence for each prompt, one call for each token.
OPTIONS = (
    "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "no_repeat_ngram_size", "eos_token_id", "use_cache", "seed",
)  # fmt: skip
PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
PADDED = ((24, 5), (17, 3), (11, 7), (7, 4))  # tokens and pads; an indexer's ties do not fall otherwise every time
HALF_TOLERANCE = 5e-2  # bf16 keeps 8 bits; a model that does not mask its pads is off by more
Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]
BROKEN = "\ufffd"  # what a decoder writes for bytes that are not yet a whole character


def checked(model: Model, options: Mapping[str, Any]) -> dict[str, Any]:
    """Complete generation options, with the seed that makes sampling repeatable.

    Raises:
        MoescopeError: an unknown option, or no ``max_new_tokens``.
        RefusedError: this model's generation cannot be captured.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise MoescopeError(
            f"Capture does not know the generation option {unknown[0]!r}; it knows {', '.join(OPTIONS)} (beams, "
            "several returned sequences and assistants would run tokens that are then thrown away)."
        )
    n = options.get("max_new_tokens")
    if not isinstance(n, int) or n < 1:
        raise MoescopeError("Generation needs max_new_tokens, a number of tokens of at least 1.")
    if model.has_encoder:
        raise RefusedError(
            f"{model.name} has a decoder beside its encoder: one runs over the prompt and the other over the answer, "
            "so no row is one token of both. Capture its texts without generating."
        )
    if not hasattr(model.hf, "generate") or not model.hf.can_generate():
        raise RefusedError(f"{type(model.hf).__name__} cannot generate text: it has no language-model head.")
    return {"do_sample": False, "seed": 0, **options}


def defaults(model: Model) -> dict[str, Any]:
    """What the model's own generation settings say where the options say nothing (a repetition penalty, say)."""
    own = model.hf.generation_config.to_diff_dict()
    return {name: value for name, value in own.items() if name != "transformers_version" and not name.startswith("_")}


def feels_left_padding(model: Model) -> bool:
    """Whether pads before a prompt change what the model says after it (deepseek_v4 compresses windows of positions,
    and the indexers of sparse attention break ties by place).

    Such a model gets its prompts one at a time.
    """
    words, room = model.hf.get_input_embeddings().weight.shape[0], (model.max_positions or 32) - 8
    draw = torch.Generator().manual_seed(0)

    def said(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        answer = model.hf.generate(
            ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=model.pad_id,
            return_dict_in_generate=True, output_logits=True, temperature=None, top_k=None, top_p=None,
        )  # fmt: skip
        return answer.logits[0].float()

    tolerance = PADDING_TOLERANCE.get(model.hf.dtype, HALF_TOLERANCE)
    for length, pads in PADDED:
        ids = torch.randint(0, words, (1, min(length, room)), generator=draw).to(model.device)
        padded = torch.nn.functional.pad(ids, (pads, 0), value=model.pad_id)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (pads, 0))
        alone, behind = said(ids, torch.ones_like(ids)), said(padded, mask)
        if bool((alone - behind).norm() > tolerance * alone.norm()):
            return True
    return False


def generations(
    model: Model,
    todo: Iterator[TextBatch],
    wanted: Want,
    options: Mapping[str, Any],
    *,
    loss: bool = False,
    chosen: Plan | None = None,
) -> Iterator[tuple[TextBatch, Arrays]]:
    """Let the model go on from each batch of prompts; gives the grown batches and their readings.

    Args:
        model, wanted: as for `readings`.
        todo: prompts.
        options: from `checked`.
        loss: also give the loss of each written token, in nats, by the model's own logits (before temperature and the
            like); the prompt's tokens have none, since `generate` asks for the logits of its last position alone.
        chosen: vectors to keep.
    """
    wanted = wanted if chosen is None else chosen.wanting(wanted)
    settings = {name: value for name, value in options.items() if name != "seed"}
    if not settings["do_sample"]:  # the model's own defaults for sampling would only be warned about
        settings = {"temperature": None, "top_k": None, "top_p": None, **settings}
    with torch.no_grad(), Tap(model.hf, model.sites, model.semantics, wanted) as tap:
        for batch in todo:
            ids, mask = (torch.from_numpy(array).to(model.device) for array in batch.padded(model.pad_id, side="left"))
            devices = [model.device] if model.device.type == "cuda" else []
            ends = _ends(model, settings)
            drawn = None if chosen is None else partial(chosen.drawn, batch)
            with torch.random.fork_rng(devices), _Calls(model.hf, tap, mask, ends, loss, drawn) as calls:
                torch.manual_seed(options["seed"] + batch.sequences[0].number)
                whole = model.hf.generate(ids, attention_mask=mask, pad_token_id=model.pad_id, **settings)
            written = whole[:, ids.shape[1] :].cpu().numpy()
            grown = [
                _grown(model.tokenizer, sequence, row[:n])
                for sequence, row, n in zip(batch.sequences, written, calls.lengths(written), strict=True)
            ]
            yield TextBatch(grown), calls.joined()


@dataclass
class _Call:
    """One call of the model: whose rows were kept, their columns, which of them keep vectors, and what was read."""

    sequence: np.ndarray
    column: np.ndarray
    drawn: np.ndarray
    copy: HostCopy


class _Calls:
    """Hooks round the whole model while it generates: each call is one reading of the rows that are new and alive."""

    def __init__(
        self, hf: nn.Module, tap: Tap, mask: torch.Tensor, ends: set[int], loss: bool, drawn: Draw | None
    ) -> None:
        self._hf, self._tap, self._ends, self._loss, self._draw = hf, tap, ends, loss, drawn
        self._said: torch.Tensor | None = None  # logits [B, V] of what comes next, by the last call
        self._losses = torch.empty(0)  # of the rows kept in this call
        self._mask = mask.cpu().numpy().astype(bool)
        self._alive = np.ones(len(mask), bool)
        self._done = 0  # columns of the padded batch that have been run
        self._calls: list[_Call] = []
        self._kept: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> _Calls:
        self._undo = [
            self._hf.register_forward_pre_hook(self._before, with_kwargs=True).remove,
            self._hf.register_forward_hook(self._after).remove,
        ]
        return self

    def __exit__(self, *exc: object) -> None:
        for undo in self._undo:
            undo()

    def lengths(self, written: np.ndarray) -> list[int]:
        """Tokens that each sequence wrote, its end token included and what follows it not."""
        ended = np.isin(written, list(self._ends))
        return [int(row.argmax()) + 1 if row.any() else len(row) for row in ended]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise RefusedError("generate called the model without token ids; its rows cannot be matched with tokens.")
        batch, width = ids.shape
        prompt = self._mask.shape[1]
        if batch != len(self._mask):
            raise RefusedError(f"generate ran {batch} sequences for {len(self._mask)} prompts; it cannot be captured.")
        if self._done < prompt:  # the prompt, whole or in chunks
            first, columns = 0, np.arange(self._done, self._done + width)
            keep = self._mask[:, columns] if columns[-1] < prompt else None
        else:  # one new token, alone or (without a cache) after all others
            first, columns = width - 1, np.array([self._done])
            self._alive &= ~np.isin(ids[:, -1].cpu().numpy(), list(self._ends))
            keep = self._alive[:, None] if width in (1, self._done + 1) else None
        if keep is None:
            raise RefusedError(f"generate ran {width} tokens after {self._done} of {prompt}; it cannot be captured.")
        self._done += len(columns)
        row, place = np.nonzero(keep)
        first_column = self._mask.argmax(1)
        drawn = np.arange(0) if self._draw is None else self._draw(row, columns[place] - first_column[row])
        self._kept = row, columns[place], drawn
        at = torch.from_numpy(row * width + first + place).to(ids.device)
        if self._loss:
            self._losses = self._losses_of(ids, torch.from_numpy(row).to(ids.device), self._done > prompt)
        vectors = None if self._draw is None else torch.from_numpy(drawn).to(ids.device)
        self._tap.begin(batch * width, None if len(at) == batch * width else at, vectors)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._kept is not None, "a call ended that had not begun"
        extra: dict[tuple[str, ...], torch.Tensor] = {}
        if self._loss:
            self._said = (output.logits if hasattr(output, "logits") else output[0])[:, -1].float()
            extra[("loss",)] = self._losses
        self._calls.append(_Call(*self._kept, HostCopy(self._tap.take(), extra)))

    def _losses_of(self, ids: torch.Tensor, row: torch.Tensor, written: bool) -> torch.Tensor:
        """Losses of the kept rows [N] float32: those of the prompt are NaN."""
        if not written or self._said is None:
            return torch.full((len(row),), torch.nan, device=ids.device)
        return nn.functional.cross_entropy(self._said[row], ids[row, -1], reduction="none")

    def joined(self) -> Arrays:
        """All calls as one reading: rows sequence after sequence, maxima over all of them."""
        sequence = np.concatenate([call.sequence for call in self._calls])
        column = np.concatenate([call.column for call in self._calls])
        order = np.lexsort((column, sequence))
        drawn = np.concatenate([call.sequence[call.drawn] for call in self._calls])
        among_drawn = np.lexsort((np.concatenate([call.column[call.drawn] for call in self._calls]), drawn))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        parts = [call.copy.arrays() for call in self._calls if len(call.sequence)]
        starts = np.cumsum([0, *(len(call.sequence) for call in self._calls if len(call.sequence))])
        joined: Arrays = {}
        for name in parts[0]:
            values = [part[name] for part in parts]
            if name == ("loss",) or (name[0] == "site" and name[2] != "outliers"):
                joined[name] = np.concatenate(values)[among_drawn if name[-1] in FIELDS.values() else order]
        for key in dict.fromkeys(name[1] for name in parts[0] if name[2:3] == ("outliers",)):
            joined |= _expert_maxima(key, parts, starts, rank)
        for layer in dict.fromkeys(name[1] for name in parts[0] if name[0] == "hidden"):
            joined |= _hidden_maximum(layer, parts, starts, rank)
        return joined


def _expert_maxima(key: str, parts: list[Arrays], starts: np.ndarray, rank: np.ndarray) -> Arrays:
    """Maxima of one site over several calls; the first routed row is that of the first call that had one."""

    def stacked(name: str) -> np.ndarray:
        return np.stack([part[("site", key, "outliers", name)] for part in parts])

    output, tokens, rows = stacked("output"), stacked("tokens"), stacked("row")
    best, first = output.argmax(0), (tokens > 0).argmax(0)
    expert = np.arange(output.shape[1])
    place = np.minimum(rows[best, expert] + starts[best], len(rank) - 1)
    merged = {
        "output": output.max(0),
        "input": stacked("input").max(0),
        "first": stacked("first")[first, expert],
        "row": np.where(tokens.sum(0) > 0, rank[place], len(rank)),
        "tokens": tokens.sum(0),
    }
    return {("site", key, "outliers", name): value for name, value in merged.items()}


def _hidden_maximum(layer: str, parts: list[Arrays], starts: np.ndarray, rank: np.ndarray) -> Arrays:
    """The largest hidden magnitude of one layer over several calls; NaN where one call's is NaN."""
    best = int(np.argmax([part[("hidden", layer, "absmax")] for part in parts]))
    there = parts[best]
    return {
        ("hidden", layer, "absmax"): there[("hidden", layer, "absmax")],
        ("hidden", layer, "channel"): there[("hidden", layer, "channel")],
        ("hidden", layer, "row"): rank[int(there[("hidden", layer, "row")]) + starts[best]],
    }


def _ends(model: Model, settings: Mapping[str, Any]) -> set[int]:
    """Token ids that end a sequence."""
    end = settings.get("eos_token_id", model.hf.generation_config.eos_token_id)
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _grown(tokenizer: Any, prompt: Sequence, written: np.ndarray) -> Sequence:
    """A prompt with what the model wrote after it; its last written token is in the text but was never run."""
    text, spans = prompt.document.text, []
    if len(prompt) < prompt.n_document_tokens:  # the prompt was cut: the document is what the model saw of it
        text = text[: int(prompt.end.max(initial=0))] if (prompt.end >= 0).any() else tokenizer.decode(prompt.ids)
    begin, before = len(text), ""
    for n in range(1, len(written) + 1):
        now = tokenizer.decode(written[:n], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        whole = now.startswith(before) and len(now) > len(before) and BROKEN not in (before[-1:], now[-1:])
        spans.append((begin + len(before), begin + len(now)) if whole else (-1, -1))
        before = now
    run = np.array(spans[:-1], np.int32).reshape(-1, 2)
    ids = np.concatenate([prompt.ids, written[:-1].astype(np.int64)])
    return replace(
        prompt,
        document=replace(prompt.document, text=text + before),
        n_document_tokens=len(ids),
        ids=ids,
        start=np.concatenate([prompt.start, run[:, 0]]),
        end=np.concatenate([prompt.end, run[:, 1]]),
        n_prompt=len(prompt),
    )
