"""What a bad input gets, in one list: the exception's type, the value and place it names, and what it says to do."""

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import scellfm as sf
from scellfm.core import AssetError, DataError, OptionError, ScellfmError, ScellfmWarning, StoreError

HUMAN = [f"ENSG{i:011d}" for i in range(100)]
MOUSE = [f"ENSMUSG{i:011d}" for i in range(100)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n"


def cells(change=None, **layers):
    "40 cells of 8 donors and 2 types, 100 genes; `change(dense)` spoils X."
    dense = np.random.default_rng(0).poisson(1.5, (40, 100)).astype(np.float64)
    obs = pd.DataFrame(
        {"donor": [f"d{i % 8}" for i in range(40)], "cell_type": ["B", "T"] * 20}, index=[f"cell{i}" for i in range(40)]
    )
    counts, spoilt = dense.copy(), dense if change is None else change(dense)
    adata = anndata.AnnData(sparse.csr_matrix(spoilt), obs=obs, var=pd.DataFrame(index=HUMAN))
    for name, make in layers.items():
        adata.layers[name] = sparse.csr_matrix(make(counts))
    return adata


def put(value):
    def change(dense):
        dense[30, 7] = value
        return dense

    return change


def with_obs(**columns):
    adata = cells()
    for name, values in columns.items():
        adata.obs[name] = values
    return adata


def probabilities(value=0.5):
    values = np.full((40, 2), 0.5)
    values[3] = value
    return values


def leaky():
    split = sf.data.hold_out(cells(), by="donor", stratify="cell_type", fractions=(0.5, 0, 0.5))
    return sf.data.Split(split.train, split.valid, np.append(split.test, split.train[:1]), "donor", 40)


def file(folder, name, content=LFS):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def load(**change):
    model = torch.nn.Linear(3, 2)
    tensors = {**model.state_dict(), **change}
    return sf.assets.load_state(
        torch.nn.Linear(3, 2), {name: value for name, value in tensors.items() if value is not None}
    )


def embedding(value, rows=slice(None)):
    adata = cells()
    adata.obsm["X_model"] = np.random.default_rng(0).normal(size=(40, 5))
    adata.obsm["X_model"][rows] = value
    return adata


def tokenizer(**options):
    return sf.geneformer.RankTokenizer.fit(cells(), **options)


def named():
    adata = cells()
    adata.var = pd.DataFrame({"ensembl_id": HUMAN}, index=[f"JAK{i}" for i in range(100)])
    return adata


def perturb(**options):
    gf = sf.geneformer.Geneformer.from_config("tiny", tokenizer(max_length=12), device="cpu")
    return gf.perturb(cells(), **{"genes": HUMAN[:2], "state": "cell_type", "start": "B", "goal": "T"} | options)


def mixing(adata, batch):
    return sf.scores.integration(adata, reps=["X_model"], batch=batch, label="cell_type")


check, match, hold_out = sf.data.check_counts, sf.data.match_genes, sf.data.hold_out
classify = sf.scores.classification
TYPES = np.array(["B", "T"])
TRUTH = np.array(["B", "T"] * 20)

# what is wrong: (what is done in an empty folder, the type, words of the message: value and place first, the fix last)
ERRORS = {
    "log-normalised, counts in a layer": (
        lambda _: check(cells(np.log1p, counts=lambda x: x)),
        DataError,
        ["not integers", "'cell0'", "0.693147", "layer='counts'"],
    ),
    "log-normalised, no counts": (
        lambda _: check(cells(np.log1p)),
        DataError,
        ["0.693147", "use the file with the raw counts"],
    ),
    "scaled layer": (
        lambda _: check(cells(scaled=lambda x: x - 1.5), "scaled"),
        DataError,
        ["layer 'scaled'", "'cell0'", "-0.5", "X (layer=None): pass that"],
    ),
    "negative count": (
        lambda _: check(cells(put(-3))),
        DataError,
        ["1 negative", "'cell30'", HUMAN[7], "-3", "raw counts"],
    ),
    "NaN": (
        lambda _: check(cells(put(np.nan))),
        DataError,
        ["1 values", "'cell30'", HUMAN[7], "nan", "repair or drop"],
    ),
    "infinite": (lambda _: check(cells(put(np.inf))), DataError, ["'cell30'", HUMAN[7], "inf", "repair or drop"]),
    "NaN for a baseline": (
        lambda _: sf.baselines.counts_csr(cells(put(np.nan)).X),
        DataError,
        ["nan", "cell 30", "gene 7", "pass raw counts"],
    ),
    "no cells": (lambda _: check(cells()[:0]), DataError, ["0 cells x 100 genes", "check earlier filters"]),
    "no genes": (lambda _: check(cells()[:, :0]), DataError, ["40 cells x 0 genes", "check earlier filters"]),
    "no cells to split": (lambda _: hold_out(cells()[:0]), DataError, ["0 cells", "filter"]),
    "only zeros": (lambda _: check(cells(lambda x: x * 0)), DataError, ["only zeros", "40 cells", "raw counts"]),
    "no such layer": (
        lambda _: check(cells(counts=lambda x: x), "count"),
        DataError,
        ["'count'", "Did you mean layer='counts'?"],
    ),
    "symbols where ids are needed": (
        lambda _: match([f"SYM{i}" for i in range(50)], HUMAN),
        DataError,
        ["0 of 50 genes (0.0%)", "'SYM0'", "match={'symbols': {symbol: Ensembl id}}"],
    ),
    "under a tenth of the genes known": (
        lambda _: match([*HUMAN[:9], *[f"X{i}" for i in range(91)]], HUMAN),
        DataError,
        ["9 of 100", "'X0'", "match={'mapping': {old: current}}"],
    ),
    "mouse": (lambda _: match(MOUSE, HUMAN), DataError, ["mouse (100)", MOUSE[0], "match={'orthologs': {"]),
    "two species": (
        lambda _: match([*HUMAN, *MOUSE[:30]], HUMAN),
        DataError,
        ["two species", "mouse (30)", MOUSE[0], "Keep one species"],
    ),
    "integers for gene names": (
        lambda _: match(range(30), HUMAN),
        DataError,
        ["integers", "'0'", "put Ensembl ids into var['ensembl_id']"],
    ),
    "no such column of genes": (
        lambda _: match(cells(), HUMAN, column="gene"),
        DataError,
        ["no column 'gene'", "it has []"],
    ),
    "no such column of obs": (
        lambda _: hold_out(cells(), by="doner"),
        DataError,
        ["by='doner'", "Did you mean 'donor'?"],
    ),
    "missing labels": (
        lambda _: hold_out(with_obs(mine=[None, *["a", "b"] * 19, "b"]), stratify="mine"),
        DataError,
        ["1 of 40", "'cell0'", "notna()"],
    ),
    "missing donors": (
        lambda _: hold_out(with_obs(mine=[np.nan, *range(39)]), by="mine"),
        DataError,
        ["1 of 40", "'cell0'", "notna()"],
    ),
    "one class": (
        lambda _: hold_out(with_obs(mine="only"), stratify="mine"),
        DataError,
        ["'mine'", "single class, 'only'", "choose another column"],
    ),
    "a class of one cell": (
        lambda _: hold_out(with_obs(mine=["rare", *["a"] * 39]), stratify="mine"),
        DataError,
        ["'rare' has 1 cell", "3 parts", "join it with another"],
    ),
    "one donor": (lambda _: hold_out(with_obs(mine="d"), by="mine"), DataError, ["1 group", "(d)", "by=None"]),
    "one class to score": (
        lambda _: classify(np.full(40, "B"), probabilities(), TYPES),
        DataError,
        ["'B'", "hold out other donors"],
    ),
    "a label that no model knows": (
        lambda _: classify(np.append(TRUTH[1:], "NK"), probabilities(), TYPES),
        DataError,
        ["'NK'", "leave them out"],
    ),
    "missing labels to score": (
        lambda _: classify(pd.Series(TRUTH).where(np.arange(40) != 5), probabilities(), TYPES),
        DataError,
        ["1 of 40", "row 5", "leave them out"],
    ),
    "NaN probabilities": (
        lambda _: classify(TRUTH, probabilities(np.nan), TYPES),
        DataError,
        ["1 of 40", "nan in row 3", "leave these cells out"],
    ),
    "logits for probabilities": (
        lambda _: classify(TRUTH, probabilities(-2.0), TYPES),
        DataError,
        ["row 3", "-2", "softmax"],
    ),
    "an embedding of NaN": (
        lambda _: sf.plotting.embedding(embedding(np.nan), "X_model"),
        DataError,
        ["obsm['X_model']", "0 rows without NaN", "name another basis"],
    ),
    "an embedding of NaN to score": (
        lambda _: mixing(embedding(np.nan, 3), "donor"),
        DataError,
        ["obsm['X_model']", "1 of 40", "'cell3'", "leave them out"],
    ),
    "log-normalised cells to tokenize": (
        lambda _: tokenizer()(cells(np.log1p, counts=lambda x: x)),
        DataError,
        ["'cell0'", HUMAN[0], "0.693147", "log-normalised", "layer="],
    ),
    "a gene that the model does not know": (
        lambda _: perturb(genes=["NOSUCH"]),
        DataError,
        ["'NOSUCH'", "100 genes", "tokenizer.genes"],
    ),
    "an id with a digit too few": (
        lambda _: perturb(genes=[HUMAN[0][:-1]]),
        DataError,
        [repr(HUMAN[0][:-1]), "100 genes", "give an id or symbol"],
    ),
    "a symbol misspelt": (
        lambda _: sf.geneformer.RankTokenizer.fit(named()).token("JKA3"),
        DataError,
        ["'JKA3'", "did you mean 'JAK3'?"],
    ),
    "no cells of the goal": (lambda _: perturb(goal="ctrl"), DataError, ["cell_type='ctrl'", "its values are B, T"]),
    "a donor on both sides": (
        lambda _: sf.data.check_leakage(hold_out(cells()), cells().obs["donor"]),
        DataError,
        ["group 'd", "is in both train and", "by="],
    ),
    "a cell on both sides": (
        lambda _: sf.data.check_leakage(leaky(), range(40)),
        DataError,
        ["row ", "both train and test", "split the cells again"],
    ),
    "a pointer for cells": (
        lambda d: sf.data.read(file(d, "cells.h5ad")),
        DataError,
        ["cells.h5ad", "Git-LFS pointer", "git lfs pull"],
    ),
    "a pointer for weights": (
        lambda d: sf.assets.read_tensors(file(d, "model.safetensors")),
        AssetError,
        ["model.safetensors", "git-lfs pointer of 126 bytes", "git lfs pull"],
    ),
    "a pointer for a dictionary": (
        lambda d: sf.assets.read_dictionary(file(d, "token_dictionary.pkl")),
        AssetError,
        ["token_dictionary.pkl", "git-lfs pointer of 126 bytes", "git lfs pull"],
    ),
    "a page for weights": (
        lambda d: sf.assets.read_tensors(file(d, "model.safetensors", "<!DOCTYPE html><title>Sign in")),
        AssetError,
        ["model.safetensors", "web page of 29 bytes", "fetch it again"],
    ),
    "cut cells": (
        lambda d: (
            cells().write_h5ad(d / "a.h5ad"),
            sf.data.read(file(d, "b.h5ad", (d / "a.h5ad").read_bytes()[:5000])),
        ),
        DataError,
        ["b.h5ad", "5000 bytes", "copy it again"],
    ),
    "a tensor is missing": (lambda _: load(bias=None), AssetError, ["bias"]),
    "a tensor too many": (lambda _: load(extra=torch.zeros(2)), AssetError, ["extra"]),
    "a tensor of another shape": (lambda _: load(weight=torch.zeros(2, 4)), AssetError, ["weight", "2, 4", "2, 3"]),
    "a folder that is a file": (
        lambda d: sf.store.Store(file(d, "taken") / "run", {"a": 1}).__enter__(),
        StoreError,
        ["taken"],
    ),
    "a name too long for the disk": (lambda d: write(d / ("x" * 300)), StoreError, ["cannot be a file here"]),
    "no such file": (
        lambda d: (file(d, "cells.h5ad"), sf.data.read(d / "cell.h5ad")),
        DataError,
        ["cell.h5ad", "did you mean 'cells.h5ad'?"],
    ),
    "an unknown format": (lambda d: sf.data.read(file(d, "cells.csv", "a,b")), DataError, [".csv", "known are .h5ad"]),
    "an unknown device": (lambda _: sf.inference.pick_device("abacus"), OptionError, ["'abacus'", "choose 'auto'"]),
    "an unknown precision": (lambda _: sf.inference.pick_dtype("float16"), OptionError, ["'float16'", "bfloat16"]),
}


def write(path):
    with sf.store.atomic_write(path) as temporary:
        temporary.write_text("x")


@pytest.mark.parametrize("what", ERRORS)
def test_what_is_wrong_is_named_with_its_value_and_the_fix(what, tmp_path):
    do, error, words = ERRORS[what]
    with pytest.raises(error) as caught:
        do(tmp_path)
    message = str(caught.value)
    assert isinstance(caught.value, ScellfmError) and "\n" not in message.strip()[:60]
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# odd, and yet possible: it goes on, and says what and where
WARNINGS = {
    "integers that were log-transformed": (
        lambda: check(logged()),
        ["uns['log1p']", "make sure that X holds raw counts"],
    ),
    "rounded logarithms beside counts": (
        lambda: check(cells(lambda x: np.rint(np.log1p(x)), counts=lambda x: x)),
        ["layer='counts'", "rounded"],
    ),
    "counts that float32 cannot hold": (
        lambda: check(large()),
        ["above 2**24", "'cell30'", HUMAN[7], "Store them as float64"],
    ),
    "cell names that repeat": (lambda: check(twins()), ["'cell0'", "obs_names_make_unique()"]),
    "under half of the genes known": (
        lambda: match([*HUMAN[:40], *[f"X{i}" for i in range(60)]], HUMAN),
        ["40 of 100", "'X0'", "match={'mapping'"],
    ),
    "names that a spreadsheet changed": (
        lambda: match([*HUMAN, "1-Mar", "2-Sep"], HUMAN),
        ["2 genes look like dates", "'1-Mar'", "original file"],
    ),
    "names in lower case": (
        lambda: match([f"actb{i}" for i in range(9)], [f"ACTB{i}" for i in range(9)]),
        ["9 gene names are in lower case"],
    ),
    "a rare class beside donors": (
        lambda: hold_out(with_obs(mine=["rare", *["a"] * 39]), by="donor", stratify="mine"),
        ["'rare'"],
    ),
    "a cell without a known gene": (lambda: tokenizer()(unknown(3)), ["1 of 40 cells", "were dropped"]),
    "one donor to draw from": (lambda: classify(TRUTH, probabilities(), TYPES, groups=np.full(40, "d")), ["one group"]),
}


def logged():
    adata = cells()
    adata.uns["log1p"] = {}
    return adata


def large():
    adata = cells(put(2.0**24 + 2))
    adata.X = adata.X.astype(np.float32)
    return adata


def unknown(cell):
    adata = cells(lambda x: np.where((np.arange(40)[:, None] == cell) & (np.arange(100) < 60), 0, x))
    adata.var_names = [*HUMAN[:60], *(f"NEW{i}" for i in range(40))]
    return adata


def twins():
    adata = cells()
    adata.obs_names = ["cell0", *adata.obs_names[:-1]]
    return adata


@pytest.mark.parametrize("what", WARNINGS)
def test_what_is_odd_is_warned_of_and_goes_on(what):
    do, words = WARNINGS[what]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        do()
    ours = [str(warning.message) for warning in seen if issubclass(warning.category, ScellfmWarning)]
    assert any(all(word in message for word in words) for message in ours), ours


# handled: no error, no warning, and the same answer


def quiet(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ScellfmWarning)
        return function(*arguments, **options)


def test_a_cell_of_one_gene_is_a_cell_like_others():
    adata = cells(lambda dense: np.where(np.arange(40)[:, None] == 9, np.eye(100)[7] * 500, dense))
    quiet(check, adata)
    logged = sf.baselines.LogNormalize().fit_transform(sf.data.count_matrix(adata))
    assert logged[9].nnz == 1 and logged[9, 7] == pytest.approx(np.log1p(1e4))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.uint32])
