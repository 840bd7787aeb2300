"""Value binning and tokens: equal to the original's where it is right, and the same in every run where it draws."""

import json

import numpy as np
import pytest
import torch
from conftest import golden
from scipy import sparse

from scellfm.baselines import LogNormalize
from scellfm.core import DataError, OptionError
from scellfm.scgpt.binning import KeyedDraws, OriginalDraws, bin_edges, bin_values, digitize
from scellfm.scgpt.tokenizer import BinnedCells, encode_cell, mask_coins, mask_share, table_cells

FOLDER = golden("scgpt")


def recorded(name):
    return json.loads((FOLDER / f"{name}.json").read_text()), np.load(FOLDER / f"{name}.npz")


def binning_cases():
    meta, arrays = recorded("binning")
    return [name for name in meta if f"{name}__y" in arrays]


@pytest.mark.parametrize("name", binning_cases())
def test_bins_are_the_originals(name):
    meta, arrays = recorded("binning")
    case, x = meta[name], arrays[f"{name}__x"]
    draws = OriginalDraws(case["np_random_seed"]).random(np.count_nonzero(x))
    bins = bin_values(x, case["n_bins"], draws=draws)
    assert np.array_equal(bins, arrays[f"{name}__y"])
    if f"{name}__edges" in arrays:
        seen = x[x != 0]
        assert np.array_equal(bin_edges(seen, case["n_bins"]), arrays[f"{name}__edges"])
        assert np.array_equal(draws, arrays[f"{name}__rands"])
        assert np.array_equal(digitize(seen, arrays[f"{name}__edges"]), arrays[f"{name}__left"])
    if f"{name}__y_torch" in arrays:  # a tensor gives whole numbers of the same value
        assert np.array_equal(bins, arrays[f"{name}__y_torch"])
    if case.get("deterministic"):
        assert np.array_equal(bins, bin_values(x, case["n_bins"], draws=1 - draws))


def test_digitize_is_the_originals():
    meta, arrays = recorded("binning")
    names = {key.split("__")[1] for key in arrays if key.startswith("digitize__")}
    assert names, "no recorded cases of digitize"
    x, edges = arrays["digitize__x"], arrays["digitize__bins"]
    assert np.array_equal(digitize(x, edges), arrays["digitize__one"])
    seed = meta["digitize"]["np_random_seed"]
    assert np.array_equal(digitize(x, edges, OriginalDraws(seed).random(len(x))), arrays["digitize__both"])


def collator_runs():
    return list(recorded("collator")[0]["collator"])


@pytest.mark.parametrize("run", collator_runs())
def test_batches_are_the_original_collators(run):
    meta, arrays = recorded("collator")
    case, cells = meta["collator"][run], []
    args, draws = case["args"], OriginalDraws(case["seed"])
    for i in range(case["n_examples"]):
        genes, values = arrays[f"{run}__in{i}_genes"], arrays[f"{run}__in{i}_expr"]
        cells.append(
            encode_cell(
                genes[1:],
                values[1:],
                cls=genes[0],
                cls_value=args["pad_value"],
                draws=draws,
                max_length=args["max_length"],
                n_bins=51 if args["do_binning"] else None,
                overlong="sample" if args["sampling"] else "first",
            )
        )
    genes, values, mask = BinnedCells.of(cells).batch(range(len(cells)), args["pad_token_id"], args["pad_value"])
    assert np.array_equal(genes, arrays[f"{run}__gene"])
    assert np.array_equal(values, arrays[f"{run}__expr"])
    assert np.array_equal(mask, arrays[f"{run}__gene"] != args["pad_token_id"])
    if args["do_mlm"]:
        generator = torch.Generator().manual_seed(case["seed"])
        hidden = mask_coins(
            values,
            args["mlm_probability"],
            generator=generator,
            keep_first=args["keep_first_n_tokens"],
            pad_value=args["pad_value"],
        )
        assert np.array_equal(hidden, arrays[f"{run}__masked_expr"])
        assert (hidden == -1).any()


