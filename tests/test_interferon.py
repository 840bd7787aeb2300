"""The screen of real interferon-stimulated cells, small: structure and honesty, not a good score.

A panel of genes instead of all keeps the cells short, so that every stimulated CD4 T cell can be screened in seconds.
Of the other cells, each donor gives a few.
"""

import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import real_data

from scellfm.core import ScellfmWarning
from scellfm.crossfit import membership
from scellfm.data.genes import gene_ids
from scellfm.data.reading import check_counts, read
from scellfm.data.splits import folds
from scellfm.geneformer import Geneformer, RankTokenizer
from scellfm.geneformer.finetuning.evaluation import HELD_OUT, TRAINED

CD4, MONOCYTES = "CD4 T cells", "CD14+ Monocytes"
TESTABLE = ["JAK1", "STAT1", "IRF7", "IRF9"]
TOO_RARE = ["TYK2", "STAT2", "IFNAR1", "IFNAR2"]
RESPONSE = ["ISG15", "IFI6", "MX1", "OAS1", "IFIT1", "IFIT3", "SOCS1", "IRF1", "STAT3", "IFIH1"]


@pytest.fixture(scope="module")
def adata():
    cells = read(real_data("kang18/kang18_2000.h5ad"))
    cells = cells[cells.obs["cell_type_derived"].isin([CD4, MONOCYTES])].copy()
    detected = np.asarray((cells.X > 0).mean(0)).ravel()
    panel = np.flatnonzero((detected > 0.1) & (gene_ids(cells) != ""))[::6]
    wanted = np.flatnonzero(cells.var_names.isin([*TESTABLE, *TOO_RARE, *RESPONSE]))
    kind = cells.obs[["cell_type_derived", "condition", "donor"]].astype(str)
    screened = (kind["cell_type_derived"] == CD4) & (kind["condition"] == "stim")
    kept = screened | (kind.groupby(list(kind)).cumcount() < 10)
    cells = cells[kept.to_numpy(), np.union1d(panel, wanted)]
    return cells[np.asarray((cells.X > 0).sum(1)).ravel() >= 5].copy()  # of a shorter cell no gene can be deleted


@pytest.fixture(scope="module")
def split(adata):
    return folds(adata, by="donor", k=4, stratify="condition")


@pytest.fixture(scope="module")
def clf(adata, split):
    gf = Geneformer.from_config("tiny", RankTokenizer.fit(adata, max_length=128), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)  # one short epoch: a poor model, and it says so
        gf.pretrain(adata, epochs=1, learning_rate=3e-3)
        return gf.finetune(adata, label="condition", split=split, epochs=1, learning_rate=2e-3, n_boot=20)


@pytest.fixture(scope="module")
def screen(clf, adata):
    return clf.perturb(
        adata,
        kind="delete",
        genes="all",
        state="condition",
        start="stim",
        goal="ctrl",
        groupby="cell_type_derived",
        donor="donor",
    )


def symbols(screen, names):
    return screen.genes.drop_duplicates("symbol").set_index("symbol")["gene"].reindex(names)


def test_the_counts_are_counts(adata):
    check_counts(adata)
    assert adata.obs["donor"].nunique() == 8


def test_scores_are_held_out_by_donor_with_baselines_beside(clf, adata):
    table = clf.scores.table
    assert list(table.index[:2]) == [HELD_OUT, TRAINED]
    assert {"PCA + logistic regression", "PCA + kNN", "majority class"} <= set(table.index)
    assert clf.settings["held_out_by"] == "donor"
    assert table.loc["PCA + logistic regression", "balanced_accuracy"] > 0.9  # the response is plain to see
    assert len(clf.scores.details[HELD_OUT].truth) == adata.n_obs  # every cell was judged once


def test_every_donor_is_screened_by_a_model_that_did_not_see_it(clf, adata, screen, split):
    assert (clf.trained_on.fold_of(adata.obs_names) != membership.TRAINED).all()
    reader = screen.shifts.groupby("donor")["model"].unique()
    assert set(reader.index) == set(adata.obs["donor"].astype(str)) and (reader.map(len) == 1).all()
    for donor, (model,) in reader.items():
        trained_on = adata.obs["donor"].astype(str).to_numpy()[split.folds()[model].train]
        assert donor not in trained_on


def test_only_stimulated_cells_are_edited_and_each_within_its_type(adata, screen):
    edited = screen.shifts.drop_duplicates("cell").set_index("cell")
    obs = adata.obs.loc[edited.index]
    assert (obs["condition"] == "stim").all()
    assert (edited["group"] == obs["cell_type_derived"].astype(str)).all()
    assert set(screen.groups) == {CD4, MONOCYTES}
    assert len(edited) == (adata.obs["condition"] == "stim").sum()


