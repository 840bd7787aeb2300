"""Expression: the original's numbers on its own cases, and what is defined where the original raises an error."""

import json
import sys
import types

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import golden
from scipy import sparse

from scellfm import DataError, ExtraError, ScellfmWarning
from scellfm.rosa import original
from scellfm.rosa.expression import (
    bin_levels,
    counts_from_log,
    fetch_census,
    log_normalize,
    pseudobulk,
    quantile_bins,
    rank_levels,
    rank_order,
    read_expression,
    values_from_bins,
    values_from_order,
)

FOLDER = golden("rosa")


def arrays(name: str):
    "One file of recorded arrays."
    return np.load(FOLDER / f"{name}.npz", allow_pickle=False)


def record(name: str) -> dict:
    "One file of recorded settings."
    return json.loads((FOLDER / f"{name}.json").read_text())


def prepared(counts: np.ndarray, config: dict) -> np.ndarray:
    "Counts after the steps of a configuration that come before the bins, on a matrix."
    if config["total_counts"]:
        counts = original.original_normalize(counts, config["total_counts"])
    return np.log1p(counts) if config["log1p"] else counts


@pytest.mark.parametrize("number", range(len(record("transforms")["configs"])))
def test_transforms_of_the_original(number):
    recorded, config = arrays("transforms"), record("transforms")["configs"][number]
    counts, errors = recorded["counts"], record("transforms")["errors"]
    rows, whole = recorded[f"conf{number}_rowwise"], recorded[f"conf{number}_matrix"]
    values = prepared(counts, config)
    if config["n_bins"] is None:
        np.testing.assert_allclose(values, whole, rtol=1e-5)
        done = [row for row in range(len(counts)) if f"conf{number}_row{row}" not in errors]
        np.testing.assert_allclose(values[done], rows[done], rtol=1e-5)
        return
    zeros = "bin" if config["zero_bin"] else "halving"
    by_cell = original.original_bins(values, config["n_bins"], zeros=zeros)
    for row in range(len(counts)):
        expected = rows[row] if np.isfinite(rows[row]).all() else None
        if expected is not None:
            assert (by_cell[row] == expected).all(), row
    if f"conf{number}_matrix" not in errors:
        assert (original.original_bins(values, config["n_bins"], zeros=zeros, together=True) == whole).all()


def test_count_normalisation_of_the_original():
    recorded = arrays("transforms")
    np.testing.assert_allclose(
        original.original_normalize(recorded["counts"], 10), recorded["count_normalize_2d"], rtol=1e-6
    )


@pytest.mark.parametrize("n_bins", record("binning")["n_bins"])
def test_digits_and_reconstruction_of_the_original(n_bins):
    recorded = arrays("binning")
    bins, edges = original.original_digits(recorded["input"], n_bins)
    assert (bins == recorded[f"binned_{n_bins}"]).all()
    np.testing.assert_allclose(edges, recorded[f"edges_{n_bins}"], rtol=1e-6)
    back = original.original_reconstruction(bins, edges)
    np.testing.assert_allclose(back, recorded[f"reconstructed_{n_bins}"], rtol=1e-5, atol=1e-6)
    mended = original.original_reconstruction(bins, edges, biased=False)
    known = recorded["input"] > 0
    assert (mended[known] - recorded["input"][known]).mean() > (back[known] - recorded["input"][known]).mean()