def test_sums_of_small_integers_do_not_overflow(dtype):
    top = np.iinfo(dtype).max if np.iinfo(dtype).max < 2**24 else 2**31 - 1
    adata = anndata.AnnData(sparse.csr_matrix(np.full((3, 4), top, dtype=dtype)))
    quiet(check, adata)
    logged = sf.baselines.LogNormalize().fit_transform(sf.data.count_matrix(adata))
    assert np.allclose(logged.toarray(), np.log1p(2500))
    assert sf.data.reading.judge(adata).total == 12.0 * top


def test_an_empty_cell_keeps_its_place():
    adata = cells(lambda dense: np.where(np.arange(40)[:, None] == 9, 0, dense))
    quiet(check, adata)
    assert sf.data.count_matrix(adata)[9].nnz == 0
    result = sf.inference.run(lambda ids, mask: ids.sum(1).double(), [[1, 2], [], [3]], device="cpu")
    assert result[[0, 2]].tolist() == [3, 3] and result[1].isnan()


def test_a_cell_of_too_many_genes_is_cut_and_counted():
    tok = tokenizer(max_length=60)
    longer = int((np.diff(cells().X.indptr) > 60).sum())
    tokens = quiet(tok, cells())
    assert (
        0 < longer == tokens.report["n_truncated"] and tokens.lengths.max() == 60 and tokens.report["max_length"] == 60
    )
    whole = tokenizer(max_length=100)(cells())
    assert all(tokens[i].tolist() == whole[i][:60].tolist() for i in range(40))


