"""A group is never on both sides, the fractions are kept, and only names and the seed decide."""

import itertools
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data.splits import Folds, Split, check_leakage, folds, hold_out


def table(n=600, n_donors=8, seed=0, equal=False):
    rng = np.random.default_rng(seed)
    share = np.ones(n_donors) if equal else rng.dirichlet(np.full(n_donors, 3.0))
    donor = rng.choice([f"donor{i}" for i in range(n_donors)], n, p=share / share.sum())
    label = rng.choice(["T cell", "B cell", "NK"], n, p=[0.6, 0.3, 0.1])
    return pd.DataFrame({"donor": donor, "cell_type": label}, index=[f"cell{i}" for i in range(n)])


def parts(split):
    return split.train, split.valid, split.test


def named(split, obs):
    return [set(obs.index[part]) for part in parts(split)]


@pytest.mark.parametrize("by", [None, "donor"])
@pytest.mark.parametrize("stratify", [None, "cell_type"])
def test_parts_are_disjoint_and_hold_all_cells(by, stratify):
    obs = table()
    split = hold_out(obs, by=by, stratify=stratify)
    assert sorted(np.concatenate(parts(split))) == list(range(600))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() and part.size for part in parts(split))
    assert split.by == by and split.n == 600 and split.folds() == [split]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("n_donors", [3, 5, 8, 14, 40])
def test_groups_never_straddle(seed, n_donors):
    obs = table(n_donors=n_donors, seed=seed)
    split = hold_out(obs, by="donor", stratify="cell_type", fractions=(0.6, 0.2, 0.2), seed=seed)
    check_leakage(split, obs["donor"])
    check_leakage(folds(obs, by="donor", k=3, seed=seed), obs["donor"])


@pytest.mark.parametrize("by", [None, "donor"])
@pytest.mark.parametrize("n_donors", [8, 30])
def test_the_order_of_rows_changes_nothing_and_the_seed_does(by, n_donors):
    obs = table(n_donors=n_donors)
    obs["donor"] = [f"donor{i % n_donors}" for i in range(len(obs))]  # of one size: many deals are equally good
    order = np.random.default_rng(1).permutation(len(obs))
    for function in (
        lambda o, seed: named(hold_out(o, by=by, stratify="cell_type", seed=seed), o),
        lambda o, seed: [o.index[f.test].sort_values().tolist() for f in folds(o, by=by, k=3, seed=seed)],
    ):
        assert function(obs, 0) == function(obs.iloc[order], 0)
        assert len({str(sorted(function(obs, seed)[-1])) for seed in range(6)}) > 2


def test_cells_are_dealt_exactly():
    obs = table(1000)
    sizes = [len(part) for part in parts(hold_out(obs))]
    assert sizes == [800, 100, 100]
    split = hold_out(obs, stratify="cell_type", fractions=(0.7, 0.2, 0.1))
    assert [len(part) for part in parts(split)] == [700, 200, 100]
    for label, n in obs["cell_type"].value_counts().items():
        for part, fraction in zip(parts(split), (0.7, 0.2, 0.1)):
            assert abs((obs["cell_type"].iloc[part] == label).sum() - n * fraction) < 2


@pytest.mark.parametrize("seed", range(5))
def test_fractions_are_as_near_as_whole_groups_allow(seed):
    obs, fractions = table(n_donors=6, seed=seed), np.array([0.6, 0.2, 0.2])
    sizes = obs["donor"].value_counts().to_numpy()
    best = min(
        np.abs(np.array([sizes[np.array(deal) == part].sum() for part in range(3)]) / 600 - fractions).max()
        for deal in itertools.product(range(3), repeat=len(sizes))
        if len(set(deal)) == 3
    )
    split = hold_out(obs, by="donor", fractions=fractions, seed=seed)
    error = np.abs(np.array([len(part) for part in parts(split)]) / 600 - fractions).max()
    assert error <= best + 0.01


def test_many_groups_meet_the_fractions():
    obs = table(n=20_000, n_donors=60)
    split = hold_out(obs, by="donor", stratify="cell_type")
    assert np.allclose([len(part) / 20_000 for part in parts(split)], [0.8, 0.1, 0.1], atol=0.02)


