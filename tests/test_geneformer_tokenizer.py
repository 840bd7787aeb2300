"""The tokenizer against the recorded outputs of the original, on real cells, on files, and on what must be refused."""

import json
import os
import subprocess
import sys
import threading
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from conftest import golden, real_data
from scipy import sparse

from scellfm import core
from scellfm.core import AssetError, DataError, OptionError, ScellfmWarning, StoreError
from scellfm.geneformer import RankTokenizer
from scellfm.geneformer.tokenizer import tokenizing
from scellfm.geneformer.tokenizer.dictionaries import Dictionaries, check_dictionaries
from scellfm.geneformer.tokenizer.ranking import encode
from scellfm.geneformer.tokenizer.tokenized import TokenizedCells

GOLDEN = golden("geneformer")
META = json.loads((GOLDEN / "meta.json").read_text())["tokenizer"] if (GOLDEN / "meta.json").exists() else {}
RECORDED = [(case, variant) for case in META for variant in META[case] if META[case][variant]["ok"]]
DIFFERENT_ON_PURPOSE = {"explicit_zeros", "same_id_duplicates", "zero_ncounts_dense", "version_suffix"}
SAME = [pair for pair in RECORDED if pair[0] not in DIFFERENT_ON_PURPOSE]


def dictionary(name):
    return json.loads((GOLDEN / "dicts" / f"{name}.json").read_text())


def tokenizer(case, variant):
    options = META[case][variant]["options"]
    mapping = dictionary("ensembl_mapping") if options["mapping_file"] else None
    return RankTokenizer(
        dictionary(f"token_dictionary_{options['dict']}"),
        dictionary("gene_median"),
        mapping,
        max_length=options["model_input_size"],
        special=options["special_token"],
    )


def cells_of(case):
    with np.load(GOLDEN / "tokenizer" / f"{case}.input.npz") as z:
        z = dict(z)
    x = sparse.csr_matrix((z["data"], z["indices"], z["indptr"]), shape=tuple(z["shape"]))
    obs = pd.DataFrame({"n_counts": z["n_counts"]}, index=[f"cell{i}" for i in range(x.shape[0])])
    if "filter_pass" in z:
        obs["filter_pass"] = z["filter_pass"]
    var = pd.DataFrame({"ensembl_id": z["ensembl_id"].astype(str)}, index=[f"gene{i}" for i in range(x.shape[1])])
    return anndata.AnnData(x.toarray() if "dense" in case else x, obs=obs, var=var)


def recorded(case, variant):
    with np.load(GOLDEN / "tokenizer" / f"{case}.{variant}.npz") as z:
        return dict(z)


