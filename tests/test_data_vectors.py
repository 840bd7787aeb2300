"""Gene vectors: joined by name, complete on the disk, and honest about genes that have none."""

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scellfm import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.data import GeneVectors


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    return GeneVectors([f"G{i}" for i in range(30)], rng.normal(2, 1, (30, 8)), manifest={"source": "test"})


def test_the_order_of_rows_changes_nothing(table):
    order = np.random.default_rng(1).permutation(30)
    other = GeneVectors(table.genes[order], table.values[order])
    names = [f"G{i}" for i in (3, 9, 27, 40)]
    for method in ("permuted", "random_like"):
        first, second = (getattr(vectors, method)(seed=4).frame() for vectors in (table, other))
        pd.testing.assert_frame_equal(first, second.loc[first.index])
    for missing in ("mean", "zeros", "random"):
        with pytest.warns(ScellfmWarning, match="3 of 4 genes have a vector"):
            first, second = (vectors.take(names, missing=missing).values for vectors in (table, other))
        np.testing.assert_allclose(first, second, atol=1e-6)
    first, second = (vectors.pca(3, fit_on=table.genes[:20]).frame() for vectors in (table, other))
    np.testing.assert_allclose(first, second.loc[first.index], atol=1e-5)


def test_a_gene_without_a_vector_is_filled_flagged_counted_and_told(table):
    with pytest.warns(ScellfmWarning, match="2 of 4 genes have a vector; without one are e.g. .'NEW', 'OTHER'"):
        some = table.take(["NEW", "G3", "OTHER", "G1"])
    assert some.covered.tolist() == [False, True, False, True]
    np.testing.assert_allclose(some.values[0], table.values.mean(0), atol=1e-5)
    np.testing.assert_array_equal(some.values[[1, 3]], table.values[[3, 1]])
    step = some.manifest["steps"][-1]
    assert step == {
        "step": "take",
        "genes": 4,
        "missing": 2,
        "missing_genes": ["NEW", "OTHER"],
        "treatment": "mean",
        "seed": 0,
    }
    with pytest.warns(ScellfmWarning, match="1 of 2 genes"):  # what was filled in once does not become a vector
        assert some.take(["NEW", "G1"], missing="zeros").values[0].tolist() == [0] * 8


def test_random_rows_depend_on_seed_and_name_alone(table):
    with pytest.warns(ScellfmWarning):
        first = table.take(["NEW", "G1", "OTHER"], missing="random").frame()
        second = table.take(["OTHER", "G1", "NEW", "MORE"], missing="random").frame()
        third = table.take(["NEW", "G1"], missing="random", seed=1).frame()
    pd.testing.assert_frame_equal(first, second.loc[first.index])
    assert not np.allclose(first.loc["NEW"], third.loc["NEW"])
    length = np.median(np.linalg.norm(table.values, axis=1))
    assert np.linalg.norm(first.loc["NEW"]) == pytest.approx(length, rel=1e-5)


def test_components_know_nothing_of_genes_they_were_not_fitted_on(table):
    changed = GeneVectors(table.genes, np.vstack([table.values[:20], table.values[20:] * 50]))
    first, second = (vectors.pca(4, fit_on=table.genes[:20]) for vectors in (table, changed))
    np.testing.assert_array_equal(first.values[:20], second.values[:20])
    centred = table.values[:20] - table.values[:20].mean(0)
    axes = np.linalg.svd(centred.astype(float), full_matrices=False)[2][:4]
    np.testing.assert_allclose(np.abs(first.values[:20]), np.abs(centred @ axes.T), atol=1e-4)


def test_controls_keep_numbers_and_lengths_and_move_every_gene(table):
    wrong = table.permuted(seed=2)
    assert not (wrong.values == table.values).all(1).any()
    assert sorted(map(tuple, wrong.values)) == sorted(map(tuple, table.values))
    lengths = np.linalg.norm(table.values, axis=1)
    np.testing.assert_allclose(np.linalg.norm(table.random_like(seed=2).values, axis=1), lengths, rtol=1e-5)
    assert not np.array_equal(table.permuted(seed=3).values, wrong.values)


