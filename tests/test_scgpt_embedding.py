"""ScGPT.embed: the original's vectors, the same in every run, order, block and company; and honest about what is
wrong with the input."""

import json
import time
import tracemalloc
import warnings

import anndata
import numpy as np
import pytest
import torch
from conftest import golden, real_data
from scipy import sparse
from sklearn.preprocessing import scale

from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning
from scellfm.scgpt import ScGPT, Vocabulary
from scellfm.scgpt.embedding import cell_vectors
from scellfm.scgpt.model import published_name
from scellfm.scgpt.tokenizer import tokenize

FOLDER = golden("scgpt")
META = json.loads((FOLDER / "embed" / "embed.json").read_text())
COLUMN = None if META["gene_col"] == "index" else META["gene_col"]
QUIET = pytest.mark.filterwarnings("ignore::scellfm.core.ScellfmWarning")


@pytest.fixture(scope="module")
def recorded():
    return np.load(FOLDER / "embed" / "embed.npz")


def loaded(run):
    return ScGPT.from_pretrained(FOLDER / META["runs"][run]["model"], device="cpu")


def cells_of(run):
    return anndata.read_h5ad(FOLDER / "embed" / META["runs"][run]["h5ad"])


def tokens_of(gpt, adata, **options):
    index = gpt.match(adata, gene_column=COLUMN).index
    return next(tokenize(adata, adata.obs_names, index, gpt.vocabulary, **options))[1]


def as_sets(genes, values, pad):
    "Each row as {gene: value}, whatever the order and the padding."
    rows = zip(np.asarray(genes), np.asarray(values))
    return [dict(zip(g[g != pad].tolist(), v[g != pad].tolist())) for g, v in rows]


def test_genes_are_matched_as_the_original_does(recorded):
    index = loaded("notie").match(cells_of("notie"), gene_column=COLUMN).index
    assert np.array_equal(index, recorded["id_in_vocab_all"])


@QUIET
@pytest.mark.parametrize("run", [run for run in META["runs"] if run.startswith("notie")])
def test_without_ties_the_default_gives_the_originals_vectors(recorded, run):
    gpt, adata, case = loaded(run), cells_of(run), META["runs"][run]
    cells = tokens_of(gpt, adata, max_length=case["max_length"])
    ours = as_sets(*cells.batch(range(len(cells)), gpt.vocabulary.pad)[:2], gpt.vocabulary.pad)
    assert ours == as_sets(recorded[f"{run}__genes"], recorded[f"{run}__values"], gpt.vocabulary.pad)
    assert gpt.embed(adata, gene_column=COLUMN, max_length=case["max_length"]) is None
    assert np.allclose(adata.obsm["X_scGPT"], recorded[f"{run}__X_scGPT"], rtol=0, atol=1e-6)


@QUIET
def test_original_mode_replays_the_originals_draws(recorded):
    gpt, adata, case = loaded("counts"), cells_of("counts"), META["runs"]["counts"]
    options = dict(seed=case["seed"], original=True, max_length=case["max_length"])
    cells = tokens_of(gpt, adata, **options)
    genes, values, _ = cells.batch(range(len(cells)), gpt.vocabulary.pad, gpt.model.config.pad_value)
    assert np.array_equal(genes, recorded["counts__genes"]) and np.array_equal(values, recorded["counts__values"])
    gpt.embed(adata, gene_column=COLUMN, **options)
    assert np.allclose(adata.obsm["X_scGPT"], recorded["counts__X_scGPT"], rtol=0, atol=1e-6)


@QUIET
def test_sampled_cells_are_parts_of_the_replayed_cells_and_give_the_originals_vectors(recorded):
    run = "counts_sampled"
    gpt, adata, case = loaded(run), cells_of(run), META["runs"][run]
    whole = tokens_of(gpt, adata, seed=case["seed"], original=True, max_length=10**6)
    genes, values = (torch.from_numpy(recorded[f"{run}__{name}"]) for name in ("genes", "values"))
    real = genes != gpt.vocabulary.pad
    for i, row in enumerate(as_sets(genes, values, gpt.vocabulary.pad)):
        full = dict(zip(whole[i][0].tolist(), whole[i][1].tolist()))
        assert all(full[gene] == value for gene, value in row.items())
    assert np.allclose(cell_vectors(gpt, genes, values, real).numpy(), recorded[f"{run}__X_scGPT"], rtol=0, atol=1e-6)
    ours = tokens_of(gpt, adata, max_length=case["max_length"])
    assert np.array_equal(ours.lengths, real.sum(1).numpy())
    for (genes, _), (all_genes, _) in zip(ours, whole):
        assert len(set(genes)) == len(genes) and set(genes) <= set(all_genes) and genes[0] == gpt.vocabulary.cls