def run(case, variant):
    options = META[case][variant]["options"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        return tokenizer(case, variant)(cells_of(case), keep_counts=options.get("keep_counts", False))


def slow_values(case, variant):
    "For every cell {token: x / n_counts * 1e4 / median}, by loops over entries, duplicates summed."
    options, adata, medians = META[case][variant]["options"], cells_of(case), dictionary("gene_median")
    tokens = dictionary(f"token_dictionary_{options['dict']}")
    mapping = dictionary("ensembl_mapping") if options["mapping_file"] else {}
    genes = [gene.upper().split(".")[0] for gene in adata.var["ensembl_id"]]
    genes = [mapping.get(gene, gene) for gene in genes]
    rows = []
    for row, n in zip(sparse.csr_matrix(adata.X).toarray().astype(float), adata.obs["n_counts"]):
        values = {}
        for x, gene in zip(row, genes):
            if x > 0 and gene in tokens:
                values[tokens[gene]] = values.get(tokens[gene], 0) + x / n * 1e4 / medians[gene]
        rows.append(values)
    return rows


def assert_same_up_to_ties(ours, theirs, values, special, cut):
    "The rules of the golden README: equal values along the tokens, equal tokens within each group of equal values."
    assert len(ours) == len(theirs)
    if special:
        assert (ours[0], ours[-1]) == (theirs[0], theirs[-1])
        ours, theirs = ours[1:-1], theirs[1:-1]
    along = [np.array([values[int(t)] for t in tokens]) for tokens in (ours, theirs)]
    np.testing.assert_allclose(along[0], along[1], rtol=1e-6)
    starts = np.flatnonzero(np.r_[True, np.abs(np.diff(along[1])) > 1e-9 * along[1][1:]])
    for start, stop in zip(starts, np.r_[starts[1:], len(ours)]):
        if not (cut and stop == len(ours)):
            assert sorted(ours[start:stop]) == sorted(theirs[start:stop])


@pytest.mark.parametrize("case,variant", SAME)
def test_tokens_are_those_of_the_original(case, variant):
    cells, expected, values = run(case, variant), recorded(case, variant), slow_values(case, variant)
    assert cells.cell_index.tolist() == expected["cell_index"].tolist()
    assert cells.lengths.tolist() == expected["length"].tolist()
    special = META[case][variant]["options"]["special_token"]
    for i, row in enumerate(cells.cell_index):
        theirs = expected["tokens"][expected["offsets"][i] : expected["offsets"][i + 1]]
        cut = len(values[row]) > len(theirs) - 2 * special
        assert_same_up_to_ties(cells[i].tolist(), theirs.tolist(), values[row], special, cut)
    if case == "float_counts":
        assert cells.tokens.tolist() == expected["tokens"].tolist()


@pytest.mark.parametrize("case,variant", [p for p in RECORDED if META[p[0]][p[1]]["options"].get("keep_counts")])
def test_kept_counts_are_those_of_the_original(case, variant):
    cells, expected, values = run(case, variant), recorded(case, variant), slow_values(case, variant)
    medians, genes = dictionary("gene_median"), tokenizer(case, variant).genes
    rows = np.repeat(cells.cell_index, cells.lengths)
    slow = [values[row][t] * medians[genes[t]] if t in values[row] else 0.0 for row, t in zip(rows, cells.tokens)]
    np.testing.assert_allclose(cells.counts, slow, rtol=1e-6)
    theirs = {
        (row, t): c
        for row, t, c in zip(
            np.repeat(expected["cell_index"], expected["length"]), expected["tokens"], expected["counts"]
        )
    }
    shared = [(c, theirs[row, t]) for row, t, c in zip(rows, cells.tokens, cells.counts) if (row, t) in theirs]
    assert len(shared) > 0.9 * len(cells.tokens)
    np.testing.assert_allclose(*zip(*shared), rtol=1e-6)


@pytest.mark.parametrize("case,variant", RECORDED)
def test_every_recorded_case_equals_the_slow_definition_exactly(case, variant):
    cells, values, tok = run(case, variant), slow_values(case, variant), tokenizer(case, variant)
    adata = cells_of(case)
    chosen = adata.obs["filter_pass"].to_numpy() == 1 if "filter_pass" in adata.obs else np.ones(adata.n_obs, bool)
    assert cells.cell_index.tolist() == [i for i, v in enumerate(values) if v and chosen[i]]
    for i, row in enumerate(cells.cell_index):
        limit = tok.max_length - 2 * tok.special
        cut = len(values[row]) > limit
        order = sorted(values[row], key=lambda t: (-values[row][t], t))[:limit]
        assert_same_up_to_ties(
            cells[i].tolist(), [tok.cls, *order, tok.eos] if tok.special else order, values[row], tok.special, cut
        )


def pairs_of(case):
    return [variant for name, variant in RECORDED if name == case]


def test_stored_zeros_are_not_tokens_unlike_the_original():
    for variant in pairs_of("explicit_zeros"):
        cells, expected, values = (
            run("explicit_zeros", variant),
            recorded("explicit_zeros", variant),
            slow_values("explicit_zeros", variant),
        )
        dropped = 0
        for i, row in enumerate(cells.cell_index):
            theirs = expected["tokens"][expected["offsets"][i] : expected["offsets"][i + 1]]
            real = [t for t in theirs.tolist() if t in values[row]]
            dropped += len(theirs) - len(real)
            assert_same_up_to_ties(cells[i].tolist(), real, values[row], False, False)
        assert dropped > 0


def test_columns_of_one_identifier_are_summed_unlike_in_the_original():
    for variant in pairs_of("same_id_duplicates"):
        cells, expected = run("same_id_duplicates", variant), recorded("same_id_duplicates", variant)
        repeated = 0
        for i in range(len(cells)):
            theirs = expected["tokens"][expected["offsets"][i] : expected["offsets"][i + 1]].tolist()
            ours = cells[i].tolist()
            assert len(set(ours)) == len(ours) and set(ours) == set(theirs)
            repeated += len(theirs) - len(ours)
        assert repeated > 0


def test_a_dense_empty_cell_gets_no_tokens_unlike_in_the_original():
    for variant in pairs_of("zero_ncounts_dense"):
        cells, expected, values = (
            run("zero_ncounts_dense", variant),
            recorded("zero_ncounts_dense", variant),
            slow_values("zero_ncounts_dense", variant),
        )
        empty = [i for i, v in enumerate(values) if not v]
        assert (
            empty
            and set(empty) <= set(expected["cell_index"].tolist())
            and not set(empty) & set(cells.cell_index.tolist())
        )
        for i, row in enumerate(cells.cell_index):
            at = expected["cell_index"].tolist().index(row)
            theirs = expected["tokens"][expected["offsets"][at] : expected["offsets"][at + 1]]
            assert_same_up_to_ties(cells[i].tolist(), theirs.tolist(), values[row], False, False)


def test_identifiers_with_a_version_are_known_unlike_in_the_original():
    for variant in pairs_of("version_suffix"):
        cells, expected, tok = (
            run("version_suffix", variant),
            recorded("version_suffix", variant),
            tokenizer("version_suffix", variant),
        )
        ids = cells_of("version_suffix").var["ensembl_id"]
        mapping = tok.mapping or {}
        versioned = {mapping.get(gene.split(".")[0], gene.split(".")[0]) for gene in ids if "." in gene}
        plain = {mapping.get(gene, gene) for gene in ids if "." not in gene}
        versioned -= plain
        values, gained = slow_values("version_suffix", variant), 0
        for i, row in enumerate(cells.cell_index):
            at = expected["cell_index"].tolist().index(row)
            theirs = expected["tokens"][expected["offsets"][at] : expected["offsets"][at + 1]].tolist()
            kept = [t for t in cells[i].tolist() if tok.genes[t] not in versioned]
            gained += len(cells[i]) - len(kept)
            if not {tok.genes[t] for t in theirs} & {
                mapping.get(g.split(".")[0], g.split(".")[0]) for g in ids if "." in g
            }:
                assert_same_up_to_ties(kept, theirs, values[row], False, False)
        assert gained > 0


def write_loom(adata, path):
    "As adata.write_loom does, which anndata 0.13 cannot (it hands loompy a layer without a name)."
    import loompy

    row, col = (
        {
            name: table[name]
            .to_numpy(object if table[name].dtype.kind not in "biuf" else None)
            .astype(str if table[name].dtype.kind not in "biuf" else table[name].dtype)
            for name in table
        }
        for table in (adata.var, adata.obs)
    )
    row["var_names"], col["obs_names"] = (
        adata.var_names.to_numpy(object).astype(str),
        adata.obs_names.to_numpy(object).astype(str),
    )
    loompy.create(str(path), sparse.csr_matrix(adata.X).toarray().T, row, col)


@pytest.mark.parametrize(
    "case,variant", [p for p in SAME if p[0] in ("zarr", "loom", "loom_collapse", "collapse", "filter_pass", "dense")]
)
def test_files_give_the_tokens_of_memory(case, variant, tmp_path):
    tok, adata, form = tokenizer(case, variant), cells_of(case), META[case][variant]["format"]
    path = tmp_path / f"cells.{form}"
    {"h5ad": adata.write_h5ad, "zarr": adata.write_zarr, "loom": lambda path: write_loom(adata, path)}[form](path)
    tok.tokenize_files(path, tmp_path / "out.dataset")
    saved, memory = TokenizedCells.load(tmp_path / "out.dataset"), tok(adata)
    assert saved.tokens.tolist() == memory.tokens.tolist() and saved.offsets.tolist() == memory.offsets.tolist()
    assert saved.cell_index.tolist() == memory.cell_index.tolist() and list(saved.obs.index) == list(memory.obs.index)
    assert tok(path).tokens.tolist() == memory.tokens.tolist()


@pytest.fixture
def small():
    draw = np.random.default_rng(0)
    x = sparse.csr_matrix(draw.poisson(0.7, (30, 20)).astype(np.float32))
    x[4] = 0
    x.eliminate_zeros()
    obs = pd.DataFrame(
        {"donor": pd.Categorical(list("abc") * 10), "age": np.arange(30), "score": draw.random(30)},
        index=[f"c{i}" for i in range(30)],
    )
    return anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(20)]))


