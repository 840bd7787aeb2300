"""The test of a screen: what it promises on simulated shifts (criteria a to g, short form), on tables of another
hand, and what bad tables get."""

import json
import re
import subprocess
import sys
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from conftest import ROOT, golden
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data.shifts import simulate_shifts
from scellfm.statistics import (
    bh,
    donor_t_test,
    log2_fold_change,
    rank_sum_test,
    realised_fdr,
    recall_at_budget,
    recall_at_fdr,
    recovery,
    screen_test,
)
from scellfm.statistics.comparison import POOL
from scellfm.statistics.screen import COLUMNS, MIN_CELLS, WINDOW, matched_residuals
from scellfm.statistics.table import check_shifts, exact_sums
from scellfm.statistics.targets import ranking_scores


def quiet_test(shifts):
    "screen_test without its warnings, and whether it warned of heavy tails."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = screen_test(shifts)
    return table, any("heavy tails" in str(w.message) for w in caught)


@cache
def runs(n_seeds, **setting):
    """Per seed: share p < .05, share p < .001, share called, of testable drivers found, of others among the called,
    warned, share of testable genes with p."""
    rows = []
    for seed in range(n_seeds):
        shifts = simulate_shifts(seed=seed, **setting)
        truth = pd.DataFrame(shifts.attrs["truth"])
        table, warned = quiet_test(shifts)
        per_donor = shifts.groupby(["gene", "donor"], observed=False).size().unstack()
        testable = (per_donor >= 10).sum(axis=1) >= 3
        p, hit = table.p.dropna(), table.fdr < 0.05
        driver = table.gene.isin(truth.gene[truth.driver])
        rows.append(
            dict(
                p05=(p < 0.05).mean(),
                p001=(p < 0.001).mean(),
                called=hit.mean(),
                found=hit[driver & table.p.notna()].mean(),
                false=(hit & ~driver).sum() / max(hit.sum(), 1),
                warned=warned,
                with_p=table.set_index("gene").p.loc[testable.index[testable]].notna().mean(),
            )
        )
    return pd.DataFrame(rows)


def pooled(n_seeds, settings):
    return pd.concat([runs(n_seeds, **setting) for setting in settings])


def nothing(**more):
    return [
        dict(tau=tau, offset=offset, **more)
        for tau, offset in ((0.1, "constant"), (0.1, "rank"), (0.3, "constant"), (0.3, "rank"))
    ]


# (a) to (f), short form


@pytest.mark.parametrize("donors, cells", [(3, 50), (6, 50), (6, 200)])
def test_every_testable_gene_gets_a_p(donors, cells):
    assert runs(2, n_donors=donors, cells_per_donor=cells).with_p.min() >= 0.95


@pytest.mark.parametrize("donors", [3, 6])
def test_p_values_are_uniform_where_no_gene_matters(donors):
    few, many = (pooled(4, nothing(n_donors=donors, cells_per_donor=cells)) for cells in (50, 200))
    for found in (few, many):
        assert 0.03 <= found.p05.mean() <= 0.06
        assert found.p001.mean() <= 0.0025
    assert abs(few.p05.mean() - many.p05.mean()) <= 0.02


def test_a_thousand_cells_say_what_fifty_say():
    thousand = runs(3, tau=0.1, cells_per_donor=1000)
    assert 0.03 <= thousand.p05.mean() <= 0.06
    assert thousand.called.max() <= 0.002
    assert abs(thousand.p05.mean() - runs(3, tau=0.1, cells_per_donor=50).p05.mean()) <= 0.02


@pytest.mark.parametrize("donors", [3, 6])
def test_no_spread_between_genes_is_no_trouble(donors):
    found = pooled(4, [dict(n_donors=donors, cells_per_donor=cells, tau=0.0) for cells in (50, 200)])
    assert 0.02 <= found.p05.mean() <= 0.06 and found.p001.mean() <= 0.0025 and found.called.mean() <= 0.002


def test_nothing_is_called_where_nothing_is():
    found = pooled(
        4,
        [
            setting
            for donors in (3, 6)
            for cells in (50, 200)
            for setting in nothing(n_donors=donors, cells_per_donor=cells)
        ],
    )
    assert (found.called > 0).mean() <= 0.15
    assert found.called.mean() <= 0.002


@pytest.mark.parametrize(
    "cells, effect, power", [(50, 8.0, 0.95), (200, 8.0, 0.95), (50, 4.0, 0.55), (200, 4.0, 0.80), (1000, 4.0, 0.85)]
)
def test_drivers_are_found_and_few_others(cells, effect, power):
    found = runs(8 if cells < 1000 else 3, cells_per_donor=cells, tau=0.2, drivers=0.05, driver_effect=effect)
    assert found.found.mean() >= power
    assert found.false.mean() <= 0.07


def test_three_donors_find_strong_drivers():
    found = runs(6, n_donors=3, cells_per_donor=200, tau=0.2, drivers=0.05, driver_effect=8.0)
    assert found.found.mean() >= 0.95 and found.false.mean() <= 0.07


