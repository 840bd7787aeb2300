"""Scores of sequence models: the original's numbers, what is undefined, and intervals that hold what they should."""

import numpy as np
import pytest
from conftest import golden
from scipy import stats

from scellfm import DataError, OptionError
from scellfm.scores.sequence import (
    METRICS,
    ExpressionScorer,
    GridScores,
    bin_confusion,
    correlations,
    expression_scores,
)

FOLDER = golden("rosa")


def test_correlations_and_confusion_of_the_original():
    data = np.load(FOLDER / "scores.npz")
    predicted, target = data["predicted"], data["target"]
    for name, metric in (("obs", "spearman_across_genes"), ("var", "spearman_across_cells")):
        ours = correlations(predicted, target, metric)
        constant = np.ptp(target, axis=1 if name == "obs" else 0) == 0
        assert np.isnan(ours[constant]).all()  # nothing to predict; the original has 0
        np.testing.assert_allclose(np.nan_to_num(ours), data[f"spearman_{name}"], atol=1e-5)
        np.testing.assert_allclose(np.nan_to_num(ours).mean(), data[f"spearman_{name}_mean"], atol=1e-5)
    n_bins = len(data["confusion_matrix"])
    assert (bin_confusion(target, predicted, n_bins) == data["confusion_matrix"]).all()


def test_correlations_are_those_of_scipy():
    draws = np.random.default_rng(0)
    measured = draws.normal(size=(8, 20))
    predicted = measured + draws.normal(size=(8, 20))
    first = stats.pearsonr(predicted[3], measured[3]).statistic
    assert np.isclose(correlations(predicted, measured, "pearson_across_genes")[3], first)
    second = stats.spearmanr(predicted[:, 5], measured[:, 5]).statistic
    assert np.isclose(correlations(predicted, measured, "spearman_across_cells")[5], second)
    centred = [t - t.mean(0) - t.mean(1, keepdims=True) + t.mean() for t in (predicted, measured)]
    third = stats.pearsonr(centred[0][:, 2], centred[1][:, 2]).statistic
    assert np.isclose(correlations(predicted, measured, "pearson_across_cells_centred")[2], third)


def test_means_of_genes_and_cells_score_nothing_when_centred():
    draws = np.random.default_rng(1)
    measured = draws.normal(size=(12, 40))
    additive = (draws.normal(size=(12, 1)) + draws.normal(size=40)).astype(np.float32)
    for metric in METRICS:
        if metric.endswith("_centred"):
            assert (correlations(additive, measured, metric) == 0).all()


def test_a_random_prediction_has_zero_in_its_interval_and_a_good_one_has_not():
    draws = np.random.default_rng(2)
    measured = draws.normal(size=(30, 200))
    predictions = {
        "random": draws.normal(size=(30, 200)),
        "good": measured + draws.normal(size=(30, 200)),
        "none": None,
    }
    donors = np.repeat(list("abcdef"), 5)
    scores = expression_scores(predictions, measured, donors=donors)
    for metric in METRICS:
        assert scores.low.loc["random", metric] < 0.02 and scores.high.loc["random", metric] > -0.02
        assert scores.low.loc["good", metric] > 0.4
        low, high = scores.details["good"]["over_donors"][metric]
        assert low < scores.table.loc["good", metric] + 0.05 and high > scores.table.loc["good", metric] - 0.05
    assert scores.table.loc["none"].isna().all()
    two = expression_scores({"good": measured}, measured, donors=["a"] * 15 + ["b"] * 15, n_draws=5)
    assert np.isnan(two.details["good"]["over_donors"]["pearson_across_genes"]).all()
    again = GridScores.from_dict(GridScores({"q": scores}).to_dict())
    assert again["q"].low.equals(scores.low)


def test_the_interval_of_a_repeated_method_holds_what_a_repeat_scores():
    draws = np.random.default_rng(3)
    profile = draws.normal(size=(20, 1))  # of all genes: they say the same of one permutation
    measured = profile + 0.3 * draws.normal(size=(20, 80))
    repeats = [draws.normal(size=(20, 1)) + 0.3 * draws.normal(size=(20, 80)) for _ in range(60)]
    metric = "pearson_across_cells"
    one = [expression_scores({"m": table}, measured, metrics=[metric]) for table in repeats]
    means = np.array([scores.table.loc["m", metric] for scores in one])
    outside = np.mean([not scores.low.loc["m", metric] < 0 < scores.high.loc["m", metric] for scores in one])
    scorer = ExpressionScorer(measured, metrics=[metric])
    for number, table in enumerate(repeats[:40]):
        scorer.add("m", table, number, 40)
    found = scorer.scores()
    low, high = found.low.loc["m", metric], found.high.loc["m", metric]
    assert found.table.loc["m", metric] == pytest.approx(means[:40].mean())
    assert low < 0 < high and ((means[40:] > low) & (means[40:] < high)).mean() > 0.85
    assert outside > 0.5  # one permutation by itself is sure of what is an accident
    assert found.details["m"]["by_gene"].shape == (80, 1) and found.details["m"]["n"][metric] == 80


def test_a_repeat_of_one_is_the_prediction_itself():
    draws = np.random.default_rng(4)
    measured, predicted = draws.normal(size=(2, 12, 30))
    scorer = ExpressionScorer(measured)
    scorer.add("m", predicted)
    scorer.add("none", None)
    whole = expression_scores({"m": predicted, "none": None}, measured)
    for name in ("table", "low", "high"):
        assert getattr(scorer.scores(), name).equals(getattr(whole, name))


def test_bad_tables_are_refused():
    good = np.random.default_rng(0).normal(size=(4, 6))
    bad = good.copy()
    bad[0, 0] = np.nan
    for predictions, measured in (({"m": bad}, good), ({"m": good}, bad), ({"m": good[:, :3]}, good)):
        with pytest.raises(DataError, match="shape"):
            expression_scores(predictions, measured)
    with pytest.raises(OptionError, match="metric"):
        correlations(good, good, "pearson")


def test_a_missing_donor_is_no_donor():
    draws = np.random.default_rng(0)
    measured = draws.normal(size=(9, 12))
    predicted = {"model": measured + draws.normal(size=measured.shape)}
    two = expression_scores(predicted, measured, donors=["a", "b", None] * 3)
    assert all(np.isnan(bounds).all() for bounds in two.details["model"]["over_donors"].values())
    three = expression_scores(predicted, measured, donors=["a", "b", "c", "a", "b", "c", None, np.nan, "a"])
    rows = [0, 1, 2, 3, 4, 5, 8]
    known = expression_scores({"model": predicted["model"][rows]}, measured[rows], donors=list("abcabca"))
    metric = "pearson_across_genes"
    assert three.details["model"]["over_donors"][metric] == known.details["model"]["over_donors"][metric]
