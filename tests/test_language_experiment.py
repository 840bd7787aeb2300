"The experiment of `Does language help?` in miniature: it resumes, averages seeds and never looks at a test set."

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData
from scellfm.scgpt import ScGPT

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "scgenept_real_data.py"


@pytest.fixture(scope="module")
def script():
    spec, environment = importlib.util.spec_from_file_location("language_experiment", SCRIPT), dict(os.environ)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(environment)  # the harness sets the number of threads of all that follows
    module.EPOCHS, module.RATES, module.FROZEN, module.SEEDS = {"small": 2}, (1e-2,), (False,), (0, 1)
    return module


@pytest.fixture(scope="module")
def task(script, tmp_path_factory):
    "A trained and scored experiment on 12 simulated perturbations."
    simulated = simulate_perturbations(n_targets=12, n_pairs=0, n_genes=20, n_modules=3, n_cells=40, n_controls=80)
    task = object.__new__(script.Experiment)
    task.name, task.folder = "small", tmp_path_factory.mktemp("experiment")
    task.cells = PerturbationData(simulated.adata)
    task.data = script.averaged(task.cells)
    task.folds = task.data.folds(2)
    know = simulated.vectors["know"]
    task.kinds = {script.MINILM: know, script.PERMUTED: know.permuted(0), script.RANDOM: know.random_like(0)}
    task.kinds[script.NONE] = None
    task.scgpt = task.folder / "scgpt"
    ScGPT.from_config("tiny", list(task.data.input_genes), device="cpu", **script.SHAPE).save_pretrained(task.scgpt)
    script.train(task, script.SEEDS)
    script.score(task)
    return task


@pytest.mark.filterwarnings("ignore")
def test_rows_are_means_of_cells_of_one_perturbation(script, task):
    for condition in ("ctrl", *task.data.conditions):
        rows = task.data.adata.X[task.data.rows(condition)].toarray()
        assert len(rows) == 4 * (1 + (condition == "ctrl"))
        np.testing.assert_allclose(rows.mean(0), task.cells.statistics(condition).mean, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_is_chosen_without_the_test_perturbations(task):
    valid = json.loads((task.folder / "chosen.json").read_text())["valid"]
    assert valid and set(valid) <= set(task.folds[0].train) and not set(valid) & set(task.folds[0].test)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_stopped_trains_only_what_is_missing(script, task):
    kept = {path: path.stat().st_mtime_ns for path in task.folder.glob("*, seed *.csv")}
    assert len(kept) == len(task.kinds) * len(script.SEEDS) * len(task.folds)
    lost = next(iter(kept))
    before = lost.read_bytes()
    lost.unlink()
    script.train(task, script.SEEDS)
    assert lost.read_bytes() == before
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items() if path != lost)


@pytest.mark.filterwarnings("ignore")
def test_scores_are_means_over_seeds_of_each_perturbation(script, task):
    table = pd.read_csv(task.folder / "tables" / "small_scores.csv", index_col="method")
    found = script.predictions(task)
    truth = task.cells.means()
    for kind in task.kinds:
        errors = [((found[script.model_name(kind, seed)] - truth) ** 2).mean(axis=1).dropna() for seed in script.SEEDS]
        assert table.loc[script.model_name(kind), "mse"] == pytest.approx(np.mean(errors), rel=2e-3)
        assert table.loc[script.model_name(kind), "seeds"] == len(script.SEEDS)
    assert table.loc["training mean", "share"] == pytest.approx(0)
    assert table.loc["technical duplicate (ceiling)", "share"] == pytest.approx(1)
    assert not [name for name in table.index if ", seed " in name]


@pytest.mark.filterwarnings("ignore")
def test_differences_are_of_the_same_perturbations(task):
    gaps = pd.read_csv(task.folder / "tables" / "small_differences.csv", index_col=["metric", "method", "to"])
    scores = pd.read_csv(task.folder / "tables" / "small_scores.csv", index_col="method")
    assert len(gaps) == 2 * (4 + 4 + 3) and (gaps["n"] == 12).all()
    for (metric, method, to), gap in gaps.iterrows():
        assert gap["difference"] == pytest.approx(scores.loc[method, metric] - scores.loc[to, metric], abs=2e-3)
        assert gap["low"] <= gap["difference"] <= gap["high"]
