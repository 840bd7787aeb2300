"""Scores of a classifier and the table that shows them."""

import json
import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.scores.labels import BINS, calibration_error, classification
from scellfm.scores.table import Scores, plain


def cells(n=400, n_classes=4, seed=0, skill=1.5, decimals=None):
    "Labels, probabilities, classes; rounding makes ties."
    generator = np.random.default_rng(seed)
    classes = np.array([f"type {i}" for i in range(n_classes)])
    truth = generator.choice(n_classes, n, p=np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum())
    logits = generator.normal(size=(n, n_classes)) + skill * np.eye(n_classes)[truth]
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if decimals is not None:
        values = generator.multinomial(10**decimals, values) / 10**decimals
    return classes[truth], values, classes


@pytest.mark.parametrize("n_classes", [2, 3, 7])
@pytest.mark.parametrize("decimals", [None, 1])
def test_scores_equal_scikit_learns(n_classes, decimals):
    truth, values, classes = cells(n_classes=n_classes, decimals=decimals)
    result = classification(truth, values, classes, n_boot=0)
    called = classes[values.argmax(1)]
    auroc = metrics.roc_auc_score(truth, values[:, 1] if n_classes == 2 else values, multi_class="ovr", labels=classes)
    expected = {
        "accuracy": metrics.accuracy_score(truth, called),
        "balanced_accuracy": metrics.balanced_accuracy_score(truth, called),
        "macro_f1": metrics.f1_score(truth, called, average="macro"),
        "auroc": auroc,
    }
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, abs=1e-12), name
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        truth, called, labels=classes, zero_division=0
    )
    for name, value in zip(("precision", "recall", "f1", "support"), (precision, recall, f1, support)):
        assert np.allclose(result.per_class[name], value), name
    for i, label in enumerate(classes):
        assert result.per_class["auroc"].iloc[i] == pytest.approx(
            metrics.roc_auc_score(truth == label, values[:, i]), abs=1e-9
        )
    assert (result.confusion.to_numpy() == metrics.confusion_matrix(truth, called, labels=classes)).all()


def test_calibration_error_is_its_definition():
    truth, values, classes = cells(1000)
    confidence, right = values.max(1), classes[values.argmax(1)] == truth
    expected = 0.0
    for b in range(BINS):
        here = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if here.any():
            expected += here.mean() * abs(confidence[here].mean() - right[here].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected, abs=1e-12)
    assert classification(truth, values, classes, n_boot=0).metrics["calibration_error"] == pytest.approx(
        expected, abs=1e-12
    )