def fitted(adata, **options):
    return RankTokenizer.fit(adata, **options)


def test_fitted_medians_are_exact(small):
    tok = fitted(small)
    dense = small.X.toarray().astype(float)
    dense = dense[dense.sum(1) > 0]
    dense = dense / dense.sum(1, keepdims=True) * 1e4
    for gene, median in tok.medians.items():
        column = dense[:, small.var_names.get_loc(gene)]
        assert median == np.float32(np.median(column[column > 0])) or np.isclose(
            median, np.median(column[column > 0]), rtol=1e-7
        )


def test_fit_does_not_depend_on_the_order_of_cells_or_genes(small):
    order = np.random.default_rng(1)
    shuffled = small[order.permutation(30)][:, order.permutation(20)].copy()
    assert fitted(small).dictionaries == fitted(shuffled).dictionaries


def test_fit_over_files_equals_fit_in_memory(small, tmp_path):
    small[:11].write_h5ad(tmp_path / "a.h5ad")
    small[11:].write_zarr(tmp_path / "b.zarr")
    assert fitted(tmp_path).dictionaries == fitted(small).dictionaries == fitted([small[:11], small[11:]]).dictionaries


def test_medians_of_files_that_do_not_fit_into_memory_are_the_same(small, tmp_path, monkeypatch):
    from functools import partial

    from scellfm.geneformer.tokenizer import rank_tokenizer as module

    expected, read, readings = fitted(small).dictionaries, module.source_levels, []

    def counted(source, tokens):
        readings.append(source.name)
        return read(source, tokens)

    for i in range(3):
        small[10 * i : 10 * i + 10].write_h5ad(tmp_path / f"{i}.h5ad")
    monkeypatch.setattr(module, "source_levels", counted)
    monkeypatch.setattr(module, "exact_medians", partial(module.exact_medians, budget=30))  # of 260 values
    assert fitted(tmp_path).dictionaries == expected
    assert len(readings) >= 3 * 3 and len(set(readings)) == 3