@QUIET
def test_keyed_draws_lie_in_the_middle_of_the_originals(recorded):
    gpt, case = loaded("counts"), META["runs"]["counts"]
    adata, mean = cells_of("counts"), recorded["counts__mean_over_20_seeds"]

    def vectors(**options):
        return gpt.embed(adata, gene_column=COLUMN, max_length=case["max_length"], copy=True, **options).obsm["X_scGPT"]

    replayed = np.stack([vectors(seed=seed, original=True) for seed in range(100, 120)])
    assert np.allclose(replayed.mean(0), mean, rtol=0, atol=1e-6)
    assert np.allclose(replayed.std(0), recorded["counts__std_over_20_seeds"], rtol=0, atol=1e-6)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    theirs = (replayed * unit).sum(-1).min()
    assert (vectors() * unit).sum(-1).min() > theirs - 0.01


# What a user's table may look like


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 2.0, (23, 60))).astype(np.float32)
    counts[:, 0] += 1
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.obs_names = [f"CELL{i}" for i in range(23)]
    adata.var_names = [f"GENE{i}" for i in range(60)]
    gpt = ScGPT.from_config("tiny", [*adata.var_names, *(f"MORE{i}" for i in range(20))], device="cpu")
    return gpt, adata


def embedded(gpt, adata, **options):
    return gpt.embed(adata, copy=True, **options).obsm["X_scGPT"]


def test_order_company_batches_and_blocks_change_nothing(small):
    gpt, adata = small
    whole = embedded(gpt, adata)
    assert whole.dtype == np.float32 and np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    order = np.random.default_rng(1).permutation(adata.n_obs)
    assert np.allclose(embedded(gpt, adata[order].copy()[:, ::-1].copy()), whole[order], atol=1e-5)
    assert np.allclose(embedded(gpt, adata[[7]].copy()), whole[[7]], atol=1e-5)
    assert np.allclose(embedded(gpt, adata, token_budget=10**6), whole, atol=1e-5)
    assert np.array_equal(embedded(gpt, adata), whole)


@pytest.mark.parametrize("store", ["dense", "csc", "int64", "with stored zeros"])
def test_how_the_counts_are_stored_changes_nothing(small, store):
    gpt, adata = small
    other, x = adata.copy(), adata.X
    if store == "dense":
        other.X = x.toarray()
    elif store == "csc":
        other.X = x.tocsc()
    elif store == "int64":
        other.X = x.astype(np.int64)
    else:
        dense = x.toarray()
        rows, columns = np.indices(dense.shape)
        other.X = sparse.csr_matrix((dense.ravel(), (rows.ravel(), columns.ravel())), shape=dense.shape)
        assert other.X.nnz > x.nnz
    assert np.array_equal(embedded(gpt, other), embedded(gpt, adata))


def test_a_file_gives_the_same_as_the_table(small, tmp_path):
    gpt, adata = small
    adata.write_h5ad(tmp_path / "cells.h5ad")
    from_file = gpt.embed(tmp_path / "cells.h5ad")
    assert np.array_equal(from_file.obsm["X_scGPT"], embedded(gpt, adata)) and from_file.X is None
    assert list(from_file.obs_names) == list(adata.obs_names)
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    gpt.embed(backed)
    assert np.array_equal(backed.obsm["X_scGPT"], from_file.obsm["X_scGPT"])


def test_layer_and_raw_are_read_where_they_are(small):
    gpt, adata = small
    other = adata.copy()
    other.layers["counts"] = other.X.copy()
    other.raw = other
    other = other[:, :30].copy()
    other.X = np.ones(other.shape, dtype=np.float32)
    assert np.array_equal(embedded(gpt, other, layer="raw"), embedded(gpt, adata))
    assert np.array_equal(embedded(gpt, other, layer="counts"), embedded(gpt, adata[:, :30].copy()))
    with pytest.raises(DataError, match="layer='count' is not in this AnnData.*Did you mean layer='counts'"):
        gpt.embed(other, layer="count")


