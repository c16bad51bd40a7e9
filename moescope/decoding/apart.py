"""Answers held against each other: what the plain and the edited model think of each token, and where they route it.

Every answer is read once by either model, prompt and answer in one forward pass, so that both see the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import xarray as xr

from moescope.analysis.labelled import PADDING, LayerAxis
from moescope.decoding.contrast import Written
from moescope.decoding.watching import asked, pieces
from moescope.edits import Recipe
from moescope.effects.recipes import describe
from moescope.errors import MoescopeError
from moescope.hooks import Model
from moescope.hooks.taps import Tap, Want

CONTROL = (
    "control_changed: the same share where the edited model's selections are those of another token of the same text, "
    "over all pairs of tokens"
)
OF_TOKENS = (
    "text", "plain", "edited", "change", "log_ratio", "plain_best", "plain_says", "edited_best", "edited_says",
)  # fmt: skip


def answers_apart(
    model: Model, prompt: str, answers: Mapping[str, Written], recipe: Recipe, *, chat: bool = False
) -> xr.Dataset:
    """How far a recipe moves the probabilities and the routing of texts that were written.

    How to read it: `change` above 0 means that the edited model finds this token likelier than the plain one does after
    the same text. `changed` is the share of the plain model's selections that the edited model does not make
    at the same token, or makes with weight 0; routing that no longer depends on the token at all would reach
    `control_changed`.

    Args:
        model: a model with a tokenizer, not edited now.
        prompt: what the answers go on from.
        answers: by name, such as "plain" and "edited".
        recipe: the edits.
        chat: the prompt went through the chat template.

    Returns:
        Dataset with dims (answer, place): text (of each token; "" beyond the end), plain, edited (probability of the
        token), change (edited - plain), log_ratio (ln edited / plain), plain_best, edited_best (probability of the
        likeliest token) and plain_says, edited_says (its text); NaN beyond an answer's end. (answer, layer): changed,
        control_changed (shares). (answer, layer, expert): plain_share, edited_share (of the layer's selections over
        prompt and answer), share_change. (answer): tokens, prompt_tokens. attrs: edits, control, model.

    Raises:
        MoescopeError: an edit of one phase alone, which one pass over the whole text cannot show.
    """
    if any(edit.rows.phase is not None for edit in recipe.edits):
        raise MoescopeError("An edit of prefill or decode alone cannot be compared in one pass over the whole text.")
    text, special = asked(model, prompt, chat)
    start: list[int] = model.tokenizer(text, add_special_tokens=special)["input_ids"]
    axis = LayerAxis(
        layers=np.array([site.layer for site in model.sites], dtype=np.int64),
        sites=tuple(site.key for site in model.sites),
        n_experts=np.array([site.n_experts for site in model.sites], dtype=np.int64),
        top_k=np.array([model.semantics[site.key].top_k for site in model.sites], dtype=np.float64),
    )
    longest = max((len(one.tokens) for one in answers.values()), default=0)
    rows: dict[str, list[Any]] = {}
    for one in answers.values():
        for name, values in _of_answer(model, start, one.tokens, recipe, axis, longest).items():
            rows.setdefault(name, []).append(values)
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(OF_TOKENS, ("answer", "place"))
    dims |= dict.fromkeys(("changed", "control_changed"), ("answer", "layer"))
    dims |= dict.fromkeys(("plain_share", "edited_share", "share_change"), ("answer", "layer", "expert"))
    return xr.Dataset(
        {name: (dims.get(name, ("answer",)), np.array(values)) for name, values in rows.items()}
        | {"exists": (("layer", "expert"), axis.exists)},
        coords={"answer": list(answers), "place": np.arange(longest)} | axis.coordinates(),
        attrs={
            "analysis": "answers_apart",
            "model": model.name,
            "edits": describe(recipe),
            "control": CONTROL,
            "padding": PADDING,
            "table": "answer, place",
        },
    )


def _of_answer(
    model: Model, start: list[int], tokens: list[int], recipe: Recipe, axis: LayerAxis, longest: int
) -> dict[str, Any]:
    ids = torch.tensor([[*start, *tokens]], device=model.device)
    n, first = len(tokens), len(start) - 1
    found: dict[str, Any] = {"tokens": n, "prompt_tokens": len(start)}
    selected = {}
    for name, edits in (("plain", None), ("edited", recipe)):
        log, selected[name] = _read(model, ids, edits)
        p = log[first : first + n].exp()
        best = p.max(-1)
        own = p.gather(-1, ids[0, first + 1 :, None]).squeeze(-1)
        found[name] = _padded(own, longest)
        found[f"{name}_best"] = _padded(best.values, longest)
        says = [model.tokenizer.decode([token]) for token in best.indices.tolist()]
        found[f"{name}_says"] = np.array([*says, *[""] * (longest - n)], dtype=object)
    found["text"] = np.array([*pieces(model.tokenizer, tokens), *[""] * (longest - n)], dtype=object)
    found["change"] = found["edited"] - found["plain"]
    with np.errstate(divide="ignore"):  # a token that the edited model rules out altogether
        found["log_ratio"] = np.log(found["edited"]) - np.log(found["plain"])
    shares = [_moved(selected["plain"][key], selected["edited"][key]) for key in axis.sites]
    found["changed"] = np.array([one[0] for one in shares])
    found["control_changed"] = np.array([one[1] for one in shares])
    found["plain_share"] = axis.pad([one[2] for one in shares])
    found["edited_share"] = axis.pad([one[3] for one in shares])
    found["share_change"] = found["edited_share"] - found["plain_share"]
    return found


def _read(model: Model, ids: torch.Tensor, recipe: Recipe | None) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """Log probabilities [S, V] of what follows each token, and which of each site's experts it counts [S, E]."""
    with (
        torch.no_grad(),
        nullcontext() if recipe is None else model.edited(recipe, check=False),
        Tap(model.hf, model.sites, model.semantics, Want()) as tap,
    ):
        tap.begin(ids.numel())
        logits = model.forward(ids, torch.ones_like(ids))
        readings = tap.take().sites
    selected = {}
    for site in model.sites:
        reading = readings[site.key]
        chosen = torch.zeros(ids.numel(), site.n_experts, dtype=torch.bool, device=ids.device)
        valid = reading.weight != 0  # an edit may leave an expert selected and its weight 0
        if reading.valid is not None:
            valid &= reading.valid
        chosen[torch.arange(len(chosen), device=ids.device)[:, None].expand_as(valid)[valid], reading.expert[valid]] = (
            True
        )
        selected[site.key] = chosen.cpu().numpy()
    return logits[0].float().log_softmax(-1), selected


def _moved(plain: np.ndarray, edited: np.ndarray) -> tuple[float, float, np.ndarray, np.ndarray]:
    """Of [S, E] selections: the share of the plain ones that are gone, the same between tokens, and both loads [E]."""
    n, made = len(plain), plain.sum()
    kept = (plain & edited).sum()
    loads = plain.sum(0, dtype=np.float64), edited.sum(0, dtype=np.float64)
    # All pairs of two tokens: pairs of any tokens, less each token with itself.
    between = ((loads[0] * loads[1]).sum() - kept) / (made * (n - 1)) if n > 1 and made else np.nan
    shares = [load / load.sum() if load.sum() else np.full_like(load, np.nan) for load in loads]
    return float(1 - kept / made) if made else np.nan, float(1 - between), shares[0], shares[1]


def _padded(values: torch.Tensor, longest: int) -> np.ndarray:
    out = np.full(longest, np.nan)
    out[: len(values)] = values.double().cpu().numpy()
    return out
