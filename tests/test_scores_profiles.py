"""Scores of predicted perturbations: equal to the original's, and empty where nothing can be told."""

import json

import numpy as np
import pytest
from conftest import golden
from scipy.stats import pearsonr

from scellfm import DataError
from scellfm.scores import perturbation
from scellfm.scores.profiles import pearson

NAMES = ["pearson", "pearson_de", "pearson_delta", "pearson_de_delta"]


@pytest.fixture(scope="module")
def recorded():
    folder = golden("scgpt") / "perturb"
    return dict(np.load(folder / "metrics_in.npz")), json.loads((folder / "metrics.json").read_text())


def by_condition(lists):
    "Lists of genes by condition; the original's keys are cells_condition_dose."
    return {key.split("_")[1]: genes for key, genes in lists.items()}


@pytest.mark.parametrize("run", [0, 1])
def test_scores_are_the_originals(recorded, run):
    arrays, record = recorded
    metrics = list(record["metrics"].values())
    assert len(metrics) == 2  # all genes, and those that are not zero
    changed = by_condition(record[["rank_genes_groups_cov_all", "top_non_dropout_de_20"][run]])
    found = perturbation(
        arrays["pred"], arrays["truth"], arrays["ctrl"], arrays["pert_cat"], record["var_names"], changed=changed
    )
    expected = metrics[run]
    assert set(expected) == set(NAMES)
    assert found.table.loc["model"].to_dict() == pytest.approx(expected, abs=2e-6)
    assert list(found.table.index) == ["model", "no change"]


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    truth, control = rng.gamma(2, 2, (12, 30)), rng.gamma(2, 2, (8, 30))
    return dict(
        predicted=truth + rng.normal(0, 1, truth.shape),
        observed=truth,
        control=control,
        conditions=np.repeat(["a", "b", "c"], 4),
        genes=[f"G{i}" for i in range(30)],
    )


def test_scores_are_correlations_of_mean_profiles(cells):
    table = perturbation(**cells, n_top=7).details["model"]["by_condition"]
    here = cells["conditions"] == "b"
    p, t, m = cells["predicted"][here].mean(0), cells["observed"][here].mean(0), cells["control"].mean(0)
    top = np.argsort(-abs(t - m))[:7]
    expected = [pearsonr(p, t), pearsonr(p[top], t[top]), pearsonr(p - m, t - m), pearsonr((p - m)[top], (t - m)[top])]
    assert table.loc["b", NAMES].tolist() == pytest.approx([r.statistic for r in expected], abs=1e-12)


def test_the_order_of_cells_and_genes_changes_nothing(cells):
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(12), rng.permutation(30)
    other = dict(
        predicted=cells["predicted"][rows][:, columns],
        observed=cells["observed"][rows][:, columns],
        control=cells["control"][:, columns],
        conditions=cells["conditions"][rows],
        genes=[cells["genes"][i] for i in columns],
    )
    first, second = perturbation(**cells).table, perturbation(**other).table
    np.testing.assert_allclose(first, second, atol=1e-12)


def test_predicting_the_truth_is_one_and_no_change_has_no_delta(cells):
    table = perturbation(**cells | {"predicted": cells["observed"]}).table
    assert table.loc["model"].tolist() == pytest.approx([1, 1, 1, 1])
    assert table.loc["no change"].isna().tolist() == [False, False, True, True]
    assert np.isnan(pearson(np.ones(5), np.arange(5)))


@pytest.mark.parametrize(
    "harm, message",
    [
        ({"predicted": np.zeros((11, 30))}, r"\(11, 30\) predictions, \(12, 30\) measurements"),
        ({"control": np.zeros((8, 29))}, r"control has the shape \(8, 29\)"),
        ({"control": np.zeros((0, 30))}, "control has the shape"),
        (
            {"observed": np.where(np.arange(360).reshape(12, 30) == 31, np.nan, 1.0)},
            "observed has 1 NaN or infinite values, the first in row 1, gene 'G1'",
        ),
        ({"changed": {"a": ["G1"]}}, "no list for the condition 'b'"),
        ({"changed": dict.fromkeys("abc", ["G1", "GENE"])}, "'GENE', which is not among the genes"),
    ],
)
def test_bad_inputs_are_named(cells, harm, message):
    with pytest.raises(DataError, match=message):
        perturbation(**cells | harm)