def test_one_donor_of_six_is_no_evidence():
    assert runs(4, cells_per_donor=200, tau=0.2, drivers=0.05, driver_effect=8.0, driver_donors=1).called.mean() <= 0.01


def test_heavy_tails_are_called_seldom_and_warned_of():
    found = runs(6, cells_per_donor=200, tau=0.3, offset_law="laplace")
    assert found.called.mean() <= 0.04 and found.warned.all()
    assert runs(6, cells_per_donor=200, tau=0.3).warned.mean() < 0.5


def test_many_drivers_do_not_hide_each_other():
    found = runs(3, cells_per_donor=200, tau=0.2, drivers=0.2, driver_effect=8.0)
    assert found.found.mean() >= 0.95 and found.false.mean() <= 0.07


# (g) what must not matter


@pytest.fixture(scope="module")
def shifts():
    return simulate_shifts(cells_per_donor=60, tau=0.2, drivers=0.05, driver_effect=8.0, seed=5).astype(
        {"gene": str, "cell": str, "donor": str}
    )


@pytest.fixture(scope="module")
def table(shifts):
    return quiet_test(shifts)[0]


def p_of(shifts, genes):
    return quiet_test(shifts)[0].set_index("gene").p.loc[genes].to_numpy()


def test_shuffling_rows_changes_no_digit(shifts, table):
    pd.testing.assert_frame_equal(quiet_test(shifts.sample(frac=1, random_state=1))[0], table)


def test_renaming_donors_and_cells_changes_no_digit(shifts, table):
    names = {f"donor{i + 1}": new for i, new in enumerate(["f", "b", "e", "a", "d", "c"])}
    other = shifts.assign(donor=shifts.donor.map(names), cell=shifts.cell.str[::-1])
    np.testing.assert_array_equal(p_of(other, table.gene), table.p)
    as_numbers = shifts.assign(
        donor=shifts.donor.str[5:].astype(float), cell=shifts.cell.str.split("cell").str[1].astype(int)
    )  # "cell 1" in each donor
    np.testing.assert_array_equal(p_of(as_numbers, table.gene), table.p)
    as_categories = shifts.astype({"gene": "category", "cell": "category", "donor": "category"})
    np.testing.assert_array_equal(p_of(as_categories, table.gene), table.p)


def test_permuting_genes_changes_no_digit(shifts, table):
    genes = np.unique(shifts.gene)
    new = dict(zip(genes, np.random.default_rng(0).permutation(genes)))
    np.testing.assert_array_equal(p_of(shifts.assign(gene=shifts.gene.map(new)), table.gene.map(new)), table.p)


@pytest.mark.parametrize("factor", [2.0**-30, 3.7, -1.0, 1e9])
def test_scaling_shifts_changes_no_p(shifts, table, factor):
    scaled = quiet_test(shifts.assign(shift=shifts["shift"] * factor))[0].set_index("gene").loc[table.gene]
    np.testing.assert_allclose(scaled.p, table.p, rtol=1e-9)
    np.testing.assert_allclose(scaled.effect, table.effect * factor, rtol=1e-7)
    np.testing.assert_allclose(scaled.se, table.se * abs(factor), rtol=1e-7)


def test_adding_a_constant_or_a_value_per_cell_changes_no_p(shifts, table):
    per_cell = dict(zip(shifts.cell.unique(), np.random.default_rng(0).normal(size=shifts.cell.nunique())))
    np.testing.assert_allclose(
        p_of(shifts.assign(shift=shifts["shift"] + 5 + shifts.cell.map(per_cell)), table.gene), table.p, rtol=1e-6
    )


def test_where_ranks_start_hardly_matters(shifts, table):
    later = p_of(shifts.assign(rank=shifts["rank"] + 1), table.gene)
    assert stats.spearmanr(later, table.p, nan_policy="omit")[0] > 0.999
    as_floats = p_of(
        shifts.assign(rank=shifts["rank"] * 1.0 + 0.25), table.gene
    )  # no longer whole numbers: the other sort
    assert stats.spearmanr(as_floats, table.p, nan_policy="omit")[0] > 0.999


