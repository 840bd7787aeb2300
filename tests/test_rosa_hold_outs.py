"""Hold-outs along both axes: groups stay whole, names and the seed decide, other data are refused."""

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import real_data

from scellfm import DataError, OptionError, ScellfmWarning
from scellfm.data import hold_out
from scellfm.rosa.expression import read_expression
from scellfm.rosa.hold_outs import QUADRANTS, families_of, hold_out_grid, region_sets


def some_cells(n_cells: int = 60, n_genes: int = 80, seed: int = 0) -> anndata.AnnData:
    "Counts of four donors and three types; genes on six chromosomes."
    draws = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {"donor": draws.choice(list("wxyz"), n_cells), "cell_type": draws.choice(["B", "T", "NK"], n_cells)},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame({"chrom": draws.choice([f"chr{i}" for i in range(1, 7)], n_genes)})
    var.index = [f"G{i:03d}" for i in range(n_genes)]
    return anndata.AnnData(draws.poisson(1.0, (n_cells, n_genes)).astype(np.float32), obs=obs, var=var)


def parts(grid) -> dict:
    "Everything that a grid decided, by name."
    genes = zip(grid.genes, grid.gene_part, grid.context, grid.stopping)
    return {name: rest for name, *rest in genes} | dict(zip(grid.cells, grid.cell_part))


@pytest.mark.parametrize("genes", ["random", "chromosome"])
@pytest.mark.parametrize("cells", ["random", "donor", "cell_type"])
def test_schemes_depend_on_names_and_seed_alone(genes, cells):
    adata = some_cells()
    grid = hold_out_grid(adata, genes=genes, cells=cells, seed=3)
    turned = adata[::-1, np.random.default_rng(1).permutation(adata.n_vars)].copy()
    assert parts(hold_out_grid(turned, genes=genes, cells=cells, seed=3)) == parts(grid)
    assert any(parts(hold_out_grid(adata, genes=genes, cells=cells, seed=s)) != parts(grid) for s in (4, 5, 6))
    for column, part, table in (("chrom", grid.gene_part, adata.var), (cells, grid.cell_part, adata.obs)):
        if column in table and (genes == "chromosome" or table is adata.obs):
            assert not set(table[column][part == "test"]) & set(table[column][part == "train"])


def test_quadrants_do_not_overlap_and_context_is_never_scored():
    grid = hold_out_grid(some_cells(), cells="donor", context=0.4)
    seen = np.zeros((60, 80), dtype=int)
    for name in QUADRANTS:
        rows, columns = grid.quadrant(name)
        seen[np.ix_(rows, columns)] += 1
    assert seen.max() == 1 and not seen[:, grid.context].any() and seen[:, ~grid.context].all()
    assert grid.context.sum() == round(0.4 * grid.n_genes("train"))
    assert not (grid.context | grid.stopping)[grid.gene_part != "train"].any() and grid.stopping.any()
    everything = hold_out_grid(some_cells(), context=1.0)
    assert everything.table().loc["new cells", "genes"] == 0


def test_families_stay_together():
    adata = some_cells()
    pairs = [(f"G{i:03d}", f"G{i + 1:03d}") for i in range(0, 60, 3)]
    families = families_of(pairs, adata.var_names)
    grid = hold_out_grid(adata, genes=families)
    part = dict(zip(grid.genes, grid.gene_part))
    assert all(part[a] == part[b] for a, b in pairs) and set(part.values()) == {"train", "test"}


def test_a_pair_with_a_missing_gene_makes_no_family_of_the_missing():
    pairs = pd.DataFrame({"gene": ["A", "B", "C"], "paralog": ["D", None, None]})
    with pytest.warns(ScellfmWarning, match="2 of 3 pairs name only one gene"):
        families = families_of(pairs, ["A", "B", "C", "D"])
    assert families["A"] == families["D"] and families[["A", "B", "C"]].nunique() == 3 and "nan" not in families.index


def test_a_region_without_a_set_is_none():
    positions = pd.DataFrame({"gene": ["A", "B"], "chrom": ["chr1", "chr1"], "tss": [50, 150]})
    regions = pd.DataFrame({0: ["chr1", "chr1"], 1: [0, 100], 2: [100, 200], 3: ["train", None]})
    with pytest.warns(ScellfmWarning, match="1 of 2 regions lack a position or a set"):
        sets = region_sets(positions, regions)
    assert sets.to_dict() == {"A": "train", "B": "unused"}


