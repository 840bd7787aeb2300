"""GEARS in a process of its own: what it is given, what it cannot answer, and what is said where it is not at hand."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scellfm import DataError, ExtraError, OptionError, ScellfmWarning
from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, gears_baseline, perturbation_baselines
from scellfm.scores import perturbation

PROCESS = """
import json, sys
import h5py, numpy as np  # and no anndata, which takes seconds to import
from pathlib import Path
folder = Path(sys.argv[2])
job = json.loads((folder / "job.json").read_text())
def column(found):
    if isinstance(found, h5py.Dataset):
        return found.asstr()[:]
    return found["categories"].asstr()[:][found["codes"][:]]
with h5py.File(folder / "data" / "perturb_processed.h5ad") as cells:
    genes, labels = column(cells["var"]["gene_name"])[::-1], column(cells["obs"]["condition"])
assert set(labels) == {*job["train"], *job["valid"]}
assert genes[-1] not in {gene for wanted in job["wanted"] for gene in wanted}  # GEARS does not see the first gene
rows = np.array([[len(wanted) + int(gene[1:]) for gene in genes] for wanted in job["wanted"]], dtype=np.float32)
np.savez(folder / "predictions.npz", genes=genes.astype(str), rows=rows)
"""


@pytest.fixture(scope="module")
def data():
    simulation = simulate_perturbations(n_targets=8, n_pairs=3, n_genes=50, n_cells=12, n_controls=40, seed=0)
    cells = simulation.adata.copy()
    cells.obs["condition"] = cells.obs["condition"].astype(str).replace("G07", "AWAY")
    with pytest.warns(ScellfmWarning, match="1 of 9 perturbed genes are not measured"):
        return PerturbationData(cells)


@pytest.fixture
def split(data):
    names = [name for name in data.conditions if "+" not in name]
    return {
        "train": [n for n in names if n not in ("G01", "AWAY")],
        "test": ["G01", "AWAY", *[n for n in data.conditions if "+" in n]],
    }


@pytest.fixture
def annotations(data):
    return {gene: [f"a{i % 4}", f"b{i % 6}"] for i, gene in enumerate(data.genes)}


def stand_in(folder, program):
    "An interpreter that runs `program` in place of the script that it is given."
    (folder / "program.py").write_text(program)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "program.py"}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def test_predictions_come_back_by_name_and_a_gene_that_is_not_measured_is_a_dash(data, split, annotations, tmp_path):
    with pytest.warns(ScellfmWarning, match="GEARS predicts 4 of 5"):
        table = gears_baseline(data, split, annotations, python=stand_in(tmp_path, PROCESS))
    assert list(table.index) == split["test"] and list(table.columns) == list(data.genes)
    assert table.loc["AWAY"].isna().all() and table.loc["G01", "G30"] == 31 and table.loc["G01", "G00"] == 1
    scores = perturbation(data, {"GEARS": table.clip(upper=5) / 7}, train=split["train"])
    assert "GEARS (4 of 5)" in scores.title


def test_the_interpreter_is_named_by_the_environment_too(data, split, annotations, tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLFM_GEARS_PYTHON", str(stand_in(tmp_path, PROCESS)))
    with pytest.warns(ScellfmWarning):
        assert gears_baseline(data, split, annotations).notna().any().all()


def test_the_process_finds_the_package_gears_and_no_module_of_ours(data, split, annotations, tmp_path):
    looks = """