def test_special_tokens_frame_every_cell(small):
    tok = fitted(small, special=True, max_length=6)
    with pytest.warns(ScellfmWarning, match="1 of 30 cells"):
        cells = tok(small)
    assert (cells.tokens[cells.offsets[:-1]] == tok.cls).all() and (
        cells.tokens[cells.offsets[1:] - 1] == tok.eos
    ).all()
    assert cells.lengths.max() == 6 and cells.report["n_truncated"] == (np.diff(small.X.indptr) > 4).sum() > 0
    assert (tok.pad, tok.mask, tok.cls, tok.eos) == (0, 1, 2, 3)


def test_empty_cells_are_dropped_kept_or_refused(small):
    tok = fitted(small, special=True)
    with pytest.warns(ScellfmWarning, match="dropped"):
        dropped = tok(small)
    with pytest.warns(ScellfmWarning, match="stay"):
        kept = tok(small, empty="keep")
    assert len(dropped) == 29 and 4 not in dropped.cell_index and dropped.report["n_empty"] == 1
    assert len(kept) == 30 and kept[4].tolist() == [tok.cls, tok.eos]
    with pytest.raises(DataError, match="'c4'"):
        tok(small, empty="error")
    with pytest.raises(OptionError):
        tok(small, empty="ignore")


