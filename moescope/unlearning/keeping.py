"""The state of a run in one file, so that a killed one goes on where it was; and its log as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moescope.errors import MoescopeError
from moescope.unlearning.examples import Tokens

if TYPE_CHECKING:
    from moescope.unlearning.trained import Trained

STATE = "state.safetensors"
LOG = "log.csv"
COLUMNS: tuple[str, ...] = (
    "step", "total", "forget", "retain", "anchor", "utility", "forgotten", "learning_rate", "gradient", "seconds",
)  # fmt: skip


def question_of(
    model: Sequence[str], settings: Mapping[str, Any], parts: Sequence[str], *sets: Sequence[Tokens]
) -> str:
    """A digest of all that a run depends on: one may be resumed by the same question alone."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([list(model), dict(settings), list(parts)], sort_keys=True).encode())
    for tokens in sets:
        digest.update(json.dumps([[one.ids, one.start] for one in tokens]).encode())
    return digest.hexdigest()


def require_free(folder: Path, *, resume: bool) -> None:
    """Raises MoescopeError where a run can neither begin nor, if it is to be resumed, go on in a folder."""
    if (folder / STATE).is_file():
        if not resume:
            raise MoescopeError(f"{folder} holds an unfinished run; go on with it by resume (--resume), or remove it.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise MoescopeError(f"{folder} is not empty and holds no unfinished run; choose another folder.")


class Kept:
    """Saves and restores a run in a folder; without a folder it keeps nothing.

    Attributes:
        step: how many steps are done.
        log: their rows.
        best: the tensors at the last look at which the utility held, by part; None before there was one.
    """

    def __init__(self, folder: Path | None, question: str, *, resume: bool) -> None:
        self.step = 0
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.before = float("nan")
        self.scale: dict[str, Any] = {}
        self._folder, self._question = folder, question
        self._moments: dict[str, torch.Tensor] = {}
        self._leaves: dict[str, torch.Tensor] = {}
        if folder is None:
            return
        require_free(folder, resume=resume)
        if (folder / STATE).is_file():
            self._read(folder / STATE)
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MoescopeError(f"Cannot make {folder}: {error.strerror or error}.") from error

    def _read(self, state: Path) -> None:
        try:
            with safe_open(state, "pt") as file:
                said = json.loads(file.metadata()["moescope"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MoescopeError(f"{state} is no state of a run: {error}.") from error
        if said["question"] != self._question:
            raise MoescopeError(f"{state} is of another run (model, sets or settings differ); choose another folder.")
        self.step, self.log, self.before, self.scale = said["step"], said["log"], said["before"], said["scale"]
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, {})[rest] = tensor
        self._leaves, self._moments = groups.get("leaf", {}), groups.get("moment", {})
        self.best = groups.get("best")

    def restore(self, trained: Trained, optimizer: Any) -> None:
        """Put leaves and optimiser back to where they were."""
        if not self._leaves:
            return
        with torch.no_grad():
            for number, (name, leaf) in enumerate(trained.leaves.items()):
                leaf.copy_(self._leaves[name])
                if f"{number}/step" in self._moments:  # else it was cut off before the first step was saved
                    optimizer.state[leaf] = {
                        kind: self._moments[f"{number}/{kind}"].to(leaf.device if kind != "step" else "cpu")
                        for kind in ("step", "exp_avg", "exp_avg_sq")
                    }
        trained.write_back()

    def save(self, trained: Trained, optimizer: Any) -> None:
        """Write the state; a reader sees the old one or the new one, whole."""
        if self._folder is None:
            return
        tensors = {f"leaf/{name}": leaf.detach() for name, leaf in trained.leaves.items()}
        for number, leaf in enumerate(trained.leaves.values()):
            for kind, value in optimizer.state[leaf].items():
                tensors[f"moment/{number}/{kind}"] = torch.as_tensor(value)
        tensors |= {f"best/{name}": tensor for name, tensor in (self.best or {}).items()}
        said = {
            "question": self._question, "step": self.step, "log": self.log, "before": self.before, "scale": self.scale,
        }  # fmt: skip
        partial = self._folder / f".{STATE}.writing"
        try:
            held = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(held, partial, metadata={"moescope": json.dumps(said)})
            partial.replace(self._folder / STATE)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise MoescopeError(f"Cannot write {self._folder / STATE}: {error}; the one before is kept.") from error


def finish(folder: Path | None) -> None:
    """A run is over and its results are written: its state is not needed any more."""
    if folder is not None:
        (folder / STATE).unlink(missing_ok=True)


def require_tensorboard(folder: Path | None) -> None:
    """Raises MoescopeError where nothing can be logged for TensorBoard."""
    from accelerate.utils import is_tensorboard_available

    if folder is None:
        raise MoescopeError("TensorBoard's log needs a folder for the run (out).")
    if not is_tensorboard_available():
        raise MoescopeError(
            f"TensorBoard is not installed: pip install 'moescope[tensorboard]', or go without; {LOG} holds the same."
        )


class Log:
    """Rows as they come: into a CSV file, and for TensorBoard where that is asked for."""

    def __init__(self, folder: Path | None, earlier: Sequence[Mapping[str, Any]], *, tensorboard: bool = False) -> None:
        self._folder, self._earlier, self._tensorboard = folder, earlier, tensorboard
        self._file: Any = None
        self._board: Any = None

    def __enter__(self) -> Log:
        if self._folder is None:
            return self
        self._file = (self._folder / LOG).open("w", newline="", encoding="utf-8")
        self._rows = csv.DictWriter(self._file, COLUMNS, restval="", extrasaction="ignore")
        self._rows.writeheader()
        self._rows.writerows(self._earlier)
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What a run that was cut off logged after its last saved state comes again: the reader drops those steps.
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=len(self._earlier) + 1)
        return self

    def add(self, row: Mapping[str, Any]) -> None:
        """One step's row."""
        if self._file is not None:
            self._rows.writerow(row)
            self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(f"unlearning/{name}", value, row["step"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for open_one in (self._file, self._board):
            if open_one is not None:
                open_one.close()