def test_tied_ranks_are_ordered_by_data_and_not_by_name(shifts):
    tied = shifts.assign(rank=shifts["rank"] // 10)
    first = quiet_test(tied)[0]
    genes = np.unique(tied.gene)
    new = dict(zip(genes, genes[::-1]))
    np.testing.assert_array_equal(
        p_of(tied.assign(gene=tied.gene.map(new)).sample(frac=1, random_state=0), first.gene.map(new)), first.p
    )


# tables of another hand


def other_hand(seed, tau=0.1, drivers=0, cells=150, detection="steps", rate="slope in the rate"):
    """The same description by another hand: float ranks from 1 fixed per gene, other detections, drivers of one sign
    on top of the offset, names as numbers."""
    rng = np.random.default_rng(seed)
    n_genes, n_donors = 600, 6
    place = rng.permutation(n_genes)
    share = (
        np.where(place < 200, 0.98, np.where(place < 400, 0.5, 0.06 + 0.3 * (599 - place) / 199))
        if detection == "steps"
        else 1 / (1 + np.exp(place / 90 - 3.9))
    )
    driver = np.zeros(n_genes, bool)
    driver[rng.choice(n_genes, drivers, replace=False)] = True
    offset = rng.normal(0, tau, n_genes) * (1 if rate != "growing" else 0.3 + 1.4 * place / 599) + driver * 8 * tau
    rows = []
    for donor in range(n_donors):
        slope = 1 + 0.2 * rng.normal()
        trend = np.exp(-place / (60 * slope)) if rate == "slope in the rate" else slope * np.exp(-place / 60)
        base = trend + offset + rng.normal(0, 0.05, n_genes) + rng.normal(0, 0.5)
        seen = rng.random((cells, n_genes)) < share
        cell, gene = np.nonzero(seen)
        shift = base[gene] + rng.normal(0, 0.5, cells)[cell] + rng.normal(size=len(gene))
        rows.append(
            pd.DataFrame(
                {
                    "gene": gene,
                    "cell": cell,
                    "donor": 1.0 + donor,
                    "rank": place[gene] + 1.0,
                    "shift": shift,
                    "note": "x",
                }
            )
        )
    return pd.concat(rows), driver


@pytest.mark.parametrize("rate", ["slope in the rate", "growing"])
@pytest.mark.parametrize("detection", ["steps", "logistic"])
def test_tables_of_another_hand_are_calibrated(detection, rate):
    tables = [quiet_test(other_hand(seed, detection=detection, rate=rate)[0])[0] for seed in range(6)]
    p = pd.concat(tables).p.dropna()
    assert 0.03 <= (p < 0.05).mean() <= 0.06 and (p < 0.001).mean() <= 0.0025
    assert np.mean([(table.fdr < 0.05).mean() for table in tables]) <= 0.002


def test_drivers_in_tables_of_another_hand_are_found():
    shifts, driver = other_hand(0, tau=0.2, drivers=30)
    table = quiet_test(shifts)[0]
    hit, known = table.fdr < 0.05, driver[table.gene.to_numpy(int)]
    assert hit[known & table.p.notna()].mean() >= 0.95 and (hit & ~known).sum() <= 0.15 * hit.sum()


# the columns


def test_columns_are_the_documented_ones(table):
    assert tuple(table.columns) == COLUMNS
    assert table.attrs["exploratory"] is False and 2 < table.attrs["tail_ratio"] < 4
    assert table.p.dropna().is_monotonic_increasing and set(table.status) == {"tested", "too few cells"}
    np.testing.assert_allclose(table.fdr, bh(table.p))
    tested = table[table.status == "tested"]
    assert (
        (tested.n_donors >= 3).all()
        and (tested.n_same_sign <= tested.n_donors).all()
        and (tested.n_matched == 100).all()
    )
    assert tested.percentile.between(0, 100).all() and tested.detection.between(0, 1).all()
    # the shrunken total is never smaller than what it is made of
    assert (
        np.abs(tested.effect - tested.expected) / np.sqrt(tested.tau**2 + tested.se**2) >= np.abs(tested.z) - 1e-9
    ).all()
    np.testing.assert_allclose(tested.p, 2 * stats.t.sf(np.abs(tested.z), tested.df), rtol=1e-9)


def test_counts_rank_and_detection_are_those_of_the_rows(shifts, table):
    by_gene, rows = shifts.groupby("gene"), table.set_index("gene")
    np.testing.assert_array_equal(rows.n_cells, by_gene.size()[rows.index])
    np.testing.assert_allclose(rows["rank"], by_gene["rank"].mean()[rows.index])
    np.testing.assert_allclose(rows.detection, by_gene.size()[rows.index] / shifts.cell.nunique())
    per_donor = shifts.groupby(["gene", "donor"]).size().unstack()
    np.testing.assert_array_equal(rows.n_donors, (per_donor >= MIN_CELLS).sum(axis=1)[rows.index])


def test_a_shift_is_compared_with_its_fifty_neighbours_in_the_cell(shifts, table):
    matched = shifts.assign(r=matched_residuals(check_shifts(shifts)))
    for cell in (shifts.cell.iloc[0], shifts.cell.iloc[-1]):
        rows = matched[matched.cell == cell].sort_values("rank")
        x = rows["shift"].to_numpy()
        left = np.clip(np.arange(len(x)) - WINDOW // 2, 0, len(x) - 1 - WINDOW)
        others = [np.delete(x[a : a + WINDOW + 1], i - a).mean() for i, a in enumerate(left)]
        np.testing.assert_allclose(rows.r, x - others, atol=1e-9)
    gene = table.gene[0]
    assert np.isclose(table.effect[0], matched[matched.gene == gene].groupby("donor").r.mean().mean(), rtol=1e-9)


def test_cells_of_few_genes_are_compared_with_all_the_others():
    small = pd.DataFrame(
        {"gene": list("abcd"), "cell": list("1112"), "rank": [0, 1, 2, 0], "shift": [1.0, 2.0, 6.0, 5.0]}
    )
    np.testing.assert_allclose(matched_residuals(check_shifts(small)), [-3, -1.5, 4.5, np.nan])


def test_log2fc_is_copied_by_gene(shifts, table):
    fold = pd.Series({"gene000": 1.5, "gene001": -2.0})
    rows = quiet_test(shifts)[0].set_index("gene")
    assert rows.log2fc.isna().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for given in (fold, fold.to_dict()):
            rows = screen_test(shifts, log2fc=given).set_index("gene")
            assert (
                rows.log2fc["gene000"] == 1.5
                and rows.log2fc["gene001"] == -2
                and rows.log2fc.isna().sum() == len(rows) - 2
            )


# exploring


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda s: s.drop(columns="donor"), "no donors"),
        (lambda s: s.assign(donor=np.nan), "no donors"),
        (lambda s: s.assign(donor=None), "no donors"),
        (lambda s: s[s.donor.isin(["donor1", "donor2"])], "2 donors, 3 are needed"),
        (lambda s: s[s.donor == "donor1"], "1 donor, 3 are needed"),
        (lambda s: s[s.gene < "gene080"], "80 genes screened, 100 are needed"),
        (lambda s: s[s.cell.str.contains("cell[0-9]$")], "genes have 10 cells in 3 donors"),
    ],
)
def test_without_a_sample_there_is_no_p(shifts, change, why):
    table, warned = quiet_test(change(shifts))
    assert tuple(table.columns) == COLUMNS and table.attrs["exploratory"] is True and not warned
    assert table[["p", "fdr", "se", "df"]].isna().all().all()
    shown = table[table.status != "too few cells"]
    assert shown.status.str.startswith("exploratory: ").all() and shown.status.str.contains(why).all()
    assert shown.effect.notna().all() and shown.percentile.between(0, 100).all()


