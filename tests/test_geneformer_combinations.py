"""Pairs of genes: the edits are those of the pair, and the excess over the singles is judged over donors."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ttest_1samp
from test_geneformer_lists import common, pbmc  # noqa: F401  (a fixture)
from test_geneformer_perturbation import QUESTION

from scellfm.core import DataError, OptionError
from scellfm.geneformer import Screen
from scellfm.geneformer.perturbation.combinations import combination_table, pair_rows


def rows_of(excess: dict, cells: int = 12) -> pd.DataFrame:
    "Rows of the pair A+B and its singles: in each donor the excess is as given, cells scatter around it."
    random, made = np.random.default_rng(1), []
    for donor, value in excess.items():
        one, two, noise = random.normal(size=(3, cells))
        noise -= noise.mean()
        for gene, shift in (("A", one), ("B", two), ("A+B", one + two + value + noise)):
            made.append(
                pd.DataFrame(
                    {
                        "gene": gene,
                        "cell": [f"{donor}{i}" for i in range(cells)],
                        "donor": donor,
                        "group": "all",
                        "rank": 0,
                        "shift": shift,
                    }
                )
            )
    return pd.concat(made, ignore_index=True)


def table_of(rows: pd.DataFrame) -> pd.Series:
    "The one row of the table of A+B."
    is_pair = rows["gene"].str.contains("+", regex=False)
    return combination_table(pair_rows(rows[is_pair], rows[~is_pair])).iloc[0]


# the statistic
def test_the_excess_is_a_t_test_over_donor_means():
    excess = {"a": 0.3, "b": 0.5, "c": 0.1, "d": 0.4}
    row, theirs = table_of(rows_of(excess)), ttest_1samp(list(excess.values()), 0)
    assert row["effect"] == pytest.approx(0.325) and row["p"] == pytest.approx(theirs.pvalue) == pytest.approx(
        row["fdr"]
    )
    low, high = theirs.confidence_interval(0.95)
    assert (row["low"], row["high"], row["df"]) == pytest.approx((low, high, 3)) and row["n_same_sign"] == row[
        "n_donors"
    ] == 4
    assert row["effect"] == pytest.approx(row["joint"] - row["sum"])


def test_more_cells_of_the_same_donors_make_no_smaller_p():
    excess = {"a": 0.3, "b": -0.2, "c": 0.1}
    few, many = (table_of(rows_of(excess, cells)) for cells in (12, 400))
    assert many["p"] == pytest.approx(few["p"]) and many["n_cells"] > 30 * few["n_cells"]


def test_no_p_with_fewer_than_three_donors_of_enough_cells():
    for rows in (
        rows_of({"a": 0.3, "b": 0.4}),
        rows_of({"a": 0.3, "b": 0.4, "c": 0.5}, cells=9),
        rows_of({"a": 0.3, "b": 0.4, "c": 0.5}).assign(donor=np.nan),
    ):
        row = table_of(rows)
        assert np.isnan(row["p"]) and np.isnan(row["se"]) and "exploratory" in row["status"]
        assert 0.3 <= row["effect"] <= 0.5


def test_a_donor_with_few_cells_does_not_count():
    rows = pd.concat([rows_of({"a": 0.3, "b": 0.5, "c": 0.1}), rows_of({"z": 90.0}, cells=3)])
    row = table_of(rows)
    assert row["effect"] == pytest.approx(0.3) and row["n_donors"] == 3 and row["n_cells"] == 39


def test_pairs_are_corrected_together_within_their_group():
    from scellfm.statistics import bh

    made = []
    for group, seed in (("x", 0), ("x", 1), ("y", 2)):
        own = rows_of({d: float(v) for d, v in zip("abcd", np.random.default_rng(seed).normal(0.3, 0.2, 4))}).assign(
            group=group
        )
        own["gene"] = own["gene"].str.replace("A", f"A{seed}")
        made.append(own)
    rows = pd.concat(made, ignore_index=True)
    is_pair = rows["gene"].str.contains("+", regex=False)
    table = combination_table(pair_rows(rows[is_pair], rows[~is_pair]))
    for _, part in table.groupby("group"):
        np.testing.assert_allclose(part["fdr"], bh(part["p"].to_numpy()))


# the edits
@pytest.mark.parametrize("kind", ["delete", "overexpress", "inhibit"])
def test_pairs_of_a_list_are_its_joint_perturbations(pbmc, kind):  # noqa: F811
    adata, gf = pbmc
    genes = common(pbmc, 3)
    asked = dict(kind=kind, max_cells=12, **QUESTION)
    screen = gf.perturb(adata, genes=genes, combine="pairs", **asked)
    names = [*genes, *("+".join(pair) for pair in combinations(genes, 2))]
    assert set(screen.shifts["gene"]) == set(names) == set(screen.genes["gene"])
    for name in names:
        alone = gf.perturb(adata, genes=name.split("+"), **asked).shifts
        merged = screen.shifts[screen.shifts["gene"] == name].merge(alone, on=["gene", "cell", "rank"])
        assert len(merged) == len(alone)
        np.testing.assert_allclose(merged["shift_x"], merged["shift_y"], atol=1e-6)


def test_an_anchor_with_a_goal_deletes_both_genes(pbmc):  # noqa: F811
    adata, gf = pbmc
    anchor = common(pbmc, 1)[0]
    screen = gf.perturb(adata, anchor=anchor, max_cells=15, **QUESTION)
    goal = torch.from_numpy(gf.state_embeddings(adata, state="cell_type")[QUESTION["goal"]])
    cells, token = gf.cells(adata), gf.tokenizer.token(anchor)
    name, rows = next(iter(screen.shifts.groupby("cell", sort=False)))
    tokens = cells[adata.obs_names.get_loc(name)]
    others = tokens[tokens != token]
    assert len(others) == len(tokens) - 1 and rows["gene"].tolist() == list(gf.tokenizer.genes[others])

    def shift(ids):
        with torch.inference_mode():
            hidden = gf.model(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states[
                -2
            ][0]
        return float(torch.cosine_similarity(hidden.mean(0), goal, dim=0))

    theirs = [shift(others[others != other]) - shift(tokens) for other in others]
    np.testing.assert_allclose(rows["shift"], theirs, atol=1e-6)


def test_combinations_of_a_pair_screen_and_of_an_anchor_agree(pbmc):  # noqa: F811
    adata, gf = pbmc
    one, two = common(pbmc, 2)
    pairs = gf.perturb(adata, genes=[one, two], combine="pairs", **QUESTION).combinations().iloc[0]
    joint, singles = gf.perturb(adata, anchor=one, **QUESTION), gf.perturb(adata, genes="all", **QUESTION)
    table = joint.combinations(singles)
    same = table.set_index("gene").loc[f"{one}+{two}"]
    for column in ("effect", "joint", "sum"):
        assert same[column] == pytest.approx(pairs[column], abs=1e-6)
    assert same["n_cells"] == pairs["n_cells"] and len(table) == joint.shifts["gene"].nunique()
    assert pairs["symbol"] == f"{gf.tokenizer.symbol(one)}+{gf.tokenizer.symbol(two)}"


def test_pairs_get_no_p_beside_single_genes(pbmc):  # noqa: F811
    adata, gf = pbmc
    table = gf.perturb(adata, genes=common(pbmc, 3), combine="pairs", max_cells=20, **QUESTION).table()
    is_pair = table["gene"].str.contains("+", regex=False)
    assert (
        is_pair.sum() == 3
        and table.loc[is_pair, "p"].isna().all()
        and (table.loc[is_pair, "status"] == "a pair: see combinations()").all()
    )


def test_a_stopped_screen_of_pairs_goes_on(pbmc, tmp_path, monkeypatch):  # noqa: F811
    from scellfm.geneformer.perturbation import edits

    adata, gf = pbmc
    asked = dict(genes=common(pbmc, 3), combine="pairs", max_cells=20, **QUESTION)
    expected = gf.perturb(adata, **asked)
    monkeypatch.setattr(edits, "BLOCK_EDITED", 500)
    computed, whole = [], edits.block_effects

    def stops(*arguments, **named):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(1)
        return whole(*arguments, **named)

    monkeypatch.setattr(edits, "block_effects", stops)
    with pytest.raises(KeyboardInterrupt):
        gf.perturb(adata, folder=tmp_path / "run", **asked)
    monkeypatch.setattr(edits, "block_effects", lambda *a, **k: computed.append(1) or whole(*a, **k))
    resumed = gf.perturb(adata, folder=tmp_path / "run", **asked)
    pd.testing.assert_frame_equal(resumed.shifts, expected.shifts, atol=1e-6, rtol=0)
    done = len(computed)
    again = gf.perturb(adata, folder=tmp_path / "run", **asked)
    pd.testing.assert_frame_equal(again.combinations(), resumed.combinations())
    assert len(computed) == done > 3


def test_what_has_no_pairs_has_no_combinations(pbmc):  # noqa: F811
    adata, gf = pbmc
    plain = gf.perturb(adata, max_cells=2, **QUESTION)
    anchored = gf.perturb(adata, anchor=common(pbmc, 1)[0], max_cells=5, **QUESTION)
    for ask in (plain.combinations, lambda: plain.combinations(plain), anchored.combinations):
        with pytest.raises(OptionError, match="combine='pairs'"):
            ask()
    other = Screen(plain.shifts.assign(cell="another"), plain.genes, plain.params)
    with pytest.raises(DataError, match="same data"):
        anchored.combinations(other)