import os, sys
from importlib.machinery import PathFinder
beside = os.path.dirname(os.path.abspath(sys.argv[1]))  # where python looks first for what a script imports
found = [name for name in ("gears", "scellfm", "model") if PathFinder.find_spec(name, [beside])]
raise SystemExit(f"beside the script: {found}")
"""
    with pytest.warns(ScellfmWarning), pytest.raises(ExtraError, match=r"beside the script: \[\]"):
        gears_baseline(data, split, annotations, python=stand_in(tmp_path, looks))


@pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")
def test_gears_is_among_all_baselines_where_it_is_at_hand(data, split, annotations, tmp_path, monkeypatch):
    monkeypatch.delenv("SCELLFM_GEARS_PYTHON", raising=False)
    without = perturbation_baselines(data, split, annotations=annotations, baselines="all")
    assert "GEARS" not in without
    monkeypatch.setenv("SCELLFM_GEARS_PYTHON", str(stand_in(tmp_path, PROCESS)))
    found = perturbation_baselines(data, split, annotations=annotations, baselines="all")
    assert set(found) - set(without) == {"GEARS"} and found.counts()["GEARS"] == 4
    assert list(perturbation_baselines(data, split, annotations=annotations, baselines="GEARS")) == ["GEARS"]
    with pytest.raises(OptionError, match="annotations="):
        perturbation_baselines(data, split, baselines=["GEARS"])


def test_a_fold_that_gears_cannot_answer_is_dashes(data, split, annotations, tmp_path, monkeypatch):
    monkeypatch.setenv("SCELLFM_GEARS_PYTHON", str(stand_in(tmp_path, PROCESS)))
    folds = [{"train": split["train"], "test": ["AWAY"]}, {"train": split["train"], "test": ["G01"]}]
    with pytest.warns(ScellfmWarning, match="GEARS predicts nothing of a fold"):
        found = perturbation_baselines(data, folds, annotations=annotations, baselines=["GEARS", "training mean"])
    assert found.counts().to_dict() == {"training mean": 2, "GEARS": 1} and found["GEARS"].loc["AWAY"].isna().all()


def test_what_is_missing_or_fails_is_said(data, split, annotations, tmp_path, monkeypatch):
    monkeypatch.delenv("SCELLFM_GEARS_PYTHON", raising=False)
    with pytest.raises(ExtraError, match="SCELLFM_GEARS_PYTHON"):
        gears_baseline(data, split, annotations)
    with pytest.raises(ExtraError, match="no interpreter"):
        gears_baseline(data, split, annotations, python=tmp_path / "nowhere")
    failing = stand_in(tmp_path, "raise SystemExit('No module named gears')")
    with pytest.warns(ScellfmWarning), pytest.raises(ExtraError, match="code 1: No module named gears"):
        gears_baseline(data, split, annotations, python=failing)
    with pytest.warns(ScellfmWarning), pytest.raises(DataError, match="no two of 50 genes share terms"):
        gears_baseline(data, split, {"x": ["t"]}, python=failing)
    with pytest.raises(DataError, match="with measured genes"):
        gears_baseline(data, {"train": split["train"], "test": ["AWAY"]}, annotations, python=failing)


@pytest.mark.filterwarnings("ignore")
def test_the_original_answers(data, split, annotations):
    original_python()
    found, again = (gears_baseline(data, split, annotations, epochs=2, seed=1) for _ in range(2))
    pd.testing.assert_frame_equal(found, again, atol=1e-5)
    control = data.means().loc["ctrl"]
    assert found.loc["AWAY"].isna().all() and np.corrcoef(found.loc["G01"], control)[0, 1] > 0.5
    json.dumps(found.dropna().round(3).to_dict())


def original_python() -> str:
    "The interpreter with cell-gears; the test is skipped where none is named."
    if "SCELLFM_GEARS_PYTHON" not in os.environ:
        pytest.skip("SCELLFM_GEARS_PYTHON names no environment with cell-gears")
    return os.environ["SCELLFM_GEARS_PYTHON"]


def test_the_preparation_finds_the_genes_of_the_original(capsys):
    script = Path(__file__).parent.parent / "benchmarks" / "perturbseq_preparation.py"
    command = [sys.executable, str(script), "--quick", "--gears", original_python()]
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"the same 20 genes in (\d+) of (\d+) conditions", done.stdout)
    with capsys.disabled():
        print(done.stdout)  # seconds and memory of both sides
    assert found, done.stderr[-2000:]
    assert found[1] == found[2] == "19"
