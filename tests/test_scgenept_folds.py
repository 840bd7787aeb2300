"""Folds of perturbations, scores over folds, published labels, and controls that are halved with the cells."""

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import golden, real_data
from scipy import sparse

import scellfm as sf
from scellfm import DataError, OptionError
from scellfm.data import simulate_perturbations
from scellfm.scgenept import PerturbationData, perturbation_baselines, perturbation_folds

LABELS = ["ctrl", *(f"G{i}+ctrl" for i in range(12)), "ctrl+G3", *(f"G{i}+G{i + 1}" for i in range(0, 12, 2))]
quiet = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")


@pytest.mark.parametrize("by", ["gene", "perturbation"])
def test_every_perturbation_is_tested_once_and_in_one_place(by):
    folds = perturbation_folds(LABELS, 4, by=by, seed=2)
    assert sorted(label for fold in folds for label in fold.test) == sorted(LABELS[1:])
    for fold in folds:
        assert sorted([*fold.train, *fold.test, *fold.held_out]) == sorted(LABELS)
        assert not set(fold.perturbations("train")) & set(fold.perturbations("test"))
    turned = perturbation_folds(LABELS[::-1], 4, by=by, seed=2)
    assert [set(fold.test) for fold in folds] == [set(fold.test) for fold in turned]
    assert [fold.test for fold in folds] != [fold.test for fold in perturbation_folds(LABELS, 4, by=by, seed=3)]


def test_a_single_of_a_fold_by_genes_has_its_gene_in_no_training_perturbation():
    for fold in perturbation_folds(LABELS, 4, seed=2):
        singles = [name for name in fold.perturbations("test") if "+" not in name]
        assert not set(singles) & set(fold.genes("train"))


def test_wrong_folds_are_refused():
    with pytest.raises(DataError, match="k=13 folds"):
        perturbation_folds(LABELS, 13)
    with pytest.raises(OptionError, match="k=1"):
        perturbation_folds(LABELS, 1)
    with pytest.raises(OptionError, match="by='cell'"):
        perturbation_folds(LABELS, 3, by="cell")


@pytest.fixture(scope="module")
def simulation():
    return simulate_perturbations(n_targets=20, n_pairs=0, n_genes=60, n_cells=30, n_controls=100, seed=1)


def test_folds_are_the_splits_one_after_the_other(simulation):
    data = PerturbationData(simulation.adata)
    folds = data.folds(4, seed=1)
    together = perturbation_baselines(data, folds, vectors=simulation.vectors["know"], baselines="all")
    for fold in folds:
        alone = perturbation_baselines(data, fold, vectors=simulation.vectors["know"], baselines="all")
        for name, table in alone.items():
            np.testing.assert_array_equal(together[name].loc[table.index], table)
    scores = sf.scores.perturbation(data, together, train=folds, metrics="all")
    whole = scores.values("mse")["training mean"]
    for fold in folds:
        single = sf.scores.perturbation(data, {"m": together["no change"].loc[fold.perturbations()]}, train=fold)
        expected = single.values("mse")["training mean"]
        np.testing.assert_allclose(whole[expected.index], expected)
    assert "training mean of each of 4 folds" in scores.title
    # the row that the scores make and the baseline are one and the same prediction
    truth = data.means().loc[folds[0].perturbations("train")].mean()
    np.testing.assert_allclose(together["training mean"].loc[folds[0].perturbations()[0]], truth, atol=1e-6)


def test_a_prediction_that_no_fold_tests_is_refused(simulation):
    data = PerturbationData(simulation.adata)
    folds = data.folds(4)
    with pytest.raises(DataError, match="tested by no fold"):
        sf.scores.perturbation(data, simulation.means.loc[simulation.singles], train=folds[:3])


@quiet
def test_published_labels_are_scored_as_published_and_once_per_perturbation():
    labels = json.loads((golden("scgenept") / "splits" / "conditions.json").read_text())["norman_real"]
    draw = np.random.default_rng(0)
    values = sparse.csr_matrix(draw.gamma(2.0, 0.3, (4 * len(labels), 15)))
    obs = pd.DataFrame({"condition": np.repeat(labels, 4)}, index=[f"c{i}" for i in range(values.shape[0])])
    data = PerturbationData(AnnData(values, obs, pd.DataFrame(index=[f"M{i}" for i in range(15)])))
    split = data.split("simulation", seed=1)
    found = perturbation_baselines(data, split, baselines=["cell-weighted mean", "no change"])
    counts = {}
    for original in (True, False):
        scores = sf.scores.perturbation(data, found, train=split, original=original)
        members = scores.origin["subgroups"]["unseen_single"]
        counts[original] = len(members)
        assert scores.values("mse").loc[members].notna().all().all()
    assert counts == {True: 37, False: 27}
    both = sf.scores.perturbation(data, found, train=split, original=True).values("mse")["cell-weighted mean"]
    twins = [label for label in both.index if label.startswith("ctrl+") and f"{label[5:]}+ctrl" in both.index]
    assert twins and all(both[label] != both[f"{label[5:]}+ctrl"] for label in twins)  # each against its own cells


def noise(n_controls, seed):
    "Perturbations that do nothing at all: every cell is a control."
    draw = np.random.default_rng(seed)
    labels = [f"P{i}" for i in range(12)]
    names = np.repeat([*labels, "ctrl"], [60] * 12 + [n_controls])
    values = sparse.csr_matrix(draw.normal(2, 0.5, (len(names), 1500)))
    obs = pd.DataFrame({"condition": names}, index=[f"c{i}" for i in range(len(names))])
    return AnnData(values, obs, pd.DataFrame(index=[f"M{i}" for i in range(1500)])), labels


def test_noise_of_shared_controls_does_not_make_a_duplicate_look_good():
    adata, labels = noise(40, 3)
    table = pd.DataFrame(2.0, labels, adata.var_names) + np.random.default_rng(1).normal(0, 0.01, (12, 1500))
    scores = sf.scores.perturbation(adata, table, train=labels, metrics="all")
    duplicate = scores.table.loc["technical duplicate (ceiling)"]
    assert abs(duplicate["pearson_delta"]) < 0.1  # with one set of controls it is about 0.4
    control = np.asarray(adata.X[(adata.obs["condition"] == "ctrl").to_numpy()].mean(0)).ravel()
    halves = [np.asarray(adata.X[(adata.obs["condition"] == "P0").to_numpy()][h::2].mean(0)).ravel() for h in (0, 1)]
    assert np.corrcoef(halves[0] - control, halves[1] - control)[0, 1] > 0.25
    assert scores.dynamic_range.loc["pearson_delta", "dynamic range"] < 0.1


@quiet
def test_real_targets_are_predicted_in_folds():
    adata = sf.data.read(real_data("papalexi21") / "papalexi21_lowmoi.h5ad")
    data = PerturbationData(adata, condition="top_target", control="non-targeting", normalize=True)
    vectors = sf.data.read_vectors(real_data("gene2vec") / "gene2vec_200d.npy")
    folds = data.folds(5)
    found = perturbation_baselines(data, folds, vectors=vectors)
    counts = found.counts()
    assert counts["training mean"] == 25 and counts["ridge on vectors"] == counts["ridge on permuted vectors"] >= 23
    scores = sf.scores.perturbation(data, found, train=folds)
    assert scores.table.loc["training mean", "share"] == pytest.approx(0)
    assert scores.table.loc["technical duplicate (ceiling)", "wmse"] < scores.table.loc["training mean", "wmse"]