def test_stratifying_balances_the_labels_of_groups():
    rng = np.random.default_rng(0)
    obs = table(n=2000, n_donors=10, equal=True)
    heavy = obs["donor"].isin([f"donor{i}" for i in range(5)])
    obs["state"] = np.where(rng.random(2000) < np.where(heavy, 0.9, 0.1), "case", "control")

    def imbalance(stratify, seed):
        split = hold_out(obs, by="donor", fractions=(0.6, 0.2, 0.2), stratify=stratify, seed=seed)
        overall = (obs["state"] == "case").mean()
        return max(abs((obs["state"].iloc[part] == "case").mean() - overall) for part in parts(split))

    assert max(imbalance("state", seed) for seed in range(5)) < 0.15
    assert max(imbalance(None, seed) for seed in range(5)) > 0.25


def test_a_part_can_be_left_out():
    split = hold_out(table(), by="donor", fractions=(0.75, 0, 0.25))
    assert split.valid.size == 0 and split.test.size and split.train.size


@pytest.mark.parametrize("by", [None, "donor"])
def test_every_cell_is_tested_once(by):
    obs = table()
    cross = folds(obs, by=by, k=4, stratify="cell_type")
    assert isinstance(cross, Folds) and len(cross.folds()) == len(cross) == 4
    assert sorted(np.concatenate([fold.test for fold in cross])) == list(range(600))
    for fold in cross:
        assert isinstance(fold, Split) and fold.valid.size == 0
        assert sorted(np.concatenate([fold.train, fold.test])) == list(range(600))


def test_leave_one_donor_out():
    obs = table()
    tested = [set(obs["donor"].iloc[fold.test]) for fold in folds(obs, by="donor", k=8)]
    assert sorted(map(len, tested)) == [1] * 8 and len(set.union(*tested)) == 8


def test_fewer_groups_than_folds_give_fewer_folds_with_a_warning():
    with pytest.warns(ScellfmWarning, match="k=10.*8 groups"):
        assert len(folds(table(), by="donor", k=10)) == 8
    with pytest.raises(DataError, match="'donor'.* 1 group"):
        folds(table(n_donors=1), by="donor", k=3)


def test_anndata_and_categories_and_numbers_are_taken():
    obs = table()
    obs["donor"], obs["age"] = obs["donor"].astype("category"), np.arange(600) % 7
    adata = anndata.AnnData(np.zeros((600, 1), dtype=np.float32), obs=obs)
    assert named(hold_out(adata, by="donor"), obs) == named(hold_out(obs, by="donor"), obs)
    check_leakage(hold_out(adata, by="age"), adata.obs["age"])


def test_the_input_is_not_changed():
    obs = table()
    before = obs.copy()
    hold_out(obs, by="donor", stratify="cell_type"), folds(obs, stratify="cell_type")
    pd.testing.assert_frame_equal(obs, before)


def test_a_split_shows_what_its_parts_hold():
    obs = table()
    split = hold_out(obs, by="donor", stratify="cell_type")
    assert split.table["cells"].tolist() == [len(part) for part in parts(split)]
    assert split.table.loc["test", "NK"] == (obs["cell_type"].iloc[split.test] == "NK").sum()
    assert split.table["donor"].sum() == 8
    html = split._repr_html_()
    assert "donor" in html and "T cell" in html and str(len(split.train)) in html
    html = folds(obs, by="donor", k=4, stratify="cell_type")._repr_html_()
    assert "fold 3" in html and "B cell" in html


# --- bad inputs


def refused(error, *words, function=hold_out, obs=None, **options):
    with pytest.raises(error) as caught:
        function(table() if obs is None else obs, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (0.8, 0.1, 0.1 + 1e-8)])
def test_fractions_that_do_not_sum_to_one_are_refused(fractions):
    refused(OptionError, str(fractions), "sum to", "(.8, .1, .1)", fractions=fractions)


def test_fractions_with_rounding_noise_are_taken():
    hold_out(table(), fractions=(0.7, 0.2, 0.1))
    hold_out(table(), fractions=(0.8, 0.1, 0.1 + 1e-12))


@pytest.mark.parametrize("fractions", [(0.8, 0.2), (1.2, -0.1, -0.1), (0, 0.5, 0.5), (np.nan, 0.5, 0.5), "abc", 0.8])
def test_fractions_that_are_no_fractions_are_refused(fractions):
    refused(OptionError, "fractions=", "three numbers", fractions=fractions)