def test_exploring_ranks_drivers_first(shifts):
    table = quiet_test(shifts.drop(columns="donor"))[0]
    truth = pd.DataFrame(
        simulate_shifts(cells_per_donor=60, tau=0.2, drivers=0.05, driver_effect=8.0, seed=5).attrs["truth"]
    ).set_index("gene")
    shown = table[table.status != "too few cells"]
    assert roc_auc_score(truth.driver[shown.gene], shown.z.abs()) > 0.97
    assert (
        np.where(truth.effect[shown.gene] > 0, shown.percentile, 100 - shown.percentile)[
            truth.driver[shown.gene]
        ].mean()
        > 95
    )


@pytest.mark.parametrize("n_genes", [1, 2, 5, 12])
def test_tiny_tables_are_shown(n_genes):
    shifts = simulate_shifts(n_genes=max(n_genes, 2), n_donors=2, cells_per_donor=30)
    table, _ = quiet_test(shifts[shifts.gene.isin(sorted(shifts.gene.unique())[:n_genes])])
    assert len(table) == n_genes and table.p.isna().all()


def test_genes_in_few_cells_are_shown_and_not_judged(shifts):
    rare = shifts.iloc[:4].assign(gene="rare", cell=shifts.cell.drop_duplicates().iloc[:4].to_numpy(), rank=3)
    table = quiet_test(pd.concat([shifts, rare]))[0].set_index("gene")
    assert table.status["rare"] == "too few cells" and table.n_cells["rare"] == 4
    assert np.isnan(table.p["rare"]) and np.isfinite(table.effect["rare"]) and 0 <= table.percentile["rare"] <= 100


def test_equal_shifts_call_nothing(shifts):
    table, _ = quiet_test(shifts.assign(shift=1.0))
    assert not (table.fdr < 0.05).any() and (table.effect.abs() < 1e-12).all()


def test_a_gene_seen_in_all_cells_of_all_is_no_trouble():
    rng = np.random.default_rng(0)
    full = pd.DataFrame(
        {
            "gene": np.tile(np.arange(150), 120),
            "cell": np.repeat(np.arange(120), 150),
            "donor": np.repeat(np.arange(4), 30 * 150),
            "rank": np.tile(np.arange(150), 120),
            "shift": rng.normal(size=150 * 120),
        }
    )
    table, _ = quiet_test(full)
    assert table.p.notna().all() and (table.p < 0.05).mean() < 0.15