def test_columns_are_carried_and_renamed(small, tmp_path):
    tok = fitted(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        cells = tok(small, columns={"donor": "who", "age": "age", "score": "score"}, keep_counts=True)
        small.write_h5ad(tmp_path / "cells.h5ad")
        tok.tokenize_files(
            tmp_path / "cells.h5ad",
            tmp_path / "out",
            columns={"donor": "who", "age": "age", "score": "score"},
            keep_counts=True,
        )
    assert list(cells.obs["who"]) == list(small.obs["donor"].iloc[cells.cell_index])
    from datasets import load_from_disk

    theirs, ours = load_from_disk(str(tmp_path / "out")), TokenizedCells.load(tmp_path / "out")
    assert set(theirs.column_names) == {"input_ids", "length", "counts", "who", "age", "score"}
    assert theirs["who"] == list(cells.obs["who"]) and theirs["length"] == cells.lengths.tolist()
    assert np.array_equal(ours.counts, cells.counts) and list(ours.obs["age"]) == list(cells.obs["age"])
    assert np.allclose(ours.obs["score"], cells.obs["score"], rtol=0)
    with pytest.raises(DataError, match="did you mean 'donor'|Did you mean 'donor'"):
        tok(small, columns=["doner"])
    with pytest.raises(DataError, match="length"):
        tok(small, columns={"age": "length"})


def test_saved_cells_open_in_datasets_and_come_back(small, tmp_path):
    from datasets import Dataset, load_from_disk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        cells = fitted(small, special=True)(small, columns=["donor"])
    cells.save(tmp_path / "ours")
    back, theirs = TokenizedCells.load(tmp_path / "ours"), load_from_disk(str(tmp_path / "ours"))
    assert back.special and back.report == cells.report and back.tokens.dtype == np.uint16
    assert [row["input_ids"] for row in theirs] == [cells[i].tolist() for i in range(len(cells))]
    Dataset.from_dict({"input_ids": [c.tolist() for c in cells], "length": cells.lengths.tolist()}).save_to_disk(
        str(tmp_path / "original")
    )
    original = TokenizedCells.load(tmp_path / "original")
    assert np.array_equal(original.tokens, cells.tokens) and original.special
    assert cells.to_dataset()["donor"] == list(cells.obs["donor"])


def test_many_shards_open_as_one(small, tmp_path):
    from datasets import load_from_disk

    from scellfm.geneformer.tokenizer.tokenized import DatasetWriter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        cells = fitted(small)(small)
    with DatasetWriter(tmp_path / "shards", shard_bytes=1) as writer:
        for start in range(0, len(cells), 7):
            writer.write(cells[start : start + 7])
        writer.finish(cells.report, cells.special)
    assert len(list((tmp_path / "shards").glob("data-*-of-00005.arrow"))) == 5
    assert load_from_disk(str(tmp_path / "shards"))["input_ids"][28] == cells[28].tolist()
    assert np.array_equal(TokenizedCells.load(tmp_path / "shards").tokens, cells.tokens)


def test_the_input_is_never_changed(small):
    from scellfm.store import fingerprint

    tok = fitted(small)
    before = fingerprint(small)
    view = small[5:20]
    assert view.is_view
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tok(view, columns=["donor"], keep_counts=True)
    assert view.is_view and fingerprint(small) == before


def test_the_way_of_storing_makes_no_difference(small, tmp_path):
    tok = fitted(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        expected = tok(small)
        forms = [
            small.X.tocsc(),
            small.X.toarray(),
            small.X.astype(np.int64),
            small.X.astype(np.uint16),
            small.X.astype(np.float64),
        ]
        for x in forms:
            assert np.array_equal(tok(anndata.AnnData(x, small.obs, small.var)).tokens, expected.tokens)
        for x, name in ((small.X, "csr"), (small.X.tocsc(), "csc"), (small.X.toarray(), "dense")):
            anndata.AnnData(x, small.obs, small.var).write_h5ad(tmp_path / f"{name}.h5ad")
            backed = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
            assert np.array_equal(tok(backed).tokens, expected.tokens)
            assert np.array_equal(tok(tmp_path / f"{name}.h5ad").tokens, expected.tokens)
            backed.file.close()
        layered = anndata.AnnData(np.log1p(small.X), small.obs, small.var, layers={"counts": small.X})
        layered.raw = anndata.AnnData(small.X, small.obs, small.var)
        layered.write_h5ad(tmp_path / "layered.h5ad")
        for layer in ("counts", "raw"):
            assert np.array_equal(tok(layered, layer=layer).tokens, expected.tokens)
            assert np.array_equal(tok(tmp_path / "layered.h5ad", layer=layer).tokens, expected.tokens)
        with pytest.raises(DataError, match="log-normalised"):
            tok(layered)
        with pytest.raises(DataError, match="log-normalised"):
            tok(tmp_path / "layered.h5ad")


@pytest.mark.parametrize("value,word", [(-1.0, "holds -1"), (np.nan, "nan"), (np.inf, "inf")])
def test_what_is_not_a_count_is_refused_with_its_place(small, value, word):
    tok = fitted(small)
    small.X[7, 3] = value
    with pytest.raises(
        DataError, match=f"'c7'.*'ENSG00000000003' {word if word.startswith('holds') else 'holds ' + word}"
    ):
        tok(small)


def test_cells_that_cannot_be_tokenized_at_all_are_an_error(small):
    tok = fitted(small)
    for nothing in (small[:0], small[4:5]):
        with pytest.raises(DataError):
            tok(nothing.copy())
    with pytest.raises(DataError, match="mouse"):
        mouse = small.copy()
        mouse.var_names = [f"ENSMUSG{i:011d}" for i in range(20)]
        tok(mouse)


def test_an_interrupted_run_leaves_nothing(small, tmp_path):
    small.write_h5ad(tmp_path / "a.h5ad")
    bad = small.copy()
    bad.X[3, 3] = -2
    bad.write_h5ad(tmp_path / "b.h5ad")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="b.h5ad"):
        fitted(small).tokenize_files(tmp_path, tmp_path / "out" / "cells")
    assert not list((tmp_path / "out").iterdir())


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def many(small):
    "Four blocks of cells, with cells that are filtered out, empty cells, and a column to keep."
    rng = np.random.default_rng(3)
    many = small[rng.integers(0, small.n_obs, 6500)].copy()
    many.obs_names = [f"cell{i}" for i in range(many.n_obs)]
    many.X[2100] = 0
    many.obs = pd.DataFrame(
        {"filter_pass": rng.integers(0, 9, many.n_obs) > 0, "day": rng.integers(0, 9, many.n_obs)}, many.obs_names
    )
    return many


@pytest.mark.filterwarnings("ignore:.*no count in any known gene", "ignore:.*fewer than 20 counts")
def test_the_number_of_threads_changes_no_byte(many, tmp_path, monkeypatch):
    many.write_h5ad(tmp_path / "cells.h5ad")
    tok, files, memory = fitted(many), {}, {}
    for threads in (1, 2, 3):
        monkeypatch.setattr(core.settings, "threads", threads)
        out = tmp_path / f"{threads}.dataset"
        tok.tokenize_files(tmp_path / "cells.h5ad", out, columns=["day"], keep_counts=True)
        cells = tok(many, columns=["day"], keep_counts=True)
        files[threads] = content(out)
        memory[threads] = (cells.tokens.tobytes(), cells.counts.tobytes(), cells.obs.to_csv(), cells.report)
    assert len(TokenizedCells.load(out)) == len(cells) < many.obs["filter_pass"].sum()
    assert files[1] == files[2] == files[3] and memory[1] == memory[2] == memory[3]


@pytest.mark.filterwarnings("ignore:.*no count in any known gene", "ignore:.*fewer than 20 counts")
def test_every_core_ranks_by_default(many, monkeypatch):
    from concurrent import futures

    pools, real = [], futures.ThreadPoolExecutor
    monkeypatch.setattr(futures, "ThreadPoolExecutor", lambda n, *name: pools.append(n) or real(n, *name))
    monkeypatch.setattr(core.settings, "threads", None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    fitted(many)(many)
    assert pools and set(pools) == {4}  # one for each of three cores, and one that reads ahead


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("broken", ["reading", "ranking"])
def test_an_error_comes_after_the_results_before_it_on_any_number_of_threads(threads, broken):
    def read():
        for number in range(9):
            if broken == "reading" and number == 6:
                raise DataError("6 is damaged")
            yield number

    def rank(number):
        if broken == "ranking" and number >= 6:
            raise DataError(f"{number} is damaged")
        return -number

    found = []
    with pytest.raises(DataError, match="6 is damaged"):
        for value in core.in_order(rank, read(), threads):
            found.append(value)
    assert found == [0, -1, -2, -3, -4, -5]
    assert list(core.in_order(abs, [], threads)) == []
    assert next(core.in_order(abs, iter(range(-9, 0)), threads)) == 9  # left early: nothing hangs


@pytest.mark.filterwarnings("ignore:.*no count in any known gene", "ignore:.*fewer than 20 counts")
def test_blocks_are_ranked_on_several_threads_and_the_first_bad_one_is_named(many, monkeypatch):
    monkeypatch.setattr(core.settings, "threads", 3)
    seen, rank = set(), tokenizing.encode
    monkeypatch.setattr(
        tokenizing, "encode", lambda *given, **how: seen.add(threading.current_thread().name) or rank(*given, **how)
    )
    tok = fitted(many)
    tok(many, empty="keep")
    assert len(seen) > 1 and all(name.startswith("scellfm") for name in seen)
    many.obs["filter_pass"] = True
    many.X[[2200, 5000], [3, 3]] = -2
    with pytest.raises(DataError, match="cell2200"):
        tok(many)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("scellfm")]


def test_damaged_and_missing_files_are_named(small, tmp_path):
    tok = fitted(small)
    small.write_h5ad(tmp_path / "a.h5ad")
    whole = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "a.h5ad").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="a.h5ad"):
        tok(tmp_path / "a.h5ad")
    for missing in (tmp_path / "none.h5ad", str(tmp_path / "nofolder")):
        with pytest.raises(DataError, match="no"):
            tok.tokenize_files(missing, tmp_path / "out")
    with pytest.raises(DataError, match="state.json"):
        TokenizedCells.load(tmp_path)
    assert issubclass(StoreError, OSError)


