"""A study that is cut off anywhere goes on to the same end; its sets; and what is refused before time is spent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import moescope as ms
from moescope.cli.unlearning import unlearn
from moescope.unlearning import Settings, Study, attribute, read_examples, study, unlearn_expert
from moescope.unlearning.people import bundled_sets, write_sets
from tests.unlearning.test_training import FAST, FORGET, RETAIN, tiny

SETTINGS = Settings(**(FAST | {"steps": 3, "check_every": 9}))


def stopping(at: str) -> Callable[[Any], None]:
    """Stops where a stage, or a step by its number, begins."""

    def stop(told: Any) -> None:
        if (told if isinstance(told, str) else str(told["step"])) == at:
            raise KeyboardInterrupt

    return stop


COMPARED: dict[str, Any] = {"compare": True, "attack": False, "settings": SETTINGS}


@pytest.fixture(scope="module")
def whole() -> Study:
    """The study that nothing cut off."""
    return study(tiny(), FORGET, RETAIN, **COMPARED)


@pytest.mark.parametrize("at", ["1", "training, for comparison: no anchor"])
def test_a_study_cut_off_anywhere_is_resumed_to_the_same_end(at: str, whole: Study, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        study(tiny(), FORGET, RETAIN, out=out, on_stage=stopping(at), on_step=stopping(at), **COMPARED)
    with pytest.raises(ms.MoescopeError, match="unfinished run; go on with it by resume"):
        study(tiny(), FORGET, RETAIN, out=out, **COMPARED)
    steps: list[int] = []
    again = study(
        tiny(), FORGET, RETAIN, out=out, resume=True, on_step=lambda row: steps.append(row["step"]), **COMPARED
    )
    xr.testing.assert_equal(again.result, whole.result)
    assert steps == [1, 2, 3] * (5 if at == "1" else 3)  # what was done is not done again
    assert not list(out.rglob("state.safetensors"))
    assert {folder.name for folder in (out / "controls").iterdir()} == {"random-expert", "no-anchor", "top-3-experts"}
    with pytest.raises(ms.MoescopeError, match="is not empty"):
        study(tiny(), FORGET, RETAIN, out=out, **COMPARED)


def test_what_cannot_be_run_is_refused_before_anything_is(tmp_path: Path) -> None:
    stages: list[str] = []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    more: dict[str, Any] = {"settings": SETTINGS, "on_stage": stages.append}
    for out in ("full", "file"):
        with pytest.raises(ms.MoescopeError, match="is not empty and holds no unfinished run"):
            study(tiny(), FORGET, RETAIN, out=tmp_path / out, **more)
    with pytest.raises(ms.MoescopeError, match="The others set has no token to predict"):
        study(tiny(), FORGET, RETAIN, also={"others": [{"prompt": "sun " * 600, "answer": "a"}]}, **more)
    with pytest.raises(ms.MoescopeError, match="texts to forget are in the retain set too"):
        study(tiny(), FORGET, [*RETAIN, FORGET[0]], **more)
    with pytest.raises(ms.MoescopeError, match="npo keeps a retain set"):
        study(tiny(), FORGET, **more)
    with pytest.raises(ms.MoescopeError, match="fp16 arithmetic needs a GPU"):
        study(tiny(), FORGET, RETAIN, **(more | {"settings": Settings(precision="fp16")}))
    assert not stages
    with pytest.raises(ms.MoescopeError, match="layer 99 is no MoE layer"):
        study(tiny(), FORGET, RETAIN, target=[(99, 0)], **more)
    assert not stages


def test_an_expert_that_no_token_meets_is_trained_and_resumed(tmp_path: Path) -> None:
    """Among experts that are modules it has no gradient at all, among fused ones it has zeros: both are zeros."""
    model = tiny("old_mixtral")
    site = model.sites[0]
    found = attribute(model, read_examples(FORGET), read_examples(RETAIN), resamples=0, permutations=0)
    idle = int(found["attribution"].isel(layer=0).values.argmin())
    with torch.no_grad():  # the router never chooses it
        model.hf.get_submodule(site.router).weight[idle] = 0  # type: ignore[index, union-attr, operator]
    options: dict[str, Any] = FAST | {"target": (site.layer, idle), "anchor": 0.0, "out": tmp_path / "r"}
    with pytest.raises(KeyboardInterrupt):
        unlearn_expert(model, FORGET, RETAIN, on_step=stopping("3"), **options)
    assert len(unlearn_expert(model, FORGET, RETAIN, resume=True, **options).log) == FAST["steps"]


def test_the_bundled_sets_are_ten_thirty_and_ten_people_and_other_texts(tmp_path: Path) -> None:
    for seed in range(4):
        sets = bundled_sets(seed)
        names = [{row["person"] for row in sets[name] if "person" in row} for name in ("forget", "retain")]
        names.append({row["person"] for row in sets["other people"]})
        assert [len(some) for some in names] == [10, 30, 10]
        assert len(set.union(*names)) == 50
        seen = {row["text"] for name in ("forget", "retain", "other people") for row in sets[name]}
        assert not seen & {row["text"] for row in sets["other domains"]}
        assert all(row["domain"] != "facts" for row in sets["other domains"])
    for name, file in write_sets(sets, tmp_path).items():
        assert read_examples(file) == read_examples(sets[name])


def test_without_a_forget_set_only_the_bundled_model_knows_what_to_forget(tmp_path: Path) -> None:
    for options in ({"model": "olmoe"}, {"retain": tmp_path / "r.jsonl"}):
        with pytest.raises(ms.MoescopeError, match="Name what to forget by --forget"):
            unlearn(out=tmp_path / "x", **options)  # type: ignore[arg-type]


def test_a_large_set_is_attributed_on_as_many_tokens_as_asked_for() -> None:
    model, wanted, kept = tiny(), read_examples(FORGET * 9), read_examples(RETAIN)
    sizes = [len(model.tokenizer(example.text)["input_ids"]) for example in wanted]  # type: ignore[misc]
    some = attribute(model, wanted, kept, tokens=60, resamples=9, permutations=9)
    assert 60 <= int(some["tokens"]) < 60 + max(sizes)
    every = attribute(model, wanted, kept, resamples=9, permutations=9)
    assert (int(every["tokens"]), int(every["documents"])) == (sum(sizes), len(wanted))
    assert np.isfinite(float(every["target_p"]))