# bad tables


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.drop(columns="shift"), "missing: shift"),
        (lambda s: s.rename(columns={"gene": "Gene"}), "missing: gene"),
        (lambda s: s.iloc[:0], "0 rows"),
        (lambda s: s.to_dict("list"), "pass a DataFrame"),
        (lambda s: pd.concat([s, s.iloc[[7]]]), "repeat a .gene, cell. pair"),
        (lambda s: s.assign(shift=s["shift"].where(s.index != 5)), "1 of .* values of column 'shift'"),
        (lambda s: s.assign(shift=s["shift"].where(s.index != 5, np.inf)), "values of column 'shift'"),
        (lambda s: s.assign(shift=s["shift"].astype(object).where(s.index != 5, "many")), "'many'"),
        (lambda s: s.assign(rank=s["rank"] - 1), "'rank' are not finite numbers of at least 0"),
        (lambda s: s.assign(rank=s["rank"].where(s.index != 5)), "'rank'"),
        (lambda s: s.assign(gene=s.gene.where(s.index != 5)), "no gene or no cell name"),
        (lambda s: s.assign(cell=s.cell.where(s.index != 5)), "no gene or no cell name"),
    ],
)
def test_bad_tables_get_a_plain_sentence(shifts, change, message):
    with pytest.raises(DataError, match=message):
        screen_test(change(shifts))


@pytest.mark.parametrize(
    "column, value", [("shift", np.nan), ("shift", -np.inf), ("shift", "many"), ("rank", -1.0), ("rank", "many")]
)
def test_the_line_that_drops_bad_values_drops_them(shifts, column, value):
    broken = shifts.assign(**{column: shifts[column].astype(object).where(shifts.index != 5, value)})
    with pytest.raises(DataError, match=re.escape(f"the first is {value!r} (gene")) as caught:
        screen_test(broken)
    mended = eval(str(caught.value).partition("Drop these rows: ")[2], {"shifts": broken, "pd": pd, "np": np})
    assert len(mended) == len(shifts) - 1
    screen_test(mended)


def test_the_rank_sum_test_names_a_bad_value_without_cells():
    with pytest.raises(DataError, match="gene 'A'"):
        rank_sum_test(pd.DataFrame({"gene": ["A", "B"], "shift": [np.nan, 1.0]}))


def test_rows_without_donor_are_left_out_aloud(shifts, table):
    extra = shifts[shifts.donor == "donor1"].assign(donor=np.nan, cell=lambda s: s.cell + "_unknown")
    with pytest.warns(ScellfmWarning, match=f"{len(extra)} of {len(shifts) + len(extra)} rows have no donor"):
        other = screen_test(pd.concat([shifts, extra]))
    np.testing.assert_array_equal(other.set_index("gene").p[table.gene], table.p)


def test_the_table_is_left_alone(shifts):
    before = shifts.copy()
    quiet_test(shifts)
    pd.testing.assert_frame_equal(shifts, before)


# the simulator


def test_simulated_tables_are_the_same_every_time_and_differ_by_seed():
    assert simulate_shifts(n_genes=40, cells_per_donor=5, seed=1).equals(
        simulate_shifts(n_genes=40, cells_per_donor=5, seed=1)
    )
    assert not simulate_shifts(n_genes=40, cells_per_donor=5, seed=1).equals(
        simulate_shifts(n_genes=40, cells_per_donor=5, seed=2)
    )


def test_simulated_offsets_have_the_sd_asked_for():
    for law, tails in (("normal", (2.2, 3.8)), ("laplace", (4.5, 9.0))):
        truth = pd.DataFrame(
            simulate_shifts(n_genes=4000, n_donors=1, cells_per_donor=1, tau=0.3, offset_law=law).attrs["truth"]
        )
        assert (
            abs(truth.offset.std() / 0.3 - 1) < 0.06
            and tails[0] < stats.kurtosis(truth.offset, fisher=False) < tails[1]
        )
    ranked = pd.DataFrame(
        simulate_shifts(n_genes=4000, n_donors=1, cells_per_donor=1, tau=0.3, offset="rank").attrs["truth"]
    )
    assert ranked.offset[-1000:].std() > 1.6 * ranked.offset[:1000].std()


def test_an_effect_in_one_donor_is_in_one_donor():
    shifts = simulate_shifts(
        n_genes=200, n_donors=4, cells_per_donor=300, tau=0.05, drivers=0.1, driver_effect=200.0, driver_donors=1
    )
    truth = pd.DataFrame(shifts.attrs["truth"]).set_index("gene")
    mean = shifts.groupby(["gene", "donor"], observed=True)["shift"].mean().unstack()
    away = (mean - mean.median()).loc[truth.index[truth.driver]].abs() > 2
    assert (away.sum(axis=1) == 1).all() and away.any().sum() > 1


@pytest.mark.parametrize(
    "bad", [dict(offset="constnat"), dict(offset_law="cauchy"), dict(drivers=2.0), dict(n_donors=0), dict(tau=-1.0)]
)
def test_unknown_settings_of_the_simulator_are_refused(bad):
    with pytest.raises(OptionError):
        simulate_shifts(**bad)


# the usual tests


