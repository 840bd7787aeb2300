"""Lists of genes: one by one with genes like them, in pairs; and the cells that are chosen for it."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from test_geneformer_perturbation import QUESTION

from scellfm import statistics
from scellfm.core import DataError, OptionError
from scellfm.data.demonstration import demo
from scellfm.data.shifts import simulate_shifts
from scellfm.geneformer import Geneformer, RankTokenizer, Screen
from scellfm.geneformer.perturbation.controls import matched_controls, rank_and_detection
from scellfm.geneformer.perturbation.screen import standardize
from scellfm.statistics.screen import MIN_GENES


@pytest.fixture(scope="module")
def pbmc():
    "Ninety monocytes and T cells with donors, and a tiny model with their vocabulary."
    adata = demo()
    adata = adata[adata.obs["cell_type"].isin(["CD14+ Monocyte", "CD8+ Cytotoxic T"])][:90].copy()
    adata.obs["donor"] = np.tile(["a", "b", "c"], 30)
    adata.obs["lane"] = np.tile([1, 2], 45)
    return adata, Geneformer.from_config("tiny", RankTokenizer.fit(adata, max_length=48), device="cpu")


def common(pbmc, n: int) -> list[str]:
    "Genes that most monocytes have."
    adata, gf = pbmc
    tokens, _, detection = rank_and_detection(gf.cells(adata[adata.obs["cell_type"] == "CD14+ Monocyte"].copy()), False)
    return [str(gf.tokenizer.genes[t]) for t in tokens[np.argsort(-detection, kind="stable")][:n]]


# one by one
def test_each_gene_of_a_list_gives_the_rows_of_the_screen_of_all(pbmc):
    adata, gf = pbmc
    genes = common(pbmc, 4)
    whole = gf.perturb(adata, max_cells=6, **QUESTION).shifts
    each = gf.perturb(adata, genes=genes, combine="each", max_cells=6, **QUESTION).shifts
    merged = each.merge(whole, on=["gene", "cell", "rank"])
    assert set(each["gene"]) == set(genes) and len(merged) == len(each) == whole["gene"].isin(genes).sum()
    np.testing.assert_allclose(merged["shift_x"], merged["shift_y"], atol=1e-6)


def test_a_cell_that_has_no_other_gene_is_left_out(pbmc):
    adata, gf = pbmc
    cell = adata[:2].copy()
    counts = cell.X.toarray()
    counts[0] = [5] * 3 + [0] * (cell.n_vars - 3)
    counts[1, :3] = 5
    cell.X = csr_matrix(counts)
    for kind in ("delete", "overexpress"):
        rows = gf.perturb(cell, kind=kind, genes=list(cell.var_names[:3]), combine="joint").shifts
        assert list(rows["cell"]) == [cell.obs_names[1]] * len(rows) and rows["shift"].notna().all()


def test_a_list_without_company_has_effects_and_no_p(pbmc):
    adata, gf = pbmc
    for settings in (dict(combine="each"), dict(matched=0), dict()):
        table = gf.perturb(adata, genes=common(pbmc, 3), max_cells=20, **settings, **QUESTION).table()
        assert table["p"].isna().all() and table["fdr"].isna().all() and table["mean_shift"].notna().all()
        assert table["status"].str.contains("exploratory|too few").all()


def test_matched_genes_are_the_nearest_in_rank_and_detection(pbmc):
    adata, gf = pbmc
    cells = gf.cells(adata)
    tokens, rank, detection = rank_and_detection(cells, False)
    target = tokens[np.argsort(-detection, kind="stable")[[30, 60]]]
    chosen = matched_controls(cells, target, 50, False)
    features = np.column_stack([np.log1p(rank), np.log(detection / (1 - detection))])
    features = (features - features.mean(0)) / features.std(0)
    others = ~np.isin(tokens, target)
    away = np.sqrt(((features[:, None] - features[np.isin(tokens, target)]) ** 2).sum(2)).min(1)
    inside = np.isin(tokens, chosen)
    assert away[inside].max() < np.median(away[others & ~inside]) and not np.isin(target, chosen).any()
    assert MIN_GENES <= len(chosen) + 2 <= MIN_GENES + 2
    many = matched_controls(cells, tokens[:40], 50, False)
    assert len(many) <= 40 * 50 and not np.isin(tokens[:40], many).any()


def test_special_tokens_are_no_company():
    from geneformer_golden import cells, model

    gf, given = model("v2"), cells("v2")
    drawn = set(matched_controls(given, np.array([int(given[0][5])]), 50, True))
    assert not drawn & {gf.tokenizer.cls, gf.tokenizer.eos}


def test_targets_are_tested_against_genes_like_them_and_corrected_among_themselves(pbmc):
    adata, gf = pbmc
    genes = common(pbmc, 12)[5:8]
    screen = gf.perturb(adata, genes=genes, matched=50, **QUESTION)
    table = screen.table()
    assert (
        set(table.loc[table["target"], "gene"]) == set(genes)
        and table["target"].iloc[:3].all()
        and len(table) >= MIN_GENES
    )
    scaled = screen.shifts.assign(shift=standardize(screen.shifts))[["gene", "cell", "donor", "rank", "shift"]]
    plain = statistics.screen_test(scaled).set_index("gene").loc[table["gene"]]
    for column in ("effect", "z", "p"):
        np.testing.assert_array_equal(table[column], plain[column])
    np.testing.assert_allclose(table["fdr"].iloc[:3], statistics.bh(table["p"].iloc[:3]))
    assert table["fdr"].iloc[3:].isna().all() and screen.params["targets"] == genes
    whole = gf.perturb(adata, **QUESTION).shifts.merge(screen.shifts, on=["gene", "cell"])
    assert len(whole) == len(screen.shifts)
    np.testing.assert_allclose(whole["shift_x"], whole["shift_y"], atol=1e-6)


def test_a_target_that_drives_the_shift_is_called():
    shifts = simulate_shifts(n_genes=150, n_donors=6, cells_per_donor=50, drivers=0.05, seed=0)
    truth = pd.DataFrame(shifts.attrs["truth"]).set_index("gene")
    driver, other = truth.index[truth["driver"]][0], truth.index[~truth["driver"]][70]
    facts = pd.DataFrame({"group": "all", "gene": truth.index, "symbol": truth.index, "log2fc": np.nan})
    table = Screen(
        shifts.astype({"gene": str, "donor": str}).assign(group="all"), facts, {"targets": [driver, other]}
    ).table()
    assert set(table["gene"].iloc[:2]) == {driver, other} and table["gene"].iloc[0] == driver
    assert table["fdr"].iloc[0] < 0.05 < table["fdr"].iloc[1] and table["fdr"].iloc[2:].isna().all()
    assert table.attrs["exploratory"] is False


def test_company_is_chosen_group_by_group(pbmc):
    adata, gf = pbmc
    adata = adata.copy()
    adata.obs["half"] = np.tile(["left", "right"], 45)
    asked = dict(state="half", start="left", goal="right", groupby="cell_type", donor="donor")
    left = adata[adata.obs["half"] == "left"]
    have = [
        set(rank_and_detection(gf.cells(left[left.obs["cell_type"] == name].copy()), False)[0])
        for name in left.obs["cell_type"].unique()
    ]
    gene = [str(gf.tokenizer.genes[min(set.intersection(*have))])]
    shifts = gf.perturb(adata, genes=gene, matched=50, **asked).shifts
    company = {group: set(rows["gene"]) for group, rows in shifts.groupby("group")}
    one, other = company.values()
    assert len(company) == 2 and one != other and set(gene) <= one & other


def test_a_matched_screen_resumes(pbmc, tmp_path, monkeypatch):
    from scellfm.geneformer.perturbation import edits

    adata, gf = pbmc
    asked = dict(genes=common(pbmc, 2), matched=50, max_cells=8, **QUESTION)
    expected = gf.perturb(adata, **asked).shifts
    monkeypatch.setattr(edits, "BLOCK_EDITED", 4000)
    computed, whole = [], edits.block_effects

    def stops(*arguments, **named):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(1)
        return whole(*arguments, **named)

    monkeypatch.setattr(edits, "block_effects", stops)
    with pytest.raises(KeyboardInterrupt):
        gf.perturb(adata, folder=tmp_path / "run", **asked)
    monkeypatch.setattr(edits, "block_effects", lambda *a, **k: computed.append(1) or whole(*a, **k))
    resumed = gf.perturb(adata, folder=tmp_path / "run", **asked).shifts
    pd.testing.assert_frame_equal(resumed, expected, atol=1e-6, rtol=0)
    done = len(computed)
    gf.perturb(adata, folder=tmp_path / "run", **asked)
    assert len(computed) == done > 2


# what it costs
def test_a_dry_run_counts_the_edits_and_computes_nothing(pbmc, monkeypatch, caplog):
    adata, gf = pbmc
    asked = dict(genes=common(pbmc, 2), matched=50, max_cells=8, **QUESTION)
    with caplog.at_level(logging.INFO, logger="scellfm"):
        shifts = gf.perturb(adata, **asked).shifts
    assert f"{len(shifts):,} edits of 8 cells" in caplog.text
    monkeypatch.setattr(Geneformer, "hidden", None)
    told = gf.perturb(adata, dry_run=True, **asked)
    assert told["edits"].item() == len(shifts) and told["cells"].item() == 8
    assert told["genes"].item() == shifts["gene"].nunique() and told["tokens"].item() == 47 * len(shifts)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(genes="all", matched=50), "genes='all'"),
        (dict(genes="all", combine="each"), "genes='all'"),
        (dict(genes=["CD3D"], matched=50, combine="joint"), "combine='each'"),
        (dict(genes=["CD3D"], matched=-1), "matched=-1"),
        (dict(genes=["CD3D"], combine="couples"), "pairs"),
        (dict(genes=["CD3D"], combine="pairs"), "two genes"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(pbmc, wrong, message):
    adata, gf = pbmc
    with pytest.raises(OptionError, match=message):
        gf.perturb(adata, **wrong)


# which cells
@pytest.mark.parametrize(
    "where, chosen",
    [
        ({"lane": 1}, lambda obs: obs["lane"] == 1),
        ({"lane": [1, 2], "donor": ["a", "c"]}, lambda obs: obs["donor"] != "b"),
        ({"lane": "2", "donor": "a"}, lambda obs: (obs["lane"] == 2) & (obs["donor"] == "a")),
    ],
)
def test_where_is_as_if_the_data_held_no_other_cells(pbmc, where, chosen):
    adata, gf = pbmc
    filtered = gf.perturb(adata, where=where, max_cells=4, **QUESTION)
    alone = gf.perturb(adata[chosen(adata.obs)].copy(), max_cells=4, **QUESTION)
    pd.testing.assert_frame_equal(filtered.shifts, alone.shifts, atol=1e-6, rtol=0)
    pd.testing.assert_frame_equal(filtered.genes, alone.genes)


def test_where_takes_numpy_values_and_is_recorded(pbmc, tmp_path):
    adata, gf = pbmc
    screen = gf.perturb(adata, where={"lane": np.array([1])}, max_cells=1, **QUESTION)
    screen.save(tmp_path / "screen")
    assert screen.params["where"] == {"lane": [1]}


@pytest.mark.parametrize(
    "where, error, message",
    [
        ({"no_such": 1}, DataError, "no_such"),
        ({"lane": 3}, DataError, "values are 1, 2"),
        ({"donor": "a", "lane": 9}, DataError, "lane"),
        ({}, OptionError, "where={}"),
        ("lane", OptionError, "a dictionary or None: {column: value or values}"),
        ({"cell_type": "CD8+ Cytotoxic T"}, DataError, "CD14"),
    ],
)
def test_a_filter_that_chooses_nothing_is_an_error(pbmc, where, error, message):
    adata, gf = pbmc
    with pytest.raises(error, match=message):
        gf.perturb(adata, where=where, **QUESTION)


def test_genes_that_cells_lack_are_overexpressed_and_tested(pbmc):
    adata, gf = pbmc
    cells = gf.cells(adata)
    tokens, _, detection = rank_and_detection(cells, False)
    genes = list(gf.tokenizer.genes[tokens[np.argsort(abs(detection - 0.4), kind="stable")[:3]]])
    read = {name: list(gf.tokenizer.genes[cells[i]]) for i, name in enumerate(adata.obs_names)}
    for settings in (dict(combine="each"), dict(combine="pairs"), dict(matched=50)):
        screen = gf.perturb(adata, kind="overexpress", genes=genes, max_cells=20, **settings, **QUESTION)
        rows = screen.shifts[screen.shifts["gene"].isin(genes)]
        wanted = [
            read[cell].index(gene) if gene in read[cell] else len(read[cell])
            for cell, gene in zip(rows["cell"], rows["gene"])
        ]
        lacking = np.array([gene not in read[cell] for cell, gene in zip(rows["cell"], rows["gene"])])
        assert rows["rank"].tolist() == wanted and 0 < lacking.sum() < len(rows) == 60
        table = screen.table().set_index("gene").loc[genes]
        assert table["mean_shift"].notna().all() and (table["n_cells"] == 20).all()
