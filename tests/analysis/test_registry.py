"""The registry fits the functions it names, so that a command line built from it works."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest

from moescope import analysis, figures
from moescope.errors import MoescopeError
from tests.analysis.made_stores import random_truth, write


@pytest.mark.parametrize("entry", analysis.ANALYSES.values(), ids=lambda entry: entry.name)
def test_parameters_are_those_of_the_function(entry, tmp_path):
    keywords = inspect.signature(entry.run).parameters
    for parameter in entry.parameters:
        assert keywords[parameter.name].default == parameter.default
    made = random_truth(np.random.default_rng(0), 9, [4, 3], [2, 1])
    domain = [str(d % 2) for d in range(9)]
    maxima = np.random.default_rng(0).random((2, 4)) + 0.1
    store = write(tmp_path / "s", made, [4, 3], {"domain": domain}, maxima=maxima, hidden=[1.0, 2.0])
    given = {p.name: p.default for p in entry.parameters}
    result = entry.run(*[store] * len(entry.inputs), **given)
    assert result.attrs["analysis"] == entry.name
    assert hasattr(figures, entry.figure)
    assert figures.draw(result).data
    table = analysis.table(result)
    # Layers of 4 and 3 experts: a row for each expert, each transition, each ordered pair in a layer, each path.
    rows = {"affinity": 4 * 3, "coactivation": 4 * 3 + 3 * 2, "paths": 4 * 3}.get(entry.name, 7)
    assert len(table) == rows * (2 if "label" in table else 1)
    json.loads(table.to_json(orient="records"))
    # Flat attributes: the result can be saved.
    assert all(isinstance(value, (str, int, float)) for value in result.attrs.values())


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