def test_cells_in_dask_are_tokenized_like_others():
    array = pytest.importorskip("dask.array")
    adata = cells()
    lazy = anndata.AnnData(array.from_array(adata.X.toarray(), chunks=(7, 100)), obs=adata.obs, var=adata.var)
    assert tokenizer()(lazy).tokens.tolist() == tokenizer()(adata).tokens.tolist()


def test_the_number_of_threads_changes_no_token_and_no_embedding():
    gf, before, seen = (
        sf.geneformer.Geneformer.from_config("tiny", tokenizer(), device="cpu"),
        torch.get_num_threads(),
        [],
    )
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            seen.append((gf.cells(cells()).tokens.tolist(), gf.embed(cells(), copy=True).obsm["X_geneformer"]))
    finally:
        torch.set_num_threads(before)
    assert seen[0][0] == seen[1][0] and np.allclose(seen[0][1], seen[1][1], atol=1e-5)


def test_genes_named_twice_are_counted_to_be_summed():
    matched = quiet(match, [*HUMAN, HUMAN[3] + ".7", HUMAN[3].lower()], HUMAN)
    assert matched.report["n_duplicated"] == 2 and matched.index[[3, 100, 101]].tolist() == [3, 3, 3]


def test_versions_of_ids_are_stripped():
    assert (quiet(match, [f"{gene}.12" for gene in HUMAN], HUMAN).index == np.arange(100)).all()


