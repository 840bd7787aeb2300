"""The simple methods: right, repeatable, blind to held-out cells, sparse."""

import tracemalloc

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone

import scellfm as sf
from scellfm.baselines import (
    GroupMeans,
    LogNormalize,
    SparsePCA,
    VariableGenes,
    count_classifiers,
    count_features,
    ridge,
)
from scellfm.core import DataError


@pytest.fixture(scope="module")
def demo():
    adata = sf.data.demo()
    return adata.X, adata.obs["cell_type"].to_numpy().astype(str)


@pytest.mark.parametrize("n_genes", [50, 300])
def test_variable_genes_are_scanpys(demo, n_genes):
    import anndata
    import scanpy as sc

    counts = demo[0]
    logged = LogNormalize().fit_transform(counts)
    theirs = anndata.AnnData(logged.copy())
    sc.pp.highly_variable_genes(theirs, n_top_genes=n_genes)
    assert VariableGenes(n_genes).fit(logged).genes_.tolist() == np.flatnonzero(theirs.var["highly_variable"]).tolist()


def test_features_equal_a_dense_pca(demo):
    counts = demo[0]
    logged = LogNormalize().fit_transform(counts).toarray()
    left, values, _ = np.linalg.svd(logged - logged.mean(0), full_matrices=False)
    ours = count_features().fit_transform(counts)
    assert np.allclose(np.abs(ours[:, :20]), np.abs((left * values)[:, :20]), atol=1e-6)


@pytest.mark.parametrize("name", ["PCA + logistic regression", "PCA + kNN", "majority class"])
def test_held_out_cells_change_nothing(demo, name):
    counts, labels = demo
    train, test = slice(0, 500), slice(500, 700)
    alone = count_classifiers()[name].fit(counts[train], labels[train])
    louder = sparse.csr_matrix(counts[test] * 7)
    assert np.allclose(alone.predict_proba(counts[test]), alone.predict_proba(louder), atol=1e-9)  # depth is taken out
    one_by_one = np.vstack([alone.predict_proba(counts[i]) for i in range(500, 510)])
    assert np.allclose(one_by_one, alone.predict_proba(counts[test])[:10], atol=1e-9)
    again = count_classifiers()[name].fit(counts[train], labels[train])
    assert (alone.predict_proba(counts[test]) == again.predict_proba(counts[test])).all()
    clone(alone)


def test_variable_genes_are_chosen_on_the_fitted_cells_only():
    generator = np.random.default_rng(0)
    counts = generator.poisson(2, (200, 300)).astype(float)
    counts[100:, 7] = np.where(generator.random(100) < 0.1, 20, 0)  # the same mean, but bursts in held-out cells only
    fitted = VariableGenes(20).fit(LogNormalize().fit_transform(counts[:100]))
    every = VariableGenes(20).fit(LogNormalize().fit_transform(counts))
    assert 7 in every.genes_ and 7 not in fitted.genes_


def test_classifiers_beat_the_majority_on_real_cells(demo):
    counts, labels = demo
    test = np.arange(700) % 5 == 0
    score = {
        name: e.fit(counts[~test], labels[~test]).score(counts[test], labels[test])
        for name, e in count_classifiers().items()
    }
    assert score["PCA + logistic regression"] > 0.7 and score["PCA + kNN"] > 0.65
    assert score["majority class"] == pytest.approx((labels[test] == "Dendritic").mean())


@pytest.mark.parametrize(
    "convert",
    [sparse.csc_matrix, sparse.coo_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64), sparse.csr_array],
)
def test_every_kind_of_matrix_gives_the_same(demo, convert):
    counts, labels = demo
    counts = sparse.csr_matrix(counts[:100])
    expected = count_classifiers()["PCA + kNN"].fit(counts, labels[:100]).predict_proba(counts)
    assert np.allclose(
        count_classifiers()["PCA + kNN"].fit(convert(counts), labels[:100]).predict_proba(convert(counts)), expected
    )


def test_few_cells_and_empty_cells_are_no_obstacle(demo):
    counts, labels = demo
    few = np.r_[np.flatnonzero(labels == "Dendritic")[:3], np.flatnonzero(labels == "CD19+ B")[:3]]
    for estimator in count_classifiers().values():
        estimator.fit(counts[few], labels[few])
        empty = estimator.predict_proba(sparse.csr_matrix((2, counts.shape[1])))
        assert np.isfinite(empty).all() and np.allclose(empty.sum(1), 1)


def test_the_input_is_not_changed(demo):
    counts, labels = demo
    before = counts.data.copy()
    count_classifiers()["PCA + kNN"].fit(counts, labels).predict(counts)
    assert (counts.data == before).all()


def test_memory_follows_what_is_stored():
    generator = np.random.default_rng(0)
    n, genes, per_cell = 4000, 20000, 50
    columns = np.sort(generator.integers(0, genes, (n, per_cell)), axis=1).ravel()
    counts = sparse.csr_matrix((np.ones(n * per_cell), columns, np.arange(n + 1) * per_cell), (n, genes))
    tracemalloc.start()
    count_features().fit(counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6 < n * genes * 8 / 10  # a dense matrix would take 640 MB


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_what_is_no_count_is_refused(value):
    counts = sparse.csr_matrix([[0, 2.0, 1], [1, 0, value]])
    with pytest.raises(DataError, match="cell 1, gene 2"):
        LogNormalize().fit_transform(counts)


def test_nothing_to_learn_from_is_named():
    with pytest.raises(DataError, match="no gene varies"):
        count_classifiers()["PCA + kNN"].fit(sparse.csr_matrix((5, 4)), ["a", "b", "a", "b", "a"])
    with pytest.raises(DataError, match="two cells and two genes"):
        SparsePCA().fit(sparse.csr_matrix([[1.0, 2.0]]))


def test_means_of_groups():
    generator = np.random.default_rng(0)
    groups, y = generator.choice(["a", "b", "c"], 50), generator.normal(size=50)
    fitted = GroupMeans().fit(groups.reshape(-1, 1), y)
    assert fitted.predict([["b"], ["zzz"]]) == pytest.approx([y[groups == "b"].mean(), y.mean()])
    assert fitted.score(groups, y) >= 0


def test_ridge_chooses_a_strong_penalty_for_noise():
    generator = np.random.default_rng(0)
    X, noise = generator.normal(size=(60, 50)), generator.normal(size=60)
    assert ridge().fit(X, noise)[-1].alpha_ > 100 * ridge().fit(X, X @ np.ones(50))[-1].alpha_