def test_raw_of_a_file_is_read_too(small, tmp_path):
    gpt, adata = small
    other = adata[:, :30].copy()
    other.raw = adata
    other.write_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(gpt.embed(tmp_path / "cells.h5ad", layer="raw").obsm["X_scGPT"], embedded(gpt, adata))
    adata.write_h5ad(tmp_path / "no_raw.h5ad")
    with pytest.raises(DataError, match="layer='raw' is not in this AnnData"):
        gpt.embed(tmp_path / "no_raw.h5ad", layer="raw")


@QUIET
def test_memory_follows_the_batch_and_not_the_matrix():
    n_cells, n_genes, n_known = 1000, 30_000, 3_500
    counts = sparse.random(n_cells, n_genes, density=8e-4, format="csr", dtype=np.float32, random_state=0)
    counts.data = np.ceil(counts.data * 9)
    adata = anndata.AnnData(counts)
    adata.var_names = [f"GENE{i}" for i in range(n_genes)]
    gpt = ScGPT.from_config("tiny", adata.var_names[:n_known], n_layers=1, device="cpu")
    tracemalloc.start()
    gpt.embed(adata)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.25 * n_cells * n_genes * 4  # a dense float32 matrix


def test_bfloat16_is_close_to_float32(small):
    gpt, adata = small
    vectors = embedded(gpt, adata)
    half = ScGPT.from_config("tiny", gpt.vocabulary, device="cpu", dtype="bfloat16")
    other = embedded(half, adata)
    assert other.dtype == np.float32 and (vectors * other).sum(1).min() > 0.999 and not np.array_equal(vectors, other)