def test_a_missing_column_is_refused_with_near_names():
    for function in (hold_out, folds):
        refused(DataError, "by='doner'", "Did you mean 'donor'", function=function, by="doner")
        refused(DataError, "stratify='celltype'", "Did you mean 'cell_type'", function=function, stratify="celltype")
    refused(DataError, "['donor', 'cell_type']", by="xyz")


def test_missing_labels_and_groups_are_counted_and_refused():
    obs = table()
    obs.loc[obs.index[[5, 9]], ["donor", "cell_type"]] = None
    for column in ({"by": "donor"}, {"stratify": "cell_type"}):
        refused(DataError, "2 of 600", "'cell5'", "notna()", obs=obs, **column)


def test_a_single_class_is_refused():
    obs = table()
    obs["state"] = "case"
    refused(DataError, "'state'", "single class", "'case'", obs=obs, stratify="state")


def test_a_label_with_fewer_cells_than_parts_is_refused_or_warned_of():
    obs = table()
    obs["rare"] = np.where(np.arange(600) < 2, "platelet", "other")
    refused(DataError, "'platelet' has 2 cells for 3 parts", obs=obs, stratify="rare")
    hold_out(obs, stratify="rare", fractions=(0.8, 0, 0.2))
    with pytest.warns(ScellfmWarning, match="platelet.*rare.*donor"):
        hold_out(obs, by="donor", stratify="rare")


def test_fewer_cells_than_parts_are_refused_without_talk_of_labels():
    refused(DataError, "there are 1 cells for 3 parts", "check the filters", obs=table()[:1])
    refused(DataError, "there are 4 cells for 5 parts", obs=table()[:4], function=folds)


def test_two_columns_are_no_column():
    for name in ("by", "stratify"):
        refused(OptionError, f"{name}=['donor', 'cell_type'] must be a text", **{name: ["donor", "cell_type"]})


def test_fewer_groups_than_parts_are_refused():
    refused(DataError, "2 groups (donor0, donor1) for 3 parts", "by=None", obs=table(n_donors=2), by="donor")


def test_cells_of_one_name_are_dealt_by_their_occurrence():
    obs = pd.DataFrame(index=["same"] * 40)
    part = hold_out(obs, fractions=(0.5, 0, 0.5), seed=0)
    assert len(part.train) == len(part.test) == 20
    unique = pd.DataFrame(index=[f"cell{i}" for i in range(40)])
    assert len(hold_out(unique, fractions=(0.5, 0, 0.5), seed=0).train) == 20


def test_too_few_folds_are_refused():
    refused(OptionError, "k=1", function=folds, k=1)
    refused(OptionError, "k=2.5", function=folds, k=2.5)


def test_no_cells_are_refused():
    refused(DataError, "0 cells", obs=table().iloc[:0])
    refused(DataError, "0 cells", obs=table().iloc[:0], function=folds, by="donor")


def test_leaks_are_named():
    obs = table()
    with pytest.raises(DataError, match="group 'donor\\d' is in both train and test"):
        check_leakage(hold_out(obs), obs["donor"])
    with pytest.raises(DataError, match="fold 0: group 'donor\\d' is in both train and test"):
        check_leakage(folds(obs), obs["donor"])
    arange = np.arange
    with pytest.raises(DataError, match="row 4 is in both train and test"):
        check_leakage(Split(arange(5), arange(0), arange(4, 8), None, 8), list("abcdefgh"))
    with pytest.raises(DataError, match="group 'x' is in both valid and test"):
        check_leakage(Split(arange(2), arange(2, 4), arange(4, 6), None, 6), list("abcxxd"))
    with pytest.raises(DataError, match="5 values.*600 cells"):
        check_leakage(hold_out(obs), obs["donor"][:5])
    check_leakage(Split(arange(2), arange(2, 4), arange(4, 6), None, 6), [1, 1, 2, 2, 3, 3])


def test_large_tables_are_dealt_quickly(yardstick):
    import time

    obs = table(n=100_000, n_donors=200)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hold_out(obs, by="donor", stratify="cell_type")
        hold_out(obs, stratify="cell_type")
    assert time.process_time() - start < 15 * yardstick