def test_a_folder_is_read_in_the_order_of_names(small, tmp_path):
    tok = fitted(small)
    small[20:].write_h5ad(tmp_path / "c.h5ad")
    small[:10].write_h5ad(tmp_path / "a.h5ad")
    write_loom(small[10:20], tmp_path / "b.loom")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScellfmWarning)
        report = tok.tokenize_files(tmp_path, tmp_path / "out", columns="donor")
        expected = tok(small)
    cells = TokenizedCells.load(tmp_path / "out")
    assert np.array_equal(cells.tokens, expected.tokens) and list(cells.obs.index) == list(expected.obs.index)
    assert report["n_cells"] == 30 and [r["n_cells"] for r in report["files"]] == [10, 10, 10]


def test_many_genes_take_four_bytes():
    x = sparse.csr_matrix(np.array([[1.0, 2.0]]))
    assert encode(x, np.ones(2), np.array([70_000, 5]), 9).tokens.dtype == np.uint32
    assert encode(x, np.ones(2), np.array([65_535, 5]), 9).tokens.tolist() == [5, 65_535]


def test_tokenizer_saves_and_loads(small, tmp_path):
    tok = RankTokenizer.fit(small, special=True, max_length=11)
    tok.save_pretrained(tmp_path)
    again = RankTokenizer.from_pretrained(tmp_path)
    assert (again.dictionaries, again.max_length, again.version) == (tok.dictionaries, 11, "fitted")
    assert RankTokenizer.from_pretrained(tmp_path, special=False).cls is None