def test_the_pathway_genes_that_enough_cells_have_are_tested_and_the_others_named(screen):
    table = screen.table(group=CD4).set_index("symbol")
    assert (table.loc[TESTABLE, "status"] == "tested").all() and table.loc[TESTABLE, "p"].between(0, 1).all()
    assert table.loc[TESTABLE, "n_donors"].ge(3).all()
    assert (table.loc[TOO_RARE, "status"] == "too few cells").all() and table.loc[TOO_RARE, "p"].isna().all()
    for symbol, gene in symbols(screen, TESTABLE + TOO_RARE).items():  # counted again, from the shifts themselves
        rows = screen.shifts[(screen.shifts["group"] == CD4) & (screen.shifts["gene"] == gene)]
        assert (rows["donor"].value_counts() >= 10).sum() == table.loc[symbol, "n_donors"]
        assert len(rows) == table.loc[symbol, "n_cells"]


def test_the_fold_change_stands_beside_each_gene(screen):
    table = screen.table(group=CD4).set_index("symbol")
    assert table["log2fc"].notna().all()
    assert table.loc["ISG15", "log2fc"] < -2  # towards control: interferon-induced genes fall
    assert table["log2fc"].abs().rank(pct=True)["ISG15"] > 0.95


def test_known_targets_are_ranked_beside_the_rankings_that_cost_nothing(screen):
    found = screen.recover([*TESTABLE, *TOO_RARE, "IRF1", "SOCS1", "STAT3", "IFIH1"], group=CD4, n_boot=100)
    assert list(found.index) == ["screen |z|", "|log2FC|", "expression", "rank"]
    metrics = ["auroc", "average_precision"]
    with_interval = {m + b for m in metrics for b in ("", "_low", "_high")}
    recalls = {f"recall_at_{kind}{share}" for kind in ("", "fdr_") for share in (0.05, 0.1, 0.2)}
    assert set(found) == with_interval | recalls | {"median_percentile", "n_known", "n_genes"}
    assert (found["n_known"] == len(found.attrs["percentiles"])).all() and found["n_known"].iloc[0] >= 5
    assert found[metrics].notna().all(axis=None) and found[metrics].apply(lambda c: c.between(0, 1)).all(axis=None)
    missing = symbols(screen, TOO_RARE)
    assert {found.attrs["not_testable"][gene] for gene in missing} == {"too few cells"}
    assert set(symbols(screen, TESTABLE)) <= set(found.attrs["percentiles"])


def test_four_targets_are_an_anecdote_and_get_no_score(screen):
    few = screen.recover(TESTABLE, group=CD4)
    assert few[["auroc", "average_precision"]].isna().all(axis=None) and few["median_percentile"].notna().all()
    assert "percentiles only" in few.attrs["note"]


def test_without_three_donors_no_p_is_computed(clf, adata):
    two = adata[adata.obs["donor"].astype(str).isin(["1015", "1488"])].copy()
    small = clf.perturb(
        two,
        kind="delete",
        genes="all",
        state="condition",
        start="stim",
        goal="ctrl",
        groupby="cell_type_derived",
        donor="donor",
        max_cells=16,
    )
    table = small.table(group=CD4)
    assert table.attrs["exploratory"] and table["p"].isna().all() and table["fdr"].isna().all()
    assert table["status"].str.startswith("exploratory").any() and table["percentile"].notna().any()


def test_the_originals_test_stands_beside_and_calls_more(screen):
    ours, theirs = screen.table(group=CD4), screen.table(method="goal_state_shift", group=CD4)
    assert set(ours["gene"]) == set(theirs["gene"])
    assert (theirs["fdr"] < 0.05).sum() > (ours["fdr"] < 0.05).sum()


def test_the_same_cells_in_another_order_give_the_same_screen(clf, adata):
    ask = dict(
        kind="delete",
        genes="all",
        state="condition",
        start="stim",
        goal="ctrl",
        groupby="cell_type_derived",
        donor="donor",
        max_cells=12,
    )
    key = ["group", "cell", "gene"]
    one, other = (
        clf.perturb(a, **ask).shifts.sort_values(key).reset_index(drop=True) for a in (adata, adata[::-1].copy())
    )
    assert one[key].equals(other[key])
    assert np.allclose(one["shift"], other["shift"], atol=1e-5)
    assert isinstance(one, pd.DataFrame) and len(one["cell"].unique()) == 24