def test_joined_sources_are_aligned_by_name(table):
    other = GeneVectors(["G2", "X", "G0"], np.arange(24).reshape(3, 8))
    both = GeneVectors.concatenate({"a": table, "b": other})
    assert list(both.genes) == [*table.genes, "X"] and both.width == 16
    frame = both.frame()
    np.testing.assert_array_equal(frame.loc["G2"], np.r_[table.values[2], other.values[0]])
    np.testing.assert_allclose(frame.loc["G7"].to_numpy()[8:], other.values.mean(0), rtol=1e-6)
    assert both.manifest["genes_covered"] == {"a": 30, "b": 3} and both.covered.all()
    mean = GeneVectors.average([table, other]).frame()
    np.testing.assert_allclose(mean.loc["G0"], (table.values[0] + other.values[2]) / 2, rtol=1e-6)
    np.testing.assert_allclose(mean.loc["G7"], table.values[7], rtol=1e-6)
    scaled = GeneVectors.concatenate([table, other], scale=True).values
    assert np.linalg.norm(scaled[:30, :8], axis=1).mean() == pytest.approx(1, rel=1e-5)


def test_saved_vectors_come_back_and_the_same_vectors_are_the_same_bytes(table, tmp_path):
    with pytest.warns(ScellfmWarning):
        some = table.take(["G4", "NEW", "G0"])
    some.save(tmp_path / "a")
    some.save(tmp_path / "b")
    back = GeneVectors.load(tmp_path / "a")
    assert list(back.genes) == list(some.genes) and back.manifest == some.manifest
    np.testing.assert_array_equal(back.values, some.values)
    np.testing.assert_array_equal(back.covered, some.covered)
    for name in ("vectors.safetensors", "vectors.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version 2"),
        ({"genes": ["G0", "G1"]}, "for 2 genes x 8"),
        ({"genes": [f"G{i // 2}" for i in range(30)]}, "more than once"),
        ({"width": "8"}, "fields .'width'."),
        ({"not_covered": [30]}, "not_covered"),
        ({"sha256": "0"}, "is not the file that vectors.json describes"),
        ("[]", "does not describe gene vectors"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_damaged_folder_is_refused(table, tmp_path, change, message):
    table.save(tmp_path)
    path = tmp_path / "vectors.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AssetError, match=message):
        GeneVectors.load(tmp_path)


def test_varm_holds_nan_where_a_gene_has_no_vector(table):
    adata = AnnData(np.zeros((2, 3), np.float32), var=pd.DataFrame({"name": ["G5", "NEW", "G2"]}, index=list("abc")))
    with pytest.warns(ScellfmWarning, match="2 of 3 genes"):
        table.write_varm(adata, gene_column="name")
    np.testing.assert_array_equal(adata.varm["gene_vectors"][[0, 2]], table.values[[5, 2]])
    assert np.isnan(adata.varm["gene_vectors"][1]).all()
    assert adata.uns["gene_vectors"]["params"]["genes_covered"] == 2


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda t: GeneVectors(["A", "A"], np.ones((2, 2))), DataError, "1 genes appear more than once"),
        (lambda t: GeneVectors(["A", ""], np.ones((2, 2))), DataError, "gene 1 of 2 is ''"),
        (lambda t: GeneVectors(["A"], [[np.nan, 1]]), DataError, "first for the gene 'A' in column 0"),
        (lambda t: GeneVectors(["A"], np.ones((2, 2))), DataError, r"shape \(2, 2\) for 1 genes"),
        (lambda t: GeneVectors(["A"], [["x"]]), DataError, "not a table of numbers"),
        (lambda t: GeneVectors(["A"], [[1.0]], [1]), DataError, "covered is int"),
        (lambda t: GeneVectors(["A"], [[1.0]], manifest={"a": object()}), OptionError, "JSON"),
        (lambda t: t.take(["ENSG1", "ENSG2"]), DataError, "only 0 of 2 genes .* both symbols, or both Ensembl ids"),
        (lambda t: t.take(["G1", "NEW"], missing="error"), DataError, "add vectors for them"),
        (lambda t: t.take(["G1"], missing="median"), OptionError, "missing='median'"),
        (lambda t: t.take("G1"), DataError, "is one text"),
        (lambda t: t.pca(5, fit_on=["G1", "G2"]), DataError, "n=5 components need at least 6 genes"),
        (lambda t: t.pca(9, fit_on=t.genes), DataError, "the width is 8"),
        (lambda t: GeneVectors.average([t, t.pca(2, fit_on=t.genes)]), DataError, r"widths \[8, 2\]"),
        (lambda t: GeneVectors.concatenate([]), OptionError, "one or more GeneVectors"),
        (lambda t: GeneVectors.concatenate([t, 5]), OptionError, "one or more GeneVectors"),
    ],
)
def test_bad_inputs_are_named(table, wrong, error, message):
    with pytest.raises(error, match=message):
        wrong(table)