def test_generations_tell_themselves():
    folder = GOLDEN / "dicts"
    for version, words, length in (("V1", 2, 2048), ("V2", 4, 4096)):
        tok = RankTokenizer.from_pretrained(folder, version=version)
        assert (tok.version, tok.max_length, tok.special) == (version, length, version == "V2")
        assert len(tok.genes) == len(tok.medians) + words and list(tok.genes[:2]) == ["<pad>", "<mask>"]
    with pytest.raises(AssetError, match="version="):
        RankTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "change,word",
    [
        (lambda t, m: t.pop("<pad>"), "pad"),
        (lambda t, m: t.update({"<cls>": 9}), "cls"),
        (lambda t, m: t.update({"B": 2}), "share"),
        (lambda t, m: m.pop("A"), "median"),
        (lambda t, m: m.update({"A": 0.0}), "above 0"),
    ],
)
def test_dictionaries_that_do_not_fit_are_refused(change, word):
    tokens, medians = {"<pad>": 0, "<mask>": 1, "A": 2, "B": 3}, {"A": 1.0, "B": 2.0}
    change(tokens, medians)
    with pytest.raises(AssetError, match=word):
        check_dictionaries(Dictionaries(tokens, medians))


@pytest.mark.parametrize("version,genes,jak3", [("v1", 25_426, 3140), ("v2", 20_275, 3125)])
def test_real_cells_with_the_official_dictionaries(version, genes, jak3, tmp_path):
    folder, path = real_data(f"geneformer-{version}"), real_data("kang18/kang18_2000.h5ad")
    tok = RankTokenizer.from_pretrained(folder)
    assert (
        tok.version == version.upper()
        and len(tok.genes) == genes
        and tok.token("JAK3") == jak3
        and tok.symbol(jak3) == "JAK3"
    )
    adata = anndata.read_h5ad(path)
    cells = tok(adata, columns=["condition", "donor"])
    report = tok.tokenize_files(path, tmp_path / "kang.dataset", columns=["condition", "donor"])
    saved = TokenizedCells.load(tmp_path / "kang.dataset")
    assert len(cells) == adata.n_obs == report["n_kept"] and np.array_equal(saved.tokens, cells.tokens)
    assert list(saved.obs["donor"]) == list(adata.obs["donor"].astype(str)) and report["genes"]["share_of_counts"] > 0.8
    index, x = tok.match(adata).index, adata.X.astype(np.float64).toarray()
    for i in (0, 777, 1999):
        value = {}
        for column in np.flatnonzero((index >= 0) & (x[i] > 0)):
            value[index[column]] = value.get(index[column], 0.0) + x[i, column]
        value = {t: v / tok.medians[tok.genes[t]] for t, v in value.items()}
        genes_only = cells[i][1:-1] if tok.special else cells[i]
        assert genes_only.tolist() == sorted(value, key=lambda t: (-value[t], t))[: tok.max_length]
    assert np.array_equal(tok(adata[:200], engine="numpy").tokens, cells[:200].tokens)


