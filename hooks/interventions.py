"""Interventions change what a model computes at its sites, for as long as a ``with`` block lasts.

``with Live(model, acts):`` places hooks; leaving the block removes them, whatever happened inside, and the model is
what it was, to the bit. Which rows an act touches (batch rows, positions, prefill or decode) is settled anew in every
forward pass. On entering, one small batch is run to see that each act does what it says; one that a family's blocks
cannot take is refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.call_reader import experts_arguments
from moescope.hooks.choosing import GONE, Choosing, Wish
from moescope.hooks.facts import Undo, flat
from moescope.hooks.parts import digest_of, replace_parts
from moescope.hooks.readings import SiteReading, rank_slots
from moescope.hooks.rows import EVERYWHERE, TouchedRows, Where
from moescope.hooks.sites import Site, expert_modules, plain_path
from moescope.hooks.taps import Tap, Want
from moescope.hooks.watching import LinearWatch, override_forward

if TYPE_CHECKING:
    from moescope.hooks.model import Model

Kind = Literal["scale", "mask", "remove", "zero", "promote", "demote", "ranks", "top_p", "patch", "replace"]
Stage = Literal["logit", "score", "weight", "weight_renormalised"]


@dataclass(frozen=True)
class Act:
    """One change at one site.

    Attributes:
        kind: "scale" a factor on experts (`stage` says where), "mask" (never selected; others take the place),
            "remove" (the same, and no score is left of it, as if it were pruned), "zero" (selected, its output
            dropped), "promote" and "demote" (score above the best, below the worst; arXiv 2509.09660), "ranks" (only
            these ranks count), "top_p" (only the first ranks whose selection shares reach p), "patch" (ids and weights
            given), "replace" (other tensors in the place of the expert's own).
        experts: whose.
        factor: of "scale"; the p of "top_p".
        stage: of "scale": "logit", "score", "weight", "weight_renormalised" (weights keep their sum).
        ranks: of "ranks", from 0.
        renormalise: whether "ranks" and "top_p" keep the sum of a token's weights.
        ids, weights: of "patch": [rows, k] each, for the touched rows in order.
        tensors: of "replace": by part of a parameter, see `parts.Part`.
        where: which rows.
    """

    kind: Kind
    experts: tuple[int, ...] = ()
    factor: float = 1.0
    stage: Stage = "weight"
    ranks: tuple[int, ...] = ()
    renormalise: bool = True
    ids: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    tensors: Mapping[str, torch.Tensor] | None = None
    where: Where = EVERYWHERE

    def __str__(self) -> str:
        experts = "expert" if len(self.experts) == 1 else "experts"
        said = [f"{experts} {', '.join(map(str, self.experts))}"] * bool(self.experts)
        said += [f"x {self.factor:g} ({self.stage})"] * (self.kind == "scale")
        said += [f"ranks {', '.join(map(str, self.ranks))}"] * bool(self.ranks)
        said += [f"p {self.factor:g}"] * (self.kind == "top_p")
        said += [f"tensors {digest_of(self.tensors)}"] if self.tensors is not None else []
        said += ["not renormalised"] * (self.kind in ("ranks", "top_p") and not self.renormalise)
        said += [str(self.where)] * (not self.where.everywhere)
        return f"{self.kind} {', '.join(said)}"

    @property
    def chooses(self) -> bool:
        """Whether it acts on the selection rather than on what was selected."""
        return self.kind in ("mask", "remove", "promote", "demote") or (
            self.kind == "scale" and self.stage in ("logit", "score")
        )


Acts = Mapping[str, Sequence[Act]]


class Live:
    """Acts at a model's sites, by site key, while the block lasts.

    Args:
        model: the model.
        acts: site key -> acts, in the order in which they act.
        check: run one small batch on entering, to see that they do.
    """

    def __init__(self, model: Model, acts: Acts, *, check: bool = True) -> None:
        self._model = model
        self._acts = {key: list(some) for key, some in acts.items() if some}
        self._check = check
        self._undo: list[Undo] = []
        self._rows = TouchedRows()
        self._acted: dict[str, set[str]] = {}
        for key, some in self._acts.items():
            _require_possible(model, key, some)

    def __enter__(self) -> Live:
        said = [f"{key}: {act}" for key, some in self._acts.items() for act in some]
        self._model.edits += said
        self._undo.append(lambda: self._model.edits.__delitem__(slice(len(self._model.edits) - len(said), None)))
        try:
            self._undo.append(self._model.hf.register_forward_pre_hook(self._rows.see, with_kwargs=True).remove)
            for site in self._model.sites:
                if site.key in self._acts:
                    self._place(site, self._acts[site.key])
            if self._check and self._acts:
                self._see_that_they_act()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        while self._undo:
            self._undo.pop()()

    def _place(self, site: Site, acts: list[Act]) -> None:
        wishes = [
            Wish(act.kind if act.kind != "scale" else act.stage, act.experts, act.factor, self._rows.of(act.where))
            for act in acts
            if act.chooses
        ]
        if wishes:
            self._undo += self._choosing(site, wishes)
        for act in acts:
            if act.kind == "replace":
                assert act.tensors is not None
                _require_inside(site, act.tensors)
                _ = self._model.weights_fingerprint  # kept from now on: it is the plain model's
                self._undo += replace_parts(self._model.hf, act.tensors)
        after = [act for act in acts if not act.chooses and act.kind != "replace"]
        if after:
            self._undo += PLACES[site.reader](self._model, site, after, self._rows)

    def _choosing(self, site: Site, wishes: list[Wish]) -> list[Undo]:
        """Wishes act inside the router's forward; where experts are modules, their block may select by itself."""
        hf, semantics = self._model.hf, self._model.semantics[site.key]
        columns = site.n_experts + semantics.skips
        weights = [len(weight) for weight in hf.get_submodule(site.router).parameters() if weight.ndim == 2]
        # Shared experts have rows in the router's one weight (inkling); hidden layers are no logits (zaya).
        wider = columns if columns in weights else max([w for w in weights if w > columns], default=columns)
        softmax, acted = semantics.score_function == "softmax", self._acted.setdefault(site.key, set())
        mode = partial(Choosing, wishes, columns, wider, softmax, semantics.bias is not None, acted)
        undo = [override_forward(hf.get_submodule(site.router), _under(mode))]
        if site.reader == "modules":
            undo.append(override_forward(hf.get_submodule(site.block), _under(partial(mode, scores=False))))
        return undo

    def _see_that_they_act(self) -> None:
        """Tap one batch: masked experts are gone, promoted ones there, in every row the acts touch."""
        model, batch = self._model, self._model.check_batch()
        sites = [site for site in model.sites if site.key in self._acts]
        with torch.no_grad(), Tap(model.hf, sites, model.semantics, Want()) as tap:
            tap.begin(batch.numel())
            model.forward(batch, torch.ones_like(batch))
            readings = tap.take().sites
        for site in sites:
            for act in self._acts[site.key]:
                if act.chooses:
                    _require_acting(site, act, self._acted[site.key], model.semantics[site.key].score_function)
                    _require_obeyed(site, act, readings[site.key], self._rows.of(act.where)())


def _require_inside(site: Site, tensors: Mapping[str, torch.Tensor]) -> None:
    outside = [name for name in tensors if not name.startswith(plain_path(site.layer_path) + ".")]
    if outside:
        raise MoescopeError(
            f"{outside[0]} does not belong to layer {site.layer}; the recipe's tensors are not its own."
        )


def _require_acting(site: Site, act: Act, acted: set[str], score_function: str | None) -> None:
    stage = "scores" if act.stage == "score" and act.kind == "scale" and score_function != "softmax" else "logits"
    if stage not in acted and act.kind != "mask":  # that a mask is obeyed is seen in the ids
        raise RefusedError(
            f"{site.key}: this family's router makes its {stage} in a way that cannot be edited; "
            "scale the weight instead."
        )


def _require_obeyed(site: Site, act: Act, reading: SiteReading, rows: torch.Tensor | None) -> None:
    """A masked expert is in no slot, a promoted one in one, unless its capacity was used up."""
    ids = reading.expert if rows is None else reading.expert[rows]
    there = torch.ones_like(reading.expert, dtype=torch.bool) if reading.valid is None else reading.valid
    there = there if rows is None else there[rows]
    ordered = ids.masked_fill(~there, -1).sort(-1).values
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise RefusedError(f"{site.key}: this family's router selects an expert twice under {act}.")
    for expert in act.experts:
        chosen = ((ids == expert) & there).any(-1)
        if act.kind in GONE and bool(chosen.any()):
            raise RefusedError(f"{site.key}: this family's router selects expert {expert} although it is masked.")
        if act.kind == "promote" and not bool((chosen | ~there.all(-1)).all()):
            raise RefusedError(f"{site.key}: this family's router does not select expert {expert} although promoted.")


def _under(mode: Callable[[], Choosing]) -> Callable[..., Any]:
    def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with mode():
            return original(*args, **kwargs)

    return run


def _require_possible(model: Model, key: str, acts: Sequence[Act]) -> None:
    site = next((site for site in model.sites if site.key == key), None)
    if site is None:
        raise MoescopeError(f"No site {key!r} in this model; there are {', '.join(s.key for s in model.sites)}.")
    semantics = model.semantics[key]
    k = semantics.top_k
    for act in acts:
        wrong = [expert for expert in act.experts if not 0 <= expert < site.n_experts]
        if wrong:
            raise MoescopeError(f"{key} has experts 0 to {site.n_experts - 1}, no expert {wrong[0]}.")
        if act.kind == "promote" and len(act.experts) > k:
            raise MoescopeError(f"{key}: {len(act.experts)} experts cannot all be promoted where {k} are selected.")
        if act.kind in GONE and site.n_experts - len(act.experts) < k:
            raise MoescopeError(
                f"{key}: masking {len(act.experts)} of {site.n_experts} experts leaves too few to select {k}."
            )
        if act.chooses and (semantics.hashed or site.reader == "product keys"):
            how = "a table of token ids" if semantics.hashed else "product keys"
            raise RefusedError(f"{key} selects its experts by {how}; its selection cannot be edited by expert.")
        unproven = semantics.score_function is None or semantics.scaling is None
        if act.kind == "scale" and act.stage == "score" and unproven:
            raise RefusedError(
                f"{key}: how this family's weights follow from its scores is unproven; scale the weight."
            )
        if act.kind == "ranks" and (not act.ranks or any(not 0 <= rank < k for rank in act.ranks)):
            raise MoescopeError(f"{key} has ranks 0 to {k - 1}; {act.ranks} are not among them.")


def _at_call(model: Model, site: Site, acts: list[Act], rows: TouchedRows) -> list[Undo]:
    """Ids and weights on their way into an experts module."""
    hf, semantics = model.hf, model.semantics[site.key]
    ranked = any(act.kind in ("ranks", "top_p") for act in acts)
    words: list[torch.Tensor] = []

    def listen(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with LinearWatch() as watch:
            output = original(*args, **kwargs)
        said = output[0] if isinstance(output, tuple) else output
        words[:] = [flat(watch.last if semantics.logits_from == "linear" and watch.last is not None else said)]
        return output

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        hidden, ids, weights = experts_arguments(module, args, kwargs)
        for act in acts:
            if rows.none(act.where):
                continue
            touched = rows.of(act.where)()
            new_ids, new = _changed(act, ids, weights, words[0] if ranked else None, semantics, touched)
            if touched is not None:
                new_ids = ids if new_ids is ids else torch.where(touched.unsqueeze(-1), new_ids, ids)
                new = torch.where(touched.unsqueeze(-1), new, weights)
            ids, weights = new_ids, new
        return (hidden, ids, weights), {}

    undo = [override_forward(hf.get_submodule(site.router), listen)] if ranked else []
    return [*undo, hf.get_submodule(site.experts).register_forward_pre_hook(before, with_kwargs=True).remove]


def _changed(
    act: Act,
    ids: torch.Tensor,
    weights: torch.Tensor,
    logits: torch.Tensor | None,
    semantics: Any,
    touched: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [T, k] after one act, in every row."""
    if act.kind == "patch":
        return _patched(act, ids, weights, touched)
    if act.kind in ("scale", "zero"):
        factor = 0.0 if act.kind == "zero" else act.factor
        hit = torch.isin(ids, torch.tensor(act.experts, device=ids.device))
        new = torch.where(hit, weights * factor, weights)
        keep_sum = act.kind == "scale" and act.stage == "weight_renormalised"
        return ids, _with_sum_of(weights, new) if keep_sum else new
    order, scores, _ = rank_slots(semantics, ids, weights, logits)
    if act.kind == "ranks":
        wanted = [rank in act.ranks for rank in range(ids.shape[-1])]
        by_rank = torch.tensor(wanted, device=ids.device).expand_as(order)
    else:
        if scores is None:
            raise RefusedError("top_p needs selection shares, and this family's score function is unproven.")
        shares = (scores / scores.sum(-1, keepdim=True)).gather(-1, ids.gather(-1, order))
        by_rank = shares.cumsum(-1) - shares < act.factor
    kept = torch.empty(order.shape, dtype=torch.bool, device=ids.device).scatter_(-1, order, by_rank)
    new = weights.masked_fill(~kept, 0)
    return ids, _with_sum_of(weights, new) if act.renormalise else new


def _patched(
    act: Act, ids: torch.Tensor, weights: torch.Tensor, touched: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert act.ids is not None
    assert act.weights is not None
    n = len(ids) if touched is None else int(touched.sum())
    if act.ids.shape != (n, ids.shape[1]) or act.weights.shape != act.ids.shape:
        raise MoescopeError(f"A patch of shape {tuple(act.ids.shape)} does not fit {n} rows of {ids.shape[1]} slots.")
    here = torch.ones(len(ids), dtype=torch.bool, device=ids.device) if touched is None else touched
    new_ids, new = ids.clone(), weights.clone()
    new_ids[here], new[here] = act.ids.to(ids), act.weights.to(weights)
    return new_ids, new


def _with_sum_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """New weights scaled to the old ones' sum; rows that lost all their weight stay without."""
    total = new.sum(-1, keepdim=True)
    return torch.where(total == 0, new, new * (old.sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)))


def _contribution(site: Site, acts: list[Act]) -> dict[int, float]:
    """One factor for each expert's contribution; what needs a token's slots is refused."""
    factors: dict[int, float] = {}
    for act in acts:
        if act.kind not in ("scale", "zero") or act.stage == "weight_renormalised" or not act.where.everywhere:
            raise RefusedError(
                f"{site.experts} is never handed ids and weights, so {act.kind} by rank, by row or with a kept sum has "
                "nothing to act on; scale or zero experts in all rows, or mask, promote and demote."
            )
        for expert in act.experts:
            factors[expert] = factors.get(expert, 1.0) * (0.0 if act.kind == "zero" else act.factor)
    return factors


def _at_modules(model: Model, site: Site, acts: list[Act], rows: TouchedRows) -> list[Undo]:
    """Outputs of experts that are modules of their own."""
    modules = expert_modules(model.hf.get_submodule(site.experts))

    def scaled(factor: float) -> Callable[..., Any]:
        return lambda module, args, output: output * factor

    return [
        modules[expert].register_forward_hook(scaled(factor)).remove
        for expert, factor in _contribution(site, acts).items()
    ]


def _at_scaled_input(model: Model, site: Site, acts: list[Act], rows: TouchedRows) -> list[Undo]:
    """llama4: rows of its experts' output stand expert after expert."""
    factors = _contribution(site, acts)

    def after(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        by_expert = torch.ones(site.n_experts, 1, 1, dtype=output.dtype, device=output.device)
        for expert, factor in factors.items():
            by_expert[expert] = factor
        return (output.view(site.n_experts, -1, output.shape[-1]) * by_expert).view(output.shape)

    return [model.hf.get_submodule(site.experts).register_forward_hook(after).remove]


def _at_plan(model: Model, site: Site, acts: list[Act], rows: TouchedRows) -> list[Undo]:
    """jetmoe: gates stand in the router's plan, sorted by expert."""
    factors = _contribution(site, acts)

    def after(module: Any, args: Any, output: Any) -> Any:
        order, tokens, gates, counts, logits = output
        sizes = torch.as_tensor(counts, device=gates.device)
        by_expert = torch.tensor([factors.get(e, 1.0) for e in range(site.n_experts)], device=gates.device)
        return order, tokens, gates * torch.repeat_interleave(by_expert.to(gates.dtype), sizes), counts, logits

    return [model.hf.get_submodule(site.router).register_forward_hook(after).remove]


def _refused(model: Model, site: Site, acts: list[Act], rows: TouchedRows) -> list[Undo]:
    raise RefusedError(f"{site.block} finds its experts by product keys; single ones cannot be edited while it runs.")


PLACES: dict[str, Callable[[Any, Site, list[Act], TouchedRows], list[Undo]]] = {
    "call": _at_call,
    "modules": _at_modules,
    "scaled input": _at_scaled_input,
    "plan": _at_plan,
    "product keys": _refused,
}
