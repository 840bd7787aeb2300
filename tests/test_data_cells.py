"""Simulated cells are counts, do what they are asked for, and know the truth about themselves."""

import time
import warnings

import numpy as np
import pytest
from scipy import sparse

from scellfm.core import OptionError
from scellfm.data import cells as module
from scellfm.data.cells import simulate_cells
from scellfm.data.reading import check_counts, read
from scellfm.data.splits import folds


def auroc(probability, case):
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(case, probability)


def normalised(adata):
    counts = adata.X.toarray()
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))


def cases(adata):
    return (adata.obs["condition"] == "case").to_numpy()


def test_cells_are_raw_counts_with_the_documented_fields():
    adata = simulate_cells(300, 200, cell_types=["T", "B"], donors=4, batches=2)
    assert (
        adata.shape == (300, 200)
        and sparse.issparse(adata.X)
        and adata.X.format == "csr"
        and adata.X.dtype == np.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_counts(adata)
    assert (
        set(adata.obs["cell_type"]) == {"T", "B"}
        and adata.obs["donor"].nunique() == 4
        and adata.obs["batch"].nunique() == 2
    )
    assert list(adata.obs["condition"].cat.categories) == ["control", "case"]
    assert {"n_active", "size", "n_counts", "ceiling_probability"} <= set(adata.obs)
    assert {"programme", "is_regulator", "regulator", "effect", "level", "mean_expression"} <= set(adata.var)
    truth = adata.uns["truth"]
    assert set(truth) >= {"regulators", "targets", "ceiling", "parameters", "batch_scale", "batch_shift"}
    assert set(truth["regulators"]) == set(adata.var_names[adata.var["is_regulator"]])
    for leader, targets in truth["targets"].items():
        assert len(targets) == 10 and (adata.var.loc[targets, "regulator"] == leader).all() and leader not in targets
    assert adata.var["mean_expression"].to_numpy() == pytest.approx(np.asarray(adata.X.mean(axis=0)).ravel())


def test_the_same_seed_gives_the_same_cells_and_another_seed_others():
    first, again, other = simulate_cells(300, 150), simulate_cells(300, 150), simulate_cells(300, 150, seed=1)
    assert (first.X != again.X).nnz == 0 and first.obs.equals(again.obs) and first.var.equals(again.var)
    assert (first.X != other.X).nnz > 0 and list(first.uns["truth"]["regulators"]) != list(
        other.uns["truth"]["regulators"]
    )


def test_the_caller_s_random_state_neither_matters_nor_changes():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = simulate_cells(50, 150)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert (first.X != simulate_cells(50, 150).X).nnz == 0


def test_cells_can_be_written_and_read(tmp_path):
    for options in ({}, {"regulators": 0}, {"targets": 0}, {"cell_types": 1, "donors": 1}):
        adata = simulate_cells(60, 150, **options)
        adata.write_h5ad(tmp_path / "cells.h5ad")
        again = read(tmp_path / "cells.h5ad")
        assert list(again.uns["truth"]["regulators"]) == list(adata.uns["truth"]["regulators"])
        assert again.uns["truth"]["parameters"]["n_cells"] == 60 and (again.X != adata.X).nnz == 0


@pytest.mark.parametrize("dispersion", [0.0, 0.1, 0.5])
def test_the_spread_of_counts_is_that_of_the_negative_binomial(dispersion):
    adata = simulate_cells(
        4000, 100, cell_types=1, donors=1, regulators=0, donor_sd=0, depth_sd=0, dispersion=dispersion, depth=3000
    )
    counts = adata.X.toarray()
    mean, variance = counts.mean(axis=0), counts.var(axis=0)
    assert np.median((variance - mean)[mean > 5] / mean[mean > 5] ** 2) == pytest.approx(dispersion, abs=0.02)


def test_regulators_are_near_absent_in_controls_and_high_ranked_where_they_are_on():
    adata = simulate_cells()
    counts, case, regulator = adata.X.toarray(), cases(adata), adata.var["is_regulator"].to_numpy()
    assert (counts[case].mean(axis=0) / counts[~case].mean(axis=0))[regulator].min() > 6
    share = counts / counts.sum(axis=1, keepdims=True)
    ratio = share / np.array([np.median(column[column > 0]) for column in share.T])
    above = (ratio[:, regulator][:, :, None] < ratio[:, None, :]).sum(axis=2) / (counts > 0).sum(axis=1, keepdims=True)
    on = (adata.obsm["activity"] > 0.5) & case[:, None]
    assert on.any(axis=0).all() and np.median(above[on]) < 0.05
    assert (adata.obsm["activity"][~case] == 0).all()


def test_targets_answer_moderately_and_in_proportion_to_their_regulator():
    adata = simulate_cells(4000, donor_sd=0.0)
    values, case = adata.X.toarray() / adata.obs["size"].to_numpy()[:, None], cases(adata)
    ratio = values[case].mean(axis=0) / values[~case].mean(axis=0)
    target = (adata.var["effect"] != 0).to_numpy()
    assert ratio[target].min() > 0.5 and ratio[target].max() < 2
    others = ~target & ~adata.var["is_regulator"].to_numpy() & (adata.var["mean_expression"] > 1).to_numpy()
    assert np.abs(np.log(ratio[others])).max() < 0.2
    activity = dict(zip(adata.var_names[adata.var["is_regulator"]], adata.obsm["activity"].T))
    strong = adata.var[target & (adata.var["mean_expression"] > 3).to_numpy()].nlargest(5, "effect")
    for gene, row in strong.iterrows():
        a = activity[row["regulator"]]
        fit = np.polyfit(a[case], values[case, adata.var_names.get_loc(gene)], 1)
        assert fit[0] / fit[1] == pytest.approx(row["effect"], rel=0.35)


def test_cell_types_have_their_own_programmes():
    adata = simulate_cells(1500, 300)
    counts = adata.X.toarray()
    for cell_type in adata.obs["cell_type"].cat.categories:
        marked, inside = (
            (adata.var["programme"] == cell_type).to_numpy(),
            (adata.obs["cell_type"] == cell_type).to_numpy(),
        )
        assert marked.sum() == 20
        assert np.median(counts[inside][:, marked].mean(axis=0) / counts[~inside][:, marked].mean(axis=0)) > 2.5


def test_designs_with_and_without_pairs():
    paired = simulate_cells(600, 150).obs.groupby("donor", observed=True)["condition"].nunique()
    assert (paired == 2).all()
    single = simulate_cells(600, 150, paired=False, donors=7).obs.groupby("donor", observed=True)["condition"].nunique()
    assert (single == 1).all()
    assert simulate_cells(4000, 150, case_fraction=0.2).obs["condition"].value_counts(normalize=True)[
        "case"
    ] == pytest.approx(0.2, abs=0.03)


def test_the_ceiling_is_calibrated_and_no_classifier_passes_it():
    from sklearn.linear_model import LogisticRegression

    adata = simulate_cells(8000, 200, seed=3)
    probability, case, ceiling = (
        adata.obs["ceiling_probability"].to_numpy(),
        cases(adata),
        adata.uns["truth"]["ceiling"],
    )
    for low, high in ((0, 0.1), (0.1, 0.3), (0.3, 0.7), (0.7, 0.95), (0.95, 1.01)):
        chosen = (probability >= low) & (probability < high)
        error = np.sqrt(0.25 / chosen.sum())
        assert abs(probability[chosen].mean() - case[chosen].mean()) < 4 * error, (low, high, chosen.sum())
    assert ceiling["accuracy"] == pytest.approx(((probability > 0.5) == case).mean())
    assert ceiling["expected_accuracy"] == pytest.approx(ceiling["accuracy"], abs=0.015)
    assert ceiling["auroc"] == pytest.approx(auroc(probability, case))
    values, hits = normalised(adata), np.zeros(len(case), dtype=bool)
    for fold in folds(adata, by="donor", k=3):
        model = LogisticRegression(C=0.01, max_iter=1000).fit(values[fold.train], case[fold.train])
        hits[fold.test] = model.predict(values[fold.test]) == case[fold.test]
    assert 0.75 < hits.mean() < ceiling["accuracy"]


def test_the_ceiling_does_not_depend_on_the_number_of_nodes():
    adata = simulate_cells(500, 150, contrast=0.7)
    design = module.Design(**{**adata.uns["truth"]["parameters"], "cell_types": ("type1", "type2", "type3")})
    genes, by_type = module.simulate_genes(design)
    obs, _ = module.simulate_obs(design)
    rates = module.draw_rates(design, genes, by_type, obs)
    fine = 1 / (1 + np.exp(-module.case_log_odds(design, genes, rates, adata.X, nodes=400)))
    assert np.abs(fine - adata.obs["ceiling_probability"]).max() < 0.005


def test_without_contrast_nobody_can_tell():
    adata = simulate_cells(1000, 150, contrast=0, case_fraction=0.3)
    assert adata.obs["ceiling_probability"].to_numpy() == pytest.approx(0.3)
    regulator = adata.var["is_regulator"].to_numpy()
    counts, case = adata.X.toarray(), cases(adata)
    assert counts[~case][:, regulator].mean() == pytest.approx(counts[case][:, regulator].mean(), rel=0.2)


def test_more_contrast_and_depth_are_easier_to_tell():
    by_contrast = [simulate_cells(1500, 150, contrast=c).uns["truth"]["ceiling"]["auroc"] for c in (0.0, 0.5, 1.0)]
    by_depth = [simulate_cells(1500, 150, depth=d).uns["truth"]["ceiling"]["auroc"] for d in (100, 500, 5000)]
    assert by_contrast == sorted(by_contrast) and by_depth == sorted(by_depth) and by_depth[0] < by_depth[-1] - 0.05


def test_deleting_a_regulator_moves_a_case_cell_more_than_deleting_any_other_gene():
    adata = simulate_cells(150, 80, regulators=3, targets=5, programme_size=10)
    design = module.Design(**{**adata.uns["truth"]["parameters"], "cell_types": ("type1", "type2", "type3")})
    genes, by_type = module.simulate_genes(design)
    obs, _ = module.simulate_obs(design)
    rates, case = module.draw_rates(design, genes, by_type, obs), cases(adata)
    before, moved = module.case_log_odds(design, genes, rates, adata.X), []
    for gene in range(adata.n_vars):
        counts = adata.X.multiply(np.arange(adata.n_vars) != gene).tocsr()
        moved.append((module.case_log_odds(design, genes, rates, counts) - before)[case].mean())
    moved, regulator = np.array(moved), adata.var["is_regulator"].to_numpy()
    assert moved[regulator].max() < 3 * moved[~regulator].min() < 0
    assert (moved[(adata.var["programme"] != "case").to_numpy()] == 0).all()


def batch_distance(**options):
    adata = simulate_cells(900, 200, donors=6, batches=2, donor_sd=0.0, depth_sd=0.1, **options)
    values, first = normalised(adata), (adata.obs["batch"] == "batch1").to_numpy()
    gap = values[first].mean(axis=0) - values[~first].mean(axis=0)
    return float(np.sqrt(np.square(gap).mean())), adata


def test_batch_effects_are_of_the_type_asked_for_and_absent_by_default():
    none, plain = batch_distance()
    assert (plain.varm["batch_effect"] == 0).all() and (plain.uns["truth"]["batch_scale"] == 1).all()
    assert (plain.uns["truth"]["batch_shift"] == 0).all()
    own, adata = batch_distance(batch_gene_sd=0.5)
    assert own > 4 * none and adata.varm["batch_effect"].std() == pytest.approx(0.5, rel=0.15)
    _, adata = batch_distance(batch_scale_sd=0.7)
    depth = adata.obs.groupby("batch", observed=True)["n_counts"].mean()
    scale = adata.uns["truth"]["batch_scale"]
    assert depth["batch1"] / depth["batch2"] == pytest.approx(scale[0] / scale[1], rel=0.1)
    _, adata = batch_distance(batch_shift=0.5)
    extra = adata.uns["truth"]["batch_shift"] * adata.n_vars
    depth = (
        adata.obs.groupby("batch", observed=True)["n_counts"].mean()
        - plain.obs.groupby("batch", observed=True)["n_counts"].mean()
    )
    assert depth.to_numpy() == pytest.approx(extra, rel=0.15)


def test_donors_differ_as_much_as_asked_for():
    adata = simulate_cells(6000, 150, donors=3, cell_types=1, programme_size=0, donor_sd=0.3, case_fraction=0.0)
    counts, abundant = adata.X.toarray(), (adata.var["mean_expression"] > 5).to_numpy()
    for number in range(3):
        one, other = ((adata.obs["donor"] == f"donor{d + 1}").to_numpy() for d in (number, (number + 1) % 3))
        seen = np.log(counts[one].mean(axis=0) / counts[other].mean(axis=0))
        told = adata.varm["donor_effect"][:, number] - adata.varm["donor_effect"][:, (number + 1) % 3]
        assert seen[abundant] == pytest.approx(told[abundant], abs=0.12)


def test_ten_million_counts_take_seconds(yardstick):
    start = time.process_time()
    simulate_cells(10_000, 1_000, batches=3, batch_gene_sd=0.2)
    assert time.process_time() - start < 25 * yardstick


@pytest.mark.parametrize(
    "options,words",
    [
        ({"n_genes": 50}, ["n_genes=50", "115", "raise n_genes"]),
        ({"n_cells": 0}, ["n_cells=0"]),
        ({"donors": 2, "batches": 3}, ["batches=3", "donors=2"]),
        ({"case_fraction": 1.5}, ["case_fraction=1.5", "between 0 and 1"]),
        ({"penetrance": float("nan")}, ["penetrance=nan"]),
        ({"donor_sd": -1}, ["donor_sd=-1", "not be negative"]),
        ({"depth": 0}, ["depth=0"]),
        ({"cell_types": ["T", "T"]}, ["cell_types=", "once"]),
        ({"cell_types": 0}, ["cell_types=0"]),
        ({"paired": False, "donors": 1}, ["donors=1", "one state only"]),
    ],
)
def test_numbers_that_make_no_cells_are_refused(options, words):
    with pytest.raises(OptionError) as caught:
        simulate_cells(**options)
    for word in words:
        assert word in str(caught.value)


def test_a_single_state_is_possible_and_certain():
    adata = simulate_cells(100, 150, case_fraction=0)
    assert (adata.obs["ceiling_probability"] == 0).all() and adata.uns["truth"]["ceiling"]["accuracy"] == 1
    assert np.isnan(adata.uns["truth"]["ceiling"]["auroc"])