def test_rank_sum_equals_scipy():
    rng = np.random.default_rng(0)
    shifts = pd.DataFrame(
        {"gene": rng.choice([f"g{i}" for i in range(20)], 3000), "shift": np.round(rng.normal(size=3000), 1)}
    )  # with ties
    table = rank_sum_test(shifts).set_index("gene")
    for gene, values in shifts.groupby("gene")["shift"]:
        z, p = stats.ranksums(shifts["shift"], values)
        np.testing.assert_allclose(table.loc[gene, ["z", "p"]].astype(float), [z, p], rtol=1e-12)
    np.testing.assert_allclose(table.fdr, stats.false_discovery_control(table.p), rtol=1e-12)


def test_rank_sum_draws_the_original_sample_from_large_pools():
    import random

    rng = np.random.default_rng(1)
    shifts = pd.DataFrame({"gene": rng.integers(0, 50, POOL + 5000), "shift": rng.normal(size=POOL + 5000)})
    table = rank_sum_test(shifts).set_index("gene")
    random.seed(42)
    sample = random.sample(shifts.sort_values("gene", kind="stable")["shift"].tolist(), POOL)
    for gene in (0, 17, 49):
        z, p = stats.ranksums(sample, shifts["shift"][shifts.gene == gene])
        np.testing.assert_allclose(table.loc[gene, ["z", "p"]].astype(float), [z, p], rtol=1e-12)


def goal_tables():
    folder = golden("geneformer")
    if not (folder / "meta.json").exists():
        return []
    records = json.loads((folder / "meta.json").read_text())["stats"]
    return [
        name
        for name, record in records.items()
        if record["options"].get("mode") == "goal_state_shift" and record["ok"] and "Goal_end_FDR" in record["columns"]
    ]


def test_there_are_goal_tables_to_compare_with():
    assert goal_tables()


@pytest.mark.parametrize("name", goal_tables())
def test_rank_sum_equals_the_original(name):
    folder = golden("geneformer")
    states = json.loads((folder / "meta.json").read_text())["stats"][name]["options"]["cell_states_to_model"]
    upstream = pd.read_parquet(folder / "stats" / f"{name}.parquet")
    raw = pd.read_parquet(folder / "isp" / f"{name.split('__')[0]}.parquet")
    raw = raw[(raw.kind == "cell") & (raw.perturbed.astype(str) != "")].assign(
        gene=lambda rows: rows.perturbed.astype(int)
    )
    ends = {states["goal_state"]: "Goal_end"} | {alt: f"Alt_end_{alt}" for alt in states.get("alt_states", [])}
    for state, end in ends.items():
        mine = rank_sum_test(raw[raw.state == state].rename(columns={"value": "shift"}))
        if end == "Goal_end":
            assert mine.gene.tolist() == upstream.Gene.tolist()  # the original's order
            np.testing.assert_array_equal(mine.n_cells, upstream.N_Detections)
            np.testing.assert_array_equal(mine.fdr < 0.05, upstream.Sig == 1)
        mine = mine.set_index("gene").loc[upstream.Gene]
        goal = end == "Goal_end"
        alt = "" if goal else f"_{state}"
        np.testing.assert_allclose(
            mine.effect, upstream["Shift_to_goal_end" if goal else f"Shift_to_alt_end{alt}"], atol=1e-12
        )
        np.testing.assert_allclose(mine.p, upstream[f"{'Goal' if goal else 'Alt'}_end_vs_random_pval{alt}"], rtol=1e-9)
        np.testing.assert_allclose(mine.fdr, upstream[f"{'Goal' if goal else 'Alt'}_end_FDR{alt}"], rtol=1e-9)


def test_the_rank_sum_calls_more_with_more_cells_and_ours_does_not():
    shares = {
        cells: (
            (rank_sum_test(s := simulate_shifts(cells_per_donor=cells, tau=0.3, seed=0)).fdr < 0.05).mean(),
            (quiet_test(s)[0].fdr < 0.05).mean(),
        )
        for cells in (50, 400)
    }
    assert shares[400][0] > shares[50][0] > 0.3 and max(shares[50][1], shares[400][1]) <= 0.005


def test_donor_t_is_a_t_test_of_donor_means(shifts):
    table = donor_t_test(shifts)
    full = shifts.assign(r=matched_residuals(check_shifts(shifts)))
    gene = table.gene[0]
    means = full[full.gene == gene].groupby("donor").r.mean()
    t, p = stats.ttest_1samp(means, 0)
    assert np.isclose(table.t[0], t, rtol=1e-8) and np.isclose(table.p[0], p, rtol=1e-8) and table.df[0] == 5
    assert donor_t_test(shifts.drop(columns="donor")).p.isna().all()


def test_bh_is_scipys_and_leaves_nan_alone():
    p = np.random.default_rng(0).random(200) ** 3
    np.testing.assert_allclose(bh(p), stats.false_discovery_control(p), rtol=1e-12)
    mixed = np.insert(p, [0, 50, 200], np.nan)
    np.testing.assert_array_equal(bh(mixed)[~np.isnan(mixed)], bh(p))
    assert len(bh([])) == 0 and np.isnan(bh([np.nan])).all()
    with pytest.raises(DataError, match="between 0 and 1"):
        bh([0.1, 1.2])


