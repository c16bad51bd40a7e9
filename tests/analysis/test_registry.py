"""The registry fits the functions it names, so that a command line built from it works."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.errors import MoescopeError
from tests.analysis import function_stores
from tests.analysis.made_stores import random_truth, write

SMALL = {
    "npmi_classes": {"classes": ["one digit=w. "]},
    "npmi_markers": {"markers": ["w3 "]},
    "npmi_tokens": {"least": 1},
    "vocabulary_specialisation": {"least": 1},
    "placement": {"devices": 2, "uneven": True},  # a layer of 3 experts divides over no devices
}
"""What an analysis needs of a small store that its defaults do not give."""


def given(entry, folder):
    """What an analysis takes by position, made small: layers of 4 and 3 experts, or 7 and 6 where it draws a map."""
    if "weights" in entry.inputs:
        rng = np.random.default_rng(1)
        return [{n: Weights(rng.normal(size=(n, 9)), experts(rng, n)) for n in (7, 6)}]
    if entry.tier in ("logits", "experts", "activations"):
        truth = function_stores.random_truth(np.random.default_rng(0), 9, (4, 3), k=2, longest=90)
        return [function_stores.write(folder / "s", truth, labels=list("ababababa") if entry.name == "tcess" else None)]
    longest = 400 if entry.name == "token_map" else 30
    made = random_truth(np.random.default_rng(0), 9, [4, 3], [2, 1], longest=longest)
    domain = ["abc"[d % (3 if entry.name == "expert_map" else 2)] for d in range(9)]
    maxima = np.random.default_rng(0).random((2, 4)) + 0.1
    store = write(folder / "s", made, [4, 3], {"domain": domain}, maxima=maxima, hidden=[1.0, 2.0])
    return [[store, store] if name == "stores" else store for name in entry.inputs]


class Weights(dict):
    """Matrices by name, and router rows, as `expert_weights` gives them."""

    def __init__(self, router, matrices):
        super().__init__(matrices)
        self.router = router


def experts(rng, n):
    return {name: rng.normal(size=(n, 6, 5)).astype(np.float32) for name in ("gate", "up", "down")}


@pytest.mark.parametrize("entry", analysis.ANALYSES.values(), ids=lambda entry: entry.name)
def test_parameters_are_those_of_the_function(entry, tmp_path):
    keywords = inspect.signature(entry.run).parameters
    for parameter in entry.parameters:
        assert keywords[parameter.name].default == parameter.default
    defaults = {p.name: p.default for p in entry.parameters}
    defaults |= SMALL.get(entry.name, {})
    result = entry.run(*given(entry, tmp_path), **defaults)
    assert result.attrs["analysis"] == entry.name
    assert hasattr(figures, entry.figure)
    assert figures.draw(result).data
    table = analysis.table(result)
    # Layers of 4 and 3 experts: a row for each expert, each transition, each ordered pair in a layer, each path, or
    # each pair; layers of 7 and 6 where weights are given.
    pairs = {"gate_similarity": 21 + 15, "weight_similarity": 21 + 15, "neuron_matching": 20}
    pairs |= {
        "logit_similarity": 6 + 3,
        "output_similarity": 6 + 3,
        "gate_map": 13,
        "weight_outliers": 13,
        "norm_against_score": 2,
    }
    rows = {"affinity": 4 * 3, "coactivation": 4 * 3 + 3 * 2, "paths": 4 * 3, "token_map": 20} | pairs
    # For each layer and window, layer, policy and cache size, or policy and size (2 and 3: k is 2 of 4).
    rows |= {"vocabulary_specialisation": 2 * 20}
    rows |= {"attention_sinks": 2}
    rows |= {"consistency": 2 * 4, "caches": 2 * 6 * 2, "offload": 4 * 2}
    # Layers, times thresholds or checkpoints; three methods and three controls.
    rows |= {"what_if": 2 * 6, "compare": 2, "fluctuation": 2 * 2, "placement": 6}
    assert len(table) == rows.get(entry.name, 7) * (result.sizes["label"] if "label" in table else 1)
    json.loads(table.to_json(orient="records"))
    # Flat attributes: the result can be saved.
    assert all(isinstance(value, (str, int, float)) for value in result.attrs.values())


@pytest.mark.parametrize("package", [analysis, figures], ids=["analysis", "figures"])
def test_no_module_is_named_as_what_its_package_exports(package):
    """Importing the module would put it where the function should be."""
    modules = {file.stem for file in Path(package.__file__).parent.glob("*.py")}
    assert not modules & set(package.__all__)


def test_imports_are_lazy_and_never_torch():
    code = (
        "import sys, moescope.analysis as analysis, moescope.figures as figures, moescope.report as report; "
        "print([m for m in ('numba', 'torch', 'plotly', 'xarray', 'pandas') if m in sys.modules]); "
        "[getattr(analysis, name) for name in analysis.__all__]; [getattr(figures, name) for name in figures.__all__]; "
        "report.write; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_tables_by_other_dimensions(tmp_path):
    made = random_truth(np.random.default_rng(0), 6, [4, 3], [2, 1])
    result = analysis.load(write(tmp_path / "s", made, [4, 3], {}))
    assert analysis.table(result, ["layer"])["layer"].tolist() == [0, 1]
    with pytest.raises(MoescopeError, match="tables by"):
        analysis.table(result, ["label"])
