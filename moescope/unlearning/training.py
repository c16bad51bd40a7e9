"""The loop: one expert's tensors and its layer's router are trained to forget, anchored, watched and kept.

>>> done = unlearn_expert(model, "forget.jsonl", "retain.jsonl", method="npo", out="recipe/")
>>> with model.edited(done.recipe): ...
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from moescope.edits import Recipe
from moescope.edits.replacing import STORED, replacement
from moescope.errors import MoescopeError, RefusedError
from moescope.hooks.parts import Part, expert_parts, router_parts
from moescope.hooks.sites import Site, plain_path
from moescope.unlearning.batching import drawn, split
from moescope.unlearning.examples import Example, Tokens, read_examples, require_apart, tokenised
from moescope.unlearning.keeping import Kept, Log, finish, question_of, require_tensorboard
from moescope.unlearning.objective import Objective, mean_loss
from moescope.unlearning.prefix import Prefix
from moescope.unlearning.settings import Settings
from moescope.unlearning.targeting import Named, attribute, best_targets, named_targets
from moescope.unlearning.trained import Trained
from moescope.unlearning.unlearned import Unlearned
from moescope.unlearning.watching import Watch, checkpointing

if TYPE_CHECKING:
    import xarray as xr

    from moescope.hooks import Model

OnStep = Callable[[dict[str, Any]], None]
Rows = str | Path | Iterable[Any]
CLIP = 1.0  # largest norm of a step's gradient
LOOKED_AT = 64  # examples of either set by which a run is watched
LEAST_RATE = 0.1  # of the learning rate, at the end


@dataclass(frozen=True)
class _Sets:
    forget: list[Tokens]
    retain: list[Tokens]
    held_out: list[Tokens]


def unlearn_expert(
    model: Model,
    forget: Rows,
    retain: Rows | None = None,
    *,
    target: Named | Sequence[Named] | None = None,
    top: int = 1,
    attributed: xr.Dataset | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    keep_state: bool = False,
    tensorboard: bool = False,
    settings: Settings | None = None,
    on_step: OnStep | None = None,
    **changes: Any,
) -> Unlearned:
    """Unlearn a set of texts from one expert (SEUF, arXiv 2411.18797), and give what changed as a recipe.

    Only the targets' own tensors and their layers' routers are trained; nothing else of the model changes, and
    afterwards the model itself is as before, to the bit: apply the recipe.

    Args:
        model: a model with a tokenizer.
        forget, retain: files or rows, see `read_examples`. All methods but "ga" need the retain set.
        target: (layer, expert), or several; by default the first `top` by attribution of the forget set.
        top: how many experts (M).
        attributed: an attribution made earlier, such as of a captured store.
        out: folder for the recipe, its tensors, the log and, while it runs, a state to resume from.
        resume: go on with the unfinished run in `out`.
        keep_state: leave the state in `out` when the run is over, so that it can be resumed to its end at once.
        tensorboard: also log for TensorBoard, into `out`; the extra ``moescope[tensorboard]``.
        settings: see `Settings`; single ones may be given by name instead (``method="npo"``, ``steps=200``).
        on_step: called with the row of each step.

    Raises:
        MoescopeError: a bad setting, a set without tokens, sets that overlap, a target outside the model, a folder of
            another run.
        RefusedError: tensors that cannot be trained or told apart, or a router that cannot be anchored.
    """
    settings = _settings(settings, changes)
    wanted = read_examples(forget)
    kept = [] if retain is None else read_examples(retain)
    require_possible(model, settings, wanted, kept)
    sets = _tokenised(model, settings, wanted, kept)
    if target is not None:
        named = [target] if isinstance(target, tuple) and isinstance(target[1], int) else list(target)
        targets = named_targets(model, named)  # pyright: ignore[reportArgumentType]
    else:
        if attributed is None:
            attributed = attribute(model, wanted, kept, max_length=settings.max_length, seed=settings.seed)
        targets = best_targets(attributed, model, top)
    parts = _parts(model, targets, settings)
    folder = None if out is None else Path(out)
    if folder is not None and settings.scope == "model":
        raise MoescopeError("Training the whole model is a baseline to compare with; it leaves no recipe to write.")
    run = _Run(model, settings, targets, parts, sets, folder, resume, on_step, tensorboard)
    tensors, log, stopped = run.run()
    recipe = None
    if settings.scope == "expert":
        recipe = _recipe(model, settings, targets, tensors, attributed, stopped)
        if folder is not None:
            recipe.save(folder / "recipe.yaml")
    if not keep_state:
        finish(folder)
    return Unlearned(
        recipe=recipe,
        targets=tuple((site.key, expert) for site, expert in targets),
        settings=settings,
        log=log,
        stopped=stopped,
        n_trained=sum(tensor.numel() for tensor in tensors.values()),
        n_parameters=model.n_parameters,
        tensors=tensors,
        attribution=attributed,
    )


def _settings(given: Settings | None, changes: dict[str, Any]) -> Settings:
    unknown = sorted(set(changes) - set(Settings.names()))
    if unknown:
        raise MoescopeError(f"There is no setting {unknown[0]!r}; settings are {', '.join(Settings.names())}.")
    return Settings(**((given.as_dict() if given else {}) | changes))


def _tokenised(model: Model, settings: Settings, forget: list[Example], retain: list[Example]) -> _Sets:
    wanted = tokenised(model, forget, settings.max_length, "forget")
    kept = tokenised(model, retain, settings.max_length, "retain") if retain else []
    every = max(2, round(1 / settings.held_out)) if settings.held_out else 0
    out = kept[::every] if every and len(kept) > 1 else []
    trained = [tokens for place, tokens in enumerate(kept) if not out or place % every]
    return _Sets(wanted, trained, out)


def _parts(model: Model, targets: Sequence[tuple[Site, int]], settings: Settings) -> list[Part]:
    if settings.scope == "model":
        return [Part(plain_path(name)) for name, p in model.hf.named_parameters() if p.is_floating_point()]
    parts = [part for site, expert in targets for part in expert_parts(model.hf, site, expert)]
    routers = {site.key: site for site, _ in targets}.values()
    return parts + [part for site in routers for part in router_parts(model.hf, site)]


class _Run:
    """One run, from where it is to its end."""

    def __init__(
        self, model: Model, settings: Settings, targets: Sequence[tuple[Site, int]], parts: Sequence[Part],
        sets: _Sets, folder: Path | None, resume: bool, on_step: OnStep | None, tensorboard: bool,
    ) -> None:  # fmt: skip
        if tensorboard:
            require_tensorboard(folder)
        self._model, self._settings, self._targets, self._sets = model, settings, targets, sets
        self._parts, self._folder, self._on_step, self._board = parts, folder, on_step, tensorboard
        question = question_of(
            [model.weights_fingerprint, *model.edits],  # a model under edits is another one
            settings.as_dict(),
            [str(part) for part in parts],
            sets.forget,
            sets.retain,
        )
        self.kept = Kept(folder, question, resume=resume)
        self._named = {"forget": sets.forget} | ({"retain": sets.retain} if settings.retains else {})
        self._stored = stored_dtype(model, parts[0])

    def run(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], str]:
        settings, model = self._settings, self._model
        routers = list({site.key: site for site, _ in self._targets}.values()) if settings.anchors else []
        steered = [max((site for site, _ in self._targets), key=lambda site: site.ordinal)]
        undo = checkpointing(model.hf, _first_sites(model, self._targets, settings)) if settings.checkpointing else []
        try:
            with (
                _accelerator(model, settings) as accelerator,
                Trained(model.hf, self._parts, [site.experts for site, _ in self._targets]) as trained,
                Watch(model, routers, steered if settings.method == "rmu" else []) as watch,
                Log(self._folder, self.kept.log, tensorboard=self._board) as log,
                ExitStack() as opened,
            ):
                optimizer = torch.optim.AdamW(trained.leaves.values(), settings.learning_rate, weight_decay=0.0)
                prepared = accelerator.prepare(optimizer)
                with accelerator.autocast():  # what training is held against is computed as training computes
                    first = _first_sites(model, self._targets, settings)
                    prefix = opened.enter_context(Prefix(model, first, self._named))
                    objective = Objective(
                        model, settings, self._targets, trained, self._sets.forget, self._sets.retain, watch, prefix
                    )
                if math.isnan(self.kept.before):
                    self.kept.before = mean_loss(model, self._sets.held_out[:LOOKED_AT])
                self.kept.restore(trained, optimizer)
                if not self.kept.step:  # so that whatever stops it, it can be resumed
                    self.kept.save(trained, optimizer)
                if accelerator.scaler is not None and self.kept.scale:
                    accelerator.scaler.load_state_dict(self.kept.scale)
                stopped = self._steps(accelerator, prepared, optimizer, trained, objective, log)
                return self._result(trained), self.kept.log, stopped
        finally:
            for back in reversed(undo):
                back()

    def _steps(
        self, accelerator: Any, prepared: Any, optimizer: Any, trained: Trained, objective: Objective, log: Log
    ) -> str:
        settings, bad = self._settings, _bad_looks(self.kept.log, self.kept.before, self._settings)
        stopped = _why_stopped(bad, settings)
        while self.kept.step < settings.steps and not stopped:
            began, step = time.monotonic(), self.kept.step
            rate = _rate(settings, step)
            for group in prepared.param_groups:
                group["lr"] = rate
            row = self._step(accelerator, prepared, trained, objective, step)
            row |= {"learning_rate": rate, "seconds": time.monotonic() - began}
            self.kept.step += 1
            last = self.kept.step == settings.steps
            looked = self.kept.step % settings.check_every == 0 or last
            if looked:
                row |= self._look(trained)
            self.kept.log.append(row)
            log.add(row)
            if looked:
                bad = _bad_looks(self.kept.log, self.kept.before, settings)
                stopped = _why_stopped(bad, settings)
                if accelerator.scaler is not None:
                    self.kept.scale = accelerator.scaler.state_dict()
                self.kept.save(trained, optimizer)
            if self._on_step is not None:
                self._on_step(row)
        return stopped or f"after {self.kept.step} steps"

    def _step(
        self, accelerator: Any, prepared: Any, trained: Trained, objective: Objective, step: int
    ) -> dict[str, Any]:
        settings = self._settings
        forget = drawn(len(self._sets.forget), settings.batch, step, settings.seed, 1)
        retain = (
            drawn(len(self._sets.retain), settings.retain_batch, step, settings.seed, 2) if settings.retains else []
        )
        sums = {"total": 0.0, "forget": 0.0, "retain": 0.0, "anchor": 0.0}
        pairs = list(zip(split(forget, settings.accumulate), split(retain, settings.accumulate), strict=True))
        kept = sum(len(self._sets.retain[row].ids) for row in retain)
        real = sum(len(self._sets.forget[row].ids) for row in forget)
        norm = 0.0
        for some, others in pairs:
            with accelerator.accumulate(self._model.hf):
                if others:
                    with accelerator.autocast():
                        batch, term = objective.retain_term(others)
                    weight = int(batch.real.sum()) / kept if settings.method == "rmu" else len(others) / len(retain)
                    part = settings.retain_weight * term * weight
                    accelerator.backward(part * len(pairs))
                    sums["retain"] += float(term.detach()) * weight
                    sums["total"] += float(part.detach())
                if some:
                    with accelerator.autocast():
                        batch, terms = objective.forget_terms(some)
                    of_tokens = int(batch.real.sum()) / real
                    weight = of_tokens if settings.method == "rmu" else len(some) / len(forget)
                    part = terms["forget"] * weight
                    if "anchor" in terms:
                        part = part + settings.anchor * terms["anchor"] * of_tokens
                        sums["anchor"] += float(terms["anchor"].detach()) * of_tokens
                    accelerator.backward(part * len(pairs))
                    sums["forget"] += float(terms["forget"].detach()) * weight
                    sums["total"] += float(part.detach())
                if accelerator.sync_gradients:
                    trained.complete()
                    norm = float(accelerator.clip_grad_norm_(list(trained.leaves.values()), CLIP))
                prepared.step()
                prepared.zero_grad()
        trained.write_back()
        if not math.isfinite(sums["total"]) and settings.precision != "fp16":
            raise MoescopeError(f"The loss is not finite at step {step + 1}; lower the learning rate.")
        return {"step": step + 1, **sums, "gradient": norm}

    def _look(self, trained: Trained) -> dict[str, float]:
        forgotten = mean_loss(self._model, self._sets.forget[:LOOKED_AT])
        if not self._sets.held_out:
            return {"forgotten": forgotten}
        utility = mean_loss(self._model, self._sets.held_out[:LOOKED_AT])
        if utility <= self.kept.before * (1 + self._settings.tolerance):
            self.kept.best = {name: leaf.detach().clone() for name, leaf in trained.leaves.items()}
        return {"utility": utility, "forgotten": forgotten}

    def _result(self, trained: Trained) -> dict[str, torch.Tensor]:
        """The tensors at the end; where the run stopped because the utility fell, those of the last look it held at."""
        stopped = _why_stopped(_bad_looks(self.kept.log, self.kept.before, self._settings), self._settings)
        if stopped and self.kept.best is not None:
            with torch.no_grad():
                for name, leaf in trained.leaves.items():
                    leaf.copy_(self.kept.best[name])
        return {name: tensor.cpu() for name, tensor in trained.tensors(self._stored).items()}


def _bad_looks(log: Sequence[dict[str, Any]], before: float, settings: Settings) -> int:
    """How many looks in a row, up to the last, found the utility fallen."""
    looks = [row["utility"] for row in log if "utility" in row]
    bad = 0
    for utility in reversed(looks):
        if utility <= before * (1 + settings.tolerance):
            break
        bad += 1
    return bad


def _why_stopped(bad: int, settings: Settings) -> str:
    if not settings.patience or bad < settings.patience:
        return ""
    return f"the held-out retain loss stood more than {settings.tolerance:.0%} above its start at {bad} looks in a row"


def _rate(settings: Settings, step: int) -> float:
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / (settings.warmup + 1)
    through = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (LEAST_RATE + (1 - LEAST_RATE) * (1 + math.cos(math.pi * through)) / 2)


def _first_sites(model: Model, targets: Sequence[tuple[Site, int]], settings: Settings) -> list[Site]:
    return model.sites if settings.scope == "model" else [site for site, _ in targets]


def require_possible(model: Model, settings: Settings, forget: Sequence[Example], retain: Sequence[Example]) -> None:
    """Raises MoescopeError where a run could not begin with these sets on this device."""
    if settings.retains and not retain:
        raise MoescopeError(f"{settings.method} keeps a retain set; give one, or use method='ga'.")
    require_apart(forget, retain)
    if settings.precision == "fp16" and model.device.type == "cpu":
        raise MoescopeError("fp16 arithmetic needs a GPU; on a CPU train in precision 'bf16' or 'no'.")


@contextmanager
def _accelerator(model: Model, settings: Settings) -> Iterator[Any]:
    """Accelerate for one process; its process-wide state is left as it was found."""
    earlier = bool(AcceleratorState._shared_state)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.accumulate,
            mixed_precision=settings.precision,
            cpu=model.device.type == "cpu",
        )
    except ValueError as error:
        raise MoescopeError(f"accelerate refuses this run: {str(error).splitlines()[0]}") from error
    if accelerator.mixed_precision != settings.precision:
        raise MoescopeError(
            f"accelerate would train in precision {accelerator.mixed_precision!r} here, not {settings.precision!r}; "
            "ask for that one."
        )
    if accelerator.num_processes > 1:
        raise MoescopeError("Unlearning trains one expert and runs in one process; start it without a launcher.")
    try:
        yield accelerator
    finally:
        if not earlier:
            AcceleratorState._reset_state(True)


def stored_dtype(model: Model, part: Part) -> torch.dtype | None:
    """In which precision the model's checkpoint holds a parameter, None where there is no such folder.

    What is trained is rounded to it, so that a written checkpoint computes exactly what the recipe does live.
    """
    from moescope.edits.files import tensors_of
    from moescope.hooks.loading import resolve
    from moescope.hooks.names import checkpoint_names

    try:
        folder = Path(resolve(model.name))
        if not folder.is_dir():
            return None
        known = tensors_of(folder)
        return STORED.get(known[checkpoint_names(model.hf, part.path, known)[0]].dtype)
    except (MoescopeError, RefusedError):
        return None


def _recipe(
    model: Model, settings: Settings, targets: Sequence[tuple[Site, int]], tensors: dict[str, torch.Tensor],
    attributed: xr.Dataset | None, stopped: str,
) -> Recipe:  # fmt: skip
    by_site: dict[str, list[int]] = {}
    for site, expert in targets:
        by_site.setdefault(site.key, []).append(expert)
    edits, held = [], {}
    for key, experts in by_site.items():
        site = next(site for site in model.sites if site.key == key)
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(plain_path(site.layer_path) + ".")}
        layer: int | str = site.layer if sum(other.layer == site.layer for other in model.sites) == 1 else key
        edit, held[edit_file] = replacement(layer, tuple(experts), own, edit_file := f"{key}.safetensors")
        edits.append(edit)
    source: dict[str, Any] = {
        "recipe": "unlearn_expert", "model": model.name, "settings": settings.as_dict(), "stopped": stopped,
    }  # fmt: skip
    if attributed is not None:
        cells = {(str(k), e): float(attributed["attribution"].values[row, e])
                 for row, k in enumerate(attributed["site"].values) for e in attributed["expert"].values}  # fmt: skip
        source["values"] = [
            {"layer": site.layer, "expert": expert, "value": cells[site.key, expert]} for site, expert in targets
        ]
    return Recipe(edits, config_hash=model.config_hash, suggested_by=source).holding(held)