def test_a_new_model_depends_on_its_seed_alone(small):
    gpt, adata = small
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, two, other = (ScGPT.from_config("tiny", gpt.vocabulary, seed=seed, device="cpu") for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert np.array_equal(embedded(one, adata), embedded(two, adata))
    assert not np.allclose(embedded(one, adata), embedded(other, adata))
    with pytest.raises(OptionError, match="'n_layer' is not known.*Did you mean 'n_layers'"):
        ScGPT.from_config("tiny", gpt.vocabulary, n_layer=2)
    with pytest.raises(OptionError, match="name='small' is not known"):
        ScGPT.from_config("small", gpt.vocabulary)


def test_nothing_but_the_documented_keys_is_written(small, tmp_path):
    gpt, adata = small
    mine = adata.copy()
    before = mine.X.copy()
    gpt.embed(mine, key_added="X_mine")
    assert set(mine.obsm) == {"X_mine"} and set(mine.uns) == {"X_mine"}
    assert not len(mine.obs.columns) and not len(mine.var.columns)
    assert (before != mine.X).nnz == 0
    params = mine.uns["X_mine"]["params"]
    assert params["pool"] == "cls" and params["seed"] == 0 and params["genes"]["n_matched"] == adata.n_vars
    mine.write_h5ad(tmp_path / "cells.h5ad")
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").uns["X_mine"]["params"]["max_length"] == 1200


def test_log_normalised_counts_are_taken_and_recorded(small):
    gpt, adata = small
    other = adata.copy()
    other.X = other.X.multiply(1e4 / other.X.sum(1)).tocsr().astype(np.float32).log1p()
    gpt.embed(other)
    gpt.embed(adata_copy := adata.copy())
    assert adata_copy.uns["X_scGPT"]["params"]["whole_numbers"] and not other.uns["X_scGPT"]["params"]["whole_numbers"]
    cosine = (other.obsm["X_scGPT"] * adata_copy.obsm["X_scGPT"]).sum(1)
    assert cosine.min() > 0.9999  # only the order within a cell matters


def test_duplicated_genes_are_summed(small):
    gpt, adata = small
    split = anndata.concat([adata, adata[:, ["GENE0", "GENE3"]]], axis=1)
    x = split.X.tolil()
    x[:, 60:] = 2
    x[:, [0, 3]] = adata.X[:, [0, 3]].toarray() + 3
    split.X = x.tocsr()
    summed = adata.copy()
    x = summed.X.tolil()
    x[:, [0, 3]] = adata.X[:, [0, 3]].toarray() + 5
    summed.X = x.tocsr()
    assert np.array_equal(embedded(gpt, split), embedded(gpt, summed))


def test_genes_are_found_by_symbol_ensembl_id_and_alias(small):
    gpt, adata = small
    ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    table = dict(zip(adata.var_names, ids))
    by_id = adata.copy()
    by_id.var_names = [f"{name}.7" for name in ids]
    expected = embedded(gpt, adata)
    assert np.array_equal(embedded(gpt, by_id, match={"symbols": table}), expected)
    assert np.array_equal(
        embedded(gpt, by_id, match={"mapping": {ensembl: symbol for symbol, ensembl in table.items()}}), expected
    )
    alias = adata.copy()
    alias.var_names = ["OLDNAME", *adata.var_names[1:]]
    assert np.array_equal(embedded(gpt, alias, match={"mapping": {"OLDNAME": "GENE0"}}), expected)
    both = adata.copy()
    both.var["ensembl_id"] = ids
    assert np.array_equal(embedded(gpt, both), expected)
    with pytest.raises(DataError, match="Ensembl ids.*vocabulary holds symbols.*mapping.: {Ensembl id: symbol}"):
        gpt.embed(by_id)


def test_empty_cells_keep_their_place_with_nan_and_a_warning(small):
    gpt, adata = small
    holes = adata.copy()
    x = holes.X.tolil()
    x[[0, 5, 22]] = 0
    holes.X = x.tocsr()
    with pytest.warns(ScellfmWarning, match="3 of 23 cells have no gene that the model knows"):
        gpt.embed(holes)
    empty = np.isin(np.arange(23), [0, 5, 22])
    assert np.array_equal(np.isnan(holes.obsm["X_scGPT"]).all(1), empty)
    assert np.allclose(holes.obsm["X_scGPT"][~empty], embedded(gpt, adata)[~empty], atol=1e-5)
    assert holes.uns["X_scGPT"]["params"]["n_empty"] == 3


@pytest.mark.parametrize("overlong, said", [("sample", "were sampled"), ("top", "with the highest values were kept")])
def test_over_long_cells_are_cut_counted_and_said(small, overlong, said):
    gpt, adata = small
    n_long = int((adata.X.getnnz(1) > 19).sum())
    assert n_long > 3
    with pytest.warns(ScellfmWarning, match=f"{n_long} of 23 cells express more than the 19 genes that fit; 19 {said}"):
        gpt.embed(mine := adata.copy(), max_length=20, overlong=overlong)
    assert mine.uns["X_scGPT"]["params"]["n_overlong"] == n_long
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.allclose(
            embedded(gpt, adata[::-1].copy(), max_length=20, overlong=overlong)[::-1], mine.obsm["X_scGPT"], atol=1e-5
        )


def test_seeds_and_names_decide_what_is_drawn(small):
    gpt, adata = small
    first = embedded(gpt, adata)
    assert not np.allclose(embedded(gpt, adata, seed=1), first, atol=1e-4)
    twins = anndata.concat([adata[:1], adata[:1]])  # the same name twice: two occurrences, two draws
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vectors = embedded(gpt, twins)
    assert np.allclose(vectors[0], first[0], atol=1e-5) and not np.allclose(vectors[0], vectors[1], atol=1e-5)


def test_constant_cells_are_said(small):
    gpt, adata = small
    flat = adata[:3].copy()
    flat.X = sparse.csr_matrix((flat.X.toarray() > 0).astype(np.float32))
    with pytest.warns(ScellfmWarning, match="3 of 3 cells have the same value in all their genes"):
        gpt.embed(flat)
    assert np.isfinite(flat.obsm["X_scGPT"]).all()


@QUIET
@pytest.mark.parametrize("pool", ["mean", "weighted"])
def test_other_pools_ignore_padding_and_the_original_gives_cls_a_weight(small, pool):
    gpt, adata = small
    whole = embedded(gpt, adata, pool=pool)
    assert np.allclose(embedded(gpt, adata[[4]].copy(), pool=pool), whole[[4]], atol=1e-5)
    cls, pad = gpt.vocabulary.cls, gpt.vocabulary.pad
    genes, values = (
        torch.tensor([[cls, 0, 1, 2], [cls, 3, pad, pad]]),
        torch.tensor([[-2.0, 50, 17, 30], [-2, 50, -2, -2]]),
    )
    ours, theirs = (cell_vectors(gpt, genes, values, genes != pad, pool, original) for original in (False, True))
    assert torch.allclose(ours, theirs, atol=1e-5) == (pool == "mean")  # a mean differs by its length alone
    alone = cell_vectors(gpt, genes[1:, :2], values[1:, :2], genes[1:, :2] != pad, pool, True)
    assert torch.allclose(alone[0], theirs[1], atol=1e-5)


def spoiled(adata, value):
    adata = adata.copy()
    x = adata.X.toarray()
    x[4, 7] = value
    adata.X = x
    return adata


def renamed(adata, names):
    adata = adata.copy()
    adata.var_names = names
    return adata


BAD = {
    "negative": (
        lambda a: spoiled(a, -1.5),
        {},
        DataError,
        "1 negative values; the first: cell 'CELL4', gene 'GENE7' holds -1.5",
    ),
    "NaN": (
        lambda a: spoiled(a, np.nan),
        {},
        DataError,
        "1 NaN or infinite values; the first: cell 'CELL4', gene 'GENE7'",
    ),
    "scaled": (
        lambda a: anndata.AnnData(scale(a.X.toarray().astype(float)), obs=a.obs, var=a.var),
        {},
        DataError,
        "negative values; the first: cell 'CELL0'.*scaled values cannot be binned: pass raw or log-normalised counts",
    ),
    "no gene": (
        lambda a: renamed(a, [f"X{i}" for i in range(60)]),
        {},
        DataError,
        "only 0 of 60 genes .* are in the vocabulary",
    ),
    "mouse": (lambda a: renamed(a, [f"ENSMUSG{i:011d}" for i in range(60)]), {}, DataError, "another species: mouse"),
    "zeros": (lambda a: anndata.AnnData(a.X * 0, obs=a.obs, var=a.var), {}, DataError, "X holds only zeros"),
    "column": (lambda a: a, {"gene_column": "symbol"}, DataError, "adata.var has no column 'symbol'"),
    "pool": (lambda a: a, {"pool": "avg"}, OptionError, "pool='avg' is not known"),
    "length": (lambda a: a, {"max_length": 1}, OptionError, "max_length=1: a cell is <cls> and at least one gene"),
    "overlong": (lambda a: a, {"overlong": "random"}, OptionError, "overlong='random' is not known"),
    "budget": (lambda a: a, {"token_budget": -5}, OptionError, "token_budget=-5"),
    "no budget": (lambda a: a, {"token_budget": 0}, OptionError, "token_budget=0"),
    "no cells": (lambda a: None, {}, DataError, "a NoneType holds no cells; give an AnnData"),
    "file": (lambda a: "no_such_file.h5ad", {}, DataError, "there is no no_such_file.h5ad"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_what_where_and_how(small, name):
    gpt, adata = small
    make, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        gpt.embed(make(adata), **options)
    assert "X_scGPT" not in adata.obsm


def test_attention_and_gene_embeddings_are_given_by_name(small):
    gpt, adata = small
    maps = list(gpt.attention(adata[:2].copy()))
    assert [seen.cell for seen in maps] == ["CELL0", "CELL1"]
    expressed = set(adata.var_names[adata.X[0].toarray().ravel() > 0])
    assert maps[0].genes[0] == "<cls>" and set(maps[0].genes[1:]) == expressed
    assert maps[0].weights.shape == (4, len(maps[0].genes), len(maps[0].genes))
    assert np.allclose(maps[0].weights.sum(-1), 1, atol=1e-5)
    table = gpt.gene_embeddings(["GENE3", "MORE1"])
    assert table.shape == (2, 64) and list(table.index) == ["GENE3", "MORE1"]
    with pytest.raises(DataError, match="'GENE999' is not among the"):
        gpt.gene_embeddings(["GENE999"])
    with pytest.raises(OptionError, match="layer=7: this model has 3 layers"):
        next(gpt.attention(adata, head_layer=7))


# The published size


@pytest.fixture(scope="module")
def whole_human(tmp_path_factory):
    """A folder in the original's layout with its real args and vocabulary, and random tensors of the published names
    and shapes."""
    source, folder = real_data("scgpt"), tmp_path_factory.mktemp("scGPT_human")
    (folder / "args.json").write_bytes((source / "scgpt_human_args.json").read_bytes())
    (folder / "vocab.json").write_bytes((source / "scgpt_human_vocab.json").read_bytes())
    model = ScGPT.from_config("human", Vocabulary.from_file(folder / "vocab.json"), device="cpu").model
    tensors = {published_name(name): value for name, value in model.state_dict().items()}
    tensors["flag_encoder.weight"] = torch.zeros(2, model.config.d_model)
    torch.save(tensors, folder / "best_model.pt")
    return folder, tensors


def test_the_published_size_loads_with_every_tensor_accounted_for(whole_human):
    folder, tensors = whole_human
    assert len(tensors) == 163 and sum(t.numel() for t in tensors.values()) == pytest.approx(51.33e6, rel=1e-3)
    assert abs((folder / "best_model.pt").stat().st_size - 205_385_258) < 50_000  # the size of the published file
    gpt = ScGPT.from_pretrained(folder, device="cpu")
    report = gpt.load_report
    assert len(report.loaded) == 162 and report.unused == ["flag_encoder.weight"] and not report.fresh
    assert (gpt.vocabulary.pad, gpt.vocabulary.cls, gpt.vocabulary.eoc) == (60694, 60695, 60696)
    for name in ("self_attn.Wqkv.weight", "linear2.bias"):
        full = f"transformer_encoder.layers.11.{name}"
        ours = gpt.model.state_dict()[full.replace("Wqkv.", "in_proj_")]
        assert torch.equal(ours, tensors[full])


@QUIET
def test_real_cells_are_embedded_at_the_published_size(whole_human):
    cells = anndata.read_h5ad(real_data("kang18/kang18_2000.h5ad"))[:3].copy()
    gpt = ScGPT.from_pretrained(whole_human[0], device="cpu")
    gpt.embed(cells)
    report = cells.uns["X_scGPT"]["params"]["genes"]
    assert cells.obsm["X_scGPT"].shape == (3, 512) and np.isfinite(cells.obsm["X_scGPT"]).all()
    assert report["n_matched"] > 0.9 * report["n_genes"] and report["share_of_counts"] > 0.95
    shorter = embedded(gpt, cells[[1]].copy())
    assert np.allclose(shorter, cells.obsm["X_scGPT"][[1]], atol=1e-5)


@QUIET
def test_another_laboratorys_cells_are_embedded_at_the_published_size(whole_human):
    cells = anndata.read_h5ad(real_data("pbmc-2batch/pbmc_5k_protein_v3.h5ad"))
    few = cells[np.argsort(np.asarray((cells.X > 0).sum(1)).ravel())[:2]].copy()  # the quickest
    gpt = ScGPT.from_pretrained(whole_human[0], device="cpu")
    gpt.embed(few)
    assert np.allclose(np.linalg.norm(few.obsm["X_scGPT"], axis=1), 1, atol=1e-5)
    assert few.uns["X_scGPT"]["params"]["genes"]["share_of_counts"] > 0.8


@QUIET
@pytest.mark.slow
@pytest.mark.parametrize(
    "file, n_cells",
    [
        ("kang18/kang18_2000.h5ad", 200),
        ("pbmc-2batch/pbmc_10k_protein_v3.h5ad", 100),
        ("pbmc-2batch/pbmc_5k_protein_v3.h5ad", 100),
    ],
)
def test_hundreds_of_real_cells_are_embedded_at_the_published_size(whole_human, file, n_cells):
    cells = anndata.read_h5ad(real_data(file))[:n_cells].copy()
    gpt = ScGPT.from_pretrained(whole_human[0], device="cpu")
    gpt.embed(cells)
    params = cells.uns["X_scGPT"]["params"]
    expressed = (cells[:, :].X[:, gpt.match(cells).index >= 0] > 0).sum(1)
    assert params["n_overlong"] == (np.asarray(expressed).ravel() > 1199).sum() and params["n_empty"] == 0
    assert cells.obsm["X_scGPT"].shape == (n_cells, 512) and np.allclose(
        np.linalg.norm(cells.obsm["X_scGPT"], axis=1), 1, atol=1e-5
    )
    some = cells[[n_cells // 2, 3]].copy()
    assert np.allclose(embedded(gpt, some), cells.obsm["X_scGPT"][[n_cells // 2, 3]], atol=1e-5)


def test_a_vocabulary_of_another_checkpoint_is_refused(whole_human, tmp_path):
    source = real_data("scgpt")
    for name in ("args.json", "best_model.pt"):
        (tmp_path / name).symlink_to(whole_human[0] / name)
    (tmp_path / "vocab.json").write_bytes((source / "default_gene_vocab.json").read_bytes())
    with pytest.raises(AssetError, match=r"the vocabulary has [\d,]+ tokens .* the checkpoint's embedding 60,697 rows"):
        ScGPT.from_pretrained(tmp_path, device="cpu")


def test_the_published_vocabulary_is_read_at_once(yardstick):
    path = real_data("scgpt") / "scgpt_human_vocab.json"
    times = []
    for _ in range(3):
        start = time.process_time()
        vocabulary = Vocabulary.from_file(path)
        times.append(time.process_time() - start)
    assert len(vocabulary) == 60_697 and min(times) < yardstick