@pytest.mark.parametrize("run", [name for name in recorded("collator")[0]["tokenize"] if name != "random_mask"])
def test_fine_tuning_tokens_are_the_originals(run):
    meta, arrays = recorded("collator")
    case = meta["tokenize"][run]
    cells = table_cells(
        arrays["tok__data"],
        arrays["tok__gene_ids"],
        cls=meta["cls_id"] if case["append_cls"] else None,
        max_length=case["max_len"],
        include_zero=case["include_zero_gene"],
        draws=OriginalDraws(case["seed"]),
    )
    genes, values, _ = cells.batch(range(len(cells)), meta["pad_id"], meta["pad_value"])
    assert np.array_equal(genes, arrays[f"tok_{run}__genes"])
    assert np.array_equal(values, arrays[f"tok_{run}__values"])


def test_hidden_share_is_the_originals():
    meta, arrays = recorded("collator")
    case = meta["tokenize"]["random_mask"]
    hidden = mask_share(
        arrays[case["input"]],
        case["mask_ratio"],
        draws=OriginalDraws(case["seed"]),
        mask_value=case["mask_value"],
        pad_value=meta["pad_value"],
    )
    assert np.array_equal(hidden, arrays["random_mask__out"])


def test_bins_of_the_preprocessed_cells_are_the_originals():
    arrays = np.load(FOLDER / "preprocess.npz")
    draws = OriginalDraws(int(arrays["np_random_seed"]))
    table, edges = arrays["X_log1p"], arrays["bin_edges"]
    n_bins = edges.shape[1]
    for row, bins, edge in zip(table, arrays["X_binned"], edges):
        assert np.array_equal(bin_values(row, n_bins, draws=draws.random(np.count_nonzero(row))), bins)
        assert np.array_equal(bin_edges(row[row != 0], n_bins), edge[1:])


def test_log_normalised_cells_are_the_originals():
    arrays = np.load(FOLDER / "preprocess.npz")
    counts = sparse.csr_matrix(arrays["counts"])
    logged = LogNormalize().fit_transform(counts).toarray()
    np.testing.assert_allclose(logged, arrays["X_log1p"], atol=2e-6)
    np.testing.assert_allclose(np.expm1(arrays["X_log1p"].astype(np.float64)).sum(1), 1e4, rtol=1e-5)
    assert np.array_equal(
        arrays["X_normed"], arrays["X_log1p"]
    )  # the original's log works in place on what it calls normalised
    assert np.array_equal(counts.toarray(), arrays["X_after"])  # and neither it nor we change X


def test_draws_belong_to_the_cell():
    counts = np.random.default_rng(0).poisson(1.5, 300) + 1
    bins = [
        bin_values(counts, draws=KeyedDraws(seed).cell(name, i).random(300))
        for seed, name, i in ((0, "a", 0), (0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    assert np.array_equal(bins[0], bins[1])
    assert all(not np.array_equal(bins[0], other) for other in bins[2:])


def test_the_original_streams_leave_the_global_state_alone():
    np.random.seed(3)
    torch.manual_seed(3)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    draws = OriginalDraws(9)
    draws.random(5), draws.permutation(5), draws.choice(5, 2)
    assert np.array_equal(before[0], np.random.get_state()[1])
    assert torch.equal(before[1], torch.random.get_rng_state())


def test_top_keeps_the_highest_values_of_the_whole_cell():
    values = np.random.default_rng(0).permutation(np.arange(1.0, 101))
    genes, binned = encode_cell(np.arange(100), values, cls=200, max_length=21, overlong="top")
    assert set(genes[1:]) == set(np.argsort(-values)[:20])
    assert binned[1:].min() >= bin_values(values).max() * 0.75  # bins come from all genes, not from those that stay


def test_bad_values_and_options_are_refused():
    with pytest.raises(DataError, match="value 1 of the cell is nan"):
        bin_values(np.array([1.0, np.nan]))
    with pytest.raises(OptionError, match="n_bins=2"):
        bin_values(np.array([1.0, 2.0]), n_bins=2)
    with pytest.raises(OptionError, match="overlong='tops' is not known.*Did you mean 'top'"):
        encode_cell(np.arange(9), np.arange(1.0, 10), cls=9, max_length=4, overlong="tops")
    assert bin_values(np.zeros(4)).tolist() == [0, 0, 0, 0]
