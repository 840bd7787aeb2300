"""Predicted effects against labels, beside distance and allele frequency alone."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data import simulate_genome
from scellfm.rosa import matched_by_distance, score_variants, tss_windows, variant_effect
from scellfm.rosa.labelled import CAVEAT


@pytest.fixture(scope="module")
def simulation():
    return simulate_genome(n_genes=40, n_cells=1, seed=5)


@pytest.fixture(scope="module")
def table(simulation):
    return simulation.variants(300, seed=5)


def test_scores_are_those_of_sklearn_and_signs_are_counted(table):
    effect = table["effect"].to_numpy() + np.random.default_rng(0).normal(0, 0.2, 300)
    found = score_variants(table, effect, n_boot=0).table.loc["model"]
    positive = table["label"] != 0
    assert np.isclose(found["auroc"], roc_auc_score(positive, np.abs(effect)))
    assert np.isclose(found["auprc"], average_precision_score(positive, np.abs(effect)))
    assert np.isclose(found["sign_accuracy"], (np.sign(effect) == table["label"])[positive].mean())
    matched = matched_by_distance(table["tss_distance"].abs().to_numpy(), positive.to_numpy())
    assert np.isclose(found["matched_auroc"], roc_auc_score(positive[matched], np.abs(effect[matched])))


def test_distance_that_explains_the_labels_is_of_no_use_once_it_is_matched():
    random = np.random.default_rng(0)
    positive = np.arange(2000) < 150
    distance = np.where(positive, random.gamma(1, 200, 2000), random.gamma(1, 20_000, 2000)).round()
    distance[1000:1400] = random.choice(distance[positive], 400)  # near ones without effect
    table = pd.DataFrame({"chrom": "1", "pos": np.arange(2000) + 1, "ref": "A", "alt": "C", "label": positive * 1})
    table = table.assign(tss_distance=distance, near=1 / (1 + distance), real=positive + random.normal(0, 1, 2000))
    found = score_variants(table, {"near": "near", "real": "real"}, controls=2, n_boot=50).table
    assert found.loc["near", "auroc"] > 0.8 and abs(found.loc["near", "matched_auroc"] - 0.5) < 0.07
    assert found.loc["real", "matched_auroc"] > 0.6
    assert np.isclose(found.loc["distance alone", "auroc"], found.loc["near", "auroc"])
    assert found.loc["one answer for all", "auroc"] == 0.5
    assert np.isclose(found.loc["one answer for all", "auprc"], 150 / 2000)
    assert found["sign_accuracy"].isna().all()  # labels without direction


def test_matched_controls_are_the_nearest_and_used_once():
    distance = np.array([100.0, 5, 110, 90, 1e6, 6, 95])
    positive = np.array([True, True, False, False, False, False, False])
    assert matched_by_distance(distance, positive, 2).sum() == 6
    kept = matched_by_distance(distance, positive, 1)
    assert kept.tolist() == [True, True, False, False, False, True, True]
    assert matched_by_distance(distance, positive, 9).sum() <= 7


def test_the_order_of_rows_and_the_spelling_of_chromosomes_change_nothing(simulation, table, tmp_path):
    from rosa_models import lively

    paths = simulation.write(tmp_path)
    windows = tss_windows(paths["annotation"], paths["fasta"], length=512)
    model = lively(dim=48, dim_divisible_by=6)
    table = table.groupby("label").head(15)
    effects = variant_effect(table, model=model, windows=windows, strands="forward")
    first = score_variants(table, effects, n_boot=0)
    other = table.sample(frac=1, random_state=0).assign(chrom=lambda t: t["chrom"].str.removeprefix("chr"))
    second = score_variants(other, effects, n_boot=0)
    columns = ["sign_accuracy", "auroc", "auprc"]
    assert np.allclose(first.table.loc["model", columns], second.table.loc["model", columns])


def test_intervals_draw_whole_groups(table):
    grouped = score_variants(table, "effect", n_boot=100, seed=1)
    assert (grouped.low.loc["model"] <= grouped.table.loc["model"]).all()
    again = score_variants(table, "effect", n_boot=100, seed=1)
    assert grouped.low.equals(again.low)
    single = score_variants(table.assign(group="one"), "effect", n_boot=100)
    assert single.low.isna().all(axis=None)


def test_the_caveat_and_the_counts_are_with_the_scores(table):
    with pytest.warns(ScellfmWarning, match="1 of 300"):
        scores = score_variants(table, table["effect"].where(table.index != 3), n_boot=0)
    assert scores.origin["caveat"] == CAVEAT and scores.origin["without_prediction"] == 1
    assert scores.origin["variants"] == 299


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop(columns="label"), "no column label"),
        (lambda t: t.assign(label=1), "both are needed"),
        (lambda t: t.assign(label=0), "both are needed"),
        (lambda t: t.assign(label="yes"), "label='yes'"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "twice"),
        (lambda t: t.assign(allele_frequency=2.0), "allele_frequency='2"),
        (lambda t: t.assign(tss_distance="near"), "tss_distance"),
        (lambda t: t.drop(columns="ref"), "no column ref"),
    ],
)
def test_tables_that_cannot_be_scored_are_named(table, change, message):
    with pytest.raises(DataError, match=message):
        score_variants(change(table), np.zeros(300 if "twice" not in message else 301), n_boot=0)


def test_effects_that_do_not_fit_are_named(table):
    with pytest.raises(DataError, match="shape"):
        score_variants(table, np.zeros(3))
    with pytest.raises(OptionError, match="no column"):
        score_variants(table, "nothing")
    with pytest.raises(DataError, match="both kinds"), pytest.warns(ScellfmWarning):
        score_variants(table, np.full(300, np.nan))


def test_a_variant_without_a_group_is_refused_and_counted(table):
    groups = np.resize(np.array(["a", "b", None], dtype=object), len(table))
    with pytest.raises(DataError, match=f"{sum(group is None for group in groups)} variants have no group"):
        score_variants(table.assign(group=groups), "effect", n_boot=10)