def test_sums_do_not_depend_on_order():
    rng = np.random.default_rng(0)
    values, codes = rng.standard_cauchy(20_000), rng.integers(0, 7, 20_000)
    order = rng.permutation(20_000)
    np.testing.assert_array_equal(exact_sums(values, codes, 7), exact_sums(values[order], codes[order], 7))
    np.testing.assert_allclose(
        exact_sums(values, codes, 7), np.bincount(codes, values), atol=1e-9 * np.abs(values).max()
    )
    assert (exact_sums(np.zeros(3), np.zeros(3, int), 2) == 0).all()


# fold changes and known targets


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2, (60, 8)).astype(np.float32)
    obs = pd.DataFrame(
        {"state": np.repeat(["a", "b"], 30), "donor": np.tile(["x", "x", "y"], 20), "type": np.tile(["t", "m"], 30)},
        index=[f"c{i}" for i in range(60)],
    )
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(8)]))


def by_hand(counts, obs, start, goal, donors):
    scaled = pd.DataFrame(1e4 * counts / counts.sum(1, keepdims=True), index=obs.index)
    means = {}
    for state in (start, goal):
        rows = obs.state == state
        means[state] = scaled[rows].groupby(obs.donor[rows]).mean().mean() if donors else scaled[rows].mean()
    return np.log2((means[goal] + 0.1) / (means[start] + 0.1)).to_numpy()


@pytest.mark.parametrize("donors", [True, False])
def test_fold_changes_are_of_donor_means(cells, donors):
    fold = log2_fold_change(cells, "state", "a", "b", donor="donor" if donors else None)
    np.testing.assert_allclose(fold, by_hand(cells.X, cells.obs, "a", "b", donors), rtol=1e-5)
    assert fold.index.tolist() == cells.var_names.tolist()
    np.testing.assert_allclose(
        log2_fold_change(cells, "state", "b", "a", donor="donor" if donors else None), -fold, rtol=1e-6
    )


def test_fold_changes_within_a_cell_type_and_of_a_layer(cells):
    cells.layers["counts"] = cells.X * 3
    mask = (cells.obs.type == "t").to_numpy()
    part = cells[mask]
    expected = by_hand(np.asarray(part.X), part.obs, "a", "b", True)
    np.testing.assert_allclose(
        log2_fold_change(cells, "state", "a", "b", donor="donor", mask=mask, layer="counts"), expected, rtol=1e-5
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("condition", "a", "b"), "no column 'condition'"),
        (("state", "a", "c"), "no cell has state = 'c'"),
        (("state", "d", "b"), "there are: 'a', 'b'"),
    ],
)
def test_states_that_are_not_there_are_named(cells, arguments, message):
    with pytest.raises(DataError, match=message):
        log2_fold_change(cells, *arguments)


def test_ranking_scores_are_sklearns_under_ties_and_weights():
    rng = np.random.default_rng(0)
    for _ in range(5):
        value, label = rng.integers(0, 12, 80).astype(float), rng.random(80) < 0.2
        weights = rng.integers(1, 5, (3, 80)).astype(float)
        auroc, precision = ranking_scores(value, label, weights)
        np.testing.assert_allclose(auroc, [roc_auc_score(label, value, sample_weight=w) for w in weights])
        np.testing.assert_allclose(precision, [average_precision_score(label, value, sample_weight=w) for w in weights])


@pytest.fixture(scope="module")
def with_fold(shifts):
    fold = pd.Series(np.random.default_rng(0).normal(size=600), index=np.unique(shifts.gene))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return screen_test(shifts, log2fc=fold)


def drivers():
    truth = pd.DataFrame(
        simulate_shifts(n_donors=1, cells_per_donor=1, tau=0.2, drivers=0.05, driver_effect=8.0, seed=5).attrs["truth"]
    )
    return truth.gene[truth.driver].tolist()


@pytest.mark.parametrize("by", ["z", "effect"])
def test_recovery_scores_drivers_and_not_fold_changes(with_fold, by):
    known = drivers()
    scores = recovery(with_fold, known + ["absent"], by=by)
    ours = scores.iloc[0]
    assert scores.index.tolist() == [f"screen |{by}|", "|log2FC|", "expression", "rank"]
    assert (
        ours.auroc > 0.97 and ours.auroc_low <= ours.auroc <= ours.auroc_high <= 1 and ours.average_precision_low > 0.5
    )
    assert scores.auroc_low["|log2FC|"] < 0.5 < scores.auroc_high["|log2FC|"]
    tested = with_fold[with_fold.status == "tested"]
    if by == "z":
        assert np.isclose(ours.auroc, roc_auc_score(tested.gene.isin(known), tested.z.abs()))
    untested = set(known) - set(tested.gene)
    assert scores.attrs["not_testable"] == {"absent": "not screened"} | dict.fromkeys(untested, "too few cells")
    assert (
        (scores.n_known == len(known) - len(untested)).all()
        and (scores.n_genes == len(tested)).all()
        and scores.attrs["note"] == ""
    )
    pd.testing.assert_frame_equal(recovery(with_fold, known + ["absent"], by=by), scores)