def test_a_class_without_cells_stays_out_of_means():
    truth, values, classes = cells(n_classes=4)
    rows = truth != "type 2"
    result = classification(truth[rows], values[rows], classes, n_boot=20)
    called = classes[values[rows].argmax(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert result.metrics["balanced_accuracy"] == pytest.approx(
            metrics.balanced_accuracy_score(truth[rows], called)
        )
    assert result.metrics["macro_f1"] == pytest.approx(
        metrics.f1_score(truth[rows], called, average="macro", zero_division=0)
    )
    assert np.isnan(result.per_class.loc["type 2", "auroc"]) and result.per_class.loc["type 2", "support"] == 0
    assert np.isfinite(list(result.metrics.values())).all() and np.isfinite(list(result.low.values())).all()


def test_weights_of_a_draw_equal_repeated_cells():
    truth, values, classes = cells(60, 3, decimals=1)
    from scellfm.scores.labels import Weighted

    codes, weights = pd.Index(classes).get_indexer(truth), np.random.default_rng(1).integers(0, 4, 60)
    rows = np.repeat(np.arange(60), weights)
    drawn, repeated = (
        Weighted(codes, values).metrics(weights.astype(float)),
        classification(truth[rows], values[rows], classes, n_boot=0).metrics,
    )
    assert drawn == pytest.approx(repeated, abs=1e-12)


def test_intervals_repeat_and_ignore_the_order_of_rows():
    truth, values, classes = cells(200)
    donor = np.array([f"donor {i}" for i in np.random.default_rng(3).integers(0, 6, 200)])
    order = np.random.default_rng(4).permutation(200)
    for groups, shuffled in ((donor, donor[order]), (None, None)):
        first = classification(truth, values, classes, groups=groups, n_boot=50)
        assert first.low == classification(truth, values, classes, groups=groups, n_boot=50).low
        other = classification(truth[order], values[order], classes, groups=shuffled, n_boot=50)
        assert other.low == pytest.approx(first.low, abs=1e-12) and other.high == pytest.approx(first.high, abs=1e-12)
        assert first.low != classification(truth, values, classes, groups=groups, n_boot=50, seed=1).low
        assert all(first.low[name] <= first.high[name] for name in first.low)


def test_intervals_over_cells_have_the_width_of_the_binomial():
    truth, values, classes = cells(2000, 2)
    result = classification(truth, values, classes, n_boot=500)
    p = result.metrics["accuracy"]
    assert result.high["accuracy"] - result.low["accuracy"] == pytest.approx(
        2 * 1.96 * np.sqrt(p * (1 - p) / 2000), rel=0.15
    )


def test_donors_that_differ_widen_the_interval():
    truth, values, classes = cells(600, 2, skill=3)
    donor = np.arange(600) % 6
    values[donor == 0] = values[donor == 0][:, ::-1]  # one donor called the wrong way round
    by_cell, by_donor = (classification(truth, values, classes, groups=groups) for groups in (None, donor))
    width = [r.high["accuracy"] - r.low["accuracy"] for r in (by_cell, by_donor)]
    assert width[1] > 4 * width[0]


def test_one_donor_has_no_interval_and_says_so():
    truth, values, classes = cells(50)
    with pytest.warns(ScellfmWarning, match="one group"):
        result = classification(truth, values, classes, groups=np.full(50, "d1"))
    assert np.isnan(list(result.low.values())).all() and result.metrics["accuracy"] > 0


BAD = {
    "NaN": (lambda t, v, c: (t, np.where(np.arange(len(v))[:, None] == 3, np.nan, v), c), "row 3"),
    "infinite": (lambda t, v, c: (t, np.where(np.arange(len(v))[:, None] == 3, np.inf, v), c), "inf in row 3"),
    "length": (lambda t, v, c: (t[:-1], v, c), r"\(100, 4\).*99 cells"),
    "columns": (lambda t, v, c: (t, v[:, :3], c), r"\(100, 3\)"),
    "logits": (lambda t, v, c: (t, np.log(v), c), "softmax"),
    "unknown label": (lambda t, v, c: (np.where(np.arange(len(t)) == 0, "plasma", t), v, c), "plasma"),
    "missing label": (lambda t, v, c: (pd.Series(t).where(np.arange(len(t)) != 5), v, c), "row 5"),
    "one class": (lambda t, v, c: (np.full(len(t), "type 1"), v, c), "type 1.*at least two"),
    "repeated class": (lambda t, v, c: (t, v, np.array(["type 1"] * 4)), "different labels"),
    "no cells": (lambda t, v, c: (t[:0], v[:0], c), "at least two"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    change, message = BAD[name]
    with pytest.raises(DataError, match=message):
        classification(*change(*cells(100)))


def test_bad_groups_and_draws_are_named():
    truth, values, classes = cells(100)
    with pytest.raises(DataError, match="99 cells"):
        classification(truth, values, classes, groups=np.zeros(99))
    with pytest.raises(DataError, match="row 7"):
        classification(truth, values, classes, groups=np.where(np.arange(100) == 7, np.nan, 1.0))
    with pytest.raises(OptionError, match="-1"):
        classification(truth, values, classes, n_boot=-1)


def example(**more):
    table = pd.DataFrame(
        {"auroc": [0.8, 0.99, 0.9], "mse": [0.2, 0.001, 0.3]},
        index=["model", "model (training cells)", "PCA | kNN <b>"],
    )
    return Scores(table, **{"low": table - 0.01, "high": table + 0.01, **more})


def test_best_is_small_for_errors_and_never_a_training_score():
    scores = example()
    assert scores.best("auroc") == ["PCA | kNN <b>"] and scores.best("mse") == ["model"]
    assert scores._repr_html_().count("<b>") == 2 and "&lt;b&gt;" in scores._repr_html_()


def test_markdown_has_as_many_cells_in_each_row():
    lines = example().to_markdown().split("\n")
    assert len(lines) == 5 and "**0.900**" in lines[4] and "\\|" in lines[4]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}


def test_scores_come_back_from_json():
    truth, values, classes = cells(100)
    table = example().table.copy()
    table.iloc[0, 0] = np.nan
    scores = Scores(
        table,
        details={"model": classification(truth, values, classes, n_boot=5)},
        title="t",
        origin={"seed": np.int64(3), "path": None},
    )
    again = Scores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
    pd.testing.assert_frame_equal(again.table, scores.table)
    assert again.low.isna().all().all() and again.origin == {"seed": 3, "path": None} and again.title == "t"
    assert again.details["model"]["metrics"]["accuracy"] == scores.details["model"].metrics["accuracy"]
    assert again.to_dict() == scores.to_dict()


def test_bounds_of_other_methods_are_refused():
    with pytest.raises(DataError, match="other"):
        example(low=pd.DataFrame({"auroc": [0.1]}, index=["other"]))


def test_plain_knows_every_kind_of_value():
    values = {
        1: (np.float64("nan"), np.inf, np.bool_(True)),
        "a": {"b", "a"},
        "c": pd.Series([1.5], ["x"]),
        "d": np.array(3),
        "e": pd.NA,
        "f": 1 + 2j,
    }
    assert plain(values) == {
        "1": [None, None, True],
        "a": ["a", "b"],
        "c": {"x": 1.5},
        "d": [3],
        "e": None,
        "f": "(1+2j)",
    }
