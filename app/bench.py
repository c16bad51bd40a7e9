"""The laboratory bench: one model in memory, one piece of work on it at a time, whoever asks.

Edits are live on the model itself, so that everything that runs it takes its turn, in the order of asking.
"""

from __future__ import annotations

import gc
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.app.jobs import Job
from moescope.errors import MoescopeError

if TYPE_CHECKING:
    import xarray as xr

    from moescope.decoding import Written
    from moescope.edits import Recipe
    from moescope.hooks import Model

KEPT = 40  # generations that the app remembers
MEASURED = 500  # effects of experts that it remembers: a few kilobytes each
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Choice:
    """A model that may be loaded: an alias, hub id or folder that the store or the command line names."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Question:
    """What to generate.

    Attributes:
        choice: by which model.
        prompt, chat: from what, through the chat template or not.
        recipe: edits of the edited answer; None: there is none.
        new, temperature, seed: tokens at most; None takes the likeliest token; of sampling.
        contrast: (beta, alpha) of self-contrast decoding by the plain model; None: not asked for.
    """

    choice: Choice
    prompt: str
    chat: bool = False
    recipe: Recipe | None = None
    new: int = 64
    temperature: float | None = None
    seed: int = 0
    contrast: tuple[float, float] | None = None

    @property
    def answers(self) -> list[str]:
        """Names of the answers, in the order of writing."""
        return ["plain"] + ["edited"] * (self.recipe is not None) + ["self-contrast"] * (self.contrast is not None)


@dataclass(frozen=True)
class Generated:
    """What was generated.

    Attributes:
        written: by name.
        apart: `decoding.answers_apart`; None without a recipe, or where `trouble` says why not.
        trouble: one sentence, or "".
    """

    written: dict[str, Written]
    apart: xr.Dataset | None = None
    trouble: str = ""


@dataclass
class Bench:
    """The model, whose turn it is, and what was generated lately.

    Attributes:
        held: the model in memory and how it was chosen.
        loading: the job that loads one now; started: the last that somebody asked for by itself.
        writing: the job that writes a checkpoint, or the last that did.
        runs: job id -> (question, job).
        measured: what was asked -> the job that measures it on the model, or has.
    """

    held: tuple[Choice, Model] | None = None
    loading: Job | None = None
    started: Job | None = None
    writing: Job | None = None
    runs: OrderedDict[str, tuple[Question, Job]] = field(default_factory=OrderedDict)
    measured: OrderedDict[Hashable, Job] = field(default_factory=OrderedDict)
    _queue: deque[Job] = field(default_factory=deque)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def coming(self) -> Job | None:
        """The job that brings a model: that loads it, or waits for its turn to."""
        loading, started = self.loading, self.started
        return loading if loading is not None else started if started is not None and not started.over else None

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """Waits until everyone who asked before is done; then the model is this job's alone.

        Raises:
            CancelledError: the job was cancelled while it waited.
        """
        with self._changed:
            self._queue.append(job)
        try:
            while (ahead := self._ahead(job)) > 0:
                job.report(f"waiting for its turn: {ahead} before it", 0, 0)
            job.check()
            yield
        finally:
            with self._changed:
                self._queue.remove(job)
                self._changed.notify_all()

    def _ahead(self, job: Job) -> int:
        with self._changed:
            ahead = self._queue.index(job)
            if ahead:
                self._changed.wait(0.2)
            return ahead

    def keep(self, question: Question, job: Job) -> None:
        """Remembers a generation, and forgets the oldest."""
        with self._changed:
            self.runs[job.id] = question, job
            while len(self.runs) > KEPT:
                self.runs.popitem(last=False)

    def remember(self, asked: Hashable, start: Callable[[], Job]) -> Job:
        """The job that answers this: the one that is at it or has the answer, else a new one from `start`."""
        with self._changed:
            known = self.measured.get(asked)
            if known is not None and (not known.over or known.state == "done"):
                self.measured.move_to_end(asked)
                return known
            job = self.measured[asked] = start()
            self.measured.move_to_end(asked)
            while len(self.measured) > MEASURED:
                self.measured.popitem(last=False)
            return job

    def measure(self, job: Job, weights: str, work: Callable[[Model], Any]) -> Any:
        """`work(model)` in a turn of its own.

        Args:
            job: that measures.
            weights: fingerprint of the model's weights, and not the model: who waits must not keep it in memory.
            work: on the model.

        Raises:
            MoescopeError: this model is no longer the one in memory.
            CancelledError: somebody pressed cancel; the model is what it was.
        """
        with self.turn(job):
            if self.held is None or self.held[1].weights_fingerprint != weights:
                raise MoescopeError("The model was unloaded while this waited for its turn; load it again in the lab.")
            return work(self.held[1])

    def load(self, job: Job, choice: Choice) -> None:
        """Has this model in memory afterwards, and no other."""
        with self.turn(job):
            self._ready(job, choice)

    def unload(self, job: Job) -> None:
        """Has no model in memory afterwards."""
        with self.turn(job):
            self._drop()

    def generate(self, job: Job, question: Question) -> Generated:
        """All answers, each seen in `job.partial` (name -> text so far) as it is written.

        Raises:
            MoescopeError: the model cannot be loaded, or cannot do this.
            CancelledError: somebody pressed cancel; the model is what it was.
        """
        with self.turn(job):
            model = self._ready(job, question.choice)
            from moescope.decoding import answers_apart

            job.partial = dict.fromkeys(question.answers, "")
            found = {name: _answer(job, model, question, name) for name in question.answers}
            if question.recipe is None:
                return Generated(found)
            job.report("comparing them", 0, 0)
            try:
                apart = answers_apart(model, question.prompt, found, question.recipe, chat=question.chat)
            except MoescopeError as error:
                return Generated(found, trouble=str(error))
            return Generated(found, apart)

    def write(self, job: Job, choice: Choice, recipe: Recipe, out: Path, approximate: bool) -> Any:
        """Writes an edited copy of a checkpoint: `edits.Written`.

        Raises:
            MoescopeError: it exists already, the checkpoint is not on this machine, or cannot hold the edits.
        """
        with self.turn(job), _loading_told(job):
            job.report(f"writing {out.name}, then comparing it with the live edits", 0, 0)
            return recipe.write(_folder(choice), out, approximate=approximate)

    def _ready(self, job: Job, choice: Choice) -> Model:
        if self.held is not None and self.held[0] == choice:
            return self.held[1]
        self._drop()  # two would not fit where one does
        job.report(f"loading {choice.name}", 0, 0)
        self.loading = job
        try:
            from moescope.hooks import load  # which takes seconds the first time

            with _loading_told(job):
                model = load(choice.name, revision=choice.revision, trust_remote_code=choice.trust_remote_code)
            _ = model.weights_fingerprint  # of the plain model, before anything is live on it
        finally:
            self.loading = None
        job.check()
        self.held = choice, model
        if self.started is not None and self.started.over:
            self.started = None  # that an earlier one failed is no longer news
        return model

    def _drop(self) -> None:
        if self.held is None:
            return
        self.held = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def new_folder(root: Path, alone: bool, name: str) -> Path:
    """Where a checkpoint of this name goes: a new folder directly in the app's own.

    Raises:
        MoescopeError: not such a name, it exists already, or the app shows one store and has no folder of its own.
    """
    if alone:
        raise MoescopeError("The app shows a single store; start it on a folder of stores to write checkpoints there.")
    if not _NAME.fullmatch(name):
        raise MoescopeError("Name the new folder with letters, digits, dots, dashes and underscores, 64 at most.")
    if os.path.lexists(root / name):
        raise MoescopeError(f"{name} exists already; choose another name.")
    return root / name


def _answer(job: Job, model: Model, question: Question, name: str) -> Written:
    from moescope.decoding import SelfContrast, watched

    def tell(ids: Sequence[int]) -> None:
        text = model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        job.partial = {**job.partial, name: text}
        job.report(f"writing the {name} answer", len(ids), question.new)

    job.report(f"writing the {name} answer", 0, question.new)
    contrast = None
    if name == "self-contrast":
        assert question.contrast is not None
        beta, alpha = question.contrast
        contrast = SelfContrast(model, beta=beta, alpha=alpha, steps=True)
    return watched(
        model,
        question.prompt,
        tell,
        recipe=question.recipe if name == "edited" else None,
        contrast=contrast,
        chat=question.chat,
        max_new_tokens=question.new,
        temperature=question.temperature,
        seed=question.seed,
    )


def _folder(choice: Choice) -> Path:
    """The folder of a model's checkpoint on this machine."""
    from moescope.hooks.loading import resolve

    source = resolve(choice.name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=choice.revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise MoescopeError(f"The checkpoint of {choice.name} is not on this machine; load the model first.") from error


@contextmanager
def _loading_told(job: Job) -> Iterator[None]:
    """Passes transformers' progress bars on to a job, which can stop the loading there."""
    from transformers.utils import logging

    def bar(factory: Callable[..., Any], args: Any, kwargs: Any) -> _Bar:
        return _Bar(job, *args, **kwargs)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


class _Bar:
    """As much of a progress bar as loading needs."""

    def __init__(self, job: Job, iterable: Any = None, desc: str = "", total: int | None = None, **more: Any) -> None:
        self._job, self._iterable, self._desc = job, iterable, desc or "loading"
        self.total = total if total is not None else len(iterable) if hasattr(iterable, "__len__") else 0
        self.n = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, n: int = 1) -> None:
        """Some more is done."""
        self.n += n
        self._job.report(self._desc.lower(), self.n, self.total or 0)

    def close(self) -> None:
        """Nothing."""

    def refresh(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    set_postfix = set_postfix_str = refresh

    def set_description(self, desc: str = "", *args: Any, **kwargs: Any) -> None:
        """What it does now."""
        self._desc = desc or self._desc


__all__ = ["Bench", "Choice", "Generated", "Question", "new_folder"]