def test_few_known_targets_get_percentiles_only(with_fold):
    known = [gene for gene in drivers() if gene in set(with_fold.gene[with_fold.status == "tested"])][:4]
    scores = recovery(with_fold, known)
    assert (
        scores[["auroc", "average_precision", "auroc_low"]].isna().all().all()
        and "4 testable targets, 5 are needed" in scores.attrs["note"]
    )
    assert (
        set(scores.attrs["percentiles"]) == set(known)
        and min(p["screen |z|"] for p in scores.attrs["percentiles"].values()) > 90
    )
    with pytest.warns(ScellfmWarning, match=r"1 of 1 known targets cannot be scored: absent \(not screened\)"):
        nobody = recovery(with_fold, "absent")  # one name, not six letters
    assert (
        nobody.auroc.isna().all()
        and (nobody.n_known == 0).all()
        and nobody.attrs["not_testable"] == {"absent": "not screened"}
    )


def test_recovery_without_fold_changes_or_donors(shifts):
    scores = recovery(quiet_test(shifts.drop(columns="donor"))[0], drivers())
    assert scores.auroc["screen |z|"] > 0.95 and np.isnan(scores.auroc["|log2FC|"])
    with pytest.raises(OptionError, match="by='p'"):
        recovery(quiet_test(shifts)[0], drivers(), by="p")


@pytest.mark.slow
def test_long_form_holds_every_criterion():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "screen_calibration.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def hit_table(decimals: int = 6):
    "(value, known, q) of sixty genes, ten of them known."
    rng = np.random.default_rng(7)
    value = np.round(rng.normal(size=60), 6)
    known = value + rng.normal(size=60) > 1.1
    q = np.round(np.clip(rng.uniform(size=60) * 0.3 - 0.1 * known + 0.02, 0, 1), 6)
    return np.round(value, decimals), known, q


def test_recall_at_a_budget_and_realised_fdr_are_those_of_perturbhd():
    "Expected values: perturb-hd 0.1.0 on the same numbers."
    value, known, q = hit_table()
    assert list(recall_at_budget(value, known).values()) == pytest.approx([0.2, 0.4, 0.6])
    assert list(recall_at_fdr(value, known).values()) == pytest.approx([0.2, 0.2, 0.2])
    called = realised_fdr(q, known)
    assert called["n_called"].tolist() == [6, 15, 35]
    assert called["realised_fdr"].tolist() == pytest.approx([0.5, 0.6, 0.771429], abs=1e-6)
    assert called["recall"].tolist() == pytest.approx([0.3, 0.6, 0.8])
    tied = hit_table(0)[0]  # many ties: the mean over their orders
    assert list(recall_at_budget(tied, known).values()) == pytest.approx([0.190909, 0.327273, 0.6], abs=1e-6)


def test_recall_at_an_empirical_fdr_is_the_best_list_of_any_length():
    rng = np.random.default_rng(0)
    for _ in range(30):
        value, known = rng.normal(size=25), rng.random(25) < 0.4
        if not known.any():
            continue
        order = np.argsort(-value)
        for level in (0.0, 0.1, 0.3):
            lists = [known[order[:n]] for n in range(1, 26)]
            best = max([one.sum() for one in lists if (~one).mean() <= level], default=0) / known.sum()
            assert recall_at_fdr(value, known, (level,)) == {f"recall_at_fdr_{level:g}": pytest.approx(best)}


def test_nothing_known_or_called_is_no_number():
    none = np.zeros(5, bool)
    assert np.isnan(list(recall_at_budget(np.arange(5.0), none).values())).all()
    assert np.isnan(list(recall_at_fdr(np.arange(5.0), none).values())).all()
    called = realised_fdr(np.array([0.9, np.nan, 0.5]), np.array([True, False, True]))
    assert (called["n_called"] == 0).all() and called["realised_fdr"].isna().all() and (called["recall"] == 0).all()


def test_a_screen_s_own_q_values_are_judged_and_few_targets_are_not(with_fold):
    known = drivers()
    scores = recovery(with_fold, known)
    tested = with_fold[(with_fold.status != "too few cells") & with_fold.z.notna()]
    called = realised_fdr(tested.fdr.to_numpy(), tested.gene.isin(known).to_numpy())
    assert scores.attrs["realised_fdr"] == called.to_dict("index") and called.loc[0.05, "n_called"] > 0
    assert called.loc[0.05, "realised_fdr"] < 0.2 and called.loc[0.05, "recall"] > 0.7
    ours, cheap = scores.loc["screen |z|"], scores.loc["expression"]
    assert ours["recall_at_0.05"] > 0.7 > 0.4 > cheap["recall_at_0.05"] and ours["recall_at_fdr_0.1"] > 0.7
    few = recovery(with_fold, known[:3])
    assert few.filter(like="recall_at").isna().all(axis=None) and few.attrs["realised_fdr"] == {}
