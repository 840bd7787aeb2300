"""The demonstration cells are the counts that were measured, and the evidence for it travels with them."""

import warnings

import numpy as np
import pytest
from scipy import sparse

from scellfm.core import DataError
from scellfm.data.demonstration import demo, recover_counts
from scellfm.data.reading import check_counts


def normalised(counts):
    "Log-normalised in float32, as scanpy stores it."
    scaled = counts / counts.sum(axis=1, keepdims=True) * 1e4
    return sparse.csr_matrix(np.log1p(scaled).astype(np.float32))


def simulated(n_cells=200, n_genes=300, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.lognormal(-0.5, 1.2, n_genes), (n_cells, n_genes)).astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_counts_come_back_from_their_logarithms(seed):
    counts = simulated(seed=seed)
    recovered, deviation, unit = recover_counts(normalised(counts))
    assert (recovered.toarray() == counts).all()
    assert recovered.dtype == np.float32 and deviation.max() < 0.1
    assert unit == pytest.approx(1e4 / counts.sum(axis=1), rel=1e-4)


def test_odd_counts_without_a_one_show_in_the_deviation():
    counts = simulated()
    counts[7][counts[7] == 1] = 0
    assert 3 in counts[7] and 2 in counts[7]
    deviation = recover_counts(normalised(counts))[1]
    assert deviation[7] == pytest.approx(0.5, abs=0.1) and np.delete(deviation, 7).max() < 0.1


def test_the_input_is_not_changed():
    logged = normalised(simulated())
    before = logged.copy()
    recover_counts(logged)
    assert (logged != before).nnz == 0


def test_an_empty_cell_is_refused():
    counts = simulated()
    counts[4] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logged = sparse.csr_matrix(np.nan_to_num(normalised(counts).toarray()))
    with pytest.raises(DataError, match="cell 4 of 200.*empty cells"):
        recover_counts(logged)


def test_the_demonstration_cells_are_counts_with_evidence():
    adata = demo()
    assert (
        adata.shape == (700, 765)
        and sparse.issparse(adata.X)
        and adata.X.format == "csr"
        and adata.X.dtype == np.float32
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_counts(adata)
    assert adata.obs["cell_type"].nunique() == 10
    assert (adata.obs["n_counts"] == np.asarray(adata.X.sum(axis=1)).ravel()).all()
    assert (adata.obs["n_counts"] < adata.obs["n_counts_all_genes"]).all()
    evidence = adata.uns["counts_recovered"]
    assert evidence["deviation"] < 0.15 and abs(evidence["smallest_count_high"] - 1) < 0.01 > abs(
        evidence["smallest_count_low"] - 1
    )
    assert 0.1 < evidence["share_of_total_low"] < evidence["share_of_total_high"] < 0.3


def test_the_demonstration_cells_normalise_back_to_what_scanpy_ships():
    import scanpy

    adata, source = demo(), scanpy.datasets.pbmc68k_reduced()
    again = adata.X.multiply(1e4 / adata.obs["n_counts_all_genes"].to_numpy()[:, None]).log1p()
    assert abs(again - source.raw.X).max() < 2e-3
    assert (adata.obs["cell_type"].astype(str) == source.obs["bulk_labels"].astype(str)).all()


def test_other_values_are_refused(monkeypatch):
    import scanpy

    source = scanpy.datasets.pbmc68k_reduced()
    other = source.raw.to_adata()
    other.X = other.X * 0.9
    source.raw = other
    monkeypatch.setattr(scanpy.datasets, "pbmc68k_reduced", lambda: source)
    with pytest.raises(DataError, match="pbmc68k_reduced of scanpy.*install scanpy"):
        demo()


def test_the_demonstration_cells_can_be_written_and_are_the_same_each_time(tmp_path):
    from scellfm.data.reading import read

    demo().write_h5ad(tmp_path / "demo.h5ad")
    again = read(tmp_path / "demo.h5ad")
    assert (again.X != demo().X).nnz == 0 and again.uns["counts_recovered"]["deviation"] == demo().uns[
        "counts_recovered"
    ]["deviation"]
