"""The numbers that GEARS and scGenePT print, to 1e-6, through public functions."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import golden

from scellfm import DataError, OptionError
from scellfm.scores import gears_scores, gears_summary, perturbation

ANALYSES = {
    "metrics": "compute_metrics_pert",
    "deeper": "deeper_analysis",
    "non_dropout": "non_dropout_analysis",
    "non_zero": "non_zero_analysis",
}


@pytest.fixture(scope="module")
def folder():
    return golden("scgenept")


@pytest.fixture(scope="module")
def data(folder):
    return ad.read_h5ad(folder / "data" / "perturb_processed.h5ad")


def cells(folder, name):
    arrays = np.load(folder / "metrics" / name)
    return arrays["pred"], arrays["truth"], arrays["pert_cat"]


@pytest.mark.parametrize("analysis", ANALYSES)
def test_every_published_number_of_every_analysis(folder, data, analysis):
    recorded = json.loads((folder / "metrics" / "random_metrics.json").read_text())[ANALYSES[analysis]]
    table = gears_scores(data, *cells(folder, "random_results.npz"), analysis=analysis)
    assert set(table.index) == set(recorded)
    for condition, expected in recorded.items():
        found = table.loc[condition].dropna()
        assert set(found.index) == set(expected)
        assert found.to_dict() == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)


def test_overall_means(folder, data):
    recorded = json.loads((folder / "metrics" / "random_metrics.json").read_text())["compute_metrics"]
    table = gears_scores(data, *cells(folder, "random_results.npz"), analysis="metrics")
    assert table.mean().to_dict() == pytest.approx(recorded, abs=1e-6)


def test_cells_without_a_condition_are_no_condition(folder, data):
    missing = data.copy()
    missing.obs["condition"] = missing.obs["condition"].astype(object).where(np.arange(missing.n_obs) > 2)
    with pytest.raises(DataError, match="is missing for 3 cells"):
        gears_scores(missing, *cells(folder, "random_results.npz"))


def test_the_report_of_scgenept(folder, data):
    recorded = json.loads((folder / "metrics" / "scgenept_compute_test_metrics.json").read_text())
    groups = json.loads((folder / "data" / "split.json").read_text())["subgroup"]["test_subgroup"]
    table = gears_scores(data, *cells(folder, "scgenept_eval_perturb.npz"))
    found = gears_summary(table, groups)
    expected = {name: float(value) for name, value in recorded.items()}
    assert found == pytest.approx(expected, abs=1e-6)
    single = json.loads((folder / "metrics" / "scgenept_pert_res.json").read_text())
    for condition, values in single.items():
        assert table.loc[condition, list(values)].to_dict() == pytest.approx(values, abs=1e-6)


def as_table(predicted, labels, data):
    frame = pd.DataFrame(predicted.astype(np.float64), columns=data.var_names)
    return frame.groupby(labels).mean()


def ranked_for(data, place):
    "The ranked genes of each condition under the name that its first (0) or last (-1) cell has."
    names = data.obs["condition_name"].astype(str).groupby(data.obs["condition"].astype(str))
    ranked = data.uns["rank_genes_groups_cov_all"]
    return {label: list(ranked[found.iloc[place]]) for label, found in names if label != "ctrl"}


def test_our_scores_give_the_published_numbers_in_the_original_mode(folder, data):
    recorded = json.loads((folder / "metrics" / "random_metrics.json").read_text())
    predicted, _, labels = cells(folder, "random_results.npz")
    given = data, as_table(predicted, labels, data)
    found, last = (
        perturbation(*given, metrics="all", original=True, de_genes=ranked_for(data, place)) for place in (0, -1)
    )
    table, later = found.details["model"]["by_condition"], last.details["model"]["by_condition"]
    assert len(table) == len(recorded["compute_metrics_pert"])  # A+ctrl and ctrl+A are two here
    for condition, expected in recorded["compute_metrics_pert"].items():
        assert table.loc[condition, list(expected)].to_dict() == pytest.approx(expected, abs=1e-6)
    for condition, expected in recorded["deeper_analysis"].items():
        for name in ("pearson_delta", "pearson_delta_de"):
            assert later.loc[condition, name] == pytest.approx(float(expected[name]), abs=1e-6)
    for condition, expected in recorded["non_dropout_analysis"].items():
        for name in ("pearson_delta_top20_de_non_dropout", "mse_top20_de_non_dropout"):
            if np.isfinite(later.loc[condition, name]):
                assert later.loc[condition, name] == pytest.approx(float(expected[name]), abs=1e-6)
    means = recorded["compute_metrics"]
    assert found.table.loc["model", list(means)].to_dict() == pytest.approx(means, abs=1e-6)


def test_our_own_ranking_is_that_of_the_original(folder, data):
    if data.obs["cell_type"].nunique() > 1:
        pytest.skip("GEARS ranks each cell type by itself, and this score all cells of a perturbation together")
    predicted, _, labels = cells(folder, "random_results.npz")
    table = as_table(predicted, labels, data)
    theirs = perturbation(data, table, metrics="all", original=True, de_genes=ranked_for(data, 0))
    ours = perturbation(data, table, metrics="all", original=True)
    same = np.isclose(theirs.values("mse_de", "model"), ours.values("mse_de", "model"), atol=1e-6)
    assert same.mean() > 0.9  # genes with equal |t| may change places


def test_a_constant_prediction_is_counted_and_is_zero_in_the_original_mode(folder, data):
    predicted, _, labels = cells(folder, "random_results.npz")
    constant = [name for name in pd.unique(labels) if np.ptp(predicted[labels == name]) == 0]
    assert constant
    table = as_table(predicted, labels, data).loc[constant]
    ours, theirs = (perturbation(data, table, metrics="all", original=flag) for flag in (False, True))
    assert ours.values("pearson", "model").isna().all() and ours.counts().loc["model", "pearson"] == 0
    assert np.isnan(ours.table.loc["model", "pearson"]) and theirs.table.loc["model", "pearson"] == 0


def test_a_condition_in_two_cell_types_has_the_lists_of_its_first_and_its_last_cell():
    draw = np.random.default_rng(0)
    genes = [f"G{i:02d}" for i in range(30)]
    obs = pd.DataFrame({"condition": ["ctrl"] * 4 + ["A+ctrl"] * 4}, index=[f"c{i}" for i in range(8)])
    obs["condition_name"] = [*(["x_ctrl_1"] * 4), *(["y_A+ctrl_1+1"] * 2), *(["x_A+ctrl_1+1"] * 2)]
    values = draw.random((8, 30)) + 0.1
    adata = ad.AnnData(values, obs, pd.DataFrame(index=genes))
    order = {"x": draw.permutation(30), "y": draw.permutation(30)}
    adata.uns["rank_genes_groups_cov_all"] = {f"{kind}_A+ctrl_1+1": np.array(genes)[order[kind]] for kind in "yx"}
    predicted = draw.random((4, 30)) + 0.1
    found = [gears_scores(adata, predicted, values[4:], ["A+ctrl"] * 4, analysis=a) for a in ("metrics", "deeper")]
    p, t, m = predicted.mean(0), values[4:].mean(0), values[:4].mean(0)
    first, last = order["y"][:20], order["x"][:20]
    assert found[0].loc["A+ctrl", "mse_de"] == pytest.approx(((p - t)[first] ** 2).mean())
    expected = np.corrcoef((p - m)[last], (t - m)[last])[0, 1]
    assert found[1].loc["A+ctrl", "pearson_delta_de"] == pytest.approx(expected)
    sigma = np.abs(p - t)[first] / values[4:].std(0)[first]
    assert found[1].loc["A+ctrl", "mean_sigma"] == pytest.approx(sigma.mean())


def test_bad_inputs_are_named(folder, data):
    predicted, truth, labels = cells(folder, "random_results.npz")
    with pytest.raises(DataError, match="do not match"):
        gears_scores(data, predicted[:, 1:], truth, labels)
    with pytest.raises(DataError, match="has no genes for 'NEW.ctrl'"):
        gears_scores(data, predicted[:2], truth[:2], ["NEW+ctrl"] * 2)
    with pytest.raises(DataError, match="no cell is a control"):
        gears_scores(data, predicted, truth, labels, control="NT")
    with pytest.raises(OptionError, match="analysis='metric'"):
        gears_scores(data, predicted, truth, labels, analysis="metric")