def test_normalised_counts_and_logarithms_of_the_original():
    recorded = arrays("binning")
    ours = log_normalize(recorded["input"], size=1000)
    np.testing.assert_allclose(np.expm1(ours), recorded["normalized_counts"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.log1p(recorded["normalized_counts"]), recorded["log1p"], rtol=1e-5)


def test_split_of_the_original():
    recorded, settings = arrays("binning"), record("binning")
    cells, genes = settings["split_shape"]
    var, obs = original.original_split(genes, cells, settings["split_fraction"], settings["split_seed"])
    assert (var == recorded["split_var"]).all() and (obs == recorded["split_obs"]).all()


def test_masks_of_the_original():
    import torch

    recorded = arrays("masks")
    expression, allowed = recorded["expression"], recorded["mask_bool"]
    n_bins = record("provenance")["options"]["model"]["n_bins"]
    for i, (fraction, weighted) in enumerate([(0, False), (1, False), (0.2, False), (0.5, False), (0.2, True)]):
        torch.manual_seed(100 + i)
        mask = original.original_mask(expression, fraction, allowed, weighted=weighted)
        assert (mask == recorded[f"mask{i}"]).all(), i
        if f"applied{i}" in recorded:
            torch.manual_seed(200 + i)
            assert (original.original_masked(expression, mask, n_bins) == recorded[f"applied{i}"]).all(), i


def test_items_of_the_original_data_set():
    import torch

    recorded = arrays("masks")
    values, n_bins = recorded["ds_X"], record("provenance")["options"]["model"]["n_bins"]
    third = np.arange(values.shape[1]) % 3 == 0
    sampled = len(recorded["ds3_var_indices_encoder"]) + len(recorded["ds3_var_indices_decoder"])
    cases = [
        {"fraction": 0.2},
        {"fraction": 0.2, "shuffle": True},
        {"fraction": 1, "allowed": third},
        {"fraction": 0.2, "sample": sampled},
    ]
    counts = np.bincount(quantile_bins(values, n_bins, zeros="halving", together=True).ravel(), minlength=n_bins)
    for i, options in enumerate(cases):
        torch.manual_seed(400 + i)
        item = original.original_item(values[1], n_bins, **options)
        for part in ("encoder", "decoder"):
            assert (item[part][0] == recorded[f"ds{i}_var_indices_{part}"]).all(), (i, part)
            assert (item[part][1] == recorded[f"ds{i}_expression_{part}"]).all(), (i, part)
        assert (counts == recorded[f"ds{i}_counts"]).all()


def test_learning_rates_of_the_original():
    recorded, warmup = arrays("scores")["lrs"], record("provenance")["options"]["warmup"]
    ours = original.original_rates(len(recorded), warmup=warmup, total=200)
    np.testing.assert_allclose(ours, recorded, rtol=1e-9, atol=1e-12)


def test_zero_constant_and_tied_cells_are_defined():
    table = np.array([[0, 0, 0, 0], [3, 3, 3, 3], [0, 2, 2, 2]])
    for zeros in ("bin", "halving"):
        for bins in (quantile_bins(table, 8, zeros=zeros), original.original_bins(table, 8, zeros=zeros)):
            assert not bins[0].any() and len(set(bins[1])) == 1 and bins[2, 0] == 0 and bins[2, 1] == bins[1, 0]
    assert rank_order(table)[0].tolist() == [0, 1, 2, 3] and not log_normalize(table)[0].any()


def test_permuting_genes_permutes_bins():
    counts = np.random.default_rng(1).poisson(1.0, (5, 60))
    order = np.random.default_rng(2).permutation(60)
    assert (quantile_bins(counts)[:, order] == quantile_bins(counts[:, order])).all()


def test_ways_back():
    counts = np.random.default_rng(0).poisson(2.0, (20, 80)) + 1
    logs, totals = log_normalize(counts), counts.sum(axis=1)
    np.testing.assert_allclose(counts_from_log(logs, totals), counts)
    bins = quantile_bins(logs, 8)
    near = values_from_bins(bins, bin_levels(logs, bins, 8))
    assert np.corrcoef(near.ravel(), logs.ravel())[0, 1] > 0.9
    back = values_from_order(rank_order(logs), rank_levels(logs))
    np.testing.assert_allclose(np.sort(back, axis=1), np.tile(np.sort(rank_levels(logs)), (20, 1)))


def test_counts_are_read_from_raw_where_x_holds_logarithms():
    counts = np.random.default_rng(0).poisson(2.0, (6, 9)).astype(np.float32)
    adata = anndata.AnnData(sparse.csr_matrix(np.log1p(counts)))
    adata.var_names = [f"ENSG{i:011d}.3" for i in range(9)]
    adata.raw = anndata.AnnData(sparse.csr_matrix(counts), var=adata.var)
    found = read_expression(adata)
    assert found.counts and (found.values.toarray() == counts).all() and found.genes[4] == "ENSG00000000004"
    with pytest.warns(ScellfmWarning, match="not counts"):
        assert not read_expression(anndata.AnnData(adata.X, var=adata.var)).counts


def test_pseudobulk_sums_by_donor_and_type_and_lists_what_is_left_out():
    obs = pd.DataFrame(
        {"donor": ["a", "a", "b", "b", None, "a"], "type": pd.Categorical(["T", "T", "T", "B", "B", "T"])},
        index=[f"c{i}" for i in range(6)],
    )
    adata = anndata.AnnData(np.arange(12).reshape(6, 2).astype(np.float32), obs=obs)
    adata.var_names = ["A", "B"]
    bulk = pseudobulk(adata, donor="donor", cell_type="type", min_cells=2)
    assert bulk.obs_names.tolist() == ["a | T"] and bulk.X.toarray().tolist() == [[12, 15]]
    assert bulk.uns["pseudobulk"]["left_out"] == {"b | B": 1, "b | T": 1}
    assert bulk.uns["pseudobulk"]["without_group"] == 1 and bulk.obs["type"].tolist() == ["T"]


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda a: a.obs.drop(columns="donor", inplace=True), "'donor' is not a column"),
        (lambda a: a.X.__setitem__((0, 0), np.nan), "missing or infinite"),
        (lambda a: a.X.__setitem__((0, 0), -1), "negative"),
        (lambda a: setattr(a, "var_names", ["A", "A"]), "have no name or a repeated one"),
        (lambda a: None, "no donor has 50 cells"),
    ],
)
def test_bad_cells_are_refused_by_name(change, text):
    obs = pd.DataFrame({"donor": ["a", "b"], "cell_type": ["T", "T"]}, index=["x", "y"])
    adata = anndata.AnnData(np.ones((2, 2), np.float32), obs=obs)
    adata.var_names = ["A", "B"]
    change(adata)
    with pytest.raises(DataError, match=text):
        pseudobulk(adata)


def test_the_census_is_asked_for_the_right_file(tmp_path, monkeypatch):
    asked = []

    def download(dataset, to_path, census_version):
        asked.append((dataset, census_version))
        with open(to_path, "w") as file:
            file.write("cells")

    monkeypatch.setitem(sys.modules, "cellxgene_census", types.SimpleNamespace(download_source_h5ad=download))
    path = fetch_census(tmp_path, "some-id", version="2025-01-30")
    assert path.read_text() == "cells" and asked == [("some-id", "2025-01-30")]
    assert fetch_census(tmp_path, "some-id") == path and len(asked) == 1
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(ExtraError, match=r"scellfm\[census\]"):
        fetch_census(tmp_path, "other")