def test_a_path_with_spaces_and_letters_of_any_script_is_written_and_read(tmp_path):
    folder = tmp_path / "größe 長さ" / ("x" * 120) / ("y" * 120)
    with sf.store.Store(folder / "läufe", {"a": 1}) as store:
        store.write("teil", x=np.arange(3))
    cells().write_h5ad(folder / "zellen 1.h5ad")
    assert (sf.data.count_matrix(sf.data.read(folder / "zellen 1.h5ad")) != sf.data.count_matrix(cells())).nnz == 0
    with sf.store.Store(folder / "läufe", {"a": 1}) as store:
        assert store.done("teil") and store.read("teil")["x"].tolist() == [0, 1, 2]


def test_a_view_is_used_and_neither_it_nor_its_parent_changes():
    parent = cells(counts=lambda x: x)
    view = parent[5:25, 10:60]
    before = sf.store.fingerprint(parent)
    (
        quiet(check, view),
        quiet(match, view, HUMAN),
        quiet(hold_out, view, stratify="cell_type"),
        sf.data.count_matrix(view, "counts"),
    )
    sf.baselines.count_features().fit(sf.data.count_matrix(view))
    assert view.is_view and sf.store.fingerprint(parent) == before


def test_the_number_of_threads_changes_no_loss_and_the_seed_does():
    def losses(threads, seed):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        model, rows = (
            torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Tanh(), torch.nn.Linear(100, 2)),
            torch.randn(64, 200),
        )
        loss = lambda m, b: (torch.nn.functional.cross_entropy(m(b), (b[:, 0] > 0).long(), reduction="sum"), len(b))  # noqa: E731
        return sf.training.fit(
            model, loss, 64, lambda at, epoch: rows[torch.as_tensor(at)], epochs=3, seed=seed, device="cpu"
        ).steps.loss

    before = torch.get_num_threads()
    try:
        assert np.allclose(losses(1, 0), losses(2, 0), atol=1e-5) and not np.allclose(
            losses(1, 0), losses(1, 1), atol=1e-5
        )
    finally:
        torch.set_num_threads(before)
