"""Rerouting at test time (R2-T2, arXiv 2502.20395): a prompt's routing weights moved toward those of similar prompts
that were answered correctly.

The routing of the last prompt tokens is taken as one vector of weights r over all experts of each layer. A few gradient
steps on r alone follow a loss that is weighted by a kernel over the neighbours; after each, no weight is below 0 and
their sum is what it was. At the end the k largest are kept, so that the model runs as many experts as ever, and the
prompt is decoded with them. No parameter of the model is changed or given a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import xarray as xr
from scipy.stats import binomtest
from torch.nn.functional import cross_entropy

from moescope.decoding.contrast import Written
from moescope.decoding.problems import Problem, answered, interval, solved, written
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks import Model
from moescope.hooks.interventions import Act, Live, Where
from moescope.hooks.mixing import Mixing, Recording, called_sites

Objective = Literal["answers", "routing"]
Space = Literal["routing", "embedding"]
Routing = dict[str, torch.Tensor]
"""Site key -> weights [last, E] of the last prompt tokens, 0 where an expert is not selected."""

COLUMNS = ("solved", "low", "high", "gained", "lost", "p", "moved", "loss_before", "loss_after")


@dataclass(frozen=True)
class Neighbour:
    """A prompt that was answered correctly.

    Attributes:
        prompt: ids of the prompt [n].
        answer: ids of what the model wrote, and was right with [m].
        routing: of its last prompt tokens.
        point: where it lies in the space that neighbours are looked for in, of length 1.
    """

    prompt: torch.Tensor
    answer: torch.Tensor
    routing: Routing
    point: np.ndarray


@dataclass(frozen=True)
class Rerouted:
    """A prompt's routing before and after, and what is written with it.

    Attributes:
        written: prompt and text.
        before, after: routing of the last prompt tokens.
        losses: the kernel-weighted loss before each step, and in the end, of the k experts that are kept.
        neighbours: (number of the reference, kernel weight), nearest first; weights sum to 1.
    """

    written: Written
    before: Routing
    after: Routing
    losses: list[float]
    neighbours: list[tuple[int, float]]

    @property
    def moved(self) -> float:
        """Mean over layers and tokens of the share of the routing weight that went to other experts."""
        shares = [((self.after[key] - old).abs().sum(-1) / 2 / old.sum(-1)).mean() for key, old in self.before.items()]
        return float(torch.stack(shares).mean())


class Rerouter:
    """Reroutes prompts of one model by a set of reference problems.

    Args:
        model: a model with a tokenizer, whose experts are handed ids and weights.
        references: problems; those that plain greedy decoding answers correctly are the neighbours to choose from.
        neighbours: how many of them pull at a prompt (the paper: 5).
        steps: gradient steps (the paper: 10); 0 decodes plainly.
        rate: length of the first step, as a share of the length of all the weights together; later ones fall off as a
            half cosine (the paper's schedule, made free of the loss's scale).
        objective: "answers": the loss of the neighbours' own right answers when their prompts end in this routing (the
            paper's neighbourhood gradient descent); "routing": the squared distance to the neighbours' routing.
        space: neighbours by the mean "routing" of a prompt's tokens, or by the mean "embedding": the last hidden state.
        last: how many of the last prompt tokens are rerouted.
        layers: model layer indices that are rerouted; all MoE layers if None.
        after: the answer stands behind the first such mark in what is written.
        max_new_tokens: of the reference answers.
        on_progress: called with the number of references done.

    Raises:
        MoescopeError: fewer correctly answered references than neighbours, or a number out of its range.
        RefusedError: the family's experts are never handed ids and weights.
    """

    def __init__(
        self,
        model: Model,
        references: Sequence[Problem],
        *,
        neighbours: int = 5,
        steps: int = 10,
        rate: float = 0.1,
        objective: Objective = "answers",
        space: Space = "routing",
        last: int = 1,
        layers: Sequence[int] | None = None,
        after: str = "",
        max_new_tokens: int = 64,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        if neighbours < 1 or steps < 0 or not rate > 0 or last < 1:
            raise MoescopeError("Rerouting needs a neighbour, a rate above 0, a token, and no fewer than 0 steps.")
        if model.own_batch is not None:
            raise RefusedError(f"Texts of this model cannot share a batch: {model.own_batch}.")
        self.model, self.neighbours, self.steps, self.rate = model, neighbours, steps, rate
        self.objective, self.space, self.last = objective, space, last
        sites = [site for site in called_sites(model) if layers is None or site.layer in set(layers)]
        if not sites:
            raise MoescopeError(f"The model has none of the MoE layers {', '.join(map(str, layers or []))}.")
        self._sites = {site.key: site for site in sites}
        self.known = self._answered(references, after, max_new_tokens, on_progress)
        if len(self.known) < neighbours:
            raise MoescopeError(
                f"{len(self.known)} of {len(references)} references are answered correctly; {neighbours} are needed."
            )

    def __call__(
        self, prompt: str, max_new_tokens: int = 64, *, at_random: np.random.Generator | None = None
    ) -> Rerouted:
        """Reroute one prompt and decode it greedily.

        Args:
            prompt: the prompt.
            max_new_tokens: at most so many.
            at_random: draw the neighbours from all references instead of taking the nearest: the control.
        """
        ids = self._ids(prompt)
        before, point = self._look(ids)
        near = self._nearest(point)
        if at_random is not None:
            drawn = at_random.choice(len(self.known), self.neighbours, replace=False)
            near = [(int(number), weight) for number, (_, weight) in zip(drawn, near, strict=True)]
        r, losses = before, []
        for step in range(self.steps):
            loss, gradient = self.gradient(r, near)
            losses.append(loss)
            r = self._step(r, gradient, before, self.rate * (1 + np.cos(np.pi * step / self.steps)) / 2)
        after = {key: self.sparse(key, values) for key, values in r.items()} if self.steps else before
        losses.append(self.gradient(after, near)[0])
        with Live(self.model, {} if self.steps == 0 else self.acts(after, len(ids)), check=False):
            (text,) = written(self.model, [prompt], max_new_tokens, do_sample=False)
        return Rerouted(text, before, after, losses, near)

    def acts(self, routing: Routing, length: int) -> dict[str, list[Act]]:
        """The routing as acts on the last tokens of a prompt of so many, while it is read."""
        where = Where(positions=(length - self.last, length), phase="prefill")
        found = {}
        for key, values in routing.items():
            weights, ids = values.topk(self.model.semantics[key].top_k, -1)
            found[key] = [Act("patch", ids=ids, weights=weights, where=where)]
        return found

    def gradient(self, routing: Routing, near: Sequence[tuple[int, float]]) -> tuple[float, Routing]:
        """The kernel-weighted loss of a routing, and its gradient over all experts, 0 weights included."""
        leaves = {key: values.clone().requires_grad_() for key, values in routing.items()}
        some = [self.known[number] for number, _ in near]
        with torch.enable_grad():
            losses = self._to_routing(leaves, some) if self.objective == "routing" else self._to_answers(leaves, some)
            loss = (losses * losses.new_tensor([weight for _, weight in near])).sum()
            gradients = torch.autograd.grad(loss, list(leaves.values()))
        return float(loss.detach()), dict(zip(leaves, gradients, strict=True))

    def _to_routing(self, leaves: Routing, some: Sequence[Neighbour]) -> torch.Tensor:
        """[neighbour] squared distance to the routing of each."""
        return torch.stack([
            torch.stack([(values - one.routing[key]).square().sum() for key, values in leaves.items()]).sum()
            for one in some
        ])  # fmt: skip

    def _to_answers(self, leaves: Routing, some: Sequence[Neighbour]) -> torch.Tensor:
        """[neighbour] loss per token of the right answer of each, its prompt ending in this routing; in one pass."""
        texts = [torch.cat([one.prompt, one.answer]) for one in some]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=self.model.pad_id)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        ends = [row * ids.shape[1] + len(one.prompt) for row, one in enumerate(some)]
        rows = torch.cat([torch.arange(end - self.last, end, device=ids.device) for end in ends])
        mixtures = {key: (rows, values.repeat(len(some), 1)) for key, values in leaves.items()}
        with Mixing(self.model, mixtures):
            logits = self.model.forward(ids, mask)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.stack([
            cross_entropy(logits[row, len(one.prompt) - 1 : len(one.prompt) + len(one.answer) - 1], one.answer)
            for row, one in enumerate(some)
        ])  # fmt: skip

    def _step(self, r: Routing, gradient: Routing, before: Routing, rate: float) -> Routing:
        """One step against the gradient, back to weights of at least 0 whose sum is what it was."""
        length = rate * _norm(before) / max(_norm(gradient), 1e-20)
        return {
            key: _with_sum(values - length * gradient[key], before[key].sum(-1, keepdim=True))
            for key, values in r.items()
        }

    def sparse(self, key: str, values: torch.Tensor) -> torch.Tensor:
        """The k largest of some weights [last, E], scaled to the sum of all."""
        best = values.topk(self.model.semantics[key].top_k, -1)
        return _with_sum(torch.zeros_like(values).scatter(-1, best.indices, best.values), values.sum(-1, keepdim=True))

    def _nearest(self, point: np.ndarray) -> list[tuple[int, float]]:
        """The nearest references by cosine, with a Gaussian kernel as wide as the farthest of them is away."""
        distance = np.sqrt(np.maximum(0, 2 - 2 * np.stack([known.point for known in self.known]) @ point))
        order = np.argsort(distance, kind="stable")[: self.neighbours]
        width = max(float(distance[order[-1]]), 1e-12)
        kernel = np.exp(-((distance[order] / width) ** 2) / 2)
        return [(int(number), float(weight)) for number, weight in zip(order, kernel / kernel.sum(), strict=True)]

    def _answered(
        self, references: Sequence[Problem], after: str, new: int, on_progress: Callable[[int], None] | None
    ) -> list[Neighbour]:
        texts = answered(self.model, [item.prompt for item in references], new, do_sample=False)
        known = []
        for place, (item, text) in enumerate(zip(references, texts, strict=True)):
            ids = self._ids(item.prompt)
            if text.tokens and solved(text.text, item.answer, after):
                routing, point = self._look(ids)
                answer = torch.tensor(self._to_the_answer(text, item.answer, after), device=self.model.device)
                known.append(Neighbour(ids, answer, routing, point))
            if on_progress is not None:
                on_progress(place + 1)
        return known

    def _to_the_answer(self, text: Written, answer: str, after: str) -> list[int]:
        """What was written, as far as it takes to give the answer: no loss on whatever comes behind it."""
        for end in range(1, len(text.tokens)):
            if solved(self.model.tokenizer.decode(text.tokens[:end]), answer, after):
                return text.tokens[:end]
        return text.tokens

    def _look(self, ids: torch.Tensor) -> tuple[Routing, np.ndarray]:
        """Routing of the last tokens of a prompt, and its point."""
        if len(ids) < self.last:
            raise MoescopeError(f"A prompt of {len(ids)} tokens has no last {self.last}.")
        hidden: list[torch.Tensor] = []
        head = self.model.hf.get_output_embeddings()
        undo = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0])) if head is not None else None
        if undo is None and self.space == "embedding":
            raise RefusedError(f"{type(self.model.hf).__name__} shows no last hidden state; use space='routing'.")
        try:
            with Recording(self.model) as seen, torch.inference_mode():
                self.model.forward(ids.unsqueeze(0), torch.ones(1, len(ids), dtype=torch.long, device=ids.device))
        finally:
            if undo is not None:
                undo.remove()
        dense = {key: seen.routed[key].dense(site.n_experts) for key, site in self._sites.items()}
        if self.space == "embedding":
            point = hidden[-1].reshape(-1, hidden[-1].shape[-1]).double().mean(0)
        else:
            point = torch.cat([values.double().mean(0) for values in dense.values()])
        point = (point / point.norm().clamp_min(1e-20)).cpu().numpy()
        return {key: values[-self.last :].clone() for key, values in dense.items()}, point

    def _ids(self, prompt: str) -> torch.Tensor:
        return torch.tensor(self.model.tokenizer(prompt)["input_ids"], device=self.model.device)


def _with_sum(values: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    kept = values.clamp_min(0)
    return kept * (total / kept.sum(-1, keepdim=True).clamp_min(1e-20))


def _norm(routing: Routing) -> float:
    return float(torch.stack([values.norm() for values in routing.values()]).norm())


def judge(
    rerouter: Rerouter,
    problems: Sequence[Problem],
    *,
    after: str = "",
    max_new_tokens: int = 64,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """How many problems are solved plainly, rerouted by the nearest references, and by random ones.

    How to read it: `solved` is a share with a 95 % interval (Wilson); `p` is that of an exact McNemar test against
    plain decoding of the same problems. Where random references do as well, it is not the neighbourhood that helps.

    Args:
        rerouter: with references that are none of the problems.
        problems: with their answers.
        after: the answer stands behind the first such mark in what is written.
        max_new_tokens: for each problem.
        seed: of the random references.
        on_progress: called with the number of problems done, of 2 x len(problems).

    Returns:
        Dataset with dims (decoding): solved, low, high, gained, lost (problems), p, moved (share of the routing weight
        that went to other experts), loss_before, loss_after (kernel-weighted); coordinate decoding: "plain",
        "nearest", "random".

    Raises:
        MoescopeError: no problems, or one that is among the references.
    """
    items = list(problems)
    if not items:
        raise MoescopeError("There are no problems to judge by.")
    known = {rerouter.model.tokenizer.decode(one.prompt, skip_special_tokens=True) for one in rerouter.known}
    if any(item.prompt in known for item in items):
        raise MoescopeError("A problem is among the references: its own right answer would lead it.")
    plain_texts = answered(rerouter.model, [item.prompt for item in items], max_new_tokens, do_sample=False)
    plain = np.array([solved(t.text, item.answer, after) for t, item in zip(plain_texts, items, strict=True)])
    rows = {"plain": (plain, np.zeros((len(items), 3)))}
    rng, done = np.random.default_rng(seed), 0
    for name, draw in (("nearest", None), ("random", rng)):
        right, numbers = [], []
        for item in items:
            one = rerouter(item.prompt, max_new_tokens, at_random=draw)
            right.append(solved(one.written.text, item.answer, after))
            numbers.append((one.moved, one.losses[0], one.losses[-1]))
            done += 1
            if on_progress is not None:
                on_progress(done)
        rows[name] = (np.array(right), np.array(numbers))
    columns: dict[str, list[float]] = {}
    for right, numbers in rows.values():
        gained, lost = int((right & ~plain).sum()), int((plain & ~right).sum())
        low, high = interval(right)
        p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        values = (right.mean(), low, high, gained, lost, p, *numbers.mean(0))
        for column, value in zip(COLUMNS, values, strict=True):
            columns.setdefault(column, []).append(float(value))
    for column in COLUMNS[-3:]:
        columns[column][0] = np.nan  # nothing was moved
    return xr.Dataset(
        {name: ("decoding", values) for name, values in columns.items()},
        coords={"decoding": list(rows)},
        attrs={
            "analysis": "rerouting", "model": rerouter.model.name, "config_hash": rerouter.model.config_hash,
            "problems": len(items), "references": len(rerouter.known), "neighbours": rerouter.neighbours,
            "steps": rerouter.steps, "rate": rerouter.rate, "objective": rerouter.objective, "space": rerouter.space,
            "last": rerouter.last, "after": after or "none", "seed": seed, "table": "decoding",
        },
    )  # fmt: skip
