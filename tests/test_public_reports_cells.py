"""Cells as users bring them: names that repeat, splits of other cells, counts that are odd, views of files on disk."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scellfm.core import DataError, OptionError, ScellfmWarning
from scellfm.data import folds, hold_out
from scellfm.data.splits import Split, by_occurrence
from scellfm.geneformer import RankTokenizer

GENES = [f"ENSG{i:011d}" for i in range(30)]
NONE = np.empty(0, np.int64)


def cells(n=120, names=None):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {"cell_type": np.tile(["B", "T"], n // 2), "donor": np.repeat(["x", "y", "z"], n // 3)},
        index=[f"c{i}" for i in range(n)] if names is None else names,
    )
    counts = sparse.csr_matrix(rng.poisson(3.0, (n, 30)).astype(np.float32))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=GENES))


def test_each_occurrence_of_a_name_is_a_cell_of_its_own():
    assert list(by_occurrence(["a", "b", "a", "a"])) == ["a", "b", "a\x1f1", "a\x1f2"]
    from scellfm.crossfit.membership import TrainedOn, keys_of

    names = pd.Index(["a", "b", "a", "c"])
    assert len(set(keys_of(names))) == 4 and keys_of(names)[0] == keys_of(["a"])[0]
    trained_on = TrainedOn.of(names, [Split(np.array([0, 1]), NONE, np.array([2, 3]), None, 4)])
    assert (trained_on.fold_of(names) == [-2, -2, 0, 0]).all()


@pytest.mark.parametrize("deal", [lambda adata: hold_out(adata), lambda adata: folds(adata, k=3)])
def test_cells_with_repeated_names_are_split_and_all_kept(deal):
    split = deal(cells(names=["same"] * 60 + [f"c{i}" for i in range(60)]))
    for one in split.folds():
        assert sorted(np.concatenate([one.train, one.valid, one.test])) == list(range(120))
        assert 0 < (one.test < 60).sum() < 60, "cells of one name are dealt to several parts"


def test_unique_names_are_split_as_before():
    first = hold_out(cells(), seed=3)
    order = np.random.default_rng(0).permutation(120)
    again = hold_out(cells()[order].copy(), seed=3)
    assert set(order[again.test]) == set(first.test)


@pytest.mark.parametrize("rows", [[0, 120], [-1, 3], [10**9]])
def test_a_split_of_cells_that_are_not_there_is_refused_when_it_is_made(rows):
    with pytest.raises(DataError, match="of 120 cells"):
        Split(np.array(rows), NONE, np.array([5]), None, 120)
    with pytest.raises(DataError, match="positions"):
        Split(np.array([0.5, 1.0]), NONE, np.array([5]), None, 120)


@pytest.mark.parametrize("value", [0, -1, 10**12, 2.5, True])
def test_a_longest_sequence_that_no_cell_has_is_refused_before_the_work(value):
    with pytest.raises(OptionError, match="max_length"):
        RankTokenizer.fit(cells(), max_length=value)


def told(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(one.message) for one in caught if issubclass(one.category, ScellfmWarning)]


def test_warnings_of_the_scale_reach_who_tokenizes(tmp_path):
    tok, logged, rounded = RankTokenizer.fit(cells()), cells(), cells()
    logged.uns["log1p"] = {"base": np.array(2.0)}
    rounded.layers["counts"] = rounded.X * 30
    logged.write_h5ad(tmp_path / "logged.h5ad")
    assert told(lambda: tok(cells())) == []
    for given in (logged, tmp_path / "logged.h5ad"):
        assert any("log-transformed" in text for text in told(lambda: tok(given)))
    assert any("pass layer='counts'" in text for text in told(lambda: tok(rounded)))
    assert told(lambda: tok(rounded, layer="counts")) == []


def test_warnings_of_poor_cells_reach_who_tokenizes_and_who_checks():
    from scellfm.data import check_counts

    tok, poor = RankTokenizer.fit(cells()), cells()
    poor.X = poor.X.copy()
    poor.X.data[:] = 0
    poor.X[:, 3] = 1
    poor.X.eliminate_zeros()
    for door in (tok, check_counts):
        texts = told(lambda: door(poor))
        assert any("fewer than 20 counts" in text for text in texts)
        assert any("fewer than 10 genes" in text for text in texts)


def test_a_view_of_a_file_on_disk_is_tokenized_as_in_memory(tmp_path):
    adata = cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    tok, backed = RankTokenizer.fit(adata), anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert (tok(backed).tokens == tok(adata).tokens).all()
    assert (tok(backed[10:40]).tokens == tok(adata[10:40]).tokens).all()
    backed.file.close()


@pytest.mark.parametrize("dtype, value", [("uint64", 2**62), ("uint8", 200), ("int64", 2**60), (">f4", 3), ("bool", 1)])
def test_kept_counts_are_those_of_the_cell_in_any_number_type(dtype, value):
    adata = cells()
    expressed = adata.X.toarray() > 2
    adata.X = (expressed * np.array(value, dtype)).astype(dtype)  # sums that the type itself does not hold
    kept = RankTokenizer.fit(cells())(adata, keep_counts=True)
    for cell in range(adata.n_obs):
        counts = kept.counts[kept.offsets[cell] : kept.offsets[cell + 1]]
        np.testing.assert_allclose(counts, 1e4 / expressed[cell].sum(), rtol=1e-5)