def test_official_pickles_give_the_same_tokenizer(tmp_path):
    import shutil

    for version in ("v1", "v2"):
        folder = real_data(f"geneformer-{version}")
        (tmp_path / version).mkdir()
        for path in folder.glob("*.pkl"):
            shutil.copy(path, tmp_path / version)
        pickled, plain = RankTokenizer.from_pretrained(tmp_path / version), RankTokenizer.from_pretrained(folder)
        assert pickled.token_dictionary == plain.token_dictionary and pickled.medians == plain.medians


def test_tokens_do_not_depend_on_the_processor(small, tmp_path):
    small.write_h5ad(tmp_path / "cells.h5ad")
    code = (
        "import sys, hashlib, warnings; warnings.simplefilter('ignore'); from scellfm.geneformer import RankTokenizer; "
        "tok = RankTokenizer.fit(sys.argv[1]); "
        "print(*[hashlib.sha256(tok(sys.argv[1], engine=e).tokens).hexdigest() for e in ('numba', 'numpy')])"
    )
    seen = set()
    for off in ("", "X86_V4 X86_V3"):
        env = os.environ | ({"NPY_DISABLE_CPU_FEATURES": off} if off else {})
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "cells.h5ad")],
            capture_output=True,
            text=True,
            env=env,
        )
        if done.returncode == 0 or not off:
            seen |= set(done.stdout.split())
    assert len(seen) == 1


def test_a_data_set_that_names_no_files_is_named(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="state.json names no data files"):
        TokenizedCells.load(tmp_path)