def test_folds_of_a_user_and_of_borzoi():
    adata = some_cells()
    folds = {name: f"fold{i % 8}" for i, name in enumerate(adata.var_names)}
    grid = hold_out_grid(adata, genes=folds, held_genes=["fold3", "fold4"])
    assert {folds[g] for g, part in zip(grid.genes, grid.gene_part) if part == "test"} == {"fold3", "fold4"}
    del folds["G000"]
    with pytest.warns(ScellfmWarning, match="1 of 80 genes have no group"):
        assert hold_out_grid(adata, genes=folds, held_genes="fold3").gene_part[0] == "unused"


def test_a_file_of_folds_such_as_borzois_holds_out_the_genes_of_its_regions(tmp_path):
    adata = some_cells()
    starts = np.arange(80) * 1000 + 500
    positions = pd.DataFrame({"gene": adata.var_names, "chrom": "chr1", "tss": starts})
    rows = [f"chr1\t{i * 10_000}\t{(i + 1) * 10_000 + 200}\tfold{i}" for i in range(8)]  # neighbours overlap
    (tmp_path / "sequences_human.bed").write_text("\n".join(rows + ["chr1\t2000\t9000\tfold0"]) + "\n")
    folds = region_sets(positions, tmp_path / "sequences_human.bed")
    grid = hold_out_grid(adata, genes=folds, held_genes=["fold3", "fold4"])
    held = grid.genes[grid.gene_part == "test"]
    assert set(held) == set(adata.var_names[(starts >= 30_000) & (starts < 50_000)])
    assert not set(folds[held]) & set(folds[grid.genes[grid.gene_part == "train"]])


def test_a_split_of_cells_is_taken_as_it_is():
    adata = some_cells()
    split = hold_out(adata, by="donor", fractions=(0.5, 0.25, 0.25))
    with pytest.warns(ScellfmWarning, match="are not used"):
        grid = hold_out_grid(adata, cells=split)
    assert np.array_equal(np.flatnonzero(grid.cell_part == "test"), split.test)


def test_regions_of_enformer():
    folder = real_data("seq2cells-toy")
    table = pd.read_csv(folder / "toy_tss.bed", sep="\t", header=None)
    positions = pd.DataFrame({"gene": table[8], "chrom": table[0], "tss": table[1]})
    sets = region_sets(positions, folder / "enformer_sequence.bed")
    assert len(sets) == 50 and set(sets) <= {"train", "valid", "test", "unused"} and (sets == "train").sum() > 25
    bed = pd.read_csv(folder / "enformer_sequence.bed", sep="\t", header=None)
    for gene, chrom, tss in positions.itertuples(index=False):
        holds = set(bed[(bed[0] == chrom) & (bed[1] <= tss) & (bed[2] > tss)][3])
        assert sets[gene] == (holds.pop() if len(holds) == 1 else "unused")


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"genes": "famly"}, DataError, "'famly' is not a column of var"),
        ({"genes": {"other": "x"}}, DataError, "has a group"),
        ({"genes": 3}, OptionError, "does not define groups"),
        ({"cells": "tissue"}, DataError, "'tissue' is not a column of obs"),
        ({"genes": "chrom", "held_genes": ["chr9"]}, DataError, "chr9"),
        ({"context": ["nonsense"]}, DataError, "not training genes"),
        ({"context": 1.5}, OptionError, "context"),
        ({"fraction": 0}, OptionError, "fraction"),
        ({"donor": "individual"}, DataError, "donor='individual'"),
        ({"cells": {f"cell{i}": "one" for i in range(60)}}, DataError, "1 groups"),
    ],
)
def test_bad_schemes_are_refused_by_name(options, error, text):
    with pytest.raises(error, match=text):
        hold_out_grid(some_cells(), **options)


@pytest.mark.parametrize("column", ["donor", "cell_type"])
def test_one_group_cannot_be_held_out(column):
    adata = some_cells()
    adata.obs[column] = "all the same"
    with pytest.raises(DataError, match="1 groups"):
        hold_out_grid(adata, cells=column)


def test_a_grid_of_other_data_is_refused():
    grid = hold_out_grid(some_cells())
    other = some_cells()
    other.obs_names = [f"{name}-1" for name in other.obs_names]
    with pytest.raises(DataError, match="the grid belongs to other data: 60 of its 60 cells"):
        grid.rows_in(read_expression(other))
    with pytest.raises(DataError, match="genes"):
        grid.rows_in(read_expression(some_cells()[:, :40].copy()))
    turned = some_cells()[::-1].copy()
    rows, columns = grid.rows_in(read_expression(turned))
    assert (turned.obs_names[rows] == grid.cells).all() and (turned.var_names[columns] == grid.genes).all()
