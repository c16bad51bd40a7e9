"""Mixed precision computes with the trained tensors, not with roundings of older ones; logs hold what was told."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.hooks.parts import expert_parts, router_parts
from moescope.unlearning import unlearn_expert
from moescope.unlearning.keeping import COLUMNS
from moescope.unlearning.trained import Trained
from tests.unlearning.test_training import FAST, FORGET, RETAIN, tiny


@pytest.mark.parametrize("name", ["qwen2_moe", "old_mixtral"])
def test_a_frozen_pass_under_autocast_leaves_no_frozen_weights_behind(name: str) -> None:
    model = tiny(name)
    site = model.sites[0]
    ids = torch.arange(3, 63).reshape(2, 30)
    parts = [*expert_parts(model.hf, site, 1), *router_parts(model.hf, site)]
    with Trained(model.hf, parts, [site.experts]) as trained:
        for leaf in trained.leaves.values():
            leaf.data += 0.3
        trained.write_back()
        found: list[Any] = []
        for frozen_first in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                if frozen_first:
                    with trained.frozen_copy():
                        model.forward(ids)
                logits = model.forward(ids)
            logits.float().logsumexp(-1).sum().backward()
            trained.complete()
            found.append([logits.detach(), *(leaf.grad for leaf in trained.leaves.values())])
            for leaf in trained.leaves.values():
                leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_bf16_training_follows_single_precision(method: str) -> None:
    options = FAST | {"method": method, "steps": 6}
    plain, mixed = (unlearn_expert(tiny(), FORGET, RETAIN, **options, precision=p) for p in ("no", "bf16"))
    for a, b in zip(plain.log, mixed.log, strict=True):
        for term in ("total", "forget", "retain", "anchor"):
            assert b[term] == pytest.approx(a[term], rel=0.05, abs=0.02)
    assert any(a["total"] != b["total"] for a, b in zip(plain.log, mixed.log, strict=True))
    if method == "npo":  # held against itself at first, in the same arithmetic
        assert mixed.log[0]["forget"] == pytest.approx(2 * math.log(2), abs=1e-6)


def test_fp16_on_a_cpu_is_refused_in_a_sentence() -> None:
    with pytest.raises(ms.MoescopeError, match="fp16 arithmetic needs a GPU"):
        unlearn_expert(tiny(), FORGET, RETAIN, **FAST, precision="fp16")


def test_logs_hold_every_step_once_after_an_interruption_too(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told: list[dict[str, Any]] = []

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:  # one after the last saved state: this step is run and logged again
            raise KeyboardInterrupt

    options: dict[str, Any] = FAST | {"steps": 6, "out": tmp_path / "r", "tensorboard": True}
    with pytest.raises(KeyboardInterrupt):
        unlearn_expert(tiny(), FORGET, RETAIN, on_step=stop, **options)
    done = unlearn_expert(tiny(), FORGET, RETAIN, on_step=told.append, resume=True, **options)
    assert [row["step"] for row in told] == [3, 4, 5, 6]
    with (tmp_path / "r" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    for row, said in zip(rows, done.log, strict=True):
        assert {name: float(value) for name, value in row.items() if value} == pytest.approx(said)
    board = accumulator.EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    board.Reload()
    for term in ("total", "forget", "retain", "anchor", "utility"):
        scalars = board.Scalars(f"unlearning/{term}")
        want = {row["step"]: row[term] for row in done.log if term in row}
        assert [one.step for one in scalars] == list(want)
        assert [one.value for one in scalars] == pytest.approx(list(want.values()), rel=1e-6)


def test_tensorboard_that_is_not_there_or_has_no_folder_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ms.MoescopeError, match="needs a folder"):
        unlearn_expert(tiny(), FORGET, RETAIN, **FAST, tensorboard=True)
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ms.MoescopeError, match=r"not installed: pip install 'moescope\[tensorboard\]'"):
        unlearn_expert(tiny(), FORGET, RETAIN, **FAST, out=tmp_path / "r", tensorboard=True)
    assert not (tmp_path / "r").exists()
